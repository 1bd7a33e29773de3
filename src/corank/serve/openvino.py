"""OpenVINO: the ONNX graph in OpenVINO's own form, compiled and checked, with proof that the factors stay factors."""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from corank import checkpoint
from corank.errors import CorankError
from corank.factors import FactorizedLinear, materialise
from corank.serve.export import INPUTS, Step, compare, program
from corank.serve.onnx import Shape, densified, refuse_densified, second_copies, to_onnx

NEEDED = ("onnx", "onnxscript", "openvino")


def require_openvino() -> Any:
    """The package `openvino`.

    Importing it reports the import to its makers over the network, under a number that it keeps in the home
    directory, unless `openvino_telemetry` is missing. Here it is.

    Raises:
        CorankError: packages are not installed.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CorankError(
            f"Exporting to OpenVINO needs optional packages ({', '.join(missing)}): pip install 'corank[export]'."
        )
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def write_openvino(model: Any, folder: Path, tolerance: float, step: Step) -> dict[str, Any]:
    """Write ``model.xml`` and ``model.bin`` and check them.

    Args:
        model: in float32.
        folder: directory to write into.
        tolerance: see :func:`corank.serve.export.export`.
        step: progress.

    Returns:
        difference, magnitude, initializers, optimized, copied, densified as in :class:`corank.serve.export.Export`.

    Raises:
        CorankError: the model cannot be exported, OpenVINO gives other logits, or a factorized matrix has become dense.
    """
    openvino, file = require_openvino(), folder / "model.xml"
    plain, name = without_empty_factors(model), type(model).__name__
    exported = program(plain)
    step("export to openvino", 1, 4)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        to_onnx(exported, Path(scratch) / "model.onnx", name)
        del exported
        try:
            read = openvino.Core().read_model(Path(scratch) / "model.onnx")
        except RuntimeError as error:
            raise CorankError(f"OpenVINO cannot read the graph of {name}: {_reason(error)}") from error
        openvino.save_model(read, file, compress_to_fp16=False)  # 16-bit weights are its default
        del read
    step("export to openvino", 2, 4)
    compiled = compile_graph(file)
    before, after = graph_shapes(file), compiled_shapes(compiled)
    step("export to openvino", 3, 4)
    refuse_densified(plain, before, "the exported graph")
    refuse_densified(plain, after, "OpenVINO's compiled graph")

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        found = compiled(dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True)))
        return torch.from_numpy(found["logits"].copy())  # the next call writes where this one did

    worst = compare(model, logits, tolerance, "the graph in OpenVINO")
    step("export to openvino", 4, 4)
    return {
        **worst,
        "initializers": sum(math.prod(shape) * many for shape, many in before.items()),
        "optimized": sum(math.prod(shape) * many for shape, many in after.items()),
        "copied": second_copies(plain, after),
        "densified": densified(model),
    }


def compile_graph(file: Path, precision: str = "f32", threads: int | None = None) -> Any:
    """A graph compiled by OpenVINO for this processor.

    Args:
        file: the ``.xml`` or an ONNX graph.
        precision: of the products, "f32" or "bf16". Left to itself OpenVINO takes bf16 where the processor has
            instructions for it, which is too coarse for a comparison.
        threads: None: as many as PyTorch uses.
    """
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
    return require_openvino().Core().compile_model(str(file), "CPU", options)


def graph_shapes(file: Path) -> Counter[Shape]:
    """Shape -> number of constants in a graph as it is written."""
    graph = require_openvino().Core().read_model(str(file))
    return Counter(tuple(op.get_output_shape(0)) for op in graph.get_ops() if op.get_type_name() == "Constant")


def compiled_shapes(compiled: Any) -> Counter[Shape]:
    """Shape -> number of constants in the graph that OpenVINO runs, after it has folded what it folds.

    Raises:
        CorankError: the graph shows none, so that nothing can be said of it.
    """
    found: Counter[Shape] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        if op.get_rt_info()["layerType"].astype(str) == "Const":
            found[tuple(op.get_output_partial_shape(0).to_shape())] += 1
    if not found:
        raise CorankError("This version of OpenVINO does not show the constants of a compiled graph; use 2026.4.")
    return found


class Nothing(nn.Module):
    """y = bias, or 0: a matrix of rank 0.

    Args:
        out_features: of the matrix.
        bias: [out] or None.
    """

    def __init__(self, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.bias = out_features, bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        y = x.new_zeros(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def without_empty_factors(model: Any) -> Any:
    """The model, or a copy that shares its weights and has no factor without values: OpenVINO reads no empty matrix.

    A matrix of rank 0 is its bias alone. A pivoted one of full rank is its rows or columns in another order; it is written as
    the dense matrix, which is not larger.
    """
    empty = [name for name, layer in checkpoint.factorized(model).items() if _has_empty(layer)]
    if not empty:
        return model
    plain = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for name in empty:
        layer = plain.get_submodule(name)
        plain.set_submodule(name, Nothing(layer.out_features, layer.bias) if not layer.rank else materialise(layer))
    return plain.eval()


def _has_empty(layer: FactorizedLinear) -> bool:
    if hasattr(layer, "form"):  # an embedding or a convolution
        return False
    return any(isinstance(part, nn.Linear) and not part.weight.numel() for part in layer.children())


def _reason(error: Exception) -> str:
    """The line that says which operation it was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("-- ")), lines[-1] if lines else type(error).__name__)
