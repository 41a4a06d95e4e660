"""Command-line options: those of a training run, made from the fields of `Config`, and those that commands share."""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ..config import FIELDS, flag
from ..run.options import REMOVED, kinds_of, nearest
from ..system.console import is_first_process
from ..system.text import redacted

Emit = Callable[[dict[str, Any]], None]  # prints an object if --json is given
METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line on stderr, with the nearest known option, and exit code 2."""

    removed: Mapping[str, str] = REMOVED  # options of earlier versions -> what to use instead

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.add_argument("--json", action="store_true", help="print one JSON object a line, and no text")

    def add_count(self, name: str, what: str, default: int | None = None) -> None:
        shown = f" [{default}]" if default else ""
        self.add_argument(name, type=positive, default=default, metavar="N", help=what + shown)

    def add_precision(self) -> None:
        self.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="[auto]")

    def add_adapter(self, required: bool) -> None:
        """Add the options that `load_given` reads."""
        self.add_argument("--adapter", required=required, metavar="DIR", help="an adapter saved by train.py or PEFT")
        alone = "" if required else "a plain or merged model; with --adapter, "
        self.add_argument("--model", metavar="NAME", help=f"{alone}the base, if not the one that the adapter names")
        bits = "of the base [what the adapter was trained on; none if its files don't say it]"
        self.add_argument("--quantization", choices=("nf4", "fp4", "none"), help=bits)

    def add_columns(self) -> None:
        self.add_argument("--columns", nargs="+", default=(), metavar="FIELD=NAME", help="of --dataset, as in training")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [s for a in self._actions for s in a.option_strings]
            name = unknown[0].split("=")[0]
            if instead := self.removed.get(name.removeprefix("--")):
                self.error(f"{name}: removed: {instead}")
            self.error(f"unknown option '{name}'{nearest(name, known) if name.startswith('-') else ''}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {redacted(message)} (see --help)\n" if is_first_process() else None)


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least 1")
    return int(text)


def groups() -> dict[str, list[str]]:
    """The headings of --help, each with the names of its options."""
    found, title = {}, ""
    for f in FIELDS.values():
        title = f.metadata.get("group", title)
        found.setdefault(title, []).append(f.name)
    return found


def add_options(parser: argparse.ArgumentParser, only: Sequence[str] = tuple(FIELDS)) -> None:
    """Add fields of Config as options. The namespace gets only those that are given on the command line."""
    for title, names in groups().items():
        if chosen := [name for name in names if name in only]:
            group = parser.add_argument_group(title)
            for name in chosen:
                group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, **_how_to_parse(name))


def _how_to_parse(name: str) -> dict[str, Any]:
    """The arguments of `add_argument` for a field of Config."""
    f = FIELDS[name]
    meta, kinds = f.metadata, kinds_of(f)
    if "separator" in meta:
        kwargs = {"type": lambda s: tuple(p.strip() for p in s.split(",") if p.strip()), "metavar": "A,B,..."}
    elif "choices" in meta:
        kwargs = {"choices": meta["choices"]}
    elif bool in kinds:
        kwargs = {"action": argparse.BooleanOptionalAction}
    else:
        kind, metavar = next((k, m) for k, m in METAVARS.items() if k in kinds)
        kwargs = {"type": kind, "metavar": metavar} | ({"nargs": "+"} if Ellipsis in kinds else {})
    default = f.default if not isinstance(f.default, tuple) else ",".join(f.default)
    shown = f" [{default}]" if default not in (None, "") else ""
    return kwargs | {"help": (meta["help"] + shown).replace("%", "%%")}


def given_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """The fields of Config that were given on the command line."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(namespace).items() if k in FIELDS}


def one_given(args: argparse.Namespace) -> None:
    """Raise ValueError if the options of `Parser.add_adapter` name neither an adapter nor a model."""
    if not args.adapter and not args.model:
        raise ValueError("--adapter DIR or --model NAME is needed (see --help)")


def load_given(args: argparse.Namespace) -> Any:
    """The `Base` that the options name: with an adapter, or a model alone, as stored unless --quantization is given."""
    from ..adapter import load_adapter
    from ..base import load_base

    if args.adapter:
        return load_adapter(Path(args.adapter), args.model, args.precision, quantization=args.quantization)
    return load_base(args.model, args.quantization, args.precision)


@contextmanager
def needed(what: str, extra: str) -> Iterator[None]:
    """Turn the ImportError of an optional dependency, one of the extra `extra`, into a ValueError."""
    try:
        yield
    except ImportError as e:
        raise ValueError(f"{what} needs {e.name} ({e}): pip install 'qlora_min[{extra}]'") from None


def new_file(option: str, path: str | Path) -> None:
    """Raise ValueError if the file that an option names exists, or can't be written there.

    Call it before the work of which the file holds the result.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{option} {path}: exists, and is never overwritten; choose another")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option} {path}: can't be written; expected a file in a folder that exists")


def demo_options(parser: Parser, what: str) -> None:
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file; the command line wins")
    parser.add_argument("--demo", action="store_true", help=what)


def config_options(args: argparse.Namespace) -> dict[str, Any]:
    """Values for Config: from the command line, else from --config, else from --demo.

    The demo's data are written to the user's cache. With --dataset, --demo gives only its model and settings for it.
    """
    from ..demo import world
    from ..run.options import read_toml

    options = {**(read_toml(args.config) if args.config else {}), **given_options(args)}
    demo = world.config_options("dataset" in options) if args.demo else {}
    if "warmup_steps" in options:  # instead of the demo's fraction
        demo.pop("warmup_ratio", None)
    return {**demo, **options}
