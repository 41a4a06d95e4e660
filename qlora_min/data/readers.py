"""Files, folders of files and hub data sets -> examples, as streams, with an error for each row that can't be read.

    .jsonl .json .csv .tsv .parquet, each also .gz, or the hub -> raw rows -> a layout -> an Example, or a BadRow

A bad row does not end the run at once: all data is read, bad rows are counted and the first 20 are shown, one a line as
file:line:field, so that they can be corrected together; or they are left out (--skip-bad-rows). No message contains
text of a row, which may be confidential. A source that can't be read at all (no file, a pipe, a table without the
columns of any layout) is an error at once. At most one line of a file, or 256 rows of a table, are in memory at a time;
JSON that is not one row a line is read whole.
"""

import contextlib
import csv
import glob
import gzip
import hashlib
import itertools
import json
import re
import stat
import string
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa  # comes with datasets

from ..system import console
from ..system.text import first_line, refusing
from .examples import BadRow, BadRows, Example
from .layouts import EXPECTED, NAMES, Columns, parse_columns, to_example

FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
MAX_LINE = 10_000_000  # bytes
HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<config>[^:]*))?(:(?P<split>.+))?", re.ASCII
)
SEPARATORS = ",;\t|"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
GIVEN: dict[str, list[Any]] = {}  # rows that were given from Python, by the name that `give` made
COMMITS: dict[str, str] = {}  # of data sets on the hub, by source: those that were read, or are to be read (`pin`)
Raw = Iterator[tuple[Any, str]]  # (row, or a BadRow for one that can't be read; its location)


def give(rows: Iterable[Any]) -> str:
    """Rows in memory as a data set, as long as this process lives; returns its name, made from their hash."""
    rows = [{str(k): v for k, v in row.items()} if isinstance(row, Mapping) else row for row in rows]
    name = "rows-" + hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()[:16]
    GIVEN[name] = rows
    return name


def pin(commits: Mapping[str, str]) -> None:
    """From now on read these data sets of the hub at these commits, and others as they are named."""
    COMMITS.clear()
    COMMITS.update(commits)


def read(
    source: str, limit: int | None = None, bad: BadRows | None = None, columns: Sequence[str] = ()
) -> Iterator[Example]:
    """The examples of a data set, as a stream.

    Args:
        source: a file (of FILE_KINDS, also .gz), a folder of files or a pattern such as "data/*.jsonl", read in order
            of their names; what `datasets` saved to disk; a data set on the hub; or rows in memory (`give`). A hub's is
            NAME[@REVISION][:CONFIG[:SPLIT]], a saved one FOLDER[::SPLIT]; the split is train by default.
        limit: read at most the first N rows.
        bad: collects the bad rows; without it, they are raised at the end.
        columns: "FIELD=COLUMN", for columns that are not recognised by their names.

    Raises:
        ValueError: at once: no such file, not a file (a pipe, a device), or of an unknown kind. While reading: an
            unreadable or empty file or data set, or a table without the columns of any layout.
        BadData: at the end, bad rows, if `bad` is not given.
    """
    found = Columns(parse_columns(columns))
    if source in GIVEN:
        raw = _numbered(GIVEN[source], source, len(GIVEN[source]), "rows")
    elif re.fullmatch("rows-[0-9a-f]{16}", source):
        raise ValueError(f"data set '{source}': rows that were given from Python; give the same again as `dataset`")
    else:
        raw = _open(source, found)
    return _examples(source, raw, limit, bad, found)


def _open(source: str, columns: Columns) -> Raw:
    """The raw rows of a path that exists, or else of what the name says."""
    path, kinds = Path(source), "/".join(FILE_KINDS)
    with refusing(f"data set '{source}': can't be read", f"expected a {kinds} file", OSError):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
            return _open_name(source, columns)
        inside = [p for p in path.iterdir() if p.name[0] != "."] if stat.S_ISDIR(mode) else []
    if stat.S_ISDIR(mode):
        return _read_saved(source, path, "", columns) if _is_saved(path) else _read_files(source, inside, columns)
    if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer
        raise ValueError(f"data set '{source}': a pipe, socket or device, expected a {kinds} file")
    if kind_of(path) is None:
        expected = f"expected one of {', '.join(FILE_KINDS)}, or these with .gz"
        raise ValueError(f"{source}: unknown kind of file '{path.suffix}', {expected}")
    return _read_files(source, [path], columns)


