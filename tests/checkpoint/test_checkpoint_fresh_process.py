"""In processes that have never imported corank: stop loudly, or load through the shipped module."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from checkpoint_models import compress, make, outputs, share

from corank import checkpoint

NAMES = ["llama-tied", "qwen2", "gpt2", "bert", "mixtral"]
AUTO = {"bert": "AutoModelForMaskedLM"}

SCRIPT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "corank":
            raise ImportError("corank cannot be imported here")
sys.meta_path.insert(0, Block())
import json, pathlib, torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
root, report = pathlib.Path(sys.argv[1]), {}

def attempt(name, folder, **kwargs):
    auto = getattr(transformers, json.loads(sys.argv[2]).get(name, "AutoModelForCausalLM"))
    try:
        model, info = auto.from_pretrained(root / folder, output_loading_info=True, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    calls = torch.load(root / f"{name}.calls")
    with torch.no_grad():
        same = torch.equal(model(**calls).logits, torch.load(root / f"{folder}.logits"))
    return {"same": same, "info": [str(v) for v in info.values() if v], "class": type(model).__name__}

names = sorted(path.stem for path in root.glob("*.calls"))
for name in names:
    report[name] = {
        "plain": attempt(name, name),
        "auto": attempt(name, name, dtype="auto"),
        "mapped": attempt(name, name, dtype=torch.bfloat16, device_map="cpu"),
        "dense": attempt(name, f"{name}-dense"),
    }
for name in names:
    report[name]["trusted"] = attempt(name, name, trust_remote_code=True)
print("REPORT" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Compressed and dequantized models beside inputs and the logits that are due."""
    root = tmp_path_factory.mktemp("fresh")
    for name in NAMES:
        model = make(name)
        if name.startswith("llama"):
            share(model, [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"])
        compress(model)
        ids = torch.randint(2, 60, (2, 11), generator=torch.Generator().manual_seed(3))
        torch.save({"input_ids": ids}, root / f"{name}.calls")
        torch.save(outputs(model), root / f"{name}.logits")
        checkpoint.save(model, None, root / name, max_shard_size="20KB" if name != "gpt2" else "1GB")
        checkpoint.dequantize(model)
        torch.save(outputs(model), root / f"{name}-dense.logits")
        model.save_pretrained(root / f"{name}-dense")
    return root


@pytest.fixture(scope="module")
def report(folder):
    """What happens to each of them in one process where corank cannot be imported."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-I", "-c", SCRIPT, str(folder), json.dumps(AUTO)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    lines = [line for line in run.stdout.splitlines() if line.startswith("REPORT")]
    assert lines, run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("REPORT"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["plain", "auto", "mapped"])
def test_a_stock_loader_stops_instead_of_giving_random_weights(report, name, how):
    assert isinstance(report[name][how], str) and "ignore_mismatched_sizes" in report[name][how]


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_module_loads_it_bit_for_bit(report, name):
    class_name = type(make(name)).__name__
    assert report[name]["trusted"] == {"same": True, "info": [], "class": class_name}


@pytest.mark.parametrize("name", NAMES)
def test_a_dequantized_model_is_a_stock_model(report, name):
    class_name = type(make(name)).__name__
    assert report[name]["dense"] == {"same": True, "info": [], "class": class_name}


def test_the_package_takes_over_where_it_is_present(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "llama-tied", trust_remote_code=True)
    assert isinstance(model.hf_quantizer, checkpoint.CorankQuantizer)
    assert torch.equal(outputs(model), torch.load(folder / "llama-tied.logits"))


def test_the_auto_map_names_the_auto_classes_of_the_architecture(folder):
    config = json.loads((folder / "bert" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForMaskedLM"] == "modeling_corank.AutoModelForMaskedLM"
    assert "AutoModelForImageClassification" not in config["auto_map"]
    assert "import corank" not in (folder / "bert" / "modeling_corank.py").read_text().split('"""')[2]
