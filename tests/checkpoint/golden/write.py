"""Writes the golden checkpoints: one tiny directory for everything the format can hold, never to be written again.

python tests/checkpoint/golden/write.py      writes those that are not there yet

A golden directory is what a user has on disk. When the format changes, those that exist stay as they are and must go on
loading; what is new (a kind, a form, a version) gets a directory of its own, and `test_checkpoint_golden.py` says so.
The weights are random; what counts is `expected.json`, the inputs and logits of the day they were written.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]  # where tests find each other

from checkpoint_models import factors_of, share, sites  # noqa: E402

from corank import checkpoint  # noqa: E402
from corank.checkpoint.quantizer import FALLBACK_MODULE  # noqa: E402
from corank.factors import (  # noqa: E402
    FactorizedConv2d,
    FactorizedEmbedding,
    LowRank,
    TiedEmbedding,
    is_stack,
    replace,
    take_apart_for,
    weight_of,
    wire_tied,
)

HERE = Path(__file__).resolve().parent
SIZES = dict(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32)
MORE = dict(bos_token_id=1, eos_token_id=2)
LLAMA = dict(**SIZES, **MORE, intermediate_size=12, num_key_value_heads=1)


def random(model: Any) -> Any:
    """In evaluation mode, with weights large enough for every layer to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(0.5 * torch.randn(p.shape, generator=generator))
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    return random(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, tie_word_embeddings=tied)))


def of_kind(kind: str, model: Any = None) -> Any:
    """Every linear layer but the head, at several ranks: 0, in between, and full."""
    torch.manual_seed(0)
    model = llama() if model is None else model
    for (name, layer), k in zip(sites(model).items(), itertools.cycle([3, 2, 0, None, 4]), strict=False):
        W = weight_of(layer)
        replace(model, name, factors_of(kind, W, min(W.shape) if k is None else k).module(layer.bias))
    return model


def qwen2() -> Any:
    """Biases on q, k and v."""
    return of_kind("row_pivoted", random(tf.Qwen2ForCausalLM(tf.Qwen2Config(**LLAMA))))


def gpt2() -> Any:
    """Layers that stored their weights transposed; the embeddings stay tied."""
    sizes = dict(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=32, **MORE)
    return of_kind("low_rank", random(tf.GPT2LMHeadModel(tf.GPT2Config(**sizes))))


def dense() -> Any:
    """A dense layer with a bias that the architecture does not have."""
    model = llama()
    for name in ("gate_proj", "up_proj"):
        layer = model.get_submodule(f"model.layers.0.mlp.{name}")
        bias = torch.linspace(-1, 1, 12)
        replace(model, f"model.layers.0.mlp.{name}", factors_of("dense", weight_of(layer), 0).module(bias))
    return model


