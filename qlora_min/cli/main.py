"""The command line: what `qlora-min COMMAND` and the scripts of the same names do.

A command is a module of this folder with two functions: `options(parser)` adds its options, and `command(args, emit)`
runs it, whose docstring is its help. Imports that take seconds (torch) are made when a command runs, so that --help and
errors in options come at once. `--json` turns stdout into one JSON object a line, for programs; text and bars are then
left out.
"""

import argparse
import inspect
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, NoReturn
from unittest.mock import patch

from ..run.options import nearest
from ..system.console import is_first_process
from ..system.text import redacted
from . import bench, chat, compare, data, evaluate, merge, train
from .options import Emit, Parser

COMMANDS = {"train": train, "data": data, "eval": evaluate, "merge": merge, "chat": chat, "compare": compare,
            "bench": bench}  # fmt: skip


def described(name: str) -> tuple[str, str]:
    """(what a command does, its examples)."""
    what, _, examples = inspect.getdoc(COMMANDS[name].command).partition("\n\n")
    return what, textwrap.indent(examples, "  ")


def make_parser(name: str, prog: str | None = None) -> Parser:
    """The parser of a command."""
    what, examples = described(name)
    parser = Parser(prog=prog, usage="%(prog)s [options]", description=what, epilog=f"examples:\n{examples}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    COMMANDS[name].options(parser)
    return parser


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Run a command to the process's end; `argv` is the process's own if not given."""
    run_parsed(make_parser(name, prog).parse_args(argv), COMMANDS[name].command)


def run_parsed(args: argparse.Namespace, command: Callable[[argparse.Namespace, Emit], int | None]) -> NoReturn:
    """Run what a command does, with its options, to the process's end."""

    def main() -> int | None:
        with _output(args) as emit:
            return command(args, emit)

    run_script(main)


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main: a ValueError (what a user can cause) or OSError is one line on stderr and exit code 2.

    A ValueError may have several lines to show, in its attribute `lines`. Of several processes that torchrun started,
    the first shows it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # nothing forks after it
    try:
        sys.exit(main() or 0)
    except MemoryError as e:
        print(f"error: {e or 'out of memory'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        sys.exit(141)
    except (ValueError, OSError) as e:  # OSError: a file or folder that can't be read or written
        for line in getattr(e, "lines", [str(e)]) if is_first_process() else ():
            print("error: " + " ".join(redacted(line).split()), file=sys.stderr)
        sys.exit(2)


@contextmanager
def _output(args: argparse.Namespace) -> Iterator[Emit]:
    """What --json and --quiet do to stdout and to the bars; yields what prints an object where --json asks for it.

    Of several processes that torchrun started, the first prints.
    """
    out, as_json = sys.stdout, getattr(args, "json", False)

    def emit(value: dict[str, Any]) -> None:
        if as_json and is_first_process():
            print(json.dumps(value), file=out, flush=True)

    if not as_json and not getattr(args, "quiet", False) and is_first_process():
        yield emit
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), patch.dict(os.environ, TQDM_DISABLE="1"):
        yield emit


def main() -> NoReturn:
    """The console command `qlora-min`."""
    commands = [f"  {name:<8}{described(name)[0]}" for name in COMMANDS]
    usage = "\n".join(["usage: qlora-min COMMAND [options]\n", *commands,
                       "\nqlora-min COMMAND --help tells more; qlora-min completion bash|zsh|tcsh prints a script "
                       "that completes all this"])  # fmt: skip
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage)
        sys.exit(0)
    if name == "completion":
        run_script(lambda: _completion(rest[0] if rest else "bash"))
    if name not in COMMANDS:
        known = [*COMMANDS, "completion"]
        print(f"error: unknown command '{name}'{nearest(name, known)} (see --help)", file=sys.stderr)
        sys.exit(2)
    run_command(name, rest, f"qlora-min {name}")


def _completion(shell: str) -> None:
    """Print the completion script of a shell, by shtab."""
    try:
        import shtab
    except ImportError:
        raise ValueError("completion needs shtab: pip install -e '.[completion]'") from None
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"completion: got {shell!r}, expected one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser = argparse.ArgumentParser(prog="qlora-min")
    commands = parser.add_subparsers()
    for name, module in COMMANDS.items():
        what, _ = described(name)
        module.options(commands.add_parser(name, description=what, help=what))
    print(shtab.complete(parser, shell))


if __name__ == "__main__":
    main()
