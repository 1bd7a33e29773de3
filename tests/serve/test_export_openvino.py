"""OpenVINO: its logits are the compressed model's own, and what it compiles holds the factors and no product of them."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import corank
import corank.serve.onnx as onnx_room
import corank.serve.openvino as room
from checkpoint.checkpoint_models import factors_of, make, share
from corank.cli import main
from corank.errors import CorankError
from corank.factors import replace, weight_of
from corank.serve.export import export, silent
from tiny import tokenizer

IDS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0  # padded on the right
KINDS = {"o": ("column_pivoted", 5), "gate": ("cur", 3), "up": ("low_rank", 0), "down": ("row_pivoted", 24)}


def one_layer(kinds=KINDS, shared=True):
    """A Llama of one layer: a shared basis, the other kinds, a matrix of rank 0, a pivoted one of full rank."""
    torch.manual_seed(0)
    model = make("llama")
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    if shared:
        share(model, [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"])
    for name, (kind, rank) in kinds.items():
        place = f"model.layers.0.{'self_attn' if name == 'o' else 'mlp'}.{name}_proj"
        replace(model, place, factors_of(kind, weight_of(model.get_submodule(place)), rank).module())
    return model


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(the model, what the command said, where the export is)."""
    place = tmp_path_factory.mktemp("openvino")
    model = one_layer()
    corank.checkpoint.save(model, tokenizer(), place / "small")
    out = place / "graph"
    assert main(["export", str(place / "small"), "--format", "openvino", "--out", str(out), "--quiet", "--json"]) == 0
    return model, json.loads((out / "export.json").read_text()), out


def test_openvino_gives_the_logits_of_the_compressed_model(done):
    model, _, out = done
    compiled = (
        room.require_openvino().Core().compile_model(out / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    )
    for rows, length in ((3, 11), (1, 11), (2, 4), (1, 1)):  # both axes are free
        ids, mask = IDS[:rows, :length], MASK[:rows, :length]
        found = compiled({"input_ids": ids.numpy(), "attention_mask": mask.numpy()})["logits"]
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask).logits
        real = mask.bool()
        assert found.shape == (rows, length, 64)
        torch.testing.assert_close(torch.from_numpy(found)[real], wanted[real], rtol=0, atol=1e-4)


def test_the_compiled_graph_stores_the_factors_and_no_product_of_them(done):
    """Counted here independently of the export: what the runtime shows of the graph that it runs."""
    model, said, out = done
    core = room.require_openvino().Core()
    compiled = core.compile_model(core.read_model(out / "model.xml"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shapes = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        if op.get_rt_info()["layerType"].astype(str) == "Const":
            shapes.append(tuple(op.output(0).get_shape()))
    stored = sum(math.prod(shape) for shape in shapes)
    parameters = sum(p.numel() for p in model.parameters())
    dense = sum(p.numel() for p in corank.dequantize(one_layer()).parameters())
    assert said["optimized"] == stored and said["densified"] == dense and said["copied"] == 0
    # pivots and constants of the graph come on top of the parameters
    assert (
        parameters <= min(stored, said["initializers"]) and max(stored, said["initializers"]) < parameters + 128 < dense
    )
    kept = Counter(tuple(sorted(shape)) for shape in shapes)
    assert kept[24, 37] == 1  # down has full rank and is as large as dense; gate and up are not there
    assert 0 <= said["difference"] <= 1e-4 < said["magnitude"]


def test_beside_the_graph_lie_what_lies_beside_an_onnx_graph(done):
    _, said, out = done
    names = {"model.xml", "model.bin", "config.json", "tokenizer.json", "export.json"}
    assert names <= {p.name for p in out.iterdir()} and not list(out.glob("*.onnx*")) and not list(out.glob("tmp*"))
    assert said["format"] == "openvino" and said["files"]["model.bin"] == (out / "model.bin").stat().st_size
    assert said["files"]["model.bin"] >= 4 * sum(p.numel() for p in done[0].parameters())  # 32 bits, not 16


def by_hand(folded):
    """An ONNX graph that writes a pair of factors as x A B, or as x (A B), which is a product of two constants."""
    rng = np.random.default_rng(0)
    sizes = {"table": (64, 24), "A": (24, 5), "B": (5, 37)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype("float32"), name) for name, s in sizes.items()]
    chain = [("A", "B", "W"), ("x", "W", "logits")] if folded else [("x", "A", "p"), ("p", "B", "logits")]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x"])]
    nodes += [helper.make_node("MatMul", [left, right], [out]) for left, right, out in chain]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 37])
    graph = helper.make_graph(nodes, "pair", [ids], [out], weights)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made)
    return made


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_product_of_factors_in_the_graph_is_folded_by_the_runtime_and_refused(format, folded, tmp_path, monkeypatch):
    """The graph as written stores the factors alone; only the one that is run shows what became of them."""
    here = room if format == "openvino" else onnx_room
    monkeypatch.setattr(here, "program", lambda model: None)
    monkeypatch.setattr(here, "to_onnx", lambda exported, file, name: onnx.save(by_hand(folded), file))
    model = one_layer({"gate": ("low_rank", 5), "up": ("low_rank", 5), "down": ("low_rank", 5)}, shared=False)
    write = here.write_openvino if format == "openvino" else here.write_onnx
    wanted = (
        "optimized graph stores 1|compiled graph stores 1" if folded else "in (OpenVINO|ONNX Runtime) (fails|gives)"
    )
    with pytest.raises(CorankError, match=wanted):
        write(model, tmp_path, 1e-4, silent)
    if format == "openvino":
        written = room.graph_shapes(tmp_path / "model.xml")
        assert sum(math.prod(s) * n for s, n in written.items()) == 64 * 24 + 5 * 61 + written[()]
        (tmp_path / "model.onnx").unlink(missing_ok=True)
        stored = room.compiled_shapes(room.compile_graph(tmp_path / "model.xml"))
        assert stored[24, 37] + stored[37, 24] == folded


