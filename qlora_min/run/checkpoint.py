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

import hashlib
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import lock_descriptor
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ..system.files import UNSUPPORTED, atomic_folder, sha256

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"
LOCK = ".lock"
RECORDED = ("options", "base", "files", "data", "versions")  # the parts of config.json that resuming compares
BEFORE_A_RUN = {LOCK, ".config.json.new"}  # all that a start which failed can leave
# What reading a bad checkpoint raises.
DAMAGED = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, SafetensorError)


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
    with suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


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
    kinds = {"__tensor__": tensors.__getitem__, "__dict__": dict, "__list__": list, "__tuple__": tuple}
    return json.loads(json.dumps(value), object_pairs_hook=lambda pairs: kinds[pairs[0][0]](pairs[0][1]))


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: set[int]) -> Path:
    """Write checkpoints/step-N atomically, then remove all but the last two and those in `keep`.

    Raises:
        OSError: it could not be written; those before it are still there.
    """
    folder = run / "checkpoints" / f"step-{step}"
    tensors: dict[str, torch.Tensor] = {}
    files = {STATE: json.dumps(flatten(state, tensors)).encode(), TENSORS: save(tensors)}
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
    return sorted(int(n[5:]) for n in _names(run / "checkpoints") if re.fullmatch(r"step-\d+", n))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """A checkpoint's state, after its files were compared with the manifest.

    Raises:
        ValueError: a file is missing, damaged, or not as the manifest says.
        OSError: the file system fails, which says nothing about the checkpoint.
    """
    try:
        sums = {name: sha256(folder / name) for name in (STATE, TENSORS)}
        manifest = (folder / MANIFEST).read_bytes()
        if manifest == _manifest(sums):
            return unflatten(json.loads((folder / STATE).read_text(encoding="utf-8")), load_file(folder / TENSORS))
    except DAMAGED as e:
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


def read_record(run: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        ValueError: the directory holds no run.
    """
    try:
        record = json.loads((run / "config.json").read_text(encoding="utf-8"))
        if isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in RECORDED):
            return record
        why = " is damaged or another program's"
    except (OSError, ValueError) as e:
        why = f": {getattr(e, 'strerror', e)}"
    raise ValueError(f"'{run}' holds no run (its config.json{why}); give a run's directory")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory, finished or not."""
    with suppress(ValueError):
        return bool(read_record(folder))
    return False


class Lock(closing):
    """A run's directory is one process's: an advisory lock that ends with its owner, however that ends.

    Where the file system or the platform has no locks there is a warning, and no protection: filelock's `FileLock`
    would put a marker there, which outlives a process that is killed.

    Raises:
        ValueError: another process holds it.
    """

    def __init__(self, run: Path):
        self.file = (run / LOCK).open("a", encoding="utf-8")  # not inherited by programs that we start
        super().__init__(self.file)
        try:
            if not lock_descriptor(self.file.fileno(), blocking=False):
                self.file.close()
                owner = (run / LOCK).read_text(encoding="utf-8").strip() or "another process"
                raise ValueError(f"'{run}': {owner} is training there; wait until it ends, or stop it")
        except OSError as e:
            if e.errno not in UNSUPPORTED:
                raise
            print(f"warning: no locks here ({e}): let no other process train in '{run}'", file=sys.stderr)
        (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")


class Metrics:
    """metrics.jsonl: an event a line. Lines wait in memory until `flush` has them on disk, whole and in order.

    Attributes:
        size: bytes that are on disk for certain; a checkpoint remembers it.
        echo: is told each event too, as soon as there is one.
    """

    def __init__(self, run: Path):
        self.echo: Callable[[dict[str, Any]], object] = lambda event: None
        self.path = run / "metrics.jsonl"
        self.waiting: list[bytes] = []
        self.size = self.path.stat().st_size if self.path.exists() else 0

    def write(self, event: str, **values: Any) -> None:
        """Add an event; a number that is not finite, for which JSON has no word, becomes null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.waiting.append((json.dumps({"event": event, **values}) + "\n").encode())
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
        with suppress(ValueError, RecursionError):
            if isinstance(event := json.loads(line), dict) and "event" in event:
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
