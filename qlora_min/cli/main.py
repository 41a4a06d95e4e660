"""The command line: what `qlora-min COMMAND` and the scripts of the same names do.

A command is a module of this folder with two functions: `options(parser)` adds its options, and `command(args, emit)`
executes it; the docstring of `command` is the command's help. Slow imports (torch) are made only when a command is
executed, so that --help and errors in options appear at once. `--json` makes stdout one JSON object a line, for
programs, and turns off text and progress bars.
"""

import argparse
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any, NoReturn
from unittest.mock import patch

from ..run.options import nearest
from ..system import started
from ..system.console import is_first_process, show_everything
from ..system.text import Failed, redacted
from . import bench, chat, compare, data, evaluate, merge, train
from .options import Emit, Parser, needed

COMMANDS = {"train": train, "data": data, "eval": evaluate, "merge": merge, "chat": chat, "compare": compare,
            "bench": bench}  # fmt: skip


def described(name: str) -> tuple[str, str]:
    """(what a command does, its examples)."""
    what, _, examples = inspect.getdoc(COMMANDS[name].command).partition("\n\n")
    examples = re.sub(rf"^{name}\b", lambda _: started.command(name), examples, flags=re.MULTILINE)
    return what, textwrap.indent(examples, "  ")


def make_parser(name: str, prog: str | None = None) -> Parser:
    """The parser of a command."""
    (what, examples), width = described(name), shutil.get_terminal_size().columns
    if max(map(len, examples.splitlines())) > width:  # what an example does stands below it
        examples = re.sub(r"(?<=\S) {2,}(?=\S)", "\n      ", examples)
    what = textwrap.fill(what, width)
    parser = Parser(prog=prog, usage="%(prog)s [options]", description=what, epilog=f"examples:\n{examples}")
    COMMANDS[name].options(parser)
    return parser


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Execute a command and exit. argv: the command line, by default that of the process."""
    run_parsed(make_parser(name, prog).parse_args(argv), COMMANDS[name].command)


def run_parsed(args: argparse.Namespace, command: Callable[[argparse.Namespace, Emit], None]) -> NoReturn:
    """Execute a command with parsed options and exit. --quiet is obeyed if it has it."""

    def main() -> None:
        with _output(args) as emit:
            command(args, emit)

    run_script(main)


def run_script(main: Callable[[], None]) -> NoReturn:
    """Call a script's main and exit. A ValueError (a user error) or OSError: one line on stderr, exit code 2.

    A ValueError with an attribute `lines` shows these lines instead. If torchrun started several processes, only the
    first one shows them. `Failed` or MemoryError: its message, exit code 1.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # safe: no process is forked after tokenizing
    show_everything()
    try:
        main()
        sys.exit(0)
    except (Failed, MemoryError) as e:
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
    """Silence stdout and progress bars if --json or --quiet is given; yields a function that prints objects for --json.

    If torchrun started several processes, only the first one prints.
    """
    out = sys.stdout

    def emit(value: dict[str, Any]) -> None:
        if args.json and is_first_process():
            print(json.dumps(value), file=out, flush=True)

    with ExitStack() as silence:
        if args.json or getattr(args, "quiet", False) or not is_first_process():
            nowhere = silence.enter_context(open(os.devnull, "w", encoding="utf-8", errors="replace"))
            silence.enter_context(redirect_stdout(nowhere))
            silence.enter_context(patch.dict(os.environ, TQDM_DISABLE="1"))
        yield emit


def main() -> NoReturn:
    """The console command `qlora-min`."""
    commands = [f"  {name:<8}{described(name)[0]}" for name in COMMANDS]
    usage = "\n".join(["usage: qlora-min COMMAND [options]\n", *commands,
                       "\nqlora-min COMMAND --help tells more; qlora-min completion bash|zsh|tcsh prints a script "
                       "that completes all of these"])  # fmt: skip
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
    """Print the completion script of a shell, made by shtab."""
    with needed("completion", "completion"):
        import shtab
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"completion: got {shell!r}, expected one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser = argparse.ArgumentParser(prog="qlora-min")
    commands = parser.add_subparsers(parser_class=Parser)
    for name, module in COMMANDS.items():
        what, _ = described(name)
        module.options(commands.add_parser(name, description=what, help=what))
    print(shtab.complete(parser, shell))


if __name__ == "__main__":
    main()
