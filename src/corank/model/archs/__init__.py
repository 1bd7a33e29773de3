"""All architecture knowledge: what holds a matrix, which part of a block it is, and what a model can be run on."""

from corank.model.archs.inputs import SOURCE, TARGET, dummy_inputs, meta_inputs
from corank.model.archs.matrices import is_convolution, is_embedding, is_linear, is_matrix
from corank.model.archs.roles import FUSED, ROLES, role_of

__all__ = [
    "FUSED",
    "ROLES",
    "SOURCE",
    "TARGET",
    "dummy_inputs",
    "is_convolution",
    "is_embedding",
    "is_linear",
    "is_matrix",
    "meta_inputs",
    "role_of",
]
