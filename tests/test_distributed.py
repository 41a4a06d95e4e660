"""Several processes: the same run as one, and what happens to one of them reaches all.

Processes are forked, so that the imports are paid once, and run scripts/train.py as torchrun would start it.
"""

import ctypes
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pandas  # noqa: F401 (pyarrow would import it in each process)
import pytest
import torch
from conftest import ROOT, assert_same
from hypothesis import given
from hypothesis import strategies as st
from test_resume import outcome, wait_for
from test_training import conversations, last_checkpoint, relative, saved_adapter

import qlora_min.data.examples
import qlora_min.evaluation
import qlora_min.fused.decoder
import qlora_min.run.curves
import qlora_min.run.ending
import qlora_min.run.resume
import qlora_min.run.trainer
import qlora_min.run.writer
from qlora_min import loop
from qlora_min.base import load_base
from qlora_min.batches import balance
from qlora_min.demo import world
from qlora_min.evaluation import Evaluation, evaluate_rows
from qlora_min.fused.select import make_engine
from qlora_min.lora import lora_parameters
from qlora_min.run import checkpoint, forecast
from qlora_min.run.trainer import Trainer
from qlora_min.scale import processes, sharding

CPU = torch.device("cpu")
slow = pytest.mark.slow
OPTIONS = {
    "batch_size": 2,
    "grad_accum": 2,
    "learning_rate": 1e-3,
    "rank": 16,
    "alpha": 24,
    "dropout": 0.1,  # whose masks do not depend on which process computes a row
    "optimizer": "adamw",
    "precision": "fp32",
    "gradient_checkpointing": "off",
    "micro_batch_tokens": 300,
    "epochs": 3,  # 9 steps of 4, 4 and 1 rows: in the last of an epoch all processes but one have none
    "eval_every": 3,
    "log_every": 1,
}


@pytest.fixture
def run(tmp_path, write_rows):
    """run(count, **options) -> train on 9 ragged rows in so many processes; how each ended.

    `change(index)` is called in each process before: it may break what it likes.
    """
    write_rows(conversations(9, seed=1), "train.jsonl")
    write_rows(conversations(5, seed=2), "held.jsonl")

    def run(count: int, name: str = "run", resume: bool = False, change=lambda index: None, expect=0, **options):
        files = {"model": world.MODEL_DIR, "dataset": tmp_path / "train.jsonl", "eval_dataset": tmp_path / "held.jsonl"}
        given = {**files, **OPTIONS, **options, "output_dir": tmp_path / name}
        flags = {k: f"--{'' if v is True else 'no-'}{k}" for k, v in given.items() if isinstance(v, bool)}
        arguments = [flags.get(k, f"--{k.replace('_', '-')}={v}") for k, v in given.items()]
        arguments = ["--resume", str(tmp_path / name)] if resume else arguments
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        started = [
            fork.Process(target=train, args=(index, count, port, tmp_path, arguments, change)) for index in range(count)
        ]
        for p in started:
            p.start()
        end = time.monotonic() + 120
        try:
            for p in started:
                p.join(max(0, end - time.monotonic()))
                assert p.exitcode is not None, "it hangs"
        finally:
            for p in started:
                p.kill()
        found = SimpleNamespace(
            run=tmp_path / name,
            codes=[p.exitcode for p in started],
            out=[(tmp_path / f"out-{index}").read_text() for index in range(count)],
            err=[(tmp_path / f"err-{index}").read_text() for index in range(count)],
        )
        if expect is not None:
            assert found.codes == [expect] * count, "\n".join(found.err)
        return found

    return run


