"""Untrusted text in messages: one line, of limited length, without secrets."""

import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Failed(RuntimeError):
    """Work that can't go on, for a reason that is said in full: a command prints the message, and exits with 1."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def shown(value: Any) -> str:
    """The repr of a value from a file that may be hostile, for an error message: one line of at most 120 characters."""
    return clipped(_REPR.repr(value), 120)


def clipped(text: object, limit: int = 160) -> str:
    """Untrusted text, such as a library's error, for an error message: one line of at most `limit` characters."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * limit])
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def refusing(what: str, fix: str = "", errors: type | tuple[type, ...] = Exception) -> Iterator[None]:
    """Convert errors in this context to a ValueError of one line, `WHAT (error); FIX`: by default any, since damaged
    files cause errors of every type."""
    try:
        yield
    except errors as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else getattr(e, "strerror", None) or first_line(e)
        raise ValueError(f"{what} ({clipped(why)}){fix and '; '}{fix}") from None


_SECRETS = re.compile(r"(?<=://)\S*@|[^\s/]+:[^\s/]+@|\bhf_[A-Za-z0-9]{20,}")  # user:password@, hub tokens


def redacted(text: str) -> str:
    """Replace passwords and hub tokens in a text by ***: those of the environment, and any of a known form."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(token := os.environ.get(name, "")) >= 8:
            text = text.replace(token, "***")
    return _SECRETS.sub("***", text)


def refuse_secrets(name: str, what: str) -> None:
    """Check that a name contains no password or token, since names are written to logs and files.

    Args:
        what: what is named, for the message.

    Raises:
        ValueError: the name contains a secret; the message omits it.
    """
    if redacted(name) != name:
        raise ValueError(
            f"{what}: '{clipped(redacted(name))}' carries a token or password; give a hub id like OWNER/NAME, "
            "and the token in the environment variable HF_TOKEN"
        )
