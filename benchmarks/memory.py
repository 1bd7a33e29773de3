"""Peak memory of compressing a model of at least 3 GB on disk: one block, its statistics and the activations.

    python -m benchmarks memory --gigabytes 3

A random-weight Llama is written shard by shard, then compressed in a fresh process, whose high-water mark the kernel
reports. Beside it the same for a process that only imports corank (and so torch and transformers).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.hardware import hardware
from corank.jsonfile import write_json

CHILD = """
import json, sys
import corank
from corank.evaluate.memory import high_water_bytes
imported = high_water_bytes()
result = {"imported": imported}
if len(sys.argv) > 1:
    folder, out, method, samples, length = sys.argv[1:]
    report = corank.compress(folder, method, keep=0.8, out=out, samples=int(samples), length=int(length), batch=1)
    result |= {"peak": high_water_bytes(), "stages": dict(report.stages), "accounting": dict(report.accounting)}
print(json.dumps(result))
"""


def write_model(folder: Path, gigabytes: float) -> int:
    """Write a random Llama of at least this size in bfloat16, one block per shard; returns its bytes."""
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=4)
    per_layer = 2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 2816 * 1024
    layers = int(gigabytes * 1e9 / 2 / per_layer) + 1
    config = LlamaConfig(vocab_size=32000, num_hidden_layers=layers, max_position_embeddings=2048, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "outside"
        shards.setdefault(part, {})[name] = tensor.shape
    weight_map, total = {}, 0
    for part, shapes in shards.items():
        tensors = {}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
            tensors[name] = value.bfloat16()
            total += tensors[name].nbytes
        save_file(tensors, folder / f"model-{part}.safetensors", metadata={"format": "pt"})
        weight_map |= {name: f"model-{part}.safetensors" for name in shapes}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={chr(c): c - 32 for c in range(32, 127)}, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?").save_pretrained(folder)
    return total


def child(*arguments: str) -> dict:
    """Run CHILD in a fresh process and read its answer."""
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks memory", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--method", default="svd-llm")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", default="benchmarks/results/memory.json")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        source.mkdir()
        size = write_model(source, args.gigabytes)
        fixed = child()["imported"]
        start = time.perf_counter()
        found = child(str(source), str(Path(folder) / "out"), args.method, str(args.samples), str(args.length))
        seconds = time.perf_counter() - start
    above = found["peak"] - fixed
    result = {
        "hardware": hardware(),
        "model_bytes": size,
        "method": args.method,
        "samples": args.samples,
        "length": args.length,
        "import_bytes": fixed,
        "peak_bytes": found["peak"],
        "above_import_bytes": above,
        "share_of_model": above / size,
        "seconds": seconds,
        "stages": found["stages"],
    }
    write_json(args.out, result)
    print(
        f"model {size / 1e9:.2f} GB; importing corank {fixed / 1e9:.2f} GB; peak {found['peak'] / 1e9:.2f} GB, "
        f"{above / 1e9:.2f} GB above importing: {above / size:.1%} of the model; {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
