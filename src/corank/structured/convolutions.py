"""Model folding for convolutional networks: alike channels become one (arXiv:2502.10216), batch norms are repaired.

Channels that only go together (`corank.structured.coupling`) share one clustering. With w_i the row of a convolution and gamma,
beta, m, v the batch norm behind it, channel i computes (gamma / sqrt(v + eps)) (w_i x - m) + beta; channels are compared
by what they compute, over all convolutions that make them. A cluster of n becomes the mean of its rows and norms, and its readers'
columns are added up. The mean of alike signals varies less than they do, which its norm has to know (v alone does not follow
from means):

    repair=weights    v = || mean_i sqrt(v_i) w_i / |w_i| ||^2, the variance of the mean if inputs are white; no data
    repair=data       m and v measured again on examples
    repair=none       the mean of v_i
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from corank.errors import CorankError
from corank.structured.coupling import Axis, Channels, coupled
from corank.structured.folding import clusters, merge_rows
from corank.structured.task import Task

NEEDS_IMAGES = (
    "repair=data measures batch norms on images: call corank.compress with data=[{'pixel_values': ...}, ...], or take "
    "repair=weights, which needs none."
)
SHARES = 4096
"""How finely the share of the channels that stays is chosen."""
Sizes = Mapping[str, tuple[int, ...]]
"""Name of a tensor -> its shape."""


@dataclass(frozen=True)
class Folded:
    """What became of a model.

    Attributes:
        sizes: name of a matrix -> its shape now, as (out, in * height * width).
        tensors: name -> shape of every tensor that has changed its own.
        groups: for every group of channels what makes it first, channels before and now.
    """

    sizes: dict[str, tuple[int, int]]
    tensors: dict[str, tuple[int, ...]]
    groups: tuple[tuple[str, int, int], ...]


def fold_convolutions(task: Task) -> Folded:
    """Fold the channels of a model in memory, in place, to what the budget allows.

    Raises:
        CorankError: no channels can be folded, the budget would leave none, or data for repair are missing.
    """
    model: Any = task.source.model
    if task.recipe.repair == "data" and (task.data is None or task.data.examples is None):
        raise CorankError(NEEDS_IMAGES)
    with task.stage("choose widths"):
        groups = _free(task, coupled(model, None if task.data is None else (task.data.examples or (None,))[0]))
        before = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        widths = _widths(task, groups, before)
    with task.stage("narrow"):
        for group, width in zip(groups, widths, strict=True):
            if width < group.count:
                task.report(0, "narrow", None)
                fold_group(model, group, width, repair=task.recipe.repair != "none")
    if task.recipe.repair == "data" and any(k < g.count for g, k in zip(groups, widths, strict=True)):
        assert task.data is not None and task.data.examples is not None
        with task.stage("repair"):
            measure_norms(model, [task.source.complete(each) for each in task.data.examples])
    after = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sites = [s for layer in range(task.layers) for s in task.sites(layer)]
    sizes = {s.name: (after[f"{s.name}.weight"][0], math.prod(after[f"{s.name}.weight"][1:])) for s in sites}
    changed = {name: size for name, size in after.items() if size != before[name]}
    said = tuple(
        (g.made[0].tensor.rpartition(".")[0], g.count, k) for g, k in zip(groups, widths, strict=True) if k < g.count
    )
    return Folded(sizes, changed, said)


def _free(task: Task, groups: Sequence[Channels]) -> list[Channels]:
    """Groups of which no part is in a protected block."""
    outline = task.source.outline
    kept = () if outline.whole else tuple(f"{outline.path(i)}." for i in task.recipe.protected(task.layers))
    free = (
        [g for g in groups if not any(axis.tensor.startswith(kept) for axis in (*g.made, *g.read))] if kept else groups
    )
    if not free:
        raise CorankError(
            f"No channels of {type(task.source.model).__name__} can be folded: other layers than convolutions and batch norms "
            "look at all of them, or their blocks are protected; factorize it (svd)."
        )
    return list(free)


def _widths(task: Task, groups: Sequence[Channels], before: Sizes) -> list[int]:
    """Channels that stay of every group: the same share of all, the largest that the budget allows."""
    recipe, outline = task.recipe, task.source.outline
    # parameters that count: those of the sites, or of the whole model
    weights = {f"{s.name}.weight" for layer in range(task.layers) for s in task.sites(layer)}
    limit = task.limit
    if task.whole:
        weights = {name for name, _ in task.source.model.named_parameters()}
        limit = task.limit + outline.parameters - sum(task.costs)
    if _count(weights, before, groups, [g.count for g in groups]) <= limit:
        return [g.count for g in groups]
    best: list[int] | None = None
    low, high = 0, SHARES
    while low < high:  # the largest share that fits
        middle = (low + high) // 2
        # of widths of which one is a multiple of another, as of bottlenecks, the rounded ones fit each other too
        widths = [_width(g.count, Fraction(middle, SHARES), recipe.multiple_of) for g in groups]
        if _count(weights, before, groups, widths) <= limit:
            best, low = widths, middle + 1
        else:
            high = middle
    if best is None:
        raise CorankError(
            f"The budget ({task.budget.describe()}) is below what one channel in every layer that can be folded needs; keep more."
        )
    return best


def _width(count: int, share: Fraction, multiple_of: int) -> int:
    step = min(multiple_of, count)
    return max(math.floor(count * share) // step * step, step)


def _count(weights: set[str], before: Sizes, groups: Sequence[Channels], widths: Sequence[int]) -> int:
    """Parameters of some tensors at other widths."""
    after = sizes_after({name: before[name] for name in weights}, groups, widths)
    return sum(math.prod(size) for size in after.values())


def sizes_after(before: Sizes, groups: Sequence[Channels], widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors when groups of channels have other widths."""
    after = {name: list(size) for name, size in before.items()}
    for group, width in zip(groups, widths, strict=True):
        for axis in (*group.made, *group.read):
            if axis.tensor in after:
                after[axis.tensor][axis.dim] = width * axis.times
    return {name: tuple(size) for name, size in after.items()}


