"""Console output: progress bars, lines above them, and tables. Of several processes, only the first prints."""

import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started; also before they are connected."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def bar(total: int | None, label: str | None, unit: str, show: bool = True, keep: bool = False, **kwargs: Any) -> tqdm:
    """A progress bar on stderr, if that is a terminal and $TQDM_DISABLE is not set. Notebooks show only kept bars.

    Args:
        keep: leave the bar on the screen when it is closed.
    """
    hidden = not show or not is_first_process() or os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    disable = hidden or (not keep if "ipykernel" in sys.modules else None)
    return tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=keep, dynamic_ncols=True,
                disable=disable, **kwargs)  # fmt: skip


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line above the bars and flush it; only in the first process."""
    if is_first_process():
        tqdm.write(line, file=file)
        (file or sys.stdout).flush()


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format a table of strings as text, with the first column left-aligned and the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in lines)
    return "\n".join("  ".join(row) for row in rows)
