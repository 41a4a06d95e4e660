"""From files to batches: rows -> messages -> (token ids, supervised mask) -> batches.

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
"""

import ast
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

LAYOUTS = "instruction/input/output, prompt/completion, or messages"
FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Example:
    """One conversation that ends with an answer, and where it stands (for errors): "train.jsonl:12"."""

    messages: tuple[Message, ...]
    where: str

    @property
    def question(self) -> str:
        """What identifies the question: everything before the answer, without options, case and spacing."""
        text = "\n".join(m["content"] for m in self.messages[:-1])
        choice = multiple_choice(self.messages)
        return " ".join((text[: text.rindex(choice.literal)] if choice else text).casefold().split())


@dataclass(frozen=True)
class MultipleChoice:
    """The options of a question: their letters, which is right, and the literal that lists them in the text."""

    letters: tuple[str, ...]
    correct: str
    literal: str


@dataclass(frozen=True)
class Row:
    """One encoded row. ids and supervised: (T,); choices: the options' first token ids and the right one's index."""

    ids: torch.Tensor
    supervised: torch.Tensor
    where: str
    choices: tuple[tuple[int, ...], int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer_start(self) -> int:
        """Index of the first token of the last answer."""
        begins = self.supervised & ~self.supervised.roll(1)
        return int(begins.nonzero()[-1])


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. input_ids (B, T) int64; supervised (B, T) bool, False on padding; lengths (B,)."""

    input_ids: torch.Tensor
    supervised: torch.Tensor
    lengths: torch.Tensor

    @property
    def n_supervised(self) -> int:
        """Number of supervised tokens. A token at position 0 has no predecessor and is never supervised."""
        return int(self.supervised[:, 1:].sum())

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in (self.input_ids, self.supervised, self.lengths)))


# ---------------------------------------------------------------------------------------------------------------------
# Reading: a file or a hub id -> examples
# ---------------------------------------------------------------------------------------------------------------------


def read(source: str, limit: int | None = None) -> list[Example]:
    """The examples of a local file (.jsonl, .json, .csv, .parquet) or of a data set on the Hugging Face hub.

    Args:
        limit: read at most the first N rows.

    Raises:
        ValueError: no such file or data set, an empty one, an unknown layout, or a broken row (named as file:line).
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in FILE_KINDS:
            raise ValueError(f"{source}: unknown kind of file '{path.suffix}', expected one of {', '.join(FILE_KINDS)}")
        raw = _READERS[path.suffix](path)
    elif path.suffix in FILE_KINDS or path.is_dir() or source.count("/") != 1:
        raise ValueError(
            f"data set '{source}': no such file; expected a {'/'.join(FILE_KINDS)} file or a hub id like OWNER/NAME"
        )
    else:
        raw = _read_hub(source)
    examples = [to_example(row, where) for row, where in itertools.islice(raw, limit)]
    if not examples:
        raise ValueError(f"{source}: no rows; expected at least one in a layout of {LAYOUTS}")
    return examples


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # without a byte-order mark
    except UnicodeDecodeError as e:
        line = path.read_bytes()[: e.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; expected a file saved as UTF-8") from None


def _read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line), f"{path}:{number}"
            except (ValueError, RecursionError) as e:
                reason = getattr(e, "msg", "nested too deeply or a number too long")
                raise ValueError(f"{path}:{number}: not a JSON object ({reason}); expected one a line") from None


def _read_json(path: Path) -> Iterator[tuple[Any, str]]:
    try:
        rows = json.loads(_read_text(path))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}:{getattr(e, 'lineno', 1)}: not JSON; expected a list of objects") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: a JSON {type(rows).__name__}, expected a list of objects")
    for number, row in enumerate(rows, 1):
        yield row, f"{path}:row {number}"


def _read_csv(path: Path) -> Iterator[tuple[Any, str]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), restval="", strict=True)
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{path}:{reader.line_num}: more fields than the header names")
            yield row, f"{path}:{reader.line_num}"
    except csv.Error as e:
        raise ValueError(f"{path}:{reader.line_num}: broken CSV ({e})") from None


def _read_parquet(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet as pq  # comes with datasets

    try:
        rows = pq.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f"{path}: not a readable Parquet file ({str(e).splitlines()[0]})") from None
    for number, row in enumerate(rows, 1):
        yield row, f"{path}:row {number}"


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_hub(name: str) -> Iterator[tuple[Any, str]]:
    import datasets

    try:
        data = datasets.load_dataset(name, split="train")
    except datasets.exceptions.DatasetNotFoundError:
        raise ValueError(f"data set '{name}': not on the Hugging Face hub (or private), and no local file") from None
    except ConnectionError:
        raise ValueError(
            f"data set '{name}': no local file of this name, and the Hugging Face hub can't be reached; "
            f"give a local {'/'.join(FILE_KINDS)} file, or try --demo, which needs no network"
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, RuntimeError, ValueError) as e:
        raise ValueError(f"data set '{name}': can't be loaded ({str(e).strip().splitlines()[0]})") from None
    for number, row in enumerate(data, 1):
        yield row, f"{name}:row {number}"


