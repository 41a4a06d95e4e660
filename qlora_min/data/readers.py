"""Files and hub data sets -> examples, as streams, with an error for each row that can't be read.

    .jsonl .json .csv .parquet or the hub -> raw rows -> one of three layouts -> an Example, or a BadRow

A bad row does not end the run at once: all data is read, bad rows are counted and the first 20 are shown, one a line as
file:line:field, so that they can be corrected together; or they are left out (--skip-bad-rows). No message contains
text of a row, which may be confidential. A source that can't be read at all (no file, a folder, a pipe, a table without
the columns of any layout) is an error at once. At most one line of a file, or 256 rows of a table, are in memory at a
time; a .json file is read whole.
"""

import contextlib
import csv
import hashlib
import itertools
import json
import re
import stat
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # comes with datasets

from ..system import console
from .examples import COLUMNS, LAYOUTS, BadRow, BadRows, Example, check_columns, to_example

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet")
MAX_LINE = 10_000_000  # bytes
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GIVEN: dict[str, list[Any]] = {}  # rows that were given from Python, by the name that `give` made
Raw = Iterator[tuple[Any, str]]  # (row, or a BadRow for one that can't be read; its location)


def give(rows: Iterable[Any]) -> str:
    """Rows in memory as a data set, as long as this process lives; returns its name, made from their hash."""
    rows = [dict(row) if isinstance(row, Mapping) else row for row in rows]
    name = "rows-" + hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]
    GIVEN[name] = rows
    return name


def read(source: str, limit: int | None = None, bad: BadRows | None = None) -> Iterator[Example]:
    """The examples of a local file (.jsonl, .json, .csv, .parquet), a hub data set or rows in memory (`give`), as a
    stream.

    Args:
        limit: read at most the first N rows.
        bad: collects the bad rows; without it, they are raised at the end.

    Raises:
        ValueError: at once: no such file, not a file (a folder, a pipe, a device), or of an unknown kind. While
            reading: an unreadable or empty file or data set, or a table without the columns of any layout.
        BadData: at the end, bad rows, if `bad` is not given.
    """
    if source in GIVEN:
        return _examples(source, _numbered(GIVEN[source], source, len(GIVEN[source]), "rows"), limit, bad)
    if re.fullmatch("rows-[0-9a-f]{16}", source):
        raise ValueError(f"data set '{source}': rows that were given from Python; give the same again as `dataset`")
    path, kinds = Path(source), "/".join(FILE_KINDS)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        if path.suffix in FILE_KINDS or source.count("/") != 1:
            expected = f"expected a {kinds} file or a hub id like OWNER/NAME"
            raise ValueError(f"data set '{source}': no such file; {expected}") from None
        return _examples(source, _read_hub(source), limit, bad)
    except OSError as e:
        raise ValueError(f"data set '{source}': can't be read ({e.strerror}); expected a {kinds} file") from None
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise ValueError(f"data set '{source}': {what}, expected a {kinds} file")
    if path.suffix not in FILE_KINDS:
        raise ValueError(f"{source}: unknown kind of file '{path.suffix}', expected one of {', '.join(FILE_KINDS)}")
    return _examples(source, _READERS[path.suffix](path), limit, bad)


