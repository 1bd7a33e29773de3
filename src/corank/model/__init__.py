"""Models as sequences of blocks and matrices, and the texts to run them on."""

from corank.model.outline import Outline, outline
from corank.model.resident import ResidentModel
from corank.model.site import Site, select_sites, sites_with_roles
from corank.model.streaming import StreamedModel
from corank.model.text import Calibration, Examples, Source, Text, calibration, prompted, read_text
from corank.model.zoo import ALIASES, resolve

__all__ = [
    "ALIASES",
    "Calibration",
    "Examples",
    "Outline",
    "ResidentModel",
    "Site",
    "Source",
    "StreamedModel",
    "Text",
    "calibration",
    "outline",
    "prompted",
    "read_text",
    "resolve",
    "select_sites",
    "sites_with_roles",
]
