"""An evaluation as one HTML file that needs nothing else: no script, no address, readable offline and on a phone.

The page is a Jinja2 template, page.html, its curves and its calibration are matplotlib's SVG within it. Texts of rows,
file names and what models wrote are data: Jinja escapes each, none gets into a picture, and the page forbids itself
whatever could load or run (its Content-Security-Policy). Files go by name, so that a page tells nobody where they lie.
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

from . import checkpoint
from .adapter import read_config
from .evaluate import Answers, Evaluation, beside, by_data_set, by_letter, measures, texts_by_data_set
from .hub import named
from .report import draw_curves
from .scores import Choices, between

SHOWN = 24  # answers side by side, evenly from all that were generated
SAMPLE = ("where", "prompt", "reference", "before", "after")
DRAWN = {"train": ("step", "loss", "lr"), "eval": ("step", "eval_loss")}  # what a curve needs of an event
LOOK = {
    "savefig.format": "svg", "savefig.transparent": True, "svg.fonttype": "none", "svg.hashsalt": "qlora_min",
    "font.size": 17, "text.parse_math": False, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False,
}  # fmt: skip
# Metadata and names that HTML has no use for, and clipping, which is by an address within the page:
NEEDLESS = (
    r'(?s)^.*?(?=<svg)|<(metadata|style|clipPath)\b.*?</\1>| clip-path="[^"]*"| id="\w+_\d+"| xmlns(:\w+)?="[^"]*"'
)


def check(path: str) -> None:
    """Raises ValueError where a report can't be made or written: before hours of work, not behind them."""
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
    """The page of an evaluation.

    Args:
        adapter: its folder; in a run directory, the run's curves are shown, and its samples where there are no answers.
        names: of the data sets.
        results: (base's, adapter's), each with one for each data set.
        answers: the same, or nothing.
    """
    names = [named(name) for name in names]
    before, after = map(Evaluation.join, results)
    written = [Answers.join(side) for side in answers]
    sides, scores = [*zip(names, *results)], [[a.scores for a in side] for side in answers]
    texts = [side.scores for side in written] or [None, None]
    tables = []
    if len(names) > 1:
        sides.append(("all", before, after))
        tables = [by_data_set(names, *results), *([texts_by_data_set(names, *scores)] if scores else [])]
    folder = adapter.resolve()
    run = folder.parent if checkpoint.is_run(folder.parent) else None
    events = _drawn(checkpoint.read_metrics(run)) if run else []
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"named": named, "pieces": re.compile(r"(<\|[^|]{1,40}\|>)").split}
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        adapter=f"{run.name}/{folder.name}" if run else folder.name,
        base=named(read_config(adapter).base),
        precision=precision,
        date=time.strftime("%Y-%m-%d"),
        before=before,
        after=after,
        both=[(label, b, a) for (label, b), (_, a) in zip(measures(before, texts[0]), measures(after, texts[1]))],
        sides=sides,
        tables=tables,
        events=events,
        curves=any("loss" in e for e in events) and _svg(lambda out: draw_curves({"": events}, out)),
        calibration=after.option_rows and _svg(lambda out: _calibration(before.choices, after.choices, out)),
        samples=_samples(written, run),
        generated=len(written[1].where) if written else 0,
        beside=beside,
        between=between,
        by_letter=by_letter,
    )


def _drawn(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events that have numbers where a curve needs them."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and abs(value) < 1e100

    return [e for e in events if (keys := DRAWN.get(str(e["event"]))) and all(number(e.get(k)) for k in keys)]


def _svg(draw: Callable[[io.StringIO], Any]) -> Markup:
    """A picture as an element of the page, its text as text: black is the page's ink, in either mode."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context(LOOK):
        draw(out)
    return Markup(re.sub(NEEDLESS, "", out.getvalue()))


def _calibration(before: Choices, after: Choices, out: io.StringIO) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="tab:gray")
    for choices, colour in ((before, "tab:gray"), (after, "tab:orange")):
        rows, confidence, accuracy = zip(*(b for b in choices.bins if b[0]))
        axes.plot(confidence, accuracy, color=colour, alpha=0.5)
        axes.scatter(confidence, accuracy, [20 + 600 * n / len(choices) for n in rows], color=colour, alpha=0.8)
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    figure.savefig(out)


def _samples(answers: Sequence[Answers], run: Path | None) -> list[dict[str, str]]:
    """What both wrote, beside the reference: evenly from the answers, or else what the run kept."""
    if answers:
        before, after = answers
        rows = list(zip(after.where, after.prompts, after.references, before.answers, after.answers))
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).round().astype(int))
        return [dict(zip(SAMPLE, rows[i])) for i in chosen]
    try:
        found = [dict(json.loads(line)) for line in (run / "samples.jsonl").read_bytes().splitlines()] if run else []
    except (OSError, ValueError, TypeError, RecursionError):  # none, or damaged: no reason to lose the rest
        return []
    return [{key: str(sample.get(key, "")) for key in SAMPLE} for sample in found]
