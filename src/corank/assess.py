"""Before and after: evaluate a dense model and its compressed form side by side, and complete the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from corank.api import evaluate, load
from corank.evaluate import sample, speed
from corank.evaluate.perplexity import context_length
from corank.model import Text
from corank.recipe import get
from corank.report import Report
from corank.report.card import write_card
from corank.report.html import write_html

PROMPT = "The most surprising thing about the history of mathematics is"
Step = Callable[[str, int, int], None]
"""Called with (what, done, of)."""


def silent(what: str, done: int, of: int) -> None:
    """Report nothing."""


def perplexities(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[Text],
    windows: int | None,
    window: int,
    name: str,
    step: Step,
) -> dict[str, dict[str, Any]]:
    """Perplexity on each text, by the text's source."""
    found = {}
    for text in texts:
        step(f"perplexity of {name} on {text.source}", 0, windows or 1)
        result = evaluate(
            model,
            tokenizer,
            text,
            window=window,
            max_windows=windows,
            progress=lambda done, of, text=text: step(f"perplexity of {name} on {text.source}", done, of),  # type: ignore[misc]
        )
        found[text.source] = result.to_json()
    return found


def assess(
    report: Report,
    dense: str | Path,
    compressed: str | Path,
    texts: Sequence[Text],
    *,
    windows: int | None = 16,
    window: int = 512,
    known: dict[str, Any] | None = None,
    timed: bool = False,
    prompt: str = PROMPT,
    step: Step = silent,
) -> Report:
    """Add perplexities, a generation and (if `timed`) speeds of both models to a report.

    Args:
        report: of the compression.
        dense, compressed: the two models, as `corank.load` takes them.
        texts: to evaluate on, none of them the calibration text.
        windows: windows per text, None for the whole text.
        window: tokens in a window.
        known: perplexities of the dense model that are known already, as `report.evaluation["dense"]`.
        timed: time prefill and decoding of both, interleaved.
        prompt: to continue.
        step: progress.
    """
    small, tokenizer = load(compressed)
    if small.main_input_name != "input_ids":  # of images or sound: there is no text to judge it by
        return report
    after = perplexities(small, tokenizer, texts, windows, window, report.method, step)
    generation = {report.method: continuation(small, tokenizer, prompt)}
    before = known
    rows: list[dict[str, Any]] = []
    if before is None or timed:
        big, _ = load(dense)
        before = before or perplexities(big, tokenizer, texts, windows, window, "the dense model", step)
        generation = {"dense": continuation(big, tokenizer, prompt), **generation}
        if timed:
            step("speed", 0, 1)
            room = min(context_length(big) or 288, 288)  # prompt and new tokens
            pair = {"dense": big, report.method: small}
            rows = [row.to_json() for row in speed(pair, prompt_tokens=room * 8 // 9, new_tokens=room // 9, repeats=3)]
    return dataclasses.replace(
        report, evaluation={"dense": before, "compressed": after}, generation=generation, speed=rows or report.speed
    )


def continuation(model: PreTrainedModel, tokenizer: Any, prompt: str, tokens: int = 40) -> dict[str, Any]:
    """A continuation of the prompt, or of its last words where the context is short."""
    context = context_length(model)
    if context is not None and len(tokenizer(prompt)["input_ids"]) > context // 2:
        prompt, tokens = prompt[-context // 4 :], min(tokens, context // 4)
    return sample(model, tokenizer, prompt, max_new_tokens=tokens).to_json()


def write_documents(report: Report, directory: Path) -> None:
    """Write report.json, report.html and the model card into a compressed model's directory."""
    report.save(directory / "report.json")
    write_html(report, directory / "report.html")
    write_card(report, directory / "README.md", cite=get(report.method).cite)
