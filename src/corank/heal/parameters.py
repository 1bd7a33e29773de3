"""Which parameters of a compressed model train."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from corank.errors import unknown
from corank.factors import FactorizedLinear, SharedLowRankLinear
from corank.model import ResidentModel

WHAT = {
    "blocks": "everything in the blocks, and factorized matrices elsewhere",
    "factors": "the factorized matrices, with the norms and biases of their blocks",
    "layers": "the factorized layers, their matrices and biases",
    "matrices": "the factorized matrices alone",
    "links": "the links of CUR factors alone",
}
"""The rows and columns of CUR factors, which are those of the dense matrix, train in none of them."""


def require_what(what: str) -> None:
    """Check a choice.

    Raises:
        CorankError: it is no key of `WHAT`; the nearest are suggested.
    """
    if what not in WHAT:
        raise unknown("choice of what to train", what, WHAT)


def trainable(root: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """Parameters below a module that train: name -> parameter.

    Args:
        root: a block, a model, or any other part of one.
        what: a key of `WHAT`.
    """
    roles = dict(_roles(root))
    chosen = {}
    for name, p in root.named_parameters():
        role = roles.get(name, "vector" if p.dim() == 1 else "dense")
        wanted = {
            "blocks": role != "frozen",
            "factors": role not in ("frozen", "dense"),
            "layers": role in ("matrix", "link", "bias"),
            "matrices": role in ("matrix", "link"),
            "links": role == "link",
        }[what]
        if p.is_floating_point() and wanted:
            chosen[name] = p
    return chosen


def _roles(root: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, "matrix", "link", "frozen" or "bias") of the parameters of factorized layers."""
    for name, layer in root.named_modules():
        if not isinstance(layer, FactorizedLinear):
            continue
        for leaf, p in layer.named_parameters():
            part = leaf.partition(".")[0]
            role = "bias" if p.dim() == 1 else "link" if part == "link" else "matrix"
            yield f"{name}.{leaf}" if name else leaf, "frozen" if part in layer.frozen and role != "bias" else role


def of_block(model: nn.Module, path: str, what: str) -> dict[str, nn.Parameter]:
    """Parameters of a block that train while the blocks behind it are not looked at.

    A basis that other blocks read as well is not one block's to move.

    Args:
        model: the model.
        path: of the block; empty for a model that is one block.
        what: a key of `WHAT`.
    """
    elsewhere = {
        id(p)
        for name, layer in model.named_modules()
        if path and isinstance(layer, SharedLowRankLinear) and not name.startswith(f"{path}.")
        for p in layer.down.parameters()
    }
    return {n: p for n, p in trainable(model.get_submodule(path), what).items() if id(p) not in elsewhere}


def of_model(student: ResidentModel, what: str) -> dict[str, nn.Parameter]:
    """Parameters of a model that train together: those of the blocks, and factorized embeddings and heads.

    Args:
        student: the model.
        what: a key of `WHAT`.
    """
    model = student.model
    blocks = [student.outline.path(i) for i in range(student.outline.layers)]
    chosen = {
        f"{path}.{n}" if path else n: p
        for path in blocks
        for n, p in trainable(model.get_submodule(path), what).items()
    }
    for name, layer in model.named_modules():
        outside = not any(not path or name.startswith(f"{path}.") for path in blocks)
        if outside and isinstance(layer, FactorizedLinear):
            chosen |= {f"{name}.{n}": p for n, p in trainable(layer, what).items()}
    return chosen