def _open_name(source: str, columns: Columns) -> Raw:
    """The raw rows of a pattern of files, a split of what is on disk, or a data set on the hub."""
    folder, _, split = source.partition("::")
    if _is_saved(Path(folder)):
        return _read_saved(source, Path(folder), split, columns)
    if glob.has_magic(source) and (found := glob.glob(source, recursive=True)):
        return _read_files(source, map(Path, found), columns)
    if (hub := HUB_NAME.fullmatch(source)) and kind_of(hub["name"]) is None:
        return _read_hub(source, hub.groupdict(), columns)
    expected = f"expected a {'/'.join(FILE_KINDS)} file or a hub id like OWNER/NAME"
    raise ValueError(f"data set '{source}': no such file; {expected}")


def kind_of(path: str | Path) -> str | None:
    """Which of FILE_KINDS a file is, by its name; None if it is none."""
    kind = Path(Path(path).name.lower().removesuffix(".gz")).suffix
    return kind if kind in FILE_KINDS else None


def _read_files(source: str, paths: Iterable[Path], columns: Columns) -> Raw:
    """The raw rows of files, in order of their names. Files of other kinds are named."""
    files = [p for p in sorted(paths) if p.is_file()]
    others = [p.name for p in files if kind_of(p) is None]
    if len(others) == len(files):
        raise ValueError(f"data set '{source}': no data in it, expected a {'/'.join(FILE_KINDS)} file")
    if others:
        console.say(f"note: {source}: files not used: {', '.join(others[:20])}")
    return (row for p in files if (kind := kind_of(p)) for row in _READERS[kind](p, columns))


def _examples(source: str, raw: Raw, limit: int | None, bad: BadRows | None, columns: Columns) -> Iterator[Example]:
    """Convert raw rows to examples, and count those that are bad."""
    mine, seen = bad or BadRows(), 0
    with contextlib.closing(raw), refusing(f"{source}: can't be read", errors=OSError):  # closes the file and its bar
        try:
            for seen, (row, location) in enumerate(itertools.islice(raw, limit), 1):  # noqa: B007 (used below)
                try:
                    yield to_example(row, location, columns)
                except BadRow as e:
                    mine.add(e, location)
                except RecursionError:
                    mine.add(BadRow(f"{location}: nested too deeply"), location)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise ValueError(f"{source}: not a readable .gz file (damaged, cut short, or of another kind)") from None
    if not seen:
        raise ValueError(f"{source}: no rows; expected at least one in a layout of {EXPECTED}")
    columns.check(source)
    if columns.unused:
        more = len(columns.unused) - 50
        shown = ", ".join(list(columns.unused)[:50]) + (f" and {more} more" if more > 0 else "")
        console.say(f"note: {source}: columns not used: {shown}")
    if bad is None:
        mine.check()


def _opened(path: Path) -> BinaryIO:
    """A file, decompressed if its name ends with .gz."""
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line number, text, error) of each line of a file, without the byte-order mark. error: "" if there is none.

    Text that is not UTF-8 has replacement characters; of a line longer than MAX_LINE, the text is empty.
    """
    size = None if path.suffix.lower() == ".gz" else path.stat().st_size
    with _opened(path) as file, console.bar(size, path.name, "B") as bar:
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
        """Store an error. Returns this decoder in place of the value, so that `_object` can find the value's field."""
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
    return next((f":{name}" for name in names if name in NAMES), "")


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


def _read_json(path: Path, columns: Columns) -> Raw:
    """One row a line, whatever the file is called; or a list, or objects over several lines."""
    rows = _read_whole(path) if _is_whole(path) else _read_lines(path)
    first = list(itertools.islice(rows, 2))
    row = first[0][0] if len(first) == 1 else None
    if isinstance(row, dict) and not columns.fits(row):  # {"version": ..., "data": [rows]}
        lists = [value for value in row.values() if isinstance(value, list)]
        if len(lists) == 1:
            first = [(row, f"{path}:row {number}") for number, row in enumerate(lists[0], 1)]
    yield from first
    yield from rows


