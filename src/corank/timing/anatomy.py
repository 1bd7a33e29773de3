"""What of a model the time model looks at: its matrices in order, how each is stored, and the sizes of attention."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from corank.budget import Plan
from corank.checkpoint import CorankConfig
from corank.checkpoint.skeleton import collect
from corank.errors import CorankError
from corank.factors import shape_of
from corank.model import Outline, Site, outline, resolve
from corank.model.outline import model_class

Model = PreTrainedModel | PretrainedConfig | str | Path
"""A model in memory, a configuration, or whatever `corank.load` takes; no weight is ever read."""


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A model without its weights.

    Attributes:
        name: for tables.
        sites: all matrices in the order in which they run, embedding and head included.
        specs: name -> how it is stored, of the factorized ones.
        layers: number of blocks.
        hidden: width of the residual stream.
        heads, kv_heads, head_dim: of attention; 0 heads: there is none.
        windows: of each layer, how far back it sees; None: all.
        causal: it predicts the next token, one by one, from its own input alone (no encoder).
    """

    name: str
    sites: tuple[Site, ...]
    specs: Mapping[str, Mapping[str, Any]]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    causal: bool

    @property
    def factorized(self) -> bool:
        """Whether any matrix is stored as factors."""
        return bool(self.specs)

    def dense(self) -> Anatomy:
        """The same model before it was compressed."""
        return dataclasses.replace(self, specs={})

    def inside(self) -> tuple[Site, ...]:
        """The matrices inside the blocks."""
        return tuple(site for site in self.sites if not site.outside)

    def spec(self, site: Site) -> Mapping[str, Any] | None:
        """How a site is stored; None: dense."""
        return self.specs.get(site.name)


def anatomy(model: Model | Anatomy, plan: Plan | None = None) -> Anatomy:
    """Look at a model.

    Args:
        model: in memory, a configuration, or a path or name.
        plan: what its matrices are to become; None: as they are.

    Raises:
        CorankError: there is no such model, or it has no blocks with matrices.
    """
    if isinstance(model, Anatomy):
        return model if plan is None else dataclasses.replace(model, specs=_planned(plan, model.sites))
    specs: Mapping[str, Mapping[str, Any]] = {}
    cls: Any = None
    if isinstance(model, PreTrainedModel):
        config, cls, name = model.config, type(model), type(model).__name__
        specs = collect(model)
    elif isinstance(model, PretrainedConfig):
        config, name = model, (model.architectures or [model.model_type])[0]
    else:
        path = resolve(model)
        config, name = AutoConfig.from_pretrained(path), Path(model).name
        section = json.loads((path / "config.json").read_text()).get("quantization_config") or {}
        stored = CorankConfig.from_dict(section) if section.get("quant_method") == "corank" else CorankConfig()
        specs = stored.modules
        if getattr(stored, "shape", None):
            raise CorankError(f"{path} has blocks of widths of their own; load it, and predict the model in memory.")
    cls = cls or model_class(config)
    found = _of(name, outline(config, cls), cls, config, specs)
    if isinstance(model, PreTrainedModel):  # its layers may have been narrowed since it was configured
        found = dataclasses.replace(found, sites=tuple(_as_it_is(site, model) for site in found.sites))
    return found if plan is None else dataclasses.replace(found, specs=_planned(plan, found.sites))


def _as_it_is(site: Site, model: PreTrainedModel) -> Site:
    """The site with the shape that its layer has; experts in a stack are no layers, and stay what the outline says."""
    try:
        layer = model.get_submodule(site.name)
    except AttributeError:
        return site
    return dataclasses.replace(site, shape=shape_of(layer))


def stored_dtype(model: str | Path) -> torch.dtype:
    """The dtype that a checkpoint says its weights have; float32 if it says nothing."""
    said = json.loads((resolve(model) / "config.json").read_text())
    return getattr(torch, str(said.get("dtype") or said.get("torch_dtype") or "float32"), torch.float32)


def _of(name: str, plan: Outline, cls: Any, whole: Any, specs: Mapping[str, Mapping[str, Any]]) -> Anatomy:
    config = whole.get_text_config()
    hidden = int(getattr(config, "hidden_size", 0) or max(s.shape[1] for s in plan.sites))
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    layers = plan.layers if not plan.whole else int(getattr(config, "num_hidden_layers", 1) or 1)
    outside = [s for s in plan.optional if s.form == "embedding"]
    behind = [s for s in plan.optional if s.form != "embedding"]
    return Anatomy(
        name=name,
        sites=(*outside, *plan.sites, *behind),
        specs={key: spec for key, spec in specs.items() if spec.get("kind") != "dense"},
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or (hidden // heads if heads else 0)),
        windows=_windows(config, layers),
        causal=cls.can_generate() and not whole.is_encoder_decoder,
    )


def _windows(config: Any, layers: int) -> tuple[int | None, ...]:
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds[:layers])


def _planned(plan: Plan, sites: tuple[Site, ...]) -> dict[str, dict[str, Any]]:
    shapes = {site.name: site.shape for site in sites}
    return {
        name: {"kind": c.kind, "rank": c.rank, "shape": list(shapes[name]), "basis": c.basis}
        for name, c in plan.choices.items()
        if not c.is_dense
    }
