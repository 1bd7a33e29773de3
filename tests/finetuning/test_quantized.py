"""Factors as 8-bit and 4-bit integers: what is stored, what it costs, and that it comes back bit for bit."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors import safe_open

import corank
from corank import checkpoint
from corank.checkpoint import quantize_factors
from corank.checkpoint.integers import multiplied_out, pack, quantize, unpack
from corank.errors import CorankError
from corank.factors import FactorizedLinear, replace
from corank.heal import lora_config, merge_lora
from factorized import IDS, KINDS, across, factors_of, logits, mixed, tied_in_factors

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FRESH = """
import json, pathlib, sys, torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
root, report = pathlib.Path(sys.argv[1]), {}
for how in ("plain", "trusted", "corank"):
    if how == "corank":
        import corank
    for name in sys.argv[2:]:
        try:
            kwargs = {"trust_remote_code": True} if how == "trusted" else {}
            model = transformers.AutoModelForCausalLM.from_pretrained(root / name, **kwargs).eval()
            with torch.no_grad():
                report[f"{name}, {how}"] = model(torch.load(root / "ids")).logits.tolist()
        except Exception as error:
            report[f"{name}, {how}"] = f"{type(error).__name__}: {error}"
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A compressed model with its report, and its factors in 8 and in 4 bits."""
    root = tmp_path_factory.mktemp("quantized")
    model = mixed()
    torch.save(logits(model), root / "float.logits")
    torch.save(IDS, root / "ids")
    checkpoint.save(model, None, root / "float", max_shard_size="20KB")
    sizes = {"dense": 99_999, "compressed": weights(root / "float")}
    sites = [
        dict(name=n, role="q", layer=0, shape=s["shape"], kind=s["kind"], rank=s["rank"], max_rank=9, params=1)
        | dict(params_dense=2, loss=0.1)
        for n, s in checkpoint.collect(model).items()
    ]
    corank.Report("tiny", "svd", accounting={"bytes": sizes}, sites=sites).save(root / "float" / "report.json")
    (root / "float" / "README.md").write_text("all in 32 bits")
    (root / "float" / "notes.txt").write_text("kept")
    quantize_factors(root / "float", "int8", out=root / "int8")
    quantize_factors(root / "float", "int4", out=root / "int4", group=4)
    return root


def weights(directory):
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def stored(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            found |= {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_to_the_nearest_of_the_grid(bits, dtype):
    W = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec, tensors = quantize(W, bits, 8)
    found, scale = multiplied_out(tensors), tensors["weight_scale"].float()
    step = scale.repeat_interleave(32 // scale.shape[1], 1)
    assert (
        spec["bits"] == bits
        and ((found - W.float()).abs() <= step * (0.501 if dtype == torch.float32 else 0.52) + 1e-6).all()
    )
    largest = W.float().abs().unflatten(1, (scale.shape[1], -1)).amax(-1)
    torch.testing.assert_close(scale, largest / (127.5 if bits == 8 else 7.5), rtol=1e-2, atol=1e-6)
    assert sum(t.nbytes for t in tensors.values()) == (6 * 32 + 24 if bits == 8 else 6 * 16 + 6 * 4 * dtype.itemsize)


def test_nibbles_are_packed_and_unpacked():
    values = torch.arange(-8, 8, dtype=torch.int8).reshape(2, 8)
    assert pack(values).shape == (2, 4) and torch.equal(unpack(pack(values)), values)
    assert pack(torch.tensor([[1, -1]], dtype=torch.int8)).item() == 0xF1


def test_what_would_not_shrink_stays():
    for shape in ((5, 0), (0, 5), (7, 1)):
        assert quantize(torch.zeros(shape), 8, 32) is None
    assert quantize(torch.ones(3, 4, dtype=torch.bfloat16), 8, 32) is None  # 4 + 4 bytes a row instead of 8
    assert quantize(torch.ones(3, 5, dtype=torch.bfloat16), 8, 32)[0]["bits"] == 8
    assert quantize(torch.ones(3, 48), 4, 32)[0]["bits"] == 8  # not whole groups
    with pytest.raises(CorankError, match="NaN or infinite"):
        quantize(torch.full((4, 9), torch.nan), 8, 32)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_files_hold_integers_and_the_config_says_so(folder, scheme):
    before, after = stored(folder / "float"), stored(folder / scheme)
    section = json.loads((folder / scheme / "config.json").read_text())["quantization_config"]
    counted = section["factor_quantization"]["matrices"]
    parts = {f"{n}.{p}": how for n, spec in section["modules"].items() for p, how in spec.get("quantized", {}).items()}
    assert "torchao" in section["provenance"]["versions"]
    assert section["factor_quantization"]["library"] == "torchao" and sum(counted.values()) == len(parts) > 10
    assert counted.get("int4", 0) == sum(how["bits"] == 4 for how in parts.values()) and ("int4" in counted) == (
        scheme == "int4"
    )
    for name, how in parts.items():
        assert name.rpartition(".")[2] in ("down", "up")
        values = after[f"{name}.weight" if how["bits"] == 8 else f"{name}.weight_packed"]
        assert values.dtype == (torch.int8 if how["bits"] == 8 else torch.uint8)
        W = before[f"{name}.weight"]
        assert values.shape == (W.shape if how["bits"] == 8 else (W.shape[0], W.shape[1] // 2))
        part = {key.removeprefix(f"{name}."): value for key, value in after.items() if key.startswith(f"{name}.weight")}
        assert (multiplied_out(part) - W).abs().max() <= 0.51 * part["weight_scale"].max()
    untouched = {k for k in before if k.removesuffix(".weight") not in parts}
    assert all(torch.equal(before[k], after[k]) for k in untouched)
    assert any("link" in k for k in untouched) and any("norm" in k for k in untouched)
    assert len(list((folder / scheme).glob("*.safetensors"))) == len(list((folder / "float").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_bytes_are_counted_as_they_are(folder, scheme):
    before, after = stored(folder / "float"), stored(folder / scheme)
    account = quantize_factors(folder / "float", scheme, out=folder / f"again-{scheme}", group=4)
    shutil.rmtree(folder / f"again-{scheme}")
    saved = sum(t.nbytes for t in before.values()) - sum(t.nbytes for t in after.values())
    assert account.before - account.after == saved > 0
    assert account.bits == pytest.approx(8 * account.after / sum(account.values.values()))
    report = corank.Report.load(folder / scheme)
    assert report.accounting["bytes"] == {"dense": 99_999, "compressed": weights(folder / scheme)}
    assert report.accounting["factors"]["matrices"] == account.matrices
    assert report.accounting["factors"]["bytes"] == {"before": account.before, "after": account.after}
    assert f"as {scheme}" in report.warnings[-1] and f"{account.bits:.2f} bits" in report.warnings[-1]
    labels = {bits for site in report.sites for bits in site.get("bits", {}).values()}
    assert labels == ({8} if scheme == "int8" else {8, 4})
    assert not (folder / scheme / "README.md").exists() and (folder / scheme / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_model_in_memory_becomes_the_same(folder, scheme, tmp_path):
    model, _ = checkpoint.load(folder / "float", tokenizer=False)
    account = quantize_factors(model, scheme, out=tmp_path / "out", group=4)
    assert account == quantize_factors(folder / "float", scheme, out=tmp_path / "other", group=4)
    due, near = logits(model), torch.load(folder / "float.logits")
    assert not torch.equal(due, near) and (due - near).norm() < (0.05 if scheme == "int8" else 0.5) * near.norm()
    for place in (tmp_path / "out", folder / scheme):
        checkpoint.verify(place)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(place)
        assert torch.equal(logits(loaded), due)
        checkpoint.verify(loaded)
    again = copy.deepcopy(loaded)
    again.save_pretrained(tmp_path / "saved", max_shard_size="10KB")
    assert torch.equal(logits(checkpoint.load(tmp_path / "saved", tokenizer=False)[0]), due)
    assert {k: v.nbytes for k, v in stored(tmp_path / "saved").items()} == {
        k: v.nbytes for k, v in stored(folder / scheme).items()
    }
    dense = checkpoint.dequantize(again)
    assert not any(isinstance(m, FactorizedLinear) for m in dense.modules())
    torch.testing.assert_close(logits(dense), due, rtol=1e-3, atol=1e-3)


def test_in_a_fresh_process(folder, tmp_path):
    schemes = ("int8", "int4")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", FRESH, str(folder), *schemes]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in run.stdout.splitlines() if line.startswith("REPORT")]
    assert lines, run.stderr[-3000:]
    report = json.loads(lines[0].removeprefix("REPORT"))
    for scheme in schemes:
        due = logits(checkpoint.load(folder / scheme, tokenizer=False)[0])
        # Without corank it stops, as it does with factors in floating point; or the module in the directory loads
        # it, which needs no torchao.
        assert "ignore_mismatched_sizes" in report[f"{scheme}, plain"]
        assert torch.equal(torch.tensor(report[f"{scheme}, trusted"]), due)
        assert torch.equal(torch.tensor(report[f"{scheme}, corank"]), due)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_another_dtype(folder, dtype):
    model, _ = checkpoint.load(folder / "int8", dtype=dtype, tokenizer=False)
    due = torch.load(folder / "float.logits")
    assert logits(model).dtype == dtype and (logits(model).float() - due).norm() < 0.1 * due.norm()


def test_a_basis_shared_across_blocks():
    model = across()
    due = checkpoint.collect(model)
    account = quantize_factors(model, "int4", group=4)
    owner, follower = (model.model.layers[i].self_attn.q_proj for i in (0, 2))
    assert account.matrices == {"int4": 4} and follower.down is owner.down and hasattr(owner.down.weight, "qdata")
    assert {n: {k: v for k, v in s.items() if k != "quantized"} for n, s in checkpoint.collect(model).items()} == due


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_form_is_that_of_the_rounded_factors(kind):
    layer = factors_of(kind, torch.randn(20, 16), 8).module(torch.ones(20))
    from corank.checkpoint.quantized import _quantized

    for part in ("down", "up"):
        old = getattr(layer, part)
        setattr(layer, part, _quantized(old, *quantize(old.weight.detach(), 8, 32)))
    x = torch.randn(5, 16)
    torch.testing.assert_close(x @ layer.dense_weight().T + 1, layer(x), rtol=1e-4, atol=1e-4)


def test_it_takes_adapters_but_does_not_train(folder, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers.trainer_utils import validate_quantization_for_training

    model, _ = checkpoint.load(folder / "int8", tokenizer=False)
    with pytest.raises(ValueError, match="fine-tuning on purely quantized"):
        validate_quantization_for_training(model)
    with pytest.raises(ValueError):
        model.half()
    for place in ("factors", "product"):
        model, _ = checkpoint.load(folder / "int8", tokenizer=False)
        adapted = peft.get_peft_model(model, lora_config(model, 2, place))
        validate_quantization_for_training(adapted)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            loss = adapted(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[2] < losses[0]
        with pytest.raises(CorankError, match="quantized"):
            merge_lora(adapted)


def test_bad_input(folder, tmp_path, monkeypatch):
    from torch import nn

    for call, words in (
        (lambda: quantize_factors(folder / "float", "int3", out=tmp_path / "x"), "Unknown scheme 'int3'"),
        (lambda: quantize_factors(folder / "float", "int4", out=tmp_path / "x", group=3), "even number"),
        (lambda: quantize_factors(folder / "float"), "Give out=DIRECTORY"),
        (lambda: quantize_factors(folder / "float", out=folder / "int8"), "already exists"),
        (lambda: quantize_factors(folder / "int8", out=tmp_path / "x"), "quantized factors already"),
        (lambda: quantize_factors(nn.Linear(2, 2)), "no factors; compress it"),
        (lambda: quantize_factors(tmp_path / "none", out=tmp_path / "x"), "not a directory"),
        (lambda: checkpoint.CorankConfig({"m": {}}, factor_quantization={"bits": 3}), "upgrade"),
    ):
        with pytest.raises(CorankError, match=words):
            call()
    damaged = shutil.copytree(folder / "float", tmp_path / "damaged")
    with open(sorted(damaged.glob("*.safetensors"))[1], "r+b") as file:
        file.seek(-3, 2)
        file.write(b"xyz")
    with pytest.raises(CorankError, match="SHA-256"):
        quantize_factors(damaged, out=tmp_path / "x")
    changed = shutil.copytree(folder / "int8", tmp_path / "changed")
    config = json.loads((changed / "config.json").read_text())
    name = next(n for n, s in config["quantization_config"]["modules"].items() if "quantized" in s)
    for part, words in (({"down": {"bits": 2, "scale": "float32"}}, "2 bits"), ({"left": {"bits": 8}}, "'left'")):
        config["quantization_config"]["modules"][name]["quantized"] = part
        (changed / "config.json").write_text(json.dumps(config))
        with pytest.raises(CorankError, match=words):
            checkpoint.load(changed, tokenizer=False, verify=False)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(CorankError, match=r"pip install -U 'corank\[quant\]'"):
        quantize_factors(folder / "float", out=tmp_path / "x")
    with pytest.raises(CorankError, match="torchao"):
        checkpoint.load(folder / "int8", tokenizer=False)
    checkpoint.verify(folder / "int8")  # which needs no torchao
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.partial").exists()


def test_a_head_whose_factors_the_embedding_looks_up_stays(tmp_path):
    model = tied_in_factors()
    replace(model, "model.layers.0.mlp.up_proj", factors_of("low_rank", torch.randn(37, 24), 9).module())
    checkpoint.save(model, None, tmp_path / "float")
    account = quantize_factors(tmp_path / "float", out=tmp_path / "int8")
    assert account == quantize_factors(model) and account.matrices == {"int8": 2}
    loaded, _ = checkpoint.load(tmp_path / "int8", tokenizer=False)
    assert not hasattr(loaded.lm_head.up.weight, "qdata") and torch.equal(logits(loaded), logits(model))
