"""The README says what is so: its snippets print what stands below them, its commands parse, its names exist."""

import doctest
import importlib
import re
import shlex

import pytest
from conftest import ROOT

from qlora_min.cli import COMMANDS, make_parser
from qlora_min.config import FIELDS, flag

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the README's shell snippets, as words."""
    found = []
    for block in SHELL:
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
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
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
    known = {"python", "python3", ".", "pip", "pytest", "git", "cd", "qlora-min", "eval", "torchrun", "time", "env"}
    assert words[0] in known, words


def test_the_names_in_the_course_exist():
    """`module.py`, `Name`: the lines that compute it are there."""
    named = re.findall(r"`(\w+)\.py`, `([A-Z_a-z.0-9]+)`", TEXT)
    named = [(m, n) for m, n in named if not n.endswith(".py")]
    assert len(named) >= 10
    for module, name in named:
        thing = importlib.import_module(f"qlora_min.{module}")
        for part in name.split("."):
            thing = getattr(thing, part)


def test_every_module_is_in_the_reading_order():
    part = TEXT.partition("### In which order to read")[2].partition("\n## ")[0]
    modules = {p.name for p in (ROOT / "qlora_min").glob("*.py")} - {"__init__.py", "bits.py"}
    assert modules == set(re.findall(r"`(\w+\.py)`", part))


def test_every_option_is_in_the_table_with_its_default():
    table = TEXT.partition("### Options of train.py")[2].partition("\n### ")[0]
    for name, field in FIELDS.items():
        line = next((line for line in table.splitlines() if f"`{flag(name)}`" in line), None)
        assert line, name
        default = field.default
        shown = ",".join(default) if isinstance(default, tuple) else default
        if isinstance(default, str) or (isinstance(default, int | float) and not isinstance(default, bool)):
            plain = str(int(shown)) if isinstance(shown, float) and shown == int(shown) else str(shown)
            plain = {"0.0002": "2e-4"}.get(plain, plain)
            assert re.search(rf"(?<![\w.]){re.escape(plain)}(?![\w.]*\d)", line.split("|", 2)[2]), (name, plain, line)


def test_links_within_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (link[1:] in anchors) if link.startswith("#") else (ROOT / link).exists() or "://" in link, link
