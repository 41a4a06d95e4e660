"""What config.json records of a run, what resuming compares of that, and what it puts back."""

import platform
import shlex
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..adapter import put_weights
from ..config import FIELDS, Config, flag
from ..loop import Progress
from ..lora import lora_parameters
from ..scale.processes import from_main
from ..system.bits import bnb
from ..system.console import say
from . import checkpoint
from .datasets import data_hash
from .options import config_from

# What resuming compares of config.json, in this order, and what it says of a value that changed: all but notes end it.
COMPARED = {
    **{part: f"the {part} changed: {{key}} was {{then}}, now {{now}}" for part in ("base", "files", "data")},
    "engine": "it began with --engine {then!r}, put that back",
    "precision": "it was trained in {then}, here --precision auto is {now}; expected the same kind of hardware",
    "versions": "note: {key} was {then}, now {now}",  # a GPU may be there now only
    "ranks": "note: it began in {then} processes, now {now}",
}


def versions() -> dict[str, str]:
    """Of everything that computes."""
    found = {"qlora_min": __version__, "python": platform.python_version()}
    found |= {m.__name__: m.__version__ for m in (torch, transformers, bnb)}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def make_record(setup: Any) -> dict[str, Any]:
    """What config.json says of a run (a `Trainer`): options as resolved, and what its result depends on besides."""
    base, rows, held = setup.base, setup.schedule.rows, setup.held_out
    return {
        "options": setup.config.as_dict(),
        "precision": setup.precision,
        "engine": setup.config.engine,
        "total_steps": setup.schedule.total_steps,
        "ranks": setup.processes.world_size,
        "base": {"name": setup.config.model, "revision": base.revision, "fingerprint": base.fingerprint},
        "files": {p.name: f"{len(p.rows)} rows, sha256 {data_hash(p.rows, [])[:16]}" for p in setup.data_sets},
        "data": {"rows": len(rows), "held_out": len(held), "sha256": data_hash(rows, held)},
        "versions": versions(),
    }


def differences(then: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(key, value then, value now) where two dictionaries differ, None where a key is missing; other values: key ""."""
    if not isinstance(now, dict):
        then, now = {"": then}, {"": now}
    return [(k, then.get(k), now.get(k)) for k in then | now if then.get(k) != now.get(k)]


def unfinished(folder: Path) -> dict[str, Any]:
    """The config.json of a run to continue. Raises ValueError where there is none, or it came to its end."""
    record = checkpoint.read_record(folder)
    if checkpoint.is_finished(folder):
        raise ValueError(f"--resume {folder}: that run is finished; start a new one without --resume")
    return record


def resume_config(directory: str, given: dict[str, Any]) -> tuple[Config, Path]:
    """The options and the directory of a run to continue; "" stands for the newest unfinished one under runs/.

    Args:
        given: options of the command line; each must be as it was when the run began.

    Raises:
        ValueError: no such run, it is finished, or an option differs.
    """
    folder = Path(directory) if directory else checkpoint.newest_unfinished(Path("runs"))
    config = config_from(unfinished(folder)["options"], str(folder / "config.json"))
    for name, value in given.items():
        if name == "output_dir" and Path(value).resolve() != folder.resolve():
            raise ValueError(f"--output-dir {value}: --resume continues in {folder} itself; leave it out")
        resolved = name == "output_dir" or (name in ("gradient_checkpointing", "engine") and value == "auto")
        if name in FIELDS and not resolved and getattr(config, name) != value:
            raise ValueError(
                f"--resume {folder}: {flag(name)} was {getattr(config, name)!r} when the run began, now {value!r}; "
                "leave it out, or start a new run"
            )
    return config, folder


def output_directory(config: Config) -> Path:
    """Where a new run writes.

    Raises:
        ValueError: the directory holds something already.
    """
    if config.output_dir is None:
        data = "+".join(Path(d).stem for d in config.dataset)
        return Path("runs") / f"{Path(config.model).name}-{data}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(config.output_dir)
    if checkpoint.is_run(folder):
        what, fix = "a finished run", "choose another"
        if not checkpoint.is_finished(folder):
            what, fix = "an unfinished run", f"continue it with --resume {shlex.quote(str(folder))}, or {fix}"
        raise ValueError(f"--output-dir {folder}: holds {what}, which is never overwritten; {fix}")
    if folder.exists() and (not folder.is_dir() or {p.name for p in folder.iterdir()} - checkpoint.BEFORE_A_RUN):
        raise ValueError(f"--output-dir {folder}: exists and is not an empty directory; choose another")
    return folder


def compare(folder: Path, recorded: dict[str, Any], record: dict[str, Any]) -> None:
    """Compare a run's config.json with what it would be now; differences that do not matter are notes.

    Raises:
        ValueError: the data, the base or the precision is not what it was, which the message names.
    """
    if "engine" not in recorded:
        raise ValueError(
            f"--resume {folder}: it was begun by an earlier version of qlora_min, whose dropout masks were different; "
            "start a new run (evaluating, merging and chatting still work)"
        )
    for part, words in COMPARED.items():
        for key, then, now in differences(recorded.get(part), record[part]):
            changed = words.format(key=key, then=then, now=now)
            if not words.startswith("note: "):
                raise ValueError(f"--resume {folder}: {changed}")
            say(f"{changed}: the run goes on, but not bitwise as it would have")


def restore(setup: Any) -> Progress:
    """Put the newest good checkpoint back; a fresh `Progress` where there is none yet.

    Raises:
        ValueError: no checkpoint is good, or it was saved with other options or by another version.
    """
    folder, writer = setup.folder, setup.writer
    found = from_main(lambda: _newest_checkpoint(folder))
    if found is None:
        say(f"no checkpoint in {folder}: starting from the beginning")
        from_main(lambda: writer.metrics.cut(0))
        return Progress()
    step, state = found
    expected = writer.state(Progress())
    known = state.keys() == expected.keys()
    if not known or any(state[part].keys() != expected[part].keys() for part in ("options", "progress")):
        raise ValueError(f"--resume {folder}: step-{step} is of another version of qlora_min; resume with that")
    # config.json has no manifest that keeps it as it was.
    for name, then, now in differences(state["options"], expected["options"]):
        raise ValueError(
            f"--resume {folder}: {flag(name)} was {then!r} when step-{step} was saved, now config.json says {now!r}; "
            "put it back there"
        )
    put_weights(setup.base.model, state["adapter"])
    assert all(w.dtype == torch.float32 for w in lora_parameters(setup.base.model).values())
    setup.stepper.load_state_dict(state["stepper"])
    progress = Progress(**state["progress"])
    writer.best, writer.saved = state["best_adapter"], (step, progress.evaluated)
    from_main(lambda: writer.metrics.cut(state["metrics_bytes"]))
    say(f"continues at step {step:,}")
    return progress


def _newest_checkpoint(folder: Path) -> tuple[int, dict[str, Any]] | None:
    """(step, state) of the newest good checkpoint, or None where there is none yet."""
    checkpoint.clean(folder)
    found = checkpoint.newest_checkpoint(folder)
    if found is None and (folder / "adapter").exists():  # the best of a run whose checkpoints are lost
        raise ValueError(
            f"--resume {folder}: none of its checkpoints is good, and beginning again would overwrite its "
            "adapter/; start a new run, without --resume"
        )
    return found
