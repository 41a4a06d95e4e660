"""What is printed: as wide as the terminal, lines instead of a bar without one, and commands that run as they are."""

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import qlora_min
from qlora_min.cli import main
from qlora_min.cli.chat import held_out
from qlora_min.config import Config
from qlora_min.data.measures import Evaluation
from qlora_min.demo import world
from qlora_min.run import api
from qlora_min.run.trainer import Trainer
from qlora_min.system import console, started

SHORT = ("--demo", "--limit", 256, "--eval-limit", 8, "--max-steps", 4, "--eval-every", 2, "--log-every", 1)


@pytest.fixture
def terminal(tmp_path):
    """terminal("train.py", ..., columns=80, types=(("you> ", "text\\n"), ...)) -> what a pseudo-terminal shows."""

    def run(name: str, *args: object, columns: int = 80, types=(), **environment: str) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")} | environment
        command = [sys.executable, str(ROOT / "scripts" / name), *map(str, args)]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        shown, answers, seen, end = "", list(types), 0, time.monotonic() + 120
        with contextlib.suppress(OSError):  # it has ended
            while time.monotonic() < end and select.select([ours], [], [], 120)[0]:
                shown += os.read(ours, 65536).decode("utf-8", "replace")
                if answers and answers[0][0] in shown[seen:]:
                    seen = len(shown)
                    os.write(ours, answers.pop(0)[1].encode())
        os.close(ours)
        process.kill() if time.monotonic() >= end else process.wait()
        assert process.returncode == 0, shown
        return shown

    return run


def lines_of(shown: str) -> list[str]:
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown))


# ---------------------------------------------------------------------------------------------------------------------
# As wide as the terminal
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_training_in_a_terminal(terminal, tmp_path, columns):
    """No line of a bar, the table of data or the plan is wider than the terminal; a bar has ten characters or more.

    Plan and bar speak of the same memory: on a CPU, of the whole process.
    """
    shown = terminal("train.py", *SHORT, "--output-dir", "runs/a", columns=columns, NO_COLOR="1")
    assert "\x1b[1;" not in shown and "\x1b[3" not in shown
    lines = lines_of(shown)
    bars = [line for line in lines if re.search(r"\d%\|", line)]
    assert any("4/4 [" in bar and ", loss " in bar for bar in bars)
    assert all(len(bar) <= columns and len(bar.split("|")[1]) >= 10 for bar in bars), bars
    assert columns < 200 or any("GiB" in bar and "step/s" in bar for bar in bars)
    plan = lines[next(i for i, line in enumerate(lines) if line.startswith("data  ")) :]
    plan = plan[: next(i for i, line in enumerate(plan) if line.startswith("writes to"))]
    assert max(map(len, plan)) <= columns
    assert "eval.jsonl" in "".join(plan) and "supervised: mean" in "".join(plan)
    assert "step 4/4" not in shown  # the lines that stand in for the bar
    starts = ("step 0: held-out loss", "adapter, metrics")
    first, last = (next(i for i, line in enumerate(lines) if line.startswith(start)) for start in starts)
    assert max(map(len, lines[first:last])) <= columns and "  with it '" in "\n".join(lines[first:last])
    planned = re.search(
        r"memory ([\d.]+) GiB \(program .* forecast peak of the whole process", " ".join(" ".join(plan).split())
    )
    peaks = re.findall(r'"peak_memory_gib": ([\d.]+)', (tmp_path / "runs" / "a" / "metrics.jsonl").read_text())
    assert float(planned[1]) == pytest.approx(float(peaks[3]), rel=0.15)


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_a_table_fits(monkeypatch, columns):
    """Whatever its names; they stay distinct, and nothing of the rest is lost."""
    lines = [("data", "rows", "kept", "option accuracy", "95% interval", "majority")]
    names = [f"/home/somebody/a long way/{'ab'[i % 2]}/data/train-{i // 2}.jsonl" for i in range(4)]
    lines += [
        (name, f"{i:,}", "1,000,000", "25.6% -> 100.0%", "24.1% to 99.9%", "D 26.4%") for i, name in enumerate(names)
    ]
    whole = console.aligned(lines)
    monkeypatch.setattr(console, "width", lambda: columns)
    found = console.aligned(lines)
    assert max(map(len, found.splitlines())) <= columns
    assert sorted(re.findall(r"\S+%|rows|\d,\d+", found)) == sorted(re.findall(r"\S+%|rows|\d,\d+", whole))
    block = found.split("\n\n")[0].splitlines()
    assert columns < 60 or len({re.split("  +", line)[0] for line in block}) == 5
    assert columns < 200 or found == whole


