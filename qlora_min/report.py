"""What a user sees of a run: bars, lines above them, and curves, from its events.

matplotlib is an extra: without it there is a note, and no picture.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm


def bar(total: int | None, label: str | None, unit: str, show: bool = True, keep: bool = False, **kwargs: Any) -> tqdm:
    """A bar on stderr, if that is a terminal and $TQDM_DISABLE is not set; a notebook shows those that it is to keep.

    Args:
        keep: it stays when it is full.
    """
    hidden = not show or os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    disable = hidden or (not keep if "ipykernel" in sys.modules else None)
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=keep, dynamic_ncols=True,
                disable=disable, **kwargs)  # fmt: skip


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line above the bars, at once also where the output is a file."""
    file = file or sys.stdout
    tqdm.write(line, file=file)
    file.flush()


def draw_curves(events: Sequence[dict[str, Any]], path: Path) -> str | None:
    """Draw loss and learning rate over optimizer steps into a PNG.

    Returns:
        None, or the reason why there is no picture.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no curves.png: matplotlib is not installed (pip install 'qlora_min[plot]')"

    train = [e for e in events if e["event"] == "train"]
    held = [e for e in events if e["event"] == "eval" and e["eval_loss"] is not None]  # null: it was not finite
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, gridspec_kw={"height_ratios": [3, 1]}, layout="constrained"
    )
    top.plot([e["step"] for e in train], [e["loss"] for e in train], color="tab:blue", alpha=0.7, label="training")
    top.plot([e["step"] for e in held], [e["eval_loss"] for e in held], "o-", color="tab:orange", label="held out")
    if held:
        best = min(held, key=lambda e: e["eval_loss"])
        right = best["step"] > held[-1]["step"] / 2  # keep the words inside the picture
        top.annotate(
            f"best {best['eval_loss']:.3f}",
            (best["step"], best["eval_loss"]),
            xytext=(0, 12),
            textcoords="offset points",
            ha="right" if right else "left",
            color="tab:orange",
        )
    top.set_ylabel("loss per supervised token")
    top.set_ylim(bottom=0)
    top.grid(alpha=0.3)
    top.legend()
    bottom.plot([e["step"] for e in train], [e["lr"] for e in train], color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("optimizer step")
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return None
