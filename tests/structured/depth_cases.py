"""A tiny model of four blocks, some of which do nothing, for tests of methods that take blocks away."""

from __future__ import annotations

import torch
import transformers as tf

from corank.model import ResidentModel, Text
from corank.order import Order
from corank.structured.depth import Depth
from tiny import text, tokenizer

TEXT = Text(text(), "words")
DATA = dict(data=TEXT, samples=6, length=16, batch=4)


def four_blocks(identity=(), seed=0, layers=4, **settings):
    """A random llama; the blocks in `identity` add nothing to the residual stream."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=64, hidden_size=24, intermediate_size=37, num_attention_heads=4, num_key_value_heads=2)
    config = tf.LlamaConfig(**{**sizes, "num_hidden_layers": layers, "max_position_embeddings": 64, **settings})
    model = tf.LlamaForCausalLM(config).eval().double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(8.0)
        for i in identity:
            model.model.layers[i].self_attn.o_proj.weight.zero_()
            model.model.layers[i].mlp.down_proj.weight.zero_()
    return model


def case_of(model, method, keep, samples=6, **settings):
    """What the function of a method that chooses blocks is told."""
    order = Order.take(method, {"keep": keep}, None, settings, TEXT, samples=samples, length=16, seed=0, batch=4)
    task = order.task(ResidentModel(model), tokenizer(), torch.float64)
    return Depth(task), order.recipe


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def some_ids(seed=0, shape=(2, 9)):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed))
