"""Perplexity under one fixed protocol, so that two numbers can be compared.

1. The whole text is tokenised once, without special tokens.
2. It is cut into consecutive windows that do not overlap; every window is ``window`` positions long, so that
   no window leaves the context of the model. Under the BOS policy the first position of each window is the
   BOS token and ``window - 1`` tokens of text follow it; without it all ``window`` positions are text.
3. The last, incomplete window is dropped.
4. If fewer windows are asked for than there are (``max_windows``), they are taken evenly spaced.
5. The value is exp of the mean negative log-likelihood over all predicted tokens. Both policies predict
   exactly ``window - 1`` tokens per window: the first position has no context and is never predicted.

Whether the BOS token is there can change the perplexity of some families a thousandfold (Gemma), hence the
policy is part of the result. The text and the protocol are pinned by the hash, the window and the policy in
:class:`Perplexity`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from corank.errors import CorankError

# Log-probabilities are taken in float32 over this many positions at a time: 128 MiB for a vocabulary of 128k.
_POSITIONS = 256


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """A perplexity and all that is needed to measure it again.

    Attributes:
        value: exp(nll); ``inf`` or ``nan`` if the model has collapsed.
        nll: mean negative log-likelihood per predicted token, in nats.
        tokens: number of predicted tokens.
        windows: number of windows.
        window: positions per window, the BOS token included.
        bos: whether each window begins with the BOS token.
        text_sha256: SHA-256 of the UTF-8 text.
        seconds: wall-clock time of the measurement.
        stderr: standard error of ``nll`` over the windows; ``nan`` with a single window. To first order the
            standard error of ``value`` is ``value * stderr``.
    """

    value: float
    nll: float
    tokens: int
    windows: int
    window: int
    bos: bool
    text_sha256: str
    seconds: float
    stderr: float

    @property
    def finite(self) -> bool:
        """False when the model has collapsed on this text."""
        return math.isfinite(self.value)

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict. Numbers may be non-finite: write it with ``corank.jsonfile``."""
        return dataclasses.asdict(self)


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    window: int = 512,
    max_windows: int | None = None,
    bos: bool | Literal["auto"] = "auto",
    batch_size: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Measure the perplexity of a causal language model on a text (protocol: see the module).

    Args:
        model: ``model(input_ids=[B, window] int64).logits -> [B, window, V]``, any floating dtype.
        tokenizer: a Hugging Face tokenizer.
        text: the text; a sequence of texts is joined by blank lines.
        window: positions per window, >= 2.
        max_windows: at most this many windows, evenly spaced over the text (None: all).
        bos: begin every window with the BOS token. ``"auto"``: iff the tokenizer itself adds one.
        batch_size: windows per forward pass; changes memory and time, not the value.
        progress: called with (windows done, windows in all) after every batch.

    Returns:
        A :class:`Perplexity`. A non-finite value is a result, not an error.

    Raises:
        CorankError: text shorter than one window, window longer than the model's context, a BOS token asked
            for but unknown to the tokenizer, or a meaningless number.
    """
    if window < 2:
        raise CorankError(f"window={window} leaves nothing to predict; give 2 or more.")
    if batch_size < 1:
        raise CorankError(f"batch_size={batch_size} is not possible; give 1 or more.")
    if max_windows is not None and max_windows < 1:
        raise CorankError(f"max_windows={max_windows} is not possible; give 1 or more, or None for all.")
    context = context_length(model)
    if context is not None and context < window:
        raise CorankError(f"window={window} is longer than the model's context; give window={context} or less.")
    text = text if isinstance(text, str) else "\n\n".join(text)
    windows, with_bos = cut_windows(tokenizer, text, window=window, bos=bos, max_windows=max_windows)

    started = time.perf_counter()
    device = input_device(model)
    losses: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(windows), batch_size):
                batch = windows[start : start + batch_size].to(device)
                logits = model(input_ids=batch, use_cache=False).logits
                losses.append(_window_nll(logits, batch))
                if progress is not None:
                    progress(min(start + batch_size, len(windows)), len(windows))
    finally:
        model.train(was_training)

    per_window = torch.cat(losses)  # [windows], sums in float64
    predicted = window - 1
    nll = float(per_window.mean()) / predicted
    stderr = float((per_window / predicted).std()) / math.sqrt(len(windows)) if len(windows) > 1 else math.nan
    return Perplexity(
        value=_exp(nll),
        nll=nll,
        tokens=len(windows) * predicted,
        windows=len(windows),
        window=window,
        bos=with_bos,
        text_sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        seconds=time.perf_counter() - started,
        stderr=stderr,
    )


def cut_windows(
    tokenizer: Any,
    text: str,
    *,
    window: int = 512,
    bos: bool | Literal["auto"] = "auto",
    max_windows: int | None = None,
) -> tuple[torch.Tensor, bool]:
    """Tokenise a text and cut it into the windows of the protocol.

    Returns:
        (input ids [windows, window] int64, whether the first column is the BOS token).

    Raises:
        CorankError: the text does not fill one window, or a BOS token was asked for and there is none.
    """
    with_bos = adds_bos(tokenizer) if bos == "auto" else bool(bos)
    begin: int | None = getattr(tokenizer, "bos_token_id", None)
    if with_bos and begin is None:
        raise CorankError("bos=True, but this tokenizer has no BOS token; give bos=False or bos='auto'.")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    take = window - 1 if with_bos else window
    count = len(ids) // take
    if count == 0:
        raise CorankError(
            f"The text has {len(ids)} tokens and one window needs {take}; give more text or a smaller window."
        )
    windows = torch.tensor(ids[: count * take], dtype=torch.long).reshape(count, take)
    if max_windows is not None and max_windows < count:  # spread evenly: the first ones may all be of one article
        windows = windows[[i * count // max_windows for i in range(max_windows)]]
    if with_bos and begin is not None:
        windows = torch.cat([torch.full((len(windows), 1), begin, dtype=torch.long), windows], dim=1)
    return windows, with_bos


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS token in front of a text."""
    begin = getattr(tokenizer, "bos_token_id", None)
    if begin is None:
        return False
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return len(ids) > 0 and ids[0] == begin


def context_length(model: nn.Module) -> int | None:
    """The most positions a model was made for (``max_position_embeddings``); None if it does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None


def input_device(model: nn.Module) -> torch.device:
    """The device on which a model expects its token ids: that of its input embedding if it says which."""
    embedding = None
    ask = getattr(model, "get_input_embeddings", None)
    if callable(ask):
        with contextlib.suppress(NotImplementedError):
            embedding = ask()
    parameter = next((embedding if isinstance(embedding, nn.Module) else model).parameters(), None)
    if parameter is None:
        parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _window_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Summed NLL of every window: logits [B, T, V], ids [B, T] -> [B] float64 on the CPU."""
    total = torch.zeros(ids.shape[0], dtype=torch.float64)
    for row in range(ids.shape[0]):
        for start in range(0, ids.shape[1] - 1, _POSITIONS):
            stop = min(start + _POSITIONS, ids.shape[1] - 1)
            scores = logits[row, start:stop]
            scores = scores if scores.dtype == torch.float64 else scores.float()
            target = ids[row, start + 1 : stop + 1].to(scores.device)
            total[row] += F.cross_entropy(scores, target, reduction="none").double().sum().cpu()
    return total


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf
