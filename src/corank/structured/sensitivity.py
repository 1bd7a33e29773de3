"""What removing a unit would change to first order: sums of |w dL/dw| over its weights (LLM-Pruner, arXiv:2305.11627)."""

from __future__ import annotations

from torch import Tensor

from corank.engine.gradients import NoGradients, Part, sweep
from corank.engine.store import Table
from corank.errors import CorankError
from corank.factors import weight_of
from corank.model import Calibration, ResidentModel

Sums = dict[str, tuple[Tensor, Tensor]]
"""Name of a matrix -> sums of |w dL/dw| over each row [m] and over each column [n]."""


def first_order(source: ResidentModel, data: Calibration | None, batch: int) -> Sums:
    """Row and column sums of |W * D| of all matrices of the blocks, D the mean gradient of the loss per token.

    Args:
        source: the model.
        data: calibration windows of text.
        batch: sequences per forward pass.

    Raises:
        CorankError: gradients cannot be had.
    """
    if data is None or data.examples:
        raise CorankError("This method measures gradients of the loss on text; give text as calibration data.")
    found: Sums = {}
    tables: dict[int, Table] = {}

    def keep(layer: int, part: Part, table: Table) -> None:
        if part.first:
            tables[layer] = table
        else:
            for name, statistics in table.items():
                tables[layer][name]["gradient-mean"].merge(statistics["gradient-mean"])
        if not part.last:
            return
        with source.block(layer) as block:
            for site in source.outline.in_layer(layer):
                D = tables[layer][site.name]["gradient-mean"].result().D
                size = (weight_of(block.get_submodule(source.outline.local(site))).double() * D).abs()
                found[site.name] = size.sum(1), size.sum(0)
        del tables[layer]

    try:
        sweep(source, data, batch, source.outline.sites, ["gradient-mean"], lambda layer, stage: None, keep)
    except NoGradients as error:
        raise CorankError(
            f"This method measures gradients, but {error}; choose one that needs none, such as flap."
        ) from None
    return found