@torch.no_grad()
def fold_group(model: nn.Module, group: Channels, count: int, repair: bool = True) -> Tensor:
    """Merge the channels of one group into clusters, in place.

    Args:
        model: in memory.
        group: which channels.
        count: clusters.
        repair: let batch norms know how much a mean varies less (repair=weights).

    Returns:
        int64 [channels], the cluster of each.
    """
    labels = clusters(features_of(model, group), count)
    variances = {name: _variance(model, name, of, labels, count) for name, of in group.norms.items() if repair and of}
    for axis in group.made:
        merged = merge_rows(_tensor(model, axis), labels, count)
        owner, _, leaf = axis.tensor.rpartition(".")
        _set(model, axis.tensor, variances.get(owner, merged) if leaf == "running_var" else merged)
    for axis in group.read:
        W = _tensor(model, axis).double()
        parts = W.unflatten(axis.dim, (group.count, axis.times))
        summed = parts.new_zeros(*parts.shape[: axis.dim], count, *parts.shape[axis.dim + 1 :])
        _set(model, axis.tensor, summed.index_add_(axis.dim, labels, parts).flatten(axis.dim, axis.dim + 1))
    return labels


def features_of(model: nn.Module, group: Channels) -> Tensor:
    """What each channel computes, [channels, features] float64: rows and biases with their batch norms multiplied in."""
    behind = {of: name for name, of in group.norms.items() if of}
    parts: list[Tensor] = []
    for path in dict.fromkeys(axis.tensor.rpartition(".")[0] for axis in group.made):
        layer: Any = model.get_submodule(path)
        if isinstance(layer, nn.BatchNorm2d):
            if not group.norms.get(path):  # behind a sum, or whatever else
                mean, variance = (model.get_buffer(f"{path}.running_{name}").double() for name in ("mean", "var"))
                scale = layer.weight.double() / (variance + layer.eps).sqrt()
                parts += [scale[:, None], (layer.bias.double() - scale * mean)[:, None]]
            continue
        rows = layer.weight.double().flatten(1)
        shift = rows.new_zeros(len(rows)) if layer.bias is None else layer.bias.double()
        if path in behind:
            norm: Any = model.get_submodule(behind[path])
            scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            rows, shift = rows * scale[:, None], norm.bias.double() + scale * (shift - norm.running_mean.double())
        parts += [rows, shift[:, None]]
    return torch.cat(parts, dim=1)


