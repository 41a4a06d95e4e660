"""From examples to batches: messages -> (token ids, supervised mask) -> rows on disk -> batches.

One encoder serves training, evaluation and chat. The chat template is rendered once per sequence of roles, with a
placeholder where each message's text belongs, and cut at the placeholders. Template pieces are tokenised with their
control tokens, message texts without: `<|im_end|>` written in a question stays nine characters of text. What comes out
is, for Qwen2 and one question (supervised tokens underlined):

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\nQ: ...<|im_end|>\\n
    <|im_start|>assistant\\nE: Nitrofurantoin<|im_end|>
                           ~~~~~~~~~~~~~~~~~~~~~~~~~~~

An answer is supervised together with its end token, so the model learns to stop. Tokenising answer and prompt apart
makes the prompt a prefix of the row, whatever the answer starts with: at inference the model meets exactly the tokens
it was trained on. Padding goes to the right and is masked by position, never by id (SmolLM2's pad token is its end
token). A row that is too long is left out whole: a cut answer teaches to stop in the middle of a word.

Nothing grows with the data but a few numbers a row: examples come as a stream, and encoded rows lie in an Arrow file,
memory-mapped, about 5 bytes a token.
"""

import functools
import hashlib
import itertools
import json
import mmap
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa  # comes with datasets
import torch

from .config import Config
from .reading import BadRow, BadRows, Example, Message, read, to_example  # noqa: F401 (for our users)
from .report import aligned


