"""Whole checkpoints: what `corank.compress` writes, loaded through the stand-in for vLLM on one and several GPUs.

Every layer's output is compared with that of the same layers in the model that transformers loads.
"""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers as tf
import vllm_stand_in as stand_in
from safetensors import safe_open
from torch import nn

import corank
from corank import checkpoint
from corank.factors import CUR, ColumnPivoted, Dense, LowRank, RowPivoted, SharedBasis, replace, weight_of
from corank.model import Text
from tiny import text, tokenizer

SIZES = dict(
    vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)  # fmt: skip
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES)),  # biases on q, k and v
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, pad_token_id=0)),  # fused on disk
}


def tiny(name, seed=0):
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)
            elif "bias" in key:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def config_class():
    from corank.serve.vllm_plugin import register

    with stand_in.installed():
        register()
        yield stand_in.CUSTOM["corank"]


def served(folder, config_class, rank, size, loader):
    """The linear layers that vLLM would build for the directory, loaded, on one rank."""
    settings = json.loads((folder / "config.json").read_text())
    config = config_class.from_config(settings["quantization_config"])
    fused = settings["model_type"] == "phi3"
    config.packed_modules_mapping = {name: [name] for name in stand_in.PACKED} if fused else stand_in.PACKED
    width, middle, heads = settings["hidden_size"], settings["intermediate_size"], settings["num_attention_heads"]
    head, kv, model = width // heads, settings["num_key_value_heads"], nn.Module()
    dtype = getattr(torch, settings["dtype"])
    model.model = nn.Module()
    model.model.layers = nn.ModuleList()
    with stand_in.tensor_parallel(rank, size):
        for index in range(settings["num_hidden_layers"]):
            block, prefix = nn.Module(), f"model.layers.{index}"
            block.self_attn, block.mlp = nn.Module(), nn.Module()
            common = dict(bias=False, params_dtype=dtype, quant_config=config)
            block.self_attn.qkv_proj = stand_in.QKVParallelLinear(
                width, head, heads, kv, **common | dict(bias=settings["model_type"] == "qwen2"),
                prefix=f"{prefix}.self_attn.qkv_proj",
            )  # fmt: skip
            block.self_attn.o_proj = stand_in.RowParallelLinear(
                heads * head, width, prefix=f"{prefix}.self_attn.o_proj", **common
            )
            block.mlp.gate_up_proj = stand_in.MergedColumnParallelLinear(
                width, [middle] * 2, prefix=f"{prefix}.mlp.gate_up_proj", **common
            )
            block.mlp.down_proj = stand_in.RowParallelLinear(middle, width, prefix=f"{prefix}.mlp.down_proj", **common)
            model.model.layers.append(block)
    stand_in.LOADERS[loader](model, linear_tensors(folder))
    return stand_in.finish(model)


