"""One self-contained HTML file from the template, its style and its script; whatever comes from files is escaped."""
import base64
import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils.reporting.gathering import number

ROOM = Path(__file__).parent
LABELS = {"eer": "EER", "fmr100": "FMR100", "fmr1000": "FMR1000", "fdr": "FDR", "ratio": "FDR ratio", "vendi": "Vendi score",
          "frechet": "Fréchet distance"}


def digits(value: Any, places: int = 3) -> str:
    """A number as text; empty where it is none."""
    rounded = round(number(value), places) + 0.0  # never -0.000
    return "" if math.isnan(rounded) else f"{rounded:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def render(page: Mapping[str, Any]) -> str:
    """The page; its own policy lets a browser run no script but ours, and load nothing."""
    style, script = ((ROOM / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = Environment(loader=FileSystemLoader(ROOM), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    environment.filters |= {"digits": digits, "below": os.path.relpath,
                            "label": lambda name: LABELS.get(name, name.replace("_", " "))}
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(page, style=Markup(style), script=Markup(script), allowed=allowed)
