"""The measurement behind docs/architectures.md: compress, save, load in a fresh process, compare.

python tests/architectures/table.py          compare with the page
python tests/architectures/table.py --write  bring the page up to date
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where tests find each other
sys.path.insert(0, str(Path(__file__).resolve().parent))

from families import FAMILIES, batches, inputs, logits, make  # noqa: E402
from safetensors import safe_open  # noqa: E402

import corank  # noqa: E402
from corank import checkpoint  # noqa: E402
from corank.model import Text, outline  # noqa: E402
from tiny import text, tokenizer  # noqa: E402

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
START, END = "<!-- architectures -->", "<!-- /architectures -->"
RUN: dict[str, Any] = dict(method="svd-llm", keep=0.7, samples=4, length=12, batch=2)

#: a process that first cannot import corank, then can
FRESH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "corank":
            raise ImportError("corank cannot be imported here")
block = Block()
sys.meta_path.insert(0, block)
import json, pathlib, torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
root, autos = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
report = {name: {} for name in autos}

def attempt(name, folder, **kwargs):
    auto = getattr(transformers, autos[name])
    try:
        model, info = auto.from_pretrained(root / name / folder, output_loading_info=True, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        found = model(**torch.load(root / name / "inputs")).logits
    wanted = torch.load(root / name / ("dense-logits" if folder == "dense-again" else "logits"))
    return {"equal": torch.equal(found, wanted), "info": [str(v) for v in info.values() if v], "class": type(model).__name__}

for name in autos:
    report[name]["ignorant"] = attempt(name, "compressed")
    report[name]["dense"] = attempt(name, "dense-again")
for name in autos:
    report[name]["trusting"] = attempt(name, "compressed", trust_remote_code=True)
sys.meta_path.remove(block)
import corank
for name in autos:
    report[name]["corank"] = attempt(name, "compressed")
print("REPORT" + json.dumps(report))
"""


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files of a directory."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            found |= {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    return found


def prepare(name: str, root: Path) -> dict[str, Any]:
    """Compress a family in memory and from a directory, save what a fresh process has to reproduce.

    Returns:
        what is known in this process.
    """
    folder = root / name
    model = make(name)
    model.save_pretrained(folder / "dense", max_shard_size="40KB")
    tokenizer().save_pretrained(folder / "dense")
    examples = batches(name)
    data = Text(text(), "words") if examples is None else examples
    words = None if examples is not None else checkpoint.load(folder / "dense")[1]
    plan = outline(model.config, type(model), None if examples is None else examples[0])
    report = corank.compress(model, tokenizer=words, out=folder / "memory", data=data, **RUN)
    corank.compress(folder / "dense", out=folder / "compressed", data=data, **RUN)
    corank.verify(folder / "compressed")
    loaded, _ = checkpoint.load(folder / "compressed", tokenizer=False)
    torch.save(inputs(name), folder / "inputs")
    # not those of the model in memory: where a tensor begins in memory changes the last bit of a product
    torch.save(logits(loaded, inputs(name)), folder / "logits")
    found, wanted = loaded.state_dict(), model.state_dict()
    stored, memory = tensors(folder / "compressed"), tensors(folder / "memory")
    named = {
        f"{site}.{part}" for site in checkpoint.factorized(model) for part in model.get_submodule(site).state_dict()
    }
    compressed = logits(model, inputs(name))
    checkpoint.dequantize(model)
    model.save_pretrained(folder / "dense-again")
    again = type(model).from_pretrained(folder / "dense-again")
    torch.save(logits(again, inputs(name)), folder / "dense-logits")
    return {
        "plan": plan,
        "report": report,
        "error": distance(logits(loaded, inputs(name)), compressed),
        "same weights": found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in found),
        "same bits": stored.keys() == memory.keys() and all(torch.equal(stored[k], memory[k]) for k in stored),
        "names": named <= stored.keys(),
        "dense error": distance(logits(model, inputs(name)), compressed),
        "class": type(model).__name__,
    }


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference as a share of the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


def fresh(root: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """What another process finds in the directories."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
    autos = {name: FAMILIES[name].auto for name in names}
    command = [sys.executable, "-c", FRESH, str(root), json.dumps(autos)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    lines = [line for line in run.stdout.splitlines() if line.startswith("REPORT")]
    if not lines:
        raise RuntimeError(run.stderr[-3000:])
    return json.loads(lines[0].removeprefix("REPORT"))


def measure(root: Path) -> dict[str, dict[str, Any]]:
    """Everything about every family."""
    here = {name: prepare(name, root) for name in FAMILIES}
    there = fresh(root, list(FAMILIES))
    return {name: {**here[name], **there[name]} for name in FAMILIES}


def table(results: dict[str, dict[str, Any]]) -> str:
    """The rows of the page."""
    lines = [
        "| architecture | class | runs | matrices | only if asked for | reloaded, logits |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        plan, family = found["plan"], FAMILIES[name]
        roles = list(dict.fromkeys(s.role if s.pool is None else f"{s.role} of each expert" for s in plan.sites))
        extra = list(dict.fromkeys("lm_head = embed" if s.tied else s.role for s in plan.optional if not s.refusal))
        equal = all(isinstance(found[how], dict) and found[how]["equal"] for how in ("corank", "trusting"))
        title = family.title + (f": {family.note}" if family.note else "")
        how = "as a whole" if plan.whole else "block by block"
        cells = [
            title,
            f"`{found['class']}`",
            how,
            ", ".join(roles),
            ", ".join(extra) or "–",
            "equal" if equal else "DIFFER",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page with its table brought up to date."""
    before, _, rest = PAGE.read_text().partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table(results)}\n{END}{after}"


def main() -> int:
    """Write the page, or compare."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        wanted = page(measure(Path(folder)))
    if "--write" in sys.argv:
        PAGE.write_text(wanted)
        print(f"wrote {PAGE}")
        return 0
    stale = PAGE.read_text() != wanted
    if stale:
        print("docs/architectures.md is out of date; run python tests/architectures/table.py --write")
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
