"""Adapters on disk, in PEFT's format, so that `peft.PeftModel.from_pretrained` loads ours and we load PEFT's.

adapter_config.json        rank, alpha, dropout, targets, the base's name       (peft.LoraConfig)
adapter_model.safetensors  base_model.model.NAME.lora_A.weight (r, in) and .lora_B.weight (out, r), fp32
qlora_min.json             which base it was trained on (name, revision, fingerprint, quantization), and the sha256
                           of the weights
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor

from .base import Base, add_lora, load_base, load_encoder
from .lora import LoraSpec, lora_parameters
from .system import peft_files
from .system.files import sha256
from .system.peft_files import ORIGIN, WEIGHTS, PerLayer, trained_on
from .system.text import clipped
from .system.weights import read_exactly

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter is, and its base: a hub id or a full path. fingerprint and quantization are None for adapters of
    other tools, whose files do not record them."""

    lora: LoraSpec
    base_model: str
    revision: str | None = None
    fingerprint: str | None = None
    quantization: str | None = "nf4"
    date: str | None = None  # that its chat template showed in training, if it shows the day's

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Read what an adapter is, without its weights; raises as `peft_files.read_adapter_config`."""
        values = peft_files.read_adapter_config(folder)
        values["per_layer"] = PerLayer(**{f.name: values.pop(f.name) for f in fields(PerLayer)})
        spec = LoraSpec(**{f.name: values.pop(f.name) for f in fields(LoraSpec)})
        return cls(spec, **values)


def save_adapter(
    folder: Path, model: nn.Module, config: AdapterConfig, tokenizer: Any, weights: dict[str, Tensor] | None = None
) -> None:
    """Write the adapter of `model` (or `weights`, an earlier state of it), tokenizer and template into a folder."""
    tokenizer.save_pretrained(folder)
    weights = weights or lora_parameters(model)
    tensors = {f"{PEFT_PREFIX}{n}.weight": p.detach().cpu().contiguous() for n, p in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    values = asdict(config)
    values |= values.pop("lora")
    peft_files.write_adapter_config(folder, values | values["per_layer"], sha256(folder / WEIGHTS))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy an adapter's tensors into the LoRA layers of `model`. The file must hold exactly their tensors.

    Raises:
        ValueError: tensors are missing, unexpected, misshaped or not finite (one message lists them), or the file is
            not the one that was saved.
    """
    parameters = lora_parameters(model)
    keys = {name: f"{PEFT_PREFIX}{name}.weight" for name in parameters}
    shapes = {key: tuple(parameters[name].shape) for name, key in keys.items()}
    stored, wrong = read_exactly(folder / WEIGHTS, shapes, PEFT_PREFIX)
    if wrong:
        more = f"; and {len(wrong) - 8:,} more" if len(wrong) > 8 else ""
        raise ValueError(f"adapter '{folder}' does not fit the model: {'; '.join(sorted(wrong)[:8])}{more}")
    saved = peft_files.read_origin(folder).get("weights_sha256")
    if saved is not None and saved != sha256(folder / WEIGHTS):
        raise ValueError(
            f"adapter '{folder}': {WEIGHTS} is not as it was saved (its sha256 differs from the one in {ORIGIN}): "
            "damaged or exchanged; copy the adapter again"
        )
    put_weights(model, {name: stored[key] for name, key in keys.items()})


@torch.no_grad()
def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy a state of the adapter, by name, into the model."""
    for name, parameter in lora_parameters(model).items():
        parameter.copy_(weights[name])


def load_adapter(
    folder: Path,
    model: str | None = None,
    precision: str = "fp32",
    device: torch.device | None = None,
    quantization: str | None = None,
) -> Base:
    """A base with an adapter on it, ready to evaluate or to chat.

    Args:
        model: where the base is, if not where the adapter's files say.
        quantization: of the base; by default as the adapter's files record it, or else as the base is stored.

    Raises:
        ValueError: no adapter, no base, or an adapter for another base.
    """
    config = AdapterConfig.read(folder)
    name, revision = (model, None) if model else (config.base_model, config.revision)
    bits = trained_on(folder, config.quantization, quantization)
    base = load_base(name, bits, precision, device, revision, load_encoder(name, revision, adapter=folder))
    attach(base, folder, config)
    return base


def attach(base: Base, folder: Path, config: AdapterConfig) -> list[str]:
    """Put the adapter of a folder on a base; returns the names of the wrapped modules. Raises as `load_adapter`."""
    if config.fingerprint not in (None, base.fingerprint):
        what = "on another base" if base.name != config.base_model else "before its base changed or was damaged"
        raise ValueError(
            f"adapter '{folder}' was trained {what}: '{clipped(config.base_model, 100)}' had fingerprint "
            f"{config.fingerprint[:12]}, '{clipped(base.name, 100)}' has {base.fingerprint[:12]}; give its own base "
            "with --model"
        )
    try:
        names = add_lora(base, config.lora)
    except ValueError as e:
        raise ValueError(f"adapter '{folder}': {e}") from None
    load_weights(folder, base.model)
    return names
