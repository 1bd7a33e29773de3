"""Checkpoints written in the past load, compute what they computed then, and are complete."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corank import checkpoint
from corank.checkpoint import modeling_corank
from corank.factors import FORMS, KINDS, ExpertList

FRESH = """
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
report = {}
for trust in (False, True):  # the shipped module stays registered once it has been used
    for folder in sorted(p.parent for p in pathlib.Path(sys.argv[1]).glob("v*/*/config.json")):
        given = json.loads((folder / "expected.json").read_text())["inputs"]
        shape = given.pop("shape", None)
        call = {k: torch.tensor(v) if shape is None else torch.tensor(v).reshape(shape) for k, v in given.items()}
        auto = transformers.AutoModelForCausalLM if shape is None else transformers.AutoModelForImageClassification
        try:
            with torch.no_grad():
                found = auto.from_pretrained(folder, trust_remote_code=trust).eval()(**call).logits.flatten().tolist()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        report[f"{folder.parent.name}-{folder.name}-{trust}"] = found
print("REPORT" + json.dumps(report))
"""
HERE = Path(__file__).resolve().parent / "golden"
GOLDEN = sorted(path.parent for path in HERE.glob("v*/*/config.json"))


def name_of(folder):
    return f"{folder.parent.name}-{folder.name}"


def section_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def opened(folder):
    if folder.name.startswith("int"):
        pytest.importorskip("torchao")
    return checkpoint.load(folder, tokenizer=False)[0]


@pytest.fixture(scope="module")
def script():
    """The script that wrote them, whose way of computing logits is used here."""
    spec = importlib.util.spec_from_file_location("golden_write", HERE / "write.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", GOLDEN, ids=name_of)
def test_it_computes_what_it_computed_then(folder, script):
    model = opened(folder)
    expected = json.loads((folder / "expected.json").read_text())
    due = torch.tensor(expected["logits"]).reshape(expected["shape"])
    assert due.std() > 0.05  # the numbers say something
    torch.testing.assert_close(script.logits(model, expected["inputs"]), due, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", GOLDEN, ids=name_of)
def test_it_is_read_completely_and_means_the_same(folder):
    model = opened(folder)
    section = section_of(folder)
    assert section["format_version"] == int(folder.parent.name[1:]) and section["quant_method"] == "corank"
    assert checkpoint.collect(model) == section["modules"]
    checkpoint.verify(folder)
    checkpoint.verify(model)
    _, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("folder", GOLDEN, ids=name_of)
def test_saved_again_it_is_the_same_model(folder, script, tmp_path):
    model = opened(folder)
    given = json.loads((folder / "expected.json").read_text())["inputs"]
    checkpoint.save(model, None, tmp_path / "again")
    again, _ = checkpoint.load(tmp_path / "again", tokenizer=False)
    assert torch.equal(script.logits(again, given), script.logits(model, given))
    dense = checkpoint.dequantize(again)
    torch.testing.assert_close(script.logits(dense, given), script.logits(model, given), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """What a process without corank finds: the stock loader, then the module that is shipped today."""
    root = tmp_path_factory.mktemp("golden")
    for folder in GOLDEN:
        shutil.copytree(folder, root / folder.relative_to(HERE))
        shutil.copy(modeling_corank.__file__, root / folder.relative_to(HERE))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    run = subprocess.run([sys.executable, "-c", FRESH, str(root)], env=environment, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("REPORT")]
    assert lines, run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("REPORT"))


@pytest.mark.parametrize("folder", [f for f in GOLDEN if f.name != "dense"], ids=name_of)
def test_a_stock_loader_stops_at_every_kind_and_form(folder, without):
    """But for a dense matrix that was given a bias: its weights are right, and transformers reports the bias as unused."""
    said = without[f"{name_of(folder)}-False"]
    assert isinstance(said, str) and "ignore_mismatched_sizes" in said


@pytest.mark.parametrize("folder", GOLDEN, ids=name_of)
def test_the_shipped_module_knows_every_kind_and_form(folder, without):
    due = torch.tensor(json.loads((folder / "expected.json").read_text())["logits"])
    torch.testing.assert_close(torch.tensor(without[f"{name_of(folder)}-True"]), due, rtol=1e-4, atol=1e-5)


def test_everything_the_format_holds_has_a_golden_checkpoint():
    now = [folder for folder in GOLDEN if folder.parent.name == f"v{checkpoint.FORMAT_VERSION}"]
    specs = [spec for folder in now for spec in section_of(folder)["modules"].values()]
    bits = {part["bits"] for spec in specs for part in spec.get("quantized", {}).values()}
    missing = (set(KINDS) - {spec["kind"] for spec in specs}) | (set(FORMS) - {spec.get("form") for spec in specs})
    assert not missing, f"add {missing} to CASES in {HERE / 'write.py'} and run it"
    assert bits == {8, 4}
    assert {spec["rank"] for spec in specs} >= {0, 3} and any(spec.get("bias") for spec in specs)
    assert all(size(folder) < 16_000 for folder in GOLDEN)


def size(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def test_experts_are_among_them():
    model = opened(HERE / "v1" / "experts")
    assert any(isinstance(module, ExpertList) for module in model.modules())


def test_nothing_is_written_over(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "CASES", {"low_rank": script.CASES["low_rank"]})
    script.main()
    (tmp_path / "v1" / "low_rank" / "expected.json").write_text("{}")
    script.main()
    assert (tmp_path / "v1" / "low_rank" / "expected.json").read_text() == "{}"
