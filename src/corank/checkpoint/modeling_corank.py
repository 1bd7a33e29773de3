"""Loads this checkpoint where the corank package is not installed:

    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

Self-contained, for inference. With the package (`pip install corank`, then `import corank`) the same
directory loads without `trust_remote_code` and can also be trained, verified, turned dense and saved again.
"""

import torch
import transformers
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

FORMAT_VERSION = 1
KINDS = ("dense", "low_rank", "cur", "row_pivoted", "column_pivoted", "shared")


def linear(m, n, bias, like):
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = m, n
    layer.weight = nn.Parameter(like.new_empty(m, n))
    layer.bias = nn.Parameter(like.new_empty(m)) if bias else None
    return layer


class FactorizedLinear(nn.Module):
    """y = W' x + b with W' stored as factors; `weight` is empty and only stops loaders that look for it."""

    def __init__(self, spec, bias, like):
        super().__init__()
        (m, n), k, self.kind = spec["shape"], spec["rank"], spec["kind"]
        self.out_features, self.in_features, self.rank = m, n, k
        rows, columns = self.kind == "row_pivoted", self.kind == "column_pivoted"
        self.register_buffer("weight", like.new_empty(0))
        if self.kind != "shared":
            self.down = linear(k, n - k if columns else n, False, like)
        if self.kind == "cur":
            self.link = linear(k, k, False, like)
        self.up = linear(m - k if rows else m, k, bias and not rows, like)
        if rows or columns:
            index = like.new_empty(m if rows else n - k, dtype=torch.int64)
            self.register_buffer("pivots", like.new_empty(k, dtype=torch.int32))
            self.register_buffer("index", index, persistent=False)
        if rows:
            self.register_parameter("bias", nn.Parameter(like.new_empty(m)) if bias else None)
        self.owner = ()  # in a tuple, so that a shared basis is registered once

    def finalize(self):
        if hasattr(self, "pivots"):
            size = self.out_features if self.kind == "row_pivoted" else self.in_features
            mask = torch.ones(size, dtype=torch.bool, device=self.pivots.device)
            mask[self.pivots.long()] = False
            others = mask.nonzero().squeeze(1)
            rows = self.kind == "row_pivoted"
            self.index = torch.cat([self.pivots.long(), others]).argsort() if rows else others

    def forward(self, x):
        if self.kind == "column_pivoted":
            return self.up(x.index_select(-1, self.pivots) + self.down(x.index_select(-1, self.index)))
        z = (self.owner[0] if self.owner else self).down(x)
        if self.kind == "cur":
            z = self.link(z)
        if self.kind != "row_pivoted":
            return self.up(z)
        y = torch.cat([z, self.up(z)], dim=-1).index_select(-1, self.index)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class CorankConfig(QuantizationConfigMixin):
    def __init__(self, **content):
        self.__dict__.update(content)
        if self.format_version > FORMAT_VERSION:
            raise ValueError("This checkpoint needs a newer corank; upgrade with `pip install -U corank`.")


class CorankQuantizer(HfQuantizer):
    requires_calibration = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        prefix, built = getattr(model, "base_model_prefix", "") + ".", {}
        for name, spec in self.quantization_config.modules.items():
            for place in (name, name.removeprefix(prefix), prefix + name):
                try:
                    old = model.get_submodule(place)
                except AttributeError:
                    continue
                bias = spec.get("bias", old.bias is not None)
                if spec["kind"] == "dense":
                    built[name] = linear(*spec["shape"], bias, old.weight)
                else:
                    built[name] = FactorizedLinear(spec, bias, old.weight)
                model.set_submodule(place, built[name])
                break
        for name, layer in built.items():
            if self.quantization_config.modules[name]["kind"] == "shared":
                layer.owner = (built[self.quantization_config.modules[name]["basis"]],)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for layer in model.modules():
            if isinstance(layer, FactorizedLinear):
                layer.finalize()

    def is_serializable(self):
        return False

    @property
    def is_trainable(self):
        return False


if "corank" not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config("corank")(CorankConfig)
    register_quantizer("corank")(CorankQuantizer)


def __getattr__(name):
    """What `auto_map` names: with the format registered, the stock Auto class of that name does the rest."""
    if not name.startswith("AutoModel"):
        raise AttributeError(name)

    def from_pretrained(path, *args, **kwargs):
        stock = getattr(transformers, name)
        return stock.from_pretrained(path, *args, **{**kwargs, "trust_remote_code": False})

    def register_for_auto_class(auto_class=None):
        """Asked of every custom class; the model that comes out is a stock one."""

    return type(name, (), {f.__name__: staticmethod(f) for f in (from_pretrained, register_for_auto_class)})
