"""The PEFT layer of all adapters that train a small matrix inside fixed maps. Importing this module needs PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from corank.adapters.products import between, convolved, rotated, rotation_rank
from corank.errors import CorankError
from corank.factors import CUR, FactorizedLinear, is_conv1d, shape_of, weight_of

#: kind of factors -> the part that the link is merged into; the others have a part that must stay what it is
MERGED_INTO = {"cur": "link", "row_pivoted": "down"}


class CoreLayer(nn.Module, BaseTunerLayer):
    """y = base(x) + scale C M R x, of which M alone trains. M starts at zero.

    C and R are not stored: they are columns and rows of the frozen base weight, whose indices are; those of all
    slices of a stack; the factors of a factorized layer; or, for MoRA, maps without parameters. A stack's M belongs
    to its first layer, which the others know through `corank_stacks`.

    Attributes:
        corank_core: adapter -> M: [r, r], of the first layer of a stack [S, r, r], of its other layers none.
        corank_rows, corank_columns: adapter -> int64 [r], indices of the rows and columns of the base weight.
        corank_forms: adapter -> "ends", "stack", "rotation" or "link".
        corank_scales: adapter -> factor.
        corank_stacks: adapter -> (the layers of the stack, the position of this one).
    """

    adapter_layer_names = ("corank_core",)
    other_param_names = ("corank_rows", "corank_columns", "corank_forms", "corank_scales", "corank_stacks")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.out_features, self.in_features = shape_of(self.get_base_layer())
        self.corank_core = nn.ParameterDict()
        self.corank_rows, self.corank_columns = BufferDict(persistent=True), BufferDict(persistent=True)
        self.corank_forms: dict[str, str] = {}
        self.corank_scales: dict[str, float] = {}
        self.corank_stacks: dict[str, tuple[tuple[CoreLayer, ...], int]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before: tuple[Tensor, ...] = ()  # what merging changed, as it was; in a tuple: not part of the model
        self._ends: dict[str, tuple[Any, Tensor, Tensor]] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, key)

    def update_layer(self, name: str, config: Any, key: str) -> None:
        """Add an adapter of which nothing has been chosen yet but its size.

        Args:
            name: of the adapter.
            config: a `CorankConfig`.
            key: name of this layer in the model.

        Raises:
            CorankError: a rank larger than the matrix, or another layer than the adapter was made for.
        """
        base: Any = self.get_base_layer()
        m, n = shape_of(base)
        rank = config.rank_pattern.get(key, config.rank)
        if list(config.shapes.get(key, (m, n))) != [m, n]:  # r x r values fit any matrix
            shapes = f"[{m}, {n}], and the adapter is for {config.shapes[key]}"
            raise CorankError(f"{key} is {shapes}; load it on the model it was made on.")
        factorized = isinstance(base, FactorizedLinear)
        if factorized != (key in config.links):  # of the same rank it would load, and mean something else
            kinds = ("factorized", "dense") if factorized else ("dense", "factorized")
            raise CorankError(
                f"{key} is {kinds[0]}, and the adapter is for a {kinds[1]} layer; load it on the model it was made on."
            )
        form = "link" if factorized else config.form
        if factorized:
            rank = base.rank
        elif not 1 <= rank <= min(m, n):
            raise CorankError(f"A rank of {rank} is not possible for {key} [{m}, {n}]; give 1 to {min(m, n)}.")
        shape = (rank, rank)
        if form == "rotation":
            shape = (rotation_rank(m, n, rank),) * 2
        leads = True
        if form == "stack":
            stack = next((stack for stack in config.stacks if key in stack), None)
            if stack is None:
                raise CorankError(f"{key} is in no stack of this adapter; make it with corank.adapters.attach.")
            leads, shape = stack[0] == key, (len(stack), rank, rank)  # type: ignore[assignment]
        self.corank_forms[name], self.corank_scales[name] = form, config.scale
        like = base.weight
        if leads:
            self.corank_core[name] = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        if leads and form in ("ends", "stack"):
            for indices in (self.corank_rows, self.corank_columns):
                indices[name] = torch.arange(rank, device=like.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def choose(self, name: str, rows: Tensor, columns: Tensor) -> None:
        """Set the rows and columns, int64 [r], of an adapter of the form "ends", or "stack" in its first layer."""
        for indices, chosen in ((self.corank_rows, rows), (self.corank_columns, columns)):
            indices[name].copy_(chosen)

    def original(self) -> Tensor:
        """The base weight [out, in] without what is merged into it, detached."""
        base: Any = self.get_base_layer()
        if not self._before:
            return weight_of(base)
        return self._before[0].mT if is_conv1d(base) else self._before[0]

    def ends(self, name: str) -> tuple[Tensor, Tensor]:
        """(C, R) between which the trained matrix of an adapter acts; of a stack, those of all its slices.

        Raises:
            CorankError: a factorized layer has something merged into it.
        """
        if self.corank_forms[name] == "link":
            if self._before:
                raise CorankError("The factors have changed by merging; unmerge first.")
            factors: Any = self.get_base_layer().factors()  # type: ignore[operator]
            return (factors.C, factors.R) if isinstance(factors, CUR) else factors.pair()
        if self.corank_forms[name] == "stack":
            members, _ = self.corank_stacks[name]
            return members[0]._all_ends(name, members)
        W = self.original()
        return W.index_select(1, self.corank_columns[name]), W.index_select(0, self.corank_rows[name])

    def _all_ends(self, name: str, members: tuple[CoreLayer, ...]) -> tuple[Tensor, Tensor]:
        """The columns and rows of all slices side by side; kept as long as the indices are the same."""
        I, J = self.corank_rows[name], self.corank_columns[name]
        like = self.original()
        key = (id(I), I._version, id(J), J._version, like.dtype, like.device)
        if name not in self._ends or self._ends[name][0] != key:
            slices = [member.original() for member in members]
            C = torch.cat([W.index_select(1, J) for W in slices], 1)
            self._ends[name] = (key, C, torch.cat([W.index_select(0, I) for W in slices]))
        return self._ends[name][1:]

    def core(self, name: str) -> Tensor:
        """The trained matrix between C and R, scaled; of a stack, what it amounts to for this layer."""
        scale = self.corank_scales[name]
        if self.corank_forms[name] != "stack":
            return scale * self.corank_core[name]
        members, position = self.corank_stacks[name]
        return scale * convolved(members[0].corank_core[name], position)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in] -> y [..., out], in the dtype of the base layer's output."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name not in self.corank_forms:
                continue
            if self.corank_forms[name] == "rotation":
                more = rotated(x, self.core(name), self.out_features)
            else:
                C, R = self.ends(name)
                more = between(x, C, self.core(name), R)
            result = result + more.to(result.dtype)
        return result

    def get_delta_weight(self, name: str) -> Tensor:
        """What an adapter adds to the base weight, in the storage and dtype of the base layer.

        Raises:
            CorankError: there is no such adapter, or the layer has no weight.
        """
        base: Any = self.get_base_layer()
        if name not in self.corank_forms:
            raise CorankError(f"This layer has no adapter {name!r}.")
        if isinstance(base, FactorizedLinear):
            raise CorankError("A factorized layer has no weight; its adapter is merged into its factors.")
        return self._change(name, base.weight).to(base.weight.dtype)

    def _changed(self) -> Any:
        """The layer whose weight merging changes."""
        base: Any = self.get_base_layer()
        return getattr(base, MERGED_INTO.get(base.kind, "up")) if isinstance(base, FactorizedLinear) else base

    def _change(self, name: str, before: Tensor) -> Tensor:
        """What an adapter adds to that weight, which was `before`; in float32 or more."""
        wide = torch.promote_types(before.dtype, torch.float32)
        base: Any = self.get_base_layer()
        core = self.core(name).detach().to(wide)
        if self.corank_forms[name] == "link":
            if base.kind == "cur":
                return core
            return core @ before.to(wide) if base.kind == "row_pivoted" else before.to(wide) @ core
        if self.corank_forms[name] == "rotation":
            unit = torch.eye(self.in_features, dtype=wide, device=before.device)
            delta = rotated(unit, core, self.out_features).mT
        else:
            C, R = self.ends(name)
            delta = C.to(wide) @ core @ R.to(wide)
        return delta.mT if is_conv1d(base) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, or to the factors, whose kind and rank stay.

        The weight as it was is kept until the adapters are unmerged or unloaded, so that unmerging is exact to the bit.

        Args:
            safe_merge: refuse adapters that hold NaN or infinite values.
            adapter_names: None means the active ones.

        Raises:
            ValueError: `safe_merge` and the result is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.corank_forms]
        if not names:
            return
        weight = self._changed().weight
        before = self._before[0] if self._before else weight.detach().clone()
        total = before.to(torch.promote_types(before.dtype, torch.float32), copy=True)
        for name in [*self.merged_adapters, *names]:
            total += self._change(name, before)
        if safe_merge and not bool(torch.isfinite(total).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[-1]} seems to be broken")
        weight.data = total.to(before.dtype)
        self._before = (before,)
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put back the weight as it was before the first merge."""
        if self._before:
            weight = self._changed().weight
            weight.data = self._before[0].to(weight.device, weight.dtype)
        self._before, self.merged_adapters = (), []

    def __repr__(self) -> str:
        return f"corank.{super().__repr__()}"
