"""Full-model distillation: the compressed model learns the next-token distribution of the dense one.

    min over the factors and norms of  E_t KL( p_t || q_t ),   p the teacher's distribution, q the student's

The teacher is run once, a block at a time, and leaves only its k most likely tokens and the mass of all others behind:

    KL >= sum over the k tokens of p log(p / q) + p' log(p' / q'),   p', q' the mass of the other tokens together

with equality if k is the size of the vocabulary (the data-processing inequality: lumping tokens together loses
divergence). Hinton et al., arXiv:1503.02531.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from corank.engine.stream import Stream
from corank.errors import CorankError
from corank.model import Calibration, ResidentModel


@dataclass(frozen=True)
class Predictions:
    """What a teacher predicts at every token.

    Attributes:
        indices: [sequences, tokens, k], its most likely tokens, int32.
        log_p: [sequences, tokens, k], their log-probabilities.
        log_rest: [sequences, tokens], log of the mass of all others; -inf if there are none.
        mask: [sequences, tokens], True for real tokens, or None.
    """

    indices: Tensor
    log_p: Tensor
    log_rest: Tensor
    mask: Tensor | None

    def divergence(self, logits: Tensor, which: list[int]) -> Tensor:
        """Mean over real tokens of the lumped KL divergence, in nats.

        Args:
            logits: [len(which), tokens, vocabulary], the student's.
            which: the sequences.
        """
        total, count = logits.new_zeros((), dtype=torch.float32), 0
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
    log_q = torch.log_softmax(logits.float(), dim=-1)
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
) -> Predictions:
    """Run a teacher over the data, one block of weights at a time.

    Args:
        source: the teacher, resident or streamed.
        data: the sequences.
        top: k, tokens kept at each place.
        batch: sequences per forward pass.
        report: called with (layers done, layers).

    Raises:
        CorankError: the model does not predict tokens.
    """
    if not source.model.can_generate() and not hasattr(source.config, "vocab_size"):
        raise CorankError("Distillation needs a language model, which predicts tokens.")
    stream = Stream(source, data, batch)
    for layer in range(source.outline.layers):
        report(layer, source.outline.layers)
        with source.block(layer) as block, torch.no_grad():
            stream.set_hidden(layer, [stream.run(block, layer, i) for i in range(len(stream))])
    indices, log_p, log_rest = [], [], []
    with source.outside(head=True), torch.no_grad():
        for i, hidden in enumerate(stream.hidden):
            mask = stream.mask(i)
            for row in range(len(hidden)):  # logits are by far the largest tensor
                real = None if mask is None else mask[row : row + 1]
                logits = source.logits(stream.ids[i][row : row + 1].to(hidden.device), real, hidden[row : row + 1])[0]
                log = torch.log_softmax(logits.float(), dim=-1)
                values, places = log.topk(min(top, log.shape[-1]), dim=-1)
                indices.append(places.int().cpu())
                log_p.append(values.cpu())
                log_rest.append(log.scatter(-1, places, float("-inf")).logsumexp(-1).cpu())
    report(source.outline.layers, source.outline.layers)
    return Predictions(torch.stack(indices), torch.stack(log_p), torch.stack(log_rest), data.mask)