def train(index: int, count: int, port: int, folder: Path, arguments: list[str], change) -> None:
    """One of the processes, from torchrun's environment to its end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with its parent
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{index}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    if count > 1:
        values = {
            "RANK": index,
            "LOCAL_RANK": index,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_PORT": port,
        }
        os.environ |= {k: str(v) for k, v in values.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads that the tests before this one used stayed behind
    torch.cuda.is_available = lambda: False
    qlora_min.run.ending.SAMPLE_TOKENS = 4
    qlora_min.run.curves.draw_curves = lambda *args: None  # matplotlib takes seconds
    change(index)
    sys.argv = [str(ROOT / "scripts" / "train.py"), *arguments]
    os.chdir(folder)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def before_step(at: int, action, where: int = 1):
    """A change for `run`: `action(trainer)` in one process, when so many steps lie behind it."""

    def change(index: int) -> None:
        compute_gradients = loop.compute_gradients

        def wrapped(feed, stepper, seed, progress, writer):
            if index == where and progress.step == at:
                action(writer.trainer)
            return compute_gradients(feed, stepper, seed, progress, writer)

        loop.compute_gradients = wrapped

    return change


def before_sum(number: int, action):
    """A change for `run`: `action(grads)` in process 1, before it sums the gradients for the number-th time."""

    def change(index: int) -> None:
        inner, sums = processes.Processes.sum_step, []

        def wrapped(self, loss, grads):
            sums.append(loss)
            if index == 1 and len(sums) == number:
                action(grads)
            return inner(self, loss, grads)

        processes.Processes.sum_step = wrapped

    return change


def events(run: Path, kind: str) -> list[dict]:
    return [e for e in checkpoint.read_metrics(run) if e["event"] == kind]


def result(run: Path) -> dict:
    """A run's outcome without what processes waited for each other."""
    found = outcome(run)
    found["events"] = [{k: v for k, v in e.items() if k not in ("waited", "summed")} for e in found["events"]]
    return found


def assert_equal_runs(mine: Path, reference: Path, bound: float = 1e-5) -> None:
    """Losses to 1e-6 and the adapter to a bound: equal but for the order of sums."""
    for kind, keys in (("train", ("loss", "grad_norm", "lr")), ("eval", ("eval_loss", "token_accuracy"))):
        a, b = events(mine, kind), events(reference, kind)
        assert [e["step"] for e in a] == [e["step"] for e in b] and a
        for x, y in zip(a, b):
            for key in keys:
                assert x[key] == pytest.approx(y[key], rel=1e-6 if "loss" in key else 1e-5), (kind, x["step"], key)
    (a,), (b,) = events(mine, "end"), events(reference, "end")
    assert (a["tokens"], a["step"], a["best_step"]) == (b["tokens"], b["step"], b["best_step"])
    weights, theirs = (last_checkpoint(run)["adapter"] for run in (mine, reference))
    assert weights.keys() == theirs.keys()
    for name in weights:
        assert relative(weights[name], theirs[name]) < bound, name
    for name, w in saved_adapter(mine).items():
        assert relative(w, saved_adapter(reference)[name]) < bound, name


# ---------------------------------------------------------------------------------------------------------------------
# The same mathematics
# ---------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 9))
def test_balance(lengths, count):
    """Every row once; no part has more than the mean and the longest row; a function of its arguments alone."""
    parts = balance(lengths, count)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert len(parts) == count and all(part == sorted(part) for part in parts)
    filled = [sum(lengths[i] for i in part) for part in parts]
    assert max(filled) <= sum(lengths) / count + max(lengths, default=0)
    assert max(filled) - min(filled) <= max(lengths, default=0)
    assert balance(lengths, count) == parts


def test_balance_is_even():
    """Real rows, 16 for each of 2, 4 and 8 processes: the busiest has less than 2% more than the mean."""
    rng = random.Random(0)
    for count in (2, 4, 8):
        lengths = [rng.randint(137, 530) for _ in range(16 * count)]
        filled = [sum(lengths[i] for i in part) for part in balance(lengths, count)]
        assert max(filled) < 1.02 * sum(filled) / count


