"""Bad data: each kind has its own line with its place, none shows a row's text, and none is a traceback."""

import csv
import json
import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_min import chat
from qlora_min.base import load_encoder
from qlora_min.config import Config
from qlora_min.data import layouts, readers
from qlora_min.data.examples import BadData, BadRows
from qlora_min.data.layouts import to_example
from qlora_min.data.readers import read
from qlora_min.data.rows import Row, Rows
from qlora_min.demo import world
from qlora_min.run import datasets
from qlora_min.run.datasets import read_data

SECRET = "Mrs Miller, 54, of Springfield"
GOOD = {"prompt": "p", "completion": "c"}
LAYOUTS = "instruction/input/output, prompt/completion, or messages"
NAMED = ", or name them: --columns prompt=NAME completion=NAME"
KINDS = ".jsonl/.json/.csv/.tsv/.parquet"


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(str(world.MODEL_DIR))


def message_of(path: Path, bad: BadRows | None = None) -> str:
    with pytest.raises(ValueError) as error:
        list(read(str(path), bad=bad))
    message = str(error.value)
    assert SECRET not in message and "Miller" not in message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# A bad row among good ones
# ---------------------------------------------------------------------------------------------------------------------

JSON = ": not a JSON object: "
CUT = f"{JSON}cut short, or a closing quote is missing"
MESSAGES = b'{"messages": [{"role": "user", "content": "%S"}, '
BAD_LINES = {  # name -> (a line of a .jsonl file, the message behind its place)
    # not JSON
    "trailing comma": (b'{"prompt": "p", "completion": "%S",}', f"{JSON}a comma before a closing bracket; remove it"),
    "trailing comma in a list": (b'{"messages": [1, 2, ]}', f"{JSON}a comma before a closing bracket; remove it"),
    "single quotes": (b"{'prompt': '%S', 'completion': 'c'}", f"{JSON}single quotes; expected double quotes"),
    "a single-quoted value": (b"{\"prompt\": '%S'}", f"{JSON}single quotes; expected double quotes"),
    "cut in a text": (b'{"prompt": "p", "completion": "%S', CUT),
    "cut behind a comma": (b'{"prompt": "%S",', CUT),
    "cut in a number": (b'{"prompt": "%S", "x": 1.5e-', CUT),
    "cut before the fraction": (b'{"prompt": "%S", "x": -1.', CUT),
    "cut in a word": (b'{"prompt": "%S", "x": fal', CUT),
    "cut in an escape": (b'{"prompt": "%S\\u00', CUT),
    "cut in a character": ('{"prompt": "%Sé'.encode()[:-1], ": not UTF-8 text; save the file as UTF-8"),
    "two objects": (b'{"prompt": "%S"} {"prompt": "q"}',
                    f"{JSON}more than one object; expected one a line, in a .jsonl file"),
    "text behind": (b'{"prompt": "p", "completion": "%S"},', f"{JSON}text after the JSON"),
    "no JSON": (b"%S", f"{JSON}a value is missing, or is not written as JSON"),
    "a name without quotes": (b'{prompt: "%S"}', f"{JSON}a name without double quotes"),
    "no colon": (b'{"prompt" "%S"}', f"{JSON}a colon is missing after a name"),
    "a quote in a text": (b'{"prompt": "a "%S" b", "completion": "c"}',
                          f'{JSON}a comma is missing, or a quote inside a text is not written as \\"'),
    "None": (b'{"prompt": "%S", "completion": None}',
             f"{JSON}Python's None, True or False; expected null, true or false"),
    "a tab": (b'{"prompt": "%S\t", "completion": "c"}',
              f"{JSON}a control character, such as a tab, inside a text; write a tab as \\t"),
    "a backslash": (b'{"prompt": "%S\\d", "completion": "c"}',
                    f"{JSON}a backslash that begins no escape; write a backslash as \\\\"),
    "NUL": (b'{"prompt": "%S\0", "completion": "c"}',
            ": NUL bytes, expected UTF-8 text; the file is damaged, or was saved as UTF-16"),
    "Latin-1": ('{"prompt": "%S é", "completion": "c"}'.encode("latin-1"), ": not UTF-8 text; save the file as UTF-8"),
    "a BOM in the middle": ('\ufeff{"prompt": "%S"}'.encode(), f"{JSON}a value is missing, or is not written as JSON"),
    "absurd nesting": (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", f"{JSON}nested too deeply"),
    "an absurd integer": (b'{"prompt": "%S", "completion": ' + b"9" * 5000 + b"}",
                          ":completion: an integer of 5,000 digits"),
    "an absurd integer elsewhere": (b'{"prompt": "p", "completion": "c", "%S": [' + b"9" * 5000 + b"]}",
                                    ": an integer of 5,000 digits"),
    "too long": (b'{"prompt": "%S", "completion": "' + b"x" * 10_000_000 + b'"}',
                 ": longer than 10 MB; expected one row a line"),
    # JSON, but
    "NaN": (b'{"prompt": "%S", "completion": NaN}', ":completion: NaN, which is not JSON; expected null or text"),
    "Infinity": (b'{"prompt": Infinity, "completion": "%S"}',
                 ":prompt: Infinity, which is not JSON; expected null or text"),
    "-Infinity elsewhere": (b'{"prompt": "p", "completion": "c", "%S": {"x": [-Infinity]}}',
                            ": -Infinity, which is not JSON; expected null or text"),
    "a duplicate key": (b'{"prompt": "p", "completion": "c", "prompt": "%S"}',
                        ":prompt: the same name stands twice in an object"),
    "a duplicate key elsewhere": (b'{"prompt": "p", "completion": "c", "%S": 1, "%S": 1}',
                                  ": the same name stands twice in an object"),
    "a duplicate key in a message": (MESSAGES + b'{"role": "user", "role": "assistant", "content": "a"}]}',
                                     ":role: the same name stands twice in an object"),
    "a lone surrogate": (b'{"prompt": "%S", "completion": "\\ud83d"}',
                         ":completion: half a surrogate pair, expected text in Unicode"),
    "a lone surrogate in a message": (MESSAGES + b'{"role": "assistant", "content": "\\udc00"}]}',
                                      ":messages[1].content: half a surrogate pair, expected text in Unicode"),
    "an array": (b'["%S"]', f": a list, expected an object with columns {LAYOUTS}"),
    "a number": (b"3", f": a number, expected an object with columns {LAYOUTS}"),
    "a text": (b'"%S"', f": text, expected an object with columns {LAYOUTS}"),
    "null": (b"null", f": null, expected an object with columns {LAYOUTS}"),
    "true": (b"true", f": true or false, expected an object with columns {LAYOUTS}"),
    "a number for text": (b'{"prompt": "%S", "completion": 7}', ":completion: a number, expected text"),
    "null for text": (b'{"prompt": "%S", "completion": null}', ":completion: null, expected text"),
    "a list for text": (b'{"instruction": "%S", "input": ["x"], "output": "y"}', ":input: a list, expected text"),
    "an object for text": (b'{"instruction": {"%S": 1}, "output": "y"}', ":instruction: an object, expected text"),
    "true for text": (b'{"prompt": true, "completion": "%S"}', ":prompt: true or false, expected text"),
    # the schema
    "another layout": (b'{"frage": "%S", "antwort": "%S"}',
                       f": unknown layout with columns 'frage', 'antwort'; expected {LAYOUTS}, or name them: "
                       "--columns prompt=frage completion=antwort"),
    "a text as a name": (b'{"%S": "%S"}', f": unknown layout with columns ...; expected {LAYOUTS}{NAMED}"),
    "an empty object": (b"{}", f": unknown layout with columns none; expected {LAYOUTS}"),
    "no output": (b'{"instruction": "%S", "input": "x"}', f":output: missing, expected text; a row has {LAYOUTS}"),
    "no prompt": (b'{"completion": "%S"}', f":prompt: missing, expected text; a row has {LAYOUTS}"),
    "an empty answer": (b'{"instruction": "%S", "input": "x", "output": ""}', ":output: empty, expected text"),
    "a whitespace answer": (b'{"prompt": "%S", "completion": " \\n\\u00a0"}',
                            ":completion: nothing but whitespace, expected text"),
    "an empty question": (b'{"prompt": "", "completion": "%S"}', ":prompt: empty, expected text"),
    "neither instruction nor input": (b'{"instruction": "", "input": " ", "output": "%S"}',
                                      ":instruction: empty, expected text"),
    "messages are text": (b'{"messages": "%S"}', ":messages: text, expected a list of objects with role and content"),
    "no messages": (b'{"messages": []}', ":messages: empty, expected a list of objects with role and content"),
    "a message is text": (b'{"messages": ["%S"]}', ":messages[0]: text, expected an object with role and content"),
    "an unknown role": (MESSAGES + b'{"role": "%S", "content": "x"}]}',
                        ":messages[1].role: unknown role, expected system, user, assistant or tool"),
    "a list as a role": (b'{"messages": [{"role": ["%S"], "content": "x"}]}',
                         ":messages[0].role: unknown role, expected system, user, assistant or tool"),
    "no role": (b'{"messages": [{"content": "%S"}]}',
                ":messages[0].role: missing, expected system, user, assistant or tool"),
    "no content": (MESSAGES + b'{"role": "assistant"}]}', ":messages[1].content: missing, expected text"),
    "content is a list": (MESSAGES + b'{"role": "assistant", "content": ["%S"]}]}',
                          ":messages[1].content: a list, expected text"),
    "an empty answer in messages": (MESSAGES + b'{"role": "assistant", "content": ""}]}',
                                    ":messages[1].content: empty, expected text"),
    "a whitespace answer in messages": (MESSAGES + b'{"role": "assistant", "content": "\\t"}]}',
                                        ":messages[1].content: nothing but whitespace, expected text"),
    "no answer": (MESSAGES[:-2] + b"]}", ":messages: no answer; expected the assistant's as the last message"),
    "an answer that is not last": (MESSAGES + b'{"role": "assistant", "content": "a"}, {"role": "user", "content": '
                                   b'"u"}]}', ":messages: the assistant's answer is not the last message"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line(tmp_path, name):
    """Its message, all of it; and left out, the lines around it are read."""
    line, expected = BAD_LINES[name]
    good = [json.dumps(GOOD | {"prompt": p}).encode() for p in "ab"]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([good[0], line.replace(b"%S", SECRET.encode()), good[1]]))
    message = re.sub(r" \(at character [\d,]+\)", "", message_of(path))
    assert message == f"{path}:2{expected}; correct it"
    skipped = BadRows(skip=True)
    assert [e.messages[0]["content"] for e in read(str(path), bad=skipped)] == ["a", "b"]
    assert (skipped.count, len(skipped.messages)) == (1, 1)
    skipped.check()


@settings(max_examples=100, deadline=None)
@given(row=st.fixed_dictionaries({"prompt": st.text(min_size=1), "completion": st.text(), "x": st.integers() | st.none()
                                  | st.booleans() | st.floats(allow_nan=False, allow_infinity=False)}),
       at=st.floats(0, 1, exclude_max=True), plain=st.booleans())  # fmt: skip
def test_a_line_cut_anywhere_is_called_cut_short(row, at, plain):
    text = json.dumps(row, ensure_ascii=not plain)
    cut = text[: 1 + int(at * (len(text) - 1))]
    with pytest.raises(json.JSONDecodeError) as error:
        readers._Json().decoder.decode(cut)
    assert readers._syntax(error.value).startswith("cut short"), cut


def test_a_file_cut_in_a_character(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "p", "completion": "é'.encode()[:-1])
    assert message_of(path) == f"{path}:1: not UTF-8 text, cut short in a character; correct it"


def test_where_in_the_line_json_ends(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'  {"prompt": "p",}')
    at = 17 if sys.version_info >= (3, 13) else 18  # of the comma, or of the bracket
    assert message_of(path).endswith(f"a comma before a closing bracket; remove it (at character {at}); correct it")


def test_a_line_of_ten_million_bytes_is_still_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    start, end = b'{"prompt": "p", "completion": "', b'"}\r\n'
    fill = b"x" * (10_000_002 - len(start + end))
    path.write_bytes(start + fill + end + start + fill + b"x" + end)
    bad = BadRows(skip=True)
    assert [e.messages[1]["content"] for e in read(str(path), bad=bad)] == [fill.decode()]
    assert bad.messages == [f"{path}:2: longer than 10 MB; expected one row a line"]


def test_a_line_of_blanks_hides_nothing(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b" " * 11_000_000 + b"x\n" + json.dumps(GOOD).encode())
    assert message_of(path) == f"{path}:1: longer than 10 MB; expected one row a line; correct it"


BAD_TABLES = {  # name -> (a .csv file, the message behind its path)
    "more fields": ('prompt,completion\np,c\n"%S",b,c\n', ":3: more fields than the header names; correct it"),
    "fewer fields": ('prompt,completion\n\n"%S"\n', ":3:completion: empty, expected text; correct it"),
    "an open quote": ('prompt,completion\nx,"%S\nc,d\n',
                      ":2: broken CSV (unexpected end of data: a quote is never closed); correct it"),
    "text behind a quote": ('prompt,completion\n"%S"x,c\n', ":2: broken CSV (',' expected after '\"'); correct it"),
    "the line where a row begins": ('prompt,completion\n"a\nb\nc",d\n"%S\n\n", \n',
                                    ":5:completion: nothing but whitespace, expected text; correct it"),
    "not UTF-8": (b"prompt,completion\na,b\n\xe4 %S,b\n", ":3: not UTF-8 text; save the file as UTF-8; correct it"),
    "not UTF-8 behind a quote": (b'prompt,completion\n"a\n\xe4\n%S",b\nc,d',
                                 ":2: not UTF-8 text; save the file as UTF-8; correct it"),
    "NUL": (b"prompt,completion\n%S\0,b\n",
            ":2: NUL bytes, expected UTF-8 text; the file is damaged, or was saved as UTF-16; correct it"),
    "a long line": (b"prompt,completion\n" + b"x" * 10_000_000 + b",%S\np,c\n",
                    ":2: longer than 10 MB; expected one row a line; correct it"),
    # what makes the whole file unreadable
    "no header": ("%S,Miller\n%S,Miller\n",
                  f":1: unknown layout with columns ..., ..., ..., ...; expected {LAYOUTS}{NAMED}"),
    "another header": ("id;Prompt;Antwort\n1;%S;b\n",
                       f":1: unknown layout with columns 'id', 'Prompt', 'Antwort'; expected {LAYOUTS}, or name them: "
                       "--columns prompt=Prompt completion=Antwort"),
    "another header, with blanks": ("User question,Bot says\n%S,b\n",
                                    f":1: unknown layout with columns 'User question', 'Bot says'; expected {LAYOUTS}, "
                                    "or name them: --columns 'prompt=User question' 'completion=Bot says'"),
    "UTF-16": ("prompt,completion\n%S,b\n".encode("utf-16"),
               ":1: not UTF-8 text; save the file as UTF-8"),
    "a header alone": ("prompt,completion\n", f": no rows; expected at least one in a layout of {LAYOUTS}"),
    "blank lines": ("\n\n", f": no rows; expected at least one in a layout of {LAYOUTS}"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_bad_csv(tmp_path, name):
    content, expected = BAD_TABLES[name]
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / "rows.csv"
    path.write_bytes(content.replace(b"%S", SECRET.encode()))
    if name == "UTF-16":
        assert message_of(path).startswith(f"{path}:1: N")  # NUL or not UTF-8: both are true
    else:
        assert message_of(path) == f"{path}{expected}"


def test_csv_goes_on_behind_a_bad_row(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\na,1\nb,2,3\n"c"x,3\n\xe4,4\nd,5\n' + b"x" * 11_000_000 + b"\ne,6\n")
    bad = BadRows(skip=True)
    assert [(e.messages[0]["content"], e.location) for e in read(str(path), bad=bad)] == [
        ("a", f"{path}:2"), ("d", f"{path}:6"), ("e", f"{path}:8")
    ]  # fmt: skip
    assert [m.removeprefix(f"{path}:")[:10] for m in bad.messages] == [
        "3: more fi",
        "4: broken ",
        "5: not UTF",
        "7: longer ",
    ]


def test_a_long_field_of_a_csv_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt,completion\np,{'x' * 200_000}\n")
    assert len(next(read(str(path))).messages[1]["content"]) == 200_000


BAD_LISTS = {  # name -> (a .json file, the message behind its path)
    "a row": (b'[{"prompt": "p", "completion": "c"},\n"%S"]',
              f":row 2: text, expected an object with columns {LAYOUTS}; correct it"),
    "a field": (b'[{"prompt": "%S", "completion": NaN}]',
                ":row 1:completion: NaN, which is not JSON; expected null or text; correct it"),
    "a duplicate": (b'[{"prompt": "p", "prompt": "%S", "completion": "x"}]',
                    ":row 1:prompt: the same name stands twice in an object; correct it"),
    "an integer": (b'[{"prompt": "%S", "completion": ' + b"9" * 5000 + b"}]",
                   ":row 1:completion: an integer of 5,000 digits; correct it"),
    # what makes the whole file unreadable
    "empty": (b"[ ]", f": no rows; expected at least one in a layout of {LAYOUTS}"),
    "an object": (b'{"prompt": "%S"}', f":1:completion: missing, expected text; a row has {LAYOUTS}; correct it"),
    "an object that goes on": (b'{"prompt": "p",\n "completion": 3}\n{"prompt": "p",\n "completion": "%S"}',
                               ":row 1:completion: a number, expected text; correct it"),
    "a list within": (b'{"version": 1, "data": [{"prompt": "p", "completion": "c"}, {"prompt": "%S"}]}',
                      f":row 2:completion: missing, expected text; a row has {LAYOUTS}; correct it"),
    "a missing comma": (b'[{"prompt": "p", "completion": "c"}\n\n {"prompt": "%S", "completion": "c"}]',
                        ':3: not JSON: a comma is missing, or a quote inside a text is not written as \\"'),
    "a trailing comma": (b'[{"prompt": "p", "completion": "%S"},\n]',
                         ":2: not JSON: a comma before a closing bracket; remove it"),
    "cut": (b'[{"prompt": "p", "completion": "%S"},\n', ":2: not JSON: cut short, or a closing quote is missing"),
    "cut before the end": (b'[{"prompt": "p", "completion": "%S"}',
                           ":1: not JSON: cut short, or a closing quote is missing"),
    "text behind": (b'[{"prompt": "p", "completion": "%S"}]\n{}', ":2: not JSON: text after the JSON"),
    "nesting": (b"[" * 200_000, ":row 1: not JSON: nested too deeply"),
    "Latin-1": (b'[{"prompt": "%S",\n "completion": "\xe4"}]', ":2: not UTF-8 text; save the file as UTF-8"),
    "NUL": (b'[{"prompt": "%S",\n "completion": "\0"}]',
            ":2: NUL bytes, expected UTF-8 text; the file is damaged, or was saved as UTF-16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LISTS)
def test_a_bad_json_list(tmp_path, name):
    content, expected = BAD_LISTS[name]
    path = tmp_path / "rows.json"
    path.write_bytes(content.replace(b"%S", SECRET.encode()))
    assert re.sub(r" \(at character [\d,]+\)", "", message_of(path)) == f"{path}{expected}"


def write_parquet(path: Path, **columns: pa.Array) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_bad_rows_of_a_parquet_file(tmp_path):
    answers = pa.array([b"fine", b"\xe4", b"also"] * 100, pa.binary()).cast(pa.string(), safe=False)
    answers = pa.StringArray.from_buffers(300, answers.buffers()[1], answers.buffers()[2])
    path = write_parquet(tmp_path / "rows.parquet", prompt=pa.array([SECRET] * 300), completion=answers)
    bad = BadRows(skip=True)
    assert len(list(read(str(path), bad=bad))) == 200
    assert bad.count == 100 and len(bad.messages) == 20
    assert bad.messages[:2] == [f"{path}:row {n}: not UTF-8 text" for n in (2, 5)]

    times = pa.array([2**62, 1], pa.timestamp("ms"))  # the first is past Python's last year
    path = write_parquet(tmp_path / "times.parquet", prompt=pa.array([SECRET] * 2), completion=times)
    bad = BadRows(skip=True)
    assert not list(read(str(path), bad=bad))
    assert bad.messages == [
        f"{path}:row 1: a value that can't be read, expected text",
        f"{path}:row 2:completion: a datetime, expected text",
    ]
    path = write_parquet(tmp_path / "null.parquet", prompt=pa.array([SECRET]), completion=pa.array([None], pa.string()))
    assert message_of(path) == f"{path}:row 1:completion: null, expected text; correct it"
    path = write_parquet(tmp_path / "names.parquet", frage=pa.array([SECRET]), output=pa.array(["x"]))
    assert message_of(path) == (
        f"{path}: unknown layout with columns 'frage', 'output'; expected {LAYOUTS}, or name them: --columns "
        "prompt=frage completion=output"
    )
    path = write_parquet(tmp_path / "none.parquet", prompt=pa.array([], "string"), completion=pa.array([], "string"))
    assert message_of(path) == f"{path}: no rows; expected at least one in a layout of {LAYOUTS}"


@pytest.mark.parametrize("content", [SECRET.encode(), b"PAR1" + SECRET.encode() + b"PAR1", b"PAR1"], ids="abc")
def test_not_parquet(tmp_path, content):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert message_of(path) == f"{path}: not a readable Parquet file (damaged, cut short, or of another kind)"


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path):
    """Here one that could not be: pictures, say, need not fit into memory."""
    times = pa.array([2**62], pa.timestamp("ms"))
    columns = {"prompt": pa.array(["p"]), "completion": pa.array(["c"]), "when": times}
    assert len(list(read(str(write_parquet(tmp_path / "rows.parquet", **columns))))) == 1


def test_a_data_set_of_the_hub(monkeypatch):
    import datasets

    theirs = datasets.Dataset.from_dict({"prompt": ["a", None], "completion": ["b", SECRET], "more": [1, 2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: theirs)
    bad = BadRows(skip=True)
    (example,) = read("OWNER/NAME", bad=bad)
    assert example.location == "OWNER/NAME:row 1" and bad.messages == ["OWNER/NAME:row 2:prompt: null, expected text"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: theirs.remove_columns("completion"))
    with pytest.raises(ValueError, match=r"^OWNER/NAME: unknown layout with columns 'prompt', 'more'; expected "):
        list(read("OWNER/NAME", bad=bad))


# ---------------------------------------------------------------------------------------------------------------------
# Files that can't be read at all
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", readers.FILE_KINDS)
@pytest.mark.parametrize("skip", [False, True])
def test_an_empty_file(tmp_path, kind, skip):
    path = tmp_path / f"rows{kind}"
    path.touch()
    expected = "not a readable Parquet file" if kind == ".parquet" else "no rows; expected at least one in a layout of"
    assert message_of(path, BadRows(skip)).startswith(f"{path}: {expected}")


@pytest.mark.parametrize("content", [b"\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n"])
def test_a_file_of_nothing_but_blanks(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert message_of(path) == f"{path}: no rows; expected at least one in a layout of {LAYOUTS}"


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "nothing.csv", "nothing", "a/b/c", "x\0.jsonl"])
def test_a_missing_file_is_an_error_before_anything_is_read(source):
    with pytest.raises(ValueError) as error:
        read(source, bad=BadRows(skip=True))
    assert str(error.value) == f"data set '{source}': no such file; expected a {KINDS} file or a hub id like OWNER/NAME"


def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch):
    """Opening a pipe would wait for somebody to write to it."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    os.mkdir("folder.jsonl")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket.jsonl")
    os.mkdir("folder.jsonl/inside")
    folders = dict.fromkeys(("folder.jsonl", "../*/folder.jsonl"), "no data in it")
    for name in ("pipe.jsonl", "socket.jsonl", "/dev/zero", *folders):
        what = folders.get(name, "a pipe, socket or device")
        with pytest.raises(ValueError) as error:
            read(name, bad=BadRows(skip=True))
        assert str(error.value) == f"data set '{name}': {what}, expected a {KINDS} file"
    server.close()
    os.symlink("loop.jsonl", "loop.jsonl")
    with pytest.raises(ValueError, match=r"data set 'loop.jsonl': can't be read \(Too many levels of symbolic links\)"):
        read("loop.jsonl")
    Path("rows.txt").write_text("x")
    with pytest.raises(ValueError, match=r"rows.txt: unknown kind of file '\.txt', expected one of \.jsonl, "):
        read("rows.txt")


def test_a_file_that_can_no_longer_be_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD))
    rows = read(str(path))
    path.unlink()
    with pytest.raises(ValueError, match=r"rows.jsonl: can't be read \(No such file or directory\)"):
        list(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Many, over several data sets; and left out
# ---------------------------------------------------------------------------------------------------------------------


def config(*files: Path, **options) -> Config:
    given = {"dataset": tuple(map(str, files)), "eval_fraction": 0.0, "max_length": 64}
    return Config(**given | {k: tuple(map(str, v)) if k == "eval_dataset" else v for k, v in options.items()})


def questions(numbers, **more) -> list[dict]:
    return [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} | more for i in numbers]


def contents(rows) -> list[str]:
    return [row.location.rpartition("/")[2] for row in rows]


def test_all_bad_rows_of_all_data_sets_are_one_error(write_rows, encoder):
    a = write_rows([*questions(range(5)), {"prompt": 7, "completion": "c"}], "a.jsonl")
    b = write_rows([{"messages": []}, *questions(range(5, 9)), [SECRET]], "b.jsonl")
    held = write_rows([*questions(range(20, 22)), {}], "held.jsonl")
    with pytest.raises(BadData) as error:
        read_data(config(a, b, eval_dataset=(held,)), encoder)
    assert error.value.lines == [
        f"{a}:6:prompt: a number, expected text",
        f"{b}:1:messages: empty, expected a list of objects with role and content",
        f"{b}:6: a list, expected an object with columns {LAYOUTS}",
        f"{held}:3: unknown layout with columns none; expected {LAYOUTS}",
        "4 bad rows; correct them, or leave bad rows out with --skip-bad-rows",
    ]
    train, apart = read_data(config(a, b, eval_dataset=(held,), skip_bad_rows=True), encoder)
    assert [(p.read, p.bad, len(p.rows)) for p in (*train, *apart)] == [(6, 1, 5), (6, 2, 4), (3, 1, 2)]
    assert contents(train[1].rows) == ["b.jsonl:2", "b.jsonl:3", "b.jsonl:4", "b.jsonl:5"]
    cells = [line.split() for line in datasets.table([*train, *apart]).splitlines()]
    assert [(c[1], c[2], c[3]) for c in cells[1:]] == [("6", "5", "1"), ("6", "4", "2"), ("3", "2", "1")]


def test_twenty_are_shown_and_the_rest_is_counted(write_rows, encoder):
    path = write_rows([GOOD, *[{"prompt": SECRET, "completion": ""}] * 1500, GOOD])
    with pytest.raises(BadData) as error:
        read_data(config(path), encoder)
    assert error.value.lines == [
        *(f"{path}:{n}:completion: empty, expected text" for n in range(2, 22)),
        "... and 1,480 more bad rows; correct them, or leave bad rows out with --skip-bad-rows",
    ]
    assert str(error.value) == "\n".join(error.value.lines)
    bad = BadRows(skip=True)
    assert len(list(read(str(path), bad=bad))) == 2 and bad.count == 1500 and len(bad.messages) == 20


def test_nothing_is_tokenised_once_the_run_is_sure_to_end(write_rows, encoder, monkeypatch):
    first, second = write_rows([{}, *questions(range(9))], "a.jsonl"), write_rows(questions(range(9, 12)), "b.jsonl")
    monkeypatch.setattr(encoder, "_tokenise", None)
    with pytest.raises(BadData):
        read_data(config(first, second), encoder)


def test_the_limit_counts_bad_rows_too(write_rows, encoder):
    path = write_rows([*questions(range(2)), {}, *questions(range(2, 9)), {}])
    (part,), _ = read_data(config(path, limit=5, skip_bad_rows=True), encoder)
    assert (part.read, part.bad, contents(part.rows)) == (5, 1, [f"rows.jsonl:{n}" for n in (1, 2, 4, 5)])


def test_skipping_never_hides_an_unreadable_file(write_rows, tmp_path, encoder):
    good = write_rows(questions(range(3)), "good.jsonl")
    empty, bad = write_rows([], "empty.jsonl"), write_rows([{}, 3], "bad.jsonl")
    (nothing := tmp_path / "nothing").mkdir()
    for name, expected in [(empty, f"{empty}: no rows"), (nothing, f"data set '{nothing}': no data in it"),
                           (bad, f"{bad}: all 2 rows are bad; leave out --skip-bad-rows to see why")]:  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(expected)):
            read_data(config(good, name, skip_bad_rows=True), encoder)
    with pytest.raises(ValueError, match="no such file"):  # before anything is read
        read_data(config(bad, "nothing.jsonl"), encoder)


def test_roles_that_the_template_refuses_are_bad_rows(write_rows, encoder):
    import copy

    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    system = {"messages": [{"role": r, "content": SECRET} for r in ("system", "user", "assistant")]}
    path = write_rows([*questions(range(3)), system, *questions(range(3, 5))])
    with pytest.raises(BadData) as error:
        read_data(config(path), chat.ChatEncoder(tokenizer))
    assert error.value.lines == [
        f"{path}:4: the chat template refuses the roles system, user, assistant: no system role; correct it, or leave "
        "bad rows out with --skip-bad-rows"
    ]
    (part,), _ = read_data(config(path, skip_bad_rows=True), chat.ChatEncoder(tokenizer))
    assert (part.bad, contents(part.rows)) == (1, [f"rows.jsonl:{n}" for n in (1, 2, 3, 5, 6)])


# ---------------------------------------------------------------------------------------------------------------------
# Rows in training and in the held-out data
# ---------------------------------------------------------------------------------------------------------------------


def test_a_question_in_both_is_a_bad_row_with_both_places(write_rows, encoder):
    long = {"prompt": "Question? " + "x " * 100, "completion": "y"}
    train = write_rows([*questions(range(6)), long, {"prompt": "QUESTION  11?", "completion": "new"}], "train.jsonl")
    held = write_rows(questions([10, 11, 3, 12]), "held.jsonl")
    more = write_rows(questions([20, 0, 3]), "more.jsonl")
    with pytest.raises(BadData) as error:
        read_data(config(train, eval_dataset=(held, more)), encoder)
    assert error.value.lines == [
        f"{train}:4: the same question is in {held}:3, which is held out",
        f"{train}:8: the same question is in {held}:2, which is held out",
        f"{train}:1: the same question is in {more}:2, which is held out",
        "3 bad rows; correct them, or leave bad rows out with --skip-bad-rows",
    ]
    (part,), apart = read_data(config(train, eval_dataset=(held, more), skip_bad_rows=True), encoder)
    assert (part.read, part.bad, part.too_long) == (8, 3, 1)
    assert contents(part.rows) == [f"train.jsonl:{n}" for n in (2, 3, 5, 6)]
    assert [len(p.rows) for p in apart] == [4, 3]


def test_shared_questions_are_told_together_with_other_bad_rows(write_rows, encoder):
    train = write_rows([{}, *questions(range(3))], "train.jsonl")
    held = write_rows(questions([9, 1]), "held.jsonl")
    with pytest.raises(BadData) as error:
        read_data(config(train, eval_dataset=(held,)), encoder)
    assert [line.partition(" ")[0] for line in error.value.lines] == [f"{train}:1:", f"{train}:3:", "2"]


def test_rows_that_are_not_used_are_not_shared(write_rows, encoder):
    """Too long for training, or beyond --eval-limit."""
    long = {"prompt": "Question 1? " + "x " * 100, "completion": "y"}
    train = write_rows([*questions(range(5)), long], "train.jsonl")
    held = write_rows([*questions(range(10, 13)), long, questions([4])[0]], "held.jsonl")
    (part,), (apart,) = read_data(config(train, eval_dataset=(held,), eval_limit=4), encoder)
    assert (len(part.rows), part.too_long, len(apart.rows), apart.too_long) == (5, 1, 3, 1)


def test_the_same_file_for_both_leaves_nothing(write_rows, encoder):
    path = write_rows(questions(range(40)))
    with pytest.raises(BadData, match=r"\.\.\. and 20 more bad rows"):
        read_data(config(path, eval_dataset=(path,)), encoder)
    with pytest.raises(ValueError, match="no rows left to train on"):
        read_data(config(path, eval_dataset=(path,), skip_bad_rows=True), encoder)


def test_a_data_set_named_twice_counts_once(write_rows, encoder):
    train, held = write_rows(questions(range(9)), "a.jsonl"), write_rows(questions(range(20, 25)), "b.jsonl")
    sides = read_data(config(train, train, eval_dataset=(held, held)), encoder)
    assert [[len(p.rows) for p in side] for side in sides] == [[9], [5]]


def test_a_fraction_is_held_out_of_what_is_left(write_rows, encoder):
    long = [{"prompt": f"Question {i}? " + "x " * 100, "completion": "y"} for i in range(100, 104)]
    path = write_rows([*questions(range(30)), {}, *long, {}, *questions(range(30, 60))])
    (train,), (held,) = read_data(config(path, eval_fraction=0.25, skip_bad_rows=True), encoder)
    assert (train.bad, held.bad) == (2, 0) and held.read == 16 and train.read == 50  # of 64 good rows
    assert all(len(p.rows) == p.fits.sum() for p in (train, held))
    assert train.too_long + held.too_long == 4 and held.name == f"{path} (held out)"
    both = contents(train.rows) + contents(held.rows)
    assert len(both) == len(set(both)) == 60
    numbers = [[int(w.rpartition(":")[2]) for w in contents(p.rows)] for p in (train, held)]
    assert all(side == sorted(side) for side in numbers)
    _, (fewer,) = read_data(config(path, eval_fraction=0.25, eval_limit=7, skip_bad_rows=True), encoder)
    assert fewer.read == 7 and contents(fewer.rows) == contents(held.rows)[: len(fewer.rows)]


@pytest.mark.real
def test_real_train_and_validation_share_no_question(encoder):
    files = [SHARED / "data" / "medqa" / f"{name}.jsonl" for name in ("train", "validation")]
    if not all(f.is_file() for f in files):
        pytest.skip(f"{files[0].parent} is absent")
    train, held = read_data(config(files[0], eval_dataset=(files[1],), max_length=4096), encoder)
    assert (train[0].read, held[0].read, train[0].bad) == (3503, 1272, 0)


# ---------------------------------------------------------------------------------------------------------------------
# As a user meets it
# ---------------------------------------------------------------------------------------------------------------------


def test_train_shows_bad_rows_one_a_line_and_ends_with_2(script, write_rows, tmp_path):
    write_rows([*questions(range(4)), {"prompt": SECRET}, 3], "rows.jsonl")
    options = ["--model", world.MODEL_DIR, "--dataset", "rows.jsonl", "--eval-fraction", 0, "--output-dir", "out"]
    done = script("train.py", *options, expect=2)
    assert done.stderr.splitlines() == [
        f"error: rows.jsonl:5:completion: missing, expected text; a row has {LAYOUTS}",
        f"error: rows.jsonl:6: a number, expected an object with columns {LAYOUTS}",
        "error: 2 bad rows; correct them, or leave bad rows out with --skip-bad-rows",
    ]
    assert not (tmp_path / "out").exists() and not done.stdout
    done = script("train.py", *options, "--skip-bad-rows", "--max-steps", 1)
    assert done.stdout.splitlines()[1].split()[:5] == ["rows.jsonl", "6", "4", "2", "0"]
    done = script("eval.py", "--adapter", "out/adapter", "--dataset", "rows.jsonl", expect=2)
    assert done.stderr.splitlines()[-1] == "error: 2 bad rows; correct them"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["options"]["skip_bad_rows"] is True


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzing: whatever comes, ValueErrors without the rows' text
# ---------------------------------------------------------------------------------------------------------------------

CANARY = "c4nary!"  # no identifier: a name of a column may be shown


def all_messages(path: Path) -> None:
    """Read a file both ways; whatever is wrong is said in one line, without its text."""
    shown = []
    for skip in (False, True):
        bad = BadRows(skip)
        try:
            for example in read(str(path), bad=bad):
                assert example.messages[-1]["role"] == "assistant"
            bad.check()
        except ValueError as e:
            shown += getattr(e, "lines", [str(e)])
        shown += bad.messages
    for line in shown:
        assert CANARY not in line.replace(str(path), "") and "\n" not in line and len(line) < 600


pieces = st.sampled_from(
    [b"\n", b"\r\n", b",", b'"', b"'", b"{", b"}", b"[", b"]", b":", b"\\", b"\\u", b"\\ud83d", b"\0", b"\xff", b"\xc3",
     b"\xef\xbb\xbf", b"NaN", b"-", b"1e999", b"9" * 5000, b"true", b"None", b'"prompt"', b'"completion"',
     b'"messages"', b"prompt,completion\n", b'{"prompt": "p", "completion": "c"}', b"[" * 3000, b"PAR1",
     CANARY.encode()]
)  # fmt: skip


@pytest.mark.parametrize("kind", readers.FILE_KINDS)
@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=40) | st.lists(pieces | st.binary(max_size=3), max_size=12).map(b"".join))
def test_fuzz_bytes(tmp_path_factory, kind, content):
    path = tmp_path_factory.getbasetemp() / f"fuzz{kind}"
    path.write_bytes(content)
    all_messages(path)


names = st.sampled_from([*sorted(layouts.NAMES), f"{CANARY} ", ""])
words = st.sampled_from(["assistant", "user", CANARY, "", " ", "\ud83d", "A: x", f"{{'A': '{CANARY}', 'B': '\\d'}}"])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
    max_leaves=12,
)
rows = values | st.dictionaries(names, words | values, max_size=6)


@settings(max_examples=150, deadline=None)
@given(some=st.lists(rows, max_size=4))
def test_fuzz_json(tmp_path_factory, some):
    folder = tmp_path_factory.getbasetemp()
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    (folder / "rows.json").write_text(json.dumps(some))
    for kind in (".jsonl", ".json"):
        all_messages(folder / f"rows{kind}")


@settings(max_examples=200, deadline=None)
@given(row=rows)
def test_fuzz_the_whole_way_to_an_encoded_row(encoder, row):
    try:
        example = to_example(row, "here:1")
    except ValueError as e:
        assert str(e).startswith("here:1") and CANARY not in str(e)
        return
    (part,) = [datasets.encode_dataset("here", [example], encoder, 10**6)]
    assert len(part.rows) == 1 and part.rows[0].supervised.any()


@settings(max_examples=100, deadline=None)
@given(cuts=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), min_size=1, max_size=6), data_=st.booleans())
def test_fuzz_parquet(tmp_path_factory, cuts, data_):
    path = tmp_path_factory.getbasetemp() / "fuzz.parquet"
    write_parquet(path, prompt=pa.array([CANARY] * 3), completion=pa.array(["c", CANARY, "d"]))
    content = path.read_bytes()
    for at, new in cuts:
        start = int(at * len(content))
        content = content[:start] + new + content[start + len(new) * data_ :]
    path.write_bytes(content)
    all_messages(path)


# ---------------------------------------------------------------------------------------------------------------------
# Rows on disk
# ---------------------------------------------------------------------------------------------------------------------


def make(n: int) -> Row:
    choices = ((n, n + 1, n + 2), n % 3, n) if n % 2 else None
    return Row(torch.arange(n, n + n % 50, dtype=torch.int32), torch.arange(n % 50) % 3 == 0, f"f:{n}\udc80", choices)


def assert_equal_rows(rows, expected) -> None:
    assert len(rows) == len(expected)
    for a, b in zip(rows, expected, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.supervised, b.supervised)
        assert (a.input_ids.dtype, a.supervised.dtype) == (torch.int32, torch.bool)
        assert (a.location, a.choices) == (b.location, b.choices)


def test_rows_come_back_as_they_were():
    expected = [make(n) for n in range(3000)]  # several batches, and rows of no token
    rows = Rows.write(expected)
    assert_equal_rows(rows, expected)
    assert_equal_rows(rows[1000:1100:7], expected[1000:1100:7])
    assert_equal_rows(rows[::-1][:5], expected[::-1][:5])
    assert_equal_rows(rows[np.array([2999, 0, 0, 1024])], [expected[i] for i in (2999, 0, 0, 1024)])
    mask = np.arange(3000) % 700 == 1
    assert_equal_rows(rows[mask], [expected[i] for i in np.flatnonzero(mask)])
    assert rows[-1].location == expected[-1].location
    with pytest.raises(IndexError):
        rows[3000]
    rows[1].input_ids[0] = 7  # a copy
    assert_equal_rows(rows[:2], expected[:2])
    assert rows.lengths.tolist() == [len(r) for r in expected]
    assert rows.supervised.tolist() == [int(r.supervised[1:].sum()) for r in expected]
    assert rows.lengths.dtype == rows.supervised.dtype == np.int32


def test_rows_of_several_files_in_one():
    a, b, c = ([make(n) for n in range(start, start + 1500)] for start in (0, 5000, 9000))
    parts = [Rows.write(a)[::-1], Rows.write([]), Rows.write(b)[np.arange(1500) % 2 == 0], Rows.write(c)]
    expected = [*a[::-1], *b[::2], *c]
    rows = Rows.join(parts)
    assert_equal_rows(rows, expected)
    assert rows.lengths.tolist() == [len(r) for r in expected]
    assert datasets.data_hash(rows) == datasets.data_hash(expected)
    assert len(Rows.join([])) == len(Rows.write([])) == 0 and not Rows.write([])


def test_datasets_reads_the_file(tmp_path, monkeypatch):
    """Its format is that of `datasets`."""
    import datasets

    path = tmp_path / "rows.arrow"
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: path.open("w+b"))
    Rows.write([make(n) for n in range(2000)])
    theirs = datasets.Dataset.from_file(str(path))
    assert len(theirs) == 2000 and theirs[1999]["input_ids"] == make(1999).input_ids.tolist()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a file without a name")
def test_nothing_is_left_even_by_a_kill(tmp_path):
    code = (  # killed while it writes, the first batches being on disk
        "import os, signal\nfrom qlora_min.data.rows import Row, Rows\nimport torch\n"
        "def rows():\n  for i in range(20000):\n    yield Row(torch.arange(9), torch.arange(9) > 3, 'w')\n"
        "  print('killed', flush=True)\n  os.kill(os.getpid(), signal.SIGKILL)\n"
        "Rows.write(rows())"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "killed\n" and done.returncode == -9
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its own limits")
def test_a_full_disk():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk, an OSError while writing
    try:
        with pytest.raises(ValueError) as error:
            Rows.write(make(i) for i in range(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(
        r"the encoded rows can't be written to /.* \(File too large\); set TMPDIR to a folder with space, "
        "about 5 bytes a token", str(error.value)
    )  # fmt: skip


def test_a_bar_goes_by_bytes_and_leaves_nothing(tmp_path, monkeypatch):
    bars, real = [], readers.console.Bar
    monkeypatch.setattr(
        readers.console, "Bar", lambda **kwargs: bars.append(real(**kwargs | {"disable": False})) or bars[-1]
    )
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(GOOD) + "\n") * 50)
    assert len(list(read(str(path)))) == 50
    assert (bars[0].desc, bars[0].total, bars[0].n, bars[0].leave) == (
        "rows.jsonl",
        path.stat().st_size,
        bars[0].total,
        False,
    )
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as f:
        csv.writer(f).writerows([["prompt", "completion"], *[["p", "c"]] * 9])
    list(read(str(table), limit=3))
    assert bars[1].n < bars[1].total and bars[1].disable  # closed, though not at its end


@pytest.mark.slow
def test_a_million_rows_in_flat_memory(tmp_path):
    """In a process of its own, as a command's: other tests leave gaps in the heap, which are filled at random."""
    path = tmp_path / "rows.jsonl"
    with path.open("w") as f:
        f.writelines(f'{{"prompt": "Question {i}?", "completion": "A: {i % 977}"}}\n' for i in range(10**6))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(check_memory, path, 10**6).result()


def check_memory(path: Path, n: int) -> None:
    """What grows with the rows is 25 bytes each; a row as Python objects would be a thousand."""
    samples = {}

    def watched():
        for i, example in enumerate(read(str(path)), 1):
            if i == n // 10:
                samples["early"] = memory()
            yield example

    part = datasets.encode_dataset("million", watched(), load_encoder(str(world.MODEL_DIR)), 64)
    samples["late"] = memory()
    assert len(part.rows) == part.read == n
    growth = samples["late"] - samples["early"]
    assert growth < 100 * 0.9 * n, f"{growth / (0.9 * n):.0f} bytes a row"
    held = datasets.split(part.questions, 0.01, seed=0)
    assert held.sum() == n // 100
    train, apart = part.select(~held), part.select(held)
    assert datasets.leave_out_shared(train, apart, BadRows()) is train
    assert len(train.rows) + len(apart.rows) == n and train.rows[-1].location.startswith(str(path))


def memory() -> int:
    """Resident bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
