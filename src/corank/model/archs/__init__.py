"""All architecture knowledge: which part of a block a matrix is, from the path of its module."""

from corank.model.archs.roles import FUSED, ROLES, role_of

__all__ = ["FUSED", "ROLES", "role_of"]
