"""qlora-min data"""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

from ..config import Config
from ..system.console import colours, say
from .options import Emit, Parser, add_options, config_options, count_option, demo_options, groups, json_option


def options(parser: Parser) -> None:
    demo_options(parser, "report on the data of the embedded demo")
    count_option(parser, "--preview", "also print N rows as the model sees them")
    json_option(parser)
    add_options(parser, [*groups()["model and data"], "seed"])


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Report on data before training: lengths, right letters, repeated, contradicting and leaking questions.

    data --dataset FILE.jsonl --eval-dataset OTHER.jsonl   the options are those with which train selects data
    data --demo --preview 3                                also prints rows as the model sees them
    """
    config = Config(**config_options(args))
    emit(look_at(config, args.preview or 0, colours()).as_dict())


def look_at(config: Config, previews: int = 0, colour: bool = True) -> Any:
    """Read the data of a configuration and print the report of `qlora-min data`. Writes nothing.

    Args:
        previews: training rows to print as the model sees them.
        colour: mark supervised tokens by colour, or else by brackets.

    Returns:
        The report, a `care.Care`.

    Raises:
        ValueError: a row that can't be used, or a data set that can't be read.
    """
    from ..run.datasets import encoder_of, read_data, table
    from .care import look

    encoder = encoder_of(config)
    train, held = read_data(config, encoder, texts=True)
    say(table([*train, *held]) + "\n")
    found = look(train, held)
    say(str(found))
    show_rows(config, encoder, train, previews, colour)
    return found


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
