"""Killed, full, read-only, gone, damaged, twice at once: nothing saved is lost, and nothing wrong is silent."""

import errno
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import faults
import pytest
from conftest import ROOT, assert_same
from test_resume import outcome
from test_training import conversations, last_checkpoint, make, on_the_cpu, saved_adapter  # noqa: F401

import qlora_min.base
import qlora_min.run.trainer
from qlora_min.optim import TrainingError
from qlora_min.run import checkpoint, ending, writer
from qlora_min.run import resume as resuming
from qlora_min.run.resume import run_config
from qlora_min.run.trainer import Trainer
from qlora_min.system import files
from qlora_min.system.files import write_json

slow = pytest.mark.slow


def nothing_lost(found: dict[str, int]) -> None:
    assert not found.get("lost") and not found.get("unloadable") and not found.get("not seen"), found


# ---------------------------------------------------------------------------------------------------------------------
# The figures' own code, in small; `slow` in full
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=slow)])
def test_kills(count):
    found = faults.kills(count, seed=count)
    assert found["kills"] == count and found["saves acknowledged"] >= count and found["within a save"]
    nothing_lost(found)


@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=slow)])
def test_every_call_of_a_save_fails(stride):
    found = faults.failing_calls(stride=stride)
    assert found["calls in a save"] > 50 and found["reported"] > found["tolerated"] > 0
    nothing_lost(found)
    if stride == 1:
        cases = found["reported"] + found["tolerated"]
        readme = (ROOT / "qlora_min" / "run" / "README.md").read_text(encoding="utf-8")
        assert f"every one of the {found['calls in a save']} calls of a save" in readme and f"| {cases} |" in readme


@slow
def test_a_full_disk():
    found = faults.disk_full()
    if isinstance(found, str):
        pytest.skip(found)
    assert found["files hit"] >= 11  # metrics, three of a checkpoint, seven of an adapter
    nothing_lost(found)


@pytest.mark.parametrize("counts", [(5, 20), pytest.param((50, 200), marks=slow)])
def test_damage_is_seen(counts):
    found = faults.damage(*counts)
    assert (found["truncations"], found["bytes changed"]) == (3 * counts[0], 3 * counts[1])
    nothing_lost(found)


