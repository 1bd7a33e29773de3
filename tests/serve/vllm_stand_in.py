"""What the plug-in touches of vLLM, in plain torch: names, arguments and order of calls as in its sources of 2026.

Linear layers call `create_weights` and set their bias afterwards, cut what they load by `tp_rank`, and leave the
all-reduce of a row-parallel layer to the test, which adds the ranks up. Two generations of checkpoint loading are
reproduced: by a dictionary of parameters, and by walking the modules.
"""

from __future__ import annotations

import contextlib
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

WORLD = types.SimpleNamespace(rank=0, size=1)


@contextlib.contextmanager
def tensor_parallel(rank: int, size: int):
    """Layers built inside belong to this rank."""
    before = (WORLD.rank, WORLD.size)
    WORLD.rank, WORLD.size = rank, size
    try:
        yield
    finally:
        WORLD.rank, WORLD.size = before


def divide(a: int, b: int) -> int:
    assert a % b == 0, f"{a} is not divisible by {b}"
    return a // b


class QuantizationConfig(ABC):
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self): ...

    @abstractmethod
    def get_supported_act_dtypes(self): ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls): ...

    @staticmethod
    @abstractmethod
    def get_config_filenames(): ...

    @classmethod
    @abstractmethod
    def from_config(cls, config): ...

    @abstractmethod
    def get_quant_method(self, layer, prefix): ...

    def apply_vllm_mapper(self, hf_to_vllm_mapper):
        return None


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer, *args, **kwargs): ...

    def process_weights_after_loading(self, layer):
        return


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self,
        layer,
        input_size_per_partition,
        output_partition_sizes,
        input_size,
        output_size,
        params_dtype,
        **extra_weight_attrs,
    ):
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        layer.register_parameter("weight", nn.Parameter(data, requires_grad=False))
        attach(layer.weight, input_dim=1, output_dim=0, weight_loader=extra_weight_attrs["weight_loader"])

    def apply(self, layer, x, bias=None):
        return F.linear(x, layer.weight, bias)


def attach(param, **attributes):
    for name, value in attributes.items():
        assert not hasattr(param, name)
        setattr(param, name, value)


class LinearBase(nn.Module):
    def __init__(self, input_size, output_size, skip_bias_add, params_dtype, quant_config, prefix):
        super().__init__()
        self.input_size, self.output_size, self.skip_bias_add = input_size, output_size, skip_bias_add
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.prefix = prefix
        self.quant_method = UnquantizedLinearMethod() if quant_config is None else None
        if quant_config is not None:
            self.quant_method = quant_config.get_quant_method(self, prefix=prefix)
            if self.quant_method is None:
                raise ValueError("All linear layers should support quant method.")
        self.tp_rank, self.tp_size = WORLD.rank, WORLD.size

    def finish(self, bias, size):
        if bias:
            self.bias = nn.Parameter(torch.empty(size, dtype=self.params_dtype))
            attach(self.bias, output_dim=0, weight_loader=self.weight_loader)
        else:
            self.register_parameter("bias", None)


class ReplicatedLinear(LinearBase):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        skip_bias_add=False,
        params_dtype=None,
        quant_config=None,
        prefix="",
    ):
        super().__init__(input_size, output_size, skip_bias_add, params_dtype, quant_config, prefix)
        sizes = [output_size]
        self.quant_method.create_weights(
            self,
            input_size,
            sizes,
            input_size,
            output_size,
            self.params_dtype,
            weight_loader=self.weight_loader,
        )
        self.finish(bias, output_size)

    def weight_loader(self, param, loaded_weight):
        assert param.size() == loaded_weight.size()
        param.data.copy_(loaded_weight)

    def forward(self, x):
        return self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)