def linear_tensors(folder):
    """Every tensor of the directory but embeddings, norms and head, which are no business of the plug-in."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                if "_proj." in name:
                    yield name, reader.get_tensor(name)


def of_transformers(block, name, x):
    """The same outputs from the modules of the transformers model, one tensor per logical matrix."""
    if name == "qkv_proj":
        if hasattr(block.self_attn, "qkv_proj"):
            return block.self_attn.qkv_proj(x).split([24, 12, 12], dim=-1)
        return [getattr(block.self_attn, f"{n}_proj")(x) for n in "qkv"]
    if name == "gate_up_proj":
        fused = getattr(block.mlp, "gate_up_proj", None)
        return fused(x).chunk(2, dim=-1) if fused else [block.mlp.gate_proj(x), block.mlp.up_proj(x)]
    return [(block.self_attn.o_proj if name == "o_proj" else block.mlp.down_proj)(x)]


def check(folder, config_class, size, loader, tolerance=2e-6):
    """Every layer, all ranks together, against transformers; returns the number of factorized layers seen."""
    model, _ = checkpoint.load(folder, tokenizer=False)
    ranks = [served(folder, config_class, rank, size, loader) for rank in range(size)]
    generator = torch.Generator().manual_seed(5)
    seen = 0
    for index, block in enumerate(model.model.layers):
        for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            place = "self_attn" if name in ("qkv_proj", "o_proj") else "mlp"
            layers = [getattr(getattr(rank.model.layers[index], place), name) for rank in ranks]
            x = torch.randn(2, 7, layers[0].input_size, generator=generator).to(model.dtype)
            with torch.no_grad():
                wanted = of_transformers(block, name, x)
                if isinstance(layers[0], stand_in.RowParallelLinear):
                    parts = x.chunk(size, dim=-1)
                    actual = [sum(layer(part) for layer, part in zip(layers, parts, strict=True))]
                else:
                    outputs = [layer(x).split(layer.output_partition_sizes, dim=-1) for layer in layers]
                    copies = [1, *[max(1, size // SIZES["num_key_value_heads"])] * 2] if name == "qkv_proj" else [1, 1]
                    logical = zip(zip(*outputs, strict=True), copies, strict=True)
                    actual = [torch.cat(pieces[::copy], dim=-1) for pieces, copy in logical]
            for got, want in zip(actual, wanted, strict=True):
                assert got.dtype == want.dtype and got.shape == want.shape
                assert (got - want).double().norm() <= tolerance * want.double().norm(), (index, name)
            seen += type(layers[0].quant_method) is not stand_in.UnquantizedLinearMethod
    return seen


RUNS = {
    "svd-llm": dict(method="svd-llm", keep=0.7),
    "packed": dict(method="svd-llm", keep=0.7, pack=True),
    "uneven ranks": dict(method="svd", keep=0.6, allocate="lagrange", floor=0.0),
    "some dense": dict(method="svd", keep=0.7, targets=["q", "v", "up", "o"]),
    "rows": dict(method="row-id", keep=0.7),
    "columns": dict(method="col-id", keep=0.7),
    "curing": dict(method="curing", layers=1, rank=4),
    "biases of its own": dict(method="svd-llm", keep=0.7, affine=True),
    "packed, with biases": dict(method="svd-llm", keep=0.7, affine=True, pack=True),
}


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    made = {}

    def make(name, run):
        if (name, run) not in made:
            folder = tmp_path_factory.mktemp("models")
            tiny(name).save_pretrained(folder / "dense")
            tokenizer().save_pretrained(folder / "dense")
            small = dict(data=Text(text(), "text"), samples=8, length=16)
            corank.compress(folder / "dense", out=folder / "small", **small, **RUNS[run])
            made[name, run] = folder / "small"
        return made[name, run]

    return make


CASES = [
    *(("llama", run) for run in RUNS),
    *(("qwen2", run) for run in ("svd-llm", "packed", "some dense", "columns")),
    *(("phi3", run) for run in ("svd-llm", "packed", "columns")),
]


@pytest.mark.parametrize("size,loader", [(1, "walk"), (2, "dictionary"), (4, "walk")])
@pytest.mark.parametrize("name,run", CASES)
def test_what_compress_writes(name, run, size, loader, compressed, config_class):
    folder = compressed(name, run)
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    kinds = {"packed": "row_pivoted", "rows": "row_pivoted", "columns": "column_pivoted", "curing": "cur"}
    assert kinds.get(run.removesuffix(", with biases"), "low_rank") in {spec["kind"] for spec in modules.values()}
    if run == "uneven ranks":
        fused = [[f"model.layers.{i}.mlp.{n}_proj" for n in ("gate", "up")] for i in range(3)]
        fused += [[f"model.layers.{i}.self_attn.{n}_proj" for n in "qkv"] for i in range(3)]
        ranks = [{modules.get(name, {}).get("rank") for name in names} for names in fused]
        assert any(len(of_layer) > 1 for of_layer in ranks), ranks
    if "biases" in run:  # where the architecture has none
        assert modules["model.layers.1.mlp.down_proj"]["bias"]
    assert check(folder, config_class, size, loader) >= (1 if run == "curing" else 6)


def mixed(model):
    """Every kind in one model, a basis shared by layers, rank 0, and dense matrices in between."""
    torch.manual_seed(1)
    kinds, ranks = itertools.cycle(["low_rank", "cur", None, "row", "column", "dense"]), itertools.cycle([5, 0, 3, 7])
    sites = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    weight = {n: weight_of(model.get_submodule(n)).detach() for n in sites}
    group = ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.2.mlp.gate_proj"]
    group = [n for n in group if n in sites]
    done = {}
    if group:
        owned = {n: torch.randn(weight[n].shape[0], 6).to(model.dtype) for n in group}
        shared = SharedBasis(torch.randn(6, 24).to(model.dtype), owned)
        done = shared.modules({n: model.get_submodule(n).bias for n in group})
    for n in sites:
        (m, width), kind, k = weight[n].shape, next(kinds), next(ranks)
        new = lambda *shape: torch.randn(*shape).to(model.dtype)  # noqa: E731
        made = {
            "low_rank": LowRank(new(m, k), new(k, width)),
            "cur": CUR(new(m, k), new(k, k), new(k, width)),
            "row": RowPivoted(torch.randperm(m)[:k].int(), new(k, width), new(m - k, k)),
            "column": ColumnPivoted(torch.randperm(width)[:k].int(), new(m, k), new(k, width - k)),
            "dense": Dense(weight[n]),
        }.get(kind)
        if n in done:
            replace(model, n, done[n])
        elif made is not None:
            bias = model.get_submodule(n).bias
            replace(model, n, made.module(new(m) if kind in ("dense", "row") and bias is None else bias))
    return model


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("name", MODELS)
def test_every_kind_in_one_checkpoint(name, dtype, tolerance, tmp_path, config_class):
    model = mixed(tiny(name).to(dtype))
    kinds = {spec["kind"] for spec in checkpoint.collect(model).values()}
    assert kinds >= {"low_rank", "cur", "row_pivoted", "column_pivoted"} and ("shared" in kinds) == (name != "phi3")
    checkpoint.save(
        model, None, tmp_path / "out", max_shard_size="20KB"
    )  # the owner and its followers in several files
    for size, loader in ((1, "dictionary"), (2, "walk"), (4, "dictionary")):
        assert check(tmp_path / "out", config_class, size, loader, tolerance) >= 6


def test_a_dense_checkpoint_has_nothing_for_the_plugin(tmp_path, config_class):
    model = tiny("llama")
    checkpoint.attach(model, {})
    model.save_pretrained(tmp_path / "out")
    assert check(tmp_path / "out", config_class, 2, "dictionary") == 0
