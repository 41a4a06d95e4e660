"""Adapters on disk, in PEFT's format, so that `peft.PeftModel.from_pretrained` loads ours and we load PEFT's.

    adapter_config.json        rank, alpha, dropout, targets, the base's name       (peft.LoraConfig)
    adapter_model.safetensors  base_model.model.NAME.lora_A.weight (r, in) and .lora_B.weight (out, r), fp32
    qlora_min.json             which base it was trained on (name, revision, fingerprint, quantization), and the sha256
                               of the weights

A field of adapter_config.json that changes what the adapter computes, and that our layer doesn't implement, is refused
by name: ignoring it would load another adapter than was saved. The files may come from anyone: every field that is read
is checked before it is used, and nothing that they name is imported or run.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file

from . import __version__
from .config import clipped, refuse_secrets, shown
from .files import check_links, read_json, read_tensors, sha256, tensor_shapes, write_json
from .lora import lora_parameters
from .model import Base, add_lora, load_base

WEIGHTS, CONFIG, ORIGIN = "adapter_model.safetensors", "adapter_config.json", "qlora_min.json"

# Fields that we read, and fields that say nothing about what the adapter computes.
READ = {"r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path", "revision", "init_lora_weights",
        "megatron_core"}  # fmt: skip
HARMLESS = {"peft_type", "task_type", "inference_mode", "peft_version",
            "loftq_config", "corda_config", "eva_config", "runtime_config", "qalora_group_size"}  # fmt: skip
ALLOWED = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # others change W as well
    "megatron_core": (None, "megatron.core"),  # a module that PEFT would import
}
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


def save_adapter(
    folder: Path,
    model: nn.Module,
    config: AdapterConfig,
    tokenizer: Any,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the adapter of `model` (or `weights`, an earlier state of it), tokenizer and template into a folder."""
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
    write_json(folder / CONFIG, peft)
    tokenizer.save_pretrained(folder)
    weights = weights or lora_parameters(model)
    tensors = {f"{PEFT_PREFIX}{n}.weight": p.detach().cpu().contiguous() for n, p in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    origin = {k: asdict(config)[k] for k in ("base", "revision", "fingerprint", "quantization", "alpha")}
    write_json(folder / ORIGIN, {"qlora_min": __version__, **origin, "weights_sha256": sha256(folder / WEIGHTS)})


def read_config(folder: Path) -> AdapterConfig:
    """Read what an adapter is, without its weights.

    Raises:
        ValueError: no adapter there, a broken file, a link out of the folder, a value that no adapter has, or a field
            that asks for what we don't implement.
    """
    if not (folder / CONFIG).is_file():
        inside = f" (there is '{folder / 'adapter'}')" if (folder / "adapter" / CONFIG).is_file() else ""
        raise ValueError(
            f"adapter '{folder}': no {CONFIG}; expected a folder that train.py or PEFT saved an adapter to{inside}"
        )
    check_links(folder)
    peft, origin = read_json(folder / CONFIG), _read_origin(folder)
    if peft.get("peft_type") != "LORA":
        raise ValueError(f"adapter '{folder}': peft_type {shown(peft.get('peft_type'))}, expected 'LORA'")
    asked = {k: v for k, v in peft.items() if k not in READ | HARMLESS and not _is_unset(v)}
    asked |= {k: peft[k] for k, allowed in ALLOWED.items() if peft.get(k) not in allowed}
    if asked:
        fields = ", ".join(f"{k}={shown(v)}" for k, v in sorted(asked.items()))
        raise ValueError(
            f"adapter '{folder}': {CONFIG} asks for {clipped(fields, 200)}, which qlora_min does not implement"
        )

    def field(values: dict, name: str, good: Callable[[Any], bool], expected: str, default: Any = ...) -> Any:
        value = values.get(name)
        if value is None and default is not ...:
            return default
        if not good(value):
            raise ValueError(f"adapter '{folder}': {name} {shown(value)}, expected {expected}")
        return value

    targets = field(peft, "target_modules", _is_targets, "a list of at most 1,000 names of layers")
    base = field(peft, "base_model_name_or_path", _is_name, "the base's hub id or full path, without '..'")
    refuse_secrets(base, f"adapter '{folder}': base_model_name_or_path")
    config = AdapterConfig(
        rank=field(peft, "r", lambda v: type(v) is int and 1 <= v < 2**63, "an integer of at least 1"),
        alpha=float(field(peft, "lora_alpha", lambda v: _is_number(v) and v > 0, "a number above 0")),
        dropout=float(field(peft, "lora_dropout", lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)", 0.0)),
        targets=tuple(targets),
        base=base,
        revision=field(peft, "revision", lambda v: _is_text(v, REVISION), "a commit or branch", None),
        fingerprint=field(origin, "fingerprint", lambda v: _is_text(v, "[0-9a-f]{64}"), "a sha256", None),
        quantization=field(origin, "quantization", lambda v: v in ("nf4", "fp4", "none"), "nf4, fp4 or none", "nf4"),
    )
    if origin.get("alpha", config.alpha) != config.alpha:  # a rank or targets that were edited do not fit the weights
        raise ValueError(
            f"adapter '{folder}': {CONFIG} says lora_alpha {shown(config.alpha)}, but the weights were trained with "
            f"{shown(origin['alpha'])}; put it back"
        )
    return config


def load_weights(folder: Path, model: nn.Module) -> None:
    """Copy an adapter's tensors into the LoRA layers of `model`, which must be exactly those it has.

    Raises:
        ValueError: tensors that are missing, unexpected, misshaped or not finite (one message lists them), or others
            than were saved.
    """
    params = lora_parameters(model)
    keys = {f"{PEFT_PREFIX}{n}.weight": n for n in params}
    shapes = tensor_shapes(folder / WEIGHTS)  # from the header: a tensor that does not fit is never read
    wrong = [f"missing {n}" for k, n in keys.items() if k not in shapes]
    stray = sorted(k.removeprefix(PEFT_PREFIX).removesuffix(".weight") for k in shapes.keys() - keys.keys())
    wrong += [f"unexpected {clipped(n, 80)}" for n in stray[:3]]
    wrong += [f"unexpected: {len(stray) - 3:,} more"] if len(stray) > 3 else []
    fitting = {k for k, n in keys.items() if shapes.get(k) == tuple(params[n].shape)}
    for key in shapes.keys() & keys.keys() - fitting:
        expected = tuple(params[keys[key]].shape)
        wrong.append(f"{keys[key]} of shape {clipped(shapes[key], 40)}, expected {expected}")
    stored = {keys[k]: t for k, t in read_tensors(folder / WEIGHTS, fitting)}
    wrong += [f"{n} holds NaN or infinite values" for n, t in stored.items() if not t.isfinite().all()]
    if wrong:
        more = f"; and {len(wrong) - 8:,} more" if len(wrong) > 8 else ""
        raise ValueError(f"adapter '{folder}' does not fit the model: {'; '.join(sorted(wrong)[:8])}{more}")
    saved = _read_origin(folder).get("weights_sha256")
    if saved is not None and saved != sha256(folder / WEIGHTS):
        raise ValueError(
            f"adapter '{folder}': {WEIGHTS} is not as it was saved (its sha256 differs from the one in {ORIGIN}): "
            "damaged or exchanged; copy the adapter again"
        )
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
    try:
        add_lora(base, config.targets, config.rank, config.alpha, config.dropout)
    except ValueError as e:
        raise ValueError(f"adapter '{folder}': {e}") from None
    load_weights(folder, base.model)
    base.model.eval()
    return base


def check_base(config: AdapterConfig, fingerprint: str, folder: Path, base: str) -> None:
    """Refuse a base that is not the one the adapter was trained on.

    Raises:
        ValueError: the fingerprints differ.
    """
    if config.fingerprint not in (None, fingerprint):
        what = "on another base" if base != config.base else "before its base changed or was damaged"
        raise ValueError(
            f"adapter '{folder}' was trained {what}: '{clipped(config.base, 100)}' had fingerprint "
            f"{config.fingerprint[:12]}, '{clipped(base, 100)}' has {fingerprint[:12]}; give its own base with --model"
        )


def _is_unset(value: Any) -> bool:
    """Whether a field of adapter_config.json asks for nothing. 0 does ask: it is a layer's number."""
    return value is None or value is False or value in ("none", [], {})


def _read_origin(folder: Path) -> dict[str, Any]:
    return read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}


# What each field of the files may hold. The values come from anyone, so a check must hold for any JSON.

REVISION = r"\w[\w-]*([./]\w[\w-]*)*"  # a commit, a branch or "refs/pr/1"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # NaN and infinity (1e999) are not


def _is_text(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and len(value) <= 200 and bool(re.fullmatch(pattern, value))


def _is_targets(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 1000 and all(_is_text(t, r"\w+(\.\w+)*") for t in value)


def _is_name(value: Any) -> bool:
    """A hub id or a folder, without a way out of where it seems to lead."""
    return (
        isinstance(value, str) and 1 <= len(value) <= 1000 and value.isprintable()
        and all(part != ".." and len(part) <= 255 for part in re.split(r"[/\\]", value))
    )  # fmt: skip
