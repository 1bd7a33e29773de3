"""Operations on factors as single kernels, each beside its plain form in torch.

Each is a custom operation of torch with a fake implementation and gradients, so it compiles, exports and trains; it runs
a Triton program where its `supports_...` says None, and the plain form everywhere else, with the same result. Triton is
imported when the first program is launched.

| operation | computes |
|---|---|
| `lowrank_linear` | B (A x) + b, for few tokens |
| `lowrank_ups` | the second factors of layers with one input |
| `lowrank_mlp` | a factorized MLP, without [tokens, intermediate] |
| `latent_attention` | attention on keys and values rebuilt tile by tile from latents |
| `pivot_linear` | a row-pivoted layer, whose product scatters as it stores |
"""

from corank.kernels.latent_attention import latent_attention, latent_attention_twin, supports_latent_attention
from corank.kernels.launching import have_triton, interpreted
from corank.kernels.lowrank_linear import lowrank_linear, lowrank_linear_twin, supports_lowrank_linear
from corank.kernels.lowrank_mlp import ACTIVATIONS, lowrank_mlp, lowrank_mlp_twin, supports_lowrank_mlp
from corank.kernels.lowrank_ups import lowrank_ups, lowrank_ups_twin, supports_lowrank_ups
from corank.kernels.pivot_linear import pivot_linear, pivot_linear_twin, supports_pivot_linear

__all__ = [
    "ACTIVATIONS",
    "have_triton",
    "interpreted",
    "latent_attention",
    "latent_attention_twin",
    "lowrank_linear",
    "lowrank_linear_twin",
    "lowrank_mlp",
    "lowrank_mlp_twin",
    "lowrank_ups",
    "lowrank_ups_twin",
    "pivot_linear",
    "pivot_linear_twin",
    "supports_latent_attention",
    "supports_lowrank_linear",
    "supports_lowrank_mlp",
    "supports_lowrank_ups",
    "supports_pivot_linear",
]
