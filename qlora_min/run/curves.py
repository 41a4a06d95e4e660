"""A view of metrics.jsonl: loss curves as a picture, of a run or of several."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

Events = Sequence[dict[str, Any]]  # of a run's metrics.jsonl


def draw_curves(runs: Mapping[str, Events], path: Path | IO) -> str | None:
    """Draw loss and learning rate over optimizer steps into a file: of one run, or of several, by label.

    The axis of losses is logarithmic for several runs, or if the losses span more than a decade.

    Returns:
        None, or the reason why there is no picture.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError:
        return f"no {path.name}: matplotlib is not installed (pip install 'qlora_min[plot]')"

    figure, one = Figure(figsize=(8, 6), layout="constrained"), len(runs) == 1
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    drawn = []
    for i, (label, events) in enumerate(runs.items()):
        blue, orange, green = ("tab:blue", "tab:orange", "tab:green") if one else [f"C{i % 10}"] * 3
        train, held = [e for e in events if e["event"] == "train"], evaluations(events)
        drawn += [*(e["loss"] for e in train), *(e["eval_loss"] for e in held)]
        top.plot([e["step"] for e in train], [e["loss"] for e in train], color=blue, alpha=0.7 if one else 0.3,
                 label="training" if one else None)  # fmt: skip
        top.plot([e["step"] for e in held], [e["eval_loss"] for e in held], "o-", color=orange,
                 label="held out" if one else label)  # fmt: skip
        if held and one:
            best = min(held, key=lambda e: e["eval_loss"])
            right = best["step"] > held[-1]["step"] / 2  # keep the label inside the picture
            top.annotate(f"best {best['eval_loss']:.4f}", (best["step"], best["eval_loss"]), xytext=(0, 12),
                         textcoords="offset points", ha="right" if right else "left", color=orange)  # fmt: skip
        bottom.plot([e["step"] for e in train], [e["lr"] for e in train], color=green)
    positive = [loss for loss in drawn if loss and loss > 0]  # null: not finite
    if positive and (not one or max(positive) > 10 * min(positive)):  # a linear scale would hide the differences
        top.set(ylabel="loss per token, log scale", yscale="log")
        top.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(), major_formatter="{x:g}")
    else:
        top.set(ylabel="loss per supervised token", ylim=(0, None))
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
