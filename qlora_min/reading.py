"""Files and hub data sets -> examples, as streams; and what is wrong with the rows that can't be one.

    .jsonl .json .csv .parquet or the hub -> raw rows -> one of three layouts -> an Example, or a BadRow

A bad row is not the end: a run reads all of its data, counts the bad rows and shows the first 20, each in one line as
file:line:field, so that they can be corrected together; or leaves them out, if told to. No message holds a row's text,
which may be a patient's. What can't be read at all (no file, a folder, a pipe, a table without the columns of any
layout) is an error at once. At most one line of a file, or 256 rows of a table, are in memory at a time.
"""

import ast
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import re
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # comes with datasets

from . import report

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

LAYOUTS = "instruction/input/output, prompt/completion, or messages"
NEEDED = ({"messages"}, {"prompt", "completion"}, {"instruction", "output"})  # the columns that make each layout
COLUMNS = {"messages", "role", "content", "prompt", "completion", "instruction", "input", "output"}
ROLES = ("system", "user", "assistant")
FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")
SHOWN = 20  # bad rows that are shown; the rest is counted
MAX_LINE = 10_000_000  # bytes


@dataclass(frozen=True)
class Example:
    """One conversation that ends with an answer, and where it stands (for errors): "train.jsonl:12"."""

    messages: tuple[Message, ...]
    where: str

    @functools.cached_property
    def choice(self) -> "MultipleChoice | None":
        return multiple_choice(self.messages)

    @property
    def question(self) -> str:
        """What identifies the question: everything before the answer, without options, case and spacing.

        An answer that nothing precedes is its own question.
        """
        text = "\n".join(m["content"] for m in self.messages[:-1])
        text = text[: text.rindex(self.choice.literal)] if self.choice else text
        return " ".join((text.strip() or self.messages[-1]["content"]).casefold().split())

    @property
    def question_hash(self) -> int:
        """64 bits of the question's hash: among a million questions two share one with a chance of 3 in 10^8."""
        return int.from_bytes(hashlib.blake2b(self.question.encode("utf-8", "replace"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class MultipleChoice:
    """The options of a question: their letters, which is right, and the literal that lists them in the text."""

    letters: tuple[str, ...]
    correct: str
    literal: str

    @property
    def options(self) -> dict[str, Any]:
        """letter -> what it stands for"""
        return ast.literal_eval(_parsed(self.literal))


# ---------------------------------------------------------------------------------------------------------------------
# Bad rows
# ---------------------------------------------------------------------------------------------------------------------


class BadRow(ValueError):
    """A row that can't be used, in one line: where it stands, what is wrong, what was expected. Never its text."""


class BadData(ValueError):
    """The bad rows of all data sets. lines: the message, as `config.run_script` prints it."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


class BadRows:
    """Counts bad rows and keeps the first messages, over all data sets that share it.

    Args:
        skip: they are left out; otherwise `check` raises when all is read, so that the user sees them all at once.
    """

    def __init__(self, skip: bool = False):
        self.skip, self.count, self.messages = skip, 0, []

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.messages) < SHOWN:
            self.messages.append(" ".join(str(row).split()))

    @property
    def fatal(self) -> bool:
        return self.count > 0 and not self.skip

    def check(self, instead: str = "") -> None:
        """Raise BadData if there are any, and they are not skipped; `instead`: what else than correcting would help."""
        more = self.count - len(self.messages)
        total = f"... and {more:,} more bad rows" if more else f"{self.count} bad rows"
        if self.fatal and self.count == 1:
            raise BadData([f"{self.messages[0]}; correct it{instead}"])
        if self.fatal:
            raise BadData([*self.messages, f"{total}; correct them{instead}"])


# ---------------------------------------------------------------------------------------------------------------------
# Reading: a file or a hub id -> examples. A reader yields (row, where), with a BadRow for a row that it can't read.
# ---------------------------------------------------------------------------------------------------------------------


def read(source: str, limit: int | None = None, bad: BadRows | None = None) -> Iterator[Example]:
    """The examples of a local file (.jsonl, .json, .csv, .parquet) or of a data set on the hub, as a stream.

    Args:
        limit: read at most the first N rows.
        bad: takes the bad rows; without it, they are raised at the end.

    Raises:
        ValueError: at once: no such file, none that can be read (a folder, a pipe, a device), or of an unknown kind.
            While reading: an unreadable or empty file or data set, or a table without the columns of any layout.
        BadData: at the end, bad rows, if `bad` does not take them.
    """
    path = Path(source)
    kinds = "/".join(FILE_KINDS)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a NUL in the name
        found = None
    except OSError as e:
        raise ValueError(f"data set '{source}': can't be read ({e.strerror}); expected a {kinds} file") from None
    if found is None and (path.suffix in FILE_KINDS or source.count("/") != 1):
        raise ValueError(f"data set '{source}': no such file; expected a {kinds} file or a hub id like OWNER/NAME")
    if found and not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for its writer
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise ValueError(f"data set '{source}': {what}, expected a {kinds} file")
    if found and path.suffix not in FILE_KINDS:
        raise ValueError(f"{source}: unknown kind of file '{path.suffix}', expected one of {', '.join(FILE_KINDS)}")
    return _examples(source, _READERS[path.suffix](path) if found else _read_hub(source), limit, bad)


def _examples(source: str, raw: Iterator[tuple[Any, str]], limit: int | None, bad: BadRows | None) -> Iterator[Example]:
    mine, seen = bad or BadRows(), 0
    with contextlib.closing(raw):  # the file, and its bar
        try:
            for seen, (row, where) in enumerate(itertools.islice(raw, limit), 1):  # noqa: B007 (used below)
                try:
                    yield to_example(row, where)
                except BadRow as e:
                    mine.add(e)
        except OSError as e:
            raise ValueError(f"{source}: can't be read ({e.strerror or e})") from None
    if not seen:
        raise ValueError(f"{source}: no rows; expected at least one in a layout of {LAYOUTS}")
    if bad is None:
        mine.check()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a text file, without a byte-order mark at its beginning.

    Of a line longer than MAX_LINE, only so much that it is seen to be longer.
    """
    with path.open("rb") as file, report.bar(path.stat().st_size, path.name, "B") as bar:
        for number in itertools.count(1):
            line = part = file.readline(MAX_LINE + 2)
            if not line:
                return
            bar.update(len(line))
            while not part.endswith(b"\n") and (part := file.readline(2**20)):  # skip what is left of it
                bar.update(len(part))
            yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _decode(content: bytes) -> str:
    """Bytes as text; raises ValueError(reason, the index of the byte that is wrong)."""
    if b"\0" in content:
        reason = "NUL bytes, expected UTF-8 text; the file is damaged, or was saved as UTF-16"
        raise ValueError(reason, content.index(b"\0"))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as e:
        cut = e.reason == "unexpected end of data" and not content.endswith((b"\r", b"\n"))
        reason = "not UTF-8 text" + (", cut short in a character" if cut else "; save the file as UTF-8")
        raise ValueError(reason, e.start) from None


def _decode_line(line: bytes) -> str:
    """As `_decode`, for a line of `_lines`."""
    if len(line.rstrip(b"\r\n")) > MAX_LINE:
        raise ValueError(f"longer than {MAX_LINE // 10**6} MB; expected one row a line")
    return _decode(line)


class _Json:
    """json's decoder, which also finds what Python lets pass and JSON doesn't: NaN and Infinity, a name that stands
    twice in an object; and integers of a length that Python refuses. `odd`: the first that it found since it was
    cleared, as ":FIELD: what is wrong", or ": what is wrong" where the field is none of ours."""

    def __init__(self):
        self.odd = ""
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=lambda name: self._mark(f": {name}, which is not JSON; expected null or text"),
            parse_int=lambda n: int(n) if len(n) <= 4300 else self._mark(f": an integer of {len(n):,} digits"),
        )

    def _mark(self, what: str) -> "_Json":
        """Remember what is wrong; what this returns marks the value, so that its object can name the field."""
        self.odd = self.odd or what
        return self

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if self.odd.startswith(": "):
            self.odd = _field(k for k, v in pairs if v is self) + self.odd
        if len(row) < len(pairs):
            twice = (k for k, n in Counter(k for k, _ in pairs).items() if n > 1)
            self._mark(f"{_field(twice)}: the same name stands twice in an object")
        return row


def _field(names: Iterable[str]) -> str:
    """ ":NAME" of the first that is a column of ours; other names may be a row's text."""
    return next((f":{name}" for name in names if name in COLUMNS), "")


_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_BEGUN = "|".join(word[:n] for word in _WORDS for n in range(1, len(word) + 1))
_CUT = rf"Unterminated string|Invalid \\u[^;]*;.;.{{0,11}}$|[^;]*;.;({_BEGUN}|\.|[eE][-+]?)?$"
# What is wrong with a text that is not JSON: the first pattern that fits "MESSAGE;BEFORE;REST". MESSAGE is json's, with
# a brace if the text is an object; BEFORE is the last character before the place, and REST what follows.
_SYNTAX = {
    r"Illegal trailing comma|[^;]*;,;[}\]]": "a comma before a closing bracket; remove it",
    _CUT: "cut short, or a closing quote is missing",
    r"Extra data\{;.;\{": "more than one object; expected one a line, in a .jsonl file",
    r"Extra data": "text after the JSON",
    r"[^;]*;.;'": "single quotes; expected double quotes",
    r"[^;]*;.;(None|True|False)": "Python's None, True or False; expected null, true or false",
    r"[^;]*property name": "a name without double quotes",
    r"[^;]*':'": "a colon is missing after a name",
    r"[^;]*','": 'a comma is missing, or a quote inside a text is not written as \\"',
    r"[^;]*control character": "a control character, such as a tab, inside a text; write a tab as \\t",
    r"[^;]*escape": "a backslash that begins no escape; write a backslash as \\\\",
    r"": "a value is missing, or is not written as JSON",
}


def _syntax(e: json.JSONDecodeError | RecursionError) -> str:
    """What is wrong with a text that is not JSON, in a user's words, without quoting it."""
    if isinstance(e, RecursionError):
        return "nested too deeply"
    before, rest = e.doc[max(0, e.pos - 100) : e.pos].rstrip(), e.doc[e.pos : e.pos + 100].strip()
    found = f"{e.msg}{'{' * e.doc.lstrip().startswith('{')};{before[-1:]:1};{rest}"
    what = next(words for pattern, words in _SYNTAX.items() if re.match(pattern, found, re.DOTALL))
    return f"{what} (at character {e.colno:,})"


def _read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    parser = _Json()
    for number, line in _lines(path):
        where = f"{path}:{number}"
        if not line.strip() and len(line) <= MAX_LINE:
            continue
        parser.odd = ""
        try:
            row = parser.decoder.decode(_decode_line(line))
        except (json.JSONDecodeError, RecursionError) as e:
            row = BadRow(f"{where}: not a JSON object: {_syntax(e)}")
        except ValueError as e:
            row = BadRow(f"{where}: {e.args[0]}")
        yield BadRow(where + parser.odd) if parser.odd else row, where


def _read_json(path: Path) -> Iterator[tuple[Any, str]]:
    """A file that is one list, whose text is held in memory whole; larger data belong into the other kinds."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = _decode(content)
    except ValueError as e:
        reason, at = e.args
        raise ValueError(f"{path}:{content[:at].count(10) + 1}: {reason}") from None
    del content

    def skip(at: int) -> int:
        return space.match(text, at).end()

    parser, space = _Json(), re.compile(r"[ \t\r\n]*")
    at, number = skip(0), 0
    if text and not text.startswith("[", at):
        raise ValueError(f"{path}: expected a list of objects, in [ ]; a file of one object a line is called .jsonl")
    if text.startswith("]", end := skip(at + 1)):
        at = end  # no rows
    try:
        with report.bar(len(text), path.name, "B") as bar:
            while text.startswith(("[", ","), at):
                parser.odd, number = "", number + 1
                where, start = f"{path}:row {number}", skip(at + 1)
                row, end = parser.decoder.raw_decode(text, start)
                at = skip(end)
                if not text.startswith((",", "]"), at):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
                bar.update(at - start)
                yield BadRow(where + parser.odd) if parser.odd else row, where
        if (end := skip(at + 1)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path}:{getattr(e, 'lineno', f'row {number}')}: not JSON: {_syntax(e)}") from None


def _read_csv(path: Path) -> Iterator[tuple[Any, str]]:
    broken: list[str] = []  # what is wrong with the lines that the csv module has taken for the row it is reading

    def lines() -> Iterator[str]:
        for _, line in _lines(path):
            try:
                yield _decode_line(line)
            except ValueError as e:
                broken.append(e.args[0])
                yield line.decode("utf-8", "replace") if len(line) <= MAX_LINE else "\n"  # its quotes still count

    csv.field_size_limit(MAX_LINE)
    reader, header = csv.reader(lines(), strict=True), None
    while True:
        where = f"{path}:{reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            hint = ": a quote is never closed" if "end of data" in str(e) else ""
            fields = BadRow(f"{where}: broken CSV ({e}{hint})")
        if broken:
            fields = BadRow(f"{where}: {broken[0]}")
            broken.clear()
        if not fields:  # an empty line
            continue
        if isinstance(fields, BadRow):
            if header is None:
                raise fields
            yield fields, where
        elif header is None:  # only names that we know are shown: without a header, this is a row's text
            header = _check_columns(fields, where, COLUMNS.__contains__)
        elif len(fields) > len(header):
            yield BadRow(f"{where}: more fields than the header names"), where
        else:
            yield dict(itertools.zip_longest(header, fields, fillvalue="")), where


def _read_parquet(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            columns = _columns_of(file.schema_arrow.names, str(path))
            batches = file.iter_batches(batch_size=256, columns=columns)
            rows = itertools.chain.from_iterable(map(_batch_rows, batches))
            yield from _numbered(rows, str(path), file.metadata.num_rows, path.name)
    except (pa.ArrowException, OSError):
        raise ValueError(f"{path}: not a readable Parquet file (damaged, cut short, or of another kind)") from None


def _numbered(rows: Iterable[Any], name: str, total: int, label: str) -> Iterator[tuple[Any, str]]:
    """The rows of a table, with their places."""
    with report.bar(total, label, "row") as bar:
        for number, row in enumerate(rows, 1):
            bar.update()
            where = f"{name}:row {number}"
            yield BadRow(f"{where}: {row}") if isinstance(row, ValueError) else row, where


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows as Python objects; a ValueError for one that has none, such as text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as e:
        if len(batch) == 1:
            text = isinstance(e, UnicodeDecodeError)
            yield ValueError("not UTF-8 text" if text else "a value that can't be read, expected text")
        else:
            yield from itertools.chain.from_iterable(_batch_rows(batch.slice(i, 1)) for i in range(len(batch)))


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
    rows = data.select_columns(_columns_of(data.column_names, name))
    yield from _numbered(rows, name, len(data), name)


def _check_columns(
    columns: Sequence[str], where: str, may_show: Callable[[str], bool] = str.isidentifier
) -> Sequence[str]:
    """The columns, if they make one of the layouts.

    Raises:
        ValueError: they don't. Names are shown, and nothing else: a key may be a row's text.
    """
    if not any(layout <= set(columns) for layout in NEEDED):
        shown = ", ".join(repr(c) if may_show(str(c)) else "..." for c in itertools.islice(columns, 20)) or "none"
        raise BadRow(f"{where}: unknown layout with columns {shown[:200]}; expected {LAYOUTS}")
    return columns


def _columns_of(names: Sequence[str], where: str) -> list[str]:
    """Those columns of a table that are read; raises ValueError where they make no layout."""
    return [c for c in _check_columns(names, where) if c in COLUMNS]


def to_example(row: Any, where: str) -> Example:
    """A row of any of the three layouts, recognised by its columns, as messages.

    Raises:
        BadRow: unknown or missing columns, a field that is no text, or no answer; the message begins with `where`.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"{where}: {_kind(row)}, expected an object with columns {LAYOUTS}")
    if "messages" in row:
        return Example(_checked_messages(row["messages"], f"{where}:messages"), where)
    if not any(layout <= row.keys() for layout in NEEDED):
        for layout in NEEDED:
            if layout & row.keys():
                missing = ", ".join(layout - row.keys())
                raise BadRow(f"{where}:{missing}: missing, expected text; a row has {LAYOUTS}")
        _check_columns(list(row), where)
    if {"prompt", "completion"} <= row.keys():
        user, answer = _text(row, "prompt", where), _text(row, "completion", where)
    else:
        given = _text(row, "input", where, may_be_empty=True) if row.get("input") is not None else ""
        user = _text(row, "instruction", where, may_be_empty=bool(given.strip()))
        user = "\n\n".join(part for part in (user, given) if part.strip())
        answer = _text(row, "output", where)
    return Example(({"role": "user", "content": user}, {"role": "assistant", "content": answer}), where)


def _kind(value: Any) -> str:
    """A value's type in JSON's words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _text(row: dict, field: str, where: str, may_be_empty: bool = False) -> str:
    value = row.get(field, ...)
    place = f"{where}{'.' if where.endswith(']') else ':'}{field}"
    if not isinstance(value, str):
        raise BadRow(f"{place}: {'missing' if value is ... else _kind(value)}, expected text")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"{place}: {'nothing but whitespace' if value else 'empty'}, expected text")
    if re.search(r"[\ud800-\udfff]", value):
        raise BadRow(f"{place}: half a surrogate pair, expected text in Unicode")
    return value


def _checked_messages(messages: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages:
        what = "empty" if messages == [] else _kind(messages)
        raise BadRow(f"{where}: {what}, expected a list of objects with role and content")
    for i, m in enumerate(messages):
        if not isinstance(m, dict):
            raise BadRow(f"{where}[{i}]: {_kind(m)}, expected an object with role and content")
        if m.get("role") not in ROLES:
            what = "unknown role" if "role" in m else "missing"
            raise BadRow(f"{where}[{i}].role: {what}, expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        _text(m, "content", f"{where}[{i}]", may_be_empty=m["role"] == "system")
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow(f"{where}: no answer; expected the assistant's as the last message")
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{where}: the assistant's answer is not the last message")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _parsed(text: str) -> Any:
    """A Python expression, without a warning of a backslash that is no escape, which would show the text."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text, mode="eval").body


def multiple_choice(messages: Sequence[Message]) -> MultipleChoice | None:
    """The options of a question written as MedQA's are (text with {'A': '...'}, answer "B: ..."), or None."""
    answer = re.match(r"([A-Z])\b", messages[-1]["content"])
    literal = re.search(r"\{\s*'[A-Z]'\s*:.*\}", messages[-2]["content"], re.DOTALL) if len(messages) > 1 else None
    if not answer or not literal:
        return None
    try:
        options = ast.literal_eval(_parsed(literal[0]))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(options, dict) or answer[1] not in options or not all(isinstance(k, str) for k in options):
        return None
    return MultipleChoice(tuple(options), answer[1], literal[0])


# Options that speak of others, or of their own place, mean something else in another order.
_REFERS = re.compile(
    r"(?i)\b(above|below|foregoing|preceding|following|both|neither)\b"
    r"|\b(only|options?|choices?|statements?) [a-z]\b|\b[a-z] ?(,|&|\+|and|or|nor) ?[a-z]\b"
)


def permute_options(example: Example, order: Sequence[int]) -> Example | None:
    """The same question with its options in another order; what is written around them stays as it is.

    Args:
        order: letter i gets the option that letter order[i] had, a permutation; the answer's letter follows.

    Returns:
        None where the meaning could change: an option names others ("A and C", "all of the above"), or the answer
        says more than a letter and its option, such as an explanation that names letters.
    """
    choice = example.choice
    if choice is None:
        return None
    *before, user, assistant = example.messages
    source, nodes = choice.literal.encode("utf-8"), _parsed(choice.literal).values
    texts = [n.value if isinstance(n, ast.Constant) else None for n in nodes]
    right = choice.letters.index(choice.correct)
    if len(nodes) != len(choice.letters) or not all(isinstance(t, str) and not _REFERS.search(t) for t in texts):
        return None
    said, mark = assistant["content"], re.match(r"[\s:.)]*", assistant["content"][1:])[0]
    if " ".join(said[1 + len(mark) :].split()) not in ("", " ".join(texts[right].split())):
        return None
    lines = [0, *(m.end() for m in re.finditer(rb"\r\n?|\n", source))]  # ast counts bytes of a line
    spans = [(lines[n.lineno - 1] + n.col_offset, lines[n.end_lineno - 1] + n.end_col_offset) for n in nodes]
    new, end = b"", 0
    for i, (start, stop) in enumerate(spans):
        new, end = new + source[end:start] + source[slice(*spans[order[i]])], stop
    content = (new + source[end:]).decode("utf-8").join(user["content"].rsplit(choice.literal, 1))
    answer = choice.letters[list(order).index(right)] + said[1:]
    return Example((*before, {**user, "content": content}, {**assistant, "content": answer}), example.where)
