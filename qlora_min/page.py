"""An evaluation as one HTML file that needs nothing else: no script, no address, readable offline and on a phone.

Texts of rows, file names and what models wrote are data: each goes through `html.escape`, and the page forbids itself
whatever could load or run (its Content-Security-Policy), so that no row can put anything into it but text.
"""

import json
import math
import os
import re
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint
from .adapter import read_config
from .evaluate import Answers, Evaluation, by_data_set, by_letter, measures, texts_by_data_set
from .scores import Choices, between

SHOWN = 24  # answers side by side, evenly from all that were generated
WIDTH, HEIGHT, LEFT, BOTTOM = 400, 230, 46, 34  # of a chart, in px at its own size

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #60646c; --line: #d9d9e0; --page: #fcfcfd; --card: #fff;
  --base: #d6740a; --adapter: #0a6fc2; --good: #18794e; --bad: #c62a2f }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --dim: #a0a4ab; --line: #363a3f; --page: #111113;
  --card: #18191b; --base: #ff9f40; --adapter: #70b8ff; --good: #3dd68c; --bad: #ff9592 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem } p { margin: .4rem 0 }
.dim, figcaption, th { color: var(--dim) } small, figcaption, .dim { font-size: .85rem }
.base { color: var(--base) } .adapter { color: var(--adapter) } .good { color: var(--good) } .bad { color: var(--bad) }
.cards, .charts, .sides { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)) }
.cards { margin-top: 1rem } .charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)) }
.sides { grid-template-columns: repeat(auto-fit, minmax(min(100%, 14rem), 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; margin: 0 }
.card b { display: block; font-size: 1.15rem; font-weight: 600 } .card b span { white-space: nowrap }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { font-weight: 500; font-size: .85rem } th:first-child, td:first-child { text-align: left; padding-left: 0 }
td.heat { background: color-mix(in srgb, var(--adapter) calc(var(--share) * 60%), transparent) }
td.heat.of-base { background: color-mix(in srgb, var(--base) calc(var(--share) * 60%), transparent) }
td:first-child { white-space: normal; min-width: 6.5rem }
.row { display: grid; grid-template-columns: minmax(6rem, 13rem) 1fr 11rem; gap: 0 .75rem; align-items: center;
  margin-bottom: .35rem; line-height: 1.3 } .row > :last-child { white-space: nowrap }
.track { position: relative; height: 1.1rem; border-bottom: 1px solid var(--line) }
.track i { position: absolute; top: .1rem; height: .9rem } .track .band { background: currentColor; opacity: .3 }
.track .dot { width: 3px; margin-left: -1px; background: currentColor }
.track .chance { border-left: 2px dotted var(--dim) }
@media (max-width: 36rem) { .row { grid-template-columns: 1fr auto; margin-bottom: .8rem }
  .row .track { grid-column: 1 / 3; grid-row: 2 }
  th, td { padding: .25rem .35rem; font-size: .85rem } .cards { gap: .5rem } .card b { font-size: 1.05rem }
  .row > :last-child { text-align: right } }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--dim); font-size: 11px }
svg .grid { stroke: var(--line) } svg path { fill: none; stroke: currentColor; stroke-width: 1.6 }
svg .thin { stroke-width: 1; opacity: .75 } svg .dashed { stroke: var(--dim); stroke-dasharray: 3 3; stroke-width: 1 }
svg circle { fill: currentColor }
pre { white-space: pre-wrap; font: inherit; font-size: .9rem; margin: .3rem 0 0; max-height: 16rem; overflow-y: auto }
.sample { margin: 1rem 0 } .sample > pre { color: var(--ink) } .control { color: var(--dim); font-size: .75em }
.sample .card { margin-top: .5rem }
"""


def check_writable(path: str) -> None:
    """Raises ValueError where a report can't be written: before hours of work, not behind them."""
    folder = Path(path).parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--html {path}: can't be written; expected a file in a folder that exists")