class ColumnParallelLinear(LinearBase):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        skip_bias_add=False,
        params_dtype=None,
        quant_config=None,
        prefix="",
    ):
        super().__init__(input_size, output_size, skip_bias_add, params_dtype, quant_config, prefix)
        sizes = getattr(self, "output_sizes", [output_size])
        self.output_partition_sizes = [divide(size, self.tp_size) for size in sizes]
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=input_size,
            output_partition_sizes=self.output_partition_sizes,
            input_size=input_size,
            output_size=output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )
        self.finish(bias, sum(self.output_partition_sizes))

    def weight_loader(self, param, loaded_weight):
        width = param.data.shape[0]
        param.data.copy_(loaded_weight.narrow(0, self.tp_rank * width, width))

    def forward(self, x):
        return self.quant_method.apply(self, x, None if self.skip_bias_add else self.bias)


class FusedLoading:
    """How fused layers take what the module walk hands them: the shard id sits on the tensor."""

    def load_weights(self, weights):
        for name, tensor in weights:
            shard = getattr(tensor, "shard_id", None)
            where, _, leaf = name.rpartition(".")
            param = getattr(self.get_submodule(where), leaf, self)
            if param is None and name == "bias":
                continue
            param.weight_loader(param, tensor, shard)
            yield name


class MergedColumnParallelLinear(FusedLoading, ColumnParallelLinear):
    def __init__(self, input_size, output_sizes, **kwargs):
        self.__dict__["output_sizes"] = output_sizes  # before nn.Module is initialised
        super().__init__(input_size, sum(output_sizes), **kwargs)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        if loaded_shard_id is None:
            for shard, piece in enumerate(loaded_weight.split(self.output_sizes)):
                self.weight_loader(param, piece, shard)
            return
        width = self.output_partition_sizes[loaded_shard_id]
        own = param.data.narrow(0, sum(self.output_partition_sizes[:loaded_shard_id]), width)
        own.copy_(loaded_weight.narrow(0, self.tp_rank * width, width))


class QKVParallelLinear(FusedLoading, ColumnParallelLinear):
    def __init__(self, hidden_size, head_size, total_num_heads, total_num_kv_heads, **kwargs):
        size = WORLD.size
        attributes = {"head_size": head_size, "total_num_heads": total_num_heads, "num_heads": total_num_heads // size}
        attributes["total_num_kv_heads"] = total_num_kv_heads
        if size >= total_num_kv_heads:
            attributes |= {"num_kv_heads": 1, "num_kv_head_replicas": divide(size, total_num_kv_heads)}
        else:
            attributes |= {"num_kv_heads": divide(total_num_kv_heads, size), "num_kv_head_replicas": 1}
        kv = attributes["num_kv_heads"] * head_size * size
        attributes["output_sizes"] = [attributes["num_heads"] * head_size * size, kv, kv]
        self.__dict__.update(attributes)
        super().__init__(hidden_size, sum(attributes["output_sizes"]), **kwargs)

    def weight_loader(self, param, loaded_weight, loaded_shard_id=None):
        if loaded_shard_id is None:
            kv = self.total_num_kv_heads * self.head_size
            pieces = loaded_weight.split([self.total_num_heads * self.head_size, kv, kv])
            for shard, piece in zip("qkv", pieces, strict=True):
                self.weight_loader(param, piece, shard)
            return
        assert loaded_shard_id in ("q", "k", "v")
        index = "qkv".index(loaded_shard_id)
        width = self.output_partition_sizes[index]
        own = param.data.narrow(0, sum(self.output_partition_sizes[:index]), width)
        rank = self.tp_rank if index == 0 else self.tp_rank // self.num_kv_head_replicas
        own.copy_(loaded_weight.narrow(0, rank * width, width))


class RowParallelLinear(LinearBase):
    def __init__(
        self,
        input_size,
        output_size,
        bias=True,
        skip_bias_add=False,
        params_dtype=None,
        quant_config=None,
        prefix="",
    ):
        super().__init__(input_size, output_size, skip_bias_add, params_dtype, quant_config, prefix)
        self.input_size_per_partition = divide(input_size, self.tp_size)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=self.input_size_per_partition,
            output_partition_sizes=[output_size],
            input_size=input_size,
            output_size=output_size,
            params_dtype=self.params_dtype,
            weight_loader=self.weight_loader,
        )
        self.finish(bias, output_size)

    def weight_loader(self, param, loaded_weight):
        dim = getattr(param, "input_dim", None)
        if dim is not None:
            width = param.data.shape[dim]
            loaded_weight = loaded_weight.narrow(dim, self.tp_rank * width, width)
        assert param.data.shape == loaded_weight.shape
        param.data.copy_(loaded_weight)

    def forward(self, x):
        """This rank's term of the sum."""
        return self.quant_method.apply(self, x, None if self.tp_rank or self.skip_bias_add else self.bias)


