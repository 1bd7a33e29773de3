"""Tiny random models of many architectures, a tokenizer and a text, for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from corank.model import Calibration

SIZES = dict(vocab_size=64, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)
MLP = dict(intermediate_size=37)
GQA = dict(num_key_value_heads=2)

MODELS: dict[str, Callable[[], Any]] = {
    "llama-gqa": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **MLP, **GQA, tie_word_embeddings=False)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **MLP, tie_word_embeddings=True)),
    "qwen2-bias": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, **MLP, **GQA)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SIZES, **MLP, **GQA)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, **MLP, num_key_value_heads=1, head_dim=8)),
    "phi3-fused": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, **MLP, **GQA, pad_token_id=0)),
    "gpt2-conv1d": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=64, n_embd=24, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: tf.OPTForCausalLM(tf.OPTConfig(**SIZES, ffn_dim=37, word_embed_proj_dim=24, pad_token_id=0)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, **MLP)),
}


def tiny(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose weights are large enough for its layers to do something."""
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for name_, p in model.named_parameters():
            if p.ndim == 2:
                p.mul_(8.0)
            elif "bias" in name_:
                p.normal_(std=0.3)
    return model.to(dtype)


def windows(
    samples: int = 6, length: int = 16, seed: int = 0, padded: bool = False, vocabulary: int = 64
) -> Calibration:
    """Random calibration windows, the last ones padded on the right if asked for."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (samples, length), generator=g)
    mask = None
    if padded:
        mask = torch.ones(samples, length, dtype=torch.bool)
        for i in range(samples):
            mask[i, length - i :] = i == 0
    return Calibration(ids, mask, {"text": "random"})


def tokenizer() -> Any:
    """One token per byte of ASCII text, 64 tokens."""
    alphabet = [chr(c) for c in range(32, 96)]
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="!", pad_token="!")


def text(characters: int = 4000, seed: int = 0) -> str:
    """Upper-case words, so that the tokenizer knows every letter."""
    g = torch.Generator().manual_seed(seed)
    words = ["ALPHA", "BETA", "GAMMA", "DELTA", "RANK", "MATRIX", "OF", "AND", "THE", "COLUMN"]
    chosen = torch.randint(len(words), (characters // 4,), generator=g)
    return " ".join(words[i] for i in chosen)[:characters]


def saved(name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A tiny model with its tokenizer as a directory."""
    tiny(name, seed, dtype).save_pretrained(folder, max_shard_size=shard)
    tokenizer().save_pretrained(folder)
    return folder


def stand_in(cache: Path, *, words: Any = None, **sizes: Any) -> Path:
    """A tiny random model under the name `smollm2-135m` in a cache: what the commands of the docs then work on.

    Args:
        cache: what CORANK_CACHE is set to.
        words: its tokenizer; None: `tokenizer()`.
        sizes: of the configuration, where they matter.
    """
    config = dict(vocab_size=64, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4)
    config |= dict(num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True)
    folder = cache / "smollm2-135m"
    tf.LlamaForCausalLM(tf.LlamaConfig(**{**config, **sizes})).save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder
