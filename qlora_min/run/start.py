"""--adapter: a run that goes on from an adapter, ours or PEFT's, on new data, with a fresh optimizer and schedule.

config.json records that adapter, and the first checkpoint holds its weights: from then on its folder is not needed.
"""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..adapter import WEIGHTS, AdapterConfig, attach, load_weights
from ..base import Base, add_lora
from ..config import Config, flag
from ..lora import LoraSpec
from ..system.console import say
from ..system.files import sha256
from ..system.peft_files import ADAPTER, PerLayer, named_targets

STRUCTURE = ("rank", "alpha", "targets", "rslora")  # options that the adapter decides


def with_adapter(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a new run, where those that are not given are as the adapter of --adapter has them.

    Raises:
        ValueError: there is no such adapter.
    """
    if given.get("adapter") is None:
        return given
    folder = Path(given["adapter"])
    config = AdapterConfig.read(folder)
    own = {name: getattr(config.lora, name) for name in (*STRUCTURE, "dropout")}
    own |= {"model": config.base_model, "quantization": config.quantization}
    if not config.quantization and "quantization" not in given:
        say(
            f"note: adapter '{folder}' does not say which weights it was trained on; it goes on in --quantization "
            f"{Config.quantization}, the default",
            sys.stderr,
        )
    return {k: v for k, v in own.items() if v is not None} | given


def describe(c: Config) -> dict[str, Any] | None:
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


def inject(base: Base, c: Config, start: dict[str, Any] | None, new: bool) -> tuple[LoraSpec, list[str]]:
    """Put the adapter to train on a base, with the weights of --adapter if the run is new.

    Args:
        start: what config.json records of the adapter that the run goes on from.

    Returns:
        What it is, and the names of its layers.
    """
    per_layer = {name: ADAPTER[name][3](value) for name, value in start["per_layer"].items()} if start else {}
    lora, own = replace(c.lora, per_layer=PerLayer(**per_layer)), c.adapter if new else None
    config = own and replace(AdapterConfig.read(Path(own)), lora=lora)
    layers = attach(base, Path(own), config) if own else add_lora(base, lora)
    return replace(lora, targets=named_targets(lora.targets, layers)), layers


def load_again(trainer: Any) -> None:
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
