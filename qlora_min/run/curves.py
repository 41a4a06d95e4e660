"""A view of metrics.jsonl: loss curves as a picture, of a run or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Events = Sequence[dict[str, Any]]  # of a run's metrics.jsonl


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
        train, held = [e for e in events if e["event"] == "train"], evaluations(events)
        top.plot([e["step"] for e in train], [e["loss"] for e in train], color=blue, alpha=0.7 if one else 0.3,
                 label="training" if one else None)  # fmt: skip
        top.plot([e["step"] for e in held], [e["eval_loss"] for e in held], "o-", color=orange,
                 label="held out" if one else label)  # fmt: skip
        if held and one:
            best = min(held, key=lambda e: e["eval_loss"])
            right = best["step"] > held[-1]["step"] / 2  # keep the label inside the picture
            top.annotate(f"best {best['eval_loss']:.3f}", (best["step"], best["eval_loss"]), xytext=(0, 12),
                         textcoords="offset points", ha="right" if right else "left", color=orange)  # fmt: skip
        bottom.plot([e["step"] for e in train], [e["lr"] for e in train], color=green)
    scale = {"ylim": (0, None)} if one else {"yscale": "log"}  # of several runs, a linear scale hides the differences
    top.set(ylabel="loss per supervised token" + ("" if one else ", log scale"), **scale)
    top.grid(alpha=0.3)
    top.legend(title=None if one else "dots: held out; faint: training")
    bottom.set(xlabel="optimizer step", ylabel="learning rate")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    return None


def evaluations(events: Events) -> list[dict[str, Any]]:
    """The evaluations with a finite loss; any other is null in metrics.jsonl."""
    return [e for e in events if e["event"] == "eval" and e["eval_loss"] is not None]