@pytest.mark.parametrize("columns", [60, 80])
def test_the_report_on_data_fits(script, monkeypatch, columns):
    monkeypatch.setattr(console, "width", lambda: columns)
    lines = script("data.py", "--demo", "--limit", 300).stdout.splitlines()
    assert max(map(len, lines)) <= columns and any(line.endswith("█" * 10) for line in lines)
    assert columns - max(len(line) for line in lines if "█" in line) in range(20)


def test_a_bar_of_unknown_length():
    bar = console.Bar(total=None, desc="rows.jsonl", ncols=40, file=SimpleNamespace(write=len, flush=int))
    assert "rows.jsonl: 0" in str(bar)
    bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# Without a terminal
# ---------------------------------------------------------------------------------------------------------------------

LINE = r"^step (\d+)/4, about \d+ s left, epoch 0\.\d\d, loss \d+\.\d{3}, lr \d\.\de-\d\d, [\d,]+ tok/s$"


def test_lines_instead_of_the_bar(script, monkeypatch):
    monkeypatch.setattr(console, "TOLD_SECONDS", 0)
    done = script("train.py", *SHORT, "--output-dir", "a")
    assert re.findall(LINE, done.stderr, re.MULTILINE) == ["1", "2", "3", "4"]
    others = [line for line in done.stderr.splitlines() if not re.match(LINE, line)]
    assert {"train.jsonl: 2%", "evaluating: 100%"} <= {*others} and "/4, epoch" not in done.stdout
    assert all(re.fullmatch(r"(train.jsonl|eval.jsonl|evaluating): \d+%", line) for line in others), others
    assert script("train.py", *SHORT, "--output-dir", "c", "--quiet").stderr == ""
    assert script("train.py", *SHORT, "--output-dir", "d", "--json").stderr == ""
    monkeypatch.setattr(console, "TOLD_SECONDS", 3600)
    assert script("train.py", *SHORT, "--output-dir", "e").stderr == ""


