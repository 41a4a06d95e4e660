"""Option values from files: a TOML file, or the config.json of a run. Options of generation."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import FIELDS, Config

REMOVED = {"packing": "--engine modules|fused"}  # options of earlier versions -> what there is instead


def nearest(name: str, known: Sequence[str]) -> str:
    """ ", did you mean X?" with the known name X that is most similar, or "" if none is similar."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]}?" if close else ""


def kinds_of(f: dataclasses.Field) -> set[type]:
    """The types that a field accepts: {int, NoneType} for `int | None`."""
    return set(typing.get_args(f.type)) or {f.type}


def _convert(kinds: set[type], value: Any) -> Any:
    """Convert a value from a TOML or JSON file to one of these types. Raises TypeError if it has another type."""
    if Ellipsis in kinds:
        value = [f"{k}={v}" for k, v in value.items()] if isinstance(value, Mapping) else value  # a table: columns
        items = value if isinstance(value, list | tuple) else str(value).split(",") if str in kinds else [value]
        items = [_convert(kinds - {Ellipsis}, i) for i in items]
        return tuple(i.strip() for i in items if i.strip()) if str in kinds else tuple(items)
    if type(value) in kinds:
        return value
    number = type(value) in (int, float)
    if int in kinds and number and value == int(value):
        return int(value)
    if float in kinds and number:
        return float(value)
    raise TypeError


def parse_values(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Check names and types of option values read from a file.

    Raises:
        ValueError: an unknown or removed name (the message suggests another), or a value of the wrong type.
    """
    out = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in REMOVED:
            raise ValueError(f"{source}: option '{key}' was removed: {REMOVED[name]}")
        if name not in FIELDS:
            raise ValueError(f"{source}: unknown option '{key}'{nearest(name, list(FIELDS)).replace('_', '-')}")
        f = FIELDS[name]
        if "choices" in f.metadata and isinstance(value, bool):  # gradient-checkpointing = true
            value = "on" if value else "off"
        try:
            out[name] = _convert(kinds_of(f), value)
        except (TypeError, ValueError, OverflowError):
            lists = {tuple[str, ...]: "list", tuple[float, ...]: "list of numbers"}
            kinds = lists.get(f.type) or "/".join(k.__name__ for k in kinds_of(f) - {type(None)})
            raise ValueError(f"{source}: option '{key}': got {value!r}, expected {kinds}") from None
    return out


def read_toml(path: str) -> dict[str, Any]:
    """Option values from a TOML file.

    Raises:
        ValueError: the file can't be read or is not TOML, or a name or a value is not valid.
    """
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ValueError(f"--config {path}: can't be read ({e.strerror}); expected a TOML file of options") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"--config {path}: not valid TOML ({e})") from None
    return parse_values(values, path)


def config_from(values: Mapping[str, Any], source: str) -> Config:
    """The inverse of `Config.as_dict`, also for an earlier version's. source: the file's name, for errors."""
    return Config(**parse_values({k: v for k, v in values.items() if k not in REMOVED}, source))


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Fields of transformers' GenerationConfig: to draw tokens at this temperature, of the likeliest that together have
    a probability of `top_p`; none, to take the likeliest token, at temperature 0.

    Raises:
        ValueError: a value is out of range.
    """
    if temperature and not 0.01 <= temperature <= 100:
        raise ValueError(f"--temperature: got {temperature}, expected 0 (the likeliest answer), or from 0.01 to 100")
    if not 0 < top_p <= 1:
        raise ValueError(f"--top-p: got {top_p}, expected a number above 0 and at most 1")
    if top_p < 1 and not temperature:
        raise ValueError("--top-p: chooses nothing at --temperature 0; give a temperature above 0")
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
