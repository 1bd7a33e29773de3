"""Adapters with equal numbers of trained values: what they memorise, and what the model forgets meanwhile.

    python -m benchmarks adapters                               # a small Llama, trained on the spot
    python -m benchmarks adapters --quick                       # everything once at toy sizes: does it run? no numbers to quote
    python -m benchmarks adapters --model smollm2-135m --pairs 1024 --digits 32 --steps 4000
    python -m benchmarks adapters --methods lora,curing --rates 1e-3

The two comparisons of CURing (arXiv:2501.04211), at a size that fits a laptop:

* memorise: random pairs of hexadecimal strings; the share whose value is reproduced exactly, greedily.
* learn: text of another kind (source code); perplexity on what was trained on and on held-out text of both kinds.

Both report the perplexity on held-out text of the kind the model knows, before and after: what has been forgotten. All
methods train as many values as a LoRA of rank --rank on the same matrices, as nearly as their shapes allow (the number is
in the table). Every method runs at every learning rate; the table shows the one with the lowest training loss. Finished rows
are kept in --work and not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import corank
from benchmarks.hardware import hardware
from corank import adapters
from corank.jsonfile import read_json, write_json
from corank.model import Text, read_text

METHODS = ("lora", "mora", "curing", "curing-data", "curlora", "tcurlora", "pissa", "corda")
TASKS = ("memorise", "learn")
IGNORED = -100


@dataclass(frozen=True)
class Protocol:
    """What all rows share."""

    model: str
    rank: int
    targets: tuple[str, ...]
    pairs: int
    digits: int
    steps: int
    batch: int
    length: int
    windows: int
    known: str
    held_out: str
    other: str
    seed: int = 0

    @property
    def digest(self) -> str:
        """Rows of another protocol are kept apart."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def characters() -> PreTrainedTokenizerFast:
    """One token per character of ASCII text."""
    alphabet = ["\n", *map(chr, range(32, 127)), "\x00"]
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", pad_token="\x00")