def test_the_check_sees_what_is_lost(tmp_path, capsys):
    """The figures above can be other than 0."""
    trainer = faults.make_trainer(tmp_path)
    for step in (1, 2, 3, 4):
        faults.save(trainer, step)
    assert faults.check(trainer.folder, 4, 1) == []
    assert any("lost" in p for p in faults.check(trainer.folder, 5, 1))
    assert any("lost" in p for p in faults.check(trainer.folder, 4, 2))
    (trainer.folder / "metrics.jsonl").write_bytes(b"")
    assert any("metrics" in p for p in faults.check(trainer.folder, 4, 1))
    os.truncate(trainer.folder / "checkpoints" / "step-4" / checkpoint.STATE, 10)
    assert any("unloadable" in p for p in faults.check(trainer.folder, 4, 1))
    os.truncate(trainer.folder / "adapter" / "adapter_model.safetensors", 10)
    assert any("adapter/ unloadable" in p for p in faults.check(trainer.folder, 4, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Training goes on
# ---------------------------------------------------------------------------------------------------------------------

OPTIONS = {"rows": 6, "batch_size": 1, "held": 2, "epochs": 4, "eval_every": 2, "log_every": 1, "rank": 4}
OPTIONS |= {"patience": 100}


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.0)


@pytest.mark.parametrize("error", [errno.ENOSPC, *(pytest.param(e, marks=slow) for e in faults.AWAY)])
def test_a_failing_disk_changes_nothing_but_warnings(make, monkeypatch, no_waiting, capsys, error):  # noqa: F811
    """One call in 100 fails at random, through a whole run and its end; afterwards all is as in an undisturbed one."""
    monkeypatch.setattr(writer, "SAVE_TRIES", 1000)
    whole = make("whole", **OPTIONS)
    whole.train()
    disturbed = make("disturbed", **OPTIONS)
    capsys.readouterr()
    rng = random.Random(error)
    with faults.Faults(disturbed.folder, lambda n: rng.random() < 0.01, error) as made:
        disturbed.train()
    assert len(made.calls) > 400
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    causes = [os.strerror(error), os.strerror(errno.EEXIST)]  # the latter: os.makedirs, if it can't look at the folder
    assert len(warnings) >= 3 and all(str(disturbed.folder) in w and any(c in w for c in causes) for w in warnings)
    assert sum(causes[0] in w for w in warnings) >= 3
    results = [outcome(t.folder, all_of_it=False) for t in (whole, disturbed)]
    assert_same(results[1], results[0])


@pytest.mark.parametrize("error", [errno.EIO, pytest.param(errno.ENOTCONN, marks=slow)])
def test_a_disk_that_stays_away_ends_the_run_after_ten_tries(make, no_waiting, capsys, error):  # noqa: F811
    trainer = make(**OPTIONS)
    step = trainer.stepper.step
    away = faults.Faults(trainer.folder, lambda n: True, error)

    def leave(*meanwhile):
        if trainer.progress.step == 5:
            away.__enter__()
        return step(*meanwhile)

    trainer.stepper.step = leave
    try:
        with pytest.raises(TrainingError) as end:
            trainer.train()
    finally:
        away.__exit__()
    assert "10 times in a row" in str(end.value) and os.strerror(error) in str(end.value)
    assert str(trainer.folder / "checkpoints" / "step-4") in str(end.value)
    assert str(end.value).endswith(f"once it can be, continue with: qlora-min train --resume {trainer.folder}")
    assert sum(line.startswith("warning: ") for line in capsys.readouterr().out.splitlines()) == 9
    assert last_checkpoint(trainer.folder)["progress"]["step"] == 4
    resumed = Trainer(*run_config(str(trainer.folder), {}))
    assert resumed.progress.step == 4


def test_tries_are_spread_over_time_and_the_last_save_insists(make, monkeypatch, capsys):  # noqa: F811
    """While training, a new try comes only after RETRY_SECONDS; at the end the run waits for it."""
    slept = []
    monkeypatch.setattr(writer.time, "sleep", slept.append)
    monkeypatch.setattr(writer.time, "monotonic", lambda: 1000.0)  # no time passes
    trainer = make(**OPTIONS)
    away = faults.Faults(trainer.folder, lambda n: len(slept) < 3)
    with away:
        trainer.train()
    assert slept == [30.0] * 3
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4  # at the start, and three times at the end
    assert checkpoint.is_finished(trainer.folder)


def test_a_folder_in_the_place_of_a_drive_is_not_written_to(make, no_waiting):  # noqa: F811
    trainer = make(**OPTIONS)
    trainer.folder.rename(trainer.folder.with_name("elsewhere"))
    with pytest.raises(TrainingError, match=r"config\.json"):
        trainer.train()
    assert not trainer.folder.exists()


def test_samples_that_cannot_be_written_are_a_warning(make, monkeypatch, capsys):  # noqa: F811
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ending, "write_jsonl", fail)
    trainer = make(**OPTIONS)
    trainer.train()
    assert "warning: no samples or curves" in capsys.readouterr().out
    assert checkpoint.is_finished(trainer.folder)


def test_a_half_written_line_is_cut_before_the_next(tmp_path):
    metrics = checkpoint.Metrics(tmp_path)
    metrics.write("a")
    metrics.flush()
    metrics.write("b", x=1)
    with faults.Faults(tmp_path, lambda n: n == 1, errno.ENOSPC) as made, pytest.raises(OSError, match="No space"):
        metrics.flush()
    assert [call for call, _ in made.calls] == ["open", "write"]
    assert metrics.path.read_bytes() != b'{"event": "a"}\n'  # half a line
    metrics.write("c")
    metrics.flush()
    assert [e["event"] for e in checkpoint.read_metrics(tmp_path)] == ["a", "b", "c"]
    assert metrics.size == metrics.path.stat().st_size and not metrics.waiting