def the_first_alone_writes(index: int) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError(f"process {index} writes")

    if index:
        for name in ("Lock", "save_checkpoint", "clean"):
            setattr(checkpoint, name, refuse)
        qlora_min.run.writer.atomic_folder = qlora_min.run.trainer.write_json = refuse
        qlora_min.run.ending.write_jsonl = qlora_min.run.curves.draw_curves = refuse
        checkpoint.Metrics.write = checkpoint.Metrics.flush = checkpoint.Metrics.cut = refuse


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=slow), pytest.param(8, marks=slow)])
@pytest.mark.parametrize("engine", ["fused", "modules"])
def test_several_make_the_same_run(run, count, engine):
    options = {"engine": engine, "epochs": 7, "patience": 100}  # 21 steps
    one = run(1, "one", **options)
    several = run(count, "several", **options, change=the_first_alone_writes)
    assert_equal_runs(several.run, one.run)
    assert len(events(one.run, "train")) == 21 and len(events(one.run, "eval")) == 8
    assert "waited" in events(several.run, "train")[0] and "waited" not in events(one.run, "train")[0]
    assert checkpoint.read_record(several.run)["ranks"] == count
    # One bar, one log: the rest say nothing.
    assert f"{count} processes divide each step's rows; the busiest has" in several.out[0]
    assert "processes" not in one.out[0]
    assert several.out[1:] == [""] * (count - 1)
    assert not any("done:" in e or "it/s" in e for e in several.err)
    losses = [e["loss"] for e in events(several.run, "train")]
    assert losses[-1] < 0.95 * losses[0]


def count_collectives(folder: Path):
    """A change for `run`: each process writes the number of collectives that it takes part in, by their names."""

    def change(index: int) -> None:
        counts = Counter()

        def counted(name: str):
            call = getattr(torch.distributed, name)

            def wrapped(*args, **kwargs):
                counts[name] += 1
                (folder / f"collectives-{index}").write_text(json.dumps(counts))
                return call(*args, **kwargs)

            setattr(torch.distributed, name, wrapped)

        for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "all_gather_into_tensor", "barrier"):
            counted(name)

    return change


def test_a_steps_collectives_do_not_grow_with_the_processes(run, tmp_path):
    options = {"batch_size": 4, "eval_every": 100, "patience": 100, "save_minutes": 0, "eval_fraction": 0}
    found = {}
    for count, epochs in itertools.product((2, 4), (1, 3)):  # 1 and 3 epochs of 2 steps
        run(count, f"{count}-{epochs}", epochs=epochs, **options, change=count_collectives(tmp_path))
        each = [json.loads((tmp_path / f"collectives-{i}").read_text()) for i in range(count)]
        assert each == each[:1] * count
        found[count, epochs] = Counter(each[0])
    steps = {count: found[count, 3] - found[count, 1] for count in (2, 4)}
    assert steps[2] == steps[4]
    assert steps[2]["all_reduce"] == 2 * 4  # of four steps: the loss, a number, and the gradients, one tensor
    assert found[2, 1] == found[4, 1]


def test_combined_evaluations_are_the_evaluation_of_all_rows():
    base = load_base(str(world.MODEL_DIR), "nf4", "fp32", CPU)
    rows = base.encoder.encode_examples(
        [qlora_min.data.layouts.to_example(r, f"x:{i}") for i, r in enumerate(world.rows(world.CONDITIONS, 7, 3))]
    )
    engine, _, _ = make_engine(base, "auto", 64)
    whole = evaluate_rows(engine, rows, 8)
    parts = [evaluate_rows(engine, part, 8) for part in (rows[:4], rows[4:], [])]
    assert whole.option_rows == 7 and 0 < whole.token_accuracy < 1
    both = Evaluation.join(parts)
    assert both.majority == whole.majority is not None and both.option_rows == 7
    a, b = ({k: v for k, v in e.as_dict().items() if k != "majority"} for e in (both, whole))
    assert a == pytest.approx(b, rel=1e-6)
    assert Evaluation.join([whole]) == whole
    plain = Evaluation(rows=1, supervised_tokens=4, loss_sum=4.0, right_tokens=2)
    twice = Evaluation.join([plain, plain])
    assert twice == Evaluation(rows=2, supervised_tokens=8, loss_sum=8.0, right_tokens=4)
    assert (twice.loss, twice.token_accuracy) == (plain.loss, plain.token_accuracy) == (1.0, 0.5)


