"""The directories of a run: whose they are, and what they were made from."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from corank.engine.world import ALONE, Interrupted, World
from corank.errors import CorankError
from corank.jsonfile import read_json, write_json
from corank.model import Calibration


def claim(work: Path, identity: Mapping[str, Any]) -> None:
    """Take a work directory, or go on in it if it belongs to the same run.

    Args:
        work: the directory.
        identity: what defines the run, as JSON.

    Raises:
        CorankError: it belongs to another run or is something else, or cannot be made.
    """
    note = work / "run.json"
    if note.is_file():
        if read_json(note) != json.loads(json.dumps(identity)):
            raise CorankError(
                f"{work} is left from a different interrupted run; repeat that command to finish it, or delete it."
            )
        return
    # a run killed while it wrote that note leaves the note's temporary file, and nothing else
    if work.exists() and any(not file.name.startswith(f".{note.name}.") for file in work.iterdir()):
        raise CorankError(f"{work} exists and is not an interrupted run; delete it or choose another output directory.")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorankError(f"Cannot create {work}: {error.strerror}.") from None
    write_json(note, identity)


@contextlib.contextmanager
def working(work: Path, target: Path, world: World = ALONE) -> Iterator[None]:
    """The life of a work directory that has been claimed: it goes when the run is done, or can never be.

    Args:
        work: the directory.
        target: what the run is to write, for messages.
        world: the processes that share the work.

    Raises:
        Interrupted: the disk is full; the same command goes on from the work directory.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Interrupted(
                f"The disk is full; {target} was not written. Free some space and run the same command again: it "
                f"continues from {work}."
            ) from None
        raise
    except Interrupted:
        raise
    except CorankError as error:  # the model or the data are at fault: the same run could not be continued
        world.fail(error)
        if world.first:
            clear(work)
        raise
    if world.first:
        clear(work)


def clear(work: Path) -> None:
    """Delete a work directory. The note goes first: nobody goes on in one that is half gone."""
    (work / "run.json").unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)


def files_key(path: Path) -> str:
    """Identity of a checkpoint directory: names, sizes and times of its files."""
    digest = hashlib.sha256(str(path.resolve()).encode())
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".json"):
            stamp = file.stat()
            digest.update(f"{file.name}:{stamp.st_size}:{stamp.st_mtime_ns}".encode())
    return digest.hexdigest()


def model_key(model: PreTrainedModel) -> str:
    """Identity of a model in memory: its configuration and a sum over its weights."""
    total = sum(float(p.detach().double().sum()) for p in model.parameters())
    return hashlib.sha256(f"{model.config.to_json_string()}:{total!r}".encode()).hexdigest()


def cache_of(cache: str | Path | None, model_key: str, data: Calibration | None) -> Path | None:
    """The directory of statistics of a model on its calibration data, inside that of all; None without one."""
    if cache is None or data is None:
        return None
    key = hashlib.sha256(json.dumps([model_key, data.source], sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache).expanduser() / key
