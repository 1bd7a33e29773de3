"""Hidden states behind the blocks: those of the teacher on disk, those of the student as it runs."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from corank.engine.stream import Stream
from corank.engine.world import Interrupted
from corank.heal.way import Case
from corank.model import ResidentModel


@contextlib.contextmanager
def teacher_states(case: Case) -> Iterator[Tensor]:
    """The dense model's hidden states behind all blocks but the last, [blocks - 1, sequences, tokens, d].

    They are in a file, and in memory only where they are looked at: they can be larger than both models.

    Raises:
        Interrupted: there is no room for the file.
    """
    layers = case.teacher.outline.layers
    stream = Stream(case.teacher, case.data, 4)
    shape = (layers - 1, *case.data.ids.shape, stream.hidden[0].shape[-1])
    dtype = case.student.dtype
    with tempfile.TemporaryDirectory(dir=case.work, prefix="states-", ignore_cleanup_errors=True) as folder:
        states = _on_disk(Path(folder) / "teacher", shape, dtype)
        for layer in range(layers - 1):
            case.progress("teacher", layer, layers - 1, float("nan"))
            with case.teacher.block(layer) as block, torch.no_grad():
                stream.set_hidden(layer, [stream.run(block, layer, i) for i in range(len(stream))])
            states[layer] = torch.cat([h.to(states) for h in stream.hidden])
        case.progress("teacher", layers - 1, layers - 1, float("nan"))
        yield states


@contextlib.contextmanager
def student_states(student: ResidentModel) -> Iterator[list[Tensor]]:
    """A list that every forward pass of the model fills with the outputs of its blocks, in order."""
    found: list[Tensor] = []

    def note(_module: Any, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    plan = student.outline
    blocks = [student.model.get_submodule(plan.path(i)) for i in range(plan.layers)]
    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _on_disk(file: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = torch.Size(shape).numel()
    if not count:
        return torch.empty(shape, dtype=dtype)
    try:
        with file.open("wb") as opened:  # all of it at once: a disk that is full later ends the process
            os.posix_fallocate(opened.fileno(), 0, count * dtype.itemsize)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise Interrupted(
            f"There is no room in {file.parent.parent} for the dense model's hidden states, {count * dtype.itemsize:,} "
            "bytes; free some space, or give fewer or shorter samples."
        ) from error
    return torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(shape)
