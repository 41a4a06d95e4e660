"""Data sets -> encoded rows: for training, held out, and for evaluating an adapter later."""

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..adapter import AdapterConfig
from ..base import load_encoder
from ..chat import ChatEncoder
from ..config import Config
from ..data.examples import BadRow, BadRows, Example
from ..data.readers import COMMITS, pin, read
from ..data.rows import Row, Rows
from ..system.console import aligned, say
from . import checkpoint
from .options import config_from

NO_TOKENS = Row(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.bool), "")


def encoder_of(
    config: Config, revision: str | None = None, date: str | None = None, resumed: Path | None = None
) -> ChatEncoder:
    """The encoder of a run. revision: of the model. date: the one that the run's template was given (`ChatEncoder`).
    resumed: the directory of a resumed run, whose adapter/ has a copy of the tokenizer of --adapter."""
    own = config.adapter and Path(config.adapter)
    if own and resumed and (resumed / "adapter").is_dir():
        own = resumed / "adapter"
    if own:
        AdapterConfig.read(own)  # checks the folder
    return load_encoder(config.model, revision, config.chat_template, own, train_on=config.train_on, date=date)


@dataclass(frozen=True)
class Encoded:
    """One data set.

    Attributes:
        rows: those of at most `max_length` tokens.
        questions, fits: (n,) uint64 and bool. Of every row that is not bad: the hash of its question, and whether it is
            one of `rows`.
        bad: the number of bad rows. commit: on the hub, "" if it is not from there.
    """

    name: str
    rows: Rows
    questions: np.ndarray
    fits: np.ndarray
    bad: int = 0
    commit: str = ""

    @property
    def read(self) -> int:
        return len(self.fits) + self.bad

    @property
    def too_long(self) -> int:
        return len(self.fits) - len(self.rows)

    def select(self, chosen: np.ndarray, name: str | None = None, bad: int = 0) -> "Encoded":
        """The rows where `chosen` (n,), a mask like `fits`, is True."""
        rows, questions, fits = self.rows[chosen[self.fits]], self.questions[chosen], self.fits[chosen]
        return replace(self, name=name or self.name, rows=rows, questions=questions, fits=fits, bad=bad)


def encode_dataset(
    name: str,
    examples: Iterable[Example],
    encoder: ChatEncoder,
    max_length: int,
    bad: BadRows | None = None,
    texts: bool = False,
) -> Encoded:
    """Encode examples and keep those of at most `max_length` tokens.

    Args:
        bad: collects the bad rows, including those that `read` adds while `examples` is iterated; without it, they are
            raised. As soon as they are certain to end the run, the remaining rows are only checked, not tokenised.
        texts: keep the messages of the rows.

    Raises:
        ValueError: all rows are too long, or all are bad.
    """
    mine, refused = bad or BadRows(), 0  # by the encoder
    mine.reasons.clear()
    before, questions, lengths = mine.count, array("Q"), array("i")

    def kept() -> Iterator[Row]:
        nonlocal refused
        for part in _parts(examples):
            ends = mine.fatal and (lengths or mine.count > refused)
            unread = [replace(NO_TOKENS, location=e.location) for e in part] if ends else []
            for example, row in zip(part, unread or encoder.encode_examples(part)):
                if isinstance(row, BadRow):
                    mine.add(row, example.location)
                    refused += 1
                    continue
                questions.append(example.question_hash)
                lengths.append(len(row))
                if len(row) <= max_length:
                    yield replace(row, text=json.dumps(example.as_row())) if texts else row

    rows = Rows.write(kept())
    encoder.template.say_notes(name)
    count = mine.count - before
    if count and not lengths:
        mine.check_all(name, count)
    if bad is None:
        mine.check()
    if lengths and not rows:
        raise ValueError(
            f"{name}: all {len(lengths):,} rows are too long; the shortest has {min(lengths)} tokens, "
            f"--max-length is {max_length}"
        )
    return Encoded(name, rows, np.array(questions), np.array(lengths) <= max_length, count, COMMITS.get(name, ""))


