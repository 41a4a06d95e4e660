"""What a run's directory survives, in figures: `python tests/faults.py [--kills 200]`, about two minutes.

A real Trainer on the demo's model saves with its own code, weights changed each time; what stands on the disk after
each fault is then read as a resumed run reads it. Exit code 1 if anything acknowledged was lost or damage not seen.
"""

import argparse
import contextlib
import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import qlora_min.adapter
from qlora_min.config import Config
from qlora_min.demo import world
from qlora_min.loop import Progress, copies
from qlora_min.lora import lora_parameters
from qlora_min.run import checkpoint
from qlora_min.run.trainer import Trainer

AWAY = (errno.EROFS, errno.EIO, errno.ENOTCONN)  # read-only, failing, gone: what a drive does that drops out


# ---------------------------------------------------------------------------------------------------------------------
# A run that only saves
# ---------------------------------------------------------------------------------------------------------------------


def make_trainer(folder: Path) -> Trainer:
    """A Trainer on a few rows of the demo, in folder/run."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(r) + "\n" for r in world.rows(world.CONDITIONS, 8, seed=1)), encoding="utf-8")
    options = {"model": str(world.MODEL_DIR), "dataset": (str(rows),), "eval_fraction": 0.0, "rank": 4}
    with contextlib.redirect_stdout(io.StringIO()):
        return Trainer(Config(**options, output_dir=str(folder / "run")))


def advance(trainer: Trainer, step: int, evaluated: bool) -> None:
    """As if trained up to `step`: every weight is the step, every fifth step is the best so far."""
    p = trainer.progress
    p.step = step
    with torch.no_grad():
        for weight in lora_parameters(trainer.base.model).values():
            weight.fill_(step)
    if evaluated:
        p.evaluated = step
        if step % 5 == 0 or not trainer.writer.best:
            p.best_step, trainer.writer.best = step, copies(trainer.base.model)
    trainer.writer.metrics.write("train", step=step)


def save(trainer: Trainer, step: int, evaluated: bool = True) -> None:
    """Advance, and save all of it; returning is the acknowledgement."""
    advance(trainer, step, evaluated)
    trainer.writer.write_all(trainer.progress)


def check(run: Path, acknowledged: int, best: int) -> list[str]:
    """What a resumed run would find wrong, given the last step and the best one that were acknowledged."""
    wrong = []
    checkpoint.clean(run)
    steps, states = checkpoint.checkpoint_steps(run), {}
    for step in steps:
        try:
            states[step] = checkpoint.load_checkpoint(run / "checkpoints" / f"step-{step}")
        except ValueError as e:
            wrong.append(f"unloadable: {e}")
    newer = [step for step in states if step > acknowledged]  # complete, but killed before the acknowledgement
    if acknowledged and acknowledged not in states and len(newer) < 2:
        wrong.append(f"lost: step {acknowledged}, there are {steps}")
    if best and best not in states and not any(state["progress"]["best_step"] > best for state in states.values()):
        wrong.append(f"lost: the best, step {best}, there are {steps}")
    for step, state in states.items():
        if any((w != step).any() for w in state["adapter"].values()):
            wrong.append(f"wrong weights in step {step}")
        if any((w != state["progress"]["best_step"]).any() for w in state["best_adapter"].values()):
            wrong.append(f"wrong best adapter in step {step}")
    if states:
        newest = states[max(states)]
        events = (run / "metrics.jsonl").read_bytes()[: newest["metrics_bytes"]].decode().splitlines()
        if [e["step"] for e in map(json.loads, events)][-1:] != [max(states)]:
            wrong.append(f"metrics end at {events[-1:]}, not at step {max(states)}")
    if best:
        try:
            weights = load_file(run / "adapter" / "adapter_model.safetensors")
            if any((w < best).any() for w in weights.values()):
                wrong.append(f"adapter/ is older than the acknowledged best of step {best}")
        except (OSError, SafetensorError) as e:
            wrong.append(f"adapter/ unloadable: {e}")
    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------


def kills(count: int, seed: int = 0) -> dict[str, int]:
    """SIGKILL a process that saves without a pause, at a random moment; the next goes on from what it left."""
    rng, found = (
        random.Random(seed),
        {"kills": 0, "saves acknowledged": 0, "within a save": 0, "lost": 0, "unloadable": 0},
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        run, acknowledged, best = trainer.folder, 0, 0
        while found["kills"] < count:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                _save_for_ever(trainer, writer)  # does not return
            os.close(writer)
            with os.fdopen(reader, "rb") as pipe:
                pipe.readline()  # it has begun
                time.sleep(rng.uniform(0, 0.4))
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                lines = [
                    tuple(map(int, line.split()))
                    for line in pipe.read().splitlines(keepends=True)
                    if line.endswith(b"\n")
                ]
            found["kills"] += 1
            found["saves acknowledged"] += len(lines)
            acknowledged, best = lines[-1] if lines else (acknowledged, best)
            found["within a save"] += bool(list(run.glob(".adapter.*")) + list((run / "checkpoints").glob(".step*")))
            for problem in check(run, acknowledged, best):
                print(f"kill {found['kills']}: {problem}")
                found["unloadable" if "unloadable" in problem else "lost"] += 1
    return found


def _save_for_ever(trainer: Trainer, writer: int) -> None:
    newest = checkpoint.newest_checkpoint(trainer.folder)
    if newest:
        trainer.progress = Progress(**newest[1]["progress"])
        trainer.writer.best = newest[1]["best_adapter"]
        trainer.writer.metrics = checkpoint.Metrics(trainer.folder)
        trainer.writer.metrics.cut(newest[1]["metrics_bytes"])
    os.write(writer, b"begun\n")
    step = trainer.progress.step
    while True:
        step += 1
        for evaluated in (False, True) if step % 3 == 0 else (True,):  # twice: the same step is replaced
            save(trainer, step, evaluated)
            os.write(writer, f"{step} {trainer.progress.best_step}\n".encode())


# ---------------------------------------------------------------------------------------------------------------------
# Calls that fail
# ---------------------------------------------------------------------------------------------------------------------

CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "listdir", "scandir", "stat", "truncate")


class Faults:
    """While active, calls on what is below `folder` raise OSError(error) where `fails(n)` says so, n counting from 0.

    Also the writes and flushes of files there, a failed write leaving half of its data, and the Rust libraries' (which
    report an error in their own words).

    Attributes:
        calls: (call, path) of all that were made.
    """

    def __init__(self, folder: Path, fails=lambda n: False, error: int = errno.EIO):
        self.folder, self.fails, self.error = str(folder), fails, error
        self.calls: list[tuple[str, str]] = []

    def _count(self, name: str, path: object) -> None:
        self.calls.append((name, str(path)))
        if self.fails(len(self.calls) - 1):
            raise OSError(self.error, os.strerror(self.error), str(path))

    def _wrap(self, name: str, call):
        def wrapped(path, *args, **kwargs):
            if str(path).startswith(self.folder) or kwargs.get("dir_fd") is not None or name == "fsync":
                self._count(name, path)
            return call(path, *args, **kwargs)

        return wrapped

    def _wrap_open(self, call):
        def wrapped(path, mode="r", *args, **kwargs):
            if not str(path).startswith(self.folder):
                return call(path, mode, *args, **kwargs)
            self._count("open", path)
            file = call(path, mode, *args, **kwargs)
            return _Writing(file, self, path) if set(mode) & set("wa+") else file

        return wrapped

    def _wrap_rust(self, call, at: int, error: type[Exception]):
        def wrapped(*args, **kwargs):
            try:
                self._count("write", args[at])
            except OSError as e:
                raise error(f"Error while serializing: I/O error: {e.strerror} (os error {e.errno})") from None
            return call(*args, **kwargs)

        return wrapped

    def __enter__(self) -> "Faults":
        import builtins

        self._former = [(os, n, getattr(os, n), self._wrap(n, getattr(os, n))) for n in (*CALLS, "fsync")]
        self._former += [(m, "open", m.open, self._wrap_open(m.open)) for m in (io, builtins)]
        adapter, save_file = qlora_min.adapter, qlora_min.adapter.save_file
        self._former += [(adapter, "save_file", save_file, self._wrap_rust(save_file, 1, SafetensorError))]
        for owner, name, _, wrapped in self._former:
            setattr(owner, name, wrapped)
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, call, _ in self._former:
            setattr(owner, name, call)


class _Writing:
    """A file whose writes are counted."""

    def __init__(self, file, faults: Faults, path: object):
        self._file, self._faults, self._path = file, faults, path

    def write(self, data):
        try:
            self._faults._count("write", self._path)
        except OSError:
            self._file.write(data[: len(data) // 2])
            raise
        return self._file.write(data)

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __iter__(self):
        return iter(self._file)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def failing_calls(errors=(*AWAY, errno.ENOSPC), stride: int = 1) -> dict[str, int]:
    """Every call of a save fails once, or that one and all after it; then the disk works again."""
    found = {"calls in a save": 0, "faults": 0, "reported": 0, "tolerated": 0, "lost": 0, "unloadable": 0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        for step in range(1, 6):
            save(trainer, step)
        with Faults(trainer.folder) as watched:
            save(trainer, 10)
        found["calls in a save"] = len(watched.calls)
        step, cases = 10, [(n, e, o) for o in (True, False) for e in errors for n in range(len(watched.calls))]
        for n, error, once in cases[::stride]:
            before, step = step, step + 5  # each the best so far: all is due
            advance(trainer, step, True)
            quiet = contextlib.redirect_stderr(io.StringIO())  # notes on what could not be removed
            with (
                quiet,
                Faults(trainer.folder, (lambda i, n=n: i == n) if once else (lambda i, n=n: i >= n), error) as faults,
            ):
                try:
                    trainer.writer.write_all(trainer.progress)
                    failed = False
                except OSError:
                    failed = True
            found["faults"] += len(faults.calls) > n
            found["reported" if failed else "tolerated"] += 1
            problems = check(trainer.folder, before, before) if failed else check(trainer.folder, step, step)
            trainer.writer.write_all(trainer.progress)
            problems += check(trainer.folder, step, step)
            left = [p.name for p in trainer.folder.rglob(".*") if p.name != checkpoint.LOCK]
            for problem in problems + [f"left behind: {name}" for name in left]:
                print(f"{faults.calls[min(n, len(faults.calls) - 1)]}, {errno.errorcode[error]}, {once=}: {problem}")
                found["unloadable" if "unloadable" in problem else "lost"] += 1
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A full disk
# ---------------------------------------------------------------------------------------------------------------------


def disk_full() -> dict[str, int] | str:
    """On a small tmpfs, saves with 0, 1, 2, ... pages free, until all is written: every page of every file is hit."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
        try:
            mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as e:
            return f"not run: there is no mount here ({e})"
        if mounted.returncode:
            return f"not run: mounting a tmpfs is refused here ({mounted.stderr.strip()})"
        found = {"saves on a full disk": 0, "reported": 0, "files hit": 0, "lost": 0, "unloadable": 0}
        trainer = make_trainer(Path(folder))
        try:
            for step in range(1, 5):
                save(trainer, step)
            advance(trainer, 5, True)  # the best so far: metrics, checkpoint and adapter are all due
            for _ in range(200):  # so many lines that they need pages of their own
                trainer.writer.metrics.write("train", step=5)
            ballast, page, pages, hit = Path(folder) / "ballast", os.statvfs(folder).f_frsize, 0, set()
            while trainer.writer.adapter_step != 5:
                stage = (trainer.writer.metrics.size, trainer.writer.saved)
                ballast.write_bytes(b"\0" * page * (os.statvfs(folder).f_bavail - pages))
                found["saves on a full disk"] += 1
                with Faults(trainer.folder) as watched:
                    try:
                        trainer.writer.write_all(trainer.progress)
                    except OSError as e:
                        assert e.errno == errno.ENOSPC, e
                        found["reported"] += 1
                        hit.add(Path([path for call, path in watched.calls if call == "write"][-1]).name)
                ballast.unlink()
                pages += 1
                if stage != (trainer.writer.metrics.size, trainer.writer.saved):
                    pages, trainer.writer.adapter_step = 0, None  # pruning made room: the adapter is due again
                for problem in check(trainer.folder, trainer.writer.saved[0], 5 if trainer.writer.saved[0] == 5 else 1):
                    if trainer.writer.adapter_step == 5 or "adapter/" not in problem:  # until then it is the one before
                        print(f"{pages} pages free: {problem}")
                        found["unloadable" if "unloadable" in problem else "lost"] += 1
            found["files hit"] = len(hit)
        finally:
            trainer.lock.file.close()
            subprocess.run(["umount", folder], check=True)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def damage(truncations: int = 50, flips: int = 200, seed: int = 0) -> dict[str, int]:
    """Every file of a checkpoint cut at random places, and with one byte changed at random."""
    rng, found = random.Random(seed), {"truncations": 0, "bytes changed": 0, "not seen": 0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder))
        save(trainer, 1)
        checkpoints = trainer.folder / "checkpoints" / "step-1"
        for file in sorted(checkpoints.iterdir()):
            whole = file.read_bytes()
            for case in range(truncations + flips):
                content = bytearray(whole)
                place = rng.randrange(len(content))
                if case < truncations:
                    del content[place:]
                else:
                    content[place] = (content[place] + rng.randrange(1, 256)) % 256
                found["truncations" if case < truncations else "bytes changed"] += 1
                file.write_bytes(content)
                with contextlib.suppress(ValueError):
                    checkpoint.load_checkpoint(checkpoints)
                    print(f"{file.name}, case {case}, byte {place}: not seen")
                    found["not seen"] += 1
            file.write_bytes(whole)
        checkpoint.load_checkpoint(checkpoints)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a forked child has no other threads
    bad = False
    parts = {"SIGKILL while saving": lambda: kills(args.kills), "a full disk": disk_full,
             "calls that fail": failing_calls, "damaged files": damage}  # fmt: skip
    for name, part in parts.items():
        found = part()
        shown = found if isinstance(found, str) else ", ".join(f"{k} {v:,}" for k, v in found.items())
        print(f"{name:<22}{shown}", flush=True)
        bad |= isinstance(found, dict) and any(found.get(k) for k in ("lost", "unloadable", "not seen"))
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
