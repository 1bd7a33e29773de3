"""Layers of a stand-in for vLLM: whatever the kinds, ranks and number of GPUs, the outputs are those of the dense matrix.

All numbers are small integers, so that every product is exact in every dtype and the comparison is to the last bit.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import vllm_stand_in as stand_in
from torch import nn

from corank.errors import CorankError
from corank.factors import CUR, ColumnPivoted, Dense, Factors, LowRank, RowPivoted, SharedLowRank

HEADS, KV, HEAD, IN = 4, 2, 3, 12
QKV = ["q", "k", "v"]
WIDTH = {"q": HEADS * HEAD, "k": KV * HEAD, "v": KV * HEAD}
PREFIX = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def config_class():
    from corank.serve.vllm_plugin import register

    with stand_in.installed():
        register()
        yield stand_in.CUSTOM["corank"]


def whole(*shape):
    """Integers from -1 to 1."""
    return torch.randint(-1, 2, shape).double()


def factors(kind: str, m: int, n: int, k: int) -> Factors:
    if kind == "dense":
        return Dense(whole(m, n))
    if kind == "low_rank":
        return LowRank(whole(m, k), whole(k, n))
    if kind == "cur":
        return CUR(whole(m, k), whole(k, k), whole(k, n))
    if kind == "row_pivoted":
        return RowPivoted(torch.randperm(m)[:k].int(), whole(k, n), whole(m - k, k))
    return ColumnPivoted(torch.randperm(n)[:k].int(), whole(m, k), whole(k, n - k))


class Stored:
    """A checkpoint: tensors by name, the section of config.json, and the dense matrices they stand for."""

    def __init__(self, dtype=torch.float32):
        self.tensors, self.modules, self.dense, self.bias = {}, {}, {}, {}
        self.dtype = dtype

    def add(self, name, parts: Factors | torch.Tensor, bias=None):
        """Factors go through the modules that write them; a plain matrix is one that nobody compressed."""
        self.dense[name] = parts if isinstance(parts, torch.Tensor) else parts.dense()
        self.bias[name] = torch.zeros(self.dense[name].shape[0]).double() if bias is None else bias
        if isinstance(parts, torch.Tensor):
            state = {"weight": parts} | ({} if bias is None else {"bias": bias})
        else:
            module = parts.module(bias)
            state = module.state_dict()
            spec = {**parts.spec(), "bias": bias is not None}
            self.modules[name] = spec
        for leaf, tensor in state.items():
            stored = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            self.tensors[f"{name}.{leaf}"] = stored.contiguous()
        return self

    def config(self, config_class):
        config = config_class.from_config({"quant_method": "corank", "format_version": 1, "modules": self.modules})
        config.packed_modules_mapping = stand_in.PACKED
        return config

    def load(self, model, loader):
        stand_in.LOADERS[loader](model, [(name, tensor.clone()) for name, tensor in self.tensors.items()])
        return stand_in.finish(model)


def tree(**layers):
    """A module whose dotted names are the prefixes of the layers in it."""
    root = nn.Module()
    for layer in layers.values():
        place = root
        *parents, leaf = layer.prefix.split(".")
        for parent in parents:
            if not hasattr(place, parent):
                place.add_module(parent, nn.Module())
            place = getattr(place, parent)
        place.add_module(leaf, layer)
    return root


def build(stored, config_class, cls, *args, rank=0, size=1, loader="dictionary", name="qkv_proj", **kwargs):
    config = stored.config(config_class)
    kwargs = {"bias": False, "params_dtype": stored.dtype, **kwargs}
    with stand_in.tensor_parallel(rank, size):
        layer = cls(*args, quant_config=config, prefix=f"{PREFIX}.{name}", **kwargs)
    stored.load(tree(layer=layer), loader)
    return layer


def expected(stored, names, x):
    """[..., sum of outputs] per matrix, in float64."""
    return [x.double() @ stored.dense[name].T + stored.bias[name] for name in names]


def exactly(actual, wanted):
    assert actual.isfinite().all()
    assert torch.equal(actual.double(), wanted)


def check_qkv(stored, config_class, size, loader, **kwargs):
    names = [f"{PREFIX}.{n}_proj" for n in QKV]
    x = whole(5, IN)
    outputs = []
    for rank in range(size):
        layer = build(
            stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV, rank=rank, size=size,
            loader=loader, **kwargs
        )  # fmt: skip
        y = layer(x.to(stored.dtype))
        assert y.dtype == stored.dtype
        outputs.append(y.split(layer.output_partition_sizes, dim=-1))
    replicas = max(1, size // KV)
    for index, wanted in enumerate(expected(stored, names, x)):
        pieces = [output[index] for output in outputs]
        if index:
            for first, copy in itertools.product(range(0, size, replicas), range(1, replicas)):
                assert torch.equal(pieces[first], pieces[first + copy])
            pieces = pieces[::replicas]
        exactly(torch.cat(pieces, dim=-1), wanted)
    return layer


MIXES = {
    "ranks 5, 0 and dense": [("low_rank", 5), ("low_rank", 0), None],
    "dense beside factorized": [None, ("low_rank", 2), None],
    "three factors and pivots": [("cur", 3), ("row_pivoted", 4), ("column_pivoted", 3)],
    "rows": [("row_pivoted", 5), ("row_pivoted", 0), ("row_pivoted", 6)],
    "columns": [("column_pivoted", 3), ("column_pivoted", 0), ("column_pivoted", 6)],
    "full rank": [("low_rank", 12), ("cur", 2), ("row_pivoted", 6)],
    "dense by its spec": [("dense", 12), ("low_rank", 1), ("column_pivoted", 2)],
    "all rank 0": [("low_rank", 0), ("cur", 0), ("column_pivoted", 0)],
}
BIASES = ["none", "stock", "added", "some added"]


def qkv(mix, biases, dtype=torch.float32):
    stored = Stored(dtype)
    for n, entry in zip(QKV, MIXES[mix], strict=True):
        m = WIDTH[n]
        bias = whole(m) if biases in ("stock", "added") or (biases == "some added" and entry and n != "k") else None
        if entry is None:  # a dense matrix is in config.json if it was given a bias
            matrix = factors("dense", m, IN, m)
            stored.add(f"{PREFIX}.{n}_proj", matrix if biases == "added" else matrix.dense(), bias)
        else:
            stored.add(f"{PREFIX}.{n}_proj", factors(entry[0], m, IN, entry[1]), bias)
    return stored


@pytest.mark.parametrize("loader", stand_in.LOADERS)
@pytest.mark.parametrize("size", [1, 2, 4])  # with four, two ranks share each key and value head
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("mix", MIXES)
def test_query_key_value(mix, biases, size, loader, config_class):
    torch.manual_seed(len(mix) + size)
    check_qkv(qkv(mix, biases), config_class, size, loader, bias=biases == "stock")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mix", MIXES)
def test_other_dtypes(mix, dtype, config_class):
    torch.manual_seed(len(mix))
    check_qkv(qkv(mix, "stock", dtype), config_class, 2, "walk", bias=True)


@pytest.mark.parametrize("mix", MIXES)
def test_a_checkpoint_in_another_dtype(mix, config_class):
    """Served in the dtype that vLLM was asked for, whatever the files hold."""
    torch.manual_seed(3)
    stored = qkv(mix, "added")
    layer = build(stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV, params_dtype=torch.bfloat16)
    assert {t.dtype for t in layer.parameters() if t.is_floating_point()} == {torch.bfloat16}
    x = whole(3, IN)
    wanted = torch.cat(expected(stored, [f"{PREFIX}.{n}_proj" for n in QKV], x), dim=-1)
    exactly(layer(x.bfloat16()), wanted)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_query_key_and_value_share_a_basis(size, config_class):
    torch.manual_seed(size)
    stored, A = Stored(), whole(5, IN)
    stored.add(f"{PREFIX}.q_proj", LowRank(whole(12, 5), A))
    for n in "kv":
        stored.add(f"{PREFIX}.{n}_proj", SharedLowRank(whole(6, 5), A, f"{PREFIX}.q_proj"))
    layer = check_qkv(stored, config_class, size, "dictionary")
    assert layer.down.weight.shape == (5, IN)  # stored once for the three, and applied once
    assert products(layer, IN) == 1 + 3


@pytest.mark.parametrize("size", [1, 2])
def test_layers_share_a_basis(size, config_class):
    """The follower may come before the owner, and both may be cut."""
    torch.manual_seed(size)
    names = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    stored, A = Stored(), whole(4, IN)
    stored.add(names[0], SharedLowRank(whole(8, 4), A, names[1]))
    stored.add(names[1], LowRank(whole(8, 4), A))
    x, totals = whole(3, IN), [0, 0]
    for rank in range(size):
        config = stored.config(config_class)
        with stand_in.tensor_parallel(rank, size):
            layers = [stand_in.RowParallelLinear(IN, 8, bias=False, quant_config=config, prefix=name) for name in names]
        stored.load(tree(a=layers[0], b=layers[1]), "dictionary")
        part = x.chunk(size, -1)[rank].float()
        totals = [total + layer(part) for total, layer in zip(totals, layers, strict=True)]
    for total, wanted in zip(totals, expected(stored, names, x), strict=True):
        exactly(total, wanted)


def test_a_basis_on_another_pipeline_stage(config_class):
    stored = Stored().add(f"{PREFIX}.o_proj", SharedLowRank(whole(8, 4), whole(4, IN), "model.layers.9.o_proj"))
    with pytest.raises(CorankError, match="model.layers.9.o_proj, which is not in this process"):
        build(stored, config_class, stand_in.RowParallelLinear, IN, 8, name="o_proj")


def test_a_basis_of_another_size(config_class):
    names = [f"{PREFIX}.{n}_proj" for n in QKV]
    stored = Stored().add(names[0], LowRank(whole(12, 4), whole(4, IN)))
    stored.add(names[1], SharedLowRank(whole(6, 5), whole(5, IN), names[0])).add(names[2], whole(6, IN))
    with pytest.raises(CorankError, match="holds no basis"):
        build(stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV)


@pytest.mark.parametrize("loader", stand_in.LOADERS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "gate,up",
    [(("low_rank", 5), ("low_rank", 2)), (("row_pivoted", 6), ("cur", 3)), (("column_pivoted", 4), None)],
)
def test_gate_and_up_with_different_ranks(gate, up, size, loader, config_class):
    torch.manual_seed(size)
    names, stored = [f"{PREFIX}.{n}_proj" for n in ("gate", "up")], Stored()
    for name, entry in zip(names, (gate, up), strict=True):
        stored.add(name, whole(16, IN) if entry is None else factors(entry[0], 16, IN, entry[1]))
    x, outputs = whole(2, 3, IN), []  # any number of leading dimensions
    for rank in range(size):
        layer = build(
            stored, config_class, stand_in.MergedColumnParallelLinear, IN, [16, 16], rank=rank, size=size,
            loader=loader, name="gate_up_proj",
        )  # fmt: skip
        outputs.append(layer(x.float()).chunk(2, dim=-1))
    for index, wanted in enumerate(expected(stored, names, x)):
        exactly(torch.cat([output[index] for output in outputs], dim=-1), wanted)


KINDS = ["dense", "low_rank", "cur", "row_pivoted", "column_pivoted"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biases", ["none", "stock", "added"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind,k", [(kind, k) for kind in KINDS for k in (0, 3, 4 if kind == "cur" else 10)])
def test_row_parallel(kind, k, size, biases, dtype, config_class):
    """The terms of the ranks add up to the product, the bias counted once."""
    torch.manual_seed(k + size)
    name = f"{PREFIX}.o_proj"
    stored = Stored(dtype).add(name, factors(kind, 10, IN, k), None if biases == "none" else whole(10))
    x = whole(4, IN)
    total = torch.zeros(4, 10, dtype=dtype)
    for rank in range(size):
        layer = build(
            stored, config_class, stand_in.RowParallelLinear, IN, 10, rank=rank, size=size, name="o_proj",
            bias=biases == "stock", loader="walk" if rank % 2 else "dictionary",
        )  # fmt: skip
        total += layer(x.chunk(size, dim=-1)[rank].to(dtype))
    exactly(total, expected(stored, [name], x)[0])


@pytest.mark.parametrize("biases", ["none", "stock", "added"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cls", [stand_in.ColumnParallelLinear, stand_in.ReplicatedLinear])
def test_column_parallel_and_replicated(cls, kind, size, biases, config_class):
    torch.manual_seed(size)
    name = f"{PREFIX}.fc1"
    stored = Stored().add(name, factors(kind, 10, IN, 4), None if biases == "none" else whole(10))
    x = whole(4, IN)
    wanted = expected(stored, [name], x)[0]
    outputs = [
        build(stored, config_class, cls, IN, 10, rank=rank, size=size, name="fc1", bias=biases == "stock")(x.float())
        for rank in range(size)
    ]
    if cls is stand_in.ReplicatedLinear:
        for output in outputs:
            exactly(output, wanted)
    else:
        exactly(torch.cat(outputs, dim=-1), wanted)


@pytest.mark.parametrize("loader", stand_in.LOADERS)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("biases", ["none", "stock", "added"])
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_that_are_fused_on_disk(kind, biases, size, loader, config_class):
    """Phi-3 stores query, key and value as one matrix, and so gate and up."""
    torch.manual_seed(size)
    x, stored = whole(3, IN), Stored()
    names = [f"{PREFIX}.qkv_proj", f"{PREFIX}.gate_up_proj"]
    for name, m in zip(names, (24, 32), strict=True):
        stored.add(name, factors(kind, m, IN, 5), None if biases == "none" else whole(m))
    results = []
    for rank in range(size):
        config = stored.config(config_class)
        config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}
        kwargs = dict(bias=biases == "stock", quant_config=config)
        with stand_in.tensor_parallel(rank, size):
            layers = [
                stand_in.QKVParallelLinear(IN, HEAD, HEADS, KV, prefix=names[0], **kwargs),
                stand_in.MergedColumnParallelLinear(IN, [16, 16], prefix=names[1], **kwargs),
            ]
        stored.load(tree(a=layers[0], b=layers[1]), loader)
        results.append([layer(x.float()).split(layer.output_partition_sizes, dim=-1) for layer in layers])
    replicas = max(1, size // KV)
    for index, wanted in enumerate(expected(stored, names, x)):
        logical = zip(*(result[index] for result in results), strict=True)
        whole_again = [
            torch.cat(pieces[:: replicas if index == 0 and i else 1], dim=-1) for i, pieces in enumerate(logical)
        ]
        exactly(torch.cat(whole_again, dim=-1), wanted)


def test_each_rank_holds_its_share_of_the_numbers(config_class):
    """Nothing is padded to the largest rank, and pivots save what they save in the file."""
    torch.manual_seed(0)
    stored = qkv("three factors and pivots", "none")
    held = [
        sum(p.numel() for p in build(
            stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV, rank=rank, size=2
        ).parameters())
        for rank in range(2)
    ]  # fmt: skip
    replicated = 3 * IN + 3 * 3 + 4 * IN + 3 * (IN - 3)  # R and M, pivot rows, rest
    split = 12 * 3 + (6 - 4) * 4 + 6 * 3  # C, rest, columns
    assert sum(held) == 2 * replicated + split


@pytest.mark.parametrize("mix", MIXES)
def test_loading_again_keeps_the_addresses(mix, config_class):
    """Captured graphs hold on to them when weights are replaced by new ones of the same kind."""
    torch.manual_seed(1)
    stored = qkv(mix, "added")
    layer = build(stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV)
    before = {name: p.data_ptr() for name, p in [*layer.named_parameters(), *layer.named_buffers()]}
    for name, tensor in stored.tensors.items():
        if tensor.is_floating_point():
            stored.tensors[name] = -tensor
    stored.load(tree(layer=layer), "dictionary")
    assert before == {name: p.data_ptr() for name, p in [*layer.named_parameters(), *layer.named_buffers()]}
    x = whole(3, IN).float()
    fresh = build(stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV)
    assert torch.equal(layer(x), fresh(x))


@pytest.mark.parametrize("mix", MIXES)
def test_loading_under_a_default_device(mix, config_class):
    """Some versions of vLLM load while the default device is the GPU; what is computed from indices stays where they are."""
    torch.manual_seed(1)
    stored, x = qkv(mix, "added"), whole(3, IN).float()
    config = stored.config(config_class)
    with stand_in.tensor_parallel(1, 2):
        layer = stand_in.QKVParallelLinear(
            IN, HEAD, HEADS, KV, bias=False, quant_config=config, prefix=f"{PREFIX}.qkv_proj"
        )
    with torch.device("meta"):
        stored.load(tree(layer=layer), "dictionary")
    plain = build(stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV, rank=1, size=2)
    assert torch.equal(layer(x), plain(x))


def products(layer, width):
    """Matrix products in the graph of a layer."""
    graphs = []
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    compiled(torch.zeros(2, width))
    torch._dynamo.reset()
    return sum(node.target is torch.nn.functional.linear for node in graphs[0].graph.nodes)


def test_fused_layers_read_their_input_once(config_class):
    """One product for all first factors, one for all dense matrices, one for each second factor that is not empty."""
    for mix, number in (("ranks 5, 0 and dense", 1 + 1 + 1), ("full rank", 1 + 1 + 3), ("all rank 0", 0)):
        layer = build(qkv(mix, "none"), config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV)
        assert products(layer, IN) == number


@pytest.mark.parametrize("mix", MIXES)
def test_one_graph(mix, config_class):
    """No Python in the way of torch.compile or of CUDA graphs."""
    torch.manual_seed(2)
    layer = build(qkv(mix, "stock"), config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV, bias=True)
    x = whole(3, IN).float()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    torch._dynamo.reset()


def test_row_parallel_graph_and_a_basis_elsewhere(config_class):
    names = [f"model.layers.{i}.o_proj" for i in range(3)]
    A = whole(4, IN)
    stored = Stored().add(names[0], LowRank(whole(8, 4), A)).add(names[1], SharedLowRank(whole(8, 4), A, names[0]))
    stored.add(names[2], factors("column_pivoted", 8, IN, 5))
    config = stored.config(config_class)
    with stand_in.tensor_parallel(1, 2):
        layers = [stand_in.RowParallelLinear(IN, 8, bias=False, quant_config=config, prefix=name) for name in names]
    model = stored.load(tree(**dict(zip("abc", layers, strict=True))), "walk")
    x = whole(3, IN // 2).float()
    for layer in layers[1:]:
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    torch._dynamo.reset()
    assert sum(p is layers[0].down.weight for p in model.parameters()) == 1


def transposing(model, weights):
    """How vLLM loads GPT-2, whose own files hold dense matrices as [in, out]."""
    params = dict(model.named_parameters())
    for name, tensor in weights:
        if name.endswith(".weight"):
            tensor = tensor.t()
        params[name].weight_loader(params[name], tensor)


@pytest.mark.parametrize(
    "kind,k", [("low_rank", 4), ("low_rank", IN), ("cur", 5), ("row_pivoted", 6), ("column_pivoted", 6)]
)
def test_an_architecture_that_transposes(kind, k, config_class, monkeypatch):
    """Square factors too are turned back."""
    monkeypatch.setitem(stand_in.LOADERS, "transposing", transposing)
    torch.manual_seed(k)
    name = f"{PREFIX}.c_fc"
    stored = Stored().add(name, factors(kind, IN, IN, k), whole(IN))
    layer = build(
        stored, config_class, stand_in.ColumnParallelLinear, IN, IN, name="c_fc", bias=True, loader="transposing"
    )
    x = whole(3, IN)
    exactly(layer(x.float()), expected(stored, [name], x)[0])


def reordering(model, weights):
    """How vLLM loads GPT-NeoX: rows go from head by head to query, key, value, for what has an output dimension."""
    params = dict(model.named_parameters())
    for name, tensor in weights:
        if getattr(params[name], "output_dim", None) is not None:
            tensor = interleaved(tensor)
        params[name].weight_loader(params[name], tensor)


def interleaved(tensor):
    return tensor.view(HEADS, 3, HEAD, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kind", ["low_rank", "cur", "column_pivoted", "row_pivoted"])
def test_an_architecture_that_reorders(kind, size, config_class, monkeypatch):
    monkeypatch.setitem(stand_in.LOADERS, "reordering", reordering)
    torch.manual_seed(size)
    name, m = f"{PREFIX}.query_key_value", 3 * HEADS * HEAD
    stored = Stored().add(name, factors(kind, m, IN, 4), whole(m))
    make = lambda rank: build(  # noqa: E731
        stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, HEADS, rank=rank, size=size,
        name="query_key_value", loader="reordering", bias=True,
    )  # fmt: skip
    if kind == "row_pivoted":  # its stored rows are not those of the matrix
        with pytest.raises(CorankError, match="pack=false"):
            make(0)
        return
    x = whole(3, IN)
    wanted = x @ interleaved(stored.dense[name]).T + interleaved(stored.bias[name])
    outputs = [make(rank)(x.float()).chunk(3, dim=-1) for rank in range(size)]
    exactly(torch.cat([torch.cat(pieces, dim=-1) for pieces in zip(*outputs, strict=True)], dim=-1), wanted)


def drop(stored, ending):
    stored.tensors = {name: t for name, t in stored.tensors.items() if not name.endswith(ending)}
    return stored


@pytest.mark.parametrize(
    "ending", ["q_proj.up.weight", "k_proj.pivots", "q_proj.up.bias", "v_proj.down.weight", "q_proj.link.weight"]
)
def test_a_tensor_is_missing(ending, config_class):
    stored = drop(qkv("three factors and pivots", "added"), ending)
    part = ending.split(".", 1)[1].removesuffix(".weight").split(".")[-1]
    with pytest.raises(CorankError, match=rf"{ending.split('.')[0]}: .*{part}.*did not arrive"):
        build(stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV)


def test_a_dense_part_is_missing(config_class):
    stored = drop(qkv("ranks 5, 0 and dense", "none"), "v_proj.weight")
    with pytest.raises(CorankError, match="v_proj: weight did not arrive"):
        build(stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV)


def test_weights_and_config_that_do_not_belong_together(config_class):
    def qkv_layer(stored):
        return build(stored, config_class, stand_in.QKVParallelLinear, IN, HEAD, HEADS, KV)

    stored = qkv("ranks 5, 0 and dense", "none")
    stored.modules[f"{PREFIX}.q_proj"]["rank"] = 4
    with pytest.raises(CorankError, match=r"q_proj: \w+ has shape .* in config.json"):
        qkv_layer(stored)
    stored = qkv("ranks 5, 0 and dense", "none")
    stored.tensors[f"{PREFIX}.q_proj.weight"] = whole(12, IN)
    with pytest.raises(CorankError, match="q_proj is stored dense"):
        qkv_layer(stored)
    stored = qkv("three factors and pivots", "none")
    stored.tensors[f"{PREFIX}.v_proj.link.weight"] = whole(3, 3)
    with pytest.raises(CorankError, match="v_proj: the checkpoint has a tensor 'link'"):
        qkv_layer(stored)
    stored = qkv("ranks 5, 0 and dense", "none")
    stored.modules[f"{PREFIX}.q_proj"]["shape"] = [12, IN + 1]
    with pytest.raises(CorankError, match="13 inputs and the model has 12"):
        qkv_layer(stored)
    stored.modules[f"{PREFIX}.q_proj"]["shape"] = [13, IN]
    with pytest.raises(CorankError, match="q_proj: 13 outputs cannot be split"):
        qkv_layer(stored)


def test_layers_that_cannot_be_served(config_class):
    # an architecture that cuts a stored matrix in a way of its own, as seen from the shard ids it sends
    stored = Stored().add(f"{PREFIX}.qkv_proj", factors("low_rank", 24, IN, 3))
    config = stored.config(config_class)
    layer = stand_in.QKVParallelLinear(
        IN, HEAD, HEADS, KV, bias=False, quant_config=config, prefix=f"{PREFIX}.qkv_proj"
    )
    for shard in ("q", (0, 1), 7, "index_q"):
        with pytest.raises(CorankError, match="corank dequantize"):
            layer.up.weight.weight_loader(layer.up.weight, whole(12, 3), shard)
    # two stored matrices for three logical ones
    stored = Stored().add(f"{PREFIX}.qk_proj", factors("low_rank", 18, IN, 3))
    config = stored.config(config_class)
    config.packed_modules_mapping = {"qkv_proj": ["qk_proj", "v_proj"]}
    with pytest.raises(CorankError, match="into 3 and the checkpoint into 2"):
        stand_in.QKVParallelLinear(IN, HEAD, HEADS, KV, quant_config=config, prefix=f"{PREFIX}.qkv_proj")
    # a bias that the model would return instead of adding
    stored = Stored().add(f"{PREFIX}.fc1", factors("low_rank", 10, IN, 3), whole(10))
    with pytest.raises(CorankError, match="affine=false"):
        build(stored, config_class, stand_in.ColumnParallelLinear, IN, 10, name="fc1", skip_bias_add=True)
    # a vLLM that does not say where a layer is
    layer = nn.Module()
    layer.tp_size = 2
    method = stored.config(config_class)
    linear = stand_in.ColumnParallelLinear.__new__(stand_in.ColumnParallelLinear)
    method = method.get_quant_method(linear, f"{PREFIX}.fc1")
    with pytest.raises(CorankError, match="which tensor-parallel rank"):
        method.create_weights(layer, IN, [5], IN, 10, torch.float32)