def test_rusts_errors_are_the_disks(tmp_path):
    """safetensors and tokenizers report a full disk as an error of their own; one that isn't the disk's stays."""
    with pytest.raises(OSError) as error, files.atomic_folder(tmp_path / "x"):
        raise Exception("No space left on device (os error 28)")
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(KeyError), files.atomic_folder(tmp_path / "x"):
        raise KeyError("y")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# What a resumed run finds
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(make):  # noqa: F811
    """A run that a crash ended behind step 6 of 12, and its checkpoints 4 and 6."""

    class Crash(Exception):
        pass

    trainer = make("cut", **{**OPTIONS, "held": 0})
    step = trainer.stepper.step

    def crash(*meanwhile):
        if trainer.progress.step == 7:
            raise Crash
        return step(*meanwhile)

    trainer.stepper.step = crash
    with pytest.raises(Crash):
        trainer.train()
    assert checkpoint.checkpoint_steps(trainer.folder) == [4, 6]
    return trainer.folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_set_aside_and_its_step_written_again(cut, make, capsys):  # noqa: F811
    flip(cut / "checkpoints" / "step-6" / checkpoint.TENSORS)
    damaged = (cut / "checkpoints" / "step-6" / checkpoint.TENSORS).read_bytes()
    resumed = Trainer(*run_config(str(cut), {}))
    assert resumed.progress.step == 4
    assert "tensors.safetensors not as it was saved" in capsys.readouterr().err
    (aside,) = (cut / "checkpoints").glob("step-6.damaged-*")
    assert (aside / checkpoint.TENSORS).read_bytes() == damaged
    resumed.train()
    assert aside.exists()
    whole = make("whole", **{**OPTIONS, "held": 0})
    whole.train()
    assert_same(outcome(cut, all_of_it=False), outcome(whole.folder, all_of_it=False))


