"""Several processes on one job, started by torchrun: the only place that knows `torch.distributed`.

Every process reads the whole model, block by block, and runs its share of the calibration batches through it. Statistics
are sums, so they are added up; matrices are shared out, and what was made of them is exchanged. Rank 0 decides, writes
and speaks; the others follow.

Before anything is exchanged all processes agree that none of them has failed. So an error in one is an error, with the
same sentence, in all of them, and none is left waiting.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from corank.errors import CorankError

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""Longest wait for another process; one that has died is noticed at once."""
AGAIN = "Run the same command again: it goes on where this run stopped."


class Interrupted(CorankError):
    """The run ended before it was done, through no fault of the model or the data; what is finished is kept."""


class World:
    """The processes of a run.

    Args:
        rank: number of this process, from 0.
        size: how many there are.
        group: process group of their own, None if there is one only.

    Attributes:
        over: whether all processes know that the run has failed.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None):
        self.rank, self.size, self._group = rank, size, group
        self.over = False

    @property
    def first(self) -> bool:
        """Whether this is the process that decides, writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Of `count` things in a row, those that are this process's: a run of them, of nearly equal length in all."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def owners(self, work: Sequence[float]) -> list[int]:
        """For each of several tasks the rank that does it: the longest first, each to whom has the least to do."""
        load = [0.0] * self.size
        found = [0] * len(work)
        for i in sorted(range(len(work)), key=lambda i: (-work[i], i)):
            found[i] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[found[i]] += work[i]
        return found

    def wait(self) -> None:
        """Wait for all others.

        Raises:
            CorankError: one of them has failed; its own sentence.
            Interrupted: one of them is gone.
        """
        self._agree(None)

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, in every process."""
        made = [make()] if self.first else [None]
        if self.size == 1:
            return made[0]  # type: ignore[return-value]
        self._agree(None)
        self._exchange(lambda: dist.broadcast_object_list(made, group=self._group, group_src=0))
        return made[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank, in every process. Tensors in it have to be on the CPU."""
        if self.size == 1:
            return [value]
        self._agree(None)
        found: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(found, value, group=self._group))
        return found

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors, the same number of the same shapes in every process, by their sums over all of them."""
        if self.size == 1:
            return
        self._agree(None)
        for tensor in tensors:
            group = None if tensor.is_cuda and "nccl" in str(dist.get_backend_config()) else self._group
            self._exchange(lambda tensor=tensor, group=group: dist.all_reduce(tensor, group=group))  # type: ignore[misc]

    def same(self, what: str, mine: Any) -> None:
        """Check that all processes mean the same.

        Raises:
            CorankError: they do not.
        """
        if any(other != mine for other in self.gather(mine)):
            raise CorankError(
                f"The processes of this group were given different {what}; a group works on one model together. Give all "
                "of them the same, or leave the process group first."
            )

    def fail(self, error: Exception) -> None:
        """Tell the others of an error in this process, unless they know."""
        if self.over or self.size == 1:
            return
        kept = isinstance(error, Interrupted) or not isinstance(error, CorankError)
        said = str(error) if isinstance(error, CorankError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, CorankError):
            said = f"The process of rank {self.rank} failed ({said}). {AGAIN}"
        with contextlib.suppress(Interrupted):
            self._agree((kept, said))

    def _agree(self, failure: tuple[bool, str] | None) -> None:
        if self.size == 1:
            return
        flag = torch.tensor([failure is not None], dtype=torch.int32)
        self._exchange(lambda: dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group))
        if not flag:
            return
        said: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(said, failure, group=self._group))
        self.over = True
        if failure is None:
            kept, sentence = next(each for each in said if each is not None)
            raise Interrupted(sentence) if kept else CorankError(sentence)

    def _exchange(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except RuntimeError as error:
            self.over = True
            raise Interrupted(f"A process of this run has ended, or does not answer any more. {AGAIN}") from error


ALONE = World()


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The processes of the process group that this one is in, for the time inside; this one alone if it is in none.

    Raises:
        CorankError: in all processes, if one of them raises it inside.
        Interrupted: in all others, if one of them raises anything else, or ends.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield ALONE
        return
    # a group of our own: what others do with theirs is not disturbed, and small things travel over gloo
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    world = World(dist.get_rank(), dist.get_world_size(), group)
    try:
        yield world
        world.wait()
    except Exception as error:
        world.fail(error)
        raise
    finally:
        dist.destroy_process_group(group)


def rank() -> int:
    """Number of this process in its process group, 0 if it is in none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def started() -> int:
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextlib.contextmanager
def launched(device: str) -> Iterator[Callable[[], bool]]:
    """Join the processes that torchrun has started, if it has.

    Args:
        device: where each of them will compute.

    Yields:
        a function that says whether this process is the one to report an error that all of them have.

    Raises:
        CorankError: there are fewer CUDA devices than processes.
    """
    if started() == 1 or dist.is_initialized():
        yield lambda: True
        return
    on_cuda = device.startswith("cuda")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if on_cuda and local >= torch.cuda.device_count():
        if local > torch.cuda.device_count():  # one of them says it
            raise SystemExit(2)
        raise CorankError(
            f"There are {torch.cuda.device_count()} CUDA devices, and every process needs one of its own; start as many "
            "processes as there are devices (--nproc-per-node), or use --device cpu."
        )
    if on_cuda:
        torch.cuda.set_device(local)
    store, rank, size = next(iter(dist.rendezvous("env://")))
    words = dist.PrefixStore("corank", store)

    def speaks() -> bool:
        try:
            return words.add("told", 1) == 1
        except RuntimeError:  # the process that kept the store is gone
            return True

    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield speaks
    finally:
        dist.destroy_process_group()


def device_of(device: str, world: World) -> str:
    """The device of this process: with several processes, "cuda" is the one of its local rank."""
    if device != "cuda" or world.size == 1:
        return device
    return f"cuda:{os.environ.get('LOCAL_RANK', torch.cuda.current_device())}"
