"""The numerical surroundings in which a statistic is accumulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """Run float32 matrix products in true float32, whatever the process allows (TF32, bfloat16 passes).

    A Gram matrix loses three digits under TF32. PyTorch has two switches for this, an older one and one per
    backend, which refuse to disagree with each other; both are set and both are put back.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in backends]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the per-backend switches are in use
        older = "highest"
    if older != "highest":
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(backends, saved, strict=True):
            backend.fp32_precision = precision


@contextmanager
def accumulation(device: torch.device) -> Iterator[None]:
    """Everything an update needs around it: no autograd, no autocast, true float32 products.

    Inference mode is left as well: a buffer born inside it could not be added to outside of it.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device_type=device.type, enabled=False),
        full_float32(),
    ):
        yield
