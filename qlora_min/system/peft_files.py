"""PEFT's adapter_config.json, and qlora_min.json beside it for what PEFT's file has no field for.

The files may come from an untrusted source: every field is checked before it is used, and nothing that they name is
imported or executed. A field that changes what the adapter computes, and that our layer does not implement, is refused
by name: ignoring it would load a different adapter from the one saved.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from .console import say
from .files import check_links, read_json, write_json
from .text import clipped, refuse_secrets, shown

CONFIG, ORIGIN, WEIGHTS = "adapter_config.json", "qlora_min.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
WRITTEN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False, "use_dora": False,
           "init_lora_weights": True, "modules_to_save": None, "inference_mode": True}  # fmt: skip
# Fields that do not affect what the adapter computes.
HARMLESS = {"peft_type", "task_type", "inference_mode", "peft_version", "auto_mapping",
            "loftq_config", "corda_config", "eva_config", "runtime_config", "qalora_group_size"}  # fmt: skip
ALLOWED = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),  # other methods change W too
    "megatron_core": (None, "megatron.core"),  # a module that PEFT would import
}
REVISION = r"\w[\w-]*([./]\w[\w-]*)*"  # a commit, a branch or "refs/pr/1"


# A check accepts any JSON value as its argument, since values are untrusted.
Good = Callable[[Any], bool]


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30  # not NaN or infinity (1e999)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _text(pattern: str) -> Good:
    return lambda value: isinstance(value, str) and len(value) <= 200 and bool(re.fullmatch(pattern, value))


def _is_quick(expression: Any) -> bool:
    """Whether this is a regular expression that is matched in no time: it repeats no group, and has few choices."""
    if not isinstance(expression, str) or len(expression) > 200 or re.search(r"\)[*+?{]|\(\?[^:]", expression):
        return False
    with suppress(re.error, OverflowError):
        return len(re.findall(r"[*+?{|]", expression)) <= 4 and bool(re.compile(expression))
    return False


def _none_or(good: Good) -> Good:
    return lambda value: value is None or good(value)


def _list_of(good: Good) -> Good:
    return lambda value: isinstance(value, list) and 1 <= len(value) <= 1000 and all(map(good, value))


def _one_or_more(good: Good) -> Good:
    return lambda value: value in (None, []) or good(value) or _list_of(good)(value)


def _pattern_of(good: Good) -> Good:
    named = _list_of(_is_quick)
    return lambda v: v in (None, {}) or (isinstance(v, dict) and named([*v]) and all(map(good, v.values())))


def _is_name(value: Any) -> bool:
    """Whether a value is a hub id or a path without "..", so that it leads only where it seems to."""
    if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value) <= 1000:
        return False
    return all(part != ".." and len(part) <= 255 for part in re.split(r"[/\\]", value))


def _tuple(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


# Our name -> (the name in the file, a check of its value, the expectation in words, what makes our value of it). A
# field that may be None may be missing.
Check = tuple[str, Good, str, Callable[[Any], Any]]
PATTERN = "a mapping of names of layers, or of simple regular expressions for their ends, to"
ADAPTER: dict[str, Check] = {
    "rank": ("r", _is_rank, "an integer of at least 1", int),
    "alpha": ("lora_alpha", _is_alpha, "a number above 0", float),
    "dropout": ("lora_dropout", lambda v: v is None or (type(v) in (int, float) and 0 <= v < 1),
                "a number in [0, 1)", lambda v: float(v or 0.0)),
    "targets": ("target_modules", lambda v: v == "all-linear" or _list_of(_text(r"\w+(\.\w+)*"))(v),
                "a list of at most 1,000 names of layers, or 'all-linear'", _tuple),
    "rslora": ("use_rslora", lambda v: v in (None, False, True), "true or false", bool),
    "rank_pattern": ("rank_pattern", _pattern_of(_is_rank), f"{PATTERN} ranks", lambda v: v or {}),
    "alpha_pattern": ("alpha_pattern", _pattern_of(_is_alpha), f"{PATTERN} alphas", lambda v: v or {}),
    "layers_to_transform": ("layers_to_transform", _one_or_more(lambda v: type(v) is int and v >= 0),
                            "the index of a decoder layer, or a list of them", _tuple),
    "layers_pattern": ("layers_pattern", _one_or_more(_text(r"\w+")), "a name", _tuple),
    "base_model": ("base_model_name_or_path", _is_name, "the base's hub id or full path, without '..'", str),
    "revision": ("revision", _none_or(_text(REVISION)), "a commit or branch", lambda v: v),
}  # fmt: skip
OURS: dict[str, Check] = {
    "fingerprint": ("fingerprint", _none_or(_text("[0-9a-f]{64}")), "a sha256", lambda v: v),
    "date": ("date", _none_or(_text(r"\d{4}-\d\d-\d\d")), "a date as YYYY-MM-DD", lambda v: v),
    "quantization": ("quantization", lambda v: v in (None, "nf4", "fp4", "none"), "nf4, fp4 or none", lambda v: v),
}
AS_STORED = "the base's own are taken, as PEFT does; --quantization nf4 (or fp4) if it was trained on 4 bits"
UNSEEN = ("alpha", "rslora", "alpha_pattern")  # an edited rank or target would not match the weights; these would


@dataclass(frozen=True)
class PerLayer:
    """What differs between the layers of an adapter, by PEFT's rules (peft/tuners/lora/model.py, tuners_utils.py).

    rank_pattern, alpha_pattern: a regular expression for the end of a layer's name -> its own rank or alpha.
    layers_to_transform: the indices of the decoder layers that have updates, if not all. layers_pattern: the names of
    the module lists that these indices refer to.
    """

    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()

    def rank_and_alpha(self, name: str, rank: int, alpha: float) -> tuple[int, float]:
        """Those of a layer: of the first pattern that matches its name, else the given ones."""

        def first(pattern: Mapping[str, Any], otherwise: Any) -> Any:
            return next((pattern[end] for end in pattern if re.match(rf"(.*\.)?({end})$", name)), otherwise)

        return first(self.rank_pattern, rank), first(self.alpha_pattern, alpha)

    def targeted(self, name: str, target: str) -> bool:
        """Whether a target (the end of a name, or "all-linear") means this layer. The first number in a name is the
        index of its decoder layer; a whole name means that layer whatever its index."""
        if name == target or not (target == "all-linear" or name.endswith("." + target)):
            return name == target
        found = re.match(rf"(.*?\.)?({'|'.join(self.layers_pattern) or '[^.]*'})\.(?P<index>\d+)\.", name)
        return not self.layers_to_transform or (found is not None and int(found["index"]) in self.layers_to_transform)


def has_template(folder: Path) -> bool:
    """Whether an adapter's folder has a tokenizer with a chat template."""
    own = folder / "tokenizer_config.json"
    return own.is_file() and ((folder / "chat_template.jinja").is_file() or bool(read_json(own).get("chat_template")))