def windows_of(tokenizer: Any, text: Text, length: int) -> Tensor:
    """[windows, length] token ids."""
    ids = torch.tensor(tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def write_small_model(folder: Path, known: Text, steps: int, layers: int, seed: int = 0) -> None:
    """A Llama of the size of stories260K (64 wide, 8 heads, 4 of keys), trained on the known text by character."""
    torch.manual_seed(seed)
    tokenizer = characters()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=172, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=96,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = windows_of(tokenizer, known, 128)
    order = torch.Generator().manual_seed(seed)

    def batches(step: int) -> dict[str, Tensor]:
        ids = rows[torch.randint(len(rows), (16,), generator=order)]
        return {"input_ids": ids, "labels": ids}

    train(model, batches, steps, 3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model: Any, batches: Any, steps: int, rate: float, decay: bool = True) -> float:
    """AdamW with a short warm-up; returns the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    warm = max(steps // 20, 1)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)) if decay else 1.0)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(**batches(step)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


def random_pairs(tokenizer: Any, count: int, digits: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of (key, value), both random hexadecimal strings."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        key, value = (f"{source.getrandbits(4 * digits):0{digits}x}" for _ in range(2))
        parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{key}: ", value)]
        found.append((parts[0], parts[1]))
    return found


def padded(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """A batch that is trained on the values alone."""
    length = max(len(k) + len(v) for k, v in pairs)
    ids, labels, mask = [], [], []
    for key, value in pairs:
        fill = length - len(key) - len(value)
        ids.append(key + value + [0] * fill)
        labels.append([IGNORED] * len(key) + value + [IGNORED] * fill)
        mask.append([1] * (length - fill) + [0] * fill)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def recalled(model: Any, pairs: Sequence[tuple[list[int], list[int]]], batch: int = 64) -> float:
    """Share of the pairs whose value is the greedy continuation of the key (every token is the most probable one)."""
    right = 0
    for i in range(0, len(pairs), batch):
        inputs = padded(pairs[i : i + batch])
        labels = inputs.pop("labels")[:, 1:]
        best = model(**inputs).logits[:, :-1].argmax(-1)
        right += int(((best == labels) | (labels == IGNORED)).all(1).sum())
    return right / len(pairs)


def attach(model: Any, tokenizer: Any, method: str, protocol: Protocol) -> Any:
    """The model with an adapter of the budget."""
    import peft

    name = method.removesuffix("-data")
    sites = {s.name: s.shape for s in adapters.linear_maps(model) if s.role in protocol.targets}
    if name == "lora":
        config = peft.LoraConfig(r=protocol.rank, lora_alpha=2 * protocol.rank, target_modules=list(sites))
        return peft.get_peft_model(model, config)
    more: dict[str, Any] = {"rank": protocol.rank, "seed": protocol.seed}
    if name in ("curing", "curlora", "tcurlora"):  # r'^2 = r (m + n), or all that there is
        more["ranks"] = {n: min(round(math.sqrt(protocol.rank * sum(shape))), *shape) for n, shape in sites.items()}
    if name == "corda" or method.endswith("-data"):
        more |= dict(data=read_text(protocol.known), tokenizer=tokenizer, samples=16, length=protocol.length)
    return adapters.attach(model, name, targets=list(sites), **more)


def make_row(protocol: Protocol, place: str, method: str, task: str, rate: float) -> dict[str, Any]:
    """Train one adapter on one task, and measure."""
    torch.manual_seed(protocol.seed)
    model, tokenizer = corank.load(place, dtype="float32")
    held_out = {"known": read_text(protocol.held_out), "other": read_text(protocol.other)}
    fresh = windows_of(tokenizer, held_out["other"], protocol.length)
    cut = len(fresh) * 3 // 4  # the first three quarters are trained on
    learnt = tokenizer.decode(fresh[:cut].flatten())
    held_out["other"] = Text(tokenizer.decode(fresh[cut:].flatten()), "held out")

    def perplexities() -> dict[str, float]:
        return {
            kind: corank.evaluate(
                model, tokenizer, text, window=protocol.length, max_windows=protocol.windows, bos=False
            ).value
            for kind, text in {**held_out, "trained": Text(learnt, "trained")}.items()
        }

    row: dict[str, Any] = {"method": method, "task": task, "rate": rate, "before": perplexities()}
    model = attach(model, tokenizer, method, protocol)
    row["parameters"] = adapters.trainable(model)
    order = torch.Generator().manual_seed(protocol.seed)
    pairs = random_pairs(tokenizer, protocol.pairs, protocol.digits, protocol.seed)

    def batches(step: int) -> dict[str, Tensor]:
        if task == "memorise":
            chosen = torch.randint(len(pairs), (protocol.batch,), generator=order).tolist()
            return padded([pairs[i] for i in chosen])
        ids = fresh[torch.randint(cut, (protocol.batch,), generator=order)]
        return {"input_ids": ids, "labels": ids}

    start = time.perf_counter()
    row["loss"] = train(model, batches, protocol.steps, rate)
    row["seconds"] = time.perf_counter() - start
    if task == "memorise":
        row["recalled"] = recalled(model, pairs)
    model = model.merge_and_unload()
    return {**row, "after": perplexities()}


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the table, and print it."""
    parser = argparse.ArgumentParser(prog="benchmarks adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="small", help="small, made on the spot; or as for corank.compress")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rates", default="1e-3,3e-3,1e-2,3e-2,1e-1", help="learning rates")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA that sets the budget")
    parser.add_argument("--targets", default="q,k,gate", help="roles of the matrices (default: those of the paper)")
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument(
        "--digits", type=int, default=8, help="hexadecimal digits of a key and of a value; 32 make a UUID"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window of text")
    parser.add_argument("--windows", type=int, default=32, help="windows of held-out text")
    parser.add_argument("--known", default="builtin", help="text of the kind the model knows")
    parser.add_argument("--held-out", default="builtin-test", help="more of it, to measure what is forgotten")
    parser.add_argument("--other", default="builtin-code", help="text of another kind, to be learnt")
    parser.add_argument("--pretraining", type=int, default=1500, help="steps that make the small model")
    parser.add_argument("--work", default="runs/adapters", help="where finished rows are kept")
    parser.add_argument("--out", default="benchmarks/results/adapters.json")
    parser.add_argument("--quick", action="store_true", help="toy sizes, nothing kept")
    args = parser.parse_args(argv)
    if not args.quick:
        run(args, Path(args.work), Path(args.out))
        return
    args.rates, args.steps, args.pairs, args.windows, args.pretraining, args.batch = "1e-2", 3, 4, 2, 3, 4
    with tempfile.TemporaryDirectory() as folder:
        run(args, Path(folder), Path(folder) / "adapters.json", layers=2)


def run(args: argparse.Namespace, work: Path, out: Path, layers: int = 5) -> None:
    """Make the rows that are not there yet, and print the table."""
    place = args.model
    if place == "small":
        place = str(work / f"small-{args.pretraining}")
        if not (Path(place) / "config.json").is_file():
            write_small_model(Path(place), read_text(args.known), args.pretraining, layers)
    protocol = Protocol(
        args.model if args.model != "small" else Path(place).name,
        args.rank,
        tuple(args.targets.split(",")),
        args.pairs,
        args.digits,
        args.steps,
        args.batch,
        args.length,
        args.windows,
        args.known,
        args.held_out,
        args.other,
    )
    rows = []
    for task in args.tasks.split(","):
        for method in args.methods.split(","):
            for rate in map(float, args.rates.split(",")):
                file = work / protocol.digest / f"{task}-{method}-{rate:g}.json"
                if not file.is_file():
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_json(file, make_row(protocol, place, method, task, rate))
                rows.append(read_json(file))
                print(f"{task} {method} {rate:g}: loss {rows[-1]['loss']:.3f}", flush=True)
                write_json(out, {"hardware": hardware(), "protocol": asdict(protocol), "rows": rows})
    show(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The best learning rate of each method."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = (row["task"], row["method"])
        if key not in best or row["loss"] < best[key]["loss"]:
            best[key] = row
    for task in dict.fromkeys(task for task, _ in best):
        table = Table(
            title=f"{task}: the best of the learning rates; perplexity of held-out text before -> after",
            title_justify="left",
        )
        heads = ["Method", "Trained values", "Rate", "Loss", "Known text"]
        heads += ["Recalled"] if task == "memorise" else ["Other text"]
        for head in [*heads, "Seconds"]:
            table.add_column(head, justify="left" if head == "Method" else "right")
        for (kind, method), row in best.items():
            if kind == task:
                moved = [f"{row['before'][k]:.2f} -> {row['after'][k]:.2f}" for k in ("known", "other")]
                last = f"{row['recalled']:.1%}" if task == "memorise" else moved[1]
                figures = [f"{row['parameters']:,}", f"{row['rate']:g}", f"{row['loss']:.3f}", moved[0], last]
                table.add_row(method, *figures, f"{row['seconds']:.0f}")
        Console().print(table)


if __name__ == "__main__":
    main()