@dataclass
class WeightsMapper:
    orig_to_new_substr: dict = field(default_factory=dict)
    orig_to_new_prefix: dict = field(default_factory=dict)
    orig_to_new_suffix: dict = field(default_factory=dict)

    def new_name(self, key):
        for old, new in self.orig_to_new_substr.items():
            if old in key:
                if new is None:
                    return None
                key = key.replace(old, new, 1)
        for old, new in self.orig_to_new_prefix.items():
            if key.startswith(old):
                if new is None:
                    return None
                key = new + key.removeprefix(old)
        for old, new in self.orig_to_new_suffix.items():
            if key.endswith(old):
                if new is None:
                    return None
                key = key.removesuffix(old) + new
        return key

    def apply_list(self, values):
        return [new for value in values if (new := self.new_name(value)) is not None]


STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def load_by_dictionary(model, weights):
    """The older way: every name is looked up among the parameters; biases that nobody asked for are passed over."""
    params = dict(model.named_parameters())
    for name, tensor in weights:
        for old, (new, shard) in STACKED.items():
            if old not in name:
                continue
            name = name.replace(old, new)
            if name.endswith(".bias") and name not in params:
                break
            params[name].weight_loader(params[name], tensor, shard)
            break
        else:
            if name.endswith(".bias") and name not in params:
                continue
            params[name].weight_loader(params[name], tensor)


def load_by_walk(model, weights):
    """The newer way: names are mapped first, then handed down the modules, which may load themselves."""
    for name, tensor in weights:
        for old, (new, shard) in STACKED.items():
            if old in name:
                name = name.replace(old, new, 1)
                tensor.shard_id = shard
        walk(model, name, tensor)


def walk(module, name, tensor):
    head, _, rest = name.partition(".")
    if head in dict(module.named_children()):
        child = module.get_submodule(head)
        if hasattr(child, "load_weights"):
            assert list(child.load_weights([(rest, tensor)])) in ([rest], [])
        else:
            walk(child, rest, tensor)
    elif head in (params := dict(module.named_parameters(recurse=False))):
        assert not rest, "nested weight into a single parameter"
        params[head].weight_loader(params[head], tensor)
    elif not name.endswith(".bias") and name != "bias":
        raise ValueError(f"There is no module or parameter named {name!r}")


LOADERS = {"dictionary": load_by_dictionary, "walk": load_by_walk}


def finish(model):
    """What vLLM does when all weights are there."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(module)
    return model


METHODS: list[str] = ["awq", "fp8"]
CUSTOM: dict[str, type] = {}


def register_quantization_config(name):
    def register(cls):
        if name in METHODS:
            raise ValueError(f"The quantization method `{name}` already exists.")
        assert issubclass(cls, QuantizationConfig)
        METHODS.append(name)
        CUSTOM[name] = cls
        return cls

    return register


@contextlib.contextmanager
def installed():
    """`import vllm` finds this file's classes; nothing is left behind."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "vllm"}
    config = "corank.serve.vllm.config"
    layers = "vllm.model_executor.layers"
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": dict(
            LinearBase=LinearBase, LinearMethodBase=LinearMethodBase, UnquantizedLinearMethod=UnquantizedLinearMethod
        ),
        f"{layers}.quantization": dict(
            QUANTIZATION_METHODS=METHODS, register_quantization_config=register_quantization_config
        ),
        f"{layers}.quantization.base_config": dict(QuantizationConfig=QuantizationConfig),
    }
    for name in [*kept, config]:
        sys.modules.pop(name, None)
    for name, content in contents.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content, __path__=[])
    try:
        yield
    finally:
        for name in [*contents, config]:
            sys.modules.pop(name, None)
        sys.modules.update(kept)
        METHODS[:] = ["awq", "fp8"]
        CUSTOM.clear()
