"""An evaluation as one self-contained HTML file: no scripts, no links, readable offline and on a phone.

The page is made from the Jinja2 template page.html, with two SVG pictures by matplotlib: curves and calibration. Texts
of rows, file names and answers are untrusted: Jinja escapes all of them, the pictures contain none of them, and the
page's Content-Security-Policy lets it load or execute nothing. Files appear by name, without their folders.
"""

import io
import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..adapter import AdapterConfig
from ..data.measures import Evaluation
from ..run import checkpoint
from ..run.cards import beside, named
from ..run.curves import draw_curves
from .chat import samples
from .scores import Answer, Choices, between
from .tables import Comparison, by_letter

SHOWN = 24  # generated answers that are shown, evenly spaced among all of them
DRAWN = {"train": ("step", "loss", "lr"), "eval": ("step", "eval_loss")}  # what the curves need of an event
LOOK = {
    "savefig.format": "svg", "savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "qlora_min",
    "font.size": 17, "text.parse_math": False, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip
# Metadata, ids and namespaces, which HTML does not need, and clipping, which would need a link within the page:
NEEDLESS = (
    r'(?s)^.*?(?=<svg)|<(metadata|style|clipPath)\b.*?</\1>| clip-path="[^"]*"| id="\w+_\d+"| xmlns(:\w+)?="[^"]*"'
)
ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
ENVIRONMENT.globals.update(beside=beside, between=between, by_letter=by_letter)
ENVIRONMENT.filters.update(scored=lambda result: Choices(result.choices), named=named)
ENVIRONMENT.filters["pieces"] = re.compile(r"(<\|[^|]{1,40}\|>)").split  # at control tokens


def evaluation(evaluated: Path | str, found: Comparison, precision: str) -> str:
    """The HTML of an evaluation.

    Args:
        evaluated: an adapter's folder, or the name of a model without one. If the adapter is in a run directory, the
            page also shows the curves of the run, and its samples if no answers were generated.
    """
    found = replace(found, names=[named(name) for name in found.names])
    wholes = [*map(Evaluation.join, found.results)]
    answered = [*zip(*(itertools.chain(*side) for side in found.answers))]
    parts = [*zip(found.names, *found.results), *([("all", *wholes)] if len(found.names) > 1 else [])]
    title, run_dir = named(str(evaluated)), None
    if isinstance(evaluated, Path):
        folder = evaluated.resolve()
        run_dir = folder.parent if checkpoint.is_run(folder.parent) else None
        adapter = f"{run_dir.name}/{folder.name}" if run_dir else folder.name
        title = f"{named(AdapterConfig.read(evaluated).base_model)} with {adapter}"
    events = _drawn(checkpoint.read_metrics(run_dir)) if run_dir else []
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return ENVIRONMENT.from_string(template).render(
        found=found,
        title=title,
        precision=precision,
        date=time.strftime("%Y-%m-%d"),
        wholes=[*zip(found.sides, wholes)],
        each=[(name, [*zip(found.sides, results)]) for name, *results in parts],
        events=events,
        curves=any("loss" in e for e in events) and _svg(draw_curves, {"": events}),
        calibration=wholes[-1].option_rows
        and _svg(_calibration, dict(zip(("tab:orange", "tab:gray"), reversed(wholes)))),
        samples=_samples(found.sides, answered, run_dir),
        generated=len(answered),
    )


def _drawn(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that can be drawn: all values that the curves need are numbers."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and abs(value) < 1e100

    return [e for e in events if (keys := DRAWN.get(str(e["event"]))) and all(number(e.get(k)) for k in keys)]


def _svg(draw: Callable[[Any, io.StringIO], Any], data: Any) -> Markup:
    """A picture as an SVG element whose texts are text. page.html replaces black with its own text colour."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(LOOK):
        draw(data, out)
    return Markup(re.sub(NEEDLESS, "", out.getvalue()))


def _calibration(results: dict[str, Evaluation], out: io.StringIO) -> None:
    """Draw accuracy over confidence. results: colour -> evaluation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="tab:gray")
    for colour, result in results.items():
        rows, confidence, accuracy = zip(*(b for b in Choices(result.choices).bins if b[0]))
        axes.plot(confidence, accuracy, color=colour, alpha=0.5)
        axes.scatter(confidence, accuracy, [20 + 600 * n / sum(rows) for n in rows], color=colour, alpha=0.8)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.savefig(out)


def _samples(
    sides: Sequence[str], answered: Sequence[tuple[Answer, ...]], run_dir: Path | None
) -> list[dict[str, Any]]:
    """Rows with the reference and the answer of each side: evenly spaced ones of `answered`, or else of the run."""
    if answered:
        chosen = np.unique(np.linspace(0, len(answered) - 1, min(SHOWN, len(answered))).round().astype(int))
        found = [[*row[0][:3], *(side.answer for side in row)] for row in (answered[i] for i in chosen)]
    else:
        found = [*samples(run_dir)] if run_dir else []
    return [{"where": w, "prompt": p, "texts": [*zip(("reference", *sides), texts)]} for w, p, *texts in found]
