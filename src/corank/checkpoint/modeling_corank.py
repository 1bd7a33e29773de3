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


class FactorizedConv2d(nn.Module):
    """Two convolutions, the second one 1 x 1."""

    def __init__(self, spec, bias, like):
        super().__init__()
        (m, n), k, how = spec["shape"], spec["rank"], spec["geometry"]
        height, width = how["kernel_size"]
        self.out_features, self.how = m, how
        self.register_buffer("weight", like.new_empty(0))
        self.down, self.up = (nn.Conv2d(1, 1, 1, bias=False, device="meta") for _ in range(2))
        for name, value in how.items():
            setattr(self.down, name, tuple(value))
        self.down.weight = nn.Parameter(like.new_empty(k, n // (height * width), height, width))
        self.up.weight = nn.Parameter(like.new_empty(m, k, 1, 1))
        self.up.bias = nn.Parameter(like.new_empty(m)) if bias else None

    def forward(self, input):
        if not len(self.down.weight):  # PyTorch refuses convolutions without channels
            how = [self.how[n] for n in ("kernel_size", "stride", "padding", "dilation")]
            sizes = zip(input.shape[-2:], *how, strict=True)
            shape = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]
            y = input.new_zeros(len(input), self.out_features, *shape)
            return y if self.up.bias is None else y + self.up.bias[:, None, None]
        return self.up(self.down(input))


class FactorizedEmbedding(nn.Module):
    """A narrow table and a matrix; or, tied, the factors of the head, which is the same matrix transposed."""

    def __init__(self, spec, bias, like):
        super().__init__()
        (m, n), k = spec["shape"], spec["rank"]
        self.embedding_dim, self.num_embeddings, self.scale, self.owner = m, n, spec.get("scale", 1.0), ()
        self.register_buffer("weight", like.new_empty(0))
        if spec["form"] == "embedding":
            self.down = nn.Embedding(1, 1, device="meta")
            self.down.num_embeddings, self.down.embedding_dim = n, k
            self.down.weight = nn.Parameter(like.new_empty(n, k))
            self.up = linear(m, k, False, like)

    def forward(self, input):
        if self.owner:
            y = nn.functional.embedding(input, self.owner[0].up.weight) @ self.owner[0].down.weight
        else:
            y = self.up(self.down(input))
        return y if self.scale == 1.0 else y * torch.tensor(self.scale, dtype=y.dtype, device=y.device)


FORMS = {"conv": FactorizedConv2d, "embedding": FactorizedEmbedding, "tied": FactorizedEmbedding}


class ExpertList(nn.Module):
    """Experts as modules of their own, in place of the stacks of the architecture."""

    def __init__(self, stock):
        super().__init__()
        self.stock, turned = (stock,), getattr(stock, "is_transposed", False)
        stacks = {n: p for n, p in stock._parameters.items() if p is not None and not n.endswith("_bias")}
        for name, stack in stacks.items():
            self.register_buffer(name, stack.new_empty(0))
        for e in range(len(stack)):
            expert = nn.Module()
            for name, stack in stacks.items():
                m, n = stack.shape[:0:-1] if turned else stack.shape[1:]
                bias = stock._parameters.get(f"{name}_bias") is not None
                expert.add_module(name.removesuffix("_proj"), linear(m, n, bias, stack))
            self.add_module(str(e), expert)
        self.count = len(stack)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        stock, k, chosen = self.stock[0], top_k_index.shape[-1], top_k_index.reshape(-1)
        order = chosen.argsort(stable=True)
        sizes = torch.bincount(chosen, minlength=self.count)[: self.count].tolist()
        parts = []
        for e, rows in enumerate((order // k)[: sum(sizes)].split(sizes)):
            if len(rows):
                expert, x = getattr(self, str(e)), hidden_states[rows]
                gated = hasattr(expert, "gate_up")
                parts.append(expert.down(stock._apply_gate(expert.gate_up(x)) if gated else stock.act_fn(expert.up(x))))
        out = hidden_states.new_zeros(len(order), hidden_states.shape[-1])
        if parts:
            out = out.index_copy(0, order[: sum(sizes)], torch.cat(parts).to(out.dtype))
        weighted = out.view(*top_k_index.shape, -1) * top_k_weights.unsqueeze(-1)
        return weighted.sum(dim=-2).to(hidden_states.dtype)


class QuantizedLinear(nn.Module):
    """A factor stored as integers with scales: 8 bits, one scale a row; or 4 bits, two values to a byte."""

    def __init__(self, old, how):
        super().__init__()
        (m, n), self.bits = old.weight.shape, how["bits"]
        if self.bits not in (8, 4):
            raise ValueError("This checkpoint needs a newer corank; upgrade with `pip install -U corank`.")
        eight, scale = self.bits == 8, getattr(torch, how["scale"])
        values = old.weight.new_empty(m, n if eight else n // 2, dtype=torch.int8 if eight else torch.uint8)
        self.register_buffer("weight" if eight else "weight_packed", values)
        self.register_buffer("weight_scale", old.weight.new_empty(m, n // (how.get("group") or n), dtype=scale))
        self.register_parameter("bias", old.bias)

    def forward(self, x):
        if self.bits == 8:
            y = nn.functional.linear(x, self.weight.to(x.dtype)) * self.weight_scale.flatten().to(x.dtype)
            return y if self.bias is None else y + self.bias
        nibbles = torch.stack([self.weight_packed & 15, self.weight_packed >> 4], -1).flatten(1).float()
        values = torch.where(nibbles > 7, nibbles - 16, nibbles).unflatten(1, (self.weight_scale.shape[1], -1))
        weight = (values * self.weight_scale.float()[:, :, None]).flatten(1)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


class CorankConfig(QuantizationConfigMixin):
    def __init__(self, **content):
        self.__dict__.update(content)
        known = all(s["kind"] in KINDS and s.get("form") in (None, *FORMS) for s in self.modules.values())
        if (
            self.format_version > FORMAT_VERSION or not known
        ):  # this may be another checkpoint than the one it came with
            raise ValueError("This checkpoint needs a newer corank; upgrade with `pip install -U corank`.")


class CorankQuantizer(HfQuantizer):
    requires_calibration = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        prefix, built = getattr(model, "base_model_prefix", "") + ".", {}
        names = self.quantization_config.modules
        parents = {n.rsplit(".", 2)[0] for name in names for n in (name, name.removeprefix(prefix), prefix + name)}
        for path, old in list(model.named_modules()):  # experts: their matrices are called ...experts.3.down
            stack = getattr(old, "down_proj", None)
            if path in parents and isinstance(stack, nn.Parameter) and stack.dim() == 3:
                model.set_submodule(path, ExpertList(old))
        for name, spec in self.quantization_config.modules.items():
            for place in (name, name.removeprefix(prefix), prefix + name):
                try:
                    old = model.get_submodule(place)
                except AttributeError:
                    continue
                bias = spec.get("bias", getattr(old, "bias", None) is not None)
                if spec.get("form"):
                    built[name] = FORMS[spec["form"]](spec, bias, old.weight)
                elif spec["kind"] == "dense":
                    built[name] = linear(*spec["shape"], bias, old.weight)
                else:
                    built[name] = FactorizedLinear(spec, bias, old.weight)
                for part, how in spec.get("quantized", {}).items():
                    setattr(built[name], part, QuantizedLinear(getattr(built[name], part), how))
                model.set_submodule(place, built[name])
                break
        for name, layer in built.items():
            spec = self.quantization_config.modules[name]
            if spec["kind"] == "shared" or spec.get("form") == "tied":
                layer.owner = (built[spec.get("basis") or spec["owner"]],)

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
