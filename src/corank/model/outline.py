"""The outline of a model: its blocks, the matrices in them, and which matrices read the same input.

Everything is found by building the model on the meta device and running it there once: no weight is read, no
memory is used, and nothing about the architecture has to be known beforehand. Matrices that are handed the
very same tensor object (q, k and v; gate and up) form a group and share their statistics; the order in which
groups run is the order in which a sequential method must compress them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corank.errors import CorankError, unknown
from corank.factors import is_conv1d, shape_of
from corank.model.archs import FUSED, role_of


@dataclass(frozen=True)
class Site:
    """One matrix of the model, W: [out, in].

    Attributes:
        name: dotted path of its module, e.g. ``model.layers.3.self_attn.q_proj``.
        role: q, k, v, o, gate, up, down, qkv, gate_up, or the module's own leaf name.
        layer: index of its block.
        shape: (m, n) = (out, in), whatever way the storage is transposed.
        group: name of the first site that reads the same input tensor; sites of a group share statistics.
        bias: whether the layer has a bias.
    """

    name: str
    role: str
    layer: int
    shape: tuple[int, int]
    group: str
    bias: bool

    @property
    def numel(self) -> int:
        """Entries of the dense matrix."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Outline:
    """What a model consists of.

    Attributes:
        blocks: dotted path of the list of blocks, e.g. ``model.layers``.
        layers: number of blocks.
        sites: all matrices in the blocks, in execution order.
        parameters: parameters of the whole model, tied ones once.
        head: entries of the matrices outside the blocks (the output embedding), which cost operations too.
        returns_tuple: whether a block returns a tuple whose first entry is the hidden state.
    """

    blocks: str
    layers: int
    sites: tuple[Site, ...]
    parameters: int
    head: int
    returns_tuple: bool

    def in_layer(self, layer: int) -> list[Site]:
        """Sites of one block, in execution order."""
        return [site for site in self.sites if site.layer == layer]

    def local(self, site: Site) -> str:
        """Path of a site inside its block."""
        return site.name.removeprefix(f"{self.blocks}.{site.layer}.")


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that a configuration names.

    Raises:
        CorankError: the configuration names no class that this version of transformers has.
    """
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in mapping:
        found: Any = mapping[type(config)]
        return found
    raise CorankError(
        f"The configuration names the architecture {config.architectures or config.model_type!r}, which the installed "
        f"transformers {transformers.__version__} does not have; upgrade transformers."
    )


def is_matrix(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be factorized (nn.Linear or transformers' Conv1D)."""
    return type(module) is nn.Linear or is_conv1d(module)


def find_blocks(model: nn.Module) -> str:
    """Path of the list of blocks: the outermost nn.ModuleList that holds most of the matrices.

    Raises:
        CorankError: the model has no list of repeated blocks.
    """
    best, path = 0, ""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and (not path or not name.startswith(path + ".")):
            size = sum(shape_of(m)[0] * shape_of(m)[1] for m in module.modules() if is_matrix(m))
            if size > best:
                best, path = size, name
    if not path:
        raise CorankError(
            f"{type(model).__name__} has no list of blocks with linear layers; nothing to factorize here."
        )
    return path


def outline(config: PretrainedConfig, cls: type[PreTrainedModel] | None = None) -> Outline:
    """Outline of the model that `config` describes, from one run on the meta device.

    Args:
        config: a transformers configuration (its ``quantization_config`` is ignored).
        cls: the model class; default: the one the configuration names.
    """
    cls = cls or model_class(config)
    with torch.device("meta"):
        model = cls(config)
    model.eval()
    path = find_blocks(model)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    runs: list[tuple[str, Tensor]] = []  # inputs are kept alive, so that identity means "the same tensor"
    results: list[Any] = []
    handles = []
    for name, module in blocks.named_modules(prefix=path):
        if is_matrix(module):
            handles.append(module.register_forward_pre_hook(_note_input(name, runs), with_kwargs=True))
    handles.append(blocks[0].register_forward_hook(lambda _m, _a, out: results.append(out)))
    ids = torch.zeros(1, 8, dtype=torch.long, device="meta")
    with torch.no_grad():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    leaders: dict[int, str] = {}
    sites: dict[str, Site] = {}
    for name, x in runs:
        leader = leaders.setdefault(id(x), name)
        layer, inside = name.removeprefix(path + ".").split(".", 1)
        module = model.get_submodule(name)
        sites.setdefault(
            name,
            Site(
                name, role_of(inside), int(layer), shape_of(module), leader, getattr(module, "bias", None) is not None
            ),
        )
    return Outline(
        blocks=path,
        layers=len(blocks),
        sites=tuple(sites.values()),
        parameters=sum(p.numel() for p in model.parameters()),
        head=sum(
            shape_of(m)[0] * shape_of(m)[1]
            for name, m in model.named_modules()
            if is_matrix(m) and not name.startswith(path + ".")
        ),
        returns_tuple=isinstance(results[0], tuple) if results else False,
    )


def _note_input(name: str, runs: list[tuple[str, Tensor]]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runs.append((name, args[0] if args else next(iter(kwargs.values()))))

    return hook


def select_sites(
    sites: Sequence[Site], targets: Iterable[str] | None = None, ignore: Iterable[str] | None = None
) -> list[Site]:
    """Choose sites by role, by glob on the name, or by regular expression (``re:...``).

    Args:
        sites: the candidates.
        targets: keep a site that any of these matches; None keeps all.
        ignore: drop a site that any of these matches.

    Raises:
        CorankError: a pattern matches no site (the nearest roles and names are suggested).
    """

    def matching(pattern: str) -> set[str]:
        if pattern.startswith("re:"):
            found = {s.name for s in sites if re.search(pattern[3:], s.name)}
        else:
            found = {s.name for s in sites if pattern == s.role or fnmatch.fnmatchcase(s.name, pattern)}
        if not found:
            known = {s.role for s in sites} | {s.name for s in sites}
            raise unknown("role or site", pattern, known)
        return found

    kept = {s.name for s in sites} if targets is None else set().union(*(matching(t) for t in targets))
    for pattern in ignore or ():
        kept -= matching(pattern)
    return [s for s in sites if s.name in kept]


def sites_with_roles(sites: Sequence[Site], roles: Iterable[str]) -> list[Site]:
    """Sites of some roles, in any architecture.

    A fused matrix counts as the role that stands for it, and in an MLP without a gate the first matrix counts as one.
    """
    wanted = set(roles)
    gated = any(s.role in ("gate", "gate_up") for s in sites)

    def counts_as(site: Site) -> str:
        return "gate" if site.role == "up" and not gated else FUSED.get(site.role, site.role)

    return [s for s in sites if s.role in wanted or counts_as(s) in wanted]
