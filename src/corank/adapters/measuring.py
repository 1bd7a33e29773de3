"""Statistics of the inputs of layers of a model in memory, by the engine that compression uses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from corank.adaptation import Adaptation
from corank.engine.directory import MemorySink
from corank.engine.job import Job
from corank.engine.measure import measure_inputs, results_of, store_of
from corank.errors import CorankError
from corank.factorize import Measured
from corank.factors import FactorizedLinear
from corank.model import Calibration, ResidentModel
from corank.recipe import Recipe


def measured_inputs(
    model: PreTrainedModel,
    names: Iterable[str],
    adaptation: Adaptation,
    data: Calibration,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, Measured]:
    """Name -> what the method wants to know of the inputs of these layers; matrices with one input share it.

    Args:
        model: dense where the layers are; its training mode is left as it was.
        names: dense linear layers.
        adaptation: names the statistics.
        data: windows of tokens, or batches of inputs.
        batch: windows per forward pass.
        seed: of the engine.

    Raises:
        CorankError: a layer that the engine does not measure, or inputs that are not finite.
    """
    wanted = list(names)
    if any(isinstance(layer, FactorizedLinear) for layer in model.modules()):
        raise CorankError(
            "Inputs are measured on dense models; attach to this one without data, as compressed layers need none."
        )
    training = {module: module.training for module in model.modules()}
    try:
        source = ResidentModel(model, example=data.examples[0] if data.examples else None)
        sites = {site.name: site for site in [*source.outline.sites, *source.outline.optional]}
        missing = [name for name in wanted if name not in sites]
        if missing:
            raise CorankError(
                f"The inputs of {missing[0]} cannot be measured; leave it out with ignore, or give no data."
            )
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            job = Job(
                source,
                Recipe(statistics=adaptation.statistics),
                [site for site in sites.values() if site.name in set(wanted)],
                None,
                data,
                MemorySink(),
                source.dtype,
                scratch=Path(scratch),
                seed=seed,
                batch=batch,
            )
            store = store_of(job)
            measure_inputs(job, store)
            found: dict[str, Measured] = {}
            for layer in range(job.layers):
                results = results_of(job, store, layer, None) if job.in_layer(layer) else None
                found |= {site.name: results(site, {}) for site in job.in_layer(layer) if results is not None}
            return found
    finally:
        for module, mode in training.items():
            module.training = mode
