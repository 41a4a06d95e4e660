"""Data as people have them: layouts, names of columns, kinds of files, folders, what `datasets` saved, the hub."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import SHARED

import qlora_min
from qlora_min.base import load_encoder
from qlora_min.config import Config
from qlora_min.data.examples import BadRow, Example
from qlora_min.data.layouts import Columns, parse_columns, to_example
from qlora_min.data.readers import give, read
from qlora_min.demo import world
from qlora_min.run import cards
from qlora_min.run.datasets import read_data
from qlora_min.run.resume import output_directory
from qlora_min.system.files import read_json

CALL = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "force"}'}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}


def says(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


PLAIN = says(("user", "q"), ("assistant", "a"))
LONGER = says(("user", "q0"), ("assistant", "a0"), ("user", "q"), ("assistant", "a"))
SYSTEM = says(("system", "s"))
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
LAYOUTS = {  # name -> (row, messages, which carry no loss)
    "ShareGPT": ({"conversations": SHAREGPT}, PLAIN, ()),
    "ShareGPT, one": ({"conversation": SHAREGPT, "id": 1}, PLAIN, ()),
    "from and value in messages": ({"messages": SHAREGPT}, PLAIN, ()),
    "role and content in conversations": ({"conversations": PLAIN}, PLAIN, ()),
    "roles in capitals": ({"messages": says(("User", "q"), ("MODEL", "a"))}, PLAIN, ()),
    "JSON in a cell": ({"messages": json.dumps(SHAREGPT)}, PLAIN, ()),
    "question, answer": ({"question": "q", "answer": "a"}, PLAIN, ()),
    "query, response": ({"query": "q", "response": "a", "type": "x"}, PLAIN, ()),
    "problem, solution": ({"problem": "q", "solution": "a"}, PLAIN, ()),
    "input, output": ({"input": "q", "output": "a"}, PLAIN, ()),
    "Context, Response": ({"Context": "q", "Response": "a"}, PLAIN, ()),
    "capitals and blanks": ({" Prompt": "q", "COMPLETION ": "a"}, PLAIN, ()),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a"}, says(("user", "q\n\nc"), ("assistant", "a")), ()),
    "Dolly without context": ({"instruction": "q", "context": "", "response": "a"}, PLAIN, ()),
    "Alpaca beside a whole text": ({"instruction": "q", "input": "", "output": "a", "prompt": "q a"}, PLAIN, ()),
    "OpenOrca": ({"system_prompt": "s", "question": "q", "response": "a"}, [*SYSTEM, *PLAIN], ()),
    "no system": ({"System Prompt": " ", "question": "q", "response": "a"}, PLAIN, ()),
    "system null": ({"system": None, "messages": PLAIN}, PLAIN, ()),
    "system twice": ({"system": "s", "messages": [*SYSTEM, *PLAIN]}, [*SYSTEM, *PLAIN], ()),
    "history": ({"instruction": "q", "output": "a", "history": [["q0", "a0"]]}, LONGER, ()),
    "XTuner": ({"conversation": [{"system": "s", "input": "q0", "output": "a0"}, {"input": "q", "output": "a"}]},
               [*SYSTEM, *LONGER], ()),
    "history of messages": ({"query": "q", "response": "a", "history": LONGER[:2]}, LONGER, ()),
    "history in a cell": ({"instruction": "q", "output": "a", "history": '[["q0", "a0"]]'}, LONGER, ()),
    "no history": ({"instruction": "q", "output": "a", "history": "[]"}, PLAIN, ()),
    "TRL": ({"prompt": PLAIN[:1], "completion": PLAIN[1:]}, PLAIN, ()),
    "TRL, an answer in the prompt": ({"prompt": LONGER[:3], "completion": LONGER[3:]}, LONGER, (1,)),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, PLAIN[1]]}, PLAIN, ()),
    "parts in columns": ({"prompt": [{"type": "text", "text": "q"}], "completion": "a"}, PLAIN, ()),
    "weights": (
        {"messages": [LONGER[0], LONGER[1] | {"weight": 0}, LONGER[2], LONGER[3] | {"weight": 1}]},
        LONGER,
        (1,),
    ),
    "weights, SlimOrca's": (
        {"conversations": [SHAREGPT[0] | {"weight": None}, SHAREGPT[1] | {"weight": 0.0}, *SHAREGPT]},
        [*PLAIN, *PLAIN],
        (1,),
    ),
    "calls": (
        {"messages": [PLAIN[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        [PLAIN[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}],
        (),
    ),
    "calls beside text, and fields that are null": (
        {
            "messages": [PLAIN[0] | {"tool_calls": None, "name": None}, PLAIN[1] | {"tool_calls": json.dumps([CALL])}],
            "tools": json.dumps([TOOL]),
        },
        [PLAIN[0], PLAIN[1] | {"tool_calls": [CALL]}],
        (),
    ),
    "calls, LLaMA-Factory's": (
        {
            "conversations": [
                SHAREGPT[0],
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "a unit"},
                SHAREGPT[1],
            ],
            "tools": json.dumps([TOOL]),
        },
        [
            PLAIN[0],
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL["function"]}]},
            {"role": "tool", "content": "a unit"},
            PLAIN[1],
        ],
        (),
    ),
    "tools as ShareGPT has them": ({"conversations": SHAREGPT, "tools": json.dumps([TOOL["function"]])}, PLAIN, ()),
    "tools of OpenAI's newer interface": ({"messages": PLAIN, "tools": [TOOL["function"] | {"type": "function"}]},
                                          PLAIN, ()),
    "functions, of its older one": ({"messages": PLAIN, "functions": [TOOL["function"]]}, PLAIN, ()),
    "a developer's message": ({"messages": [{"role": "developer", "content": "s"}, *PLAIN]},
                              [{"role": "system", "content": "s"}, *PLAIN], ()),
    "reasoning": (
        {"messages": [PLAIN[0], PLAIN[1] | {"reasoning_content": "hm"}]},
        [PLAIN[0], PLAIN[1] | {"reasoning_content": "hm"}],
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout(name):
    row, messages, unlearned = LAYOUTS[name]
    example = to_example(row, "here:1")
    tools = (TOOL,) if {"tools", "functions"} & row.keys() else ()
    assert example == Example(tuple(messages), "here:1", tools, unlearned)
    assert to_example(json.loads(json.dumps(example.as_row())), "here:1") == example
    assert example.question  # of messages without content too


def assistant(**fields) -> dict:
    return {"messages": [PLAIN[0], PLAIN[1] | fields]}


REFUSED = {  # name -> (row, the message behind its place)
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"},
                    ": preference data (chosen, rejected), which is not supported; to learn the chosen answers alone: "
                    "--columns prompt=prompt completion=chosen"),
    "text": ({"text": "q a", "id": 1}, ": plain text (continued pre-training) is not supported, only questions and "
             "answers; expected instruction/input/output, prompt/completion, or messages"),
    "columns that could be about the row": ({"source": "q", "target": "a"},
                                            ":question: missing, expected text; a row has instruction/input/output, "
                                            "prompt/completion, or messages; this one has 'source', 'target'"),
    "two prompts": ({"question": "q", "query": "q", "answer": "a"},
                    ": columns 'question', 'query' could each be the prompt (all columns: 'question', 'query', "
                    "'answer'); say which with --columns prompt=NAME"),
    "an image": (assistant(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
                 ":messages[1].content[0]: a part of type image_url, expected text: {'type': 'text', 'text': ...}"),
    "a part of no known type": (assistant(content=[{"type": "secret"}]),
                                ":messages[1].content[0]: a part of another type, expected text: {'type': 'text', "
                                "'text': ...}"),
    "half a weight": (assistant(weight=0.5), ":messages[1].weight: expected 0 (carries no loss) or 1"),
    "nothing to learn": (assistant(weight=0), ":messages: each answer has weight 0; expected one that is learned"),
    "axolotl's train": (assistant(train=False), ":messages[1].train: unsupported, expected weight, 0 or 1"),
    "thinking": (assistant(thinking="hm"), ":messages[1].thinking: unsupported, expected reasoning_content"),
    "calls of a user": ({"messages": [PLAIN[0] | {"tool_calls": [CALL]}, PLAIN[1]]},
                        ":messages[0].tool_calls: expected an assistant's calls of functions with name and arguments"),
    "calls that are text": (assistant(tool_calls="look it up"),
                            ":messages[1].tool_calls: text, expected a list of objects"),
    "half a surrogate pair in a tool": ({"messages": PLAIN, "tools": [{"name": "\ud83d"}]},
                                        ":tools: half a surrogate pair, expected text in Unicode"),
    "two systems": ({"system": "s", "messages": [{"role": "system", "content": "t"}, *PLAIN]},
                    ":system: the messages begin with another system prompt; leave one out"),
    "history of texts": ({"prompt": "q", "completion": "a", "history": ["q0"]},
                         ":history[0]: expected a list of [question, answer]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_what_is_learned_is_refused_by_name(name):
    row, expected = REFUSED[name]
    with pytest.raises(BadRow) as error:
        to_example(row, "here:1")
    assert str(error.value) == f"here:1{expected}"


# ---------------------------------------------------------------------------------------------------------------------
# Names of columns
# ---------------------------------------------------------------------------------------------------------------------

FRAGE = [{"id": i, "frage": f"q{i}", "antwort": "a", "anweisung": "s"} for i in range(12)]


def test_columns_are_named(write_rows, capsys):
    path = str(write_rows(FRAGE))
    columns = ("prompt=frage", "completion=antwort", "system=anweisung")
    first = next(read(path, columns=columns))
    assert list(first.messages) == says(("system", "s"), ("user", "q0"), ("assistant", "a"))
    assert [e.messages[0]["role"] for e in read(path, columns=columns[:2])] == ["user"] * 12
    assert f"note: {path}: columns not used: id, anweisung\n" in capsys.readouterr().out
    named = Columns(parse_columns(["prompt=Frage", "completion=antwort"]))  # what is not named is recognised
    assert to_example({"frage ": "q", "antwort": "a", "System": "s"}, "f", named).messages[0]["role"] == "system"


@pytest.mark.parametrize(
    "columns, expected",
    [
        (("prompt=frge", "completion=antwort"), "--columns prompt=frge: no such column"),
        (("prompt=frage", "completion=antwort", "system=sys"), "--columns system=sys: no such column"),
    ],
)
def test_an_unknown_column_is_one_error_that_lists_the_columns(columns, expected, write_rows):
    lines = write_rows(FRAGE)
    for path in (lines, write_csv(lines.with_suffix(".csv"), FRAGE, ",")):
        with pytest.raises(ValueError) as error:
            read_data(Config(dataset=(str(path),), columns=columns), encoder())
        message = str(error.value)
        assert expected in message and "'id', 'frage', 'antwort', 'anweisung'" in message and "\n" not in message


def encoder():
    return load_encoder(str(world.MODEL_DIR))


def test_a_layout_that_no_row_has_is_told_once_with_the_option_that_maps_it(write_rows):
    """And not as 20 rows, nor with the advice to skip them all."""
    path = write_rows(FRAGE)
    for skip in (False, True):
        with pytest.raises(ValueError) as error:
            read_data(Config(dataset=(str(path),), skip_bad_rows=skip), encoder())
        assert str(error.value) == (
            f"{path}: all 12 rows are bad: unknown layout with columns 'id', 'frage', 'antwort', 'anweisung'; expected "
            "instruction/input/output, prompt/completion, or messages, or name them: --columns prompt=frage "
            "completion=antwort"
        )
    path = write_rows([{"prompt": i, "completion": i} for i in range(3)] + [{"prompt": 1}])
    with pytest.raises(ValueError) as error:  # for several reasons: each is told, but skipping would leave nothing
        read_data(Config(dataset=(str(path),)), encoder())
    assert error.value.lines[-1] == "4 bad rows; correct them"


def test_what_is_not_used_is_listed_once(write_rows, capsys):
    rows = [{"messages": [PLAIN[0] | {"turn": i}, PLAIN[1]], "id": i, "Mrs Miller, 54": 1} for i in range(3)]
    list(read(str(write_rows([*rows, {"messages": PLAIN, "source": "x"}]))))
    notes = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert [note.partition(": columns")[2] for note in notes] == [" not used: id, ..., messages[].turn, source"]


def test_a_column_whose_name_is_no_text(capsys):
    """As csv.DictReader makes of the fields too many of a line, and pandas of columns without a header."""
    rows = [{"prompt": "a", "completion": "b"}, *csv.DictReader(["prompt,completion", "c,d,e,f"])]
    assert [e.messages[1]["content"] for e in read(give(rows))] == ["b", "d"]
    assert capsys.readouterr().out.endswith(": columns not used: None\n")
    rows = [{0: "a", 1: "b"}]
    assert [e.messages[1]["content"] for e in read(give(rows), columns=["prompt=0", "completion=1"])] == ["b"]


@pytest.mark.parametrize("depth", [450, 900])
def test_rows_within_rows_within_rows(tmp_path, write_rows, depth):
    """Of 450 Python 3.11 reads the JSON, and has no stack left for what is in it; later versions have."""
    (tmp_path / "rows.jsonl").write_text('{"messages": [' * depth + json.dumps(ROWS[0]) + "]}" * depth)
    if depth == 450 and sys.version_info >= (3, 12):
        assert contents(tmp_path / "rows.jsonl") == contents(write_rows(ROWS[:1], "plain.jsonl"))
        return
    with pytest.raises(ValueError, match=r"rows.jsonl:1: (not a JSON object: )?nested too deeply; correct it"):
        contents(tmp_path / "rows.jsonl")


def test_columns_from_python_and_a_file(tmp_path, script, write_rows):
    rows = [{"Frage": f"What is {i}?", "Antwort": str(i)} for i in range(20)]
    columns = {"prompt": "frage", "completion": "antwort"}
    assert Config(columns=columns).columns == ("prompt=frage", "completion=antwort")
    options = {"max_length": 64, "max_steps": 1, "eval_every": 1}
    run = qlora_min.train(str(world.MODEL_DIR), rows, output_dir=tmp_path / "run", columns=columns, **options)
    held = len(list(read(give(rows), columns=Config(columns=columns).columns))) // 10
    assert qlora_min.evaluate(run.adapter).rows == held == 2
    assert qlora_min.evaluate(run.adapter, rows, columns=columns).rows == 20
    file = write_rows(rows, "other.jsonl")
    command = ["eval.py", "--adapter", run.adapter, "--dataset", file]
    assert "--columns prompt=Frage completion=Antwort" in script(*command, expect=2).stderr
    assert script(*command, "--columns", "prompt=Frage", "completion=Antwort").stdout


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "q1", "completion": "a1"}, {"prompt": "q2; q3", "completion": "a2\n"}]
EXAMPLES = [tuple(to_example(row, "").messages) for row in ROWS]


def write_csv(path: Path, rows: list[dict], separator: str, first: str = "") -> Path:
    import csv

    with path.open("w", encoding="utf-8-sig", newline="") as file:
        file.write(first)
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def contents(source: object, **more) -> list:
    return [e.messages for e in read(str(source), **more)]


@pytest.mark.parametrize("name", ["rows.csv", "ROWS.CSV", "rows.tsv"])
@pytest.mark.parametrize("separator", list(",;\t|"))
@pytest.mark.parametrize("line", ["", "sep={}\r\n"])
def test_a_tables_separator_is_found(tmp_path, name, separator, line):
    path = write_csv(tmp_path / name, ROWS, separator, line.format(separator))
    assert contents(path) == EXAMPLES
    assert next(read(str(path))).location == f"{path}:{3 if line else 2}"


def test_blanks_behind_the_separator(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt, completion\n"a, b", "c, d"\ne, f\n')
    assert [[m["content"] for m in ms] for ms in contents(tmp_path / "rows.csv")] == [["a, b", "c, d"], ["e", "f"]]


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
JSON = {  # name -> text
    "lines": LINES,
    "lines behind blank ones": f"\n \n{LINES}",
    "a list": json.dumps(ROWS),
    "a list over lines": json.dumps(ROWS, indent=2),
    "objects over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects that begin with a field": "".join(json.dumps(row)[:-1].replace(", ", ",\n") + "}\n" for row in ROWS),
    "a list within an object": json.dumps({"version": "1.0", "data": ROWS}),
    "a list within an object over lines": json.dumps({"rows": ROWS, "license": None}, indent=1),
}


@pytest.mark.parametrize("kind", ["json", "JSONL", "json.gz", "Jsonl.GZ"])
@pytest.mark.parametrize("name", JSON)
def test_json_is_read_whatever_the_file_is_called(tmp_path, kind, name):
    content = b"\xef\xbb\xbf" + JSON[name].encode()
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(gzip.compress(content) if kind.lower().endswith("gz") else content)
    assert contents(path) == EXAMPLES
    assert contents(path, limit=1) == EXAMPLES[:1]


def test_damaged_gz(tmp_path):
    packed = gzip.compress(os.urandom(9000).hex().encode())
    for name, content in (("none.jsonl.gz", LINES.encode()), ("cut.csv.gz", packed[:2000])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: not a readable \.gz file \(damaged, cut short, or of another"):
            contents(tmp_path / name)


def test_folders_and_patterns_of_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/b.jsonl").write_text(LINES)
    write_csv(Path("mine/A.csv"), [{"question": "q0", "answer": "a0"}], ";")
    for name in ("notes.txt", ".hidden.jsonl"):
        Path("mine", name).write_text("x")
    assert contents("mine") == [tuple(says(("user", "q0"), ("assistant", "a0"))), *EXAMPLES]
    assert "note: mine: files not used: notes.txt\n" in capsys.readouterr().out
    assert contents("mine/*.jsonl") == EXAMPLES and contents("m*/[Ab].*") == contents("mine")
    assert [e.location for e in read("mine")] == ["mine/A.csv:2", "mine/b.jsonl:1", "mine/b.jsonl:2"]
    with pytest.raises(ValueError, match=r"data set 'mine/\*\.json': no such file"):
        read("mine/*.json")


def test_what_datasets_saved_to_disk(tmp_path):
    data = datasets.Dataset.from_list([row | {"id": 1} for row in ROWS])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"test": data, "dev": data}).save_to_disk(tmp_path / "several")
    assert contents(tmp_path / "one") == contents(f"{tmp_path}/several::dev") == EXAMPLES
    for source in (tmp_path / "several", f"{tmp_path}/several::train"):
        with pytest.raises(
            ValueError, match=rf"name its split, one of test, dev: for example {tmp_path}/several::test$"
        ):
            contents(source)


def test_names_on_the_hub(monkeypatch, tmp_path):
    asked = []

    def load(path, name=None, **given):
        asked.append((path, name, given))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    for name in ("o/n", "o/n@v1.0", "o/n:main", "o/n:main:test", "o/n@refs/pr/1:main:test", "o/n::train[:10%]"):
        assert contents(name) == EXAMPLES
    assert asked == [
        ("o/n", None, {"split": "train"}),
        ("o/n", None, {"split": "train", "revision": "v1.0"}),
        ("o/n", "main", {"split": "train"}),
        ("o/n", "main", {"split": "test"}),
        ("o/n", "main", {"split": "test", "revision": "refs/pr/1"}),
        ("o/n", None, {"split": "train[:10%]"}),
    ]
    Path("o").mkdir()
    Path("o/n:main").mkdir()
    Path("o/n:main/rows.jsonl").write_text(LINES)
    assert next(read("o/n:main")).location == "o/n:main/rows.jsonl:1"  # a path that exists wins


def test_names_of_data_sets_in_cards_and_folders():
    names = ("o/n@v1:main:test", "/home/me/*.jsonl", "o/n")
    assert [cards.named(name) for name in names] == ["o/n@v1:main:test", "*.jsonl", "o/n"]
    assert re.fullmatch(r"runs/m-n-v1-main-test\+rows.+", str(output_directory(Config("m", (names[0], "a/rows.csv")))))
    assert not cards.is_hub_id("data/rows.jsonl.gz") and not cards.is_hub_id("data/ROWS.CSV")


def test_configurations_and_splits_are_listed_whole(monkeypatch, tmp_path):
    """By `datasets`' own errors, of a folder of its form."""
    load, names = datasets.load_dataset, [f"subject_{i}" for i in range(57)]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.jsonl").write_text(LINES)
    configs = "".join(f"- config_name: {n}\n  data_files:\n  - split: test\n    path: {n}/test.jsonl\n" for n in names)
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    folder, cache = str(tmp_path / "data"), str(tmp_path / "cache")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda _, *name, **given: load(folder, *name, cache_dir=cache, **given)
    )
    listed = ", ".join(names)
    for source, message in (
        ("o/n", f"name its configuration, one of {listed}: for example o/n:subject_0"),
        ("o/n:x", f"name its configuration, one of {listed}: for example o/n:subject_0"),
        ("o/n:subject_3", "name its split, one of test: for example o/n:subject_3:test"),
    ):
        with pytest.raises(ValueError) as error:
            contents(source)
        assert str(error.value) == f"data set '{source}': {message}"
    assert contents("o/n:subject_3:test") == EXAMPLES


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"model_type": "llama"}')
    assert read_json(tmp_path / "config.json") == {"model_type": "llama"}


# ---------------------------------------------------------------------------------------------------------------------
# The files of ../shared
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_real_cases(tmp_path):
    if not (SHARED / "cases" / "make.py").is_file():
        pytest.skip(f"{SHARED / 'cases'} is absent")
    subprocess.run([sys.executable, str(SHARED / "cases" / "make.py"), str(tmp_path)], check=True)
    wrong = []
    for case in json.loads((tmp_path / "expected.json").read_text(encoding="utf-8")):
        try:
            example = next(iter(list(read(str(tmp_path / case["file"])))))
        except ValueError as e:
            wrong += [] if case["messages"] in (None, "either") and case["says"] in str(e) else [(case["file"], e)]
            continue
        answers = [i for i, m in enumerate(example.messages) if m["role"] == "assistant"]
        learned = [i for i in answers if i not in example.unlearned]
        if (list(example.messages), learned) != (case["messages"], case["loss"]):
            wrong.append((case["file"], example))
        assert bool(example.tools) == ("tool" in case["says"])
    assert not wrong
