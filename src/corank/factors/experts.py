"""Experts stored as stacks [E, out, in], taken apart into one linear layer per expert and matrix, and put back.

transformers keeps the experts of a mixture in two 3-D parameters and multiplies them by indexing. Taken apart, every
expert's matrix is a module of its own: hooks see the tokens routed to it, it can be replaced like any other linear
layer, and its factors are stored under a name that no conversion pattern of transformers matches
(`experts.3.gate_up`, `experts.3.down`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: matrix of an expert -> the stacks it may be stored in
_STACKS = {"gate_up": "gate_up_proj", "up": "up_proj", "down": "down_proj"}


def is_stack(module: nn.Module) -> bool:
    """Whether a module holds its experts as stacks: 3-D parameters behind transformers' interface for experts.

    Stacks with parameters of another kind, or with a norm behind every expert, are left alone.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    matrices = [name for name in _STACKS.values() if name in parameters]
    known = {*matrices, *(f"{name}_bias" for name in matrices)}
    return (
        len(matrices) == 2
        and "down_proj" in matrices
        and all(parameters[name].dim() == 3 for name in matrices)
        and set(parameters) <= known
        and hasattr(module, "is_transposed")
        and hasattr(module, "_apply_gate" if "gate_up_proj" in matrices else "act_fn")
        and not getattr(module, "has_post_expert_norm", False)
    )


class Expert(nn.Module):
    """The matrices of one expert: `gate_up` (or `up`) and `down`."""


class ExpertList(nn.Module):
    """The experts of one layer as separate modules, called like the stack they came from.

    The empty buffers under the names of the stacks make a loader that does not know this format stop, because it
    finds a tensor of the wrong size where it looks for the experts.

    Attributes:
        routes: inside `noted`, positions of the tokens that each expert is given in the latest forward pass.
        index: inside `noted`, the router's choice in the latest forward pass, [tokens, k].
        forced: experts to use in place of the router's choice, for comparing two models token by token.
    """

    def __init__(self, stock: nn.Module):
        super().__init__()
        self._stock = (stock,)  # in a tuple, so that its parameters are not registered here
        self.transposed = bool(getattr(stock, "is_transposed", False))
        stacks = {leaf: name for leaf, name in _STACKS.items() if stock._parameters.get(name) is not None}
        self.count = next(iter(stock._parameters[n] for n in stacks.values())).shape[0]  # type: ignore[union-attr]
        for name in stacks.values():
            parameter: Any = stock._parameters[name]
            self.register_buffer(name, parameter.new_empty(0))
        for e in range(self.count):
            expert = Expert()
            for leaf, name in stacks.items():
                W: Any = stock._parameters[name]
                bias: Any = stock._parameters.get(f"{name}_bias")
                expert.add_module(leaf, _view(W[e].mT if self.transposed else W[e], None if bias is None else bias[e]))
            self.add_module(str(e), expert)
        self.train(stock.training)
        self._noting = False
        self.routes: list[Tensor] | None = None
        self.index: Tensor | None = None
        self.forced: Tensor | None = None

    @property
    def stock(self) -> Any:
        """The module of the architecture that this stands for."""
        return self._stock[0]

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Keep `routes` and `index` of the forward passes inside."""
        self._noting = True
        try:
            yield
        finally:
            self._noting = False

    def experts(self) -> list[nn.Module]:
        """The experts in order."""
        return [self.get_submodule(str(e)) for e in range(self.count)]

    def mix(self, e: int, x: Tensor) -> Tensor:
        """Output of expert e for rows x [rows, d]."""
        expert: Any = self.get_submodule(str(e))
        return expert.down(self.inner(e, x))

    def inner(self, e: int, x: Tensor) -> Tensor:
        """What the last matrix of expert e reads, for rows x [rows, d]."""
        expert: Any = self.get_submodule(str(e))
        if hasattr(expert, "gate_up"):
            return self.stock._apply_gate(expert.gate_up(x))
        return self.stock.act_fn(expert.up(x))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [tokens, d].
            top_k_index: [tokens, k], chosen experts.
            top_k_weights: [tokens, k].
        """
        if self.forced is not None:
            top_k_index = self.forced
        k = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        sizes = torch.bincount(chosen, minlength=self.count)[: self.count].tolist()
        tokens = (order // k)[: sum(sizes)].split(sizes)
        if self._noting:
            self.routes, self.index = list(tokens), top_k_index
        parts = [self.mix(e, hidden_states[rows]) for e, rows in enumerate(tokens) if len(rows)]
        out = hidden_states.new_zeros(len(order), hidden_states.shape[-1])
        if parts:  # put back in the order of the tokens and summed there: the same bits every time
            out = out.index_copy(0, order[: sum(sizes)], torch.cat(parts).to(out.dtype))
        weighted = out.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(dim=-2).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"experts={self.count}"


def _view(W: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer on a slice of a stack, which it shares."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = W.shape
    layer.weight = nn.Parameter(W.detach(), requires_grad=W.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def take_apart(root: nn.Module) -> list[str]:
    """Replace every stack of experts under `root` by an `ExpertList` that shares its memory.

    Returns:
        the paths that were replaced. A root that is itself a stack is left alone.
    """
    found = [name for name, module in root.named_modules() if name and is_stack(module)]
    for name in found:
        root.set_submodule(name, ExpertList(root.get_submodule(name)))
    return found


def take_apart_for(root: nn.Module, names: Iterable[str]) -> None:
    """Take the stacks apart that hold the modules `names`, e.g. ``...mlp.experts.3.gate_up``."""
    for path in {name.rsplit(".", 2)[0] for name in names if name.count(".") >= 2}:
        try:
            module = root.get_submodule(path)
        except AttributeError:
            continue
        if is_stack(module):
            root.set_submodule(path, ExpertList(module))


def put_together(root: nn.Module) -> None:
    """Undo `take_apart` wherever no expert was replaced, and let go of the stacks elsewhere."""
    for name, module in list(root.named_modules()):
        if not isinstance(module, ExpertList):
            continue
        stock = module.stock
        plain = all(type(child) is nn.Linear for expert in module.experts() for child in expert.children())
        if plain and all(not p.is_meta for p in stock.parameters()):
            root.set_submodule(name, stock)
        else:
            _let_go(module)


def _let_go(experts: ExpertList) -> None:
    for leaf, parameter in list(experts.stock._parameters.items()):
        if parameter is not None and not parameter.is_meta:
            experts.stock._parameters[leaf] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for layer in experts.modules():
        if type(layer) is nn.Linear:
            for leaf, parameter in list(layer._parameters.items()):
                if parameter is not None and parameter.untyped_storage().nbytes() > parameter.nbytes:
                    own = parameter.detach().clone(memory_format=torch.contiguous_format)
                    layer._parameters[leaf] = nn.Parameter(own, requires_grad=parameter.requires_grad)


def stacked(experts: ExpertList) -> nn.Module:
    """The module of the architecture again, from experts that are all plain linear layers; they are copied."""
    stock = experts.stock
    for leaf in (child for child, _ in experts.get_submodule("0").named_children()):
        layers: list[Any] = [expert.get_submodule(leaf) for expert in experts.experts()]
        W = torch.stack([layer.weight.detach() for layer in layers])
        stock._parameters[_STACKS[leaf]] = nn.Parameter(W.mT.contiguous() if experts.transposed else W)
        if layers[0].bias is not None:
            bias = torch.stack([layer.bias.detach() for layer in layers])
            stock._parameters[f"{_STACKS[leaf]}_bias"] = nn.Parameter(bias)
    return stock.train(experts.training)