def write(path: Path, page: str) -> None:
    """Write a page; a half of one is never there under its name."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(page, encoding="utf-8", errors="replace")
    new.replace(path)


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
    before, after = map(Evaluation.join, results)
    written = [Answers.join(side) for side in answers]
    texts = [side.scores for side in written] or [None, None]
    run = adapter.parent if checkpoint.is_run(adapter.parent) else None
    both = [(label, b, a) for (label, b), (_, a) in zip(measures(before, texts[0]), measures(after, texts[1]))]
    cards = [c for c in both if c[0].strip() in ("loss", "option accuracy", "exact match", "valid format")]
    described = read_config(adapter)
    said = f"{described.base} with {adapter}, {precision}, {after.rows:,} rows, {time.strftime('%Y-%m-%d')}"
    body = f"<h1>Base and adapter</h1><p class=dim>{escape(said)}</p><div class=cards>" + "".join(
        f"<p class=card><small class=dim>{escape(label.strip())}</small><b><span class=base>{b}</span> → "
        f"<span class=adapter>{a}</span></b></p>"
        for label, b, a in cards
    )
    body += "</div>" + _section("All measures", _table([("", "base", "adapter"), *both]))
    if after.option_rows:
        note = "The bar is the 95% interval (Wilson), the dotted line is chance."
        body += _section("Option accuracy", _intervals(names, results), note)
    if len(names) > 1:
        note = "Base → adapter; the interval is the adapter's. Majority: what always saying that letter would reach."
        tables = _table(by_data_set(names, *results))
        if answers:
            tables += "<p></p>" + _table(texts_by_data_set(names, *([a.scores for a in side] for side in answers)))
        body += _section("Each data set", tables, note)
    if run:
        body += _section("How training went", _curves(checkpoint.read_metrics(run)))
    if after.option_rows:
        note = "A line for each right letter: which letters were said. Darker is a larger share of the line."
        body += _section("Right letters, and letters said", _letters(before.choices, after.choices), note)
        note = (
            "How often answers of some confidence, the chosen option's probability, are right: on the dashed line, 60% "
            "of those of 60% confidence. Larger dots are more answers."
        )
        body += _section("Calibration", _calibration(before.choices, after.choices), note)
    return _document(f"{adapter}: base and adapter", body + _samples(written, run))


def _document(title: str, body: str) -> str:
    """A page that may neither load nor run anything."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta http-equiv=Content-Security-Policy "
        f'content="{policy}"><meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _section(title: str, body: str, note: str = "") -> str:
    return f"\n<h2>{title}</h2>{f'<p class=dim>{note}</p>' if note else ''}{body}" if body else ""


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = [[escape(cell) for cell in line] for line in lines]
    named = [c.removeprefix("  ") for c in head]
    body = "".join(
        f"<tr><td>{'&emsp;' * line[0].startswith('  ')}{line[0].strip()}</td>"
        + "".join(f"<td>{c}</td>" for c in line[1:]) + "</tr>"
        for line in rest
    )  # fmt: skip
    return f"<div class=scroll><table><tr>{''.join(f'<th>{c}</th>' for c in named)}</tr>{body}</table></div>"


def _intervals(names: Sequence[str], results: Sequence[Sequence[Evaluation]]) -> str:
    """A track from 0 to 100% for each side and data set."""
    lines = []
    sides = [(name, *pair) for name, *pair in zip(names, *results)]
    if len(names) > 1:
        sides.append(("all", *map(Evaluation.join, results)))
    for name, *pair in sides:
        for side, result in zip(("base", "adapter"), pair):
            if result.option_accuracy is None:
                continue
            low, high = result.choices.interval
            label = side if len(sides) == 1 else f"{Path(name).name}, {side}"
            lines.append(
                f"<div class=row><span>{escape(label)}</span><div class='track {side}'>"
                f'<i class=band style="left:{low:.2%};width:{high - low:.2%}"></i>'
                f'<i class=dot style="left:{result.option_accuracy:.2%}"></i>'
                f'<i class=chance style="left:{result.chance:.2%}"></i></div>'
                f"<span>{result.option_accuracy:.1%} <small class=dim>{between((low, high))}</small></span></div>"
            )
    return "".join(lines)


