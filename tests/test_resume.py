"""A stopped run goes on as if it never had: bit for bit, wherever it was stopped and by what."""

import copy
import errno
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import ROOT, assert_same
from safetensors.torch import load_file, save_file
from test_adapter import give_effect
from test_training import last_checkpoint, make, on_the_cpu, saved_adapter, trained  # noqa: F401
from transformers import AutoModelForCausalLM

from qlora_min import loop
from qlora_min.adapter import AdapterConfig, load_adapter
from qlora_min.demo import world
from qlora_min.evaluation import evaluate_rows
from qlora_min.fused.select import make_engine
from qlora_min.lora import lora_layers
from qlora_min.optim import TrainingError
from qlora_min.run import checkpoint, ending, writer
from qlora_min.run import resume as resuming
from qlora_min.run.resume import run_config, with_adapter
from qlora_min.run.trainer import Trainer
from qlora_min.system.files import write_json

CLOCK = {"seconds", "window_seconds", "tokens_per_second", "peak_memory_gib"}
STEPS = 20
OPTIONS = {
    "rows": 7,  # 4 steps an epoch, the last of one row
    "batch_size": 1,
    "learning_rate": 2e-2,
    "held": 4,
    "epochs": 5,
    "precision": "fp16",
    "rank": 64,  # the larger tensors have 8-bit state
    "alpha": 96.0,
    "eval_every": 3,
    "log_every": 4,  # lines in metrics and checkpoints fall apart
    "save_every": 1,
    "patience": 3,
}


@pytest.fixture(autouse=True)
def worse(monkeypatch):
    """The held-out loss of a `hard` run is least at step 12 on every machine: early stopping has something to count."""
    evaluate = loop.evaluate_rows

    def evaluate_worse(engine, *args):
        result, trainer = evaluate(engine, *args), getattr(engine, "hard", None)
        if trainer is None:
            return result
        loss = result.loss / 1000 + abs(trainer.progress.step - 12)
        return replace(result, loss_sum=loss * result.supervised_tokens)

    monkeypatch.setattr(loop, "evaluate_rows", evaluate_worse)


def hard(trainer: Trainer, also=lambda trainer: None) -> Trainer:
    """Make a run depend on all that a checkpoint must hold: a scale that moves, a skipped step, and see `worse`."""
    trainer.feed.engine.hard = trainer
    trainer.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=4)
    step, names = trainer.stepper.step, list(trained(trainer))

    def wrapped(*meanwhile):
        if trainer.progress.step == 5:
            trained(trainer)[names[-1]].grad[0, 0] = float("inf")
        also(trainer)
        return step(*meanwhile)

    trainer.stepper.step = wrapped
    return trainer


def resume(run: Path, monkeypatch) -> Trainer:
    """As another process would: with other random numbers, which nothing may depend on."""
    random.seed(999), np.random.seed(999), torch.manual_seed(999)
    config, run = run_config(str(run), {})
    with monkeypatch.context() as m:  # `hard` has to come before the checkpoint's state
        restore = resuming.restore
        m.setattr(resuming, "restore", lambda trainer: restore(hard(trainer)))
        return Trainer(config, resume=run)


def plain(state: dict) -> dict:
    """A checkpoint's state without times, and what depends on the length of their digits."""
    progress = {k: v for k, v in state["progress"].items() if k not in CLOCK}
    return {**state, "progress": progress, "metrics_bytes": None}


def outcome(run: Path, all_of_it: bool = True) -> dict:
    """All that a run leaves, apart from times and memory; or what it leaves also if some saves failed."""
    events = [{k: v for k, v in e.items() if k not in CLOCK} for e in checkpoint.read_metrics(run)]
    best = run / "checkpoints" / f"step-{events[-1]['best_step']}"
    return {
        "events": events,
        "state": plain(last_checkpoint(run)),
        "best": plain(checkpoint.load_checkpoint(best)) if all_of_it else None,
        "adapter": saved_adapter(run),
        "samples": (run / "samples.jsonl").read_text() if all_of_it else None,
    }


