"""Tiny random models of many architectures, and a compressor that puts every kind of factors into them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from corank.factors import (
    CUR,
    ColumnPivoted,
    Dense,
    FactorizedLinear,
    Factors,
    LowRank,
    RowPivoted,
    SharedBasis,
    is_conv1d,
    replace,
    weight_of,
)

SIZES = dict(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
MLP = dict(intermediate_size=37)
GQA = dict(num_key_value_heads=2)

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **MLP, **GQA, tie_word_embeddings=False)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **MLP, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, **MLP, **GQA)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, **MLP, **GQA)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, **MLP, num_key_value_heads=1, head_dim=8)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, **MLP, **GQA, pad_token_id=0)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=64)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SIZES, ffn_dim=37, word_embed_proj_dim=24, pad_token_id=0, do_layer_norm_before=True)
    ),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, **MLP)),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(**SIZES, **GQA, intermediate_size=40, num_local_experts=3)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=24, d_kv=6, num_heads=4, d_ff=37, num_layers=2, decoder_start_token_id=0)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            **{k: v for k, v in SIZES.items() if k.startswith(("hidden", "num"))},
            **MLP,
            image_size=8,
            patch_size=4,
        )
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model with biases that are not zero, in evaluation mode."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def sites(model: nn.Module, skip: tuple[str, ...] = ("lm_head", "cls", "router", "classifier")) -> dict[str, nn.Module]:
    """Name -> every dense linear layer but the heads."""
    done = tuple(f"{name}." for name, layer in model.named_modules() if isinstance(layer, FactorizedLinear))
    return {
        name: layer
        for name, layer in model.named_modules()
        if (isinstance(layer, nn.Linear) or is_conv1d(layer))
        and not any(part in name for part in skip)
        and not name.startswith(done)
    }


def factors_of(kind: str, W: Tensor, k: int) -> Factors:
    """Factors of the kind with some rank-k relation to W (which one does not matter here)."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    B, A = U[:, :k] * S[:k], Vh[:k]
    m, n = W.shape
    if kind == "dense":
        result: Factors = Dense(W.double())
    elif kind == "low_rank":
        result = LowRank(B, A)
    elif kind == "cur":
        result = CUR(W[:, :k].double(), torch.eye(k).double(), W[:k].double())
    elif kind == "row_pivoted":
        pivots = torch.randperm(m)[:k].sort(descending=True).values
        result = RowPivoted(pivots.int(), B[:k] @ A, B[k:])
    else:
        pivots = torch.randperm(n)[:k].sort(descending=True).values
        result = ColumnPivoted(pivots.int(), B, A[:, k:])
    return result.astype(W.dtype)


def compress(model: Any, kinds: tuple[str, ...] = ("low_rank", "cur", "row_pivoted", "column_pivoted")) -> Any:
    """Leave every fourth site dense; give the others the kinds in turn, at rank 0, full and in between."""
    torch.manual_seed(1)
    turn, ranks = itertools.cycle(kinds), itertools.cycle([5, 3, 0, None, 7])
    for index, (name, layer) in enumerate(sites(model).items()):
        if index % 4 == 3:
            continue
        W, bias, k = weight_of(layer), layer.bias, next(ranks)
        full = min(W.shape)
        replace(model, name, factors_of(next(turn), W, full if k is None else k).module(bias))
    return model


def share(model: Any, names: list[str]) -> Any:
    """Give several sites one basis, the first being its owner."""
    weights = [weight_of(model.get_submodule(name)).double() for name in names]
    U, S, Vh = torch.linalg.svd(torch.cat(weights), full_matrices=False)
    blocks = (U * S)[:, :4].split([W.shape[0] for W in weights])
    dtype = weight_of(model.get_submodule(names[0])).dtype
    shared = SharedBasis(Vh[:4].to(dtype), {n: B.to(dtype) for n, B in zip(names, blocks, strict=True)})
    for name, layer in shared.modules({n: model.get_submodule(n).bias for n in names}).items():
        replace(model, name, layer)
    return model


def tokenizer() -> Any:
    """A word-level tokenizer of 64 words."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w1"))
    words.pre_tokenizer = Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w1", pad_token="w0")


def outputs(model: Any) -> Tensor:
    """Logits on fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    if hasattr(model.config, "image_size"):
        pixels = torch.randn(2, 3, 8, 8, generator=generator).to(model.dtype)
        call: dict[str, Tensor] = {"pixel_values": pixels}
    else:
        ids = torch.randint(2, 60, (2, 11), generator=generator)
        call = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            call["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        return model(**call).logits
