"""True float32 inside, the caller's settings outside, whichever of PyTorch's two switches the caller used."""

from __future__ import annotations

import pytest
import torch

from corank.statistics.precision import full_float32

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


def settings():
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError as error:
        older = type(error)
    return older, *(backend.fp32_precision for backend in BACKENDS)


@pytest.fixture(autouse=True)
def put_back():
    saved = [backend.fp32_precision for backend in BACKENDS]
    yield
    torch.set_float32_matmul_precision("highest")
    for backend, value in zip(BACKENDS, saved, strict=True):
        backend.fp32_precision = value


@pytest.mark.parametrize("older", ["highest", "high", "medium"])
def test_older_switch(older):
    torch.set_float32_matmul_precision(older)
    before = settings()
    with full_float32():
        assert settings() == ("highest", "ieee", "ieee")
    assert settings() == before


def test_switch_per_backend():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    before = settings()
    with full_float32():
        assert settings()[1:] == ("ieee", "ieee")
    assert settings() == before


def test_put_back_after_an_error():
    torch.set_float32_matmul_precision("high")
    before = settings()
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert settings() == before
