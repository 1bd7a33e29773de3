"""Text from a model piece by piece, as it is generated; stopping at a string, or when nobody listens any more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from corank.evaluate.perplexity import context_length, input_device


@dataclass(frozen=True)
class Wish:
    """What to generate.

    Attributes:
        ids: the prompt's token ids, at least one.
        max_tokens: at most this many new tokens; prompt and new tokens fit the context.
        temperature: 0 for greedy decoding.
        top_p: sample from the most likely tokens that hold this share of the probability.
        seed: of the sampling; None: whatever the generator's state is.
        stop: strings at which to end; they are not part of the text.
    """

    ids: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A piece of the text.

    Attributes:
        text: new text, possibly empty.
        tokens: new tokens generated so far.
        reason: None while it goes on; at the end "stop" (end-of-text token or stop string) or "length".
    """

    text: str
    tokens: int
    reason: str | None = None


class Writer:
    """Generates with one model, one wish at a time: others wait for their turn.

    Args:
        model: a transformers model with `generate`.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context = context_length(model)
        self._turn = threading.Lock()
        end = model.generation_config.eos_token_id
        end = tokenizer.eos_token_id if end is None else end
        self._ends = set(end if isinstance(end, list | tuple) else [] if end is None else [end])

    def write(self, wish: Wish) -> Iterator[Piece]:
        """The text as pieces; the last one, and only it, has a reason. Closing the iterator stops the generation."""
        tokens: SimpleQueue[int | None | BaseException] = SimpleQueue()
        enough = threading.Event()
        worker = threading.Thread(target=self._generate, args=(wish, tokens, enough), daemon=True)
        worker.start()
        try:
            yield from self._pieces(wish, tokens)
        finally:
            enough.set()
            worker.join()

    def _generate(self, wish: Wish, tokens: SimpleQueue[Any], enough: threading.Event) -> None:
        device = input_device(self.model)
        inputs = torch.tensor([wish.ids], dtype=torch.long, device=device)
        choice: dict[str, Any] = {"do_sample": False}
        if wish.temperature > 0:
            choice = {"do_sample": True, "temperature": wish.temperature, "top_k": 0, "top_p": wish.top_p}
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        try:
            with self._turn, torch.no_grad(), _seeded(wish.seed, device):
                self.model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=wish.max_tokens,
                    pad_token_id=0 if pad is None else pad,
                    streamer=_TokenQueue(tokens),
                    stopping_criteria=StoppingCriteriaList([_Enough(enough)]),
                    **choice,
                )
            tokens.put(None)
        except BaseException as error:  # to be raised where the text is read
            tokens.put(error)

    def _pieces(self, wish: Wish, tokens: SimpleQueue[Any]) -> Iterator[Piece]:
        ids: list[int] = []
        sent = ""
        while True:
            token = tokens.get()
            if isinstance(token, BaseException):
                raise token
            if token is not None:
                ids.append(token)
            # All of it each time: a token's text may depend on those before it.
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            cuts = [at for at in (text.find(stop) for stop in wish.stop) if at >= 0]
            if cuts:
                yield Piece(text[len(sent) : min(cuts)], len(ids), "stop")
                return
            if token is None:
                reason = "stop" if ids and ids[-1] in self._ends else "length"
                yield Piece(text[len(sent) :], len(ids), reason)
                return
            ready = settled(text, wish.stop)
            if len(ready) > len(sent):
                yield Piece(ready[len(sent) :], len(ids))
                sent = ready


def settled(text: str, stops: tuple[str, ...]) -> str:
    """The part of a text that later tokens will not change: no half of a character, no beginning of a stop string."""
    keep = len(text.rstrip("\ufffd"))
    for stop in stops:
        for size in range(1, len(stop)):
            if text.endswith(stop[:size]):
                keep = min(keep, len(text) - size)
    return text[:keep]


@contextlib.contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _TokenQueue(BaseStreamer):
    """Puts the new tokens into a queue."""

    def __init__(self, tokens: SimpleQueue[Any]) -> None:
        self.tokens, self.prompt_seen = tokens, False

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.tokens.put(token)
        self.prompt_seen = True  # generate() gives the prompt first

    def end(self) -> None:
        """Nothing: that generate() has returned says more."""


class _Enough(StoppingCriteria):
    """Stops the generation once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
