"""The model card: README.md of a compressed checkpoint, with the front matter the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corank.errors import CorankError
from corank.jsonfile import read_json, write_text
from corank.report import numbers, summary
from corank.report.report import Report

_HUB_NAME = re.compile(r"^(?![./~])[\w.-]+(/[\w.-]+)?$")
_ARXIV = re.compile(r"^arxiv:\s*(\d{4}\.\d{4,5})(v\d+)?$", re.IGNORECASE)


_PURPOSES = {
    "CAUSAL_LM": "CausalLM",
    "MASKED_LM": "MaskedLM",
    "SEQ_TO_SEQ_CAUSAL_LM": "Seq2SeqLM",
    "SPEECH_SEQ_2_SEQ": "SpeechSeq2Seq",
    "IMAGE_TEXT_TO_TEXT": "ImageTextToText",
    "SEQUENCE_CLASSIFICATION": "SequenceClassification",
    "TOKEN_CLASSIFICATION": "TokenClassification",
    "QUESTION_ANSWERING": "QuestionAnswering",
    "IMAGE_CLASSIFICATION": "ImageClassification",
    "AUDIO_CLASSIFICATION": "AudioClassification",
    "CTC": "CTC",
}
"""transformers' name of a mapping -> the end of the name of its class, the most common first."""


def model_card(
    report: Report,
    *,
    name: str = "path/to/this/directory",
    cite: str | None = None,
    license: str | None = None,
    auto_class: str = "AutoModelForCausalLM",
    preprocessor: str | None = "AutoTokenizer",
) -> str:
    """The text of README.md.

    Args:
        report: what was done.
        name: what a user passes to ``from_pretrained``.
        cite: the source of the method; ``"arXiv:2403.07378"`` becomes a link and a tag of the hub.
        license: licence identifier of the hub, that of the base model; left out if None.
        auto_class: the class of transformers' that loads the model.
        preprocessor: the one that loads what prepares its inputs, None for nothing.

    Returns:
        Markdown with YAML front matter. A ``model`` that is a local path is not published as a base model.
    """
    base = report.model if _HUB_NAME.match(report.model) and not Path(report.model).exists() else None
    shown = base or Path(report.model).name or report.model
    parts = [
        _front_matter(report, base, cite, license),
        f"# {shown}, compressed by {report.method}\n",
        _opening(report, base, shown, cite),
        "## How to load it\n",
        _loading(name, report, auto_class, preprocessor),
        "## The four numbers\n",
        _changes(("", "Dense", "Compressed", "Kept"), summary.accounting_changes(report)),
        _facts(report),
    ]
    evaluation = summary.evaluation_changes(report)
    if evaluation:
        parts += [
            "## Evaluation\n",
            _changes(("", "Dense", "Compressed", "Ratio"), evaluation),
            _protocol(report),
        ]
    if report.sites:
        parts += [
            f"## Where the {'parameters' if report.structure else 'rank'} went\n",
            _grid(summary.role_table(report)),
        ]
    if report.speed:
        parts += ["## Speed\n", _grid(summary.speed_table(report.speed))]
    parts += ["## Limits\n", _limits(report), "## To do it again\n", _again(report)]
    return "\n".join(part for part in parts if part)


def write_card(
    report: Report,
    path: str | Path,
    *,
    name: str = "path/to/this/directory",
    cite: str | None = None,
    license: str | None = None,
) -> Path:
    """Write :func:`model_card` to ``path`` (README.md in it, if it is a directory), atomically.

    The classes that load the checkpoint are told from the files beside it.
    """
    path = Path(path)
    path = path / "README.md" if path.is_dir() else path
    known = (path.parent / "config.json").is_file()
    classes: dict[str, Any] = {}
    if known:
        classes = {"auto_class": _auto_class(path.parent), "preprocessor": _preprocessor(path.parent)}
    return write_text(path, model_card(report, name=name, cite=cite, license=license, **classes))