@pytest.fixture(params=["fused", pytest.param("modules", marks=pytest.mark.slow)])
def snapshots(make, tmp_path, monkeypatch, request):  # noqa: F811
    """(outcome of a whole run, {step: its directory as a kill just behind its checkpoint leaves it}, options)."""
    save, found = checkpoint.save_checkpoint, {}

    def keep(run, step, *args, **kwargs):
        save(run, step, *args, **kwargs)
        found[step] = Path(shutil.copytree(run, tmp_path / f"killed-{step}"))

    options = {**OPTIONS, "engine": request.param}
    trainer = hard(make("whole", **options))
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_checkpoint", keep)
        trainer.train()
    result = outcome(trainer.folder)
    assert list(found) == list(range(STEPS + 1))
    train = [e for e in result["events"] if e["event"] == "train"]
    assert [e["step"] for e in train] == [3, 4, 6, 8, 9, 12, 15, 16, 18, 20]
    assert train[-1]["skipped"] >= 1
    assert result["events"][-1]["best_step"] == 12
    assert result["state"]["progress"]["bad_evaluations"] == 3 and trainer.progress.stopped_early
    assert result["state"]["stepper"]["scaler"]["scale"] not in (128.0, 65536.0)
    return result, found, options


SOME = [6, 13]  # after the skipped step; between two lines and after the best