def to_example(row: Any, where: str) -> Example:
    """A row of any of the three layouts, recognised by its columns, as messages.

    Raises:
        ValueError: unknown columns, a field that is no text, or no answer; the message names `where`.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}, expected an object with columns {LAYOUTS}")
    if "messages" in row:
        return Example(_checked_messages(row["messages"], where), where)
    if {"prompt", "completion"} <= row.keys():
        user, answer = _text(row, "prompt", where), _text(row, "completion", where)
    elif {"instruction", "output"} <= row.keys():
        given = _text(row, "input", where, may_be_empty=True) if row.get("input") is not None else ""
        user = _text(row, "instruction", where, may_be_empty=bool(given.strip()))
        user = "\n\n".join(part for part in (user, given) if part.strip())
        answer = _text(row, "output", where)
    else:
        # Names are shown, and nothing else: in a CSV without a header they are a row's text.
        columns = ", ".join(repr(c) if str(c).isidentifier() else "..." for c in row) or "none"
        raise ValueError(f"{where}: unknown layout with columns {columns[:200]}; expected {LAYOUTS}")
    return Example(({"role": "user", "content": user}, {"role": "assistant", "content": answer}), where)


def _text(row: dict, field: str, where: str, may_be_empty: bool = False) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise ValueError(f"{where}:{field}: a {type(value).__name__}, expected text")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{where}:{field}: half a surrogate pair, expected text in Unicode")
    if not value.strip() and not may_be_empty:
        raise ValueError(f"{where}:{field}: empty, expected text")
    return value


def _checked_messages(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where}:messages: expected a list of objects with role and content")
    for i, m in enumerate(messages):
        if m.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{where}:messages[{i}].role: unknown role, expected system, user or assistant")
        _text(m, "content", f"{where}:messages[{i}]", may_be_empty=m["role"] == "system")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}:messages: the last message must be the assistant's answer")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def multiple_choice(messages: Sequence[Message]) -> MultipleChoice | None:
    """The options of a question written as MedQA's are (text with {'A': '...'}, answer "B: ..."), or None."""
    answer = re.match(r"([A-Z])\b", messages[-1]["content"])
    literal = re.search(r"\{\s*'[A-Z]'\s*:.*\}", messages[-2]["content"], re.DOTALL) if len(messages) > 1 else None
    if not answer or not literal:
        return None
    try:
        options = ast.literal_eval(literal[0])
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(options, dict) or answer[1] not in options or not all(isinstance(k, str) for k in options):
        return None
    return MultipleChoice(tuple(options), answer[1], literal[0])


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out about `fraction` of the examples. Identical questions stay together, on one side.

    Returns:
        (train, held out), each in the order of `examples`.
    """
    groups: dict[str, list[int]] = {}
    for i, e in enumerate(examples):
        groups.setdefault(e.question, []).append(i)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    held: set[int] = set()
    for key in keys:
        if len(held) >= round(fraction * len(examples)):
            break
        held.update(groups[key])
    return (
        [e for i, e in enumerate(examples) if i not in held],
        [e for i, e in enumerate(examples) if i in held],
    )


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
        self._special = re.compile("(?=" + "|".join(special or ["$^"]) + ")")
        self._lead, self._lead_length = "", 0
        if tokenizer.convert_ids_to_tokens(self._tokenise("x"))[0].startswith("\u2581"):  # their mark for a space
            self._lead, self._lead_length = "\n", len(self._tokenise("\n"))
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
        ids = [tuple(self._tokenise(piece)) for piece in re.split("\ue000\\d+\ue001", text)]
        for i, role in enumerate(roles):
            if role == "assistant" and (not ids[i + 1] or ids[i + 1][0] not in self.special_ids):
                raise ValueError(
                    "the chat template puts no end token after an answer: the model could not learn to stop"
                )
        return (*ids[:-1], ids[-1][:1])

    def _tokenise(self, text: str) -> list[int]:
        """A piece of text -> ids, as they are in the middle of a text.

        SentencePiece tokenizers put a space before a text's beginning; there, tokenise behind a newline and cut it off.
        """
        if not text:
            return []
        ids = self.tokenizer(self._lead + text, add_special_tokens=False)["input_ids"]
        return ids[self._lead_length :]

    def encode_text(self, text: str) -> list[int]:
        """A message's text -> ids. Text that spells a control token is cut inside, so that it stays text."""
        cuts = [0, *(m.start() + 1 for m in self._special.finditer(text)), len(text)]
        ids = [i for a, b in itertools.pairwise(cuts) for i in self._tokenise(text[a:b])]
        if not self.special_ids.isdisjoint(ids):
            raise ValueError("a text turns into a control token of the tokenizer even when cut")
        return ids

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """A conversation that ends with an answer -> (ids, supervised), equally long.

        Supervised are the assistant's texts and the end token after each.
        """
        pieces = self._pieces(tuple(m["role"] for m in messages))
        ids, supervised = list(pieces[0]), [False] * len(pieces[0])
        for message, piece in zip(messages, pieces[1:]):
            text, learned = self.encode_text(message["content"]), message["role"] == "assistant"
            ids += [*text, *piece]
            supervised += [learned] * len(text) + [learned and i == 0 for i in range(len(piece))]
        return ids, supervised

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation that waits for its answer -> ids: exactly what precedes the answer in `encode`."""
        ids, _ = self.encode([*messages, {"role": "assistant", "content": ""}])
        return ids[:-1]

    def encode_example(self, example: Example) -> Row:
        """An example as a Row, with its options' first tokens where it is multiple choice."""
        try:
            ids, supervised = self.encode(example.messages)
        except ValueError as e:
            raise ValueError(f"{example.where}: {e}") from None
        choice, choices = multiple_choice(example.messages), None
        if choice:
            firsts = tuple(self.encode_text(f"{letter}:")[0] for letter in choice.letters)
            if len(set(firsts)) == len(firsts):  # else no single token tells the letters apart
                choices = (firsts, choice.letters.index(choice.correct))
        return Row(torch.tensor(ids, dtype=torch.int32), torch.tensor(supervised), example.where, choices)


