"""Which formula an MLP computes, from its structure, confirmed by its own output.

Names of classes say little: the same formula has many names, and the same name is used with clamps, multipliers and
sparsity. So the shapes of the children propose formulas, and the one that gives what the module itself gives on random
inputs, small and large, is the one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corank.factors import FactorizedLinear, is_conv1d, shape_of


@dataclass(frozen=True)
class Form:
    """down(act(gate(x)) * up(x)), or down(act(gate(x))) without `up`: names of the children.

    Attributes:
        act: name of the activation among the attributes of the module.
    """

    gate: str
    up: str | None
    down: str
    act: str


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, dense or factorized (factors of a convolution or an embedding are not)."""
    factorized = isinstance(module, FactorizedLinear) and not hasattr(module, "form")
    return isinstance(module, nn.Linear) or factorized or is_conv1d(module)


def forms(module: nn.Module) -> Iterator[Form]:
    """The formulas that fit the shapes of a module's children."""
    linears = {name: shape_of(child) for name, child in module.named_children() if is_linear(child)}
    if len(linears) not in (2, 3) or len(list(module.parameters())) == 0:
        return
    acts = [name for name, child in module.named_children() if name not in linears and _is_activation(child)]
    acts += [name for name, value in vars(module).items() if "act" in name and callable(value)]
    for act, names in itertools.product(acts, itertools.permutations(linears)):
        first, last = linears[names[0]], linears[names[-1]]
        if last[1] == first[0] and (len(names) == 2 or linears[names[1]] == first):
            yield Form(names[0], names[1] if len(names) == 3 else None, names[-1], act)


def _is_activation(module: nn.Module) -> bool:
    plain = next(module.parameters(), None) is None and next(module.buffers(), None) is None
    return plain and not isinstance(module, nn.Dropout | nn.Identity | nn.ModuleList | nn.ModuleDict)


def hidden(module: Any, form: Form, x: Tensor) -> Tensor:
    """What `down` reads, for x [tokens, in]. The parts are called as the modules they are now."""
    h = getattr(module, form.act)(getattr(module, form.gate)(x))
    return h if form.up is None else h.mul_(getattr(module, form.up)(x))


def evaluate(module: Any, form: Form, x: Tensor) -> Tensor:
    """The MLP on x [tokens, in]."""
    return getattr(module, form.down)(hidden(module, form, x))


def form_of(module: nn.Module) -> Form | None:
    """The formula that a module computes, confirmed by its own output; None if it is no MLP or another one."""
    candidates = list(forms(module))
    if not candidates:
        return None
    inputs = list(_inputs(module, shape_of(module.get_submodule(candidates[0].gate))[1]))
    for form in candidates:
        if all(_same(partial(evaluate, module, form), module, x) for x in inputs):
            return form
    return None


def widens(module: nn.Module) -> int:
    """Width of the widest activation between two linear children; 0 if the module is no MLP."""
    shapes = [shape_of(child) for _, child in module.named_children() if is_linear(child)]
    if len(shapes) < 2 or shapes[0][1] != shapes[-1][0] or shapes[0][0] < shapes[0][1]:
        return 0
    others = [child for _, child in module.named_children() if not is_linear(child)]
    acts = [child for child in others if _is_activation(child)]
    fits = acts and all(child in acts or isinstance(child, nn.Dropout) for child in others)
    return max(max(s) for s in shapes) if fits else 0


def tokenwise(module: nn.Module) -> bool:
    width = next(shape_of(child)[1] for child in module.children() if is_linear(child))
    try:
        return all(
            _same(lambda x: torch.cat([module(row[None, None])[0] for row in x]), module, x)
            for x in _inputs(module, width)
        )
    except (TypeError, ValueError, IndexError):  # it takes something else than one tensor
        return False


def _inputs(module: nn.Module, width: int) -> Iterator[Tensor]:
    """Random tokens [5, width], small ones and ones large enough to show a clamp."""
    like = next(p for p in [*module.parameters(), *module.buffers()] if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 4.0) if like.dtype == torch.float16 else (1.0, 30.0):
        yield (scale * torch.randn(5, width, generator=generator)).to(like.device, like.dtype)


def _same(function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> bool:
    """Whether a function of [tokens, in] gives what the module gives, up to rounding."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            expected, actual = module(x[None]), function(x)
    except (RuntimeError, TypeError, ValueError):
        return False
    finally:
        for m, mode in modes.items():
            m.training = mode
    if not isinstance(expected, Tensor) or expected[0].shape != actual.shape:
        return False
    scale = expected.float().abs().max().clamp_min(1e-30)
    return bool((expected[0] - actual).float().abs().max() <= 8 * torch.finfo(x.dtype).eps * scale)