def _letters(before: Choices, after: Choices) -> str:
    """The confusion table of each side, its cells shaded by their share of the row."""
    out = []
    for side, choices in (("base", before), ("adapter", after)):
        head, *lines = by_letter(choices)
        n = len(choices.letters)
        rows = []
        for line, counts in zip(lines, choices.confusion):
            shares = counts / max(1, counts.sum())
            cells = [
                f'<td class="heat of-{side}" style="--share:{s:.3f}">{c}</td>' for s, c in zip(shares, line[1 : n + 1])
            ]
            rows.append(f"<tr><td>{escape(line[0])}</td>{''.join(cells)}"
                        f"{''.join(f'<td>{escape(c)}</td>' for c in line[n + 1 : -1])}</tr>")  # fmt: skip
        heads = ["right", *choices.letters, *head[n + 1 : -1]]
        out.append(
            f"<figure class=card><figcaption class={side}>{side}</figcaption><div class=scroll><table><tr>"
            f"{''.join(f'<th>{escape(h)}</th>' for h in heads)}</tr>{''.join(rows)}</table></div></figure>"
        )
    return f"<div class=charts>{''.join(out)}</div>"


def _calibration(before: Choices, after: Choices) -> str:
    marks = [f"<path class=dashed d='{_path([(0, 0), (1, 1)], (0, 1), (0, 1))}'/>"]
    for side, choices in (("base", before), ("adapter", after)):
        seen = [(c, a, n) for n, c, a in choices.bins if n]
        marks.append(f"<g class={side}><path class=thin d='{_path([s[:2] for s in seen], (0, 1), (0, 1))}'/>")
        for confidence, accuracy, n in seen:
            x, y = _place(confidence, accuracy, (0, 1), (0, 1))
            marks.append(f"<circle cx={x} cy={y} r={2 + 6 * math.sqrt(n / len(choices)):.1f} opacity=.75 />")
        marks.append("</g>")
    words = "; ".join(
        f"<span class={side}>{side}</span>: mean confidence {c.confidence.mean():.1%}, expected calibration error "
        f"{c.calibration_error:.1%}" for side, c in (("base", before), ("adapter", after))
    )  # fmt: skip
    chart = _chart(f"accuracy over confidence; {words}", "".join(marks), (0, 1), (0, 1), "confidence")
    return f"<div class=charts>{chart}<div></div></div>"


def _curves(events: Sequence[dict[str, Any]]) -> str:
    """Loss and learning rate over steps, of a run's metrics."""

    def points(event: str, key: str) -> list[tuple[float, float]]:
        found = [(e.get("step"), e.get(key)) for e in events if e.get("event") == event]
        return [(x, y) for x, y in found if all(isinstance(v, int | float) and math.isfinite(v) for v in (x, y))]

    train, held, rate = points("train", "loss"), points("eval", "eval_loss"), points("train", "lr")
    if not train:
        return ""
    steps = (0, max(x for x, _ in train + held))
    high = (0, 1.05 * max(y for _, y in train + held) or 1)
    marks = f"<path class=thin d='{_path(train, steps, high)}'/>"
    words = "training loss per supervised token"
    if held:
        dots = "".join("<circle cx={} cy={} r=3 />".format(*_place(*p, steps, high)) for p in held)
        marks += f"<g class=adapter><path d='{_path(held, steps, high)}'/>{dots}</g>"
        best = min(held, key=lambda p: p[1])
        words += f", <span class=adapter>held-out loss: least {best[1]:.4f} at step {best[0]:,}</span>"
    charts = _chart(words, marks, steps, high, "optimizer step")
    if rate:
        top = (0, 1.05 * max(y for _, y in rate) or 1)
        charts += _chart("learning rate", f"<path d='{_path(rate, steps, top)}'/>", steps, top, "optimizer step")
    return f"<div class=charts>{charts}</div>"


