"""Reading files that may be hostile, and writing files completely or not at all.

Models and adapters come from untrusted sources: their files must not link out of the folder, repeat a key or exceed the
size limits; nothing is unpickled or executed. Written data is flushed to disk before it is renamed to its final name,
so that a file or folder with its final name is complete.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .text import refusing, shown

# The errors of a file system that does not support locks, or flushing a folder.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def _fsync(path: Path) -> None:
    folder, windows = path.is_dir(), os.name == "nt"
    if folder and windows:  # which flushes no folders, and files only if they are open for writing
        return
    fd = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in UNSUPPORTED or not folder:  # only flushing a folder may be unsupported
            raise
    finally:
        os.close(fd)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder next to `path` to write to, and rename it to `path` when the block ends without an error.

    An existing folder is moved aside first and deleted last. If the process is killed in between, it remains as
    .NAME.old-PID, which `run.checkpoint.clean` restores.

    Raises:
        OSError: also if a library reports an error of the disk as one of its own (safetensors, tokenizers).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    with suppress(FileNotFoundError):
        shutil.rmtree(new)  # left by a try that failed
    new.mkdir()
    try:
        yield new
        mode = new.stat().st_mode & 0o666  # what the umask leaves: safetensors makes files of 0600
        for file in sorted(new.rglob("*")):
            if file.is_file():
                file.chmod(mode)
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
        reported = re.search(r"\(os error (\d+)\)", str(e))  # the format of Rust libraries
        if isinstance(e, OSError) or not reported:
            raise
        raise OSError(int(reported[1]), os.strerror(int(reported[1])), str(path)) from e
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a file, given whole or in parts, atomically: a reader sees all of it, or the old content. A lone surrogate
    is written as "?"."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8", errors="replace") as f:
        for part in [text] if isinstance(text, str) else text:
            f.write(part)
    _fsync(new)
    new.replace(path)
    _fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically like `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write one JSON value per line, atomically like `write_text`."""
    write_text(path, (json.dumps(v, ensure_ascii=False) + "\n" for v in values))


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def check_links(folder: Path) -> None:
    """Check that no file of a model's or an adapter's folder links out of it. The folder itself may be a link.

    The hub's cache is an exception: the files of models--A--B/snapshots/REVISION are links into models--A--B/blobs.

    Raises:
        ValueError: the real path of a file is outside.
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
    """Read a JSON object from a file that may be hostile.

    Raises:
        ValueError: the file can't be read, is not a JSON object, is larger than 64 MiB, repeats a key or contains NaN
            or infinity.
    """

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    with refusing(f"{path}: not readable JSON", errors=(OSError, ValueError, RecursionError)):
        if path.stat().st_size > 2**26:
            raise ValueError("larger than 64 MiB")
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once, parse_constant=no_constant)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: refuse an object that repeats a key, since readers differ in which of the two they use."""
    value: dict[str, Any] = {}
    for key, v in pairs:
        if key in value:
            raise ValueError(f"the key {shown(key)} is repeated")
        value[key] = v
    return value
