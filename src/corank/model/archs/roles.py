"""Roles of matrices inside a transformer block.

Sites, their order and the siblings that read one input are found by running the model on the meta device
(`corank.model.outline`), not here: the table below only gives matrices the names people use when they choose
among them. An architecture that is not listed still works; its matrices keep their own leaf names as roles.
"""

from __future__ import annotations

import re

#: role -> the end of the module's path inside its block, first match wins (order matters: fused before single).
_PATTERNS: tuple[tuple[str, str], ...] = (
    ("qkv", r"(qkv_proj|qkv|c_attn|query_key_value|Wqkv|in_proj|qkv_layer)"),
    ("gate_up", r"(gate_up_proj|gate_up|w12|dense_h_to_4h_swiglu)"),
    ("q", r"(q_proj|query|q_lin|attention\.q|SelfAttention\.q|wq|q)"),
    ("k", r"(k_proj|key|k_lin|SelfAttention\.k|wk|k)"),
    ("v", r"(v_proj|value|v_lin|SelfAttention\.v|wv|v)"),
    (
        "o",
        r"(o_proj|out_proj|out_lin|attention\.output\.dense|(self_)?attention\.dense|attn\.c_proj|wo_attn|SelfAttention\.o|o)",
    ),
    ("gate", r"(gate_proj|wi_0|w1)"),
    ("up", r"(up_proj|experts\.\d+\.up|fc1|c_fc|dense_h_to_4h|intermediate\.dense|ffn\.lin1|wi|wi_1|w3|fc_in)"),
    ("down", r"(down_proj|experts\.\d+\.down|fc2|mlp\.c_proj|dense_4h_to_h|output\.dense|ffn\.lin2|wo|w2|fc_out)"),
)

#: fused matrix -> the role that stands for it where roles are chosen one by one
FUSED = {"qkv": "q", "gate_up": "gate"}

ROLES: tuple[str, ...] = tuple(role for role, _ in _PATTERNS)

_COMPILED = tuple((role, re.compile(rf"(^|\.){pattern}$")) for role, pattern in _PATTERNS)


def role_of(path: str) -> str:
    """Role of the matrix at `path` (inside its block), e.g. ``self_attn.q_proj`` -> ``q``; unknown: the last name in it."""
    for role, pattern in _COMPILED:
        if pattern.search(path):
            return role
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)