def _is_whole(path: Path) -> bool:
    """Whether a file's JSON does not stand one row a line, by its first line: a list, or an object that goes on."""
    with _opened(path) as file:
        line = file.readline(MAX_LINE).removeprefix(BYTE_ORDER_MARK)
        while line and not line.strip():
            line = file.readline(MAX_LINE)
        after = file.readline(MAX_LINE).strip()
    first, last = line.strip()[:1], line.strip()[-1:]
    if first == b"[":
        return kind_of(path) == ".json" or not (after and last == b"]")
    goes_on = last in b"{[" or (last == b"," and not after.startswith(b"{"))
    return first == b"{" and bool(after) and (goes_on if len(line) < MAX_LINE else kind_of(path) == ".json")


def _read_lines(path: Path) -> Raw:
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


def _read_whole(path: Path) -> Raw:
    """One list, or objects one after the other. The text is held in memory; larger data should be one row a line."""
    with _opened(path) as file:
        content = file.read().removeprefix(BYTE_ORDER_MARK)
    text, error, index = _decode(content)
    if error:
        raise ValueError(f"{path}:{content[:index].count(10) + 1}: {error}")
    del content

    parser, number = _Json(), 0
    separator = re.compile(r"[ \t\r\n]*([\[,\]]?)[ \t\r\n]*")
    found = separator.match(text)
    between, last = ((",",), "]") if found[1] else (("", ","), "")  # what may follow a row, and what follows the last
    if found[1] and text.startswith("]", found.end()):  # no rows
        found = separator.match(text, found.end())
    try:
        with console.bar(len(text), path.name, "B") as bar:
            while found[1] in ("[", *between) and (last or found.end() < len(text)):
                number += 1
                location = f"{path}:row {number}"
                row, end = parser.decoder.raw_decode(text, found.end())
                found = separator.match(text, end)
                if found[1] not in (*between, last):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, found.start(1))
                bar.update(found.end() - bar.n)
                yield parser.check(row, location), location
        if found.end() < len(text):
            raise json.JSONDecodeError("Extra data", text, found.end())
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{path}:{getattr(e, 'lineno', f'row {number}')}: not JSON: {_syntax(e)}") from None


def _read_csv(path: Path, columns: Columns) -> Raw:
    csv.field_size_limit(MAX_LINE)
    separator, blanks = _separator(path, columns)
    rows = _csv_fields(path, separator, blanks)
    for header, location in itertools.islice(rows, 1):
        if isinstance(header, BadRow):
            raise header
        columns.find(header, location)  # in a file without a header this is a row, and no layout
    for fields, location in rows:
        if isinstance(fields, list) and len(fields) > len(header):
            fields = BadRow(f"{location}: more fields than the header names")
        row = fields if isinstance(fields, BadRow) else dict(itertools.zip_longest(header, fields, fillvalue=""))
        yield row, location


def _separator(path: Path, columns: Columns) -> tuple[str, bool]:
    """(the separator of a table's fields, whether blanks follow it), by the header: a first line "sep=;" names it;
    else it is the one with which the header is a layout, or that divides it into the most fields."""
    for _, text, _ in _lines(path):
        if named := _SEPARATOR_LINE.fullmatch(text):
            return named[1], False
        if text.strip():
            headers = {s: _fields(text, s) for s in SEPARATORS}
            found = max(headers, key=lambda s: (columns.fits(headers[s]), len(headers[s])))
            return found, len(headers[found]) > 1 and all(name[:1] == " " for name in headers[found][1:])
    return ",", False


def _fields(text: str, separator: str) -> list[str]:
    with contextlib.suppress(csv.Error):
        return next(csv.reader([text], delimiter=separator))
    return [text]


_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')  # of spreadsheets


def _csv_fields(path: Path, separator: str, blanks: bool) -> Iterator[tuple[list[str] | BadRow, str]]:
    """(fields, location) of each row that is not empty; a BadRow for one that can't be read."""
    errors: list[str] = []  # of the lines of the row that is being read

    def lines() -> Iterator[str]:
        for number, text, error in _lines(path):
            errors.extend([error] if error else [])
            named = number == 1 and _SEPARATOR_LINE.fullmatch(text)
            yield "\n" if named else text  # also of a line with an error: its quotes count

    reader = csv.reader(lines(), delimiter=separator, skipinitialspace=blanks, strict=True)
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


