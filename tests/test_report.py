"""What is shown of runs: boards say what metrics.jsonl says, and runs are drawn over each other."""

import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import faults
import numpy as np
import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem
from test_training import make, on_the_cpu  # noqa: F401

from qlora_min.cli import compare, main
from qlora_min.run import checkpoint, curves
from qlora_min.run.checkpoint import read_metrics
from qlora_min.run.trainer import Trainer

SHORT = {"rows": 6, "held": 2, "batch_size": 1, "grad_accum": 1, "eval_every": 3, "epochs": 1.0}


def scalars(run) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: tag -> (step, value)s."""
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def expected(run) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in read_metrics(run):
        for name, value in event.items():
            if event["event"] in ("train", "eval") and name not in ("event", "step", "seconds") and value is not None:
                tag = f"{event['event']}/{name.removeprefix('eval_')}"
                found.setdefault(tag, []).append((event["step"], float(np.float32(value))))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard
# ---------------------------------------------------------------------------------------------------------------------


def test_tensorboard_says_what_metrics_say(make):  # noqa: F811
    trainer = make(**SHORT, tensorboard=True)
    trainer.train()
    shown = scalars(trainer.folder)
    assert shown == expected(trainer.folder)
    assert {"train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "eval/loss"} <= shown.keys()
    assert [s for s, _ in shown["train/loss"]] == [1, 2, 3, 4, 5, 6] and [s for s, _ in shown["eval/loss"]] == [0, 3, 6]


def test_without_the_option_there_is_none(make):  # noqa: F811
    trainer = make(**SHORT)
    trainer.train()
    assert not (trainer.folder / "tensorboard").exists()


def train_until_killed(trainer: Trainer) -> None:
    """Train; in the sixth step the process is killed."""
    take = trainer.stepper.step

    def killed(*meanwhile):
        if trainer.progress.step == 5:
            raise KeyboardInterrupt
        return take(*meanwhile)

    trainer.stepper.step = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_what_a_resumed_run_forgets_tensorboard_forgets(make):  # noqa: F811
    """Lines after the checkpoint are cut from metrics.jsonl; the first process has already shown them."""
    trainer = make(**SHORT, tensorboard=True)
    train_until_killed(trainer)
    assert [s for s, _ in scalars(trainer.folder)["train/loss"]] == [1, 2, 3, 4, 5]
    with (trainer.folder / "metrics.jsonl").open("r+b") as f:
        f.write(b"x")  # a damaged line, here the first evaluation, ends nothing
    again = Trainer(trainer.config, trainer.folder)
    assert again.progress.step == 3
    again.train()
    assert scalars(trainer.folder) == expected(trainer.folder) and len(scalars(trainer.folder)["train/loss"]) == 6
    assert len(list((trainer.folder / "tensorboard").iterdir())) == 2


def test_both_spellings_are_one_board(make):  # noqa: F811
    trainer = make(**SHORT, report=("tensorboard",), tensorboard=True)
    trainer.train()
    assert len(trainer.boards) == 1 and scalars(trainer.folder) == expected(trainer.folder)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SummaryWriter's own
@pytest.mark.parametrize("away", [(0, 1), (2, 3)], ids=["from the start", "later"])
def test_a_disk_that_fails_only_warns_and_nothing_is_lost(make, monkeypatch, capsys, away):  # noqa: F811
    """TensorBoard's files fail for a while, a record half written; metrics.jsonl does not: in the end all is there."""
    trainer = make(**SHORT, tensorboard=True)
    update, calls, write = trainer.boards[0].update, [], LocalFileSystem._write
    monkeypatch.setattr(LocalFileSystem, "_write", lambda fs, name, *args: write(fs, os.fsdecode(name), *args))

    def on_a_bad_disk():
        failing = trainer.progress.step in away
        with faults.Faults(trainer.folder / "tensorboard", lambda n: trainer.progress.step in away, errno.ENOSPC) as w:
            update()
        assert trainer.boards[0].failed == failing
        calls.extend(call for call, _ in w.calls)

    trainer.boards[0].update = on_a_bad_disk
    trainer.train()
    assert capsys.readouterr().out.count("warning: no TensorBoard for now ([Errno 28]") == 1
    assert {"mkdir", "open"} <= set(calls) and trainer.writer.failures == 0 and checkpoint.is_finished(trainer.folder)
    assert scalars(trainer.folder) == expected(trainer.folder) and len(scalars(trainer.folder)["train/loss"]) == 6