def test_only_the_first_process_tells(monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    assert not console.hidden()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert console.hidden()


# ---------------------------------------------------------------------------------------------------------------------
# Commands in messages
# ---------------------------------------------------------------------------------------------------------------------


def test_a_command_is_in_the_form_in_which_the_program_was_started(monkeypatch, tmp_path):
    python = started._typed(sys.executable)
    monkeypatch.chdir(tmp_path)
    there = os.path.relpath(ROOT / "scripts")

    def command(started_as: str, name: str = "chat", **how) -> str:
        monkeypatch.setattr(sys, "argv", [started_as])
        return started.command(name, "--adapter", Path("runs/a b"), **how)

    assert command(f"{there}/train.py") == f"{python} {there}/chat.py --adapter 'runs/a b'"
    assert command(f"{there}/train.py", "compare").startswith("qlora-min compare")  # there is no such script
    two = command(f"{there}/train.py", "train", processes=2)
    assert two == f"torchrun --nproc-per-node 2 {there}/train.py --adapter 'runs/a b'"
    for of_python in ("", "-c", "/usr/lib/python3/site-packages/ipykernel_launcher.py", str(tmp_path / "mine.py")):
        assert command(of_python) == "qlora-min chat --adapter 'runs/a b'"
    (tmp_path / "chat.py").write_text("print('another chat')")  # beside mine.py
    assert command(str(tmp_path / "mine.py")).startswith("qlora-min chat")
    assert command(str(tmp_path / "bin" / "qlora-min")).startswith(f"{tmp_path}/bin/qlora-min chat")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qlora-min").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    assert command(str(tmp_path / "bin" / "qlora-min")) == "qlora-min chat --adapter 'runs/a b'"
    assert command(str(tmp_path / "bin" / "qlora-min"), "train", processes=2) == (
        "torchrun --nproc-per-node 2 --no-python qlora-min train --adapter 'runs/a b'"
    )


def test_the_examples_of_help_can_be_typed(monkeypatch):
    for start, form in (
        (str(ROOT / "scripts" / "train.py"), rf"\S+ {ROOT}/scripts/train.py"),
        ("qlora-min", "qlora-min train"),
    ):
        monkeypatch.setattr(sys, "argv", [start])
        examples = main.described("train")[1].splitlines()
        assert len(examples) == 6 and all(re.match(f"  {form} ", line + " ") for line in examples)


@pytest.mark.parametrize("columns", [80, 200])
def test_help_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["qlora-min"])
    monkeypatch.setenv("COLUMNS", str(columns))
    helps = {name: main.make_parser(name, f"qlora-min {name}").format_help() for name in main.COMMANDS}
    assert max(len(line) for text in helps.values() for line in text.splitlines()) <= columns
    apart = "qlora-min train --resume\n      continue the newest"
    assert (apart in helps["train"]) == (columns == 80)


def test_the_commands_of_a_run_run_where_the_user_is(script, process):
    """Those that training and merging print, typed as they stand."""
    out = script("train.py", *SHORT, "--output-dir", "runs/a b").stdout
    evaluation, chat = re.search(r"next: (.*)\n      (.*)\n", out).groups()
    for line in (evaluation, chat + " --max-new-tokens 2 --prompt x"):
        _, path, *options = shlex.split(line)
        assert Path(path).parent == ROOT / "scripts" and script(Path(path).name, *options).stdout
    out = script("merge.py", "--adapter", "runs/a b/adapter", "--output-dir", "merged").stdout
    assert re.search(r"^next: \S+ \S+/scripts/chat\.py --model merged$", out, re.MULTILINE)


def test_rows_in_memory_are_evaluated_from_python(tmp_path, capsys):
    rows = [{"prompt": f"What is {i}?", "completion": str(i)} for i in range(40)]
    run = qlora_min.train(str(world.MODEL_DIR), rows, output_dir=tmp_path / "run", max_steps=1, rank=2, batch_size=4)
    lines = capsys.readouterr().out.splitlines()
    evaluation, chat = lines[-2].removeprefix("next: "), lines[-1].strip()
    assert isinstance(eval(evaluation), Evaluation) and isinstance(eval(chat), str)
    options = {"dataset": (api._names(rows)[0],), "model": str(world.MODEL_DIR)}
    trainer = Trainer(Config(**options, output_dir=str(tmp_path / "other")), write=False)
    assert trainer.command == f"qlora_min.train(resume='{tmp_path}/other', dataset=...)"
    assert run.folder == tmp_path / "run"


# ---------------------------------------------------------------------------------------------------------------------
# The end of a run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_that_never_improves_says_so(script):
    still = (*SHORT[:-6], "--max-steps", 2, "--eval-every", 2, "--learning-rate", 1e-30)
    out = script("train.py", *still, "--output-dir", "a").stdout
    line = (
        "note: no evaluation was better than that of step 0, so the adapter kept is step 0's, which changes nothing\n"
    )
    assert "best step 0" in out and line in out
    assert "no evaluation was better" not in script("train.py", *SHORT, "--output-dir", "b").stdout
    data = world.config_options()["dataset"]
    options = ("--dataset", *data, *still[1:], "--quantization", "nf4")
    out = script("train.py", "--adapter", "b/adapter", *options, "--output-dir", "c").stdout
    assert "so the adapter kept is step 0's, the one that it began with\n" in out


