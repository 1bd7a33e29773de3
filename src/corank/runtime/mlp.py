"""The MLP over chunks of tokens, so that [tokens, intermediate] never exists.

The wide activation of an MLP is the peak of a forward pass. Its rows do not depend on each other, so a chunk of tokens
can go through the whole MLP before the next one starts: the memory that FlashSVD (arXiv:2508.01506) saves with a fused
kernel, with the products of the library and no recomputation.

A module whose formula is known (`corank.runtime.forms`) can also be computed with its first factors packed, or by a
kernel. One whose tokens are independent but whose formula is another has its own forward applied to chunks.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from corank.factors import FactorizedLinear, LowRankLinear, SharedLowRankLinear, shape_of
from corank.kernels import ACTIVATIONS, lowrank_mlp, supports_lowrank_mlp
from corank.runtime.dispatch import Table, capturing, size_of
from corank.runtime.forms import Form, evaluate, form_of, is_linear, tokenwise, widens
from corank.runtime.override import Override, inference, note
from corank.runtime.packing import Siblings, begins_plainly, is_plain, unwatched

#: bytes of one activation [chunk, intermediate]: on a CPU it should stay in a cache
BUDGET = {"cuda": 64 << 20, "cpu": 2 << 20}
LEAST = {"cuda": 512, "cpu": 128}


def chunk_size(width: int, itemsize: int, device: torch.device) -> int:
    """Tokens at a time for an MLP of this width, a multiple of 128."""
    fitting = BUDGET.get(device.type, BUDGET["cuda"]) // max(1, width * itemsize) // 128 * 128
    return max(LEAST.get(device.type, 512), fitting)


def spans(tokens: int, chunk: int) -> list[tuple[int, int]]:
    """(start, end) of chunks of nearly equal size.

    A last chunk of a few tokens would go through another routine of the library than the others, with other bits.
    """
    count = max(1, -(-tokens // max(1, chunk)))
    step, more = divmod(tokens, count)
    ends = list(itertools.accumulate(step + (i < more) for i in range(count)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def by_chunks(function: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> Tensor:
    """`function` of x [tokens, in], a chunk of tokens at a time."""
    if x.shape[0] <= chunk:
        return function(x)
    y: Tensor | None = None
    for start, end in spans(x.shape[0], chunk):
        part = function(x[start:end])
        if y is None:
            y = part.new_empty(x.shape[0], *part.shape[1:])
        y[start:end] = part
    assert y is not None
    return y


def like_input(y: Tensor, x: Tensor) -> Tensor:
    """y [tokens, out] with the leading sizes of x [..., in]."""
    return y.reshape(*x.shape[:-1], y.shape[-1])


class MLP(Override):
    """down(act(gate(x)) * up(x)) for chunks of tokens.

    Args:
        module: the MLP.
        form: where its parts are.
        chunk: tokens at a time; None chooses by width and device.
        ways: how a chunk is computed, the first that is possible: `triton`, `packed` (first factors of gate and up in
            one product), `plain` (its parts are called as the modules they are, so that adapters, hooks and quantized
            weights keep working). `plain` is always possible.
        grouped: as for `Siblings`.
        table: chooses among the ways, and the module's own forward, by measurement.
    """

    def __init__(
        self,
        module: nn.Module,
        form: Form,
        chunk: int | None = None,
        ways: tuple[str, ...] = ("plain",),
        grouped: bool | None = None,
        table: Table | None = None,
    ):
        super().__init__(module)
        self.form = form
        self.chunk = chunk
        self.table = table
        self.chosen: dict[Any, str] = {}
        self.width = shape_of(module.get_submodule(form.down))[1]
        self.act = _name_of(self.part(form.act)) if "triton" in ways else None
        self.siblings: Siblings | None = None
        first = [self.part(name) for name in (form.gate, form.up) if name is not None]
        if ways != ("plain",) and packable(first):
            self.siblings = Siblings(first, grouped, "triton" in ways)
        possible = {"plain": True, "packed": self.siblings and form.up, "triton": self.siblings and self.act}
        self.ways = tuple(way for way in (*ways, "plain") if possible[way])

    def part(self, name: str) -> Any:
        """The child of that name as it is now."""
        return getattr(self.module, name)

    def intact(self) -> bool:
        """Whether the matrices that are packed are still the module's, with nobody watching them."""
        assert self.siblings is not None
        names = (self.form.gate, self.form.up)[: len(self.siblings.layers)]
        parts = zip(names, self.siblings.layers, strict=True)
        same = all(self.part(name) is layer and unwatched(layer) for name, layer in parts)  # type: ignore[arg-type]
        if not (same and self.siblings.intact()):
            note("somebody watches or has replaced a matrix of an MLP; its matrices are multiplied one by one")
            return False
        return True

    def plain(self, x: Tensor) -> Tensor:
        """The MLP on x [tokens, in], part by part."""
        return evaluate(self.module, self.form, x)

    def packed(self, x: Tensor) -> Tensor | None:
        """The same with one product for gate and up; None if they cannot be packed now."""
        assert self.siblings is not None
        known = torch.compiler.is_compiling() or self.intact()
        pending = self.siblings.start(x) if known else None
        if pending is None:
            return None
        h = self.part(self.form.act)(self.siblings.finish(0, pending[0]))
        h.mul_(self.siblings.finish(1, pending[1]))
        return self.part(self.form.down)(h)

    def triton(self, x: Tensor) -> Tensor | None:
        """The same by one operation; None if its kernel does not suit."""
        assert self.siblings is not None and self.act is not None
        down = self.part(self.form.down)
        pairs = [*self.siblings.layers, down]
        fits = all(type(p) in (LowRankLinear, SharedLowRankLinear) and unwatched(p) for p in pairs)
        if not fits or not all(is_plain(p.down) and is_plain(p.up) for p in pairs) or not self.intact():  # type: ignore[union-attr]
            note("an MLP is not made of plain pairs of factors; no kernel computes it")
            return None
        if len(set(self.siblings.place)) != len(pairs) - 1:
            return None  # gate and up on one basis: the packed way has one product less
        A = self.siblings.downs.weight()
        if A is None:
            return None
        gate, up = pairs[0], pairs[1] if len(pairs) == 3 else None
        weights = (gate.up.weight, None if up is None else up.up.weight, down.down.weight, down.up.weight)  # type: ignore[union-attr]
        biases = (gate.bias, None if up is None else up.bias, down.bias)
        reason = supports_lowrank_mlp(x, A, *weights, *biases, act=self.act)  # type: ignore[arg-type]
        if reason is not None:
            note(f"no kernel computes an MLP: {reason}")
            return None
        return lowrank_mlp(x, A, *weights, *biases, act=self.act)

    def rows(self, x: Tensor, ways: tuple[str, ...] | None = None) -> Tensor:
        """The MLP on x [tokens, in], in the first way that is possible."""
        for way in ways or self.ways:
            y = getattr(self, way)(x)
            if y is not None:
                return y
        return self.plain(x)

    def compute(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.traced(x)
        if not inference(self.module):
            return self.original(x)
        flat = x.reshape(-1, x.shape[-1])
        chunk = self.chunk or chunk_size(self.width, x.element_size(), x.device)
        ways = self.ways
        if self.table is not None:
            way = self._choose(x, flat, chunk)
            if way == "torch":
                return self.original(x)
            ways = (way,)
        return like_input(by_chunks(lambda part: self.rows(part, ways), flat, chunk), x)

    def traced(self, x: Tensor) -> Tensor:
        """For a compiler: packed while that is known to hold, else what the module does."""
        siblings = self.siblings
        if siblings is None or siblings.downs.frozen is None or torch.is_grad_enabled() or self.module.training:
            return self.original(x)
        y = self.packed(x)
        return self.original(x) if y is None else y

    def _choose(self, x: Tensor, flat: Tensor, chunk: int) -> str:
        assert self.table is not None
        size = size_of(flat)
        if size not in self.chosen:
            choices: dict[str, Callable[[], Any]] = {"torch": lambda: self.original(x)}
            for way in self.ways:
                if way != "plain" or flat.shape[0] > chunk:  # one chunk computed part by part is what the module does
                    choices[way] = partial(by_chunks, partial(self.rows, ways=(way,)), flat, chunk)
            parts = [self.part(name) for name in (self.form.gate, self.form.up, self.form.down) if name is not None]
            way = self.table.choose("mlp", parts, flat, choices, lean="plain")
            if capturing(flat):
                return way
            self.chosen[size] = way
        return self.chosen[size]

    def release(self) -> None:
        if self.siblings is not None:
            self.siblings.release()


class ChunkedForward(Override):
    """A module's own forward for chunks of tokens.

    Args:
        module: its method maps x [..., in] to [..., out] token by token.
        width: of its widest activation.
        chunk: as for `MLP`.
        attribute: the method; some encoders keep their MLP in `feed_forward_chunk` of the layer.
    """

    def __init__(self, module: nn.Module, width: int, chunk: int | None = None, attribute: str = "forward"):
        super().__init__(module, attribute)
        if attribute == "feed_forward_chunk":  # transformers counts the parameters before it calls
            only = inspect.Parameter("hidden_states", inspect.Parameter.POSITIONAL_OR_KEYWORD)
            self.__signature__ = inspect.Signature([only])
        self.width = width
        self.chunk = chunk

    def compute(self, x: Tensor) -> Tensor:
        if not inference(self.module):
            return self.original(x)
        flat = x.reshape(-1, x.shape[-1])
        chunk = self.chunk or chunk_size(self.width, x.element_size(), x.device)
        if flat.shape[0] <= chunk:
            return self.original(x)
        # one sequence of `chunk` tokens instead of a bare matrix: some modules look at three dimensions
        return like_input(by_chunks(lambda part: self.original(part[None])[0], flat, chunk), x)


def mlps(
    model: nn.Module,
    chunk: int | None = None,
    ways: tuple[str, ...] = ("plain",),
    grouped: bool | None = None,
    table: Table | None = None,
) -> list[Override]:
    """The overrides for every MLP of a model; not yet in place. Arguments as for `MLP`."""
    found: list[Override] = []
    for module in model.modules():
        if any(p.is_meta for p in module.parameters()):
            continue
        if callable(getattr(type(module), "feed_forward_chunk", None)):
            inner = [shape_of(child) for child in module.modules() if is_linear(child)]
            if inner:
                # the transformers library's own chunking wants lengths that are multiples of the chunk
                found.append(ChunkedForward(module, max(max(s) for s in inner), chunk, "feed_forward_chunk"))
            continue
        form = form_of(module)
        if form is not None:
            found.append(MLP(module, form, chunk, ways, grouped, table))
            continue
        width = widens(module)
        if width and tokenwise(module):
            found.append(ChunkedForward(module, width, chunk))
        elif width:
            note(f"{type(module).__name__} looks like an MLP, but its tokens are not independent; it runs whole")
    return found


def packable(layers: list[nn.Module]) -> bool:
    """Whether layers begin with plain products and at least one of them is factorized."""
    return any(isinstance(p, FactorizedLinear) for p in layers) and all(begins_plainly(p, layers) for p in layers)


def _name_of(act: Callable[[Tensor], Tensor]) -> str | None:
    """The activation among those that kernels know, found by its values."""
    x = torch.linspace(-6, 6, 97)
    try:
        y = act(x)
    except (RuntimeError, TypeError):
        return None
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(known(x), y, atol=1e-6)), None)
