"""What a user sees of a run: bars, lines above them, curves, and TensorBoard's view, from its events.

matplotlib is an extra: without it there is a note, and no picture. TensorBoard is one too.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from .config import is_first_process

Events = Sequence[dict[str, Any]]  # of a run's metrics.jsonl
LABEL = 60  # characters at most, of what tells a run from others


def bar(total: int | None, label: str | None, unit: str, show: bool = True, keep: bool = False, **kwargs: Any) -> tqdm:
    """A bar on stderr, if that is a terminal and $TQDM_DISABLE is not set; a notebook shows those that it is to keep.

    Args:
        keep: it stays when it is full.
    """
    hidden = not show or not is_first_process() or os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    disable = hidden or (not keep if "ipykernel" in sys.modules else None)
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=keep, dynamic_ncols=True,
                disable=disable, **kwargs)  # fmt: skip


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line above the bars, at once also where the output is a file; of several processes, the first does."""
    if is_first_process():
        tqdm.write(line, file=file)
        (file or sys.stdout).flush()


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table of strings as text, its first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in lines)
    return "\n".join("  ".join(row) for row in rows)


def draw_curves(runs: Mapping[str, Events], path: Path) -> str | None:
    """Draw loss and learning rate over optimizer steps into a PNG: of one run, or of several, by label.

    Returns:
        None, or the reason why there is no picture.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {path.name}: matplotlib is not installed (pip install 'qlora_min[plot]')"

    figure, one = Figure(figsize=(8, 6), layout="constrained"), len(runs) == 1
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    for i, (label, events) in enumerate(runs.items()):
        blue, orange, green = ("tab:blue", "tab:orange", "tab:green") if one else [f"C{i % 10}"] * 3
        train, held = [e for e in events if e["event"] == "train"], _evaluations(events)
        top.plot([e["step"] for e in train], [e["loss"] for e in train], color=blue, alpha=0.7 if one else 0.3,
                 label="training" if one else None)  # fmt: skip
        top.plot([e["step"] for e in held], [e["eval_loss"] for e in held], "o-", color=orange,
                 label="held out" if one else label)  # fmt: skip
        if held and one:
            best = min(held, key=lambda e: e["eval_loss"])
            right = best["step"] > held[-1]["step"] / 2  # keep the words inside the picture
            top.annotate(f"best {best['eval_loss']:.3f}", (best["step"], best["eval_loss"]), xytext=(0, 12),
                         textcoords="offset points", ha="right" if right else "left", color=orange)  # fmt: skip
        bottom.plot([e["step"] for e in train], [e["lr"] for e in train], color=green)
    if one:
        top.set(ylabel="loss per supervised token", ylim=(0, None))
    else:
        top.set(ylabel="loss per supervised token, log scale", yscale="log")  # or the start hides how they differ
    top.grid(alpha=0.3)
    top.legend(title=None if one else "dots: held out; faint: training")
    bottom.set(xlabel="optimizer step", ylabel="learning rate")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return None


def _evaluations(events: Events) -> list[dict[str, Any]]:
    return [e for e in events if e["event"] == "eval" and e["eval_loss"] is not None]  # null: it was not finite


class Board:
    """RUN/tensorboard, which follows metrics.jsonl: each line that is safe on disk becomes scalars, and nothing else.

    A process begins with a file of its own and all lines there are; `purge_step=0` tells TensorBoard to forget those
    before it. So a resumed run, whose last lines were cut, and a disk that failed and came back are one case.
    Scalars are `train/NAME` and `eval/NAME` over optimizer steps; the wall time is the run's start plus its training
    time, so that pauses do not show.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, run: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            hint = "pip install 'qlora_min[tensorboard]'"
            raise ValueError(f"--tensorboard: TensorBoard is not installed ({hint})") from None
        self.begin = lambda: SummaryWriter(run / "tensorboard", purge_step=0)
        self.run, self.writer, self.failed = run, None, False

    def update(self) -> None:
        """Add what is new in metrics.jsonl. A disk that fails is a warning, once; the next update begins anew."""
        from .checkpoint import events_in  # not above: it imports torch

        try:
            began, path = (self.run / "config.json").stat().st_mtime, self.run / "metrics.jsonl"
            if self.writer is None:
                self.writer, self.read, self.seconds = self.begin(), 0, 0.0
            lines = path.read_bytes()[self.read :] if path.exists() else b""
            for line in events_in(lines):
                self.seconds = line.get("seconds", self.seconds)
                for key, value in line.items() if line["event"] in ("train", "eval") else ():
                    if type(value) in (int, float) and key not in ("step", "seconds"):
                        tag = f"{line['event']}/{key.removeprefix('eval_')}"
                        self.writer.add_scalar(tag, value, line.get("step"), began + self.seconds)
            self.writer.flush()
            self.read, self.failed = self.read + len(lines), False
        except Exception as e:  # of the disk; as tensorflow has it, where that is installed, it is no OSError
            if not self.failed:
                say(f"warning: no TensorBoard for now ({e}); metrics.jsonl has it all")
            self.writer, self.failed = None, True


