"""Exports: complete and checked or absent; factors stay factors; the logits are the compressed model's own."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import corank
import corank.serve.export as exporting
from checkpoint.checkpoint_models import compress, make, share
from corank import CorankError
from corank.cli import main
from corank.serve.export import compare, export
from corank.serve.onnx import refuse_densified, second_copies, stored_shapes
from tiny import tokenizer

IDS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0  # padded on the right


def of_every_kind():
    """A Llama with a shared basis, every other kind, rank 0, full rank, and dense sites."""
    model = make("llama")
    share(model, [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"])
    return compress(model)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(directory, model)."""
    model = of_every_kind()
    folder = tmp_path_factory.mktemp("models") / "small"
    corank.checkpoint.save(model, tokenizer(), folder)
    return folder, model


@pytest.fixture(scope="module")
def graph(small, tmp_path_factory):
    """(the ONNX export, where it is)."""
    out = tmp_path_factory.mktemp("onnx") / "graph"
    return export(small[0], "onnx", out), out


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]


def test_onnx_runtime_gives_the_logits_of_the_compressed_model(small, graph):
    session = onnxruntime.InferenceSession(str(graph[1] / "model.onnx"), providers=["CPUExecutionProvider"])
    for rows, length in ((3, 11), (1, 11), (2, 4), (1, 1)):  # both axes are free
        ids, mask = IDS[:rows, :length], MASK[:rows, :length]
        (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            wanted = small[1](input_ids=ids, attention_mask=mask).logits
        real = mask.bool()
        assert found.shape == (rows, length, 64)
        torch.testing.assert_close(torch.from_numpy(found)[real], wanted[real], rtol=0, atol=1e-4)
    assert [d.dim_param for d in onnx.load(graph[1] / "model.onnx").graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        "sequence",
    ]


def test_the_graph_stores_the_factors_and_no_product_of_them(small, graph, tmp_path):
    """Counted here independently of the export: in the file, and in what ONNX Runtime makes of it."""
    done, folder = graph
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    stored = {}
    for name, file in (("initializers", folder / "model.onnx"), ("optimized", tmp_path / "optimized.onnx")):
        model = onnx.load(file)
        assert not model.functions and not any(a.HasField("g") for n in model.graph.node for a in n.attribute)
        shapes = [tuple(t.dims) for t in model.graph.initializer]
        shapes += [tuple(a.t.dims) for n in model.graph.node for a in n.attribute if a.HasField("t")]
        stored[name] = sum(int(np.prod(shape)) for shape in shapes)
        assert stored_shapes(file) == Counter(shapes)
    assert (done.initializers, done.optimized) == (stored["initializers"], stored["optimized"])
    parameters = sum(p.numel() for p in small[1].parameters())
    dense = sum(p.numel() for p in corank.dequantize(of_every_kind()).parameters())
    assert done.parameters == parameters and done.densified == dense and done.copied == 0
    # pivots and constants of the graph come on top of the parameters
    assert parameters < min(stored.values()) and max(stored.values()) < parameters + 64 < dense
    own = Counter(tuple(sorted(p.shape)) for p in small[1].parameters())
    for file in (folder / "model.onnx", tmp_path / "optimized.onnx"):
        kept = Counter(tuple(sorted(t.dims)) for t in onnx.load(file).graph.initializer)
        assert kept[24, 37] == own[24, 37] == 2 and kept[12, 24] == own[12, 24]
    assert 0 <= done.difference <= 1e-4 < done.magnitude


def test_a_graph_whose_factors_were_multiplied_out_is_refused(small):
    model = small[1]
    shapes = Counter(tuple(p.shape) for p in model.parameters())
    refuse_densified(model, shapes, "the graph")
    for densified in ((37, 24), (24, 37)):
        with pytest.raises(CorankError, match="multiplied out"):
            refuse_densified(model, shapes + Counter([densified] * 4), "the graph")


def test_second_copies_of_tied_matrices_are_counted_and_allowed():
    model = compress(make("llama-tied"))
    shapes = Counter(tuple(p.shape) for p in model.parameters())
    assert shapes[64, 24] == 1
    for stored, wanted in ((shapes, 0), (shapes + Counter([(24, 64)]), 64 * 24)):
        assert second_copies(model, stored) == wanted
        refuse_densified(model, stored, "the graph")
    untied = compress(make("llama"))
    assert second_copies(untied, Counter([(64, 24), (64, 24), (24, 64)])) == 0


def test_beside_the_graph_lie_a_plain_config_and_the_tokenizer(graph):
    done, folder = graph
    assert {"model.onnx", "config.json", "tokenizer.json", "export.json"} <= {p.name for p in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llama" and "quantization_config" not in config and "auto_map" not in config
    said = json.loads((folder / "export.json").read_text())
    assert said["optimized"] == done.optimized and said["files"]["model.onnx"] == done.files["model.onnx"]
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) | 0o055


def test_a_torch_program_runs_without_corank_or_transformers(small, tmp_path):
    out = tmp_path / "program"
    done = export(small[0], "torch", out)
    assert done.difference == 0.0
    torch.save({"ids": IDS, "mask": MASK}, tmp_path / "inputs.pt")
    code = (
        "import sys, torch\n"
        "x = torch.load(sys.argv[2])\n"
        "y = torch.export.load(sys.argv[1]).module()(x['ids'], x['mask'])\n"
        "assert not {'corank', 'transformers'} & set(sys.modules)\n"
        "torch.save(y.detach(), sys.argv[3])\n"
    )
    arguments = [str(out / "model.pt2"), str(tmp_path / "inputs.pt"), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt")[MASK.bool()], logits(small[1]))
    program = torch.export.load(out / "model.pt2")
    parameters = sum(p.numel() for p in small[1].parameters())
    assert (
        sum(t.numel() for n, t in program.state_dict.items() if n in program.graph_signature.parameters) == parameters
    )


def test_a_16_bit_model_keeps_its_dtype_in_a_torch_program(tmp_path, capsys):
    model = compress(make("qwen2", torch.bfloat16))
    corank.checkpoint.save(model, tokenizer(), tmp_path / "small")
    out = tmp_path / "program"
    assert main(["export", str(tmp_path / "small"), "--format", "torch", "--out", str(out), "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed and "Checked: no logit is off by more than" in printed
    found = torch.export.load(out / "model.pt2").module()(IDS, MASK)[MASK.bool()]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, logits(model))


def test_dense_is_a_plain_checkpoint(small, tmp_path, capsys):
    out = tmp_path / "plain"
    assert main(["export", str(small[0]), "--format", "dense", "--out", str(out), "--json", "--quiet"]) == 0
    said = json.loads(capsys.readouterr().out)
    model, _ = corank.load(out)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert said["parameters"] == sum(p.numel() for p in model.parameters()) and said["difference"] is None
    torch.testing.assert_close(logits(model), logits(small[1]), rtol=1e-4, atol=1e-5)
    with pytest.raises(CorankError, match="dense already"):
        export(out, "dense", tmp_path / "again")


CONVERTER = """#!{python}
import json, sys
from pathlib import Path
import gguf
from safetensors.numpy import load_file
source, flag, target = sys.argv[1:]
assert flag == "--outfile"
config = json.loads((Path(source) / "config.json").read_text())
assert "quantization_config" not in config
if {fails}:
    Path(target).write_bytes({leaves})
    sys.exit("tokenizer not supported" if {leaves} == b"" else 0)
writer = gguf.GGUFWriter(target, "llama")
for name, tensor in load_file(Path(source) / "model.safetensors").items():
    writer.add_tensor(name, tensor)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


def install(folder, **settings):
    """A stand-in for llama.cpp's program."""
    folder.mkdir(exist_ok=True)
    program = folder / "llama-convert-hf-to-gguf"
    program.write_text(CONVERTER.format(python=sys.executable, **({"fails": False, "leaves": b""} | settings)))
    program.chmod(0o755)


def test_gguf_goes_through_a_dense_checkpoint_and_the_converter(small, tmp_path, monkeypatch):
    from gguf import GGUFReader

    install(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    out = tmp_path / "new" / "small.gguf"
    done = export(small[0], "gguf", out)
    dense = dict(corank.dequantize(of_every_kind()).named_parameters())
    tensors = {t.name: t for t in GGUFReader(out).tensors}
    assert tensors.keys() == dense.keys() and done.files == {"small.gguf": out.stat().st_size}
    name = "model.layers.0.mlp.gate_proj.weight"
    np.testing.assert_allclose(tensors[name].data, dense[name].detach().numpy(), rtol=1e-5, atol=1e-6)
    assert [p.name for p in out.parent.iterdir()] == ["small.gguf"]
    with pytest.raises(CorankError, match="exists already"):
        export(small[0], "gguf", out)


@pytest.mark.parametrize(
    "settings,message",
    [({"fails": True}, "tokenizer not supported"), ({"fails": True, "leaves": b"rubbish"}, "no GGUF file")],
)
def test_a_converter_that_fails_leaves_nothing(settings, message, small, tmp_path, monkeypatch):
    install(tmp_path / "bin", **settings)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "new").mkdir()
    with pytest.raises(CorankError, match=message):
        export(small[0], "gguf", tmp_path / "new" / "small.gguf")
    assert not list((tmp_path / "new").iterdir())


def test_the_converter_is_found_in_the_sources_of_llama_cpp(small, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    with pytest.raises(CorankError, match="set LLAMA_CPP"):
        export(small[0], "gguf", tmp_path / "small.gguf")
    install(tmp_path / "llama.cpp")
    (tmp_path / "llama.cpp" / "llama-convert-hf-to-gguf").rename(tmp_path / "llama.cpp" / "convert_hf_to_gguf.py")
    assert export(small[0], "gguf", tmp_path / "small.gguf").files == {
        "small.gguf": (tmp_path / "small.gguf").stat().st_size
    }


def test_without_a_converter_it_says_what_to_run(small, tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorankError) as error:
        export(small[0], "gguf", tmp_path / "small.gguf")
    said = str(error.value)
    assert "pip download" in said and "LLAMA_CPP=" in said
    last = said.rpartition(") ")[2].split()
    assert last[:2] == ["corank", "export"] and last[-2:] == ["--out", str(tmp_path / "small.gguf")]
    with pytest.raises(CorankError, match="NAME.gguf"):
        export(small[0], "gguf", tmp_path / "small")


def test_what_exists_is_never_overwritten(small, tmp_path):
    precious = tmp_path / "out"
    precious.mkdir()
    (precious / "precious").write_text("data")
    for format in ("dense", "onnx", "torch"):
        with pytest.raises(CorankError, match="not an empty directory"):
            export(small[0], format, precious)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (precious / "precious").read_text() == "data"


def test_a_program_that_differs_is_refused_and_leaves_nothing(small, tmp_path, monkeypatch):
    """The exporter is made to export a model whose head is off by one part in a thousand."""
    original = exporting.program

    def off(model):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.mul_(1.001)
        return original(other)

    monkeypatch.setattr(exporting, "program", off)
    with pytest.raises(CorankError, match="off by .* at batch 1, length 1"):
        export(small[0], "torch", tmp_path / "out", tolerance=1e-5)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", ["nan", "shape", "error", "padding"])
def test_the_check_sees(wrong, small):
    model = small[1]

    def run(ids, mask):
        right = model(input_ids=ids, attention_mask=mask).logits
        if wrong == "nan" and len(ids) == 3:
            right[1, 0, 0] = torch.nan
        if wrong == "shape":
            return right[:, :1]
        if wrong == "error":
            raise RuntimeError("no such operator")
        if wrong == "padding":  # what nobody reads may differ
            right[~mask.bool()] += 1
        return right

    if wrong == "padding":
        assert compare(model, run, 1e-4, "it")["difference"] == 0.0
    else:
        with pytest.raises(CorankError, match={"nan": "off by nan", "shape": "gives logits"}.get(wrong, "no such")):
            compare(model, run, 1e-4, "it")


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_models_that_do_not_map_tokens_to_logits_are_refused(name, tmp_path):
    model = make(name)
    corank.checkpoint.save(model, tokenizer(), tmp_path / "model")
    with pytest.raises(CorankError, match="sequence of tokens"):
        export(tmp_path / "model", "torch", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_missing_packages_and_unknown_formats_are_one_sentence(small, tmp_path, monkeypatch):
    import corank.serve.onnx as room

    monkeypatch.setattr(room, "NEEDED", ("onnx", "no_such_package"))
    with pytest.raises(CorankError, match=r"no_such_package.*corank\[export\]"):
        export(small[0], "onnx", tmp_path / "out")
    with pytest.raises(CorankError, match="Unknown export format"):
        export(small[0], "onxx", tmp_path / "out")
    assert isinstance(small[1], nn.Module) and not list(tmp_path.iterdir())
