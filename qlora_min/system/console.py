"""Console output: progress bars, lines above them, and tables. Of several processes, only the first prints.

Nothing fails for its characters: a console that is not UTF-8 (Windows' cp1252, LC_ALL=C) shows those that it lacks as
"?", and our own signs in ASCII; that is the codecs' error handler "shown". What comes in is read as UTF-8 there.
"""

import codecs
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

ASCII = {"⟦": "[[", "⟧": "]]", "→": "->", "█": "#", "▏": "|"}  # our own signs, for consoles that lack them


codecs.register_error("shown", lambda e: ("".join(ASCII.get(c, "?") for c in e.object[e.start : e.end]), e.end))


def show_everything() -> None:
    """From now on no print and no input of this process fails for its characters."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "shown"), (sys.stderr, "shown")):
        with suppress(AttributeError, ValueError):  # it is no console, or closed, or has been read from
            stream.reconfigure(errors=errors)


def typed(text: str) -> str:
    """What was typed, of an argument or a line of stdin: bytes that the locale could not decode, as UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def showable(text: str, file: TextIO | None = None) -> str:
    """`text` as `file` (stdout, if None) can show it."""
    encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "shown").decode(encoding)


def colours() -> bool:
    """Whether to print in colour: on a terminal, unless $NO_COLOR is set (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


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
        file = file or sys.stdout
        tqdm.write(showable(line, file), file=file)
        file.flush()


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format a table of strings as text, with the first column left-aligned and the others right-aligned."""
    lines = [[showable(cell) for cell in line] for line in lines]  # as wide as what is shown
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in lines)
    return "\n".join("  ".join(row) for row in rows)
