"""qlora-min compare: training runs side by side."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..run.curves import Events, draw_curves, evaluations
from ..system.console import aligned
from .options import Emit, Parser, new_file

LABEL = 60  # the longest label, in characters
FORMS = {"best_loss": "{:.4f}", "best_step": "{:,}", "option_accuracy": "{:.1%}", "tokens_per_second": "{:,.0f}",
         "peak_memory_gib": "{:.2f}"}  # fmt: skip


def options(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, such as runs/NAME")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), metavar="FILE.png",
                        help="the picture; never overwritten [comparison.png]")  # fmt: skip


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Draw the curves of several runs into one picture, and print their results.

    compare runs/rank8 runs/rank64 --output ranks.png
    """
    for row in compare_runs(args.runs, args.output):
        emit(row)


def labels(runs: Sequence[Path], records: Sequence[dict[str, Any]]) -> list[str]:
    """A label for each run: its name, and the options in which the runs differ ("rank 8") unless they are too long."""
    options = [{k: v for k, v in r["options"].items() if k != "output_dir"} for r in records]
    known = dict.fromkeys(k for o in options for k in o)
    differ = [k for k in known if any(o.get(k) != options[0].get(k) for o in options)]
    names = [run.resolve().name for run in runs]
    names = names if len(set(names)) == len(names) else list(map(str, runs))
    values = [[f"{k.replace('_', ' ')} {_short(o.get(k))}" for k in differ] for o in options]
    made = [", ".join([name, *own]) for name, own in zip(names, values)]
    return made if max(map(len, made)) <= LABEL else names


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_short, value)) or "none"
    return Path(value).name if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def summary(events: Events) -> dict[str, Any]:
    """The best evaluation of a run, its speed and its memory; None for what is unknown."""
    train, ends = ([e for e in events if e["event"] == kind] for kind in ("train", "end"))
    held = evaluations(events)
    best = min(held, key=lambda e: e["eval_loss"], default={})
    last = [{}, *train, *ends][-1]
    return {
        "steps": max((e["step"] for e in [*train, *held]), default=0),
        "finished": bool(ends),
        "best_step": best.get("step"),
        "best_loss": best.get("eval_loss"),
        "option_accuracy": best.get("option_accuracy"),
        "tokens_per_second": last.get("tokens_per_second"),
        "peak_memory_gib": max((e["peak_memory_gib"] for e in train), default=None),
    }


def _held_out(record: dict[str, Any]) -> list[tuple[str, str]]:
    names = {Path(n).name for n in record["options"].get("eval_dataset", [])}
    return sorted((n, v) for n, v in record["files"].items() if Path(n).name in names or n.endswith("(held out)"))


def compare_runs(runs: Sequence[Path], output: Path) -> list[dict[str, Any]]:
    """Print a table of runs, and draw their curves into `output`.

    Returns:
        For each run a dictionary: run, label, and the values of `summary`.

    Raises:
        ValueError: a directory is not a run's or is named twice, or the output exists.
    """
    from ..run.checkpoint import read_metrics, read_record

    new_file("--output", output)
    records, events = [read_record(run) for run in runs], [read_metrics(run) for run in runs]
    if len({str(run.resolve()) for run in runs}) < len(runs):
        raise ValueError(f"{', '.join(map(str, runs))}: a run is named twice; name each once")
    named = labels(runs, records)
    rows = [{"run": str(run), "label": n, **summary(e)} for run, n, e in zip(runs, named, events)]

    table = [["", "best loss", "at step", "option accuracy", "tokens/s", "peak GiB"]]
    for r in rows:
        unfinished = "" if r["finished"] else f" (unfinished, step {r['steps']:,})"
        table.append([r["label"] + unfinished, *("-" if r[k] is None else f.format(r[k]) for k, f in FORMS.items())])
    print(aligned(table))
    if any(_held_out(r) != _held_out(records[0]) for r in records):
        print("note: they were evaluated on different rows, so their losses do not compare")
    reason = draw_curves(dict(zip(named, events)), output)
    print(f"note: {reason}" if reason else f"wrote {output}")
    return rows