def shared() -> Any:
    """One basis for q, k and v."""
    return share(llama(), [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"])


def embedding() -> Any:
    """An embedding and a head, each with factors of its own."""
    model = llama()
    table = model.model.embed_tokens
    factors = factors_of("low_rank", table.weight.detach().T, 3)
    model.model.embed_tokens = FactorizedEmbedding.replacing(table, factors)
    replace(model, "lm_head", factors_of("low_rank", weight_of(model.lm_head), 3).module())
    return model


def tied() -> Any:
    """An embedding that looks up the head's factors."""
    model = llama(tied=True)
    head = factors_of("low_rank", weight_of(model.lm_head), 4)
    layer = TiedEmbedding((8, 16), 4, "lm_head", like=weight_of(model.lm_head))
    model.model.embed_tokens = layer.standing_for(model.model.embed_tokens)
    replace(model, "lm_head", head.module())
    wire_tied(model)
    return model


def experts() -> Any:
    """Experts taken out of their stacks, some of them dense."""
    sizes = {**LLAMA, "intermediate_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = random(tf.MixtralForCausalLM(tf.MixtralConfig(**sizes)))
    stack = next(name for name, module in model.named_modules() if is_stack(module))
    take_apart_for(model, [f"{stack}.0.down"])
    for name, k in ((f"{stack}.0.gate_up", 3), (f"{stack}.1.gate_up", 2), (f"{stack}.0.down", 2)):
        replace(model, name, factors_of("low_rank", weight_of(model.get_submodule(name)), k).module())
    return model


def conv() -> Any:
    """Convolutions, with strides and padding; a rank of 0 among them."""
    config = tf.ResNetConfig(
        num_channels=2, embedding_size=4, hidden_sizes=[6], depths=[2], layer_type="basic", num_labels=3
    )
    model = random(tf.ResNetForImageClassification(config))
    found = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    for name, k in zip(found[1:], (2, 3, 0, 2), strict=False):
        layer = model.get_submodule(name)
        model.set_submodule(name, FactorizedConv2d.replacing(layer, factors_of("low_rank", weight_of(layer), k), None))
    return model


def quantized(scheme: str) -> Any:
    """Factors as integers; a factor of one column stays as it is."""
    model = llama()
    for name, layer in sites(model).items():
        k = 4 if name.endswith(("q_proj", "up_proj")) else 1
        replace(
            model, name, LowRank(*(t.contiguous() for t in factors_of("low_rank", weight_of(layer), k).pair())).module()
        )
    checkpoint.quantize_factors(model, scheme, group=4)
    return model


CASES: dict[str, Callable[[], Any]] = {
    "dense": dense,
    **{kind: (lambda kind=kind: of_kind(kind)) for kind in ("low_rank", "cur", "row_pivoted", "column_pivoted")},
    "row_pivoted-bias": qwen2,
    "low_rank-conv1d": gpt2,
    "shared": shared,
    "embedding": embedding,
    "tied": tied,
    "experts": experts,
    "conv": conv,
    "int8": lambda: quantized("int8"),
    "int4": lambda: quantized("int4"),
}


def inputs(model: Any) -> dict[str, Any]:
    """As JSON."""
    if model.main_input_name == "pixel_values":
        image = (torch.arange(2 * 10 * 10) * 0.7).sin().reshape(1, 2, 10, 10)
        return {"pixel_values": [round(x, 4) for x in image.flatten().tolist()], "shape": list(image.shape)}
    return {"input_ids": [[1, 7, 3, 15, 9], [4, 4, 0, 12, 2]]}


@torch.no_grad()
def logits(model: Any, given: dict[str, Any]) -> torch.Tensor:
    """For inputs as `inputs` gives them."""
    call = {name: torch.tensor(value) for name, value in given.items() if name != "shape"}
    if "shape" in given:
        call = {name: value.reshape(given["shape"]) for name, value in call.items()}
    return model(**call).logits


def write(name: str, folder: Path) -> None:
    """One golden directory: config.json, model.safetensors, expected.json."""
    model = CASES[name]()
    provenance = {"seed": 0, "data": {}, "versions": {"transformers": tf.__version__, "torch": torch.__version__}}
    checkpoint.save(model, None, folder, recipe={"method": "golden"}, plan={"choices": {}}, provenance=provenance)
    for file in (f"{FALLBACK_MODULE}.py", "generation_config.json"):  # they are not what is tested
        (folder / file).unlink(missing_ok=True)
    loaded, _ = checkpoint.load(folder, tokenizer=False)
    given = inputs(loaded)
    found = logits(loaded, given)
    expected = {
        "inputs": given,
        "logits": [float(f"{x:.7g}") for x in found.flatten().tolist()],
        "shape": list(found.shape),
    }
    (folder / "expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    for name in CASES:
        folder = HERE / f"v{checkpoint.FORMAT_VERSION}" / name
        if not folder.exists():
            try:
                write(name, folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            print(f"wrote {folder.relative_to(HERE)}: {sum(f.stat().st_size for f in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
