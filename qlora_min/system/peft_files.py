"""PEFT's adapter_config.json, and qlora_min.json beside it for what PEFT's file has no field for.

The files may come from an untrusted source: every field is checked before it is used, and nothing that they name is
imported or executed. A field that changes what the adapter computes, and that our layer does not implement, is refused
by name: ignoring it would load a different adapter from the one saved.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from .files import check_links, read_json, write_json
from .text import clipped, refuse_secrets, shown

CONFIG, ORIGIN = "adapter_config.json", "qlora_min.json"
WRITTEN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False, "use_dora": False,
           "init_lora_weights": True, "use_rslora": False, "modules_to_save": None, "inference_mode": True}  # fmt: skip
# Fields that do not affect what the adapter computes.
HARMLESS = {"peft_type", "task_type", "inference_mode", "peft_version",
            "loftq_config", "corda_config", "eva_config", "runtime_config", "qalora_group_size"}  # fmt: skip
ALLOWED = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # other methods change W too
    "megatron_core": (None, "megatron.core"),  # a module that PEFT would import
}
REVISION = r"\w[\w-]*([./]\w[\w-]*)*"  # a commit, a branch or "refs/pr/1"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # not NaN or infinity (1e999)


def _is_text(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and len(value) <= 200 and bool(re.fullmatch(pattern, value))


def _is_targets(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 1000 and all(_is_text(t, r"\w+(\.\w+)*") for t in value)


def _is_name(value: Any) -> bool:
    """Whether a value is a hub id or a path without "..", so that it leads only where it seems to."""
    if not isinstance(value, str) or not value.isprintable():
        return False
    parts = re.split(r"[/\\]", value)
    return 1 <= len(value) <= 1000 and all(part != ".." and len(part) <= 255 for part in parts)


# Our name -> (the name in the file, a check of its value, the expectation in words). Values are untrusted, so a check
# must accept any JSON value as its argument. A field that may be None may be missing.
Check = tuple[str, Callable[[Any], bool], str]
ADAPTER: dict[str, Check] = {
    "rank": ("r", lambda v: type(v) is int and 1 <= v < 2**63, "an integer of at least 1"),
    "alpha": ("lora_alpha", lambda v: _is_number(v) and v > 0, "a number above 0"),
    "dropout": ("lora_dropout", lambda v: v is None or (_is_number(v) and 0 <= v < 1), "a number in [0, 1)"),
    "targets": ("target_modules", _is_targets, "a list of at most 1,000 names of layers"),
    "base_model": ("base_model_name_or_path", _is_name, "the base's hub id or full path, without '..'"),
    "revision": ("revision", lambda v: v is None or _is_text(v, REVISION), "a commit or branch"),
}
OURS: dict[str, Check] = {
    "fingerprint": ("fingerprint", lambda v: v is None or _is_text(v, "[0-9a-f]{64}"), "a sha256"),
    "date": ("date", lambda v: v is None or _is_text(v, r"\d{4}-\d\d-\d\d"), "a date as YYYY-MM-DD"),
    "quantization": ("quantization", lambda v: v in (None, "nf4", "fp4", "none"), "nf4, fp4 or none"),
}


def write_adapter_config(folder: Path, values: Mapping[str, Any], weights_sha256: str) -> None:
    """Write both files; `values` has the keys that `read_adapter_config` returns."""
    alpha = values["alpha"]
    values = {**values, "alpha": int(alpha) if alpha == int(alpha) else alpha, "targets": list(values["targets"])}
    write_json(folder / CONFIG, WRITTEN | {theirs: values[name] for name, (theirs, *_) in ADAPTER.items()})
    origin = {"base": values["base_model"], "revision": values["revision"], "fingerprint": values["fingerprint"],
              "quantization": values["quantization"], "date": values["date"], "alpha": float(alpha)}  # fmt: skip
    write_json(folder / ORIGIN, {"qlora_min": __version__, **origin, "weights_sha256": weights_sha256})


def read_origin(folder: Path) -> dict[str, Any]:
    """The content of qlora_min.json, unchecked; empty for an adapter of another tool."""
    return read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The values in an adapter's files: rank, alpha, dropout, targets, base_model, revision, fingerprint, quantization.

    Raises:
        ValueError: the folder has no adapter, a file is damaged or links out of the folder, a value is invalid, or a
            field requires something that is not implemented.
    """
    if not (folder / CONFIG).is_file():
        inside = f" (there is '{folder / 'adapter'}')" if (folder / "adapter" / CONFIG).is_file() else ""
        raise ValueError(
            f"adapter '{folder}': no {CONFIG}; expected a folder that train.py or PEFT saved an adapter to{inside}"
        )
    check_links(folder)
    peft, origin = read_json(folder / CONFIG), read_origin(folder)
    _refuse_what_is_unknown(folder, peft)
    found: dict[str, Any] = {}
    for file, checks in ((peft, ADAPTER), (origin, OURS)):
        for name, (theirs, good, expected) in checks.items():
            found[name] = file.get(theirs)
            if not good(found[name]):
                raise ValueError(f"adapter '{folder}': {theirs} {shown(found[name])}, expected {expected}")
    refuse_secrets(found["base_model"], f"adapter '{folder}': base_model_name_or_path")
    # An edited rank or target would not match the weights; an edited alpha would go unnoticed.
    if origin.get("alpha", found["alpha"]) != found["alpha"]:
        raise ValueError(
            f"adapter '{folder}': {CONFIG} says lora_alpha {shown(float(found['alpha']))}, but the weights were "
            f"trained with {shown(origin['alpha'])}; put it back"
        )
    numbers = {"alpha": float(found["alpha"]), "dropout": float(found["dropout"] or 0.0)}
    return found | numbers | {"targets": tuple(found["targets"]), "quantization": found["quantization"] or "nf4"}


def _refuse_what_is_unknown(folder: Path, peft: dict[str, Any]) -> None:
    """Raise ValueError for a field that requires something that is not implemented."""
    if peft.get("peft_type") != "LORA":
        raise ValueError(f"adapter '{folder}': peft_type {shown(peft.get('peft_type'))}, expected 'LORA'")
    known = HARMLESS | ALLOWED.keys() | {theirs for theirs, *_ in ADAPTER.values()}
    # None, False and empty values require nothing. 0 does: it is the index of a layer.
    asked = {k: v for k, v in peft.items() if k not in known and not (v is None or v is False or v in ("none", [], {}))}
    asked |= {k: peft[k] for k, allowed in ALLOWED.items() if peft.get(k) not in allowed}
    if asked:
        fields = ", ".join(f"{k}={shown(v)}" for k, v in sorted(asked.items()))
        raise ValueError(
            f"adapter '{folder}': {CONFIG} asks for {clipped(fields, 200)}, which qlora_min does not implement"
        )
