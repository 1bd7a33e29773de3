"""How much may be kept: one number, said in one of four ways; or how much of the time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

from corank.errors import CorankError, unknown

SCOPES = ("sites", "model")
LIMITS = ("keep", "remove", "params", "bytes", "latency")

_BYTE_UNITS = {"": 1, "b": 1}
_BYTE_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)}
_BYTE_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)}
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}

_NUMBER = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-z%]*)")


def _exact(value: float) -> Fraction:
    # 0.8 is meant as 4/5, not as the nearest binary fraction: floor(0.29 * 100) must be 29.
    return Fraction(str(value))


def _size(field: str, text: str, units: dict[str, int], examples: str) -> int:
    match = _NUMBER.fullmatch(text.strip().lower().replace("_", "").replace(",", ""))
    if match is None or match[2] not in units:
        raise CorankError(f"Cannot read {field}={text!r}; write it like {examples}.")
    return math.floor(Fraction(match[1]) * units[match[2]])


def _fraction(field: str, text: str) -> float:
    match = _NUMBER.fullmatch(text.strip().lower())
    if match is None or match[2] not in ("", "%"):
        raise CorankError(f"Cannot read {field}={text!r}; write it like {field}=0.8 or {field}=80%.")
    return float(Fraction(match[1]) / (100 if match[2] else 1))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A limit on size, or on time. Exactly one of the first five is given, always by name: a bare ratio has no meaning.

    Attributes:
        keep: fraction of the parameters kept, in (0, 1].
        remove: fraction removed, in [0, 1).
        params: number of parameters.
        bytes: storage in bytes.
        latency: fraction of the predicted time of the sites, in (0, 1]; see `corank.timing`.
        latency_batch, latency_tokens: the time of so many sequences with so many new tokens each: 1 is decoding, a longer
            one the prefill of a prompt.
        latency_device: where, as `corank.timing.find_device` takes it; None: this machine.
        scope: what is counted, "sites" (the matrices selected for compression) or "model" (everything).

    Raises:
        CorankError: none or several are given, or a value is out of range.
    """

    keep: float | None = None
    remove: float | None = None
    params: int | None = None
    bytes: int | None = None
    latency: float | None = None
    latency_batch: int = 1
    latency_tokens: int = 1
    latency_device: str | None = None
    scope: str = "sites"

    def __post_init__(self) -> None:
        given = [name for name in LIMITS if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"both {' and '.join(given)}" if given else "none"
            raise CorankError(f"Give exactly one of {', '.join(LIMITS)}; got {what}.")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise CorankError(f"keep={self.keep} is outside (0, 1]; to keep 80% write keep=0.8.")
        if self.remove is not None and not 0 <= self.remove < 1:
            raise CorankError(f"remove={self.remove} is outside [0, 1); to remove 20% write remove=0.2.")
        if self.latency is not None:
            if not 0 < self.latency <= 1:
                raise CorankError(f"latency={self.latency} is outside (0, 1]; for 70% of the time write latency=0.7.")
            if self.latency_batch < 1 or self.latency_tokens < 1:
                raise CorankError("latency_batch and latency_tokens must be at least 1.")
            if self.scope != "sites":
                raise CorankError("A budget of time is of the selected matrices; leave scope=model out.")
        for name in ("params", "bytes"):
            value = getattr(self, name)
            if value is not None:
                if not (math.isfinite(value) and value >= 1):
                    raise CorankError(f"{name}={value} is not a size; give a positive number.")
                object.__setattr__(self, name, math.floor(value))
        if self.scope not in SCOPES:
            raise unknown("scope", self.scope, SCOPES)

    @classmethod
    def parse(cls, **given: Any) -> Budget:
        """Build from what people type; None values are skipped, numbers are taken as they are.

        Args:
            given: fields of `Budget`: keep="0.8" or "80%", params="5.4e9" or "90M", bytes="10GiB" or "10GB".

        Raises:
            CorankError: unknown field, unreadable value, or as in `Budget`.
        """
        names = [field.name for field in fields(cls)]
        parsed: dict[str, Any] = {}
        for name, value in given.items():
            if name not in names:
                raise unknown("budget", name, names)
            if value is None:
                continue
            if isinstance(value, str):
                if name in ("keep", "remove", "latency"):
                    value = _fraction(name, value)
                elif name == "params":
                    value = _size(name, value, _COUNT_UNITS, "params=5.4e9, params=90M or params=7B")
                elif name == "bytes":
                    value = _size(name, value, _BYTE_UNITS, "bytes=10GiB, bytes=10GB or bytes=500MB")
            parsed[name] = value
        return cls(**parsed)

    def limit(self, sites_params: int, other_params: int, bits_per_value: float) -> int:
        """Parameters the sites may have together.

        Args:
            sites_params: parameters of the sites when dense.
            other_params: parameters of the rest of the model, which stay as they are.
            bits_per_value: storage of one value, 16 for bfloat16 (only ``bytes`` uses it).

        Raises:
            CorankError: if the rest of the model alone is larger than the budget, or the budget is one of time.
        """
        if self.latency is not None:
            raise CorankError(
                "A budget of time says nothing of parameters; corank.timing.Clock counts its nanoseconds."
            )
        whole = self.scope == "model"
        counted = sites_params + (other_params if whole else 0)
        if self.keep is not None:
            allowed = _exact(self.keep) * counted
        elif self.remove is not None:
            allowed = (1 - _exact(self.remove)) * counted
        elif self.params is not None:
            allowed = Fraction(self.params)
        else:
            allowed = Fraction((self.bytes or 0) * 8) / _exact(bits_per_value)
        limit = math.floor(allowed) - (other_params if whole else 0)
        if limit < 0:
            raise CorankError(
                f"The budget ({self.describe()}) allows {math.floor(allowed):,} parameters, but the part "
                f"of the model that is not compressed has {other_params:,} already; raise the budget or "
                "select more sites."
            )
        return limit

    def describe(self) -> str:
        """In words, e.g. ``keep=0.8 of the sites``."""
        name = next(n for n in LIMITS if getattr(self, n) is not None)
        value = getattr(self, name)
        number = f"{value:,}" if name in ("params", "bytes") else f"{value:g}"
        return f"{name}={number} of the {self.scope}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``Budget(**budget.to_dict())`` gives it back."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        timed = self.latency is not None
        return {n: value for n, value in values.items() if value is not None and (timed or not n.startswith("latency"))}