def _front_matter(report: Report, base: str | None, cite: str | None, license: str | None) -> str:
    fields: dict[str, Any] = {"library_name": "transformers"}
    if license is not None:
        fields["license"] = license
    if base is not None:
        fields["base_model"] = base
        fields["base_model_relation"] = "quantized"  # the hub's word for a compressed derivative
    tags = ["corank", "pruned" if report.structure else "low-rank", "compressed", report.method]
    arxiv = _ARXIV.match(cite.strip()) if cite else None
    if arxiv:
        tags.append(f"arxiv:{arxiv.group(1)}")
    fields["tags"] = list(dict.fromkeys(tags))
    lines = []
    for key, value in fields.items():
        # A JSON string is a YAML string, whatever is in it.
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item, ensure_ascii=False)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value, ensure_ascii=False)}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _opening(report: Report, base: str | None, shown: str, cite: str | None) -> str:
    model = f"[{base}](https://huggingface.co/{base})" if base else f"`{shown}`"
    arxiv = _ARXIV.match(cite.strip()) if cite else None
    source = f" ([{cite}](https://arxiv.org/abs/{arxiv.group(1)}))" if arxiv else f" ({cite})" if cite else ""
    budget = summary.settings(report.budget)
    return (
        f"{model} {_done(report)}, computed with `corank` {report.corank}".rstrip()
        + f" by the method `{summary.call(report.method, report.parameters)}`{source}"
        + (f" under the budget `{budget}`" if budget else "")
        + ".\n"
    )


def _done(report: Report) -> str:
    """What was done to the model, in a few words."""
    structure = report.structure
    if not structure:
        return "with its weight matrices replaced by factors of lower rank"
    removed, merged = len(structure["removed"]), bool(structure["merged"])
    layers = removed + len(structure["kept"])
    gone = f"{removed} of its {layers} blocks {'merged into their neighbours' if merged else 'taken away'}"
    parts = [gone] if removed else []
    parts += ["its blocks made narrower"] if structure["blocks"] else []
    parts += ["matrices replaced by factors of lower rank"] if structure.get("factorized") else []
    parts += ["its residual stream cut to fewer dimensions"] if structure.get("hidden_size") else []
    parts += ["channels of its convolutions merged"] if structure.get("folded") else []
    return "with " + (" and ".join(parts) or "all its blocks as they were")


def _loading(name: str, report: Report, auto_class: str, preprocessor: str | None) -> str:
    classes = ", ".join(filter(None, (auto_class, preprocessor)))
    lines = [
        f"from transformers import {classes}\n",
        f"model = {auto_class}.from_pretrained({json.dumps(name)})",
    ]
    if preprocessor:
        variable = "tokenizer" if preprocessor == "AutoTokenizer" else "processor"
        lines.append(f"{variable} = {preprocessor}.from_pretrained({json.dumps(name)})")
    code = "\n".join(lines)
    if report.ordinary:
        return (
            "It is an ordinary checkpoint; whatever loads models of this architecture loads it.\n\n"
            f"```python\n{code}\n```\n"
        )
    return (
        "```bash\npip install corank\n```\n\n"
        "```python\n"
        "import corank  # first: it registers the format of this checkpoint with transformers\n"
        f"{code}\n"
        "```\n\n"
        + (
            "Without `import corank` loading fails; it never gives random weights in silence.\n"
            if report.structure
            else "Without `import corank` loading fails, or falls back to the module in this directory with "
            "`trust_remote_code=True`; it never gives random weights in silence.\n"
        )
    )


def _auto_class(directory: Path) -> str:
    """The class of transformers' that loads a checkpoint, by the architecture in its config.json."""
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError, CorankError):
        return "AutoModelForCausalLM"
    from transformers.models.auto import modeling_auto

    named = set(config.get("architectures") or ())
    for purpose in _PURPOSES:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{purpose}_MAPPING_NAMES", {})
        if named & _flat(mapping.values()):
            return f"AutoModelFor{_PURPOSES[purpose]}"
    return "AutoModel" if named else "AutoModelForCausalLM"


def _flat(values: Iterable[str | tuple[str, ...]]) -> set[str]:
    return {name for value in values for name in ((value,) if isinstance(value, str) else value)}


def _preprocessor(directory: Path) -> str | None:
    """What prepares the inputs of a checkpoint: a tokenizer, another processor, or nothing that is stored."""
    for file, found in (
        ("tokenizer_config.json", "AutoTokenizer"),
        ("processor_config.json", "AutoProcessor"),
        ("preprocessor_config.json", "AutoProcessor"),
    ):
        if (directory / file).is_file():
            return found
    return None


def _facts(report: Report) -> str:
    left_out = {"Method", "Budget"}
    return "".join(f"- {label}: {value}\n" for label, value in summary.facts(report) if label not in left_out)


def _protocol(report: Report) -> str:
    said = []
    for text in report.texts():
        entry = (report.evaluation.get("compressed") or {}).get(text)
        if isinstance(entry, Mapping) and entry.get("window") is not None:
            bos = "with" if entry.get("bos") else "without"
            said.append(
                f"- {text}: {entry.get('windows', '?')} windows of {entry['window']} positions, "
                f"not overlapping, {bos} the BOS token, {entry.get('tokens', '?')} predicted tokens, "
                f"text SHA-256 `{str(entry.get('text_sha256', '?'))[:16]}`\n"
            )
    return "".join(said)