def test_a_runtime_that_hides_its_constants_is_not_believed(tmp_path):
    onnx.save(by_hand(False), tmp_path / "model.onnx")
    compiled = room.compile_graph(tmp_path / "model.onnx")

    class Blind:
        def get_runtime_model(self):
            return self

        def get_ops(self):
            ops = compiled.get_runtime_model().get_ops()
            return [op for op in ops if op.get_rt_info()["layerType"].astype(str) != "Const"]

    with pytest.raises(CorankError, match="does not show the constants"):
        room.compiled_shapes(Blind())


def test_empty_factors_become_biases_and_full_ones_dense():
    model = one_layer()
    with torch.no_grad():
        wanted = model(input_ids=IDS, attention_mask=MASK).logits
        plain = room.without_empty_factors(model)
        torch.testing.assert_close(plain(input_ids=IDS, attention_mask=MASK).logits, wanted, rtol=1e-5, atol=1e-5)
    mlp = plain.model.layers[0].mlp
    assert isinstance(mlp.up_proj, room.Nothing) and type(mlp.down_proj) is torch.nn.Linear
    assert plain.lm_head.weight is model.lm_head.weight and model.model.layers[0].mlp.up_proj.rank == 0
    full = one_layer({"down": ("low_rank", 3)}, shared=False)
    assert room.without_empty_factors(full) is full
    bias = torch.nn.Parameter(torch.randn(5))
    x = torch.randn(2, 3, 4)
    assert torch.equal(room.Nothing(5, bias)(x), bias.expand(2, 3, 5))


def test_what_openvino_cannot_read_is_one_sentence(tmp_path, monkeypatch):
    made = by_hand(False)
    made.graph.node[1].op_type = "SeluX"
    monkeypatch.setattr(room, "program", lambda model: None)
    monkeypatch.setattr(room, "to_onnx", lambda exported, file, name: onnx.save(made, file))
    with pytest.raises(CorankError, match="OpenVINO cannot read the graph of LlamaForCausalLM: .*SeluX") as error:
        room.write_openvino(one_layer({}, shared=False), tmp_path, 1e-4, silent)
    assert "\n" not in str(error.value)


def test_missing_packages_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "NEEDED", ("onnx", "no_such_package"))
    corank.checkpoint.save(one_layer({}, shared=False), tokenizer(), tmp_path / "model")
    with pytest.raises(CorankError, match=r"no_such_package.*corank\[export\]"):
        export(tmp_path / "model", "openvino", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_importing_openvino_here_reports_nothing():
    room.require_openvino()
    assert sys.modules["openvino_telemetry"] is None
