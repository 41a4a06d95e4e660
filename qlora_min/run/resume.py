"""Runs that go on: --resume from a checkpoint, --adapter from an adapter, ours or PEFT's, in a new run.

Resuming: what config.json records, what of that must be unchanged, and what a checkpoint restores. A run that goes on
from an adapter has a fresh optimizer and schedule; config.json records that adapter, and the first checkpoint holds its
weights: from then on its folder is not needed.
"""

import platform
import re
import secrets
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..adapter import WEIGHTS, AdapterConfig, load_weights, put_weights
from ..config import Config, flag
from ..loop import Progress
from ..scale.processes import from_main
from ..system.bits import bnb
from ..system.console import say
from ..system.files import sha256
from ..system.peft_files import trained_on
from . import checkpoint
from .datasets import data_hash
from .options import config_from, parse_values

STRUCTURE = ("rank", "alpha", "targets", "rslora")  # options that the adapter decides
# The parts of config.json that resuming compares, in this order, with the message for a changed value: an error, unless
# it begins with "note: ".
COMPARED = {
    **{part: f"the {part} changed: {{key}} was {{then}}, now {{now}}" for part in ("base", "files", "data")},
    "engine": "it began with --engine {then!r}, put that back",
    "precision": "it was trained in {then}, here --precision auto is {now}; expected the same kind of hardware",
    "versions": "note: {key} was {then}, now {now}",  # then is None if the GPU is new
    "ranks": "note: it began in {then} processes, now {now}",
}


def versions() -> dict[str, str]:
    """The versions of all software and hardware that results depend on."""
    found = {"qlora_min": __version__, "python": platform.python_version()}
    found |= {m.__name__: m.__version__ for m in (torch, transformers, bnb)}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def make_record(trainer: Any) -> dict[str, Any]:
    """The content of config.json for a run (a `Trainer`): its resolved options, and what else its result depends on."""
    base, rows, held = trainer.base, trainer.schedule.rows, trainer.held_out
    return {
        "id": secrets.token_hex(4),  # Weights & Biases knows the run by it
        "options": trainer.config.as_dict(),
        "precision": trainer.precision,
        "engine": trainer.config.engine,
        "total_steps": trainer.schedule.total_steps,
        "ranks": trainer.processes.world_size,
        "adapter": trainer.start,
        "base": {"name": trainer.config.model, "revision": base.revision, "fingerprint": base.fingerprint},
        "files": {p.name: f"{len(p.rows)} rows, sha256 {data_hash(p.rows, [])[:16]}" for p in trainer.data_sets},
        "data": {"rows": len(rows), "held_out": len(held), "sha256": data_hash(rows, held)},
        "commits": {p.name.removesuffix(" (held out)"): p.commit for p in trainer.data_sets if p.commit},
        "date": base.encoder.template.date,  # that the chat template shows, if it does
        "versions": versions(),
    }


def differences(then: Any, now: Any) -> list[tuple[str, Any, Any]]:
    """(key, value then, value now) of each difference between two dictionaries, None for a missing key. Values that are
    not dictionaries are compared whole, with the key ""."""
    if not isinstance(now, dict):
        then, now = {"": then}, {"": now}
    return [(k, then.get(k), now.get(k)) for k in then | now if then.get(k) != now.get(k)]


def unfinished(folder: Path) -> dict[str, Any]:
    """The config.json of a run to continue. Raises ValueError if there is no run, or it is finished."""
    record = checkpoint.read_record(folder)
    if checkpoint.is_finished(folder):
        adapter = shlex.quote(str(folder / "adapter"))
        raise ValueError(
            f"--resume {folder}: that run is finished; go on from its adapter, in a new run, with: --adapter {adapter} "
            "--epochs N"
        )
    return record


def run_config(directory: str | None, given: dict[str, Any]) -> tuple[Config, Path | None]:
    """The (options, directory) of a run to continue, or (options, None) of a new one.

    Args:
        directory: the run's directory, or "" for the newest unfinished run under runs/. None: a new run.
        given: the options that the user gives. Of a run to continue, each must have the value with which it began.

    Raises:
        ValueError: there is no such run, it is finished, or an option differs.
    """
    if directory is None:
        return Config(**with_adapter(parse_values(given, "train"))), None
    folder = Path(directory) if directory else checkpoint.newest_unfinished(Path("runs"))
    config = config_from(unfinished(folder)["options"], str(folder / "config.json"))
    for name, value in parse_values(given, f"--resume {folder}").items():
        if name == "output_dir" and Path(value).resolve() != folder.resolve():
            raise ValueError(f"--output-dir {value}: --resume continues in {folder} itself; leave it out")
        resolved = name == "output_dir" or (name in ("gradient_checkpointing", "engine") and value == "auto")
        if not resolved and getattr(config, name) != value:
            raise ValueError(
                f"--resume {folder}: {flag(name)} was {getattr(config, name)!r} when the run began, now {value!r}; "
                "leave it out, or start a new run"
            )
    return config, folder


