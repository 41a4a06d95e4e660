"""What a user sees while something runs: bars, and lines above them. Of several processes, the first speaks."""

import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from tqdm import tqdm


def is_first_process() -> bool:
    """Whether this process speaks for all that torchrun started, or is alone; also before they know of each other."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


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