@pytest.mark.parametrize("lost", ["adapter", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"])
def test_the_adapter_is_made_again(cut, lost):
    """Removed or damaged after the checkpoint of step 6, at its best: the resumed run's first save writes it."""
    expected = last_checkpoint(cut)["best_adapter"]
    if lost == "adapter":
        shutil.rmtree(cut / lost)
    else:
        flip(cut / lost)
    resumed = Trainer(*run_config(str(cut), {}))
    resumed.writer.write_all(resumed.progress)
    assert_same(saved_adapter(cut), expected)
    json.loads((cut / "adapter" / "adapter_config.json").read_text())


def test_a_run_whose_checkpoints_are_all_damaged_keeps_its_adapter(cut):
    before = saved_adapter(cut)
    for step in (4, 6):
        flip(cut / "checkpoints" / f"step-{step}" / checkpoint.STATE)
    for _ in range(2):  # also when they are set aside already
        with pytest.raises(ValueError, match="all of its checkpoints are damaged"):
            Trainer(*run_config(str(cut), {}))
    assert_same(saved_adapter(cut), before)


def test_what_changed_is_named(cut, make, monkeypatch, tmp_path):  # noqa: F811
    rows = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl was 6 rows, sha256 \w+, now 5 rows"):
        Trainer(*run_config(str(cut), {}))
    (tmp_path / "train.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl was 6 rows, sha256 \w+, now 6 rows"):
        Trainer(*run_config(str(cut), {}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    for option, value in {"save_every": 7, "rank": 8, "dataset": ("x.jsonl",)}.items():
        with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} was"):
            run_config(str(cut), {option: value})
    load = qlora_min.base.load_base
    monkeypatch.setattr(qlora_min.run.trainer, "load_base", lambda *args: replace(load(*args), fingerprint="another"))
    with pytest.raises(ValueError, match="the base changed: fingerprint was"):
        Trainer(*run_config(str(cut), {}))


@pytest.mark.parametrize(("option", "value"), [("seed", 43), ("dropout", 0.2), ("save_every", 3)])
def test_an_option_changed_in_the_record_is_named(cut, option, value):
    record = json.loads((cut / "config.json").read_text())
    assert record["options"][option] != value
    record["options"][option] = value
    write_json(cut / "config.json", record)
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} was .* now config.json says {value}; put it"):
        Trainer(*run_config(str(cut), {}))


def test_what_the_command_of_the_beginning_gave_is_no_change(cut, tmp_path):
    run_config(str(cut), {"output_dir": str(cut), "gradient_checkpointing": "auto", "engine": "auto"})
    with pytest.raises(ValueError, match=r"--output-dir .*elsewhere: --resume continues in .*cut"):
        run_config(str(cut), {"output_dir": str(tmp_path / "elsewhere")})
    moved = cut.rename(tmp_path / "moved")
    Trainer(*run_config(str(moved), {}))


@pytest.mark.parametrize("part", checkpoint.RECORDED)
def test_a_damaged_record_is_one_error(cut, part):
    record = json.loads((cut / "config.json").read_text())
    write_json(cut / "config.json", {k: v for k, v in record.items() if k != part})
    with pytest.raises(ValueError, match=r"holds no run .*damaged"):
        Trainer(*run_config(str(cut), {}))


@pytest.mark.parametrize("commits", ["abc", [1], {"a/b": 5}, {"a/b": "main"}, None])
def test_damaged_commits_are_one_error(cut, commits):
    write_json(cut / "config.json", json.loads((cut / "config.json").read_text()) | {"commits": commits})
    with pytest.raises(ValueError, match="holds no run"):
        Trainer(*run_config(str(cut), {}))


@pytest.mark.parametrize("key", ["precision", "engine", "base.revision", "base.fingerprint", "data.sha256"])
def test_a_record_that_lost_a_value_is_no_traceback(cut, key):
    record = json.loads((cut / "config.json").read_text())
    *path, last = key.split(".")
    part = record[path[0]] if path else record
    kept = part.pop(last)
    write_json(cut / "config.json", record)
    try:
        Trainer(*run_config(str(cut), {})).lock.file.close()
        assert kept is None
    except ValueError as e:
        assert str(e).startswith(f"--resume {cut}: ")


def test_another_version_or_gpu_is_a_note(cut, monkeypatch, capsys):
    now = {**resuming.versions(), "torch": "0.1", "gpu": "another"}
    monkeypatch.setattr(resuming, "versions", lambda: now)
    Trainer(*run_config(str(cut), {}))
    out = capsys.readouterr().out
    assert "now 0.1: the run continues, but not bit for bit" in out and "note: gpu was None, now another" in out
    assert out.count("note: ") == 2


@pytest.mark.parametrize("line", [b"\xff\xfe\0", b"[1]", b"7", b'{"evenu": "end"}', b"[" * 10**5])
def test_a_damaged_line_of_metrics_is_passed_over(cut, line):
    path = cut / "metrics.jsonl"
    events = checkpoint.read_metrics(cut)
    path.write_bytes(line + b"\n" + path.read_bytes())
    assert checkpoint.read_metrics(cut) == events and not checkpoint.is_finished(cut)
    path.write_bytes(path.read_bytes() + b'{"event": "end"}\n')
    assert checkpoint.is_finished(cut)


def test_metrics_that_lost_their_end_are_named(cut, capsys):
    os.truncate(cut / "metrics.jsonl", 10)
    Trainer(*run_config(str(cut), {}))
    assert "was cut short (10 bytes" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Two at once
# ---------------------------------------------------------------------------------------------------------------------


def hold(run: Path, barrier, answers) -> None:
    """A process that takes the lock, or not, and stays."""
    barrier.wait(60)
    try:
        lock = checkpoint.Lock(run)
    except ValueError as e:
        answers.put(("refused", os.getpid(), str(e)))
        return
    answers.put(("began", os.getpid(), lock.file.name))
    time.sleep(60)


def test_of_two_that_start_at_once_one_wins_and_its_lock_ends_with_it(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    both = [context.Process(target=hold, args=(tmp_path, barrier, answers), daemon=True) for _ in range(2)]
    for process in both:
        process.start()
    got = {kind: rest for kind, *rest in [answers.get(timeout=60) for _ in both]}
    assert got.keys() == {"began", "refused"}
    winner = got["began"][0]
    with pytest.raises(ValueError, match=f"process {winner} on .* is training there"):
        checkpoint.Lock(tmp_path)
    os.kill(winner, signal.SIGKILL)
    for process in both:
        process.join()
    checkpoint.Lock(tmp_path).file.close()


@slow
def test_of_two_trainings_that_start_at_once_one_wins(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--demo", "--max-steps", "5", "--output-dir", "same"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    (refused,) = [e for e, process in zip(errors, both) if process.returncode == 2]
    assert re.search("is training there|never overwritten", refused) and refused.count("\n") == 1
    assert checkpoint.is_finished(tmp_path / "same")
    assert [e["step"] for e in checkpoint.read_metrics(tmp_path / "same")] == [0, 5, 5, 5]


def test_the_lock_outlives_clean_and_ends_with_the_run(make):  # noqa: F811
    trainer = make(**OPTIONS)
    checkpoint.clean(trainer.folder)
    with pytest.raises(ValueError, match="is training there"):
        checkpoint.Lock(trainer.folder)
    assert not os.get_inheritable(trainer.lock.file.fileno())
    trainer.train()
    checkpoint.Lock(trainer.folder).file.close()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])  # the last also without fcntl
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, error):
    import fcntl

    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with checkpoint.Lock(tmp_path):
        err = capsys.readouterr().err
    assert err.startswith("warning: no locks here") and err.count("\n") == 1 and str(tmp_path) in err


def test_another_error_of_the_lock_is_not_passed_over(tmp_path, monkeypatch):
    import fcntl

    def refuse(*_):
        raise OSError(errno.EIO, "x")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError):
        checkpoint.Lock(tmp_path)


