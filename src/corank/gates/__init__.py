"""Gates: trainable weights of hidden vectors, by which units of a model learn to go. One engine for all of them.

place = Vector("mlp", (Point("model.layers.0.mlp.down_proj"),), count=1536)     # what is multiplied
gates = Gates([place], HardConcrete())                                          # by what, and its parameters
with gates.attached(model):                                                     # hooks; nothing of the model changes
    history = train(source, gates, data, schedule, penalty=...)                 # one loop, that of corank.heal
"""

from __future__ import annotations

from corank.gates.gate import Directions, Gates, Place, Point, Vector
from corank.gates.lagrangian import Lagrangian
from corank.gates.relax import HardConcrete, Plain, Relaxation, StraightThrough
from corank.gates.scores import Recorder, ScoreMap
from corank.gates.training import language_loss, steps, train

__all__ = [
    "Directions",
    "Gates",
    "HardConcrete",
    "Lagrangian",
    "Place",
    "Plain",
    "Point",
    "Recorder",
    "Relaxation",
    "ScoreMap",
    "StraightThrough",
    "Vector",
    "language_loss",
    "steps",
    "train",
]
