"""What comes from a disk, and may be hostile; and what goes to one, whole or not at all.

Models and adapters come from anyone: no file of theirs may lead out of its folder, name a thing twice or be larger than
it says, nothing is unpickled and nothing is run. What is written is flushed to disk before it gets its name, so that a
file or a folder with its final name is complete.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .text import clipped, shown

# What a file system answers that has no locks, or no flush of a folder.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in UNSUPPORTED or not path.is_dir():  # some file systems can't flush a folder; a file must be
            raise
    finally:
        os.close(fd)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` to write into; when the block ends without an error, it becomes `path`.

    A folder that stood there before is moved aside first and removed last; `clean` puts it back after a kill between.

    Raises:
        OSError: also where a library reports the disk's error as one of its own (safetensors, tokenizers).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for file in sorted(new.rglob("*")):
            _fsync(file)
        _fsync(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        _fsync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as e:
        reported = re.search(r"\(os error (\d+)\)", str(e))  # as Rust writes it
        if isinstance(e, OSError) or not reported:
            raise
        raise OSError(int(reported[1]), os.strerror(int(reported[1])), str(path)) from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or what was there before; half a surrogate pair becomes "?"."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8", errors="replace")
    _fsync(new)
    new.replace(path)
    _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON value a line, as `write_text` does."""
    write_text(path, "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values))


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_links(folder: Path) -> None:
    """A model's or an adapter's folder may be a link; its files may not lead out of it.

    The hub's cache is the exception: there a file of models--A--B/snapshots/REVISION is a link into models--A--B/blobs.

    Raises:
        ValueError: a file whose real path lies elsewhere.
    """
    root = folder.resolve()
    allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]:
        if path.is_file() and not any(path.resolve().is_relative_to(a) for a in allowed):
            raise ValueError(
                f"'{folder}': {shown(path.name)} is a link to a file outside of the folder; "
                "put the file itself there if you trust it"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be hostile.

    Raises:
        ValueError: it can't be read, is no JSON object, is larger than 64 MiB, names a key twice or holds NaN.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        if path.stat().st_size > 2**26:
            raise ValueError("larger than 64 MiB")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once, parse_constant=no_constant)
    except (OSError, ValueError, RecursionError) as e:
        why = "nested too deeply" if isinstance(e, RecursionError) else clipped(e)
        raise ValueError(f"{path}: not readable JSON ({why})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object whose keys are all different; which of two counts, each reader decides for itself."""
    value: dict[str, Any] = {}
    for key, v in pairs:
        if key in value:
            raise ValueError(f"the key {shown(key)} stands there twice")
        value[key] = v
    return value