def test_tensorboard_that_is_missing_is_one_line_before_any_work(make, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ValueError, match=r"--report tensorboard: .* not installed \(pip install 'qlora_min\[tensorboard\]'\)"
    ):
        make(tensorboard=True)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Weights & Biases, by a stand-in with the interface of the real one
# ---------------------------------------------------------------------------------------------------------------------


class Server:
    """What W&B keeps: for each id a step -> scalars. Steps only grow, and a resumed run begins behind its last."""

    def __init__(self):
        self.history: dict[str, dict[int, dict]] = {}
        self.begun: list[dict] = []
        self.ended, self.refused, self.broken = 0, 0, False

    def init(self, *, project=None, name=None, dir=None, config=None, id=None, resume=None):
        if self.broken:
            raise RuntimeError("api_key not configured (no-tty)")
        known = self.history.setdefault(id, {})
        self.begun.append({"project": project, "name": name, "dir": dir, "config": config, "id": id, "resume": resume})
        server = self

        class Run:
            step = max(known, default=-1) + 1

            def log(self, data, step=None):
                if server.broken:
                    raise RuntimeError("gone")
                if step < self.step:
                    server.refused += 1
                    return
                self.step = step
                known.setdefault(step, {}).update(data)

            def finish(self):
                server.ended += 1

        return Run()

    def shown(self) -> dict[str, list[tuple[int, float]]]:
        """As `scalars`, of the only run."""
        (known,), found = self.history.values(), {}
        for step, data in sorted(known.items()):
            for tag, value in data.items():
                found.setdefault(tag, []).append((step, float(np.float32(value))))
        return found


@pytest.fixture
def wandb(monkeypatch) -> Server:
    server = Server()
    monkeypatch.setitem(sys.modules, "wandb", server)
    return server


def test_wandb_says_what_metrics_say(make, wandb, monkeypatch):  # noqa: F811
    trainer = make(**SHORT, report=("wandb", "tensorboard"))
    trainer.train()
    assert wandb.shown() == scalars(trainer.folder) == expected(trainer.folder) and wandb.ended == 1
    (begun,) = wandb.begun
    assert begun["config"] == trainer.config.as_dict() and begun["resume"] == "allow"
    assert (begun["project"], begun["name"], begun["dir"]) == ("qlora_min", "run", str(trainer.folder.resolve()))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    make("other", **SHORT, report=("wandb",)).train()
    assert wandb.begun[1]["project"] == "mine" and len(wandb.history) == 2  # another run, another id


def test_a_resumed_run_continues_the_run_on_wandb(make, wandb):  # noqa: F811
    trainer = make(**SHORT, report=("wandb",))
    train_until_killed(trainer)
    assert wandb.ended == 1 and [s for s, _ in wandb.shown()["train/loss"]] == [1, 2, 3, 4]
    again = Trainer(trainer.config, trainer.folder)
    assert again.progress.step == 3
    again.train()
    assert len(wandb.begun) == 2 and wandb.ended == 2 and wandb.refused == 0
    shown, right = wandb.shown(), expected(trainer.folder)
    assert shown.keys() == right.keys()
    for tag in (
        "train/loss",
        "train/lr",
        "eval/loss",
        "eval/token_accuracy",
    ):  # speed and memory are the first process's
        assert shown[tag] == right[tag], tag


def test_an_evaluation_that_was_abandoned_is_shown_by_the_resumed_run(make, wandb):  # noqa: F811
    """W&B takes nothing of an earlier step than its last; the run was stopped after the loss of step 3 was known."""
    trainer = make(**SHORT, report=("wandb",))
    guarded = trainer.writer.guarded

    def killed(compute):
        if trainer.progress.step == 3:
            raise KeyboardInterrupt
        return guarded(compute)

    trainer.writer.guarded = killed
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert read_metrics(trainer.folder)[-1]["step"] == 3 and wandb.ended == 1
    Trainer(trainer.config, trainer.folder).train()
    assert [s for s, _ in wandb.shown()["eval/loss"]] == [0, 3, 6] and wandb.refused == 0