def with_adapter(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a new run; with --adapter, those that are not given are taken from the adapter.

    Raises:
        ValueError: there is no such adapter.
    """
    if given.get("adapter") is None:
        return given
    folder = Path(given["adapter"])
    config = AdapterConfig.read(folder)
    own = {name: getattr(config.lora, name) for name in (*STRUCTURE, "dropout")}
    default = f"it goes on in --quantization {Config.quantization}, the default"
    bits = trained_on(folder, config.quantization, given.get("quantization"), default)
    own |= {"model": config.base_model, "quantization": bits}
    return {k: v for k, v in own.items() if v is not None} | given


def describe_adapter(c: Config) -> dict[str, Any] | None:
    """What config.json records of the adapter that a new run goes on from; None without --adapter.

    Raises:
        ValueError: an option contradicts the adapter.
    """
    if c.adapter is None:
        return None
    config = AdapterConfig.read(Path(c.adapter))
    for name in STRUCTURE:
        if (asked := getattr(c, name)) != (own := getattr(config.lora, name)):
            raise ValueError(f"{flag(name)}: got {asked!r}, but --adapter {c.adapter} has {own!r}; leave it out")
    return {
        "sha256": sha256(Path(c.adapter) / WEIGHTS),
        "revision": config.revision if config.base_model == c.model else None,  # of the base
        "per_layer": asdict(config.lora.per_layer),
    }


def output_directory(config: Config) -> Path:
    """The directory for a new run.

    Raises:
        ValueError: the directory is not empty.
    """
    if config.output_dir is None:
        data = "+".join(re.sub(r"[^\w.-]+", "-", Path(d).stem).strip("-") for d in config.dataset)
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
    """Compare a run's config.json with what it would be now, and print a note for each difference that is allowed.

    Raises:
        ValueError: the base, data, engine or precision changed (the message says how), or an old version began the run.
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
            say(f"{changed}: the run continues, but not bit for bit as it would have")


def restore(trainer: Any) -> Progress:
    """Restore the newest intact checkpoint; returns its `Progress`, or a new one if there is no checkpoint yet.

    Raises:
        ValueError: all are damaged, or the newest intact one has other options or another version; or as `_load_again`.
    """
    folder, writer = trainer.folder, trainer.writer
    found = from_main(lambda: checkpoint.newest_checkpoint(folder))
    if found is None and (folder / "adapter").exists():  # there were checkpoints, and all are lost
        raise ValueError(
            f"--resume {folder}: all of its checkpoints are damaged, and starting again would overwrite its "
            "adapter/; start a new run, without --resume"
        )
    if found is None:
        say(f"no checkpoint in {folder}: starting from the beginning")
        from_main(lambda: writer.metrics.cut(0))
        _load_again(trainer)
        return Progress()
    step, state = found
    expected = writer.state(Progress())
    known = state.keys() == expected.keys()
    if not known or any(state[part].keys() != expected[part].keys() for part in ("options", "progress")):
        raise ValueError(f"--resume {folder}: step-{step} is of another version of qlora_min; resume with that")
    # No hash protects config.json, so its options are compared with those in the checkpoint.
    for name, then, now in differences(state["options"], expected["options"]):
        raise ValueError(
            f"--resume {folder}: {flag(name)} was {then!r} when step-{step} was saved, now config.json says {now!r}; "
            "put it back there"
        )
    put_weights(trainer.base.model, state["adapter"])
    trainer.stepper.load_state_dict(state["stepper"])
    progress = Progress(**state["progress"])
    writer.best, writer.saved = state["best_adapter"], (step, progress.evaluated)
    from_main(lambda: writer.metrics.cut(state["metrics_bytes"]))
    say(f"continues at step {step:,}")
    return progress


def _load_again(trainer: Any) -> None:
    """For a run that is resumed before its first checkpoint: the weights of --adapter, if there is one.

    Raises:
        ValueError: they are not those that the run began with.
    """
    if trainer.start is None:
        return
    weights = Path(trainer.config.adapter) / WEIGHTS
    if not weights.is_file() or sha256(weights) != trainer.start["sha256"]:
        raise ValueError(
            f"--resume {trainer.folder}: it has no checkpoint yet, and '{weights}' is no longer the file that it began "
            "with; put that back, or start a new run"
        )
    load_weights(weights.parent, trainer.base.model)
