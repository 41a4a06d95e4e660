"""The run directory: how a run is saved, atomically, and read again.

    runs/NAME/config.json            every option as resolved, versions, base id and fingerprint, hash of the data
    runs/NAME/metrics.jsonl          one JSON object an event
    runs/NAME/samples.jsonl          held-out prompts, answered without and with the adapter
    runs/NAME/curves.png             loss and learning rate over steps
    runs/NAME/adapter/               the best adapter, in PEFT's format
    runs/NAME/checkpoints/step-N/    all that resuming needs: state.json, tensors.safetensors, manifest.json

A folder is written under a temporary name, all its files and the folder itself are flushed to disk, and only then is it
renamed: so a folder with its final name is complete. A checkpoint's manifest holds the sha256 of its files, so that
later damage is detected and the previous checkpoint used. Tensors are stored as safetensors, the rest as JSON: reading
them executes no code. If the disk fails, that is an OSError, and what was saved before is still there.
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
BEFORE_A_RUN = {LOCK, ".config.json.new"}  # all that a failed start can leave behind
# The errors of reading a damaged checkpoint.
DAMAGED = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, SafetensorError)


def clean(run_dir: Path) -> None:
    """Remove what a killed process left half-written, and restore a folder that it was about to replace."""
    for parent in (run_dir, run_dir / "checkpoints"):
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
    """The names in a folder, none if it is missing. Unlike `glob`, this raises OSError if the folder can't be read."""
    with suppress(FileNotFoundError):
        return os.listdir(folder)
    return []


def flatten(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """A nested state as JSON. Its tensors are put into `tensors`, cloned, since safetensors rejects shared memory."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors)}{path}"  # unique by the number
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"__tensor__": name}
    if isinstance(value, dict):  # pairs, since the optimizer's keys are numbers, which JSON objects can't have
        return {"__dict__": [[k, flatten(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {f"__{type(value).__name__}__": [flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]}
    return value


def unflatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The reverse of `flatten`."""
    kinds = {"__tensor__": tensors.__getitem__, "__dict__": dict, "__list__": list, "__tuple__": tuple}
    return json.loads(json.dumps(value), object_pairs_hook=lambda pairs: kinds[pairs[0][0]](pairs[0][1]))


def save_checkpoint(run_dir: Path, step: int, state: dict[str, Any], keep: set[int]) -> Path:
    """Write checkpoints/step-N atomically, then remove all checkpoints but the last two and those in `keep`.

    Raises:
        OSError: it could not be written; the earlier checkpoints are still there.
    """
    folder = run_dir / "checkpoints" / f"step-{step}"
    tensors: dict[str, torch.Tensor] = {}
    files = {STATE: json.dumps(flatten(state, tensors)).encode(), TENSORS: save(tensors)}
    with atomic_folder(folder) as new:
        for name, content in files.items():
            (new / name).write_bytes(content)
        (new / MANIFEST).write_bytes(_manifest({n: hashlib.sha256(c).hexdigest() for n, c in files.items()}))
    try:
        for old in sorted(set(checkpoint_steps(run_dir)[:-2]) - keep - {step}):
            gone = folder.with_name(f".step-{old}.gone")
            folder.with_name(f"step-{old}").rename(gone)  # no half-removed folder may have a checkpoint's name
            shutil.rmtree(gone, ignore_errors=True)
    except OSError as e:
        print(f"note: an older checkpoint could not be removed ({e})", file=sys.stderr)
    return folder


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of the checkpoints of a run, ascending."""
    return sorted(int(n[5:]) for n in _names(run_dir / "checkpoints") if re.fullmatch(r"step-\d+", n))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint, after comparing its files with the manifest.

    Raises:
        ValueError: a file is missing, damaged, or differs from the manifest.
        OSError: the file system failed; the checkpoint may be intact.
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


def newest_checkpoint(run_dir: Path) -> tuple[int, dict[str, Any]] | None:
    """The (step, state) of the newest intact checkpoint, or None; what a killed process left is cleaned up first.

    A damaged one is renamed to step-N.damaged-TIME, with a note. So it is not lost, does not count as one of the last
    two, and does not block its name when its step is reached again.

    Raises:
        OSError: the file system is missing or read-only.
    """
    clean(run_dir)
    for step in reversed(checkpoint_steps(run_dir)):
        folder = run_dir / "checkpoints" / f"step-{step}"
        try:
            return step, load_checkpoint(folder)
        except ValueError as e:
            aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
            folder.rename(aside)
            print(f"note: skipped a damaged checkpoint: {e}; renamed to {aside}", file=sys.stderr)
    return None


def _manifest(sums: dict[str, str]) -> bytes:
    """The only valid manifest of files with these sha256 (name -> sum): it is compared as a whole."""
    return (json.dumps(sums, indent=2) + "\n").encode()


def read_record(run_dir: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        ValueError: the directory is not that of a run.
    """
    try:
        record = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        if isinstance(record, dict) and all(isinstance(record.get(part), dict) for part in RECORDED):
            commits = record.get("commits", {}).values()  # of data sets on the hub
            if all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits):
                return record
        why = " is damaged or another program's"
    except (OSError, ValueError, TypeError, AttributeError) as e:
        why = f": {getattr(e, 'strerror', e)}"
    raise ValueError(f"'{run_dir}' holds no run (its config.json{why}); give a run's directory")