Range = tuple[float, float]


def _place(x: float, y: float, xs: Range, ys: Range) -> tuple[float, float]:
    """A point of the data -> of the picture."""
    right, up = ((v - low) / ((high - low) or 1) for v, (low, high) in ((x, xs), (y, ys)))
    return round(LEFT + right * (WIDTH - LEFT - 12), 1), round(HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - 10), 1)


def _path(points: Sequence[tuple[float, float]], xs: Range, ys: Range) -> str:
    return " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(_place(*p, xs, ys) for p in points))


def _chart(caption: str, marks: str, xs: Range, ys: Range, below: str) -> str:
    """A chart with its grid; caption and marks are HTML, made here."""
    grid = []
    for y in _ticks(ys):
        x0, at = _place(xs[0], y, xs, ys)
        grid.append(
            f"<path class=grid d='M{x0} {at}H{WIDTH - 12}'/><text x={x0 - 6} y={at + 4} text-anchor=end>{y:g}</text>"
        )
    for x in _ticks(xs):
        at, y0 = _place(x, ys[0], xs, ys)
        grid.append(f"<text x={at} y={y0 + 14} text-anchor=middle>{x:g}</text>")
    name = f"<text x={(LEFT + WIDTH) // 2} y={HEIGHT - 4} text-anchor=middle>{below}</text>"
    return (f"<figure class=card><figcaption>{caption}</figcaption><svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img>"
            f"{''.join(grid)}{name}{marks}</svg></figure>")  # fmt: skip


def _ticks(between: Range) -> list[float]:
    """Three to six round numbers."""
    low, high = between
    size = (high - low) / 5 or 1
    unit = 10.0 ** math.floor(math.log10(size))
    step = next(unit * k for k in (1, 2, 5, 10) if unit * k >= size * 0.999)
    return [float(f"{step * i:.12g}") for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _samples(answers: Sequence[Answers], run: Path | None) -> str:
    """What both wrote, beside the reference."""
    if answers:
        before, after = answers
        chosen = np.unique(np.linspace(0, len(after.where) - 1, min(SHOWN, len(after.where))).round().astype(int))
        samples = [
            {"where": after.where[i], "prompt": after.prompts[i], "reference": after.references[i],
             "before": before.answers[i], "after": after.answers[i]} for i in chosen
        ]  # fmt: skip
        note = f"{len(samples)} of {len(after.where):,} rows that both answered."
    else:
        file = run / "samples.jsonl" if run else None
        if not file or not file.is_file():
            return ""
        try:
            samples = [dict(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
        except (ValueError, TypeError, RecursionError):  # damaged: no reason to lose the rest
            return ""
        note = "The run's own samples; --generate N lets both answer more rows."

    def card(label: str, text: str, reference: str) -> str:
        same = " ".join(text.split()) == " ".join(reference.split())
        mark = "" if label == "reference" else "<span class=good> ✓</span>" if same else "<span class=bad> ✗</span>"
        return f"<div class=card><small class={label}>{label}{mark}</small><pre>{escape(text) or '&nbsp;'}</pre></div>"

    out = []
    for s in samples:
        where, prompt, reference, before, after = (
            str(s.get(k, "")) for k in ("where", "prompt", "reference", "before", "after")
        )
        shown = re.sub(r"(&lt;\|[^|&]{1,40}\|&gt;)", r"<span class=control>\1</span>", escape(prompt))
        sides = [("reference", reference), ("base", before), ("adapter", after)]
        out.append(
            f"<div class='sample card'><small class=dim>{escape(where)}</small><pre>{shown}</pre><div class=sides>"
            f"{''.join(card(label, text, reference) for label, text in sides)}</div></div>"
        )
    return _section("Side by side", "".join(out), note)
