"""A tiny random Llama and a trivial word tokenizer: nothing is downloaded, everything takes milliseconds."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Tiny products only: threads would but wait for one another.
torch.set_num_threads(1)

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "e", "f", "g", "h", "i"]


def build_tokenizer(*, adds_bos: bool = True, bos: bool = True) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def build_model(seed: int = 0, **overrides) -> LlamaForCausalLM:
    settings = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def make_model():
    return build_model


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(7)
    return " ".join(WORDS[3 + int(i)] for i in torch.randint(9, (203,), generator=generator))