def named_targets(targets: tuple[str, ...], layers: Iterable[str]) -> tuple[str, ...]:
    """Targets as they are written: for "all-linear" the names of the layers that it meant, which every tool reads."""
    return tuple(sorted({name.rpartition(".")[2] for name in layers})) if "all-linear" in targets else targets


def trained_on(folder: Path, recorded: str | None, given: str | None = None, instead: str = AS_STORED) -> str | None:
    """The quantization of the base for an adapter: the given one, or what its files say. If they don't, None, and a
    note says what is taken instead."""
    if not (recorded or given):
        say(f"note: adapter '{folder}' does not say which weights it was trained on: {instead}", sys.stderr)
    return given or recorded


def said_to_merge(folder: Path, given: str | None, onto: str | None) -> str | None:
    """What an adapter was trained on: as its files say, else `given`, or by `onto`. ValueError if `given` differs."""
    recorded = read_adapter_config(folder)["quantization"]
    if given and recorded not in (None, given):
        raise ValueError(f"--quantization {given}: adapter '{folder}' was trained on {recorded}; leave it out")
    return given or recorded or {"dequantized": "nf4", "original": "none"}.get(onto or "")


def write_adapter_config(folder: Path, values: Mapping[str, Any], weights_sha256: str) -> None:
    """Write both files; `values` has the keys that `read_adapter_config` returns."""
    theirs = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    theirs["alpha"] = int(v) if (v := values["alpha"]) == int(v) else v
    theirs["targets"] = "all-linear" if theirs["targets"] == ["all-linear"] else theirs["targets"]
    theirs |= {name: theirs[name] or None for name in ("layers_to_transform", "layers_pattern")}
    write_json(folder / CONFIG, WRITTEN | {field: theirs[name] for name, (field, *_) in ADAPTER.items()})
    origin = {"base": values["base_model"], **{k: values[k] for k in ("revision", *OURS, *UNSEEN)}}
    write_json(folder / ORIGIN, {"qlora_min": __version__, **origin, "weights_sha256": weights_sha256})


