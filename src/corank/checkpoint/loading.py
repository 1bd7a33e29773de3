"""Opening a model directory, compressed or dense, with one clear sentence for whatever is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from corank.checkpoint.verify import check_digests, check_readable, corank_config, read_config, weight_files
from corank.errors import CorankError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | Mapping[str, Any] | None = None,
    *,
    verify: bool = True,
    tokenizer: bool = True,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Open a model directory.

    Args:
        path: directory, compressed by corank or dense.
        dtype: of the parameters; None takes the stored one.
        device: a device, `"auto"` or a device map; None is the CPU.
        verify: compare the SHA-256 of compressed weight files before loading. The norms of the factors are
            always compared after loading.
        tokenizer: also load the tokenizer; a model of images or sound may have none.
        kwargs: passed on to `from_pretrained`.

    Returns:
        (model in evaluation mode, tokenizer or None).

    Raises:
        CorankError: not a model directory, newer format, missing or damaged file, missing tokenizer, weights
            that do not fit the config.
    """
    root = Path(path)
    config = read_config(root)
    section = corank_config(config)
    files = weight_files(root)
    check_readable(files)
    if section is not None and not files:
        raise CorankError(f"{root} has no safetensors weights; download or write the model again.")
    has_tokenizer = any((root / name).is_file() for name in TOKENIZER_FILES)
    if tokenizer and not has_tokenizer and _reads_text(config):
        raise CorankError(f"{root} has no tokenizer; copy the tokenizer files of the original model into it.")
    if verify and section is not None:
        check_digests(root, section.files or {})
    if device is not None:
        kwargs["device_map"] = device if isinstance(device, str | Mapping) else str(device)
    try:
        model, info = _model_class(config, kwargs).from_pretrained(
            root,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            **{"ignore_mismatched_sizes": True, **kwargs},
        )
        _refuse_random(root, info)
        return model, _tokenizer(root, kwargs) if tokenizer and has_tokenizer else None
    except (CorankError, torch.OutOfMemoryError):
        raise
    except (OSError, RuntimeError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CorankError(f"Could not load {root}: {reason}") from error


def _refuse_random(root: Path, info: Mapping[str, Any]) -> None:
    missing = sorted(info["missing_keys"])
    if missing:
        raise CorankError(
            f"{root} lacks {len(missing)} parameters (first: {missing[0]}), which would be random; "
            "download or write the model again."
        )
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise CorankError(
            f"{name} has shape {list(stored)} in the files of {root} and {list(expected)} in its config; "
            "they do not belong together."
        )


def _model_class(config: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Any:
    """The class named in the config; custom code and configs without a class go through the Auto classes."""
    architecture = (config.get("architectures") or [""])[0]
    custom = kwargs.get("trust_remote_code") and "AutoModelForCausalLM" in (config.get("auto_map") or {})
    if not custom and hasattr(transformers, architecture):
        return getattr(transformers, architecture)
    if custom or config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _reads_text(config: Mapping[str, Any]) -> bool:
    """Whether a model's main input is text; of an architecture that is not known, assumed."""
    known = (getattr(transformers, name, None) for name in config.get("architectures") or [])
    return all(getattr(cls, "main_input_name", "input_ids") == "input_ids" for cls in known if cls is not None)


def _tokenizer(root: Path, kwargs: Mapping[str, Any]) -> Any:
    trust = bool(kwargs.get("trust_remote_code"))
    return transformers.AutoTokenizer.from_pretrained(root, trust_remote_code=trust)
