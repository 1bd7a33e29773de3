"""Models of known shapes with random weights, and their factorized twins."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, PretrainedConfig

from corank import checkpoint
from corank.factors import FactorizedLinear, LowRank, replace, weight_of
from corank.model import Site, outline

SMOL = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=49152)
LLAMA3 = dict(
    hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256
)
LLAMA2 = dict(
    hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000
)
BERT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=30522)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model by its sizes.

    Attributes:
        name: of the model that has them.
        sizes: of its configuration.
        layers: of the whole model.
        tied: the embedding is the output matrix.
        encoder: it is a BERT.
    """

    name: str
    sizes: dict[str, int]
    layers: int
    tied: bool = False
    encoder: bool = False

    def config(self, layers: int | None = None, vocabulary: int | None = None) -> PretrainedConfig:
        """Its configuration, with fewer layers or words if asked for."""
        rest: dict[str, Any] = {"num_hidden_layers": layers or self.layers, "max_position_embeddings": 4096}
        sizes = {**self.sizes, **({"vocab_size": vocabulary} if vocabulary else {})}
        if self.encoder:
            return BertConfig(**sizes, **rest, architectures=["BertModel"])
        return LlamaConfig(
            **sizes,
            **rest,
            tie_word_embeddings=self.tied,
            architectures=["LlamaForCausalLM"],
            eos_token_id=None,
            bos_token_id=None,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", SMOL, 30, tied=True),
        Shape("bert-base", BERT, 12, encoder=True),
        Shape("llama-3.1-8b", LLAMA3, 32),
        Shape("llama-2-7b", LLAMA2, 32),
    )
}
TOY = Shape(
    "toy", dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=96), 3
)
TOY_BERT = Shape(
    "toy-bert", dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, vocab_size=96), 3, encoder=True
)


def dense_model(config: PretrainedConfig, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights of the usual size, made where it will run."""
    torch.manual_seed(0)
    kind = BertModel if config.model_type == "bert" else AutoModelForCausalLM
    with torch.device("meta"):
        model: Any = kind(config) if kind is BertModel else kind.from_config(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    _buffers(model, config, device)
    return model.eval().requires_grad_(False)


def _buffers(model: Any, config: PretrainedConfig, device: str) -> None:
    """Buffers such as rotary frequencies are computed by constructors, which ran on the meta device; run those again."""
    for module in model.modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if "inv_freq" in leaf:
                fresh = type(module)(config=config)
                setattr(module, leaf, getattr(fresh, leaf).to(device))
            elif "position_ids" in leaf:
                setattr(module, leaf, torch.arange(buffer.shape[-1], device=device).expand(buffer.shape))
            else:
                buffer.zero_()


def rank_at(site: Site, keep: float, multiple_of: int) -> int:
    """The largest multiple within a share of the parameters."""
    m, n = site.shape
    rank = int(keep * m * n / (m + n))
    return max(rank // multiple_of * multiple_of, min(rank, multiple_of))


def factorized_twin(model: Any, keep: float, multiple_of: int, *, of: bool = False) -> Any:
    """A copy whose matrices inside the blocks are factors at `keep`, everything else shared with `model`.

    Args:
        model: dense.
        keep: share of the parameters of every matrix.
        multiple_of: of the ranks.
        of: truncate the matrices by SVD; else the factors are random, which is as fast.

    Raises:
        RuntimeError: a matrix was not factorized: what would be timed is no factorized model.
    """
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo)
    plan = outline(model.config, type(model))
    for site in plan.sites:
        old: Any = twin.get_submodule(site.name)
        W, bias = weight_of(old), getattr(old, "bias", None)
        rank = rank_at(site, keep, multiple_of)
        m, n = site.shape
        if of:
            U, sigma, Vh = torch.linalg.svd(W.float(), full_matrices=False)
            factors = LowRank((U[:, :rank] * sigma[:rank]).to(W.dtype), Vh[:rank].to(W.dtype))
        else:
            factors = LowRank(W.new_empty(m, rank).normal_(std=0.02), W.new_empty(rank, n).normal_(std=0.02))
        replace(twin, site.name, factors.module(bias))
    require_factorized(twin, plan.sites)
    return twin.eval().requires_grad_(False)


def require_factorized(model: nn.Module, sites: Any) -> None:
    """Refuse to time a model as factorized that is not.

    Raises:
        RuntimeError: names a matrix that is dense, or as large as dense.
    """
    stored = checkpoint.skeleton.collect(model)
    for site in sites:
        layer = model.get_submodule(site.name)
        size = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
        if site.name not in stored or not isinstance(layer, FactorizedLinear) or size >= site.numel:
            raise RuntimeError(f"{site.name} is not factorized; a table of this model would say nothing of low rank.")


def shared_copy(model: Any) -> Any:
    """A copy with modules of its own and the same weights."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def own_copy(model: Any) -> Any:
    """A copy with weights of its own, for runtimes that pack: packing moves them, which no other copy may notice."""
    return copy.deepcopy(model)
