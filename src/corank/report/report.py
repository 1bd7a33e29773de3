"""What was done to a model and what came of it. JSON first: tables, plots, page and card are made from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corank.errors import CorankError
from corank.jsonfile import decode, encode, read_json, write_json

ACCOUNTS = ("sites", "model", "bytes", "flops_per_token")
ROLES = ("embed", "q", "k", "v", "o", "gate", "up", "down", "lm_head")

_SITE_KEYS = {"name", "role", "layer", "shape", "kind", "rank", "max_rank", "params", "params_dense", "loss"}


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The record of one compression. Every field is plain JSON; only ``model`` and ``method`` are required.

    Results of ``corank.evaluate`` can be put into ``evaluation``, ``generation`` and ``speed`` as they are.

    Attributes:
        model: identifier of the dense model.
        method: registered name of the method.
        corank: version of the library.
        parameters: hyper-parameters of the method.
        budget: the budget as asked for, e.g. ``{"keep": 0.8, "scope": "sites"}``.
        accounting: ``"sites"`` and ``"model"`` (parameters), ``"bytes"`` (on disk) and ``"flops_per_token"``,
            each ``{"dense": int, "compressed": int}``; and ``"break_even"``, a mapping of name -> rank; after a budget of
            time also ``"latency"``, predicted nanoseconds of the sites with ``"speedup"`` and what they are for.
        sites: one dict per site: name, role, layer (int or None), shape [m, n], kind, rank, max_rank, params,
            params_dense, loss (``||L (W - W') S|| / ||L W S||``), and optionally predicted_loss and curve,
            pairs [rank, relative loss], and predicted_nats, its part in the increase of the loss.
        stages: stage -> seconds.
        peak_memory_bytes: peak of the whole run.
        seed: the seed of the run.
        data: calibration data: source, hash, tokens, ...
        versions: versions of the libraries.
        evaluation: ``"dense"`` and ``"compressed"``, each a mapping of text -> perplexity, a number or the
            dict of ``evaluate.Perplexity``. Another measure is a dict with ``"value"`` and ``"metric"``.
        generation: samples: prompt and what the models wrote.
        speed: rows of ``evaluate.speed`` as dicts.
        warnings: sentences for the reader.
        extra: keys of a report of another version, kept as they were read.
    """

    model: str
    method: str
    corank: str = ""
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    accounting: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sites: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stages: Mapping[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: int | None = None
    seed: int | None = None
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    speed: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for index, site in enumerate(self.sites):
            missing = sorted(_SITE_KEYS - set(site))
            if missing:
                name = site.get("name", index)
                raise CorankError(f"Site {name!r} of the report lacks {', '.join(missing)}; write it again.")

        # Results of ``evaluate`` may be given as they are; from here on they are plain JSON values.
        for name in ("evaluation", "generation", "speed"):
            object.__setattr__(self, name, decode(encode({name: getattr(self, name)}))[name])

    def __repr__(self) -> str:
        """One line: all that is in a report would fill a screen."""
        sites = self.accounting.get("sites")
        kept = f", {sites['dense']:,} -> {sites['compressed']:,} values in {len(self.sites)} sites" if sites else ""
        return f"<Report: {self.model} by {self.method}{kept}>"

    def to_json(self) -> dict[str, Any]:
        """Strict JSON values; non-finite numbers as in ``corank.jsonfile.encode``."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        return encode({"corank": self.corank, **fields, **self.extra})

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Report:
        """Build a report from what :meth:`to_json` gave.

        Raises:
            CorankError: model or method is missing, or a site lacks one of its keys.
        """
        document = decode(document)
        for key in ("model", "method"):
            if not isinstance(document.get(key), str):
                raise CorankError(f"This is not a report of corank: it has no {key!r}; give a report.json.")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        fields = {key: value for key, value in document.items() if key in known and value is not None}
        return cls(**fields, extra={key: value for key, value in document.items() if key not in known})

    @property
    def predicted_increase(self) -> float | None:
        """Predicted ln(perplexity / dense perplexity) on the calibration text; None without an output metric."""
        parts = [s.get("predicted_nats") for s in self.sites if s["kind"] != "dense"]
        return sum(p for p in parts if p is not None) if parts and all(p is not None for p in parts) else None

    @property
    def structure(self) -> Mapping[str, Any]:
        """What became of the blocks, of a method that takes them away or narrows them; else empty."""
        return self.extra.get("structure") or {}

    @property
    def ordinary(self) -> bool:
        """Whether the result is a checkpoint that needs nothing of corank to be loaded."""
        return self.structure.get("class") in ("N0", "N1")

    def save(self, path: str | Path) -> Path:
        """Write the JSON file, atomically, and return its path."""
        return write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a JSON file, or ``report.json`` in a directory.

        Raises:
            CorankError: there is no such file or it is not a report.
        """
        path = Path(path)
        return cls.from_json(read_json(path / "report.json" if path.is_dir() else path))

    @property
    def roles(self) -> list[str]:
        """The roles of the sites: the usual ones in the order of a block, then others as they come."""
        found = dict.fromkeys(str(site["role"]) for site in self.sites)
        return [r for r in ROLES if r in found] + [r for r in found if r not in ROLES]

    @property
    def layers(self) -> list[int]:
        """The layers that have sites, ascending. Sites outside the blocks (layer None) are in none."""
        return sorted({int(site["layer"]) for site in self.sites if site["layer"] is not None})

    def kept(self, account: str = "sites") -> float:
        """compressed / dense of one of the four accounts; nan if the report does not have it."""
        entry = self.accounting.get(account) or {}
        dense, compressed = entry.get("dense"), entry.get("compressed")
        return math.nan if not dense or compressed is None else compressed / dense

    def texts(self) -> list[str]:
        """The texts with a perplexity, of the dense model or the compressed one."""
        both = [self.evaluation.get(which) or {} for which in ("dense", "compressed")]
        names = dict.fromkeys(name for measured in both for name in measured)
        return [n for n in names if any(self.perplexity(n, w) is not None for w in ("dense", "compressed"))]

    def perplexity(self, text: str, which: str = "compressed") -> float | None:
        """Perplexity on one text of the ``"dense"`` or the ``"compressed"`` model; None if not measured."""
        value = (self.evaluation.get(which) or {}).get(text)
        if isinstance(value, Mapping):
            if value.get("metric", "perplexity") != "perplexity":
                return None
            value = value.get("value")
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def perplexity_ratio(self, text: str) -> float:
        """Perplexity over that of the dense model; nan if either is not known."""
        dense, compressed = self.perplexity(text, "dense"), self.perplexity(text)
        return math.nan if not dense or compressed is None else compressed / dense

    @property
    def seconds(self) -> float:
        """All stages together."""
        return float(sum(self.stages.values()))
