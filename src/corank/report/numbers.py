"""Numbers as people read them. Missing is a dash, and infinity is called by its name."""

from __future__ import annotations

import math
from typing import Any

DASH = "–"


def finite(value: Any) -> bool:
    """Whether this is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
    """Significant digits: 0.01234 -> ``0.01234``, 1.2e7 -> ``1.2e+07``; ``inf`` and ``NaN`` by name."""
    odd = _odd(value)
    if odd is not None or value is None:
        return odd or DASH
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 10 ** max(6, digits):
        return f"{value:,.{_places(value, digits)}f}"
    return f"{value:.{max(1, digits - 2)}e}"


def count(value: float | None, digits: int = 4) -> str:
    """1234567 -> ``1.235 M``; below ten thousand in full."""
    return _scaled(value, 1000.0, ("", "K", "M", "G", "T", "P"), 10_000, digits)


def size(value: float | None, digits: int = 4) -> str:
    """Bytes: 1048576 -> ``1 MiB``."""
    return _scaled(value, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), 1024, digits)


def percent(value: float | None, digits: int = 1) -> str:
    """0.8 -> ``80.0%``."""
    odd = _odd(value)
    return odd or DASH if odd is not None or value is None else f"{100 * value:.{digits}f}%"


def ratio(value: float | None, digits: int = 2) -> str:
    """1.5 -> ``1.50×``; above ten thousand as a power of ten."""
    odd = _odd(value)
    if odd is not None or value is None:
        return odd or DASH
    if abs(value) < 1e4:
        return f"{value:,.{digits if abs(value) < 100 else 0}f}×"
    return f"{value:.1e}×"


def duration(seconds: float | None) -> str:
    """61 -> ``1:01``; 3661 -> ``1:01:01``; below ten seconds ``1.2 s``."""
    odd = _odd(seconds)
    if odd is not None or seconds is None:
        return odd or DASH
    if seconds < 9.95:
        return f"{seconds:.1f} s" if seconds >= 0.1 or seconds == 0 else f"{1000 * seconds:.1f} ms"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _scaled(value: float | None, base: float, units: tuple[str, ...], plain: float, digits: int) -> str:
    odd = _odd(value)
    if odd is not None or value is None:
        return odd or DASH
    if abs(value) < plain:
        text = f"{value:,.0f}" if float(value).is_integer() else number(float(value), digits)
        return f"{text} {units[0]}".rstrip()
    power = 0
    scaled = float(value)
    # 999.95 would be printed as 1000: move on to the next unit first.
    while abs(scaled) >= base * (1 - 0.5 * 10**-digits) and power < len(units) - 1:
        scaled /= base
        power += 1
    return f"{scaled:.{_places(scaled, digits)}f} {units[power]}"


def _places(value: float, digits: int) -> int:
    """Decimals that show ``digits`` significant digits: of the rounded value, 9.9996 being 10.00."""
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])
    return max(0, digits - 1 - exponent)


def _odd(value: float | None) -> str | None:
    if value is None:
        return DASH
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return None
