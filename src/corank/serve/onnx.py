"""ONNX: PyTorch's exporter, checked in ONNX Runtime, with proof that the factors stay factors."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corank import checkpoint
from corank.errors import CorankError
from corank.serve.export import INPUTS, Step, compare, program, quiet, stock_config

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise `CorankError` unless the packages are installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise CorankError(
            f"Exporting to ONNX needs optional packages ({', '.join(missing)}): pip install 'corank[export]'."
        )


def write_onnx(model: Any, folder: Path, tolerance: float, step: Step) -> dict[str, Any]:
    """Write ``model.onnx`` (with ``model.onnx.data`` beside it if it is large) and check it.

    Args:
        model: in float32.
        folder: directory to write into.
        tolerance: see :func:`corank.serve.export.export`.
        step: progress.

    Returns:
        difference, magnitude, initializers, optimized, copied, densified as in :class:`corank.serve.export.Export`.

    Raises:
        CorankError: the model cannot be exported, ONNX Runtime gives other logits, or a factorized matrix has
            become dense.
    """
    file = folder / "model.onnx"
    exported = program(model)
    step("export to onnx", 1, 4)
    to_onnx(exported, file, type(model).__name__)
    del exported
    step("export to onnx", 2, 4)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        run = session(file, optimized)
        before, after = stored_shapes(file), stored_shapes(optimized)
    step("export to onnx", 3, 4)
    refuse_densified(model, before, "the exported graph")
    refuse_densified(model, after, "ONNX Runtime's optimized graph")

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(run.run(None, dict(zip(INPUTS, (ids.numpy(), mask.numpy()), strict=True)))[0])

    worst = compare(model, logits, tolerance, "the graph in ONNX Runtime")
    step("export to onnx", 4, 4)
    return {
        **worst,
        "initializers": sum(math.prod(shape) * many for shape, many in before.items()),
        "optimized": sum(math.prod(shape) * many for shape, many in after.items()),
        "copied": second_copies(model, after),
        "densified": densified(model),
    }


def to_onnx(exported: torch.export.ExportedProgram, file: Path, name: str) -> None:
    """Write a program as an ONNX graph, by PyTorch's exporter; nothing is checked.

    Args:
        exported: see :func:`corank.serve.export.program`.
        file: to write, with a second one beside it if it is large.
        name: of the model's class, for the error.

    Raises:
        CorankError: the exporter gave nothing.
    """
    axes = {0: "batch", 1: "sequence"}
    with quiet():
        converted = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=(axes, axes),  # the names of the axes; which ones are free has been said in `program`
        )
        if converted is None:
            raise CorankError(f"PyTorch's ONNX exporter gave nothing for {name}.")
        converted.save(file)


def densified(model: Any) -> int:
    """Parameters of the architecture with nothing factorized, tied ones once."""
    with torch.device("meta"):
        dense = type(model)(stock_config(model))
    return sum(p.numel() for p in dense.parameters())


def session(file: Path, optimized: Path | None = None, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        file: the graph.
        optimized: where to write the graph that ONNX Runtime makes of it.
        threads: for one operator; None: as many as PyTorch uses.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that an optimized graph fits this machine only
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        # beside the graph, because a file in ONNX's format cannot exceed 2 GB
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{optimized.name}.data"
        )
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def stored_shapes(file: Path) -> Counter[tuple[int, ...]]:
    """Shape -> number of tensors stored in an ONNX file, in subgraphs and functions too; the data is not read."""
    import onnx

    model = onnx.load(str(file), load_external_data=False)

    def tensors(graph: Any) -> Iterator[tuple[int, ...]]:
        for tensor in getattr(graph, "initializer", ()):
            yield tuple(tensor.dims)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield tuple(attribute.t.dims)
                for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield from tensors(inner)

    return Counter(shape for graph in (model.graph, *model.functions) for shape in tensors(graph))


Shape = tuple[int, ...]


def expected_shapes(model: Any) -> tuple[Counter[Shape], Counter[Shape]]:
    """Shapes, whichever way round, of the tensors of a model; and of the tied ones, which may be stored once more.

    ONNX Runtime keeps a transposed copy of an output embedding that is tied to the input embedding.
    """
    own = Counter(_oriented(t.shape) for t in (*model.parameters(), *model.buffers()))
    every = Counter(_oriented(p.shape) for _, p in model.named_parameters(remove_duplicate=False))
    return own, every - Counter(_oriented(p.shape) for p in model.parameters())


def _oriented(shape: Iterable[int]) -> Shape:
    return tuple(sorted(shape))


def _found(stored: Counter[Shape]) -> Counter[Shape]:
    found: Counter[Shape] = Counter()
    for shape, many in stored.items():
        found[_oriented(shape)] += many
    return found


def second_copies(model: Any, stored: Counter[Shape]) -> int:
    """Numbers in a graph that are second copies of tied matrices."""
    (own, tied), found = expected_shapes(model), _found(stored)
    return sum(
        math.prod(shape) * min(many, found[shape] - own[shape])
        for shape, many in tied.items()
        if found[shape] > own[shape]
    )


def refuse_densified(model: Any, stored: Counter[Shape], what: str) -> None:
    """Check that no matrix of the size of a factorized one is stored that the model does not have itself.

    Constant folding is free to multiply two constants; nothing in the format forbids it. Sites of full rank are passed
    over: a factor of theirs may have that very size.

    Args:
        model: the model, whose own matrices (dense ones, embeddings, factors of the same size) are allowed, tied ones
            twice.
        stored: see :func:`stored_shapes`.
        what: the graph, for the error.

    Raises:
        CorankError: there is such a matrix.
    """
    (own, tied), found = expected_shapes(model), _found(stored)
    for name, layer in checkpoint.factorized(model).items():
        shape = _oriented((layer.out_features, layer.in_features))
        if layer.rank < shape[0] and found[shape] > own[shape] + tied[shape]:
            raise CorankError(
                f"{what} stores {found[shape]} matrices of the size of {name} ({list(shape)}) and the model has "
                f"{own[shape]}: its factors have been multiplied out; nothing has been written."
            )