@dataclass(frozen=True)
class Encoded:
    """The rows of one data set that fit, and how many did not."""

    name: str
    rows: list[Row]
    read: int

    @property
    def too_long(self) -> int:
        return self.read - len(self.rows)


def encode_all(name: str, examples: Iterable[Example], encoder: ChatEncoder, max_length: int) -> Encoded:
    """Encode examples and keep those of at most `max_length` tokens.

    Raises:
        ValueError: none fits.
    """
    rows = [encoder.encode_example(e) for e in examples]
    kept = [r for r in rows if len(r) <= max_length]
    if rows and not kept:
        raise ValueError(
            f"{name}: all {len(rows)} rows are too long; the shortest has {min(map(len, rows))} tokens, "
            f"--max-length is {max_length}"
        )
    return Encoded(name, kept, len(rows))


def table(parts: Sequence[Encoded]) -> str:
    """What was kept, what was dropped and why, a line a data set."""
    head = ("data", "rows", "kept", "too long", "tokens: mean", "max", "supervised: mean")
    lines = [head]
    for p in parts:
        lengths = [len(r) for r in p.rows] or [0]
        taught = sum(int(r.supervised.sum()) for r in p.rows) / max(1, len(p.rows))
        numbers = (p.read, len(p.rows), p.too_long, sum(lengths) / len(lengths), max(lengths))
        lines.append((p.name, *(f"{n:,.0f}" for n in numbers), f"{taught:.1f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    aligned = ([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))] for line in lines)
    return "\n".join("  ".join(line) for line in aligned)


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


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def collate(rows: Sequence[Row]) -> Batch:
    """Rows -> one right-padded batch. The padding's id is 0 and means nothing: no real token ever sees it."""
    lengths = torch.tensor([len(r) for r in rows])
    input_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)  # (B, T)
    supervised = torch.zeros_like(input_ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row.ids
        supervised[i, : len(row)] = row.supervised
    return Batch(input_ids, supervised, lengths)


def steps_per_epoch(n_rows: int, batch_size: int, grad_accum: int) -> int:
    """Optimizer steps in one pass, the last incomplete one included."""
    return math.ceil(n_rows / (batch_size * grad_accum))


def optimizer_steps(n_rows: int, batch_size: int, grad_accum: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """One epoch as optimizer steps, each a list of micro-batches, each a list of row indices.

    The order is a function of (seed, epoch) alone, so a resumed run needs to know only how many steps are behind it.
    """
    order = list(range(n_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    micro = [order[i : i + batch_size] for i in range(0, n_rows, batch_size)]
    return [micro[i : i + grad_accum] for i in range(0, len(micro), grad_accum)]