@pytest.mark.parametrize(
    ("count", "slice_bytes", "bound", "options"),
    [
        (2, 2**25, 1e-9, {}),
        pytest.param(2, 2**15, 1e-3, {}, marks=slow),  # logits' gradients are summed in another order
        pytest.param(2, 2**25, 1e-9, {"quantization": "none"}, marks=slow),
        pytest.param(4, 2**15, 1e-3, {"gradient_checkpointing": "on"}, marks=slow),
    ],
    ids=["whole head", "sliced head", "unquantised", "4 processes, checkpointing"],
)
def test_a_sharded_base_makes_the_same_run_in_less_memory(run, count, slice_bytes, bound, options):
    """Ragged rows: in some steps a process has fewer micro-batches than another, or no row at all."""

    def change(index):
        sharding.SLICE = slice_bytes
        prepare = Trainer._prepare

        def wrapped(self, *args):
            prepare(self, *args)
            model, trained = self.base.model, lora_parameters(self.base.model)
            held = forecast.stored_bytes(model) - 4 * sum(w.numel() for w in trained.values())
            buffer = model.model.layers[0].whole.untyped_storage().nbytes() if self.base.sharded else 0
            print(f"holds {held - buffer}", file=sys.stderr)  # in a model this small the buffer is most of it

        Trainer._prepare = wrapped

    options = {**options, "micro_batch_tokens": 120}
    whole, parts = (
        run(count, name, change=change, shard=how, **options) for name, how in (("whole", False), ("parts", True))
    )
    assert_equal_runs(parts.run, whole.run, bound)
    for name in ("before", "after"):  # by the modules, which gather too
        said = [[json.loads(s)[name] for s in (r.run / "samples.jsonl").open()] for r in (whole, parts)]
        assert said[0] == said[1] and said[0][0]
    held = [max(int(re.search(r"holds (\d+)", err)[1]) for err in r.err) for r in (whole, parts)]
    assert held[1] < (1 / count + 0.1) * held[0]


def test_a_sharded_run_stops_and_goes_on(run):
    whole = run(2, "whole", shard=True)
    run(2, "part", shard=True, change=before_step(4, stop), expect=143)
    again = run(2, "part", resume=True)
    assert_same(result(again.run), result(whole.run))


def test_an_error_in_a_sharded_pass_ends_all(run):
    def fail(trainer):
        raise RuntimeError("no such luck")

    done = run(2, shard=True, change=before_step(2, fail), expect=None)
    assert 0 not in done.codes
    assert "process 1: no such luck" in done.err[1]


def test_a_signal_in_the_step_before_an_evaluation_abandons_it_in_all(run):
    """It came to one process; the others learn of it in the step, and do not evaluate first."""

    def change(index):
        before_step(2, stop)(index)
        measure = qlora_min.evaluation._measure
        qlora_min.evaluation._measure = lambda *args: print("measures", file=sys.stderr) or measure(*args)

    whole = run(2, "whole")
    stopped = run(2, change=change, expect=143)
    assert [e["step"] for e in events(stopped.run, "eval")] == [0]
    assert all(0 < err.count("measures") <= 2 for err in stopped.err)  # at step 0
    assert checkpoint.checkpoint_steps(stopped.run)[-1] == 3
    assert_same(result(run(2, resume=True).run), result(whole.run))


def test_a_signal_during_a_sharded_evaluation_abandons_it_on_all(run):
    def change(index):
        inner, batches = qlora_min.evaluation._measure, []

        def signalled(*args):
            batches.append(1)
            if index == 1 and len(batches) == 7:  # the second of five of the evaluation at step 3
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(*args)

        qlora_min.evaluation._measure = signalled
        loop.EVALUATED = 1  # row at a time

    whole = run(2, "whole", shard=True, change=change_nothing_but_evaluated)
    stopped = run(2, shard=True, change=change, expect=143)
    assert [e["step"] for e in events(stopped.run, "eval")] == [0]
    assert checkpoint.checkpoint_steps(stopped.run)[-1] == 3
    assert_same(result(run(2, resume=True, change=change_nothing_but_evaluated).run), result(whole.run))


def change_nothing_but_evaluated(index: int) -> None:
    loop.EVALUATED = 1