def _variance(model: nn.Module, norm: str, convolution: str, labels: Tensor, count: int) -> Tensor:
    """|| mean_i sqrt(v_i) w_i / |w_i| ||^2 of every cluster; the mean of v_i where a row is zero."""
    layer: Any = model.get_submodule(convolution)
    v = model.get_buffer(f"{norm}.running_var").double()
    rows = layer.weight.double().flatten(1)
    lengths = rows.norm(dim=1)
    directions = merge_rows(rows / lengths.clamp_min(1e-300)[:, None] * v.sqrt()[:, None], labels, count)
    empty = merge_rows((lengths == 0).double(), labels, count) > 0
    return torch.where(empty, merge_rows(v, labels, count), directions.square().sum(1))


def _tensor(model: nn.Module, axis: Axis) -> Tensor:
    owner, _, leaf = axis.tensor.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).detach()


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter or buffer a value of another shape, in its dtype, and tell its layer."""
    owner, _, leaf = name.rpartition(".")
    layer: Any = model.get_submodule(owner)
    old = getattr(layer, leaf)
    value = value.to(old.dtype).contiguous()
    if isinstance(old, nn.Parameter):
        setattr(layer, leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    else:
        layer.register_buffer(leaf, value)
    if leaf == "weight":
        sized(layer)


def sized(layer: Any) -> None:
    """Tell a convolution, a batch norm or a linear layer the sizes of its weight."""
    size = layer.weight.shape
    if isinstance(layer, nn.Conv2d):
        depthwise = layer.groups > 1
        layer.out_channels, layer.in_channels = size[0], size[0] if depthwise else size[1]
        layer.groups = size[0] if depthwise else 1
    elif isinstance(layer, nn.BatchNorm2d):
        layer.num_features = size[0]
    else:
        layer.out_features, layer.in_features = size


@torch.no_grad()
def measure_norms(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
    """Measure the means and variances of all batch norms again, as means over batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    usual = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # every batch counts alike
            norm.train()
        for batch in batches:
            model(**batch)
    finally:
        for norm, momentum in zip(norms, usual, strict=True):
            norm.momentum = momentum
            norm.eval()


def resize(model: Any, tensors: Mapping[str, Sequence[int]], resolve: Any) -> None:
    """Give the tensors of a freshly built model the shapes of a checkpoint, before its weights are loaded.

    Args:
        model: as its configuration describes it.
        tensors: name -> shape.
        resolve: called with the model and a name; what a module is called in it, or None.

    Raises:
        CorankError: the model has no such tensor.
    """
    for name, size in tensors.items():
        owner, _, leaf = name.rpartition(".")
        found = resolve(model, owner)
        if found is None and type(model).__name__ not in (model.config.architectures or ()):
            continue  # a head that was not asked for
        old = None if found is None else getattr(model.get_submodule(found), leaf, None)
        if not isinstance(old, Tensor) or old.dim() != len(size):
            raise CorankError(
                f"config.json says that {name} has the shape {list(size)}; it does not belong to this model."
            )
        _set(model, f"{found}.{leaf}", old.new_empty([int(n) for n in size]))
