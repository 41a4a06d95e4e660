"""An evaluation as one self-contained HTML file: no scripts, no links, readable offline and on a phone.

The page is the Jinja2 template page.html with two SVG pictures by matplotlib, the curves and the calibration. Texts of
rows, file names and answers are untrusted: Jinja escapes all of them, the pictures contain none, and the page's
Content-Security-Policy forbids it to load or run anything. Files appear by name, without their folders.
"""

import io
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..adapter import AdapterConfig
from ..evaluation import Evaluation
from ..run import checkpoint
from ..run.cards import beside, named
from ..run.curves import draw_curves
from .generated import Answers
from .scores import Choices, between
from .tables import by_data_set, by_letter, measures, texts_by_data_set

SHOWN = 24  # answers side by side, evenly spaced in all that were generated
SAMPLE = ("where", "prompt", "reference", "before", "after")
DRAWN = {"train": ("step", "loss", "lr"), "eval": ("step", "eval_loss")}  # the values of an event that a curve needs
LOOK = {
    "savefig.format": "svg", "savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "qlora_min",
    "font.size": 17, "text.parse_math": False, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip
# Metadata, names and namespaces, which HTML does not need, and clipping, which needs a link within the page:
NEEDLESS = (
    r'(?s)^.*?(?=<svg)|<(metadata|style|clipPath)\b.*?</\1>| clip-path="[^"]*"| id="\w+_\d+"| xmlns(:\w+)?="[^"]*"'
)
ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
ENVIRONMENT.globals.update(beside=beside, between=between, by_letter=by_letter)
ENVIRONMENT.filters.update(scored=lambda result: Choices.of(result.choices), named=named)
ENVIRONMENT.filters["pieces"] = re.compile(r"(<\|[^|]{1,40}\|>)").split  # at control tokens


def check(path: str) -> None:
    """Raise ValueError if a report can't be made or written; called before the work, which may take hours."""
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--html {path}: can't be written; expected a file in a folder that exists")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--html: matplotlib is not installed (pip install 'qlora_min[plot]')") from None


def evaluation(
    adapter: Path,
    names: Sequence[str],
    results: Sequence[Sequence[Evaluation]],
    answers: Sequence[Sequence[Answers]],
    precision: str,
) -> str:
    """The HTML of an evaluation.

    Args:
        adapter: its folder. If that is in a run directory, the curves of the run are shown, and its samples if there
            are no answers.
        names: of the data sets.
        results: (those of the base, those of the adapter), each with one for each data set.
        answers: as `results`, or empty.
    """
    names = [named(name) for name in names]
    before, after = map(Evaluation.join, results)
    written = [Answers.join(side) for side in answers]
    texts = [side.scores for side in written] or [None, None]
    sides, tables = [*zip(names, *results)], []
    if len(names) > 1:
        sides.append(("all", before, after))
        tables.append(by_data_set(names, *results))
        if answers:
            tables.append(texts_by_data_set(names, *([a.scores for a in side] for side in answers)))
    folder = adapter.resolve()
    run = folder.parent if checkpoint.is_run(folder.parent) else None
    events = _drawn(checkpoint.read_metrics(run)) if run else []
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return ENVIRONMENT.from_string(template).render(
        adapter=f"{run.name}/{folder.name}" if run else folder.name,
        base=named(AdapterConfig.read(adapter).base_model),
        precision=precision,
        date=time.strftime("%Y-%m-%d"),
        before=before,
        after=after,
        both=[(label, b, a) for (label, b), (_, a) in zip(measures(before, texts[0]), measures(after, texts[1]))],
        sides=sides,
        tables=tables,
        events=events,
        curves=any("loss" in e for e in events) and _svg(draw_curves, {"": events}),
        calibration=after.option_rows and _svg(_calibration, {"tab:gray": before, "tab:orange": after}),
        samples=_samples(written, run),
        generated=len(written[1].locations) if written else 0,
    )


def _drawn(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events whose values that a curve needs are all numbers."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and abs(value) < 1e100

    return [e for e in events if (keys := DRAWN.get(str(e["event"]))) and all(number(e.get(k)) for k in keys)]


def _svg(draw: Callable[[Any, io.StringIO], Any], data: Any) -> Markup:
    """A picture as an SVG element, with its texts as text. page.html replaces black by the colour of its own text."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(LOOK):
        draw(data, out)
    return Markup(re.sub(NEEDLESS, "", out.getvalue()))


def _calibration(results: dict[str, Evaluation], out: io.StringIO) -> None:
    """Draw accuracy over confidence: colour -> evaluation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="tab:gray")
    for colour, result in results.items():
        rows, confidence, accuracy = zip(*(b for b in Choices.of(result.choices).bins if b[0]))
        axes.plot(confidence, accuracy, color=colour, alpha=0.5)
        axes.scatter(confidence, accuracy, [20 + 600 * n / sum(rows) for n in rows], color=colour, alpha=0.8)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.savefig(out)


def _samples(answers: Sequence[Answers], run: Path | None) -> list[dict[str, str]]:
    """The answers of base and adapter with the reference: evenly spaced ones, or else the samples of the run."""
    if answers:
        before, after = answers
        rows = list(zip(after.locations, after.prompts, after.references, before.answers, after.answers))
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int))
        return [dict(zip(SAMPLE, rows[i])) for i in chosen]
    try:
        found = [dict(json.loads(line)) for line in (run / "samples.jsonl").read_bytes().splitlines()] if run else []
    except (OSError, ValueError, TypeError, RecursionError):  # none, or damaged: the rest of the page is still good
        return []
    return [{key: str(sample.get(key, "")) for key in SAMPLE} for sample in found]
