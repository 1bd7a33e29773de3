"""Calibration text that a model writes itself: nothing to download, and what it was trained on is what it writes.

Every piece begins with a token drawn at random, as in LLM-QAT (arXiv:2305.17888), which keeps the pieces apart; all that
follows is sampled from the model's own distribution, uncut and at temperature 1, so that statistics over the pieces
estimate expectations under the model. The text is kept in the cache: it is written once.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from corank.errors import CorankError
from corank.model.outline import model_class
from corank.model.zoo import cache_directory, resolve

PREFIX = "generated:"
PIECES, LENGTH = 72, 512
"""Pieces, and tokens in each: a little more than the 64 windows of a calibration, as tokens merge at the seams."""
CACHE_BYTES = 1 << 30
"""Keys and values held at once; how many pieces are written side by side follows from it."""


def generated(source: str) -> str:
    """The text that a source ``generated:MODEL`` or ``generated:MODEL:PIECES`` names, from the cache if it is there.

    Args:
        source: MODEL is a dense causal model, a directory, hub id, ``.gguf`` file or alias; it has to fit into memory.

    Raises:
        CorankError: no such model, one that cannot write, or a number of pieces that is none.
    """
    name, _, count = source.removeprefix(PREFIX).rpartition(":")
    if not (name and count.isdigit()):
        name, count = source.removeprefix(PREFIX), str(PIECES)
    if not name or int(count) < 1:
        raise CorankError(f"{source!r}: write generated:MODEL, or generated:MODEL:PIECES with at least one piece.")
    path = resolve(name)
    target = cache_directory() / "generated" / f"{_key(path)}-{count}x{LENGTH}.json"
    if not target.is_file():
        pieces = _written(path, int(count))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        partial.write_text(json.dumps(pieces), encoding="utf-8")
        os.replace(partial, target)
    return "\n\n".join(json.loads(target.read_text(encoding="utf-8")))


def _key(path: Path) -> str:
    """Of a model directory: its weights by name and size, its configuration and tokenizer by content."""
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix == ".safetensors":
            digest.update(f"{file.name}:{file.stat().st_size}".encode())
            with file.open("rb") as f:  # the header and the first values
                digest.update(f.read(1 << 20))
        elif file.name in ("config.json", "tokenizer.json"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _written(path: Path, pieces: int) -> list[str]:
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(path)
    if getattr(config, "quantization_config", None):
        raise CorankError(f"{path} is compressed; let the dense model write the text (generated:DENSE_MODEL).")
    cls = model_class(config)
    if not cls.can_generate() or config.is_encoder_decoder:
        raise CorankError(f"{path} is a {cls.__name__}, which cannot write text by itself; give another text.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = cls.from_pretrained(path, dtype="auto").eval()
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorankError(f"{path} could not be loaded with its tokenizer: {reason}") from None
    if next(model.parameters()).device.type == "cpu":
        model.float()  # 16-bit products are slower on most CPUs
    ids = write(model, pieces, LENGTH, forbidden=tokenizer.all_special_ids, words=len(tokenizer))
    return tokenizer.batch_decode(ids)


def write(model: Any, pieces: int, length: int, *, forbidden: list[int], words: int, seed: int = 0) -> Tensor:
    """Token ids [pieces, length] sampled from a model. The global random state is left alone.

    Args:
        model: a transformers model with ``generate``.
        pieces, length: how many, and tokens in each; never more than the model's context.
        forbidden: tokens that never occur, such as special ones; the model's end of a text never does.
        words: tokens that the tokenizer knows; a model may have more.
        seed: of the samples.
    """
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    length = min(length, int(context)) if context else length
    free = torch.ones(min(words, config.vocab_size), dtype=torch.bool)
    free[[i for i in forbidden if i < len(free)]] = False
    starts = free.nonzero()[:, 0]
    if not len(starts):
        raise CorankError("The tokenizer has special tokens alone; there is nothing to write with.")
    chosen = starts[torch.randint(len(starts), (pieces, 1), generator=torch.Generator().manual_seed(seed))]
    unknown = list(range(len(free), config.vocab_size))
    batch = max(1, min(pieces, CACHE_BYTES // max(_cache_bytes(config, length, model.dtype.itemsize), 1)))
    parts = []
    bar = tqdm(total=pieces * (length - 1), desc="writing text", unit=" tokens", disable=None)

    def told(some: Tensor, _scores: Any, **_: Any) -> Tensor:
        bar.update(len(some))
        return torch.zeros(len(some), dtype=torch.bool, device=some.device)

    with bar, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for some in chosen.split(int(batch)):
            some = some.to(model.device)
            parts.append(
                model.generate(
                    some,
                    attention_mask=torch.ones_like(some),
                    max_new_tokens=length - 1,
                    min_new_tokens=length - 1,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    suppress_tokens=[*forbidden, *unknown] or None,
                    pad_token_id=0,
                    stopping_criteria=[told],
                ).cpu()
            )
    return torch.cat(parts)


def _cache_bytes(config: Any, length: int, itemsize: int) -> int:
    """Of the keys and values of one piece."""
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 2 * int(config.num_hidden_layers) * heads * head * length * itemsize
