"""All architecture knowledge: which part of a block a matrix is, from the path of its module."""

from corank.model.archs.roles import ROLES, role_of

__all__ = ["ROLES", "role_of"]
