"""qlora-min data"""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..system.console import colours, say
from ..system.files import write_jsonl
from .options import Emit, Parser, add_options, config_options, demo_options, groups, needed, new_file

DROPS = ("repeated", "contradicting", "alike", "leaking")  # `care.Care.drops`


def _kinds(text: str) -> tuple[str, ...]:
    """An argparse type: kinds of rows, separated by commas."""
    kinds = tuple(part.strip() for part in text.split(",") if part.strip())
    if not kinds or not set(kinds) <= {*DROPS}:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected some of {','.join(DROPS)}")
    return kinds


def options(parser: Parser) -> None:
    demo_options(parser, "report on the data of the embedded demo")
    parser.add_count("--preview", "also print N rows as the model sees them")
    written = "write the rows of --dataset that are left, as messages, to a new file; no fraction of them is held out"
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help=written)
    parser.add_argument("--drop", type=_kinds, default=(), metavar="A,B,...", help=f"without those {', '.join(DROPS)}")
    add_options(parser, [*groups()["model and data"], "seed"])


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Report on data before training: lengths, right letters, repeated, contradicting and leaking questions.

    data --dataset FILE.jsonl --eval-dataset OTHER.jsonl   the options are those with which train selects data
    data --demo --preview 3                                also prints rows as the model sees them
    data --dataset FILE.jsonl --output CLEAN.jsonl --drop repeated,alike
    """
    config = Config(**config_options(args))
    if args.output:
        config = _check_output(config, args.output, args.drop)
    elif args.drop:
        raise ValueError("--drop: it changes no file; name a new one with --output FILE.jsonl")
    emit(look_at(config, args.preview or 0, colours(), args.output, args.drop).as_dict())


def _check_output(config: Config, output: Path, drop: Sequence[str]) -> Config:
    """The options with which rows are cleaned. Raises ValueError if that is impossible, before anything is read."""
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: expected FILE.jsonl")
    new_file("--output", output)
    if "leaking" in drop and not config.eval_dataset:
        raise ValueError("--drop leaking: name the data that rows may leak from with --eval-dataset")
    if {"alike", "leaking"} & set(drop):
        with needed("--drop alike or leaking", "care"):
            import rensa  # noqa: F401
    return replace(config, eval_fraction=0.0)


def look_at(
    config: Config, previews: int = 0, colour: bool = True, output: Path | None = None, drop: Sequence[str] = ()
) -> Any:
    """Read the data of a configuration and print the report of `qlora-min data`. Overwrites nothing.

    Args:
        previews: training rows to print as the model sees them.
        colour: mark supervised tokens by colour, or else by brackets.
        output: a new file for the training rows without those in `drop`, some of DROPS.

    Returns:
        The report, a `care.Care`.

    Raises:
        ValueError: a row can't be used, a data set can't be read, or no row is left for `output`.
    """
    from ..run.datasets import encoder_of, read_data, table
    from .care import look

    encoder = encoder_of(config)
    train, held = read_data(config, encoder, report=True)
    say(table([*train, *held]) + "\n")
    found = look(train, held)
    say(str(found))
    show_rows(config, encoder, train, previews, colour)
    if output:
        _write(output, train, {kind: found.drops[kind] for kind in drop})
    return found


def _write(output: Path, train: Sequence[Any], drops: Mapping[str, Any]) -> None:
    """Write the rows that no array (n,) of `drops` marks, and say how many were left out, and why."""
    import numpy as np

    from ..data.rows import Rows

    rows, left_out = Rows.join(part.rows for part in train), {}
    kept = np.ones(len(rows), bool)
    for kind, marked in drops.items():
        left_out[kind] = int((kept & marked).sum())
        kept &= ~marked
    left_out |= {"too long": sum(part.too_long for part in train), "bad": sum(part.bad for part in train)}
    if not kept.any():
        raise ValueError(f"--output {output}: no row is left; nothing is written")
    new_file("--output", output)  # another process may have written it since
    write_jsonl(output, (row.example.as_row() for row in rows[kept]))
    why = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items() if count)
    say(f"\n{output}: {kept.sum():,} rows; left out: {why or 'none'}")


def show_rows(config: Config, encoder: Any, train: Sequence[Any], count: int, colour: bool = True) -> None:
    """Print the first training rows as the model sees them in the first epoch, supervised tokens in colour."""
    from ..data.epochs import shuffle_options
    from ..data.rows import Rows

    rows = Rows.join(part.rows for part in train)
    for i, row in enumerate(rows[:count]):
        if config.shuffle_options:
            row = shuffle_options(row, encoder, int(rows.lengths.max()), config.seed, 0, i)
        say(f"--- {row.location}: {len(row)} tokens, {int(row.supervised.sum())} supervised")
        say(preview(row, encoder.tokenizer, colour))


def preview(row: Any, tokenizer: Any, colour: bool) -> str:
    """A row as the model sees it, with supervised tokens in green, or between ⟦ and ⟧ if not `colour`."""
    start, end = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    out, pairs = "", zip(row.input_ids.tolist(), row.supervised.tolist())
    for supervised, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([i for i, _ in group], skip_special_tokens=False)
        out += f"{start}{text}{end}" if supervised else text
    return out