@pytest.mark.parametrize("steps", [SOME, pytest.param(range(1, STEPS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_killed_after_any_step(snapshots, monkeypatch, steps):
    whole, found, _ = snapshots
    for step in steps:
        resumed = resume(found[step], monkeypatch)
        assert resumed.progress.step == step
        resumed.train()
        assert_same(outcome(resumed.folder), whole, f"killed after step {step}")


@pytest.mark.parametrize("steps", [[12], pytest.param(range(1, STEPS), marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_signal_at_any_step(make, monkeypatch, capsys, steps):  # noqa: F811
    """It stops after the step; an evaluation that is due there is left to the resumed run."""
    options = {**OPTIONS, "save_every": None, "precision": "fp32"}
    whole = hard(make("whole", **options))
    whole.train()
    for at in steps:
        number = (signal.SIGTERM, signal.SIGINT)[at % 2]
        before = signal.getsignal(number)

        def send(trainer, at=at, number=number):
            if trainer.progress.step == at - 1:
                os.kill(os.getpid(), number)

        stopped = hard(make(f"at {at}", **options), send)
        with pytest.raises(SystemExit) as end:
            stopped.train()
        assert end.value.code == 128 + number
        assert signal.getsignal(number) is before
        assert f"--resume '{stopped.folder}'" in capsys.readouterr().err
        state = last_checkpoint(stopped.folder)["progress"]
        assert (state["step"], state["evaluated"]) == (at, (at - 1) // 3 * 3)
        resumed = resume(stopped.folder, monkeypatch)
        resumed.train()
        assert_same(outcome(resumed.folder), outcome(whole.folder), f"stopped after step {at}")


@pytest.mark.parametrize("where", ["first evaluation", "evaluation", "samples"])
def test_a_signal_while_nothing_can_be_lost_ends_it_at_once(make, monkeypatch, where):  # noqa: F811
    """An evaluation leaves no trace, and the samples are written by the resumed run."""
    options = {**OPTIONS, "save_every": None, "max_steps": 6, "precision": "fp32"}
    whole = hard(make("whole", **options))
    whole.train()
    owner, name, at = {
        "first evaluation": (loop, "evaluate_rows", 0),
        "evaluation": (loop, "evaluate_rows", 3),
        "samples": (ending, "write_samples", 6),
    }[where]
    with monkeypatch.context() as m:
        inner = getattr(owner, name)

        def interrupted(*args):
            result = inner(*args)
            if stopped.progress.step == at:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
                raise AssertionError("not abandoned")
            return result

        m.setattr(owner, name, interrupted)
        stopped = hard(make("stopped", **options))
        with pytest.raises(SystemExit, match="143"):
            stopped.train()
    assert last_checkpoint(stopped.folder)["progress"]["step"] == at
    assert sum(e["event"] == "eval" for e in checkpoint.read_metrics(stopped.folder)) == {0: 0, 3: 1, 6: 3}[at]
    assert not checkpoint.is_finished(stopped.folder)
    resumed = resume(stopped.folder, monkeypatch)
    resumed.train()
    assert_same(outcome(resumed.folder), outcome(whole.folder))


# ---------------------------------------------------------------------------------------------------------------------
# A run that goes on from an adapter
# ---------------------------------------------------------------------------------------------------------------------

FROM_PEFT = {"r": 4, "lora_alpha": 10, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "down_proj"],
             "rank_pattern": {"k_proj": 3}, "layers_to_transform": [0, 3], "lora_dropout": 0.2}  # fmt: skip
NEW_DATA = {"held": 4, "max_steps": 6, "eval_every": 3, "log_every": 2, "save_every": 1}


@pytest.fixture
def another(tmp_path) -> Path:
    """An adapter that PEFT made, in which ranks differ."""
    model = AutoModelForCausalLM.from_pretrained(world.MODEL_DIR, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **FROM_PEFT))
    give_effect([p for n, p in model.named_parameters() if ".lora_" in n])
    model.save_pretrained(tmp_path / "another")
    return tmp_path / "another"


def options_from(adapter: Path, **options) -> dict:
    """As train.py makes them: what is not given is the adapter's."""
    given = with_adapter({"adapter": str(adapter), **options})
    return {"rank": 16, "alpha": 24.0, "dropout": 0.1, **NEW_DATA, **given}


def test_a_run_goes_on_from_peft_s_adapter(make, another, capsys):  # noqa: F811
    """Step 0 is evaluated with it; rank, alpha, targets and dropout are its own; the result is PEFT's format again."""
    first = load_file(another / "adapter_model.safetensors")
    trainer = make("on", **options_from(another))
    assert "goes on in --quantization nf4, the default" in capsys.readouterr().err
    c = trainer.config
    assert (c.rank, c.alpha, c.rslora, c.dropout) == (4, 10.0, True, 0.2) and c.model == str(world.MODEL_DIR)
    assert len(trainer.wrapped) == 2 * 3
    assert {m.spec.rank for n, m in lora_layers(trainer.base.model).items() if "k_proj" in n} == {3}
    assert all(torch.equal(p, first[f"base_model.model.{n}.weight"]) for n, p in trained(trainer).items())
    trainer.train()
    out = capsys.readouterr().out
    assert f"goes on     from {another}, sha256" in out and "rank 3 to 4 on 6 layers" in out

    own = load_adapter(another, quantization="nf4")
    engine = make_engine(own, "fused", 512)[0]
    assert trainer.progress.before["loss"] == pytest.approx(evaluate_rows(engine, trainer.held_out, 8).loss, rel=1e-5)
    assert trainer.progress.best["loss"] < trainer.progress.before["loss"]
    saved = trainer.folder / "adapter"
    assert AdapterConfig.read(saved).lora == AdapterConfig.read(another).lora
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.MODEL_DIR), saved)
    assert sum(".lora_A" in n for n, _ in theirs.named_parameters()) == 6
    card = (saved / "README.md").read_text()
    assert "| | the adapter it went on from | with the adapter |" in card and str(another.parent) not in card
    again = make("again", **options_from(saved))  # and on from that: our own record says the quantization
    assert again.config.quantization == "nf4" and not capsys.readouterr().err


def test_another_option_than_the_adapters_is_refused(make, another):  # noqa: F811
    for name, value in (("rank", 8), ("alpha", 8.0), ("targets", ("q_proj",)), ("rslora", False)):
        with pytest.raises(ValueError, match=f"--{name}: got .*, but --adapter {another} has .*; leave it out"):
            make("wrong", **options_from(another, **{name: value}))
    assert make("right", **options_from(another, rank=4, dropout=0.0)).config.dropout == 0.0


def test_another_base_is_refused_from_an_adapter_of_ours(make, tmp_path):  # noqa: F811
    trainer = make("run", max_steps=1)
    trainer.train()
    other = tmp_path / "other"
    shutil.copytree(world.MODEL_DIR, other)
    tensors = load_file(other / "model.safetensors")
    save_file({n: t * 1.01 for n, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was trained on another base"):
        make("on", **options_from(trainer.folder / "adapter", model=str(other)))


@pytest.mark.parametrize("killed", [0, 4])
def test_it_resumes_without_the_adapters_folder_once_there_is_a_checkpoint(make, another, monkeypatch, killed):  # noqa: F811
    given = options_from(another, precision="fp32")
    whole = hard(make("whole", **given))
    whole.train()
    stopped = hard(make("stopped", **given))

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        if killed:
            step_ended = writer.RunWriter.step_ended
            m.setattr(writer.RunWriter, "step_ended", lambda self, p, *a, **k: (
                crash() if p.step > killed else step_ended(self, p, *a, **k)))  # fmt: skip
        else:
            m.setattr(loop, "evaluate_rows", crash)
        stopped.train()
    assert bool(checkpoint.checkpoint_steps(stopped.folder)) == bool(killed)
    if killed:
        shutil.rmtree(another)
    else:
        weights = another / "adapter_model.safetensors"
        good = weights.read_bytes()
        save_file({n: t * 2 for n, t in load_file(weights).items()}, weights)
        with pytest.raises(
            ValueError, match=r"has no checkpoint yet, and '.*' is no longer the file that it began with"
        ):
            resume(stopped.folder, monkeypatch)
        weights.write_bytes(good)
    resumed = resume(stopped.folder, monkeypatch)
    assert resumed.progress.step == killed
    resumed.train()
    assert_same(outcome(resumed.folder), outcome(whole.folder))


def test_a_finished_run_says_how_to_go_on(make, script):  # noqa: F811
    trainer = make("run", held=2, max_steps=1)
    trainer.train()
    refused = script("train.py", "--resume", trainer.folder, expect=2).stderr
    way = re.search(r"go on from its adapter, in a new run, with: (--adapter \S+ --epochs) N", refused)[1]
    data = ["--dataset", trainer.config.dataset[0], "--eval-fraction", 0, "--output-dir", "on"]
    done = script("train.py", *shlex.split(way), 1, *data, "--max-steps", 1)
    assert f"goes on     from {trainer.folder / 'adapter'}" in done.stdout
    script("train.py", *shlex.split(way), 1, *data, "--preview", 1)


# ---------------------------------------------------------------------------------------------------------------------
# Everything is in a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def parts(state: dict, path: tuple = ()):
    """The paths of all that a checkpoint holds: down to a parameter's optimizer state, and to one random generator."""
    for key, value in state.items():
        if isinstance(value, dict) and value and key not in ("before", "best"):
            yield from parts(value, (*path, key))
        else:
            yield *path, key


def at(state: dict, path: tuple):
    for key in path:
        state = state[key]
    return state


# The same in every run: what never changes, and clocks of a fresh start.
CONSTANT = {"options", "growth_factor", "backoff_factor", "growth_interval", "qmap1", "qmap2", "param_groups"}


def state_of(trainer: Trainer) -> dict:
    return trainer.writer.state(trainer.progress)


def restore(trainer: Trainer) -> None:
    trainer.progress = resuming.restore(trainer)


def test_all_of_the_state_comes_back_and_nothing_may_be_missing(snapshots, make, monkeypatch):  # noqa: F811
    """What a resumed run would save at once is what was saved; and each part differs from a fresh run's."""
    _, found, options = snapshots
    fresh = state_of(hard(make("fresh", **options)))
    step, state = checkpoint.newest_checkpoint(found[17])
    state["progress"] |= {"stopped_early": True}  # these two are as in a fresh run at step 17
    state["stepper"]["skipped_in_a_row"] = 1
    monkeypatch.setattr(checkpoint, "newest_checkpoint", lambda run: (step, copy.deepcopy(state)))
    resumed = resume(found[17], monkeypatch)
    assert_same(state_of(resumed), state)

    paths = list(parts(state))
    assert ("progress", "loss_sum") in {p[:2] for p in paths}
    assert any(p[-1] == "absmax1" for p in paths)  # 8-bit state
    for path in paths:
        if CONSTANT & set(path) or path[-1] == "before":
            continue
        try:
            same_as_fresh = at(fresh, path)
        except KeyError:
            continue
        with pytest.raises((AssertionError, AttributeError)):
            assert_same(at(state, path), same_as_fresh, path)

    first = str(next(iter(state["adapter"])))
    for path in paths:  # of the many tensors, one parameter's
        if ("state" in path and 0 not in path) or ("adapter" in path[0] and path[1] != first):
            continue
        parent, key = at(state, path[:-1]), path[-1]
        value = parent.pop(key)
        with pytest.raises((ValueError, KeyError, AssertionError)):
            restore(resumed)
            parent[key] = value
            assert_same(state_of(resumed), state)
        parent[key] = value
    restore(resumed)
    assert_same(state_of(resumed), state)  # whole again, so it was not for another reason


@pytest.mark.parametrize("engine", ["modules", "fused"])
def test_training_draws_no_random_numbers_of_libraries(make, engine):  # noqa: F811
    """So a checkpoint needs no generator's state: disturbed before each step, a run makes the same bits."""
    adapters = []
    for disturbed in (False, True):
        trainer = make(f"{engine}{disturbed}", engine=engine, dropout=0.2, max_steps=4)
        save = trainer.writer.save

        def disturb(*args, save=save, disturbed=disturbed):
            if disturbed:
                for seed in (random.seed, np.random.seed, torch.manual_seed):
                    seed(7)
            return save(*args)

        trainer.writer.save = disturb
        trainer.train()
        adapters.append(saved_adapter(trainer.folder))
    assert_same(*adapters)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("precision", "bf16", "it was trained in bf16, here --precision auto is fp32"),
    ("engine", "modules", "it began with --engine 'modules', put that back"),
])  # fmt: skip
def test_another_way_to_compute_is_refused(make, key, value, words):  # noqa: F811
    trainer = make("run", rows=8, max_steps=1)
    run = trainer.folder
    trainer.lock.file.close()
    record = checkpoint.read_record(run)
    write_json(run / "config.json", record | {key: value})
    config, run = run_config(str(run), {})
    with pytest.raises(ValueError, match=words):
        Trainer(config, resume=run)


@pytest.mark.parametrize(("asked", "resolved"), [("auto", "fused"), ("fused", "fused"), ("modules", "modules")])
def test_the_engine_is_recorded_and_kept(make, asked, resolved):  # noqa: F811
    trainer = make("run", rows=8, max_steps=1, engine=asked)
    record = checkpoint.read_record(trainer.folder)
    assert record["engine"] == record["options"]["engine"] == resolved
    trainer.lock.file.close()
    other = {"modules": "fused", "fused": "modules"}[resolved]
    with pytest.raises(ValueError, match=f"--engine was '{resolved}' when the run began, now '{other}'"):
        run_config(str(trainer.folder), {"engine": other})
    for given in ({}, {"engine": "auto"}, {"engine": resolved}):
        resumed = Trainer(*run_config(str(trainer.folder), given))
        assert type(resumed.engine) is type(trainer.engine) and resumed.config.engine == resolved
        resumed.lock.file.close()


def test_a_run_of_an_earlier_version_is_not_resumed_but_evaluated(make, script):  # noqa: F811
    """Its config.json has no engine, and options that are gone."""
    trainer = make("run", held=3, max_steps=2, eval_every=1)
    trainer.train()
    metrics = trainer.folder / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.open() if '"end"' not in line))
    trained = script("eval.py", "--adapter", trainer.folder / "adapter", "--json").stdout
    record = checkpoint.read_record(trainer.folder)
    del record["engine"], record["options"]["engine"]
    record["options"]["packing"], record["packed"] = "auto", True
    write_json(trainer.folder / "config.json", record)
    refused = script("train.py", "--resume", trainer.folder, expect=2).stderr
    begun = "it was begun by an earlier version of qlora_min, whose "
    assert refused.startswith(f"error: --resume {trainer.folder}: {begun}")
    assert refused.count("\n") == 1
    assert script("eval.py", "--adapter", trainer.folder / "adapter", "--json").stdout == trained
    assert json.loads(trained)


def test_a_file_system_that_fails_says_nothing_about_a_checkpoint(make, monkeypatch):  # noqa: F811
    """A read that fails in passing ends the resume; the checkpoint is not set aside as damaged."""
    trainer = make("run", rows=8, max_steps=1)
    trainer.train()

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as m, pytest.raises(OSError, match="Input/output"):
        m.setattr(checkpoint, "sha256", fail)
        checkpoint.newest_checkpoint(trainer.folder)
    assert checkpoint.newest_checkpoint(trainer.folder)[0] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Real processes
# ---------------------------------------------------------------------------------------------------------------------

DEMO = ["--demo", "--max-steps", "40", "--eval-every", "10", "--log-every", "7", "--limit", "320"]
DEMO += ["--batch-size", "8", "--eval-limit", "20"]


def start(tmp_path: Path, *options: str, **kwargs) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *DEMO, *options]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for(what, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGHUP))],
    ids=["SIGTERM", "SIGINT", "SIGHUP"],
)
def test_a_signal_to_the_script(tmp_path, script, number):
    """It saves and exits with 128 + its number; the command that it prints goes on, with --demo beside it too."""
    process = start(tmp_path, "--output-dir", "my run")
    metrics = tmp_path / "my run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 14' in metrics.read_text())
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    step = checkpoint.checkpoint_steps(tmp_path / "my run")[-1]
    assert 14 <= step < 40
    command = re.search(r"continue with: (.*)\n", err)[1]
    name, *options = shlex.split(command)[1:]
    assert name == str(ROOT / "scripts" / "train.py") and options == ["--resume", "my run"]
    one = script("train.py", *options, *DEMO, "--rank", 4, expect=2)
    assert "--rank was 16 when the run began, now 4" in one.stderr
    script("train.py", *options, *DEMO)
    script("train.py", *DEMO, "--output-dir", "whole")
    assert_same(outcome(tmp_path / "my run"), outcome(tmp_path / "whole"))


