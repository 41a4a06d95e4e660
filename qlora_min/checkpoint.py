"""The run directory: what is saved, atomically, and how it is found again.

    runs/NAME/config.json            every option as resolved, versions, base id and fingerprint, hash of the data
    runs/NAME/metrics.jsonl          one JSON object an event
    runs/NAME/samples.jsonl          the same held-out prompts answered without and with the adapter
    runs/NAME/curves.png             loss and learning rate over steps
    runs/NAME/adapter/               the best adapter, in PEFT's format
    runs/NAME/checkpoints/step-N/    all that resuming needs: state.json, tensors.safetensors, manifest.json

A folder is written beside its final place, every file and the folder itself are flushed to disk, and only then is it
renamed: a folder with its final name is complete. A checkpoint's manifest holds the sha256 of its files, so that one
which went bad later is noticed and the one before it used. Tensors are stored as safetensors, the rest as JSON: reading
either runs no code. Whatever the disk refuses is an OSError; what it held before is still there then.
"""

import errno
import hashlib
import json
import math
import os
import random
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
LOCK = ".lock"
RECORDED = ("options", "base", "files", "data", "versions")  # the parts of config.json that resuming compares
BEFORE_A_RUN = {LOCK, ".config.json.new"}  # all that a start which failed can leave
# What a file system answers that has no locks, or no flush of a folder.
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