def test_want_of_memory_in_a_sharded_evaluation_is_said(run):
    """A process that tried fewer rows by itself would gather layers with others' embeddings."""

    def change(index):
        def fail(*args):
            raise torch.OutOfMemoryError("CUDA out of memory")

        if index == 1:
            qlora_min.fused.decoder.Decoder.hidden_states = fail

    done = run(2, shard=True, change=change, expect=None)
    assert 0 not in done.codes
    assert "error: process 1: evaluating 4 rows takes more memory than there is" in done.err[1]
    assert "Traceback" not in done.err[1]


def test_what_cant_be_sharded_is_said(run):
    done = run(2, shard=True, engine="modules", expect=2)
    assert "error: --shard: needs --engine fused" in done.err[0] and "--engine modules is asked for" in done.err[0]
    assert not done.err[1]


# ---------------------------------------------------------------------------------------------------------------------
# The same safety
# ---------------------------------------------------------------------------------------------------------------------


def stop(trainer: Trainer | None = None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    if processes.world_size() > 1:  # torchrun passes on what may have come already
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("engine", ["fused", pytest.param("modules", marks=slow)])
def test_a_signal_to_one_process_stops_all_and_they_go_on_bit_for_bit(run, engine):
    options = {"optimizer": "paged_adamw8bit", "engine": engine, "max_steps": 7}
    whole = run(2, "whole", **options)

    def change(index):
        inner, sums = processes.Processes.sum_step, []

        def behind(self, loss, grads):
            summed = inner(self, loss, grads)
            sums.append(summed)
            if index == 1 and len(sums) == 5:  # four steps lie behind it
                stop()
            return summed

        processes.Processes.sum_step = behind

    stopped = run(2, "stopped", **options, change=change, expect=143)
    assert checkpoint.checkpoint_steps(stopped.run)[-1] == 6  # the step in which all learned of it
    assert stopped.out[0].endswith("saved step 6\n")
    how = f"stopped by SIGTERM; continue with: torchrun --nproc-per-node 2 {ROOT}/scripts/train.py --resume "
    assert stopped.err[0].count(how) == 1
    assert stopped.err[1] == ""
    resumed = run(2, "stopped", resume=True)
    assert "note:" not in resumed.out[0] and "continues at step 6" in resumed.out[0]
    assert_same(result(resumed.run), result(whole.run))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), pytest.param(2, 4, marks=slow)])
def test_a_run_goes_on_in_another_number_of_processes(run, before, after):
    whole = run(1, "whole")
    stopped = run(before, "moved", change=before_step(4, stop, where=before - 1), expect=143)
    step = checkpoint.checkpoint_steps(stopped.run)[-1]
    resumed = run(after, "moved", resume=True)
    assert f"note: it began in {before} processes, now {after}" in resumed.out[0]
    assert f"continues at step {step}" in resumed.out[0] and step in (4, 5)
    assert_equal_runs(resumed.run, whole.run)


def test_a_signal_during_an_evaluation_abandons_it_on_all(run):
    def change(index):
        inner, evaluations = loop.evaluate_rows, []

        def interrupted(engine, rows, batch_size, label, n_tokens, before_each):
            evaluations.append(1)
            if index == 1 and len(evaluations) == 2:  # that at step 3
                before_each()
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
                raise AssertionError("not abandoned")
            return inner(engine, rows, batch_size, label, n_tokens, before_each)

        loop.evaluate_rows = interrupted

    stopped = run(2, change=change, expect=143)
    assert [e["step"] for e in events(stopped.run, "eval")] == [0]
    assert checkpoint.checkpoint_steps(stopped.run)[-1] == 3
    resumed = run(2, resume=True)
    assert [e["step"] for e in events(resumed.run, "eval")] == [0, 3, 6, 9]


def test_a_gradient_that_is_not_finite_in_one_process_is_skipped_by_all(run):
    """The adapters would part otherwise, which the next evaluation checks."""

    def spoil(grads):
        grads[0] = math.inf

    done = run(2, change=before_sum(2, spoil), max_steps=4)
    assert [e["skipped"] for e in events(done.run, "train")] == [0, 1, 1, 1]
    assert "step 2: skipped, a gradient is not finite" in done.out[0]