@dataclass(frozen=True)
class Row:
    """One encoded row. ids and supervised: (T,); choices: the options' first token ids and the right one's index.

    text: the messages as JSON, where they were asked for (`encode_all`); otherwise empty.
    """

    ids: torch.Tensor
    supervised: torch.Tensor
    where: str
    choices: tuple[tuple[int, ...], int] | None = None
    text: str = ""

    @property
    def example(self) -> Example:
        """The row before it was encoded; for rows with their text."""
        return Example(tuple(json.loads(self.text)), self.where)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def n_supervised(self) -> int:
        """Tokens that are learned: the first has no predecessor to predict it."""
        return int(self.supervised[1:].sum())

    @property
    def answer_start(self) -> int:
        """Index of the first token of the last answer."""
        begins = self.supervised & ~self.supervised.roll(1)
        return int(begins.nonzero()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Encoding: messages -> token ids and supervised mask
# ---------------------------------------------------------------------------------------------------------------------


class ChatEncoder:
    """Messages -> token ids and supervised mask, by the tokenizer's own chat template.

    Raises:
        ValueError: the tokenizer has no chat template, or one that puts no end token after an answer.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model's tokenizer has no chat template; use an instruction-tuned model")
        self.tokenizer = tokenizer
        self.special_ids = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._special = re.compile("(?=" + "|".join(special or ["$^"]) + ")")  # overlapping ones too
        self._lead, self._lead_length = "", 0
        if tokenizer.convert_ids_to_tokens(self._tokenise(["x"])[0])[0].startswith("\u2581"):  # their mark for a space
            self._lead, self._lead_length = "\n", len(self._tokenise(["\n"])[0])
        self.end_id = self._pieces(("user", "assistant"))[-1][0]

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (an encoder lives as long as its run)
    def _pieces(self, roles: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """The template's own tokens around n messages: n + 1 pieces; the last is the end token of the last answer."""
        marks = [f"\ue000{i}\ue001" for i in range(len(roles))]  # private-use characters stand for the texts
        messages = [{"role": r, "content": m} for r, m in zip(roles, marks)]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as e:  # a template may refuse a sequence of roles, each in its own words
            raise ValueError(f"the chat template refuses the roles {', '.join(roles)}: {e}") from None
        if re.findall("\ue000\\d+\ue001", text) != marks:
            raise ValueError(f"the chat template does not show each message once for the roles {', '.join(roles)}")
        ids = [tuple(piece) for piece in self._tokenise(re.split("\ue000\\d+\ue001", text))]
        for i, role in enumerate(roles):
            if role == "assistant" and (not ids[i + 1] or ids[i + 1][0] not in self.special_ids):
                raise ValueError(
                    "the chat template puts no end token after an answer: the model could not learn to stop"
                )
        return (*ids[:-1], ids[-1][:1])

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """Pieces of text -> the ids of each, as they are in the middle of a text.

        SentencePiece tokenizers put a space before a text's beginning; there, tokenise behind a newline and cut it off.
        """
        texts = [self._lead + text for text in texts]
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [i[self._lead_length :] for i in ids]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Messages' texts -> ids. Text that spells a control token is cut inside, so that it stays text.

        One call of the tokenizer for all texts: a call each would cost more than the tokenising of a short one.
        """
        parts, counts = [], []
        for text in texts:
            cuts = [0, *(m.start() + 1 for m in self._special.finditer(text)), len(text)]
            parts += [text[a:b] for a, b in itertools.pairwise(cuts)]
            counts.append(len(cuts) - 1)
        tokenised = iter(self._tokenise(parts))
        ids = [list(itertools.chain.from_iterable(itertools.islice(tokenised, n))) for n in counts]
        if not all(map(self.special_ids.isdisjoint, ids)):
            raise ValueError("a text turns into a control token of the tokenizer even when cut")
        return ids

    def encode_all(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """Conversations that end with an answer -> (ids, supervised) of each, equally long.

        Supervised are the assistant's texts and the end token after each.
        """
        around = [self._pieces(tuple(m["role"] for m in messages)) for messages in conversations]
        texts = iter(self.encode_texts([m["content"] for messages in conversations for m in messages]))
        out = []
        for messages, pieces in zip(conversations, around):
            ids, supervised = list(pieces[0]), [False] * len(pieces[0])
            for message, piece in zip(messages, pieces[1:]):
                text, learned = next(texts), message["role"] == "assistant"
                ids += [*text, *piece]
                supervised += [learned] * len(text) + [learned and i == 0 for i in range(len(piece))]
            out.append((ids, supervised))
        return out

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """As `encode_all`, for one conversation."""
        return self.encode_all([messages])[0]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation that waits for its answer -> ids: exactly what precedes the answer in `encode`."""
        ids, _ = self.encode([*messages, {"role": "assistant", "content": ""}])
        return ids[:-1]

    def encode_examples(self, examples: Sequence[Example]) -> list[Row | BadRow]:
        """Each example as a Row, with its options' first tokens where it is multiple choice; or why it can't be one."""
        try:
            encoded = self.encode_all([e.messages for e in examples])
            return [self._row(e, *both) for e, both in zip(examples, encoded)]
        except ValueError as error:  # one of them: which?
            if len(examples) == 1:
                return [BadRow(f"{examples[0].where}: {error}")]
            return [row for e in examples for row in self.encode_examples([e])]

    def _row(self, example: Example, ids: list[int], supervised: list[bool]) -> Row:
        choice, choices = example.choice, None
        if choice:
            firsts = tuple(map(self._first_token, choice.letters))
            if len(set(firsts)) == len(firsts):  # else no single token tells the letters apart
                choices = (firsts, choice.letters.index(choice.correct))
        ids, supervised = np.array(ids, np.int32), np.array(supervised, bool)  # faster than torch, from a list
        return Row(torch.from_numpy(ids), torch.from_numpy(supervised), example.where, choices)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _first_token(self, letter: str) -> int:
        return self.encode_texts([f"{letter}:"])[0][0]


# ---------------------------------------------------------------------------------------------------------------------
# Encoded rows, on disk
# ---------------------------------------------------------------------------------------------------------------------

SCHEMA = pa.schema(
    {
        "ids": pa.list_(pa.int32()),
        "supervised": pa.list_(pa.uint8()),
        "where": pa.binary(),
        "choices": pa.list_(pa.int32()),  # the options' first tokens, then the index of the right one; or nothing
        "text": pa.binary(),
    }
)
ROWS_A_BATCH = 1024


def _record_batch(rows: Sequence[Row]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [{
            "ids": r.ids.numpy(),
            "supervised": r.supervised.numpy().view(np.uint8),
            "where": r.where.encode("utf-8", "surrogateescape"),
            "choices": (*r.choices[0], r.choices[1]) if r.choices else (),
            "text": r.text.encode("utf-8"),
        } for r in rows],
        schema=SCHEMA,
    )  # fmt: skip


class Rows(Sequence[Row]):
    """Rows in Arrow files (the format of `datasets`), memory-mapped: row i is read when it is asked for, in some 10 us.

    A slice, a mask (n,) of bools or an array of indices gives Rows on the same files. In memory, and free to sort and
    sum by: lengths (n,), the rows' tokens, and supervised (n,), how many of them count in the loss; int32 both.
    """

    def __init__(self, table: pa.Table, index: np.ndarray, lengths: np.ndarray, supervised: np.ndarray):
        self._table, self._index, self.lengths, self.supervised = table, index, lengths, supervised
        self._columns = table.columns

    @classmethod
    def write(cls, rows: Iterable[Row]) -> "Rows":
        """Write rows to a file of their own in the folder for temporary files ($TMPDIR).

        The file has no name on Linux, and is gone with the process, however that ends.

        Raises:
            ValueError: it can't be written, as when the disk is full.
        """
        lengths, supervised, rows = array("i"), array("i"), iter(rows)
        try:
            with tempfile.TemporaryFile(prefix="qlora_min-") as file:
                with pa.ipc.new_stream(file, SCHEMA) as writer:
                    while part := list(itertools.islice(rows, ROWS_A_BATCH)):
                        writer.write_batch(_record_batch(part))
                        lengths.extend(map(len, part))
                        supervised.extend(np.count_nonzero(r.supervised.numpy()[1:]) for r in part)
                file.flush()
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # keeps the file
        except OSError as e:
            raise ValueError(
                f"the encoded rows can't be written to {tempfile.gettempdir()} ({e.strerror or e}); set TMPDIR to a "
                "folder with space, about 5 bytes a token"
            ) from None
        table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
        if hasattr(mmap, "MADV_DONTNEED"):  # opening has brought in a page or more of each batch
            mapped.madvise(mmap.MADV_DONTNEED)
        return cls(table, np.arange(len(lengths)), np.array(lengths, np.int32), np.array(supervised, np.int32))

    @classmethod
    def join(cls, parts: Iterable["Rows"]) -> "Rows":
        """The rows of all parts, in order; nothing is copied but the numbers in memory."""
        parts = list(parts) or [cls.write(())]
        starts = itertools.accumulate((len(p._table) for p in parts), initial=0)
        return cls(
            pa.concat_tables(p._table for p in parts),
            np.concatenate([p._index + start for p, start in zip(parts, starts)]),
            np.concatenate([p.lengths for p in parts]),
            np.concatenate([p.supervised for p in parts]),
        )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i):
        if isinstance(i, slice | np.ndarray):
            return Rows(self._table, self._index[i], self.lengths[i], self.supervised[i])
        at = int(self._index[i])
        ids, supervised, where, choices, text = (column[at] for column in self._columns)
        *letters, correct = choices.as_py() or [None]
        return Row(
            torch.from_numpy(ids.values.to_numpy().copy()),
            torch.from_numpy(supervised.values.to_numpy().astype(bool)),
            where.as_py().decode("utf-8", "surrogateescape"),
            (tuple(letters), correct) if letters else None,
            text.as_py().decode("utf-8"),
        )