def is_run(folder: Path) -> bool:
    """Whether a folder is the directory of a run, finished or not."""
    with suppress(ValueError):
        return bool(read_record(folder))
    return False


class Lock(closing):
    """An advisory lock on a run's directory, which ends with the process, however that ends.

    If the file system or platform has no locks, a warning is printed and the directory is not protected; filelock's
    `FileLock` would fall back to a marker file, which outlives a killed process.

    Raises:
        ValueError: another process holds the lock.
    """

    def __init__(self, run_dir: Path):
        self.file = (run_dir / LOCK).open("a", encoding="utf-8")  # child processes don't inherit it
        super().__init__(self.file)
        try:
            if not lock_descriptor(self.file.fileno(), blocking=False):
                self.file.close()
                owner = (run_dir / LOCK).read_text(encoding="utf-8").strip() or "another process"
                raise ValueError(f"'{run_dir}': {owner} is training there; wait until it ends, or stop it")
        except OSError as e:
            if e.errno not in UNSUPPORTED:
                raise
            print(f"warning: no locks here ({e}): let no other process train in '{run_dir}'", file=sys.stderr)
        (run_dir / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")


class Metrics:
    """metrics.jsonl, one event a line. Lines wait in memory until `flush` writes them to disk, whole and in order.

    Attributes:
        size: the number of bytes that are safely on disk; checkpoints record it.
        echo: called with each event as soon as it is added.
    """

    def __init__(self, run_dir: Path):
        self.echo: Callable[[dict[str, Any]], object] = lambda event: None
        self.path = run_dir / "metrics.jsonl"
        self.waiting: list[bytes] = []
        self.size = self.path.stat().st_size if self.path.exists() else 0

    def write(self, event: str, **values: Any) -> None:
        """Add an event. Numbers that are not finite become null, since JSON has none."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.waiting.append((json.dumps({"event": event, **values}) + "\n").encode())
        self.echo({"event": event, **values})

    def flush(self) -> None:
        """Write the waiting lines.

        Raises:
            OSError: all of them keep waiting; the next try removes what was half-written.
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
        """Remove what was written after a checkpoint, which recorded `size` bytes."""
        if self.size < size:
            print(f"note: {self.path} was cut short ({self.size} bytes, {size} at the checkpoint)", file=sys.stderr)
        elif self.size > size:
            os.truncate(self.path, size)
            self.size = size


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run."""
    path = run_dir / "metrics.jsonl"
    return events_in(path.read_bytes()) if path.exists() else []


def events_in(lines: bytes) -> list[dict[str, Any]]:
    """The events in lines of metrics.jsonl. Lines that are damaged, or cut short by a crash, are left out."""
    events = []
    for line in lines.splitlines():
        with suppress(ValueError, RecursionError):
            if isinstance(event := json.loads(line), dict) and "event" in event:
                events.append(event)
    return events


def is_finished(run_dir: Path) -> bool:
    """Whether a run has ended."""
    return any(e["event"] == "end" for e in read_metrics(run_dir))


def newest_unfinished(runs: Path) -> Path:
    """The unfinished run under `runs` that was started last.

    Raises:
        ValueError: there is none.
    """
    found = [p for p in runs.glob("*") if is_run(p) and not is_finished(p)]
    if not found:
        raise ValueError(f"--resume: no unfinished run under '{runs}'; name its directory: --resume DIR")
    return max(found, key=lambda p: (p / "config.json").stat().st_mtime)