def _read_parquet(path: Path, columns: Columns) -> Raw:
    import pyarrow.parquet as pq

    try:
        with _opened(path) as source, pq.ParquetFile(source, pre_buffer=False) as file:
            used = list(columns.find(file.schema_arrow.names, str(path)).values())
            rows = itertools.chain.from_iterable(map(_batch_rows, file.iter_batches(batch_size=256, columns=used)))
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


_READERS = {".jsonl": _read_json, ".json": _read_json, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}


def _is_saved(path: Path) -> bool:
    """Whether a folder is what `datasets` writes with `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _read_saved(source: str, folder: Path, split: str, columns: Columns) -> Raw:
    import datasets

    with refusing(f"data set '{source}': can't be loaded"):
        data = datasets.load_from_disk(folder)
    if isinstance(data, datasets.DatasetDict):
        if (split or "train") not in data:
            raise ValueError(f"data set '{source}': {_one_of('split', list(data), f'{folder}::')}")
        data = data[split or "train"]
    elif split:
        raise ValueError(f"data set '{source}': a single split; name it without ::{split}")
    yield from _read_table(source, data, columns)


def _read_hub(source: str, hub: Mapping[str, str | None], columns: Columns) -> Raw:
    import datasets
    from huggingface_hub import utils

    revision = COMMITS.get(source) or hub["revision"]
    given = {"split": hub["split"] or "train"} | ({"revision": revision} if revision else {})
    for library in (datasets, utils):  # show the bars where ours are; transformers switches the hub's off with its own
        with warnings.catch_warnings(action="ignore"):  # "the environment variable goes before"
            (library.enable_progress_bars if console.shows_bars() else library.disable_progress_bars)()
    try:
        data = datasets.load_dataset(*filter(None, (hub["name"], hub["config"])), **given)
    except Exception as e:  # of datasets, the HTTP library, the disk, or the card's YAML
        raise ValueError(f"data set '{source}': {_why_not_loaded(e, hub)}") from None
    COMMITS.update({source: commit} if (commit := _commit(source, data, hub["name"], revision)) else {})
    yield from _read_table(source, data, columns)


def _commit(source: str, data: Any, name: str, revision: str | None) -> str:
    """The commit on the hub that a `datasets.Dataset` is of, "" if it does not say.

    Raises:
        ValueError: another than the one asked for: without the hub, `datasets` takes the newest of its cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    parts = [Path(file["filename"]).parent.name for file in data.cache_files]  # .../CONFIG/0.0.0/COMMIT/NAME.arrow
    commit = next((part for part in parts if re.fullmatch("[0-9a-f]{40}", part)), "")
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset"))
    ref = folder / "refs" / (revision or "main")  # of a branch or tag
    if commit and (ref.read_text() if ref.is_file() else revision or commit) != commit:
        raise ValueError(
            f"data set '{source}': revision {revision or 'main'} can't be had from the Hugging Face hub; without "
            f"it `datasets` reads the newest that is cached, {commit}: connect, or name that revision"
        )
    return commit


def _why_not_loaded(error: Exception, hub: Mapping[str, str | None]) -> str:
    from ..system.hub import why_not_loaded  # imports torch

    if why := why_not_loaded(error, hub["name"], "dataset", f"{'/'.join(FILE_KINDS)} file"):
        return why
    start = hub["name"] + f"@{hub['revision']}" * bool(hub["revision"])
    there = re.findall(r"'([^']*)'", (re.findall(r"\[.*?\]", str(error)) or [""])[-1])  # its own list of what there is
    if there and re.search(r"\bsplits?\b", str(error)):
        return _one_of("split", there, f"{start}:{hub['config'] or ''}:")
    if there and "config" in str(error).lower():
        return _one_of("configuration", there, f"{start}:")
    return f"can't be loaded ({first_line(error)}; {type(error.__cause__ or error).__name__})"


def _one_of(what: str, names: Sequence[str], start: str) -> str:
    return f"name its {what}, one of {', '.join(names)}: for example {start}{names[0]}"


def _read_table(source: str, data: Any, columns: Columns) -> Raw:
    """The rows of a `datasets.Dataset`; columns that are not used are not read."""
    rows = data.select_columns(list(columns.find(data.column_names, source).values()))
    yield from _numbered(rows, source, len(data), source)
