"""Jobs on tiny models, measured and ready to be looked at."""

from __future__ import annotations

import corank.engine.measure as measure
from corank.engine.directory import MemorySink
from corank.engine.job import Job
from corank.engine.measure import store_of
from corank.engine.store import StatisticsStore
from corank.model import ResidentModel, Text
from corank.order import Order
from tiny import text, tokenizer

TEXT = Text(text(8000), "words")
DATA = dict(samples=8, length=16, seed=0, batch=3)


def job_for(model, folder, method="svd-llm", keep=0.7, source=None, **settings) -> Job:
    """The job of `corank.compress` on a model in memory."""
    order = Order.take(method, {"keep": keep}, None, settings, TEXT, **DATA)
    source = source or ResidentModel(model)
    return order.job(source, tokenizer(), MemorySink(), source.dtype, scratch=folder)


def measured(job) -> tuple[StatisticsStore, list]:
    """The store and the curves of a job, as the engine has them when it chooses ranks."""
    store = store_of(job)
    if job.of_gradients:
        measure.measure_gradients(job, store)
    if job.of_inputs:
        measure.measure_inputs(job, store)
    return store, list(measure.curves_of(job, store).values())