def _examples(source: str, raw: Raw, limit: int | None, bad: BadRows | None) -> Iterator[Example]:
    """Convert raw rows to examples, and count those that are bad."""
    mine, seen = bad or BadRows(), 0
    with contextlib.closing(raw):  # closes the file and its progress bar
        try:
            for seen, (row, location) in enumerate(itertools.islice(raw, limit), 1):  # noqa: B007 (used below)
                try:
                    yield to_example(row, location)
                except BadRow as e:
                    mine.add(e)
        except OSError as e:
            raise ValueError(f"{source}: can't be read ({e.strerror or e})") from None
    if not seen:
        raise ValueError(f"{source}: no rows; expected at least one in a layout of {LAYOUTS}")
    if bad is None:
        mine.check()


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, text, error) of each line of a file, without the byte-order mark. error: "" if there is none.

    Text that is not UTF-8 has replacement characters; of a line longer than MAX_LINE, the text is empty.
    """
    with path.open("rb") as file, console.bar(path.stat().st_size, path.name, "B") as bar:
        for number in itertools.count(1):
            line = part = file.readline(MAX_LINE + 2)
            if not line:
                return
            bar.update(len(line))
            while not part.endswith(b"\n") and (part := file.readline(2**20)):  # skip the rest of a long line
                bar.update(len(part))
            line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if len(line.rstrip(b"\r\n")) > MAX_LINE:
                yield number, "\n", f"longer than {MAX_LINE // 10**6} MB; expected one row a line"
            else:
                yield number, *_decode(line)[:2]


def _decode(content: bytes) -> tuple[str, str, int]:
    """(text, error, index of the byte that is wrong) of bytes in UTF-8; error: "" if there is none."""
    try:
        text, error, index = content.decode("utf-8"), "", 0
    except UnicodeDecodeError as e:
        cut = e.reason == "unexpected end of data" and not content.endswith((b"\r", b"\n"))
        error = "not UTF-8 text" + (", cut short in a character" if cut else "; save the file as UTF-8")
        text, index = content.decode("utf-8", "replace"), e.start
    if b"\0" in content:
        error, index = "NUL bytes, expected UTF-8 text; the file is damaged, or was saved as UTF-16", content.index(0)
    return text, error, index


class _Json:
    """A JSON decoder that also finds errors that Python's accepts: NaN and Infinity, the same name twice in an object,
    and integers of more digits than Python converts.

    odd: the first such error of the row that is being decoded, as ":FIELD: error", or ": error" if the field is not one
    of the layouts'; "" if there is none.
    """

    def __init__(self):
        self.odd = ""
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=lambda name: self._mark(f": {name}, which is not JSON; expected null or text"),
            parse_int=lambda n: int(n) if len(n) <= 4300 else self._mark(f": an integer of {len(n):,} digits"),
        )

    def _mark(self, what: str) -> "_Json":
        """Store an error. The value is replaced by this decoder itself, from which `_object` tells the field."""
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

    def check(self, row: Any, location: str) -> Any:
        """The decoded row, or a BadRow if an error was found in it; ready for the next row."""
        odd, self.odd = self.odd, ""
        return BadRow(location + odd) if odd else row


def _field(names: Iterable[str]) -> str:
    """ ":NAME" of the first name that is a column of a layout; other names could be a row's text."""
    return next((f":{name}" for name in names if name in COLUMNS), "")


_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_BEGUN = "|".join(word[:n] for word in _WORDS for n in range(1, len(word) + 1))
_CUT = rf"Unterminated string|Invalid \\u[^;]*;.;.{{0,11}}$|[^;]*;.;({_BEGUN}|\.|[eE][-+]?)?$"
# Pattern -> description of an error in JSON; the first pattern that matches "MESSAGE;BEFORE;REST" is used. MESSAGE is
# that of Python's json, followed by "{" if the text is an object; BEFORE is the last character before the position of
# the error, and REST is the text from there on.
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
    """A description of an error in JSON, without any of the text."""
    if isinstance(e, RecursionError):
        return "nested too deeply"
    before, rest = e.doc[max(0, e.pos - 100) : e.pos].rstrip(), e.doc[e.pos : e.pos + 100].strip()
    found = f"{e.msg}{'{' * e.doc.lstrip().startswith('{')};{before[-1:]:1};{rest}"
    what = next(words for pattern, words in _SYNTAX.items() if re.match(pattern, found, re.DOTALL))
    return f"{what} (at character {e.colno:,})"


def _read_jsonl(path: Path) -> Raw:
    parser = _Json()
    for number, text, error in _lines(path):
        location = f"{path}:{number}"
        if error:
            yield BadRow(f"{location}: {error}"), location
        elif text.strip(string.whitespace):
            try:
                row = parser.decoder.decode(text)
            except (json.JSONDecodeError, RecursionError) as e:
                row = BadRow(f"{location}: not a JSON object: {_syntax(e)}")
            yield parser.check(row, location), location