def _limits(report: Report) -> str:
    limits = ["It inherits the limits and biases of the base model, and its licence."]
    lost = [t for t in report.texts() if not numbers.finite(report.perplexity(t))]
    grown = [t for t in report.texts() if numbers.finite(ratio := report.perplexity_ratio(t)) and ratio > 1]
    if lost:
        limits.append(f"It has collapsed: its perplexity on {', '.join(lost)} is not finite. Do not use it.")
    if grown:
        worst = max(grown, key=report.perplexity_ratio)
        most = numbers.ratio(report.perplexity_ratio(worst))
        limits.append(
            f"It predicts worse than the dense model: perplexity on {worst} is {most} as high; "
            "other domains and languages may lose more."
        )
    if not report.texts():
        limits.append("It has not been evaluated: measure it on your own task before you use it.")
    source = report.data.get("text") or report.data.get("source")
    if source:
        limits.append(f"It was calibrated on {source}; text unlike it may suffer more.")
    if not report.speed:
        limits.append("Fewer parameters need not mean more tokens per second: its speed has not been measured.")
    limits += [str(warning) for warning in report.warnings]
    return "".join(f"- {' '.join(limit.split())}\n" for limit in limits)


def reproduction(report: Report) -> str | None:
    """The command line that makes the same weights again, with the same versions on the same kind of device.

    A local model or text is named by the last part of its path, as everywhere in the card; the text's hash is in
    ``report.data``.

    Returns:
        One line; None where there is no such command, because the calibration data were not text.
    """
    data = report.data
    text = data.get("text") or data.get("source")
    if text == "examples":
        return None
    options: list[tuple[str, Any]] = [("method", report.method)]
    options += [("set", f"{name}={_written(value)}") for name, value in report.parameters.items()]
    options += [(name, report.budget.get(name)) for name in ("keep", "remove", "params", "bytes", "scope")]
    options += [("data", part) for part in text.split(" + ")] if text else []
    options += [(name, data.get(name)) for name in ("samples", "length")]
    options += [("seed", report.seed), ("batch", data.get("batch")), ("dtype", report.versions.get("compute_dtype"))]
    words = ["corank", "compress", _model_name(report), "--no-eval"]
    words += [word for name, value in options if value is not None for word in (f"--{name}", _written(value))]
    return shlex.join([*words, "--out", "again"])


def _written(value: Any) -> str:
    """A setting as it is typed."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _model_name(report: Report) -> str:
    return (
        report.model if _HUB_NAME.match(report.model) and not Path(report.model).exists() else Path(report.model).name
    )


def _again(report: Report) -> str:
    facts = {
        "model": _model_name(report),
        "method": report.method,
        "parameters": dict(report.parameters),
        "budget": dict(report.budget),
        "seed": report.seed,
        "data": dict(report.data),
        "versions": dict(report.versions),
    }
    text = json.dumps(facts, ensure_ascii=False, indent=2, default=str)
    command = reproduction(report)
    parts = [
        f"```bash\n{command}\n```\n"
        if command
        else "The calibration data were batches of model inputs; `corank.compress` takes them as `data=`.\n",
        "It makes the same weights with the versions, and from data with the hash, that are written here:\n"
        if command
        else "",
        _healed(report),
        f"```json\n{text}\n```\n",
        "What became of every block is in `report.json`, with all numbers.\n"
        if report.structure
        else "The plan, a kind and a rank for every site, is in `config.json` under `quantization_config`, with the SHA-256 of "
        "the weight files (`corank verify` checks them). All numbers, site by site, are in `report.json`.\n",
    ]
    return "\n".join(part for part in parts if part)


def _healed(report: Report) -> str:
    """What was done to the weights after the command, where it was not part of the command."""
    if report.parameters.get("heal", "none") != "none":
        return ""
    steps = [f"`{step.get('how')}` ({numbers.count(step.get('trained'))} parameters)" for step in _healing(report)]
    if not steps:
        return ""
    return f"These are the weights before healing; `corank heal` then trained them: {', '.join(steps)}.\n"


def _healing(report: Report) -> list[Mapping[str, Any]]:
    found = report.extra.get("healing") or []
    return [step for step in found if isinstance(step, Mapping)]


def _changes(head: Sequence[str], changes: Sequence[summary.Change]) -> str:
    return _grid(summary.Table("", tuple(head), [tuple(change) for change in changes]))


def _grid(table: summary.Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    rule = ["---:" if i >= table.numeric else "---" for i in range(len(table.head))]
    return line(table.head) + line(rule) + "".join(line(row) for row in table.rows)
