"""The outline of a model: its blocks, the matrices in them, and which matrices read the same input.

Everything is found by building the model on the meta device and running it there once: no weight is read, no
memory is used, and nothing about the architecture has to be known beforehand. Matrices that are handed the
very same tensor object (q, k and v; gate and up) form a group and share their statistics; the order in which
groups run is the order in which a sequential method must compress them.

A model can be streamed if its blocks form one list in which each is handed what the one before it returned.
Any other model (an encoder and a decoder, shared layers) runs as a whole: it is one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from corank.errors import CorankError
from corank.factors import ExpertList, shape_of, take_apart
from corank.model.archs import (
    dummy_inputs,
    is_convolution,
    is_embedding,
    is_linear,
    is_matrix,
    meta_inputs,
    role_of,
)
from corank.model.site import Site

_TEXT = {"input_ids", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_attention_mask", "labels"}
#: tasks in which a configuration that names no class is looked up, in this order
_MAPPINGS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_CLASSIFICATION")
MINOR = 0.1
"""A list of blocks with less than this share of the matrices does not make a model one of several parts."""


@dataclass(frozen=True)
class Outline:
    """What a model consists of.

    Attributes:
        blocks: dotted path of the list of blocks, e.g. ``model.layers``; empty if the model runs as a whole.
        layers: number of blocks; 1 if the model runs as a whole.
        sites: all matrices in the blocks, in execution order.
        parameters: parameters of the whole model, tied ones once.
        head: entries of the matrices outside the blocks (the output embedding), which cost operations too.
        returns_tuple: whether a block returns a tuple whose first entry is the hidden state.
        optional: matrices outside the blocks, compressed only when asked for: embeddings, heads, patch embeddings.
    """

    blocks: str
    layers: int
    sites: tuple[Site, ...]
    parameters: int
    head: int
    returns_tuple: bool
    optional: tuple[Site, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether the model runs as a whole, as a single block."""
        return not self.blocks

    @property
    def flops(self) -> int:
        """Operations of all matrices per token."""
        return sum(s.flops for s in self.sites) + 2 * self.head

    def in_layer(self, layer: int) -> list[Site]:
        """Sites of one block, in execution order."""
        return [site for site in self.sites if site.layer == layer]

    def path(self, layer: int) -> str:
        """Dotted path of a block; empty for what lies around the blocks, and for a model that is one block."""
        return f"{self.blocks}.{layer}" if self.blocks and layer < self.layers else ""

    def local(self, site: Site) -> str:
        """Path of a site inside its block."""
        path = self.path(site.layer)
        return site.name.removeprefix(f"{path}.") if path else site.name

    def inside(self, name: str) -> bool:
        """Whether a parameter or module is inside the list of blocks."""
        return bool(self.blocks) and name.startswith(f"{self.blocks}.")


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that a configuration names.

    Raises:
        CorankError: the configuration names no class that this version of transformers has.
    """
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for name in _MAPPINGS:
        mapping = getattr(transformers, f"MODEL_FOR_{name}_MAPPING")
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found
    raise CorankError(
        f"The configuration names the architecture {config.architectures or config.model_type!r}, which the installed "
        f"transformers {transformers.__version__} does not have; upgrade transformers."
    )


def narrow_as_stored(model: nn.Module, config: PretrainedConfig) -> None:
    """Give the blocks of an empty model the widths that a narrowed checkpoint was stored with, if it was."""
    from corank.checkpoint.widths import narrow_blocks, widths_of  # the format stands on this module

    stored = widths_of(config)
    if stored is not None:
        narrow_blocks(model, stored)


def lists_of_blocks(model: nn.Module) -> dict[str, int]:
    """Path -> entries of the matrices in it, of every outermost nn.ModuleList that holds any; the largest first.

    Raises:
        CorankError: there is none.
    """
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{k}.") for k in sizes):
            size = sum(shape_of(m)[0] * shape_of(m)[1] for m in module.modules() if is_matrix(m))
            if size:
                sizes[name] = size
    if not sizes:
        raise CorankError(
            f"{type(model).__name__} has no list of blocks with linear layers; nothing to factorize here."
        )
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


class _Trace:
    """One run on the meta device: which matrices read which tensors, and what the blocks hand on."""

    def __init__(self, model: nn.Module, lists: Mapping[str, int], embedding: nn.Module | None):
        self.reads: list[tuple[str, Tensor]] = []  # inputs are kept alive, so that identity means "the same tensor"
        self.shares: dict[str, float] = {}
        self.taken: dict[str, list[tuple[int, Any]]] = {name: [] for name in lists}
        self.given: dict[str, list[Any]] = {name: [] for name in lists}
        for name, module in model.named_modules():
            if is_matrix(module) or module is embedding:
                module.register_forward_pre_hook(self._note_input(name), with_kwargs=True)
            elif isinstance(module, ExpertList):
                module.forward = self._mixture(name, module)  # type: ignore[method-assign]
        for name in lists:
            blocks: Any = model.get_submodule(name)
            for i, block in enumerate(blocks):
                block.register_forward_pre_hook(self._note_block(name, i), with_kwargs=True)
                block.register_forward_hook(lambda _m, _a, out, name=name: self.given[name].append(out))

    def _note_input(self, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.reads.append((name, args[0] if args else next(iter(kwargs.values()))))

        return hook

    def _note_block(self, name: str, i: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.taken[name].append((i, args[0] if args else kwargs.get("hidden_states")))

        return hook

    def _mixture(self, name: str, experts: ExpertList) -> Any:
        """All experts on all tokens: which are chosen is not known without weights."""

        def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            self.shares[name] = index.shape[-1] / experts.count
            for e in range(experts.count):
                experts.mix(e, hidden + 0)  # tensors of their own: every expert is given other tokens
            return torch.empty_like(hidden)

        return forward

    def reading(self, tokens: int) -> set[str]:
        """Linear layers whose input has this many tokens."""
        return {name for name, x in self.reads if x.is_floating_point() and x.shape[:-1].numel() == tokens}

    def chained(self, name: str, length: int) -> bool:
        """Whether the blocks of a list ran once each, in order, on what the one before returned."""
        taken, given = self.taken[name], [out[0] if isinstance(out, tuple) else out for out in self.given[name]]
        in_order = [i for i, _ in taken] == list(range(length)) and len(given) == length
        return (
            in_order
            and all(isinstance(x, Tensor) for _, x in taken)
            and all(taken[i + 1][1] is given[i] for i in range(length - 1))
        )


def outline(
    config: PretrainedConfig, cls: type[PreTrainedModel] | None = None, example: Mapping[str, Any] | None = None
) -> Outline:
    """Outline of the model that `config` describes, from one run on the meta device.

    Args:
        config: a transformers configuration; of its ``quantization_config`` only widths of blocks are read.
        cls: the model class; default: the one the configuration names.
        example: model inputs of the shapes that will come; default: text, images or audio by the configuration.

    Raises:
        CorankError: no matrices in a list of blocks, or the model cannot be run on the meta device.
    """
    cls = cls or model_class(config)
    with torch.device("meta"):
        model = cls(config)
    narrow_as_stored(model, config)
    model.eval()
    parameters = sum(p.numel() for p in model.parameters())
    take_apart(model)
    routers = _routers(model)
    lists = lists_of_blocks(model)
    embedding = _input_embedding(model)
    trace = _Trace(model, lists, embedding)
    inputs = dummy_inputs(model) if example is None or set(example) <= _TEXT else meta_inputs(example)
    try:
        with torch.no_grad():
            model(**inputs)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CorankError(
            f"{cls.__name__} could not be run on inputs of the shapes {_shapes(inputs)}: {reason}"
        ) from error
    ran = {name: size for name, size in lists.items() if trace.taken[name]}
    main = next(iter(ran), "")
    alone = all(size < MINOR * ran[main] for name, size in ran.items() if name != main)
    length = len(model.get_submodule(main)) if main else 0  # type: ignore[arg-type]
    streamed = bool(main) and alone and trace.chained(main, length)
    outs = trace.given[main] if main else []
    plan = Outline(
        blocks=main if streamed else "",
        layers=length if streamed else 1,
        sites=(),
        parameters=parameters,
        head=sum(
            shape_of(m)[0] * shape_of(m)[1]
            for name, m in model.named_modules()
            if is_linear(m) and not any(name.startswith(f"{each}.") for each in lists)
        ),
        returns_tuple=bool(outs) and isinstance(outs[0], tuple),
    )
    target = inputs["decoder_input_ids"].numel() if "decoder_input_ids" in inputs else -1
    sites = _sites(model, plan, trace, list(ran), embedding, routers)
    of_decoder = trace.reading(target)
    sites = [replace(s, decoder=s.name in of_decoder) for s in sites]
    ties = _ties(model, embedding)
    sites = [_untouchable(s) if s.name in ties and config.is_encoder_decoder else s for s in sites]
    sites = _pair(sites, ties)
    return replace(
        plan,
        sites=tuple(s for s in sites if not s.outside),
        optional=tuple(s for s in sites if s.outside),
    )


def _sites(
    model: Any, plan: Outline, trace: _Trace, ran: list[str], embedding: nn.Module | None, routers: set[str]
) -> list[Site]:
    head = model.get_output_embeddings()
    leaders: dict[Any, str] = {}
    sites: dict[str, Site] = {}
    for name, x in trace.reads:
        module = model.get_submodule(name)
        if name in sites or name in routers or min(shape_of(module)) < 2:  # a vector has no rank to reduce
            continue
        home = next((each for each in ran if name.startswith(f"{each}.")), None)
        number, inside = name.removeprefix(f"{home}.").split(".", 1) if home else ("0", name)
        outside = home is None if plan.whole else home != plan.blocks
        form = "conv" if is_convolution(module) else "embedding" if module is embedding else "linear"
        # convolutions share an input only if they look at it through the same window
        look = (module.kernel_size, module.stride, module.padding, module.dilation) if form == "conv" else form
        role = {"conv": "conv", "embedding": "embed"}.get(form, "lm_head" if module is head else role_of(inside))
        container, _, leaf = name.rpartition(".")
        mixture = container.rpartition(".")[0]
        expert = mixture in trace.shares
        sites[name] = Site(
            name,
            role,
            0 if plan.whole else plan.layers if outside else int(number),
            shape_of(module),
            leaders.setdefault((id(x), look, outside), name),
            getattr(module, "bias", None) is not None,
            form=form,
            outside=outside,
            pool=f"{mixture}:{leaf}" if expert else None,
            share=trace.shares[mixture] if expert else 1.0,
            depth=int(number) if plan.whole and not outside else None,
        )
    return list(sites.values())


def _input_embedding(model: PreTrainedModel) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found if is_embedding(found) else None


def _routers(model: nn.Module) -> set[str]:
    """Linear layers beside a mixture of experts with as many outputs as there are experts: they choose, and stay."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, ExpertList):
            parent = name.rpartition(".")[0]
            for leaf, child in model.get_submodule(parent).named_children():
                if is_linear(child) and shape_of(child)[0] == module.count:
                    found.add(f"{parent}.{leaf}")
    return found