# ---------------------------------------------------------------------------------------------------------------------
# Atomic folders
# ---------------------------------------------------------------------------------------------------------------------


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


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file so that a reader sees all of it or what was there before."""
    _write_file(path, json.dumps(value, indent=2) + "\n")


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON value a line, as `write_json` does."""
    _write_file(path, "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values))


def _write_file(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    _fsync(new)
    new.replace(path)
    _fsync(path.parent)


def clean(run: Path) -> None:
    """Remove what a killed process left half-written, and put a folder back that it was about to replace."""
    for parent in (run, run / "checkpoints"):
        for name in _names(parent):
            left = parent / name
            ours = re.fullmatch(r"\.(.+)\.(new|old|gone)(-\d+)?", name)
            if ours and ours[2] == "old" and not (parent / ours[1]).exists():
                left.rename(parent / ours[1])
            elif ours and left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            elif ours:
                left.unlink()


def _names(folder: Path) -> list[str]:
    """What a folder holds; unlike `glob`, a folder that can't be read does not pass for an empty one."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


# ---------------------------------------------------------------------------------------------------------------------
# State <-> tensors and JSON
# ---------------------------------------------------------------------------------------------------------------------


def flatten(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """A nested state as JSON, its tensors moved into `tensors` (cloned: safetensors refuses shared memory)."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)}{path}"  # the number makes it unique
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"__tensor__": name}
    if isinstance(value, dict):  # pairs, since JSON's keys are text and the optimizer's are numbers
        return {"__dict__": [[k, flatten(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {f"__{type(value).__name__}__": [flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]}
    return value


def unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The reverse of `flatten`."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "__tensor__":
        return tensors[inner]
    if kind == "__dict__":
        return {k: unflatten(v, tensors) for k, v in inner}
    items = [unflatten(v, tensors) for v in inner]
    return tuple(items) if kind == "__tuple__" else items


def rng_state() -> dict[str, Any]:
    """The state of every random number generator: python, numpy, torch, and the current GPU where there is one."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` took."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: set[int]) -> Path:
    """Write checkpoints/step-N atomically, then remove all but the last two and those in `keep`.

    Raises:
        OSError: it could not be written; those before it are still there.
    """
    folder = run / "checkpoints" / f"step-{step}"
    tensors: dict[str, torch.Tensor] = {}
    plain = flatten(state, tensors)
    files = {STATE: json.dumps(plain).encode(), TENSORS: save(tensors)}
    with atomic_folder(folder) as new:
        for name, content in files.items():
            (new / name).write_bytes(content)
        (new / MANIFEST).write_bytes(_manifest({n: hashlib.sha256(c).hexdigest() for n, c in files.items()}))
    try:
        for old in sorted(set(checkpoint_steps(run)[:-2]) - keep - {step}):
            gone = folder.with_name(f".step-{old}.gone")
            folder.with_name(f"step-{old}").rename(gone)  # a half-removed folder must not bear a checkpoint's name
            shutil.rmtree(gone, ignore_errors=True)
    except OSError as e:
        print(f"note: an older checkpoint could not be removed ({e})", file=sys.stderr)
    return folder


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the checkpoints of a run, ascending."""
    names = (n.removeprefix("step-") for n in _names(run / "checkpoints") if n.startswith("step-"))
    return sorted(int(n) for n in names if n.isdigit())


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """A checkpoint's state, after its files were compared with the manifest.

    Raises:
        ValueError: a file is missing, damaged, or not as the manifest says.
        OSError: the file system fails, which says nothing about the checkpoint.
    """
    try:
        sums = {name: _sha256(folder / name) for name in (STATE, TENSORS)}
        manifest = (folder / MANIFEST).read_bytes()
        if manifest == _manifest(sums):
            return unflatten(json.loads((folder / STATE).read_text(encoding="utf-8")), load_file(folder / TENSORS))
    except (
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        ValueError,
        KeyError,
        TypeError,
        SafetensorError,
    ) as e:
        raise ValueError(f"checkpoint '{folder}' can't be read ({e})") from None
    changed = [name for name in sums if sums[name].encode() not in manifest] or [MANIFEST]
    raise ValueError(f"checkpoint '{folder}': {', '.join(changed)} not as it was saved (sha256 differs)")


def newest_checkpoint(run: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that verifies.

    One that does not is renamed to step-N.damaged-TIME, with a note: so that it is neither lost, nor counted among the
    last two, nor in the way when its step is reached again.

    Raises:
        OSError: the file system is not there, or can't be written to.
    """
    for step in reversed(checkpoint_steps(run)):
        folder = run / "checkpoints" / f"step-{step}"
        try:
            return step, load_checkpoint(folder)
        except ValueError as e:
            aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
            folder.rename(aside)
            print(f"note: passed over a damaged checkpoint: {e}; it is now {aside}", file=sys.stderr)
    return None


def _manifest(sums: dict[str, str]) -> bytes:
    """The manifest of files with these sha256: one text only, so that it is compared whole."""
    return (json.dumps(sums, indent=2) + "\n").encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def read_record(run: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        ValueError: the directory holds no run.
    """
    try:
        record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise ValueError(f"'{run}' holds no run (its config.json: {why}); give a run's directory") from None
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in RECORDED):
        raise ValueError(
            f"'{run}' holds no run (its config.json is damaged or another program's); give a run's directory"
        )
    return record


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory, finished or not."""
    try:
        return bool(read_record(folder))
    except ValueError:
        return False


class Lock:
    """A run's directory is one process's: an advisory lock that ends with its owner, however that ends.

    Where the file system or the platform has no locks there is a warning, and no protection.

    Raises:
        ValueError: another process holds it.
    """

    def __init__(self, run: Path):
        self.file = (run / LOCK).open("a+", encoding="utf-8")  # not inherited by programs that we start
        try:
            import fcntl

            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            owner = self.file.read().strip() or "another process"
            self.file.close()
            raise ValueError(f"'{run}': {owner} is training there; wait until it ends, or stop it") from None
        except (ImportError, OSError) as e:
            if isinstance(e, OSError) and e.errno not in UNSUPPORTED:
                raise
            print(f"warning: no locks here ({e}): let no other process train in '{run}'", file=sys.stderr)
            return
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


class Metrics:
    """metrics.jsonl: an event a line. Lines wait in memory until `flush` has them on disk, whole and in order.

    Attributes:
        size: bytes that are on disk for certain; a checkpoint remembers it.
        echo: is told each event too, as soon as there is one.
    """

    echo: Callable[[dict[str, Any]], None] | None = None

    def __init__(self, run: Path):
        self.path = run / "metrics.jsonl"
        self.waiting: list[bytes] = []
        self.size = self.path.stat().st_size if self.path.exists() else 0

    def write(self, event: str, **values: Any) -> None:
        """Add an event; a number that is not finite, for which JSON has no word, becomes null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.waiting.append((json.dumps({"event": event, **values}) + "\n").encode())
        if self.echo:
            self.echo({"event": event, **values})

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: all of it waits on; a half-written line is cut at the next try.
        """
        if not self.waiting:
            return
        with self.path.open("ab") as f:
            if f.tell() > self.size:
                f.truncate(self.size)
            f.write(b"".join(self.waiting))
            f.flush()
            os.fsync(f.fileno())
            self.size = f.tell()
        self.waiting.clear()

    def cut(self, size: int) -> None:
        """Drop what was written after a checkpoint."""
        if self.size < size:
            print(f"note: {self.path} has lost its end ({self.size} bytes, {size} at the checkpoint)", file=sys.stderr)
        elif self.size > size:
            os.truncate(self.path, size)
            self.size = size


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The events of a run."""
    path = run / "metrics.jsonl"
    return events_in(path.read_bytes()) if path.exists() else []


def events_in(lines: bytes) -> list[dict[str, Any]]:
    """The events of some lines; those that hold none, cut short by a crash or damaged, are left out."""
    events = []
    for line in lines.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def is_finished(run: Path) -> bool:
    """Whether a run came to its end."""
    return any(e["event"] == "end" for e in read_metrics(run))


def newest_unfinished(runs: Path) -> Path:
    """The run under `runs` that was started last among those that did not come to their end.

    Raises:
        ValueError: there is none.
    """
    found = [p for p in runs.glob("*") if is_run(p) and not is_finished(p)]
    if not found:
        raise ValueError(f"--resume: no unfinished run under '{runs}'; name its directory: --resume DIR")
    return max(found, key=lambda p: (p / "config.json").stat().st_mtime)
