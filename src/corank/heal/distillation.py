"""Full-model distillation: the compressed model learns the next-token distribution of the dense one.

    min over the factors and norms of  E_t KL( p_t || q_t ),   p the teacher's distribution, q the student's

The teacher is run once, a block at a time, and leaves only its k most likely tokens and the mass of all others behind:

    KL >= sum over the k tokens of p log(p / q) + p' log(p' / q'),   p', q' the mass of the other tokens together

with equality if k is the size of the vocabulary (the data-processing inequality: lumping tokens together loses
divergence). Hinton et al., arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from corank.engine.stream import Stream
from corank.engine.world import ALONE, World
from corank.errors import CorankError
from corank.heal.training import History, fit
from corank.heal.way import Case
from corank.model import Calibration, ResidentModel


@dataclass(frozen=True)
class Predictions:
    """What a teacher predicts at every token.

    Attributes:
        indices: [sequences, tokens, k], its most likely tokens, int32.
        log_p: [sequences, tokens, k], their log-probabilities.
        log_rest: [sequences, tokens], log of the mass of all others; -inf if there are none.
        mask: [sequences, tokens], True for real tokens, or None.
        temperature: logits were divided by it, and the student's are.
    """

    indices: Tensor
    log_p: Tensor
    log_rest: Tensor
    mask: Tensor | None
    temperature: float = 1.0

    def tokens(self, which: Sequence[int]) -> int:
        """Real tokens of some sequences."""
        return len(which) * self.log_rest.shape[1] if self.mask is None else int(self.mask[list(which)].sum())

    def divergence(self, logits: Tensor, which: Sequence[int]) -> Tensor:
        """Mean over real tokens of the lumped KL divergence, in nats.

        Args:
            logits: [len(which), tokens, vocabulary], the student's.
            which: the sequences.
        """
        if self.temperature != 1.0:
            logits = logits / self.temperature
        total, count = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32)), 0
        for row, i in enumerate(which):
            values = lumped_kl(
                logits[row],
                self.indices[i].to(logits.device).long(),
                self.log_p[i].to(logits.device),
                self.log_rest[i].to(logits.device),
            )
            if self.mask is not None:
                values = values[self.mask[i].to(values.device)]
            total, count = total + values.sum(), count + values.numel()
        return total / max(count, 1)


def lumped_kl(logits: Tensor, indices: Tensor, log_p: Tensor, log_rest: Tensor) -> Tensor:
    """KL of the teacher's lumped distribution to the student's, at every token.

    Args:
        logits: [tokens, vocabulary], the student's.
        indices, log_p: [tokens, k]; log_rest: [tokens].

    Returns:
        [tokens], in nats, >= 0.
    """
    log_q = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    chosen = log_q.gather(-1, indices)
    found = (log_p.exp() * (log_p - chosen)).sum(-1)
    if indices.shape[-1] == logits.shape[-1]:
        return found
    # the mass of the others as one minus the rest would cancel; summed, it does not
    log_q_rest = log_q.scatter(-1, indices, float("-inf")).logsumexp(-1)
    return found + log_rest.exp() * (log_rest - log_q_rest)


def predictions(
    source: ResidentModel,
    data: Calibration,
    top: int = 256,
    batch: int = 4,
    report: Callable[[int, int], None] = lambda done, of: None,
    temperature: float = 1.0,
    world: World = ALONE,
) -> Predictions:
    """Run a teacher over the data, one block of weights at a time.

    Args:
        source: the teacher, resident or streamed.
        data: the sequences.
        top: k, tokens kept at each place.
        batch: sequences per forward pass.
        report: called with (layers done, layers).
        temperature: logits are divided by it.
        world: the processes that share the sequences; all of them get all predictions.

    Raises:
        CorankError: the model does not predict tokens.
    """
    if not source.model.can_generate() and not hasattr(source.config, "vocab_size"):
        raise CorankError("Distillation needs a language model, which predicts tokens.")
    share = world.share(len(data.ids))
    rows = slice(share.start, share.stop)
    mine = replace(data, ids=data.ids[rows], mask=None if data.mask is None else data.mask[rows])
    found, mask = [], None
    if len(mine.ids):
        with torch.no_grad():
            for logits, real in _logits(source, mine, batch, report):
                log = torch.log_softmax(
                    logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1
                )
                values, places = log.topk(min(top, log.shape[-1]), dim=-1)
                rest = log.scatter(-1, places, float("-inf")).logsumexp(-1)
                found.append((places.int().cpu(), values.cpu(), rest.cpu(), None if real is None else real.cpu()))
    report(source.outline.layers, source.outline.layers)
    every = [row for each in world.gather(found) for row in each]
    indices, log_p, log_rest, masks = zip(*every, strict=True)
    if masks[0] is not None:
        mask = torch.stack(masks)
    return Predictions(torch.stack(indices), torch.stack(log_p), torch.stack(log_rest), mask, temperature)


def _logits(
    source: ResidentModel, data: Calibration, batch: int, report: Callable[[int, int], None]
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(logits [tokens, vocabulary], mask [tokens] or None) of every sequence, one after the other."""
    if source.outline.whole:
        for each in data.batches(1):
            inputs = source.complete(each)
            mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
            yield source.model(**inputs).logits[0], None if mask is None else mask[0].bool()
        return
    stream = Stream(source, data, batch)
    for layer in range(source.outline.layers):
        report(layer, source.outline.layers)
        with source.block(layer) as block:
            stream.set_hidden(layer, [stream.run(block, layer, i) for i in range(len(stream))])
    with source.outside(head=True):
        for i, hidden in enumerate(stream.hidden):
            mask = stream.mask(i)
            for row in range(len(hidden)):  # logits are by far the largest tensor
                real = None if mask is None else mask[row : row + 1]
                ids = stream.ids[i][row : row + 1].to(hidden.device)
                yield source.logits(ids, real, hidden[row : row + 1])[0], None if real is None else real[0]


def batch_of(case: Case, which: Sequence[int]) -> dict[str, Any]:
    """Inputs of the student for some sequences."""
    batch = {"input_ids": case.data.ids[list(which)]}
    if case.data.mask is not None:
        batch["attention_mask"] = case.data.mask[list(which)]
    return case.student.complete(batch)


def distil(
    case: Case,
    parameters: Mapping[str, nn.Parameter],
    name: str,
    taught: Predictions | None = None,
) -> History:
    """Train some parameters towards the teacher's predictions.

    Args:
        case: the model.
        parameters: what is trained.
        name: of the file of the state.
        taught: the predictions, if they are known already.
    """
    taught = taught or taught_by(case)

    def loss(which: Sequence[int]) -> Tensor:
        return taught.divergence(case.student.model(**batch_of(case, which)).logits, which)

    return fit(
        parameters,
        loss,
        case.learned,
        case.heldout,
        case.schedule,
        weight=taught.tokens,
        state=case.state(f"{name}.pt"),
        report=lambda done, of, value: case.progress("distillation", done, of, value),
        world=case.world,
    )


def taught_by(case: Case, temperature: float = 1.0) -> Predictions:
    """What the teacher predicts, see `predictions`."""
    return predictions(
        case.teacher,
        case.data,
        case.top,
        report=lambda done, of: case.progress("teacher", done, of, float("nan")),
        temperature=temperature,
        world=case.world,
    )
