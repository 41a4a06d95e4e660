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
either runs no code.
"""

import hashlib
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

STATE, TENSORS, MANIFEST = "state.json", "tensors.safetensors", "manifest.json"


# ---------------------------------------------------------------------------------------------------------------------
# Atomic folders
# ---------------------------------------------------------------------------------------------------------------------


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError:
        if not path.is_dir():  # some file systems can't flush a folder; a file must be
            raise
    finally:
        os.close(fd)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path` to write into; when the block ends without an error, it becomes `path`.

    A folder that stood there before is moved aside first and removed last.
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
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file so that a reader sees all of it or what was there before."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _fsync(new)
    new.replace(path)


def write_jsonl(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON value a line, as `write_json` does."""
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    _fsync(new)
    new.replace(path)


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
    """Write checkpoints/step-N atomically, then remove all but the last two and those in `keep`."""
    folder = run / "checkpoints" / f"step-{step}"
    tensors: dict[str, torch.Tensor] = {}
    plain = flatten(state, tensors)
    with atomic_folder(folder) as new:
        (new / STATE).write_text(json.dumps(plain), encoding="utf-8")
        save_file(tensors, new / TENSORS)
        (new / MANIFEST).write_text(json.dumps({f: _sha256(new / f) for f in (STATE, TENSORS)}, indent=2))
    done = [s for s in checkpoint_steps(run) if s <= step]  # newer ones are damaged, or we would not be here
    for old in set(done[:-2]) - keep:
        gone = folder.with_name(f".step-{old}.old")
        folder.with_name(f"step-{old}").rename(gone)  # a half-removed folder must not bear a checkpoint's name
        shutil.rmtree(gone, ignore_errors=True)
    return folder


def checkpoint_steps(run: Path) -> list[int]:
    """The steps of the checkpoints of a run, ascending."""
    names = (p.name.removeprefix("step-") for p in (run / "checkpoints").glob("step-*"))
    return sorted(int(n) for n in names if n.isdigit())


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """A checkpoint's state, after its files were compared with the manifest.

    Raises:
        ValueError: a file is missing, damaged, or not as the manifest says.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        changed = [name for name in (STATE, TENSORS) if _sha256(folder / name) != manifest[name]]
        if not changed:
            return unflatten(json.loads((folder / STATE).read_text(encoding="utf-8")), load_file(folder / TENSORS))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as e:
        raise ValueError(f"checkpoint '{folder}' can't be read ({e})") from None
    raise ValueError(f"checkpoint '{folder}': {', '.join(changed)} not as it was saved (sha256 differs)")


def clean(run: Path) -> None:
    """Remove what a killed process left half-written, and put an adapter back that it was about to replace."""
    for old in run.glob(".adapter.old-*"):
        if not (run / "adapter").exists():
            old.rename(run / "adapter")
    for left in [*run.glob(".*"), *(run / "checkpoints").glob(".*")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def newest_checkpoint(run: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest checkpoint that verifies; warns of any it passes over."""
    for step in reversed(checkpoint_steps(run)):
        try:
            return step, load_checkpoint(run / "checkpoints" / f"step-{step}")
        except ValueError as e:
            print(f"note: passed over a damaged checkpoint: {e}", file=sys.stderr)
    return None


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
        raise ValueError(f"'{run}' holds no run (its config.json can't be read: {e}); give a run's directory") from None
    if not isinstance(record, dict) or not isinstance(record.get("options"), dict):
        raise ValueError(f"'{run}' holds no run (its config.json is another program's); give a run's directory")
    return record


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's directory, finished or not."""
    try:
        return bool(read_record(folder))
    except ValueError:
        return False


class Metrics:
    """metrics.jsonl: an event a line, flushed as it is written."""

    def __init__(self, run: Path):
        self.path = run / "metrics.jsonl"

    def write(self, event: str, **values: Any) -> None:
        """Append an event; a number that is not finite, for which JSON has no word, becomes null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"event": event, **values}) + "\n")

    def size(self) -> int:
        """Bytes written so far; a checkpoint remembers it."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, size: int) -> None:
        """Drop what was written after a checkpoint."""
        if self.size() > size:
            os.truncate(self.path, size)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The events of a run; a last line that a crash cut short is left out."""
    path = run / "metrics.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
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
