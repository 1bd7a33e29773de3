"""The paper the plots are drawn on: colours, figure, axes, ticks, files. Imports matplotlib when needed."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corank.errors import CorankError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B8A800")
MARKERS = "osD^vP*X"
_DECIMALS = re.compile(r"(\d\.\d\d)\d+")


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of the surface, and the part of viridis that can be seen on it."""

    back: str
    text: str
    faint: str
    low: float
    high: float


LIGHT = Theme(back="#ffffff", text="#1c2024", faint="#d5d9de", low=0.0, high=0.92)
DARK = Theme(back="#15191e", text="#e3e7eb", faint="#3a424b", low=0.22, high=1.0)


def blank_figure(width: float, height: float, theme: Theme) -> Figure:
    """An empty figure in inches, drawn off screen.

    Raises:
        CorankError: matplotlib is not installed; the sentence says how to get it.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise CorankError("Plots need matplotlib; run: pip install corank[plot]") from None
    # A figure of its own, not pyplot's: no global state, no display, nothing to close.
    figure = Figure(figsize=(width, height), layout="constrained", facecolor=theme.back)
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes, theme: Theme) -> None:
    """A quiet grid, no box, no tick marks."""
    axes.set_facecolor(theme.back)
    axes.grid(True, color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.text, labelsize=9, length=0)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.faint)


def headline(figure: Figure, text: str, theme: Theme) -> None:
    """The title, flush left, wrapped where it is too long."""
    figure.suptitle(text, fontsize=12.5, fontweight="bold", color=theme.text, x=0.01, ha="left", wrap=True)


def side_legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    """The legend, right of the axes."""
    legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=10)
    for text in legend.get_texts():
        text.set_color(theme.text)


def line_look(index: int) -> dict[str, Any]:
    """Colour, marker and line style of the ``index``-th name; the first 24 differ, single points too."""
    turn = index // len(OKABE_ITO)
    style = ("-", "--", ":")[turn % 3]
    return {
        "color": OKABE_ITO[index % len(OKABE_ITO)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "linestyle": style,
        "markeredgewidth": 0,
    }


def percent_axis() -> Any:
    """Formatter of an axis of fractions: 0.125 -> ``12.5%``."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{100 * value:.4g}%")


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between low < 1 and high, at most nine of them, whatever the range."""
    if high < 2:
        step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if (high - low) / s <= 8)
        return [round(i * step, 2) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for mantissas in ((1, 1.2, 1.5, 2, 3, 4, 6, 8), (1, 2, 5), (1,)):
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) <= 9:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 8)]


def times_label(value: float) -> str:
    """1.5 -> ``1.5×``, 1e7 -> ``1e7×``."""
    return f"{value:,.10g}×" if value < 1e6 else f"{value:.0e}×".replace("e+0", "e").replace("e+", "e")


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending of ``path`` (png, svg, pdf) says how."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160, facecolor=figure.get_facecolor())
    return path


def svg(figure: Figure) -> str:
    """A figure as SVG text, letters as shapes; the same figure gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "corank", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", facecolor=figure.get_facecolor(), metadata={"Date": None})
    # A hundredth of a point cannot be seen; a path in full precision is twice as long.
    return re.sub(r' d="[^"]*"', lambda path: _DECIMALS.sub(r"\1", path.group()), buffer.getvalue())
