"""qlora-min data"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from ..config import Config
from .options import Emit, Parser, add_options, config_options, count_option, demo_options, groups, json_option


def options(parser: Parser) -> None:
    demo_options(parser, "look at the embedded demo's data")
    count_option(parser, "--preview", "and print N rows as the model sees them")
    json_option(parser)
    add_options(parser, [*groups()["model and data"], "seed"])


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Look at data before training: lengths, letters, repeated, contradicting and leaking questions.

    data --dataset FILE.jsonl --eval-dataset OTHER.jsonl   takes the options of train that name data
    data --demo --preview 3                                and rows as the model sees them
    """
    config = Config(**config_options(args))
    emit(look_at(config, args.preview or 0, colour=sys.stdout.isatty()).as_dict())


def look_at(config: Config, previews: int = 0, colour: bool = True) -> Any:
    """Read the data that the options name, and print what `qlora-min data` prints; writes nothing."""
    from ..base import load_encoder
    from ..run.datasets import read_data, table
    from .care import look

    encoder = load_encoder(config.model)
    train, held = read_data(config, encoder, texts=True)
    print(table([*train, *held]) + "\n")
    print(found := look(train, held))
    show_rows(config, encoder, train, previews, colour)
    return found


def show_rows(config: Config, encoder: Any, train: Sequence[Any], count: int, colour: bool = True) -> None:
    """Print the first training rows as the model sees them in the first epoch, the tokens it learns from in colour."""
    from ..data.epochs import shuffle_options
    from ..data.rows import Rows

    rows = Rows.join(part.rows for part in train)
    for i, row in enumerate(rows[:count]):
        if config.shuffle_options:
            row = shuffle_options(row, encoder, int(rows.lengths.max()), config.seed, 0, i)
        print(f"--- {row.location}: {len(row)} tokens, {int(row.supervised.sum())} supervised")
        print(preview(row, encoder.tokenizer, colour))


def preview(row: Any, tokenizer: Any, colour: bool) -> str:
    """A row as the model sees it: supervised tokens green, or between ⟦ and ⟧ where colours can't be shown."""
    start, end = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    out = []
    for learned, group in itertools.groupby(
        zip(row.input_ids.tolist(), row.supervised.tolist()), key=lambda pair: pair[1]
    ):
        text = tokenizer.decode([i for i, _ in group], skip_special_tokens=False)
        out.append(f"{start}{text}{end}" if learned else text)
    return "".join(out)
