"""Narrowing one block: choose what stays, slice the matrices, let their consumers make up for it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.factors import is_conv1d, weight_of
from corank.linalg.least_squares import encoded_least_squares
from corank.statistics import Cross
from corank.structured.attention import factorize
from corank.structured.block import Block, Narrowed
from corank.structured.compensation import Consumer, compensate, ridge_for
from corank.structured.dimensions import output_energy, pair_rows, pair_scores, value_output
from corank.structured.folding import balanced, clusters, features_of, merge_columns, merge_rows
from corank.structured.moments import FULL, Moments, cross, moments
from corank.structured.scores import Given, choose
from corank.structured.scores import scores as score_units
from corank.structured.shape import BlockShape, empty_linear, set_attributes
from corank.structured.units import CHANNELS, HEADS, PAIRS, Units, find_units


def scores(block: Block) -> dict[str, Tensor]:
    """Scores of the units that a recipe may take out of a block, for allocations that compare blocks.

    Returns:
        "pairs" -> float64 [h / 2], summed over heads; for allocate=z-score also the other kinds -> [units], standardised.
    """
    compared = block.recipe.allocate == "z-score"
    units = [u for u in units_of(block) if compared or u.kind == PAIRS]
    pairs = next((u.consumer for u in units if u.kind == PAIRS), "")  # their scores do not look at what reads the heads
    known = _measure(block, units, but=pairs)
    found: dict[str, Tensor] = {}
    for each in units:
        if each.kind == PAIRS:
            found[PAIRS] = _pairs_of(block, each, known[each.first])
        else:
            given = _scored(block, _given(block, each, known))
            found[each.kind] = score_units(block.recipe.score, given, standardised=True)
    return found


def narrow(block: Block, target: BlockShape) -> Narrowed:
    """Bring a block to its new widths, in place.

    Args:
        block: with the calibration data that enters it.
        target: its widths afterwards.

    Raises:
        CorankError: the recipe cannot reach them.
    """
    before, shape = block.shape, block.shape
    losses: dict[str, float] = {}
    wanted = {CHANNELS: target.channels, HEADS: target.kv_heads, PAIRS: target.head_dim // 2}
    have = {CHANNELS: before.channels, HEADS: before.kv_heads, PAIRS: before.head_dim // 2}
    changed = [u for u in units_of(block) if wanted[u.kind] != have[u.kind]]
    missing = {kind for kind in wanted if wanted[kind] != have[kind]} - {u.kind for u in changed}
    if missing:
        raise CorankError(f"Layer {block.layer} has no {' and no '.join(sorted(missing))} that can be taken out.")
    ranks = dict(target.ranks)
    # in one pass for all matrices of the block, before any of them changes
    together = bool(ranks) or not block.recipe.sequential
    known = _measure(block, changed, more=ranks) if together else {}
    dense = copy.deepcopy(block.module) if block.recipe.anchored and changed else None
    factorize(block, ranks, known)
    joint: Cross | None = None
    for each in changed:
        if dense is not None and each.kind != PAIRS:
            seen, joint = cross(block, dense, each.consumer)
            known = {**_measure(block, [each], but=each.consumer), each.consumer: seen}
        elif not together:  # its inputs are those that the narrowed parts before it make
            known = _measure(block, [each])
        if each.kind == PAIRS:
            losses |= _narrow_dimensions(block, each, target, known)
        elif block.recipe.compensate == "cluster":
            _fold(block, each, wanted[each.kind])
        else:
            given = _given(block, each, known)
            kept = choose(block.recipe.score, _scored(block, given), wanted[each.kind])
            consumer = _without(block, each, kept, given, joint)
            if consumer.loss is not None:
                losses[each.name] = consumer.loss
        after = _after(shape, target, each.kind)
        set_attributes(block.module, block.config, shape, after)
        shape = after
    return Narrowed(dataclasses.replace(shape, biases=target.biases, ranks=target.ranks), losses)


def units_of(block: Block) -> list[Units]:
    """The units of a block that its recipe may take out."""
    found, _ = find_units(block.module, block.sites, block.prefix, block.config)
    allowed = {PAIRS if unit in ("qk", "vo") else unit for unit in block.recipe.units}
    return [u for u in found if u.kind in allowed]


def _after(shape: BlockShape, target: BlockShape, kind: str) -> BlockShape:
    fields = {CHANNELS: ("channels",), HEADS: ("heads", "kv_heads"), PAIRS: ("head_dim", "pairs")}[kind]
    return dataclasses.replace(shape, **{name: getattr(target, name) for name in fields})


def _measure(block: Block, units: Sequence[Units], but: str = "", more: Iterable[str] = ()) -> dict[str, Moments]:
    """What the recipe has to know of the inputs of consumers and producers, by path; one may be known already.

    Args:
        more: paths of other matrices, of whose inputs the mean squares are wanted.
    """
    recipe, paths, whole = block.recipe, set(more), set[str]()
    compensated = recipe.compensate in ("ls", "affine-ls")
    for each in units if recipe.compensate != "cluster" else ():
        if each.kind == PAIRS:
            whole |= {each.first} | ({each.consumer} if compensated else set())
        elif recipe.score in FULL or compensated:
            whole.add(each.consumer)
        elif recipe.score not in ("", "magnitude", "taylor") or recipe.compensate == "bias":
            paths.add(each.consumer)
        if recipe.score == "lorap" and each.kind != PAIRS:
            paths.add(each.first)
    found: dict[str, Moments] = {}
    for which, full in ((paths - whole - {but}, False), (whole - {but}, True)):
        if which:
            found |= moments(block, which, full)
    return found


def _given(block: Block, units: Units, known: dict[str, Moments]) -> Given:
    values = units.producers[-1:] if units.kind == HEADS else units.producers
    size = units.size if units.kind == CHANNELS else 0
    producers = [_rows(block, r.path, r.start, units.count * r.size) for r in values] if size else []
    return Given(
        weight_of(block.module.get_submodule(units.consumer)).double(),
        known.get(units.consumer),
        units.size,
        producers,
        known.get(units.first),
        block.recipe.ridge,
        _sensitivity(block, units) if block.sensitivity else None,
    )


def _sensitivity(block: Block, units: Units) -> Tensor:
    """Sums over all weights of each unit [count]."""
    rows = [
        block.sensitivity[block.prefix + r.path][0][r.start : r.start + units.count * r.size].view(units.count, r.size)
        for r in units.producers
    ]
    columns = block.sensitivity[units.name][1].view(units.count, units.size)
    return torch.stack([part.sum(1) for part in (*rows, columns)]).sum(0)


def _scored(block: Block, given: Given) -> Given:
    """What scores look at: with a bias to come it is what varies that counts."""
    if block.recipe.compensate != "affine-ls" or given.moments is None:
        return given
    return dataclasses.replace(given, moments=given.moments.centred())


def _rows(block: Block, path: str, start: int, count: int) -> Tensor:
    return weight_of(block.module.get_submodule(path))[start : start + count]


def _exact(block: Block) -> bool:
    return next(block.module.parameters()).dtype == torch.float64


def _without(block: Block, units: Units, kept: Tensor, given: Given, joint: Cross | None) -> Consumer:
    """Leave out the units that are not kept."""
    columns = (kept[:, None] * units.size + torch.arange(units.size, device=kept.device)).flatten()
    recipe, seen = block.recipe, given.moments
    ridge = 0.0 if seen is None else ridge_for(seen, recipe.ridge, _exact(block))
    consumer = compensate(recipe.compensate, given.W, columns, seen, ridge, joint)
    keep_rows(block.module, units, kept)
    put_consumer(block.module, units.consumer, consumer.weight, consumer.shift)
    return consumer


def keep_rows(module: nn.Module, units: Units, kept: Tensor) -> None:
    """Leave those rows of the producers of a hidden vector that make the units that stay, in place.

    Args:
        module: the block.
        units: of the vector.
        kept: those that stay, int64.
    """
    rows: dict[str, list[Tensor]] = {}
    for r in units.producers:
        own = r.start + (kept[:, None] * r.size + torch.arange(r.size, device=kept.device)).flatten()
        rows.setdefault(r.path, []).append(own)
    for path, parts in rows.items():
        index = torch.cat(parts)
        old: Any = module.get_submodule(path)
        put(module, path, weight_of(old)[index], None if old.bias is None else old.bias.detach()[index])


def put(module: nn.Module, path: str, W: Tensor, bias: Tensor | None) -> None:
    """Replace a linear layer by one of the same class, dtype and mode with other values.

    Args:
        module: what `path` starts from.
        W: [out, in].
        bias: [out], None for none.
    """
    old: Any = module.get_submodule(path)
    made: Any = empty_linear(old, W.shape[0], W.shape[1], bias is not None)
    with torch.no_grad():
        made.weight.copy_(W.mT if is_conv1d(made) else W)
        if bias is not None:
            made.bias.copy_(bias)
    for p in made.parameters():
        p.requires_grad_(old.weight.requires_grad)
    module.set_submodule(path, made.train(old.training))


def put_consumer(module: nn.Module, path: str, W: Tensor, shift: Tensor | None) -> None:
    """The same, with something added to the bias, which is made if there is none."""
    bias = getattr(module.get_submodule(path), "bias", None)
    bias = None if bias is None else bias.detach()
    if shift is not None:
        bias = shift if bias is None else bias.double() + shift
    put(module, path, W, bias)


def _fold(block: Block, units: Units, count: int) -> None:
    """Replace clusters of units by their means; channels only."""
    if units.kind != CHANNELS:
        raise CorankError("Only channels of feed-forward networks can be averaged in clusters; take heads out instead.")
    module, n = block.module, units.count
    W = weight_of(module.get_submodule(units.consumer)).double()
    producers = []
    for r in units.producers:
        layer: Any = module.get_submodule(r.path)
        P = weight_of(layer)[r.start : r.start + n].double()
        b = layer.bias
        producers.append(P if b is None else torch.cat([P, b.detach()[r.start : r.start + n, None].double()], 1))
    if block.recipe.score == "balanced" and len(producers) == 2:  # linear in the last, the up projection
        c = balanced(producers[-1], W)
        producers[-1], W = producers[-1] * c[:, None], W / c
    labels = clusters(features_of(producers, W), count)
    merged = [merge_rows(P, labels, count) for P in producers]
    for path in dict.fromkeys(r.path for r in units.producers):
        P = torch.cat([m for m, r in zip(merged, units.producers, strict=True) if r.path == path])
        biased = getattr(module.get_submodule(path), "bias", None) is not None
        put(module, path, P[:, :-1] if biased else P, P[:, -1] if biased else None)
    put_consumer(module, units.consumer, merge_columns(W, labels, count), None)


def _pairs_of(block: Block, units: Units, inputs: Moments) -> Tensor:
    """Scores of the rotary pairs of a block, summed over its heads."""
    q, k = (block.module.get_submodule(r.path) for r in units.producers[:2])
    queries, keys = (output_energy(weight_of(m), getattr(m, "bias", None), inputs) for m in (q, k))
    return pair_scores(queries, keys, units.heads[1]).sum(0)


def _narrow_dimensions(block: Block, units: Units, target: BlockShape, known: dict[str, Moments]) -> dict[str, float]:
    """Take dimensions out of all heads: pairs of queries and keys by selection, values and outputs by a change of basis."""
    module, (g, h), r = block.module, units.heads, target.head_dim
    attention: Any = module.get_submodule(units.inside)
    layers: list[Any] = [module.get_submodule(rows.path) for rows in units.producers]
    q, k, v = layers
    o: Any = module.get_submodule(units.consumer)
    inputs, n_kv = known[units.first], weight_of(k).shape[0] // h
    pairs = torch.tensor(target.pairs, device=inputs.mean.device)
    scale = _scale(attention, h, r)
    for path, layer, heads, factor in (
        (units.producers[0].path, q, n_kv * g, scale),
        (units.producers[1].path, k, n_kv, 1.0),
    ):
        index = pair_rows(pairs, heads, h)
        bias = None if layer.bias is None else layer.bias.detach()[index].double() * factor
        put(module, path, weight_of(layer)[index].double() * factor, bias)
    W_V, W_O = weight_of(v).double(), weight_of(o).double()
    b_V = None if v.bias is None else v.bias.detach().double()
    second = inputs.second.clone()
    if inputs.count < len(second):
        second.diagonal().add_(block.recipe.ridge * second.diagonal().mean())
    lost, total, encoders = 0.0, 0.0, list[Tensor]()
    new_V: list[Tensor] = []
    new_b: list[Tensor] = []
    new_O = torch.empty(W_O.shape[0], n_kv * g * r, dtype=torch.float64, device=W_O.device)
    for a in range(n_kv):
        own = slice(a * h, (a + 1) * h)
        C_v = _moment(W_V[own], None if b_V is None else b_V[own], second, inputs.mean)
        readers = W_O.view(-1, n_kv, g, h)[:, a]  # [d, g, h]
        E, B, S2 = value_output(readers.transpose(0, 1).reshape(-1, h), C_v, r)
        new_V.append(E @ W_V[own])
        if b_V is not None:
            new_b.append(E @ b_V[own])
        new_O.view(-1, n_kv, g, r)[:, a] = readers @ B
        encoders += [E] * g
        lost, total = lost + float(S2[r:].sum()), total + float(S2.sum())
    put(module, units.producers[2].path, torch.cat(new_V), None if b_V is None else torch.cat(new_b))
    if (
        units.consumer in known
    ):  # heads are mixtures of values: what the output projection really reads is known as well
        z, E = known[units.consumer], torch.block_diag(*encoders)
        new_O = encoded_least_squares(W_O, z.second, E, new_O, ridge=ridge_for(z, block.recipe.ridge, _exact(block)))
        missing = W_O - new_O @ E
        lost, total = (float(((A @ z.second) * A).sum()) for A in (missing, W_O))
    put(module, units.consumer, new_O, None if o.bias is None else o.bias.detach())
    attention.head_dim = r
    if scale != 1.0:
        attention.scaling = r**-0.5
    return {units.name: (max(lost, 0.0) / total) ** 0.5 if total > 0 else 0.0}


def _moment(W: Tensor, bias: Tensor | None, second: Tensor, mean: Tensor) -> Tensor:
    """E[y y^T] of y = W x + b."""
    moment = W @ second @ W.T
    if bias is not None:
        cross = torch.outer(bias, W @ mean)
        moment = moment + cross + cross.T + torch.outer(bias, bias)
    return (moment + moment.T) / 2


def _scale(attention: Any, h: int, r: int) -> float:
    """What queries have to be multiplied by, so that logits stay divided by the root of the original head size."""
    own = getattr(attention, "scaling", h**-0.5)
    return (r / h) ** 0.5 if abs(own * h**0.5 - 1) < 1e-6 else 1.0
