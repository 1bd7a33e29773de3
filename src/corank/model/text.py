"""Text to calibrate on and to evaluate on.

The built-in texts need no download: they are part of every Python installation. `builtin` (for calibration)
and `builtin-test` (for evaluation) are disjoint topics of the language reference, English technical prose;
`builtin-code` is source code of the standard library, the set outside the calibration domain.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corank.errors import CorankError
from corank.model.generated import PREFIX as GENERATED
from corank.model.generated import generated

BUILTIN = ("builtin", "builtin-test", "builtin-code")


@dataclass(frozen=True)
class Text:
    """A text and where it came from. `sha256` identifies it in reports.

    Attributes:
        text: all of it.
        source: what it was read from.
        parts: of a mixture the texts that calibration draws from in equal shares; otherwise empty.
    """

    text: str
    source: str
    parts: tuple[Text, ...] = ()

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 text; of a mixture, of the hashes of its parts."""
        content = "".join(p.sha256 for p in self.parts) or self.text
        return hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def mixture(cls, texts: Iterable[Text]) -> Text:
        """Several texts to be drawn from in equal shares; of one text, that text.

        Raises:
            CorankError: there is none.
        """
        parts = tuple(texts)
        if not parts:
            raise CorankError("The list of texts is empty; give at least one.")
        if len(parts) == 1:
            return parts[0]
        return cls("\n\n".join(p.text for p in parts), " + ".join(p.source for p in parts), parts)


Source = str | Path | Text
"""Where text comes from, see `read_text`."""


@dataclass(frozen=True)
class Calibration:
    """What to calibrate on: windows of tokens, or batches of whatever the model takes in.

    Attributes:
        ids: [samples, length] token ids; empty if there are `examples`.
        mask: [samples, length] bool, True for real tokens; None if all are.
        source: description for the report, with the text's hash.
        examples: batches of model inputs by name, in place of tokens.
    """

    ids: Tensor
    mask: Tensor | None
    source: dict[str, Any]
    examples: tuple[Mapping[str, Any], ...] = ()

    def batches(self, size: int) -> list[dict[str, Any]]:
        """Model inputs, `size` windows at a time; examples come as they are."""
        if self.examples:
            return [dict(example) for example in self.examples]
        batches = []
        for i in range(0, len(self.ids), size):
            batch = {"input_ids": self.ids[i : i + size]}
            if self.mask is not None:
                batch["attention_mask"] = self.mask[i : i + size].bool()
            batches.append(batch)
        return batches


@dataclass(frozen=True, eq=False)
class Examples:
    """Calibration data of any kind: batches of model inputs, e.g. ``[{"pixel_values": x}, ...]``.

    Attributes:
        items: what the model's forward takes by name; the first size of every tensor is the batch.
    """

    items: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, items: Iterable[Mapping[str, Any]]) -> Examples:
        """Check the batches.

        Raises:
            CorankError: there are none, or one is not a mapping from names to tensors.
        """
        found = tuple(items)
        for item in found:
            if not isinstance(item, Mapping) or not any(isinstance(v, Tensor) for v in item.values()):
                raise CorankError(
                    f"Calibration data is a text, or a list of dicts of tensors as the model takes them; found a "
                    f"{type(item).__name__}."
                )
        if not found:
            raise CorankError("The list of calibration data is empty; give at least one dict of model inputs.")
        return cls(found)

    @property
    def sha256(self) -> str:
        """Hash of the names, shapes and values."""
        digest = hashlib.sha256()
        for item in self.items:
            for name, value in sorted(item.items()):
                digest.update(name.encode())
                if isinstance(value, Tensor):
                    value = value.detach().cpu().contiguous()
                    digest.update(f"{value.dtype}{list(value.shape)}".encode())
                    digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
                else:
                    digest.update(repr(value).encode())
        return digest.hexdigest()

    def calibration(self) -> Calibration:
        """The same as the engine takes it."""
        samples = sum(next(len(v) for v in item.values() if isinstance(v, Tensor)) for item in self.items)
        source = {"text": "examples", "sha256": self.sha256, "samples": samples, "batches": len(self.items)}
        return Calibration(torch.zeros(0, 0, dtype=torch.long), None, source, self.items)