def _ties(model: Any, embedding: nn.Module | None) -> dict[str, str]:
    """Path of every embedding or linear layer whose weight is tied -> path of the one it is tied to."""
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    pairs = {k.removesuffix(".weight"): v.removesuffix(".weight") for k, v in ties.items() if k.endswith(".weight")}
    return {**pairs, **{v: k for k, v in pairs.items()}}


def _untouchable(site: Site) -> Site:
    why = f"{site.name} shares its weight with other embeddings, as this architecture requires; leave it dense."
    return replace(site, refusal=why)


def _pair(sites: list[Site], ties: Mapping[str, str]) -> list[Site]:
    """Make one site of a head and the embedding that are one matrix; refuse what is tied to anything else."""
    by_name = {s.name: s for s in sites}
    paired: dict[str, Site | None] = {}
    for site in sites:
        other = by_name.get(ties.get(site.name, ""))
        if site.role == "lm_head" and other is not None and other.form == "embedding" and site.refusal is None:
            paired[site.name] = replace(site, tied=other.name)
            paired[other.name] = None
        elif site.name in ties and site.name not in paired:
            paired[site.name] = site if site.refusal else _untouchable(site)
    return [s for s in (paired.get(site.name, site) for site in sites) if s is not None]


def _shapes(inputs: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {list(v.shape)}" for k, v in inputs.items() if isinstance(v, Tensor))
