"""Processes for tests that start many, or kill them: forks of a server that has imported corank once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["corank", "tiny"])


def start(target: Callable[..., Any], *args: Any) -> Any:
    """Run a function of an importable module in a process of its own."""
    process = CONTEXT.Process(target=_quietly, args=(target, *args))
    process.start()
    return process


def _quietly(target: Callable[..., Any], *args: Any) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    target(*args)


def start_group(size: int, meeting: Path, target: Callable[..., Any], *args: Any) -> list[Any]:
    """Start a process group over gloo; `target` is called with the rank and `args` in every process of it.

    Args:
        size: number of processes.
        meeting: a new file by which they find each other.
        target: a function of an importable module.
    """
    return [start(_member, rank, size, str(meeting), target, args) for rank in range(size)]


def _member(rank: int, size: int, meeting: str, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )
    try:
        target(rank, *args)
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def join(processes: list[Any]) -> list[int]:
    """Exit codes; a process that does not end within minutes is killed, and shows as that."""
    for process in processes:
        process.join(240)
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
