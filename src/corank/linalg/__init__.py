"""Linear algebra on plain tensors: truncation under a metric, column selection, CUR and interpolation,
packing.

Nothing here knows a module, a model or a data set. Matrices are W [m, n] = [out, in], metrics are G [n, n] or
a diagonal [n].
"""

from corank.linalg.cur import (
    column_curve,
    column_id,
    cur_curve,
    link,
    plain_link,
    project_left,
    project_right,
    row_curve,
    row_id,
)
from corank.linalg.packing import Packed, pack, unpack
from corank.linalg.randomized import range_finder, sketch
from corank.linalg.retarget import alternate, refit_input, refit_output, retarget
from corank.linalg.roots import apply_root, psd_root, psd_sqrt
from corank.linalg.selection import SELECTORS, select
from corank.linalg.truncation import Truncation, truncate

__all__ = [
    "SELECTORS",
    "Packed",
    "Truncation",
    "alternate",
    "apply_root",
    "column_curve",
    "column_id",
    "cur_curve",
    "link",
    "pack",
    "plain_link",
    "project_left",
    "project_right",
    "psd_root",
    "psd_sqrt",
    "range_finder",
    "refit_input",
    "refit_output",
    "retarget",
    "row_curve",
    "row_id",
    "select",
    "sketch",
    "truncate",
    "unpack",
]
