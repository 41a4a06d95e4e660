"""The READMEs say what is so: their snippets print what stands below them, their commands parse, their names exist."""

import ast
import doctest
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from qlora_min.cli.main import COMMANDS, main, make_parser
from qlora_min.config import Config
from qlora_min.data.layouts import Columns, to_example
from qlora_min.demo import world
from qlora_min.run.options import read_toml

README = ROOT / "README.md"
COURSE = ROOT / "qlora_min" / "README.md"
PAGES = [README, *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("qlora_min/*/README.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


def commands(text: str = "\n".join(TEXTS.values())) -> list[list[str]]:
    """Every command of a text's shell snippets, as words; by default of all pages."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.lstrip("!"), posix=True, punctuation_chars="&|;")
            lexer.whitespace_split = True
            words = []
            for word in [*lexer, "&&"]:
                if set(word) <= set("&|;"):
                    found.append(words)
                    words = []
                else:
                    words.append(word)
    return [words for words in found if words]


def test_the_snippets_print_what_stands_below_them():
    result = doctest.testfile(str(COURSE), module_relative=False)
    assert result.attempted > 20 and result.failed == 0


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_is_one(words):
    """Ours parse; what they name of the repository is there."""
    for at, word in enumerate(words):
        script = re.fullmatch(r"scripts/(\w+)\.py", word)
        name = script[1] if script else words[1] if word == "qlora-min" else None
        if name in COMMANDS:
            make_parser(name).parse_args(words[at + (1 if script else 2) :])  # exits where an option is unknown
    for word in words:
        if re.match(r"(scripts|tests)/", word):
            assert (ROOT / word).exists(), word
    known = {"python", "python3", ".", "pip", "pytest", "git", "cd", "qlora-min", "eval", "torchrun", "time", "env",
             "printf"}  # fmt: skip
    assert words[0] in known, words


def test_the_rows_of_the_readme_are_rows():
    rows = [json.loads(line) for line in TEXTS[README].splitlines() if line.startswith("{")]
    columns = Columns()
    answers = {to_example(row, "README", columns).messages[-1]["content"] for row in rows}
    assert len(rows) == 5 and answers == {"Vitamin C"} and not columns.unused


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git clone")
def test_what_the_commands_write_is_ignored_by_git():
    names = {"--output-dir", "--output", "--html", "--gguf", "--outfile", ">"}
    written = {words[i + 1] for words in commands() for i, word in enumerate(words[:-1]) if word in names}
    assert written >= {"merged", "merged.gguf", "runs.png", "report.html", "mine.jsonl", "german.csv"}
    written |= {"mine.toml", "dist/"}  # of --config, and of python -m build
    done = subprocess.run(["git", "check-ignore", *written], cwd=ROOT, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == written


@pytest.mark.slow
def test_the_commands_run_in_their_order(script, monkeypatch, tmp_path):
    """Those on data of one's own and of daily work, with the demo's model: each file is made by one before."""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # notebooks, for which a process counts once it has run one, have bars
    _, _, rest = TEXTS[README].partition("## Your own data")
    ran = []
    for words in commands(rest.partition("## From Python")[0]):
        name = words[1].removeprefix("scripts/")
        demo = [] if "--demo" in words or name not in ("train.py", "data.py") else ["--demo"]
        if words[0] == "python":  # nothing was stopped, so nothing goes on
            ran.append(script(name, *words[2:], *demo, expect=2 if words[2:] == ["--resume"] else 0).stderr)
        elif words[0] == "qlora-min":
            monkeypatch.setattr("sys.argv", words)
            with pytest.raises(SystemExit, match="0"):
                main()
        else:
            subprocess.run(["sh", "-c", f"printf {shlex.quote(words[1])} > {words[3]}"], cwd=tmp_path, check=True)
    assert len(ran) == 11 and [err for err in ran if err] == [
        "error: --resume: no unfinished run under 'runs'; name its directory: --resume DIR\n"
    ]
    assert {"mine.jsonl", "clean.jsonl", "german.csv", "merged", "runs.png"} <= {p.name for p in tmp_path.iterdir()}


def test_option_files_are_ones(tmp_path):
    (block,) = re.findall(r"^```toml\n(.*?)^```", "\n".join(TEXTS.values()), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.toml").write_text(block)
    config = Config(**read_toml(tmp_path / "mine.toml"))
    assert config.rank == 32 and len(config.targets) == 7 and len(config.columns) == 2


def test_the_names_in_the_course_exist():
    """`module.py`, `Name`: the lines that compute it are there."""
    named = re.findall(r"`([\w/]+)\.py`, `([A-Z_a-z.0-9]+)`", TEXTS[COURSE])
    named = [(m, n) for m, n in named if not n.endswith(".py")]
    assert len(named) >= 10
    for module, name in named:
        thing = importlib.import_module("qlora_min." + module.replace("/", "."))
        for part in name.split("."):
            thing = getattr(thing, part)


def test_every_file_of_the_core_is_in_the_reading_order():
    table = TEXTS[COURSE].partition("## QLoRA")[0]
    core = {p.name for p in (ROOT / "qlora_min").glob("*.py")} - {"__init__.py"}
    assert core == set(re.findall(r"^\| (.*?) \|", table, re.M) and re.findall(r"`(\w+\.py)`", table)) & core
    folders = {p.parent.name for p in (ROOT / "qlora_min").glob("*/__init__.py")}
    assert folders == set(re.findall(r"^\| `(\w+)/`", TEXTS[README], re.MULTILINE))


def test_links_lead_somewhere():
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if "://" in target:
                continue
            path, _, anchor = target.partition("#")
            there = (page.parent / path).resolve() if path else page
            there = there / "README.md" if there.is_dir() else there
            assert there.exists(), (page, target)
            if anchor and there.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
                assert anchor in anchors, (page, target)


def defined_at(path: Path) -> dict[str, int]:
    """Name -> line of each function and class of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node.lineno for node in ast.walk(tree) if isinstance(node, kinds)}


def test_links_to_lines_lead_to_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)#L(\d+)\)", TEXTS[README])
    assert len(links) >= 15
    right = {(name, path): defined_at(ROOT / path).get(name) for name, path, _ in links}
    wrong = [(n, p, f"#L{line}, is #L{right[n, p]}") for n, p, line in links if int(line) != right[n, p]]
    assert not wrong, wrong


def test_the_readme_is_short():
    assert len(TEXTS[README].splitlines()) <= 250


def test_the_python_example_runs_and_is_the_notebooks(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"^```python\n(.*?)\n```", TEXTS[README], re.MULTILINE | re.DOTALL)
    assert 3 <= len(example.splitlines()) <= 8
    notebook = json.loads((ROOT / "scripts" / "colab.ipynb").read_text(encoding="utf-8"))
    assert example in ["".join(cell["source"]) for cell in notebook["cells"]]
    monkeypatch.chdir(tmp_path)
    exec(example, {"MODEL": str(world.MODEL_DIR)})
    assert (next(tmp_path.glob("runs/*")) / "merged" / "model.safetensors").exists()
    assert re.search(r"\d\.\d+$", capsys.readouterr().out.rstrip().splitlines()[-1])