def _read_json(path: Path) -> Raw:
    """A file that is one list. Its text is held in memory; larger data should be in one of the other formats."""
    content = path.read_bytes().removeprefix(BYTE_ORDER_MARK)
    text, error, index = _decode(content)
    if error:
        raise ValueError(f"{path}:{content[:index].count(10) + 1}: {error}")
    del content

    parser, number = _Json(), 0
    separator = re.compile(r"[ \t\r\n]*([\[,\]]?)[ \t\r\n]*")
    found = separator.match(text)
    if text and found[1] != "[":
        raise ValueError(f"{path}: expected a list of objects, in [ ]; a file of one object a line is called .jsonl")
    if text.startswith("]", found.end()):  # no rows
        found = separator.match(text, found.end())
    try:
        with console.bar(len(text), path.name, "B") as bar:
            while found[1] in ("[", ","):
                number += 1
                location = f"{path}:row {number}"
                row, end = parser.decoder.raw_decode(text, found.end())
                found = separator.match(text, end)
                if found[1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, found.start(1))
                bar.update(found.end() - bar.n)
                yield parser.check(row, location), location
        if found.end() < len(text):
            raise json.JSONDecodeError("Extra data", text, found.end())
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path}:{getattr(e, 'lineno', f'row {number}')}: not JSON: {_syntax(e)}") from None


def _read_csv(path: Path) -> Raw:
    rows = _csv_fields(path)
    for header, location in itertools.islice(rows, 1):
        if isinstance(header, BadRow):
            raise header
        # In a file without a header this is a row, of which no text may be shown.
        check_columns(header, location, COLUMNS.__contains__)
    for fields, location in rows:
        if isinstance(fields, list) and len(fields) > len(header):
            fields = BadRow(f"{location}: more fields than the header names")
        row = fields if isinstance(fields, BadRow) else dict(itertools.zip_longest(header, fields, fillvalue=""))
        yield row, location


def _csv_fields(path: Path) -> Iterator[tuple[list[str] | BadRow, str]]:
    """(fields, location) of each row that is not empty; a BadRow for one that can't be read."""
    errors: list[str] = []  # of the lines of the row that is being read

    def lines() -> Iterator[str]:
        for _, text, error in _lines(path):
            errors.extend([error] if error else [])
            yield text  # also of a line with an error: its quotes count

    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(lines(), strict=True)
    while True:
        location = f"{path}:{reader.line_num + 1}"
        errors.clear()
        try:
            fields = next(reader, None)
        except csv.Error as e:
            hint = ": a quote is never closed" if "end of data" in str(e) else ""
            fields = BadRow(f"{location}: broken CSV ({e}{hint})")
        if fields is None:
            return
        if errors:
            fields = BadRow(f"{location}: {errors[0]}")
        if fields:
            yield fields, location


def _read_parquet(path: Path) -> Raw:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            batches = file.iter_batches(batch_size=256, columns=_columns_of(file.schema_arrow.names, str(path)))
            rows = itertools.chain.from_iterable(map(_batch_rows, batches))
            yield from _numbered(rows, str(path), file.metadata.num_rows, path.name)
    except (pa.ArrowException, OSError):
        raise ValueError(f"{path}: not a readable Parquet file (damaged, cut short, or of another kind)") from None


def _numbered(rows: Iterable[Any], name: str, total: int, label: str) -> Raw:
    """The rows of a table, with their locations. A ValueError among them becomes a BadRow."""
    with console.bar(total, label, "row") as bar:
        for number, row in enumerate(rows, 1):
            bar.update()
            location = f"{name}:row {number}"
            yield BadRow(f"{location}: {row}") if isinstance(row, ValueError) else row, location


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows as Python objects; a ValueError for one that can't be converted, such as text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError, pa.ArrowException) as e:
        if len(batch) == 1:
            text = isinstance(e, UnicodeDecodeError)
            yield ValueError("not UTF-8 text" if text else "a value that can't be read, expected text")
        else:
            yield from itertools.chain.from_iterable(_batch_rows(batch.slice(i, 1)) for i in range(len(batch)))


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_hub(name: str) -> Raw:
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


def _columns_of(names: Sequence[str], location: str) -> list[str]:
    """The columns of a table that are read. Raises BadRow if they form no layout."""
    check_columns(names, location)
    return [name for name in names if name in COLUMNS]