def test_wandb_that_fails_later_only_warns_and_nothing_is_lost(make, wandb, capsys):  # noqa: F811
    trainer = make(**SHORT, report=("wandb",))
    update = trainer.boards[0].update

    def on_a_bad_network():
        wandb.broken = trainer.progress.step in (2, 3)
        update()

    trainer.boards[0].update = on_a_bad_network
    trainer.train()
    assert capsys.readouterr().out.count("warning: no Weights & Biases for now (gone); metrics.jsonl has it all") == 1
    assert checkpoint.is_finished(trainer.folder) and wandb.shown() == expected(trainer.folder)


def test_wandb_without_an_account_is_one_line_before_training(make, wandb):  # noqa: F811
    trainer = make(**SHORT, report=("wandb",))
    wandb.broken = True
    with pytest.raises(
        ValueError, match=r"^--report wandb: Weights & Biases can't begin \(api_key .*WANDB_MODE=offline"
    ):
        trainer.train()
    assert trainer.progress.step == 0 and read_metrics(trainer.folder) == []


def test_wandb_that_is_missing_is_one_line_before_any_work(make, monkeypatch, tmp_path):  # noqa: F811
    """Also where a folder of that name, which wandb makes, is on the path."""
    for module in (None, types.ModuleType("wandb")):
        monkeypatch.setitem(sys.modules, "wandb", module)
        with pytest.raises(
            ValueError, match=r"^--report wandb: .* not installed \(pip install 'qlora_min\[wandb\]'\)$"
        ):
            make(report=("wandb",))
        assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Runs beside each other
# ---------------------------------------------------------------------------------------------------------------------


def fake_run(folder, losses: dict[int, float], held: str = "4 rows, sha256 0", finished: bool = True, **options):
    """A run's directory with what `compare` reads."""
    folder.mkdir(parents=True)
    record = {key: {} for key in checkpoint.RECORDED} | {
        "options": {"rank": 16, "learning_rate": 2e-4, "targets": ["q_proj"], "eval_dataset": ["d/held.jsonl"],
                    "output_dir": str(folder), **options},
        "files": {"train.jsonl": "9 rows, sha256 1", "d/held.jsonl": held},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(record))
    events = [{"event": "train", "step": s, "loss": v + 0.1, "lr": 1e-4, "tokens_per_second": 1000.0 + s,
               "peak_memory_gib": 1 + s / 100} for s, v in losses.items()]  # fmt: skip
    events += [{"event": "eval", "step": s, "eval_loss": v, "option_accuracy": v / 10} for s, v in losses.items()]
    events += [{"event": "end", "step": max(losses), "tokens_per_second": 1234.0}] if finished else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def test_runs_beside_each_other(tmp_path, capsys, monkeypatch):
    drawn = []
    draw = curves.draw_curves
    monkeypatch.setattr(compare, "draw_curves", lambda runs, path: drawn.append(list(runs)) or draw(runs, path))
    runs = [fake_run(tmp_path / "a", {5: 0.9, 10: 0.5, 15: 0.6}, rank=8),
            fake_run(tmp_path / "b", {5: 0.8, 10: 0.7}, finished=False)]  # fmt: skip
    rows = compare.compare_runs(runs, tmp_path / "out.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["best", "loss", "at", "step", "option", "accuracy", "tokens/s", "peak", "GiB"]
    assert lines[1].split() == ["a,", "rank", "8", "0.5000", "10", "5.0%", "1,234", "1.15"]
    assert lines[2].split("  ")[0] == "b, rank 16 (unfinished, step 10)"
    assert lines[2].split()[6:] == ["0.7000", "10", "7.0%", "1,010", "1.10"]
    assert lines[3:] == [f"wrote {tmp_path / 'out.png'}"] and drawn == [["a, rank 8", "b, rank 16"]]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert [r["best_loss"] for r in rows] == [0.5, 0.7]


def test_losses_over_more_than_a_decade_are_drawn_on_a_log_scale(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self.axes[0]))

    def scale(*losses: float | None, runs: int = 1) -> str:
        events = [{"event": "train", "step": i, "loss": v, "lr": 1e-4} for i, v in enumerate(losses)]
        assert curves.draw_curves({f"{i}": events for i in range(runs)}, tmp_path / "c.png") is None
        return drawn[-1].get_yscale()

    assert scale(6.4, 0.1, 0.0019) == "log" and {"5", "0.002"} <= {t.get_text() for t in drawn[-1].get_yticklabels()}
    assert scale(1.8, None, 0.24) == "linear" and drawn[-1].get_ylim()[0] == 0
    assert scale(1.8, 0.24, runs=2) == "log"  # or their differences would be hidden
    assert scale() == scale(None, 0.0) == scale(None, runs=2) == "linear"