def test_what_a_process_waits_for_another_is_counted(run):
    done = run(2, change=before_sum(3, lambda grads: time.sleep(0.5)), max_steps=5)
    waited = [e["waited"] for e in events(done.run, "train")]
    assert waited[2] < 0.4 <= waited[3] <= waited[4]  # up to the step before
    assert waited == sorted(waited)


def test_a_process_whose_gpu_failed_exits_alone(run):
    """The sums that it has queued may never end, so it can not have the others wait for its error."""

    def fail(trainer):
        def failing():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        processes.synchronize = failing
        failing()

    done = run(2, change=before_step(4, fail), expect=1)
    assert "error: process 1: CUDA error: an illegal memory access was encountered" in done.err[1]
    assert "error: process 0: process 1 has ended" in done.err[0]


def test_processes_that_part_are_noticed(run):
    def nudge(trainer):
        trainer.stepper.params[0].data.view(-1)[0] += 1e-6

    done = run(2, change=before_step(4, nudge), expect=2)
    assert re.search(r"^error: process 1 has another adapter than process 0: ", done.err[0], re.M)
    assert done.err[1] == "" and checkpoint.checkpoint_steps(done.run)[-1] == 3


@pytest.mark.parametrize(("count", "where"), [(2, 1), pytest.param(2, 0, marks=slow), pytest.param(4, 2, marks=slow)])
def test_a_process_that_is_killed_ends_the_rest(run, count, where):
    start = time.monotonic()
    done = run(count, change=before_step(4, lambda _: os.kill(os.getpid(), signal.SIGKILL), where=where), expect=None)
    assert time.monotonic() - start < 60
    assert done.codes == [-signal.SIGKILL if index == where else 1 for index in range(count)]
    for index in set(range(count)) - {where}:
        (line,) = [x for x in done.err[index].splitlines() if x.startswith("error: ")]
        assert re.match(rf"error: process {index}: process .*\b{where}\b.* has ended \(", line)
        assert "continue with: torchrun" in line and "Traceback" not in done.err[index]
        assert index or f"last good checkpoint: {done.run}/checkpoints/step-3; " in line
    with checkpoint.Lock(done.run):  # which the lost ones have left; now it is ours
        refused = run(2, resume=True, expect=2)
    assert "is training there" in refused.err[0] and refused.err[0].count("\n") == 1 and refused.err[1] == ""


@slow
def test_a_process_that_hangs_is_given_up(run):
    def change(index):
        processes.TIMEOUT = 5.0
        before_step(4, lambda _: time.sleep(12))(index)

    done = run(2, change=change, expect=None)
    assert done.codes[0] == 1
    assert "another process has ended, or did not answer for 5 s" in done.err[0]


def little_memory(tokens: int, at: int = 4, where: int = 1):
    """A change for `run`: in one process, memory runs out above so many tokens from a step on, behind its gradients."""

    def limit(trainer):
        inner, tried = trainer.feed.engine.loss_and_gradients, []

        def limited(batch, *args):
            tried.append(batch.n_tokens)
            assert len(tried) < 100, "it tries for ever"
            loss = inner(batch, *args)
            if batch.n_tokens > tokens:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return loss

        trainer.feed.engine.loss_and_gradients = limited

    return before_step(at, limit, where)


def test_memory_that_runs_out_in_one_process_halves_the_micro_batches_of_all(run):
    """The same run as without, and as in one process."""
    whole = run(1, "whole")

    def change(index):
        little_memory(200, at=3)(index)
        finish = qlora_min.run.trainer.finish

        def told(trainer):
            print(f"tokens {trainer.feed.n_tokens}", file=sys.stderr)
            finish(trainer)

        qlora_min.run.trainer.finish = told

    halved = run(2, "halved", change=change)
    assert re.search(r"^note: step [4-9]: out of memory; its gradients are computed again, ", halved.out[0], re.M)
    tokens = [re.search(r"^tokens (\d+)$", e, re.M)[1] for e in halved.err]
    assert tokens[0] == tokens[1] and int(tokens[0]) <= 200 and halved.out[1] == ""
    assert_equal_runs(halved.run, whole.run)


