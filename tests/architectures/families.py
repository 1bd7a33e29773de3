"""Tiny random models of every architecture family that corank is tested with, and something to feed them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

SIZES = dict(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
MLP = dict(intermediate_size=37)
GQA = dict(num_key_value_heads=2)
HEADS = dict(num_key_value_heads=2, head_dim=8)
VISION = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, image_size=8)
EXPERTS = dict(moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2)
MASKED = "AutoModelForMaskedLM"
SEQ2SEQ = "AutoModelForSeq2SeqLM"
IMAGES = "AutoModelForImageClassification"
SPEECH = "AutoModelForSpeechSeq2Seq"


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        title: for the table.
        build: a model with random weights.
        auto: the Auto class that loads it.
        note: what is special about it.
    """

    title: str
    build: Callable[[], Any]
    auto: str = "AutoModelForCausalLM"
    note: str = ""


def _family(
    title: str, cls: str, config: str, auto: str = "AutoModelForCausalLM", note: str = "", **sizes: Any
) -> Family:
    return Family(title, lambda: getattr(tf, cls)(getattr(tf, config)(**sizes)), auto, note)


FAMILIES = {
    "llama": _family("Llama", "LlamaForCausalLM", "LlamaConfig", note="grouped-query attention", **SIZES, **MLP, **GQA),
    "llama-tied": _family(
        "Llama, tied",
        "LlamaForCausalLM",
        "LlamaConfig",
        tie_word_embeddings=True,
        note="tied embeddings",
        **SIZES,
        **MLP,
    ),
    "mistral": _family(
        "Mistral",
        "MistralForCausalLM",
        "MistralConfig",
        note="four query heads to a key head",
        num_key_value_heads=1,
        **SIZES,
        **MLP,
    ),
    "qwen2": _family("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", note="biases on q, k, v", **SIZES, **MLP, **GQA),
    "qwen3": _family("Qwen3", "Qwen3ForCausalLM", "Qwen3Config", note="norms on q, k", **SIZES, **MLP, **HEADS),
    "gemma2": _family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        note="sliding windows, tied, scaled embeddings",
        sliding_window=4,
        query_pre_attn_scalar=8,
        **SIZES,
        **MLP,
        **HEADS,
    ),
    "gemma3": _family(
        "Gemma 3 (text)",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        note="sliding and full attention, tied, scaled embeddings",
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        **SIZES,
        **MLP,
        **HEADS,
    ),
    "phi3": _family(
        "Phi-3", "Phi3ForCausalLM", "Phi3Config", note="fused qkv and gate_up", pad_token_id=0, **SIZES, **MLP, **GQA
    ),
    "gpt2": _family(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        note="Conv1D, tied",
        **dict(vocab_size=64, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    ),
    "gpt-neox": _family(
        "GPT-NeoX", "GPTNeoXForCausalLM", "GPTNeoXConfig", note="fused qkv; other names on disk", **SIZES, **MLP
    ),
    "opt": _family(
        "OPT",
        "OPTForCausalLM",
        "OPTConfig",
        note="biases, tied",
        ffn_dim=37,
        word_embed_proj_dim=24,
        pad_token_id=0,
        **SIZES,
    ),
    "falcon": _family(
        "Falcon",
        "FalconForCausalLM",
        "FalconConfig",
        note="its own linear layer, fused qkv, tied",
        new_decoder_architecture=True,
        num_kv_heads=2,
        **SIZES,
    ),
    "mixtral": _family(
        "Mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        note="experts; other names on disk",
        intermediate_size=20,
        num_local_experts=4,
        **SIZES,
        **GQA,
    ),
    "qwen2-moe": _family(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        note="experts, a shared expert, a dense layer",
        shared_expert_intermediate_size=22,
        mlp_only_layers=[1],
        **SIZES,
        **MLP,
        **GQA,
        **EXPERTS,
    ),
    "qwen3-moe": _family(
        "Qwen3-MoE", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", note="experts", **SIZES, **MLP, **HEADS, **EXPERTS
    ),
    "bert": _family("BERT", "BertForMaskedLM", "BertConfig", MASKED, note="encoder, tied", **SIZES, **MLP),
    "roberta": _family(
        "RoBERTa",
        "RobertaForMaskedLM",
        "RobertaConfig",
        MASKED,
        note="encoder, tied",
        pad_token_id=1,
        **{**SIZES, "max_position_embeddings": 66},
        **MLP,
    ),
    "t5": _family(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        SEQ2SEQ,
        note="encoder, decoder, cross attention, tied",
        **dict(vocab_size=64, d_model=24, d_kv=6, num_heads=4, d_ff=37, num_layers=2, decoder_start_token_id=0),
    ),
    "vit": _family("ViT", "ViTForImageClassification", "ViTConfig", IMAGES, note="images", patch_size=4, **VISION),
    "whisper": _family(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        SPEECH,
        note="sound; encoder, decoder, cross attention",
        **dict(vocab_size=64, d_model=24, num_mel_bins=8, max_source_positions=16, max_target_positions=32),
        **{f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 37))},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
    ),
    "resnet": _family(
        "ResNet",
        "ResNetForImageClassification",
        "ResNetConfig",
        IMAGES,
        note="convolutions",
        **dict(embedding_size=8, hidden_sizes=[12, 16], depths=[1, 2], layer_type="basic"),
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model whose weights are large enough for its layers to do something."""
    torch.manual_seed(seed)
    model = FAMILIES[name].build().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.ndim == 2 or (p.ndim == 3 and "experts" in key):
                p.mul_(6.0)
            elif key.endswith("bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # as it would be after training
                module.running_mean.normal_(std=0.1, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    if dtype == torch.float64:  # the grouped product of the default implementation has no double precision
        model.set_experts_implementation("eager")
    return model.to(dtype)


def batches(name: str, count: int = 3, size: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]] | None:
    """Calibration data for models of images and sound; None: text will do."""
    g = torch.Generator().manual_seed(seed)
    if name in ("vit", "resnet"):
        side = 8 if name == "vit" else 32
        return [{"pixel_values": torch.randn(size, 3, side, side, generator=g)} for _ in range(count)]
    if name == "whisper":
        return [
            {
                "input_features": torch.randn(size, 8, 32, generator=g),
                "decoder_input_ids": torch.randint(3, 60, (size, 7), generator=g),
            }
            for _ in range(count)
        ]
    return None


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Inputs on which outputs are compared."""
    examples = batches(name, 1, 2, seed=7)
    if examples is not None:
        return examples[0]
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if name == "t5" else {})}


def logits(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, in the dtype of the model."""
    given = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        return model(**given).logits