# ---------------------------------------------------------------------------------------------------------------------
# Chat
# ---------------------------------------------------------------------------------------------------------------------


def test_chat_in_a_terminal(terminal, script, tmp_path):
    script("train.py", *SHORT, "--output-dir", "a")
    types = [("you> ", "\n"), ("you> ", "one\\\n"), ("...> ", "two\n"), ("you> ", '"""three\n'), ("...> ", 'four"""\n'),
             ("you> ", "exit\n")]  # fmt: skip
    shown = terminal("chat.py", "--adapter", "a/adapter", "--max-new-tokens", 2, "--seed", 1, columns=120, types=types)
    assert shown.startswith("loading a/adapter ...") and "To leave: exit, or Ctrl-D." in shown
    offered = held_out(tmp_path / "a" / "adapter", qlora_min.load(tmp_path / "a" / "adapter").base)
    assert len(offered) == 4 and all("\n\nQ:" in question and "<|" not in question for question, _ in offered)
    for question, answer in offered[:2]:  # each once, the second after the first was asked
        assert shown.count(f"Enter asks this held-out question, whose answer is {answer!r}:") == 1
        assert shown.replace("\r\n", "\n").count(question.splitlines()[-1]) == 1
    assert shown.count("you> ") == 4 and shown.count("...> ") == 2


def test_what_is_typed(monkeypatch, capsys):
    from qlora_min.cli import chat

    def asked(*lines: str, offered=()) -> list[tuple[str, bool]]:
        left = list(lines)

        def typed(prompt: str) -> str:
            if not left:
                raise EOFError
            return left.pop(0)

        monkeypatch.setattr("builtins.input", typed)
        found = list(chat._conversation(offered))
        assert not left
        return found

    assert asked("a", "b ") == [("a", False), ("b", False)]
    assert asked("a\\", " b\\", "", "c") == [("a\n b", False), ("c", False)]
    assert asked('"""a\\', "", '  b"""', '"""c"""', '"""', '"""') == [("a\\\n\n  b", False), ("c", False)]
    assert asked("a", "quit") == [("a", False)] and asked("exit") == [] and asked("") == []
    rows = [("q 1", "a 1"), ("q 2", "a 2")]
    assert asked("", "a", "", "", offered=rows) == [("q 1", True), ("a", False), ("q 2", True)]
    capsys.readouterr()


def test_the_prompt_is_no_part_of_piped_answers(monkeypatch, capsys):
    from qlora_min.cli import chat

    for typing in (True, False):
        lines = iter(["a", ""])
        monkeypatch.setattr("builtins.input", lambda lines=lines: next(lines))
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda typing=typing: typing))
        assert list(chat._conversation(None)) == [("a", False)]
        assert capsys.readouterr() == ("", "you> you> " if typing else "")


def test_only_a_question_alone_is_offered(tmp_path):
    base = qlora_min.load(world.MODEL_DIR).base
    (tmp_path / "adapter").mkdir()
    assert held_out(tmp_path / "adapter", base) == []
    decode = base.encoder.tokenizer.decode
    user, system = {"role": "user", "content": "a\nb"}, {"role": "system", "content": "s"}
    several = [user, {"role": "assistant", "content": "c"}, user]
    prompts = [decode(base.encoder.prompt(messages)) for messages in ([user], [system, user], several)]
    import json

    lines = [json.dumps({"prompt": prompt, "reference": "r"}) for prompt in [*prompts, "", None]]
    (tmp_path / "samples.jsonl").write_text("\n".join([*lines, "[", ""]))
    assert held_out(tmp_path / "adapter", base) == [("a\nb", "r")]