@pytest.mark.slow
def test_a_signal_while_loading(tmp_path):
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start(tmp_path, "--output-dir", "run")
        process.stdout.readline()  # the data have been read
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert "Traceback" not in err and not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    code = """
import time
from qlora_min.run.signals import Signals
with Signals("advice") as signals:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    while "once more to exit at once" not in (line := process.stderr.readline()):
        assert line == "\n"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "SIGTERM again: exiting at once" in err and "advice" not in err


# ---------------------------------------------------------------------------------------------------------------------
# When a checkpoint is due
# ---------------------------------------------------------------------------------------------------------------------


def saved_steps(trainer: Trainer, monkeypatch) -> list[int]:
    save, steps = checkpoint.save_checkpoint, []
    monkeypatch.setattr(
        checkpoint, "save_checkpoint", lambda r, step, *a, **k: steps.append(step) or save(r, step, *a, **k)
    )
    trainer.train()
    return steps


@pytest.mark.parametrize(("every", "steps"), [(None, [0, 6, 12]), (4, [0, 4, 6, 8, 12])])
def test_save_every(make, monkeypatch, every, steps):  # noqa: F811
    options = {"held": 0, "max_steps": 12, "precision": "fp32", "eval_every": 6, "save_every": every}
    trainer = make(**OPTIONS | options)
    assert saved_steps(trainer, monkeypatch) == steps


@pytest.mark.parametrize(("minutes", "steps"), [(5.0, [0, 5, 10, 12]), (0.0, [0, 12])])
def test_save_minutes(make, monkeypatch, minutes, steps):  # noqa: F811
    """With a clock on which a step takes a minute and a second."""
    options = {"held": 0, "max_steps": 12, "precision": "fp32", "eval_every": 100, "save_every": None}
    trainer = make(**OPTIONS | options | {"save_minutes": minutes})
    monkeypatch.setattr(writer.time, "monotonic", lambda: 61.0 * trainer.progress.step)
    trainer.writer.saved_at = 0.0
    assert saved_steps(trainer, monkeypatch) == steps


def test_a_run_that_fails_saves_nothing_over_what_is_good(make, monkeypatch):  # noqa: F811
    """A layer that does not train ends it after three steps; no checkpoint is written for that."""
    trainer = make(**OPTIONS | {"held": 0, "precision": "fp32", "save_every": None, "eval_every": 2})
    trainer.base.model.get_submodule(trainer.wrapped[5]).enabled = False
    with pytest.raises(TrainingError, match="did not move"):
        saved_steps(trainer, monkeypatch)
    assert checkpoint.checkpoint_steps(trainer.folder) == [0, 2]


def test_a_checkpoint_of_another_version_is_refused(make, monkeypatch):  # noqa: F811
    trainer = make(**OPTIONS | {"held": 0, "precision": "fp32"})
    trainer.writer.write_all(trainer.progress)
    trainer.lock.file.close()
    monkeypatch.setattr(writer.RunWriter, "state", lambda self, progress: {"progress": {"step": 0}, "stepper": {}})
    with pytest.raises(ValueError, match="another version of qlora_min"):
        Trainer(*run_config(str(trainer.folder), {}))