def read_origin(folder: Path) -> dict[str, Any]:
    """The content of qlora_min.json, unchecked; empty for an adapter of another tool."""
    return read_json(folder / ORIGIN) if (folder / ORIGIN).is_file() else {}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The values in an adapter's files, by the names in `ADAPTER` and `OURS`.

    fingerprint and quantization are None for an adapter of another tool: its files do not say them.

    Raises:
        ValueError: the folder has no adapter, a file is damaged or links out of the folder, a value is invalid, or a
            field requires something that is not implemented.
    """
    if not (folder / CONFIG).is_file():
        inside = f" (there is '{folder / 'adapter'}')" if (folder / "adapter" / CONFIG).is_file() else ""
        raise ValueError(
            f"adapter '{folder}': no {CONFIG}; expected a folder that train.py or PEFT saved an adapter to{inside}"
        )
    if (folder / PICKLE).is_file() and not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"adapter '{folder}': its weights are in {PICKLE}, a pickle, which could run code and is never read; save "
            f"it as {WEIGHTS}, where you trust it: load it with peft, and model.save_pretrained(FOLDER)"
        )
    check_links(folder)
    peft, origin = read_json(folder / CONFIG), read_origin(folder)
    _refuse_what_is_unknown(folder, peft)
    found: dict[str, Any] = {}
    for file, checks in ((peft, ADAPTER), (origin, OURS)):
        for name, (theirs, good, expected, convert) in checks.items():
            value = file.get(theirs)
            if not good(value):
                raise ValueError(f"adapter '{folder}': {theirs} {shown(value)}, expected {expected}")
            found[name] = convert(value)
    refuse_secrets(found["base_model"], f"adapter '{folder}': base_model_name_or_path")
    for name in UNSEEN:
        if origin.get(name, found[name]) != found[name]:
            raise ValueError(
                f"adapter '{folder}': {CONFIG} says {ADAPTER[name][0]} {shown(found[name])}, but the weights were "
                f"trained with {shown(origin[name])}; put it back"
            )
    return found | {"quantization": found["quantization"] or ("nf4" if origin else None)}


def _refuse_what_is_unknown(folder: Path, peft: dict[str, Any]) -> None:
    """Raise ValueError for a field that requires something that is not implemented."""
    if peft.get("peft_type") != "LORA":
        raise ValueError(f"adapter '{folder}': peft_type {shown(peft.get('peft_type'))}, expected 'LORA'")
    known = HARMLESS | ALLOWED.keys() | {theirs for theirs, *_ in ADAPTER.values()}
    # None, False and empty values require nothing. 0 does: it is the index of a layer.
    asked = {k: v for k, v in peft.items() if k not in known and not (v is None or v is False or v in ("none", [], {}))}
    asked |= {k: peft[k] for k, allowed in ALLOWED.items() if peft.get(k) not in allowed}
    if asked:
        fields = clipped(", ".join(f"{k}={shown(v)}" for k, v in sorted(asked.items())), 200)
        raise ValueError(f"adapter '{folder}': {CONFIG} asks for {fields}, which qlora_min does not implement")