# ---------------------------------------------------------------------------------------------------------------------
# Runs beside each other: python -m qlora_min.report RUN [RUN ...]
# ---------------------------------------------------------------------------------------------------------------------


def labels(runs: Sequence[Path], records: Sequence[dict[str, Any]]) -> list[str]:
    """What tells each run from the others: the options in which they differ ("rank 8"); its name where that is much."""
    options = [{k: v for k, v in r["options"].items() if k != "output_dir"} for r in records]
    names = dict.fromkeys(k for o in options for k in o)
    differ = [k for k in names if any(o.get(k) != options[0].get(k) for o in options)]
    made = [", ".join(f"{k.replace('_', ' ')} {_short(o.get(k))}" for k in differ) for o in options]
    if max(map(len, made)) > LABEL:
        made = [""] * len(runs)
    if len(set(made)) == len(made) and differ:
        return made
    names = [run.resolve().name for run in runs]
    names = names if len(set(names)) == len(names) else list(map(str, runs))
    return [f"{label}, {name}".removeprefix(", ") for label, name in zip(made, names)]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_short, value)) or "none"
    return Path(value).name if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def summary(events: Events) -> dict[str, Any]:
    """A run in one line: its best evaluation, its speed and its memory; None for what it has none of."""
    train, ends = ([e for e in events if e["event"] == kind] for kind in ("train", "end"))
    held = _evaluations(events)
    best = min(held, key=lambda e: e["eval_loss"], default={})
    last = ends[-1] if ends else train[-1] if train else {}
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


def compare(runs: Sequence[Path], output: Path) -> list[dict[str, Any]]:
    """Print runs beside each other, and draw them over each other into `output`.

    Returns:
        a dictionary a run: run, label, and what `summary` has.

    Raises:
        ValueError: a directory that holds no run, or an output that exists.
    """
    from .checkpoint import read_metrics, read_record

    if output.exists():
        raise ValueError(f"--output {output}: exists, and is never overwritten; choose another")
    records, events = [read_record(run) for run in runs], [read_metrics(run) for run in runs]
    if len({str(run.resolve()) for run in runs}) < len(runs):
        raise ValueError(f"{', '.join(map(str, runs))}: a run is named twice; name each once")
    named = labels(runs, records)
    rows = [{"run": str(run), "label": n, **summary(e)} for run, n, e in zip(runs, named, events)]

    table = [["", "best loss", "at step", "option accuracy", "tokens/s", "peak GiB"]]
    forms = {"best_loss": "{:.4f}", "best_step": "{:,}", "option_accuracy": "{:.1%}", "tokens_per_second": "{:,.0f}",
             "peak_memory_gib": "{:.2f}"}  # fmt: skip
    for r in rows:
        unfinished = "" if r["finished"] else f" (unfinished, step {r['steps']:,})"
        table.append([r["label"] + unfinished, *("-" if r[k] is None else f.format(r[k]) for k, f in forms.items())])
    print(aligned(table))
    if any(_held_out(r) != _held_out(records[0]) for r in records):
        print("note: they were evaluated on different rows, so their losses do not compare")
    reason = draw_curves(dict(zip(named, events)), output)
    print(f"note: {reason}" if reason else f"wrote {output}")
    return rows


def main() -> None:
    from .cli import Parser, run_script

    parser = Parser(prog="python -m qlora_min.report",
                    description="Draw runs over each other, and print their results.")  # fmt: skip
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's directory, such as runs/NAME")
    parser.add_argument("--output", type=Path, default=Path("comparison.png"), metavar="FILE.png",
                        help="where to draw; never overwritten [comparison.png]")  # fmt: skip
    args = parser.parse_args()
    run_script(lambda: compare(args.runs, args.output) and 0)


if __name__ == "__main__":
    main()