def read_text(source: Source | Sequence[Source]) -> Text:
    """Read a text, or several to be mixed in equal shares.

    Args:
        source: one of `BUILTIN`; a file ``.txt``, ``.jsonl`` (its field ``text``), either with ``.gz``; or
            ``datasets:NAME[:CONFIG[:SPLIT]]`` through the `datasets` library; ``generated:MODEL``, what a dense model
            writes by itself; a `Text`, which is given back; or a list.

    Raises:
        CorankError: no such file, no text in it, or the optional extra is missing.
    """
    if isinstance(source, Text):
        return source
    if not isinstance(source, str | Path):
        return Text.mixture(map(read_text, source))
    name = str(source)
    if name in BUILTIN:
        return Text(_code() if name == "builtin-code" else _topics(test=name == "builtin-test"), name)
    if name.startswith("datasets:"):
        return Text(_from_datasets(name), name)
    if name.startswith(GENERATED):
        return Text(generated(name), name)
    path = Path(source).expanduser()
    if not path.is_file():
        raise CorankError(
            f"There is no text file {path}; give a .txt or .jsonl file, datasets:NAME, generated:MODEL, or "
            f"{', '.join(BUILTIN)}."
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8")
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CorankError(f"{path} could not be read as text ({type(error).__name__}: {error}).") from None
    if not text.strip():
        raise CorankError(f"{path} holds no text.")
    return Text(text, path.name)


def calibration(
    tokenizer: Any, text: Text, samples: int = 64, length: int = 512, seed: int = 0, bos: bool = False
) -> Calibration:
    """Cut a text into windows of tokens and draw `samples` of them without replacement.

    Windows do not overlap; which ones are drawn depends only on `seed`. Of a mixture, each text gives an equal share.

    Args:
        tokenizer: a transformers tokenizer.
        samples: number of windows.
        length: tokens in a window.
        seed: of the draw.
        bos: begin each window with the tokenizer's BOS token.

    Raises:
        CorankError: the text has fewer than `samples` windows.
    """
    if samples < 1 or length < 2:
        raise CorankError("Calibration needs at least 1 sample of at least 2 tokens.")
    parts = text.parts or (text,)
    shares = [samples // len(parts) + (i < samples % len(parts)) for i in range(len(parts))]
    drawn = [_draw(tokenizer, p, n, length - int(bos), seed) for p, n in zip(parts, shares, strict=True) if n]
    table = torch.cat(drawn)
    if bos:
        if tokenizer.bos_token_id is None:
            raise CorankError("The tokenizer has no BOS token to begin calibration windows with.")
        table = torch.cat([torch.full((samples, 1), tokenizer.bos_token_id), table], dim=1)
    source = {
        "text": text.source,
        "sha256": text.sha256,
        "samples": samples,
        "length": length,
        "seed": seed,
        "bos": bos,
    }
    return Calibration(table, None, source)


def prompted(tokenizer: Any, data: Calibration, prompt: str) -> Calibration:
    """The same windows with a text before each of them, behind the BOS token if they have one.

    Args:
        tokenizer: a transformers tokenizer.
        data: windows of tokens.
        prompt: what comes first; empty: nothing.

    Returns:
        windows; their source names the prompt, and how many tokens at the beginning are not text ("prompt_tokens").

    Raises:
        CorankError: the prompt has no tokens.
    """
    if not prompt:
        return data
    ids = torch.tensor(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if not len(ids):
        raise CorankError("The prompt has no tokens; leave it out, or give a longer one.")
    first = int(bool(data.source.get("bos")))
    before = ids.expand(len(data.ids), -1)
    table = torch.cat([data.ids[:, :first], before, data.ids[:, first:]], dim=1)
    return Calibration(table, None, {**data.source, "prompt": prompt, "prompt_tokens": first + len(ids)})


def _draw(tokenizer: Any, text: Text, samples: int, payload: int, seed: int) -> Tensor:
    """[samples, payload] token ids: windows of one text, drawn without replacement."""
    ids = torch.tensor(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    windows = len(ids) // payload
    if windows < samples:
        raise CorankError(
            f"The calibration text {text.source!r} has {len(ids)} tokens, {windows} windows of {payload}, but {samples} "
            f"are asked for; give a longer text or fewer samples (--samples {max(windows, 1)})."
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    return ids[: windows * payload].view(windows, payload)[chosen]


def _topics(test: bool) -> str:
    """Topics of the language reference, one in four (by hash of its name) for the test set.

    Topics quote each other: of the paragraphs that both sets have, only the test set keeps its own.
    """
    from pydoc_data.topics import topics

    def paragraphs(testing: bool) -> list[str]:
        chosen = [n for n in sorted(topics) if (hashlib.sha256(n.encode()).digest()[0] % 4 == 0) is testing]
        return [part.strip() for name in chosen for part in topics[name].split("\n\n") if part.strip()]

    if test:
        return "\n\n".join(paragraphs(True))
    seen = set(paragraphs(True))
    return "\n\n".join(part for part in paragraphs(False) if part not in seen)


def _code(characters: int = 400_000) -> str:
    """Modules of the standard library, in the order of the hash of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    modules = sorted(folder.glob("*.py"), key=lambda p: hashlib.sha256(p.name.encode()).hexdigest())
    parts, size = [], 0
    for module in modules:
        text = module.read_text(encoding="utf-8", errors="replace")
        parts.append(text)
        size += len(text)
        if size >= characters:
            break
    return "\n\n".join(parts)[:characters]


def _from_datasets(name: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CorankError("Text from the hub needs an optional package: pip install 'corank[eval]'.") from None
    _, dataset, *rest = name.split(":")
    config, split = (rest + [None, None])[:2]
    try:
        rows = load_dataset(dataset, config or None, split=split or "train")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorankError(f"The datasets library could not load {name!r}: {reason}") from None
    if "text" not in rows.column_names:
        raise CorankError(f"{name!r} has no column 'text' (it has {', '.join(rows.column_names)}).")
    return "\n\n".join(rows["text"])
