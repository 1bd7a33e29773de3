"""A continuation to look at: numbers do not show that a model repeats itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from corank.errors import CorankError
from corank.evaluate.perplexity import context_length, input_device


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt.

    Attributes:
        prompt: the prompt as given.
        completion: the new text alone.
        tokens: number of new tokens, an end-of-text token included.
        seed: seed of the random choice (without effect if ``temperature`` is 0).
        temperature: 0 for greedy decoding.
        repeated: fraction of the 4-grams of new tokens seen before in the completion; near 1 for a loop.
        seconds: wall-clock time.
    """

    prompt: str
    completion: str
    tokens: int
    seed: int
    temperature: float
    repeated: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict."""
        return dataclasses.asdict(self)


def sample(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    seed: int = 0,
    *,
    temperature: float = 0.0,
    chat: bool = False,
) -> Sample:
    """Let a model continue a prompt. The same arguments give the same text; the global random state is left
    alone.

    Args:
        model: a transformers model with ``generate``.
        tokenizer: its tokenizer.
        prompt: what to continue; special tokens are added as the tokenizer does by itself.
        max_new_tokens: at most this many new tokens, >= 1.
        seed: seed of the random choice.
        temperature: 0 for greedy decoding, else the softmax temperature.
        chat: put the prompt through the tokenizer's chat template as the user's turn.

    Raises:
        CorankError: the model cannot generate, the prompt is empty of tokens, the continuation would leave
            the model's context, there is no chat template, or a meaningless number.
    """
    generate = getattr(model, "generate", None)
    if not callable(generate):
        raise CorankError(f"{type(model).__name__} has no generate(); give a causal model of transformers.")
    if max_new_tokens < 1:
        raise CorankError(f"max_new_tokens={max_new_tokens} is not possible; give 1 or more.")
    if temperature < 0:
        raise CorankError(f"temperature={temperature} is not possible; give 0 (greedy) or more.")
    if chat and not getattr(tokenizer, "chat_template", None):
        raise CorankError("This tokenizer has no chat template; give chat=False.")
    text = prompt
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    if not ids:
        raise CorankError("The prompt has no tokens; give some text to continue.")
    context = context_length(model)
    if context is not None and len(ids) + max_new_tokens > context:
        raise CorankError(
            f"The prompt has {len(ids)} tokens and the model a context of {context}; "
            f"give a shorter prompt or max_new_tokens={max(1, context - len(ids))} or less."
        )
    device = input_device(model)
    inputs = torch.tensor([ids], dtype=torch.long, device=device)
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(tokenizer, "eos_token_id", None) if pad is None else pad
    choice: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}

    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            output = generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad if pad is not None else 0,
                **choice,
            )
    finally:
        model.train(was_training)
    new = output[0, len(ids) :].tolist()
    return Sample(
        prompt=prompt,
        completion=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        seed=seed,
        temperature=temperature,
        repeated=repeated_fraction(new),
        seconds=time.perf_counter() - started,
    )


def repeated_fraction(tokens: Sequence[int], n: int = 4) -> float:
    """1 - distinct n-grams / n-grams of a token sequence; 0.0 if it is shorter than n + 1 tokens."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0