@dataclass(frozen=True)
class Encoded:
    """One data set: the rows that fit, and what is known of the others.

    questions (n,) uint64 and fits (n,) bool: of every good row, its question's hash and whether it is among `rows`.
    """

    name: str
    rows: Rows
    questions: np.ndarray
    fits: np.ndarray
    bad: int = 0

    @property
    def read(self) -> int:
        return len(self.fits) + self.bad

    @property
    def too_long(self) -> int:
        return len(self.fits) - len(self.rows)

    def select(self, chosen: np.ndarray, name: str | None = None, bad: int = 0) -> "Encoded":
        """Some of the good rows: chosen (n,) bool."""
        return Encoded(name or self.name, self.rows[chosen[self.fits]], self.questions[chosen], self.fits[chosen], bad)

    def first(self, limit: int) -> "Encoded":
        """At most the first `limit` of `rows`."""
        return self.select(self.fits & (np.cumsum(self.fits) <= limit))


def encode_all(
    name: str,
    examples: Iterable[Example],
    encoder: ChatEncoder,
    max_length: int,
    bad: BadRows | None = None,
    texts: bool = False,
) -> Encoded:
    """Encode examples and keep those of at most `max_length` tokens.

    Args:
        bad: takes the bad rows, those that `read` finds in `examples` among them; without it, they are raised. Once
            they are sure to end the run, the rows that follow are checked, and no longer tokenised.
        texts: rows keep their messages, on disk as well.

    Raises:
        ValueError: none fits, or all are bad.
    """
    mine = bad or BadRows()
    before, questions, lengths = mine.count, array("Q"), array("i")

    def kept() -> Iterator[Row]:
        for part in _parts(examples):
            if mine.fatal:
                nothing = torch.zeros(0, dtype=torch.int32)
                rows = [Row(nothing, nothing.bool(), e.where) for e in part]
            else:
                rows = encoder.encode_examples(part)
            for example, row in zip(part, rows):
                if isinstance(row, BadRow):
                    mine.add(row)
                    continue
                questions.append(example.question_hash)
                lengths.append(len(row))
                if len(row) <= max_length:
                    yield replace(row, text=json.dumps(example.messages)) if texts else row

    rows = Rows.write(kept())
    count = mine.count - before
    if bad is None:
        mine.check()
    if lengths and not rows:
        raise ValueError(
            f"{name}: all {len(lengths):,} rows are too long; the shortest has {min(lengths)} tokens, "
            f"--max-length is {max_length}"
        )
    if count and not lengths and mine.skip:
        raise ValueError(f"{name}: all {count:,} rows are bad; leave out --skip-bad-rows to see why")
    return Encoded(name, rows, np.array(questions, np.uint64), np.array(lengths, np.int32) <= max_length, count)