def test_a_directory_that_cannot_be_written_to_names_its_option(make, cut, monkeypatch, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output-dir .*below: can't be written to \(Not a directory\)"):
        make("file/below", **OPTIONS)

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(checkpoint, "Lock", refuse)
    with pytest.raises(ValueError, match=r"--resume .*cut: can't be written to \(Read-only file system\)"):
        Trainer(*run_config(str(cut), {}))
    monkeypatch.undo()
    monkeypatch.setattr(qlora_min.run.trainer, "write_json", refuse)
    with pytest.raises(ValueError, match=r"--output-dir .*new: can't be written to \(Read-only"):
        make("new", **OPTIONS)


def test_a_start_that_fails_leaves_no_folder(make, tmp_path):  # noqa: F811
    with pytest.raises(ValueError):
        make("bad", **OPTIONS, targets=("no_such_layer",))
    assert not (tmp_path / "bad").exists()
    make("good", **OPTIONS).lock.file.close()
    (tmp_path / "good" / "config.json").unlink()  # the disk was full then
    make("good", **OPTIONS)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def rss() -> float:
    """This process's resident memory, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_flat(make):  # noqa: F811
    """2,000 steps with evaluations and checkpoints: resident and peak memory within 2% of those at step 200."""
    options = {**OPTIONS, "grad_accum": 1, "epochs": 1000, "max_steps": 2000, "eval_every": 100, "patience": 10_000}
    trainer, seen = make(**options, learning_rate=1e-4), {}
    step = trainer.stepper.step

    def watch(*meanwhile):
        seen[trainer.progress.step] = rss(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        return step(*meanwhile)

    trainer.stepper.step = watch
    trainer.train()
    (rss_then, peak_then), (rss_now, peak_now) = seen[200], seen[1999]
    print(f"rss {rss_then:.1f} -> {rss_now:.1f} MiB, peak {peak_then:.1f} -> {peak_now:.1f} MiB")
    assert rss_now <= 1.02 * rss_then and peak_now <= 1.02 * peak_then
