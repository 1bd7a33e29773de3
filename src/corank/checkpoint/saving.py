"""Writing a model directory: all of it beside the target first, then one rename."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from corank.checkpoint import modeling_corank
from corank.checkpoint.config import CorankConfig
from corank.checkpoint.integers import plain
from corank.checkpoint.quantizer import FALLBACK_MODULE, CorankQuantizer
from corank.checkpoint.skeleton import collect, factorized
from corank.checkpoint.verify import INDEX, digests, fingerprint_of_files, weight_files
from corank.errors import CorankError
from corank.factors import ExpertList
from corank.model.names import catches

MARKER = ".corank-save"


def check_target(out: str | os.PathLike[str]) -> Path:
    """The directory to be made: it must not exist yet, or be empty.

    Raises:
        CorankError: something is there already.
    """
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CorankError(f"{target} already exists and is not an empty directory; choose another or remove it.")
    return target


def attach(
    model: Any,
    modules: dict[str, dict[str, Any]] | None = None,
    *,
    recipe: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    shape: dict[str, Any] | None = None,
) -> CorankConfig:
    """Make `model.save_pretrained` write a corank checkpoint.

    A module that was tied to another before it was factorized is untied, which the config then says.

    Args:
        model: a transformers model with factorized modules.
        modules: name -> spec; None reads them off the model.
        recipe, plan, provenance, shape: stored as they are; None keeps what the model already carries.

    Returns:
        The config, now at `model.config.quantization_config`.
    """
    modules = collect(model) if modules is None else modules
    untie(model, modules)
    keep_names(model, modules)
    before = getattr(model.config, "quantization_config", None)
    kept = before if isinstance(before, CorankConfig) else CorankConfig()
    config = CorankConfig(
        modules,
        recipe=recipe if recipe is not None else kept.recipe,
        plan=plan if plan is not None else kept.plan,
        provenance=provenance if provenance is not None else kept.provenance,
        shape=shape if shape is not None else kept.shape,
    )
    model.config.quantization_config = config
    model.hf_quantizer = CorankQuantizer(config)
    return config


def untie(model: Any, modules: Iterable[str]) -> None:
    """Turn weight tying off when it involves one of `modules`; the other tied parameters become copies.

    Raises:
        CorankError: the architecture cannot be untied.
    """
    ties = getattr(model, "all_tied_weights_keys", {})
    factorized = set(modules)
    if not _tied(factorized, ties):
        return
    _refuse_to_untie(model.config.to_dict(), factorized, ties)
    for target in ties:
        owner, _, leaf = target.rpartition(".")
        if owner not in factorized:  # those have tensors of their own
            module = model.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(getattr(module, leaf).detach().clone()))
    model.all_tied_weights_keys = {}
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False


def keep_names(model: Any, modules: Iterable[str]) -> None:
    """Store a model under its own names if the architecture's conversions would catch a factor.

    Some architectures store other names and shapes than they compute with (experts one by one), and convert by
    patterns on the name.
    """
    parts = (f"{name}.{part}" for name in modules for part in model.get_submodule(name).state_dict(keep_vars=True))
    if any(isinstance(module, ExpertList) for module in model.modules()) or catches(model, parts):
        model._weight_conversions = []


def save(
    model: Any,
    tokenizer: Any,
    out: str | os.PathLike[str],
    *,
    recipe: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    documents: Mapping[str, str] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a model directory that `from_pretrained` loads, completely or not at all.

    Everything is written to `<out>.partial`, which is renamed at the end. A dense model is written as an
    ordinary dense checkpoint.

    Args:
        model: a transformers model, with or without factorized modules.
        tokenizer: tokenizer or processor to store with it, or None.
        out: directory to make; absent or empty.
        recipe, plan, provenance: stored in config.json.
        documents: file name -> text, written beside the weights (report, model card).
        max_shard_size: largest size of one safetensors file.

    Returns:
        The directory.

    Raises:
        CorankError: the target exists or cannot be written, the disk is full, factors are not finite or of different
            dtypes, adapters are not merged. No target exists afterwards.

    Warns about a model of several dtypes: transformers loads all parameters in one.
    """
    target = check_target(out)
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists() and not (partial / MARKER).exists():
        raise CorankError(f"{partial} is left from an unfinished run; resume that run or remove the directory.")
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise CorankError("The model carries adapters; merge them first with `model = model.merge_and_unload()`.")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise CorankError(
            "The model is sharded over processes; gather it on all of them, and on rank 0 save it with "
            "`model.save_pretrained(out, state_dict=accelerator.get_state_dict(model))`."
        )
    _check_dtypes(model)
    modules = collect(model)
    before = getattr(model.config, "quantization_config", None)
    compressed = bool(modules) or (isinstance(before, CorankConfig) and before.shape is not None)
    if compressed:
        attach(model, modules, recipe=recipe, plan=plan, provenance=provenance)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / MARKER).touch()
        _check_space(model, partial)
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        if not _stored_as_named(model, modules, partial):
            model.save_pretrained(partial, max_shard_size=max_shard_size, save_original_format=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        for name, text in (documents or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        if compressed:
            config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
            kept = model.config.quantization_config
            written = finish_directory(
                partial,
                config,
                modules,
                recipe=kept.recipe,
                plan=kept.plan,
                provenance=kept.provenance,
                shape=kept.shape,
                fingerprint=kept.fingerprint if kept.fingerprint.keys() == modules.keys() else None,
            )
            kept.fingerprint, kept.files = written.fingerprint, written.files
        (partial / MARKER).unlink()
        return publish(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CorankError(f"Could not write {target}: {error}. Nothing has been kept.") from error
        raise


def finish_directory(
    partial: str | os.PathLike[str],
    config: Any,
    modules: dict[str, dict[str, Any]],
    files: Iterable[str] | Mapping[str, str] | None = None,
    *,
    recipe: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    provenance: dict[str, Any] | None = None,
    fingerprint: dict[str, float] | None = None,
    shape: dict[str, Any] | None = None,
) -> CorankConfig:
    """Turn a directory that holds the weights into a loadable checkpoint; the last step before `publish`.

    Writes config.json, the index of the shards if there are several and no index yet, and the module for
    loading without this package. No model is needed in memory.

    Args:
        partial: directory with safetensors files whose keys are `state_dict` names, every factorized module
            with all its tensors, the empty `weight` included.
        config: the config of the model: a transformers config, or the content of its config.json.
        modules: name -> spec of every factorized module; dense ones need none.
        files: names of the safetensors files, with their SHA-256 if already known; None takes all there are.
        recipe, plan, provenance: stored as they are.
        fingerprint: name -> norm of the factors; None computes it from the files.
        shape: widths of the blocks, where the config does not say them.

    Returns:
        The config as written.

    Raises:
        CorankError: a tensor is missing or does not fit its spec, a norm is not finite, or a tied module is
            factorized that has to stay tied.
    """
    root = Path(partial)
    names = sorted(path.name for path in root.glob("*.safetensors")) if files is None else list(files)
    known = dict(files) if isinstance(files, Mapping) else {}
    known.update(digests(root / name for name in names if name not in known))
    if not (root / INDEX).exists() and names != ["model.safetensors"]:
        _write_index(root, names)
    if fingerprint is None:
        fingerprint = fingerprint_of_files(weight_files(root), modules)
    _refuse_non_finite(fingerprint)
    section = CorankConfig(
        modules, recipe=recipe, plan=plan, provenance=provenance, fingerprint=fingerprint, files=known, shape=shape
    )
    content = dict(config) if isinstance(config, Mapping) else json.loads(config.to_json_string())
    content["quantization_config"] = section.to_dict()
    _untie_config(content, modules)
    doors = {} if shape is not None else _auto_map(content, modules)  # the fallback knows nothing of widths
    if doors:
        content["auto_map"] = {**doors, **(content.get("auto_map") or {})}
        shutil.copyfile(str(modeling_corank.__file__), root / f"{FALLBACK_MODULE}.py")
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (root / "config.json").write_text(text, encoding="utf-8")
    return section


def publish(partial: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Rename a finished directory to its final name.

    Raises:
        CorankError: the target exists and is not an empty directory.
    """
    target = check_target(out)
    if target.exists():
        target.rmdir()
    os.replace(partial, target)
    return target


def _refuse_non_finite(norms: Mapping[str, float]) -> None:
    for name, norm in norms.items():
        if not norm < float("inf"):
            raise CorankError(f"{name}: the factors hold NaN or infinite values; they cannot be saved.")


def _check_dtypes(model: Any) -> None:
    """The factors of one module have one dtype, or could not be multiplied; those of a model should."""
    for name, layer in factorized(model).items():
        found = {_plain_name(p.dtype) for p in layer.parameters() if p.is_floating_point()}
        if len(found) > 1:
            raise CorankError(
                f"{name}: its factors mix {' and '.join(sorted(found))}; cast the model to one dtype first."
            )
    kept = {k for end in ("", "_strict") for k in getattr(model, f"_keep_in_fp32_modules{end}", None) or ()}
    others = [p.dtype for n, p in model.named_parameters() if p.is_floating_point() and not any(k in n for k in kept)]
    found = {_plain_name(dtype) for dtype in others}
    if len(found) > 1:
        warnings.warn(
            f"The model mixes {' and '.join(sorted(found))}; transformers loads all parameters in the dtype of the "
            f"first one, {_plain_name(model.dtype)}. Cast it before saving, e.g. model.to(torch.{_plain_name(model.dtype)}).",
            stacklevel=3,
        )


def _plain_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_space(model: Any, folder: Path) -> None:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in plain(model.state_dict()).values()
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta
    }
    needed, free = sum(storages.values()), shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free"
        raise CorankError(f"Not enough room on the disk of {folder.parent}: the model {sizes}.")


def _stored_as_named(model: Any, modules: Iterable[str], folder: Path) -> bool:
    """Whether the tensors of every factorized module are on disk under their `state_dict` names.

    Some architectures store other names and shapes than they compute with and convert by patterns on the
    name, which may catch a factor by mistake.
    """
    stored: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as reader:
            stored.update(reader.keys())
    names = {f"{name}.{part}" for name in modules for part in model.get_submodule(name).state_dict(keep_vars=True)}
    return names <= stored


def _write_index(root: Path, names: Iterable[str]) -> None:
    weight_map, total = {}, 0
    for name in names:
        with safe_open(root / name, framework="pt") as reader:
            weight_map.update(dict.fromkeys(reader.keys(), name))
        total += (root / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (root / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tied(modules: Iterable[str], ties: Mapping[str, str]) -> list[str]:
    return [name for name in modules if f"{name}.weight" in {*ties, *ties.values()}]


def _refuse_to_untie(content: Mapping[str, Any], modules: Iterable[str], ties: Mapping[str, str]) -> None:
    # T5 and its relatives always tie, or scale their outputs by whether they are tied.
    if content.get("is_encoder_decoder"):
        name = _tied(modules, ties)[0]
        kind = content.get("model_type")
        raise CorankError(f"{name} shares its weight with the embeddings, as {kind} requires; leave it dense.")


def _untie_config(content: dict[str, Any], modules: Iterable[str]) -> None:
    for architecture in content.get("architectures") or []:
        ties = getattr(getattr(transformers, architecture, None), "_tied_weights_keys", None) or {}
        if isinstance(ties, dict) and _tied(modules, ties):
            _refuse_to_untie(content, modules, ties)
            content["tie_word_embeddings"] = False
            if isinstance(content.get("text_config"), dict):
                content["text_config"]["tie_word_embeddings"] = False


def _auto_map(content: Mapping[str, Any], modules: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The Auto classes that load this architecture, each pointing at the shipped fallback.

    Empty when the fallback cannot help: an architecture outside transformers, or a kind or form it does not know.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stock = any(hasattr(transformers, name) for name in content.get("architectures") or [])
    kinds, forms = {spec["kind"] for spec in modules.values()}, {spec.get("form") for spec in modules.values()}
    known = kinds <= set(modeling_corank.KINDS) and forms <= {None, *modeling_corank.FORMS}
    if not stock or not known or content.get("model_type") not in CONFIG_MAPPING:
        return {}
    config_class = CONFIG_MAPPING[content["model_type"]]
    autos = (name for name in dir(transformers) if name.startswith("AutoModel"))
    return {
        name: f"{FALLBACK_MODULE}.{name}"
        for name in autos
        if config_class in getattr(getattr(transformers, name), "_model_mapping", ())
    }
