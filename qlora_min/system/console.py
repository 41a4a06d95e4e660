"""Console output: progress bars, lines above them, and tables, as wide as the terminal at most. Of several processes,
only the first prints.

No character makes printing fail: a console that is not UTF-8 (Windows' cp1252, LC_ALL=C) shows our own signs in ASCII,
and others that it lacks as "?", by the codecs error handler "shown". Its input is read as UTF-8.
"""

import codecs
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from tqdm import tqdm

TOLD_SECONDS = 5.0  # between two lines that stand in for a bar
LEAST = 10  # characters of a progress bar
NAME = 14  # characters of a table's names, if that spares another table below
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


def width() -> int:
    """The columns of the terminal that stdout is; a file or pipe has no limit."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**9


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that torchrun started; also before they are connected."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def hidden() -> bool:
    """Whether there is to be no progress: $TQDM_DISABLE is set (as for --quiet), or another process prints."""
    return not is_first_process() or os.environ.get("TQDM_DISABLE", "") not in ("", "0")


def shows_bars() -> bool:
    """Whether the bars of libraries are to be shown: on a terminal, or in a notebook, unless there is no progress."""
    return not hidden() and ("ipykernel" in sys.modules or sys.stderr.isatty())


class Bar(tqdm):
    """tqdm's bar. Where the terminal is narrow, details are left out from the last, to leave the bar 10 characters.

    Attributes:
        label: begins the lines that `update` prints where stderr is no terminal; None if it prints none.
        told_at: when the last line was printed, where stderr is no terminal.
    """

    label: str | None = None
    told_at = 0.0

    def update(self, n: float | None = 1) -> bool | None:
        """Advance; where stderr is no terminal, say from time to time how much is done."""
        if self.disable and self.label and self.total:
            self.n += n
            self.tell("", lambda: f"{self.label}: {self.n / self.total:.0%}")
        return super().update(n)

    def tell(self, details: str, line: Callable[[], str]) -> None:
        """Show details behind the bar; or where stderr is no terminal print the line, but not every few moments."""
        self.set_postfix_str(details)
        if self.disable and time.monotonic() - self.told_at >= TOLD_SECONDS and not hidden():
            self.told_at = time.monotonic()
            say(line(), sys.stderr)

    def __str__(self) -> str:
        values = self.format_dict
        ncols = values["ncols"]
        if not ncols or not self.total:
            return super().__str__()
        values["prefix"] = shortened(values["prefix"], ncols // 3)
        details = ["{elapsed}<{remaining}", *filter(None, (self.postfix or "").split(", ")), "{rate_fmt}"]
        for n in range(len(details), -1, -1):
            rest = "{n_fmt}/{total_fmt}" + (f" [{', '.join(details[:n])}]" if n else "")
            values["bar_format"] = f"{{l_bar}}{rest}"
            if len(self.format_meter(**values)) <= ncols - LEAST - 2:
                break
        return self.format_meter(**values | {"bar_format": f"{{l_bar}}{{bar}}| {rest}"})


def bar(total: int | None, label: str | None, unit: str, show: bool = True, keep: bool = False, **kwargs: Any) -> Bar:
    """A progress bar on stderr, if that is a terminal and $TQDM_DISABLE is not set. Notebooks show only kept bars.

    Args:
        keep: leave the bar on the screen when it is closed.
    """
    disable = not show or hidden() or (not keep if "ipykernel" in sys.modules else None)
    made = Bar(total=total, desc=label, unit=unit, unit_scale=unit == "B", leave=keep, dynamic_ncols=True,
                disable=disable, **kwargs)  # fmt: skip
    made.label, made.told_at = label if disable is None else None, time.monotonic()
    return made


def say(line: str, file: TextIO | None = None) -> None:
    """Print a line above the bars and flush it; only in the first process."""
    if is_first_process():
        file = file or sys.stdout
        tqdm.write(showable(line, file), file=file)
        file.flush()


def shortened(name: str, most: int) -> str:
    """The end of a name, which tells most about a path, in at most `most` characters."""
    return name if len(name) <= most else "..." + name[3 - most :]


def wrapped(line: str, indent: int) -> str:
    """A line as several, broken at spaces to fit the terminal; from the second on, they are indented."""
    return textwrap.fill(line, width(), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Format a table of strings as text, with the first column left-aligned and the others right-aligned.

    In a terminal that is too narrow, the names in the first column are shortened, but kept distinct. If that does not
    suffice, columns continue below, beside the names again.
    """
    names, *columns = zip(*([showable(cell) for cell in line] for line in lines))  # as wide as what is shown
    longest, sizes = max(map(len, names)), [max(map(len, column)) for column in columns]
    room = width() - sum(sizes) - 2 * len(sizes)
    if longest > room:
        least = room if room >= NAME else width() // 3
        most = range(least, min(longest, width() // 2))
        longest = next((n for n in most if len({shortened(s, n) for s in names}) == len({*names})), min(longest, least))
    blocks, used = [], width()
    for column, size in zip(columns, sizes):
        if used + 2 + size > width():
            blocks.append([shortened(name, longest).ljust(longest) for name in names])
            used = longest
        blocks[-1] = [f"{line}  {cell.rjust(size)}" for line, cell in zip(blocks[-1], column)]
        used += 2 + size
    return "\n\n".join("\n".join(block) for block in blocks)