def _parts(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples in groups for the tokenizer, of about a million characters, or 500 short examples."""
    size = 0

    def number(example: Example) -> int:
        nonlocal size
        size += 2000 + sum(len(m["content"] or "") for m in example.messages)
        return size // 10**6

    return (list(group) for _, group in itertools.groupby(examples, number))


def leave_out_shared(train: Encoded, held: Encoded, bad: BadRows) -> Encoded:
    """`train` without the rows whose question is also in `held`; these are added to `bad`.

    Questions are equal if their `Example.question` is: answer, options, case and spacing are not compared.
    """
    known, first = np.unique(held.questions[held.fits], return_index=True)
    shared = train.fits & np.isin(train.questions, known)
    if not shared.any():
        return train
    same = first[np.searchsorted(known, train.questions[shared])]  # the first row of `held` with the same question
    for row, other in zip(train.rows[shared[train.fits]], held.rows[same]):
        bad.add(BadRow(f"{row.location}: the same question is in {other.location}, which is held out"), row.location)
    return train.select(~shared, bad=train.bad + int(shared.sum()))


Data = tuple[list[Encoded], list[Encoded]]  # training and held out, a list of data sets each


def read_data(
    config: Config, encoder: ChatEncoder, report: bool = False, commits: Mapping[str, str] | None = None
) -> Data:
    """The encoded (training, held-out) data sets. Without --eval-dataset a fraction of --dataset is held out.

    Args:
        report: for `qlora-min data`: keep the messages of the rows, as with --shuffle-options, and keep training rows
            whose question stands in --eval-dataset.
        commits: of data sets on the hub, as a run recorded them.

    Raises:
        ValueError: a data set can't be read, or all of its rows are too long.
        BadData: bad rows, including those whose question is also held out; with --skip-bad-rows they are left out.
    """
    pin(commits or {})
    bad, texts = BadRows(config.skip_bad_rows), report or config.shuffle_options
    sources = (config.dataset, config.limit), (config.eval_dataset, config.eval_limit)
    # All data sets are opened first: a missing file is an error at once. A repeated name is read once.
    opened = [{name: read(name, limit, bad, config.columns) for name in names} for names, limit in sources]
    train, held = (
        [encode_dataset(name, examples, encoder, config.max_length, bad, texts) for name, examples in side.items()]
        for side in opened
    )
    usable = all(part.fits.any() for part in (*train, *held))
    for i, part in itertools.product(range(len(train)), () if report else held):
        train[i] = leave_out_shared(train[i], part, bad)
    usable &= any(part.rows for part in train)
    bad.check(", or leave bad rows out with --skip-bad-rows" * usable)
    if not config.eval_dataset and config.eval_fraction:
        questions = np.concatenate([part.questions for part in train])
        out = split(questions, config.eval_fraction, config.seed)
        _note_shared(questions, out)
        masks = np.split(out, np.cumsum([len(part.fits) for part in train]))
        for i, (part, here) in enumerate(zip(train, masks)):
            first = here & (np.cumsum(here) <= (config.eval_limit or len(here)))
            held.append(part.select(first, f"{part.name} (held out)"))
            train[i] = part.select(~here, bad=part.bad)
    if not any(part.rows for part in train):
        raise ValueError(f"{', '.join(config.dataset)}: no rows left to train on; lower --eval-fraction or add data")
    return train, [part for part in held if part.rows]


def _note_shared(questions: np.ndarray, held_out: np.ndarray) -> None:
    """Say it if rows with the same question are on both sides of a split."""
    if np.isin(questions[held_out], questions[~held_out]).any() and not held_out.all():
        n = len(np.unique(questions))
        have = "one question" if n == 1 else f"only {n:,} different questions"
        say(f"note: all {len(questions):,} rows have {have}: a fraction of the rows is held out, whose questions are "
            "trained on too, with other answers")  # fmt: skip


def evaluation_data(
    adapter: Path | None,
    model: str | None,
    datasets: Sequence[str] | None,
    limit: int | None,
    max_length: int = 512,
    columns: Sequence[str] | Mapping[str, str] = (),
) -> list[Encoded]:
    """The data to evaluate an adapter on: the given data sets, or else the rows that the adapter's run held out.

    Args:
        adapter: None to evaluate a model without one, on the given data sets.
        model: that model; or the base's path or hub id, if it is not the one in the adapter's files.
        limit: use at most the first N rows of each data set.
        max_length: leave out longer rows of the given data sets. columns: `Config.columns`, for the given data sets.

    Raises:
        ValueError: no data set is given, and the adapter is not in a run directory, its run held out no rows, or the
            data have changed since the run (so that rows it was trained on could pass for held out).
    """
    if adapter:
        described = AdapterConfig.read(adapter)
        revision = None if model else described.revision
        encoder = load_encoder(model or described.base_model, revision, adapter=adapter, date=described.date)
    else:
        encoder = load_encoder(model)
    if datasets:
        pin({})
        bad, columns = BadRows(), config_from({"columns": columns}, "columns").columns
        opened = [(name, read(name, limit, bad, columns)) for name in datasets]
        parts = [encode_dataset(name, examples, encoder, max_length, bad) for name, examples in opened]
        bad.check()
        return parts
    if not adapter:
        raise ValueError(f"model '{model}': no run held out rows for it; name the data to evaluate on with --dataset")
    run_dir = adapter.parent
    if not checkpoint.is_run(run_dir):
        raise ValueError(f"adapter '{adapter}' is not in a run directory; name the data to evaluate on with --dataset")
    record = checkpoint.read_record(run_dir)
    options = config_from(record["options"], str(run_dir / "config.json"))
    encoder.train_on = options.train_on
    train, parts = read_data(options, encoder, commits=record.get("commits", {}))
    if data_hash(*(Rows.join(part.rows for part in side) for side in (train, parts))) != record["data"].get("sha256"):
        raise ValueError(
            f"adapter '{adapter}': its data have changed since the run, so the rows that it held out are unknown; "
            "name the data to evaluate on with --dataset"
        )
    if not parts:
        raise ValueError(f"adapter '{adapter}': its run held out no rows; name the data to evaluate on with --dataset")
    return [part.select(part.fits & (np.cumsum(part.fits) <= limit)) for part in parts] if limit else parts


def table(parts: Sequence[Encoded]) -> str:
    """A table with a line for each data set: the numbers of rows read, kept, bad and too long, and of tokens."""
    lines = [("data", "rows", "kept", "bad", "too long", "tokens: mean", "max", "supervised: mean")]
    for p in parts:
        n, lengths = max(1, len(p.rows)), p.rows.lengths
        numbers = (p.read, len(p.rows), p.bad, p.too_long, lengths.sum() / n, lengths.max(initial=0))
        lines.append((p.name, *(f"{number:,.0f}" for number in numbers), f"{p.rows.supervised.sum() / n:.1f}"))
    return aligned(lines)


def data_hash(*parts: Sequence[Row]) -> str:
    """A hash of encoded rows: of all token ids and masks, the order of the rows and their division into parts."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(len(rows).to_bytes(8, "big"))
        for row in rows:
            digest.update(len(row).to_bytes(8, "big"))
            digest.update(row.input_ids.numpy())
            digest.update(row.supervised.numpy())
    return digest.hexdigest()


def split(questions: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Hold out about `fraction` of the rows. Rows with the same question are on the same side, if that is possible.

    Args:
        questions: (n,) the `Example.question_hash` of each row.

    Returns:
        (n,) bool, True where held out. It depends on the questions and the seed, not on the order of the rows, unless
        questions repeat so often that single rows are drawn, whatever their questions.
    """
    _, group, sizes = np.unique(questions, return_inverse=True, return_counts=True)
    order = np.random.RandomState(seed).permutation(len(sizes))  # RandomState: the same in all versions of numpy
    wanted = round(fraction * len(questions))
    before = np.cumsum(sizes[order]) - sizes[order]  # rows held out before each group
    held = np.isin(group, order[before < wanted])
    if held.sum() - wanted <= max(1, wanted / 2) and not held.all():
        return held
    chosen, room = [], wanted  # a large group exceeds the target: in the same order, take those that fit
    for i in order:
        if sizes[i] <= room:
            chosen.append(i)
            room -= sizes[i]
    if room <= wanted / 2:
        return np.isin(group, chosen)
    return np.isin(np.arange(len(questions)), np.random.RandomState(seed).permutation(len(questions))[:wanted])
