"""Adapters on disk, in PEFT's format, so that `peft.PeftModel.from_pretrained` loads ours and we load PEFT's.

    adapter_config.json        rank, alpha, dropout, targets, the base's name       (peft.LoraConfig)
    adapter_model.safetensors  base_model.model.NAME.lora_A.weight (r, in) and .lora_B.weight (out, r), fp32
    qlora_min.json             which base it was trained on: name, revision, fingerprint, quantization

A field of adapter_config.json that changes what the adapter computes, and that our layer doesn't implement, is refused
by name: ignoring it would load another adapter than was saved.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .lora import lora_parameters
from .model import Base, add_lora, load_base

WEIGHTS, CONFIG, ORIGIN = "adapter_model.safetensors", "adapter_config.json", "qlora_min.json"

# Fields that we read, and fields that say nothing about what the adapter computes.
READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision", "init_lora_weights"}
HARMLESS = {"peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version", "megatron_core",
            "loftq_config", "corda_config", "eva_config", "runtime_config", "qalora_group_size"}  # fmt: skip
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # others (PiSSA, OLoRA, ...) change W as well
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's files say about it; the fields of LoRALinear and of its base."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]
    base: str
    revision: str | None = None
    fingerprint: str | None = None  # None: made by another tool
    quantization: str = "nf4"


def save_adapter(folder: Path, model: nn.Module, config: AdapterConfig, tokenizer: Any) -> None:
    """Write the adapter of `model`, its tokenizer and chat template into an existing folder."""
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base,
        "revision": config.revision,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    from . import __version__

    origin = {k: asdict(config)[k] for k in ("base", "revision", "fingerprint", "quantization")}
    (folder / CONFIG).write_text(json.dumps(peft, indent=2) + "\n")
    (folder / ORIGIN).write_text(json.dumps({"qlora_min": __version__, **origin}, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    tensors = {f"{PEFT_PREFIX}{n}.weight": p.detach().cpu().contiguous() for n, p in lora_parameters(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def read_config(folder: Path) -> AdapterConfig:
    """Read what an adapter is, without its weights.

    Raises:
        ValueError: no adapter there, a broken file, or a field that asks for what we don't implement.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"adapter '{folder}': no {CONFIG}; expected a folder that train.py or PEFT saved an adapter to"
        )
    peft, origin = _read_json(folder / CONFIG), {}
    if (folder / ORIGIN).is_file():
        origin = _read_json(folder / ORIGIN)
    if peft.get("peft_type") != "LORA":
        raise ValueError(f"adapter '{folder}': peft_type {peft.get('peft_type')!r}, expected 'LORA'")
    asked = {k: v for k, v in peft.items() if k not in READ | HARMLESS and not _is_unset(v)}
    if peft.get("init_lora_weights") not in INITS:
        asked["init_lora_weights"] = peft["init_lora_weights"]
    if asked:
        shown = ", ".join(f"{k}={v!r}" for k, v in sorted(asked.items()))
        raise ValueError(f"adapter '{folder}': {CONFIG} asks for {shown[:200]}, which qlora_min does not implement")
    targets = peft.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or not targets:
        raise ValueError(f"adapter '{folder}': target_modules {targets!r}, expected a list of names")
    try:
        return AdapterConfig(
            rank=int(peft["r"]),
            alpha=float(peft["lora_alpha"]),
            dropout=float(peft.get("lora_dropout") or 0.0),
            targets=tuple(targets),
            base=str(peft["base_model_name_or_path"]),
            revision=peft.get("revision"),
            fingerprint=origin.get("fingerprint"),
            quantization=origin.get("quantization", "nf4"),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"adapter '{folder}': {CONFIG}: missing or malformed field ({e})") from None


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy an adapter's tensors into the LoRA layers of `model`, which must be exactly those it has.

    Raises:
        ValueError: tensors that are missing, unexpected, misshaped or not finite; one message lists them all.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"adapter '{folder}': {WEIGHTS} can't be read ({str(e).splitlines()[0]})") from None
    stored = {k.removeprefix(PEFT_PREFIX).removesuffix(".weight"): t for k, t in tensors.items()}
    params = lora_parameters(model)
    wrong = [f"missing {n}" for n in params if n not in stored] + [f"unexpected {n}" for n in stored if n not in params]
    for n in params.keys() & stored.keys():
        if stored[n].shape != params[n].shape:
            wrong.append(f"{n} of shape {tuple(stored[n].shape)}, expected {tuple(params[n].shape)}")
        elif not stored[n].isfinite().all():
            wrong.append(f"{n} holds NaN or infinite values")
    if wrong:
        raise ValueError(f"adapter '{folder}' does not fit the model: {'; '.join(sorted(wrong))}")
    with torch.no_grad():
        for n, p in params.items():
            p.copy_(stored[n])


def load_adapter(
    folder: Path, model: str | None = None, precision: str = "fp32", device: torch.device | None = None,
    quantization: str | None = None,
) -> Base:  # fmt: skip
    """A base with an adapter on it, ready to evaluate or to chat.

    Args:
        model: where the base is, if not where the adapter's files say.
        quantization: another than the adapter was trained on.

    Raises:
        ValueError: no adapter, no base, or an adapter for another base.
    """
    config = read_config(folder)
    revision = None if model else config.revision
    base = load_base(model or config.base, quantization or config.quantization, precision, device, revision)
    check_base(config, base.fingerprint, folder, base.name)
    add_lora(base, config.targets, config.rank, config.alpha, config.dropout)
    load_weights(folder, base.model)
    base.model.eval()
    return base


def check_base(config: AdapterConfig, fingerprint: str, folder: Path, base: str) -> None:
    """Refuse a base that is not the one the adapter was trained on.

    Raises:
        ValueError: the fingerprints differ.
    """
    if config.fingerprint not in (None, fingerprint):
        raise ValueError(
            f"adapter '{folder}' was trained on another base: '{config.base}' with fingerprint "
            f"{config.fingerprint[:12]}, but '{base}' has {fingerprint[:12]}; give its own base with --model"
        )


def _is_unset(value: Any) -> bool:
    """Whether a field of adapter_config.json asks for nothing. 0 does ask: it is a layer's number."""
    return value is None or value is False or value in ("none", [], {})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value