def test_a_row_that_does_not_fit_ends_a_process_with_code_1(run):
    done = run(1, change=little_memory(10, where=0), expect=1)
    assert "note: step 5: out of memory" in done.out[0] and "Traceback" not in done.err[0]
    assert re.search(r"^error: out of memory at step 5, in a micro-batch of \d+ tokens", done.err[0], re.M)


@pytest.mark.parametrize("shard", [False, True], ids=["whole base", "sharded base"])
def test_a_row_that_does_not_fit_in_one_process_ends_all(run, shard):
    done = run(2, change=little_memory(10), shard=shard, expect=None)
    assert 1 in done.codes if shard else done.codes == [1, 1]
    where = done.err[shard]  # a process whose others wait for it in a layer says it itself
    assert re.search(r"^error: process 1: out of memory at step 5, in a micro-batch of", where, re.M), done.err
    assert "last good checkpoint" in where and "Traceback" not in done.err[1]
    assert shard or done.err[1] == ""


def test_a_disk_that_fails_ends_all(run):
    """The first alone writes, and tells the others that it gave up."""

    def change(index):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        qlora_min.run.writer.RETRY_SECONDS = 0.0
        checkpoint.save_checkpoint = full

    done = run(2, change=change, expect=1, epochs=30)
    assert "10 times in a row; last good checkpoint: none" in done.err[0] and done.err[1] == ""


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"), ({"rank": -1}, "--rank"), ({"targets": "x"}, "x")],
    ids=["data", "option", "model"],
)
def test_what_a_user_can_cause_is_said_once(run, options, words):
    done = run(2, **options, expect=2)
    assert done.err[0].startswith("error: ") and done.err[0].count("\n") == 1 and words in done.err[0]
    assert done.err[1] == "" and not done.run.exists()


def test_what_only_one_process_finds_wrong_is_said_by_the_first(run):
    """Another host may lack the file, or hold another one."""

    def lacks(index):
        def refuse(*args, **kwargs):
            raise ValueError("no such file")

        if index == 1:
            qlora_min.run.trainer.read_data = refuse

    done = run(2, change=lacks, expect=2)
    assert done.err == ["error: process 1: no such file\n", ""] and not done.run.exists()

    def other(index):
        inner = qlora_min.run.resume.data_hash
        qlora_min.run.resume.data_hash = lambda *rows: f"{index}{inner(*rows)}"

    done = run(2, change=other, expect=2)
    assert done.err[0].startswith("error: process 1 has another ") and done.err[1] == "" and not done.run.exists()


# ---------------------------------------------------------------------------------------------------------------------
# torchrun itself
# ---------------------------------------------------------------------------------------------------------------------


@slow
def test_bench_under_torchrun():
    """One table, of both processes' work, with what they wait for each other and take for the sum."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29518"]
    command += [ROOT / "scripts" / "bench.py", "--model", world.MODEL_DIR, "--device", "cpu", "--max-length", "96"]
    command += ["--steps", "2", "--repeats", "1", "--json"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["ranks"] for f in figures] == [2, 2]
    assert all(f["waited_ms"] >= 0 < f["summed_ms"] < f["ms_per_step"] for f in figures)


@slow
def test_torchrun_ends_saved_by_its_own_signal(tmp_path):
    """A signal to torchrun goes to all processes, whose checkpoint then is the last step; another command goes on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    command += [str(ROOT / "scripts" / "train.py")]
    options = ["--demo", "--limit", "320", "--batch-size", "8", "--eval-limit", "20", "--log-every", "1"]
    options += ["--max-steps", "40", "--output-dir", "run"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    pipes = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *options], **pipes)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 14' in metrics.read_text())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode
    step = checkpoint.checkpoint_steps(tmp_path / "run")[-1]
    assert out.endswith(f"saved step {step}\n") and 14 <= step < 40, err
    assert err.count("stopped by SIGTERM; continue with: torchrun") == 1
    done = subprocess.run([*command, "--resume", "run"], timeout=200, **pipes | {"stdout": None, "stderr": None})
    assert done.returncode == 0 and checkpoint.is_finished(tmp_path / "run")
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == 40