def test_a_label_is_what_differs(tmp_path):
    def labels(*options: dict) -> list[str]:
        records = [{"options": {"rank": 16, "learning_rate": 2e-4, "targets": ["q", "v"], **o}} for o in options]
        return compare.labels([tmp_path / f"run{i}" for i in range(len(records))], records)

    assert labels({"rank": 8}, {}, {"rank": 64}) == ["run0, rank 8", "run1, rank 16", "run2, rank 64"]
    assert labels({"rank": 8, "learning_rate": 1e-3}, {}) == [
        "run0, rank 8, learning rate 0.001",
        "run1, rank 16, learning rate 0.0002",
    ]
    assert labels({"targets": ["q"]}, {}) == ["run0, targets q", "run1, targets q+v"]
    assert labels({}, {"output_dir": "x"}) == ["run0", "run1"]
    assert labels({}, {}, {"rank": 8}) == ["run0, rank 16", "run1, rank 16", "run2, rank 8"]
    assert labels({"model": "/home/me/smollm2"}, {"model": "a/b"}) == ["run0, model smollm2", "run1, model b"]
    assert labels({"of_the_future": 3}, {}) == ["run0, of the future 3", "run1, of the future None"]
    assert labels({}) == ["run0"]
    assert labels({"model": "m" * 60}, {"model": "n"}) == ["run0", "run1"]  # too long for a legend
    same = compare.labels([Path("a/run"), Path("b/run")], [{"options": {"rank": 8}}] * 2)
    assert same == ["a/run", "b/run"]


def test_losses_on_different_rows_do_not_compare(tmp_path, capsys):
    runs = [fake_run(tmp_path / "a", {1: 1.0}), fake_run(tmp_path / "b", {1: 1.0}, held="4 rows, sha256 9")]
    compare.compare_runs(runs, tmp_path / "out.png")
    assert "note: they were evaluated on different rows" in capsys.readouterr().out
    compare.compare_runs([runs[0], fake_run(tmp_path / "c", {1: 1.0}, rank=2)], tmp_path / "other.png")
    assert "different rows" not in capsys.readouterr().out


def test_runs_without_evaluations_or_events(tmp_path, capsys):
    runs = [fake_run(tmp_path / "a", {1: 1.0}), fake_run(tmp_path / "b", {1: 1.0}, rank=8)]
    (runs[1] / "metrics.jsonl").unlink()
    compare.compare_runs(runs, tmp_path / "out.png")
    assert capsys.readouterr().out.splitlines()[2].split() == [
        "b,", "rank", "8", "(unfinished,", "step", "0)", "-", "-", "-", "-", "-"
    ]  # fmt: skip


def test_the_command(tmp_path, monkeypatch, capsys):
    for rank in (2, 4):
        fake_run(tmp_path / f"r{rank}", {1: 1 / rank}, rank=rank)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "qlora_min.cli.main", "compare", "r2", "r4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "" and "rank 4 " in done.stdout, done
    picture = tmp_path / "comparison.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = picture.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (("r2", "r4"), "error: --output comparison.png: exists, and is never overwritten; choose another\n"),
        (("r2", "r2", "--output", "x.png"), "error: r2, r2: a run is named twice; name each once\n"),
        (("r2", "--output", "no/x.png"), "error: --output no/x.png: can't be written; expected"),
        (("r2", "--output", "r2/metrics.jsonl/x"), "error: --output r2/metrics.jsonl/x: can't be written; expected"),
        (("r2/metrics.jsonl", "--output", "x.png"), "error: 'r2/metrics.jsonl' holds no run"),
        (("--otput", "x.png", "r2"), "error: unknown option '--otput', did you mean --output?"),
    ):
        monkeypatch.setattr(sys, "argv", ["qlora-min", "compare", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.startswith(message) and error.count("\n") == 1, error
    assert picture.stat().st_mtime_ns == before
