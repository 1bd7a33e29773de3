"""What the processes of the test of healing in several processes do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from corank.engine.world import joined
from corank.errors import CorankError
from corank.heal import Schedule, train
from corank.healing import heal
from corank.model import ResidentModel, Text
from factorized import compressed, mixed
from tiny import text, tiny, windows

TEXT = Text(text(), "words")


def small(how: str) -> Any:
    """What is healed: factors of every kind; or links wherever links alone train."""
    return (compressed("cur", layers=2, ranks=(6,)) if how == "curing" else mixed()).double()


def heal_in_memory(rank: int, work: str, size: str, hows: list[str]) -> None:
    """Every way, in double precision; each process keeps what it got."""
    teacher = tiny("llama-gqa", dtype=torch.float64)
    del teacher.model.layers[2:]
    teacher.config.num_hidden_layers = 2
    for how in hows:
        model, schedule = small(how), Schedule(epochs=1, learning_rate=1e-3, batch=2, accumulate=2)
        with joined() as world:
            data = windows(17, seed=3)
            healed = train(ResidentModel(model), ResidentModel(teacher), data, how, schedule=schedule, world=world)
        kept = {"state": model.state_dict(), "heldout": [h["heldout"] for h in healed.history]}
        torch.save(kept, Path(work) / f"{how}-{size}-rank{rank}.pt")


def heal_a_directory(rank: int, work: str, out: str) -> None:
    """From disk to disk; and bad input, of which all processes are told."""
    room, said = Path(work), []
    order = dict(data=TEXT, samples=12, length=16)
    healed = heal(room / "small", room / "dense", out=room / out, schedule=Schedule(epochs=1, minutes=600), **order)
    for wrong in (dict(samples=1), dict(teacher=room / "nowhere")):
        try:
            heal(**{"model": room / "small", "teacher": room / "dense", "out": room / "bad", **order, **wrong})
        except CorankError as error:
            said.append(str(error))
    (room / f"{out}-rank{rank}.json").write_text(json.dumps([healed.after, said]))