def _parts(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Examples in parts for the tokenizer: 512 of them, or a million characters."""
    part, size = [], 0
    for example in examples:
        part.append(example)
        size += sum(len(m["content"]) for m in example.messages)
        if len(part) == 512 or size > 10**6:
            yield part
            part, size = [], 0
    if part:
        yield part


def leave_out_shared(train: Encoded, held: Encoded, bad: BadRows) -> Encoded:
    """`train` without the rows whose question stands in `held` too: those are bad rows.

    A question is compared without its answer, options, case and spacing (`Example.question`).
    """
    questions, known = train.questions[train.fits], held.questions[held.fits]
    shared = np.flatnonzero(np.isin(questions, known))
    if not len(shared):
        return train
    first = dict(zip(known[::-1].tolist(), reversed(range(len(known)))))
    for i in shared:
        there = held.rows[first[questions[i]]].where
        bad.add(BadRow(f"{train.rows[i].where}: the same question stands in {there}, which is held out"))
    chosen = np.ones(len(train.fits), dtype=bool)
    chosen[np.flatnonzero(train.fits)[shared]] = False
    return train.select(chosen, bad=train.bad + len(shared))


Data = tuple[list[Encoded], list[Encoded]]  # training and held out, one part a data set


def read_data(config: Config, encoder: ChatEncoder, texts: bool = False) -> Data:
    """(training, held-out) data, encoded, one part a data set. Without --eval-dataset a share of --dataset is held out.

    Args:
        texts: rows keep their text, as they do for --shuffle-options.

    Raises:
        ValueError: a data set that can't be read, or none of whose rows fits.
        BadData: bad rows, questions among them that are in both; with --skip-bad-rows they are counted and left out.
    """
    bad, keep = BadRows(config.skip_bad_rows), texts or config.shuffle_options
    train, held = (  # a data set that is named twice counts once
        {name: read(name, limit, bad) for name in names}
        for names, limit in ((config.dataset, config.limit), (config.eval_dataset, config.eval_limit))
    )
    train, held = (
        [encode_all(name, examples, encoder, config.max_length, bad, keep) for name, examples in side.items()]
        for side in (train, held)
    )
    for i, part in itertools.product(range(len(train)), held):
        train[i] = leave_out_shared(train[i], part, bad)
    bad.check(", or leave bad rows out with --skip-bad-rows")
    if not config.eval_dataset and config.eval_fraction:
        out = split(np.concatenate([part.questions for part in train]), config.eval_fraction, config.seed)
        for i, part in enumerate(train):
            here, out = out[: len(part.fits)], out[len(part.fits) :]
            first = here & (np.cumsum(here) <= (config.eval_limit or len(here)))
            held.append(part.select(first, f"{part.name} (held out)"))
            train[i] = part.select(~here, bad=part.bad)
    if not any(part.rows for part in train):
        raise ValueError(f"{', '.join(config.dataset)}: no rows left to train on; lower --eval-fraction or add data")
    return train, [part for part in held if part.rows]


def table(parts: Sequence[Encoded]) -> str:
    """What was kept, what was dropped and why, a line a data set."""
    lines = [("data", "rows", "kept", "bad", "too long", "tokens: mean", "max", "supervised: mean")]
    for p in parts:
        lengths, taught = (a if len(a) else np.zeros(1) for a in (p.rows.lengths, p.rows.supervised))
        numbers = (p.read, len(p.rows), p.bad, p.too_long, lengths.mean(), lengths.max())
        lines.append((p.name, *(f"{n:,.0f}" for n in numbers), f"{taught.mean():.1f}"))
    return aligned(lines)


def data_hash(*parts: Sequence[Row]) -> str:
    """A fingerprint of encoded rows: every token id, every mask, their order and their division into parts."""
    digest = hashlib.sha256()
    for rows in parts:
        digest.update(len(rows).to_bytes(8, "big"))
        for row in rows:
            digest.update(len(row).to_bytes(8, "big") + row.ids.numpy().tobytes() + row.supervised.numpy().tobytes())
    return digest.hexdigest()


def preview(row: Row, tokenizer: Any, colour: bool) -> str:
    """A row as the model sees it: supervised tokens green, or between ⟦ and ⟧ where colours can't be shown."""
    start, end = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    out = []
    for learned, group in itertools.groupby(zip(row.ids.tolist(), row.supervised.tolist()), key=lambda pair: pair[1]):
        text = tokenizer.decode([i for i, _ in group], skip_special_tokens=False)
        out.append(f"{start}{text}{end}" if learned else text)
    return "".join(out)


def split(questions: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Hold out about `fraction` of the rows. Identical questions stay together, on one side.

    Args:
        questions: (n,) each row's `Example.question_hash`.

    Returns:
        (n,) bool, True where held out: a function of the questions and the seed, not of the rows' order.
    """
    _, group, sizes = np.unique(questions, return_inverse=True, return_counts=True)
    order = np.random.RandomState(seed).permutation(len(sizes))  # whose numbers no later version of numpy changes
    before = np.cumsum(sizes[order]) - sizes[order]  # rows held out when a group's turn comes
    held = np.zeros(len(sizes), dtype=bool)
    held[order[before < round(fraction * len(questions))]] = True
    return held[group]
