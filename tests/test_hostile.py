"""Memory that runs out, models and adapters that somebody made to harm, and secrets that must stay so."""

import itertools
import json
import random
import re
import shutil
import statistics
import struct
import warnings
import weakref
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_scripts import one_line_error

import qlora_min.fused.decoder
import qlora_min.generate
import qlora_min.loop
import qlora_min.lora
import qlora_min.optim
import qlora_min.run.ending
import qlora_min.run.trainer
from qlora_min.adapter import WEIGHTS, AdapterConfig, load_adapter, load_weights, save_adapter
from qlora_min.base import Base, add_lora, load_base, load_encoder
from qlora_min.config import Config
from qlora_min.data.readers import read
from qlora_min.demo import world
from qlora_min.engine import Engine
from qlora_min.evaluation import evaluate_rows
from qlora_min.fused.select import make_engine
from qlora_min.generate import generate
from qlora_min.lora import LoraSpec, lora_parameters
from qlora_min.run import forecast
from qlora_min.run.datasets import encode_dataset
from qlora_min.system import device
from qlora_min.system.hub import find_model
from qlora_min.system.peft_files import CONFIG, ORIGIN
from qlora_min.system.text import clipped, redacted, shown

CPU = torch.device("cpu")
LONGEST = 330  # characters of a message, without the path of the folder

ERRORS = {  # the words that libraries have for it
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "driver": RuntimeError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "Linux": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    "Windows": RuntimeError("[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried"),
    "Python": MemoryError(),
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(qlora_min.run.trainer, "pick_device", lambda: CPU)
    monkeypatch.setattr(qlora_min.run.ending, "SAMPLE_TOKENS", 2)


def adapted(rank: int = 4, dropout: float = 0.0) -> Base:
    """The demo's base with an adapter that has an effect."""
    base = load_base(str(world.MODEL_DIR), "none", device=CPU)
    torch.manual_seed(0)
    add_lora(base, LoraSpec(rank, 8.0, dropout, ("q_proj", "v_proj")))
    with torch.no_grad():
        for p in lora_parameters(base.model).values():
            p.normal_(std=0.1)
    return base


def message_of(error: pytest.ExceptionInfo, folder: Path) -> str:
    """An error's message; it must be one line, and short whatever the files hold."""
    text = str(error.value).replace(str(folder), "FOLDER")
    assert text.isprintable() and len(text) <= LONGEST, text
    return text


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory: evaluation and answers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(demo_data):
    return encode_dataset("demo", read(str(demo_data[1]), 23), load_encoder(str(world.MODEL_DIR)), 64).rows


def engine_of(name: str, longest: int = 64) -> Engine:
    engine, made, _ = make_engine(adapted(), name, longest)
    assert made == name
    return engine


BOTH = pytest.mark.parametrize("name", ["modules", "fused"])


@BOTH
@pytest.mark.parametrize("words", ERRORS)
def test_evaluation_goes_on_with_half_the_batch_and_the_same_figures(held_out, monkeypatch, capsys, name, words):
    engine = engine_of(name)
    expected = evaluate_rows(engine, held_out, 16).as_dict()
    rng, inner = random.Random(words), engine.hidden_states
    counted, failed, sizes = [], [], []

    def hidden_states(batch):
        rows = batch.spans()
        if len(rows) > 1 and len(failed) < 4 and (not failed or rng.random() < 0.5):
            failed.append(len(rows))
            raise ERRORS[words]
        counted.extend(tuple(batch.input_ids[a:b].tolist()) for a, b in rows)
        sizes.append(len(rows))
        return inner(batch)

    monkeypatch.setattr(engine, "hidden_states", hidden_states)
    result = evaluate_rows(engine, held_out, 16).as_dict()
    assert failed and all(n <= m // 2 for m, n in itertools.pairwise(failed))
    assert max(sizes[-3:]) <= max(1, min(failed) // 2)
    assert sorted(counted) == sorted(tuple(r.input_ids.tolist()) for r in held_out)  # none twice, none lost
    for key in ("loss", "perplexity"):
        assert result.pop(key) == pytest.approx(expected.pop(key), rel=1e-6)
    assert result == expected
    err = capsys.readouterr().err
    assert err.count("note: out of memory: evaluation goes on with batches of") == len(failed)


def test_a_failed_batch_is_gone_before_the_next_attempt(held_out, monkeypatch):
    """What the error still holds, its traceback with it, can't be given back to the device."""
    engine, seen, releases = engine_of("fused"), [], []
    computed, head = engine.hidden_states, engine.logits

    def hidden_states(batch):
        states = computed(batch)
        seen[:] = [len(batch.spans()), weakref.ref(batch), weakref.ref(batch.input_ids), weakref.ref(states)]
        return states

    def logits(hidden):
        if seen[0] > 4:
            seen.append(weakref.ref(hidden))
            raise ERRORS["CUDA"].__class__("CUDA out of memory")
        return head(hidden)

    def release():
        assert len(seen) == 5 and all(r() is None for r in seen[1:])
        releases.append(seen[0])

    monkeypatch.setattr(engine, "hidden_states", hidden_states)
    monkeypatch.setattr(engine, "logits", logits)
    monkeypatch.setattr(device, "release", release)
    assert evaluate_rows(engine, held_out, 16).rows == len(held_out)
    assert releases == [16, 8]


def test_evaluation_without_memory_for_one_row(held_out, monkeypatch):
    engine = engine_of("fused")
    monkeypatch.setattr(engine, "hidden_states", raiser(ERRORS["CUDA"]))
    with pytest.raises(MemoryError, match=r"evaluating one row of \d+ tokens takes .*; lower --max-length"):
        evaluate_rows(engine, held_out, 16)
    monkeypatch.setattr(engine, "hidden_states", raiser(RuntimeError("mat1 and mat2 have other shapes")))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):  # what is no want of memory stays what it is
        evaluate_rows(engine, held_out, 16)


def raiser(error: BaseException):
    def f(*args, **kwargs):
        raise error

    return f


def test_answers_in_halves(held_out, monkeypatch):
    base = adapted()
    prompts = [r.input_ids[: r.answer_start].tolist() for r in held_out[:5]]
    expected, inner = generate(base, prompts, 4), qlora_min.generate._generate
    assert len(set(expected)) > 1  # else their order would not show

    def at_most_two(base, part, *args):
        if len(part) > 2:
            raise ERRORS["CUDA"]
        return inner(base, part, *args)

    monkeypatch.setattr(qlora_min.generate, "_generate", at_most_two)
    assert generate(base, prompts, 4) == expected
    monkeypatch.setattr(qlora_min.generate, "_generate", raiser(ERRORS["Linux"]))
    with pytest.raises(MemoryError, match=rf"a prompt of {len(prompts[0])} tokens takes more memory than there is"):
        generate(base, prompts, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory: training
# ---------------------------------------------------------------------------------------------------------------------

OPTIONS = (
    "--demo",
    "--limit",
    "128",
    "--eval-limit",
    "8",
    "--batch-size",
    "8",
    "--grad-accum",
    "2",
    "--eval-every",
    "2",
)


def fail_at(monkeypatch, name: str, calls: Container[int], error: BaseException) -> None:
    """These calls of a name in loop.py fail, counted from 1."""
    inner, count = getattr(qlora_min.loop, name), itertools.count(1)

    def f(*args, **kwargs):
        if next(count) in calls:
            raise error
        return inner(*args, **kwargs)

    monkeypatch.setattr(qlora_min.loop, name, f)


def fail_in_micro_batches(monkeypatch, calls: Container[int], error: BaseException) -> None:
    """These micro-batches of training fail, counted from 1."""
    inner, count = qlora_min.loop.compute_gradients, itertools.count(1)

    def compute_gradients(feed, *args):
        compute = feed.engine.loss_and_gradients

        def loss_and_gradients(*given):
            if next(count) in calls:
                raise error
            return compute(*given)

        with patch.object(feed.engine, "loss_and_gradients", loss_and_gradients):
            return inner(feed, *args)

    monkeypatch.setattr(qlora_min.loop, "compute_gradients", compute_gradients)


def same_adapter(a: Path, b: Path) -> bool:
    x, y = (load_file(run / "adapter" / WEIGHTS) for run in (a, b))
    assert x.keys() == y.keys()
    return all(torch.equal(x[k], y[k]) for k in x)


def straight(monkeypatch) -> None:
    """What micro-batches take is as said here, whatever the machine: half as much with checkpointing."""

    def measure(engine, work, tokens):
        return forecast.Footprint(device.GIB, 0, 0.0, (1 if engine.checkpointing else 2) * device.GIB / 100)

    monkeypatch.setattr(forecast, "measure", measure)


@pytest.mark.parametrize(("name", "words"), [("modules", "Python"), ("fused", "CUDA")])
def test_a_step_without_memory_is_computed_again_in_halves(script, tmp_path, monkeypatch, name, words):
    """Dropout on: the repeated step draws what it would have drawn, so the run is the one of smaller micro-batches."""
    options = [*OPTIONS, "--engine", name, "--max-steps", 4, "--micro-batch-tokens"]
    with monkeypatch.context() as m:
        fail_in_micro_batches(m, {2}, ERRORS[words])  # the second micro-batch of the first step
        done = script("train.py", *options, 500, "--output-dir", "halved")
    notes = re.findall(
        r"^note: step (\d+): out of memory; .* of up to ([\d,]+) tokens, or one row, from now on$", done.stdout, re.M
    )
    assert notes == [("1", "250")] and "done: 4 steps" in done.stdout
    script("train.py", *options, 250, "--output-dir", "smaller")
    assert same_adapter(tmp_path / "halved", tmp_path / "smaller")
    script("train.py", *options, 500, "--output-dir", "undisturbed")  # what differs is the order of sums
    a, b = (load_file(tmp_path / run / "adapter" / WEIGHTS) for run in ("halved", "undisturbed"))
    assert all((a[k] - b[k]).abs().max() <= 1e-4 * b[k].abs().max() for k in b)


@BOTH
def test_training_out_of_memory_says_what_to_change(script, tmp_path, monkeypatch, name):
    """Not before a single row has been tried; and what was saved goes on."""
    straight(monkeypatch)
    options = [*OPTIONS, "--engine", name, "--micro-batch-tokens", 500]
    with monkeypatch.context() as m:
        first = 2 * 2 + 2  # two micro-batches a step: the second of step 3
        fail_in_micro_batches(m, range(first, 10**6), ERRORS["CUDA"])
        done = script("train.py", *options, "--output-dir", "runs/a b", expect=1)
    sizes = [int(n) for n in re.findall(r"^note: step 3: out of memory; .* up to (\d+) tokens", done.stdout, re.M)]
    assert sizes[:2] == [250, 125] and len(sizes) == 3 and sizes[2] >= 62
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and len(lines) <= 9
    told = r"error: out of memory at step 3, in a micro-batch of (\d+) tokens, \d+ supervised; peak so far .* GiB of .*"
    tokens = int(re.fullmatch(told, lines[0])[1])
    assert tokens <= 63  # the longest row's
    forecast = f"{1 + tokens / 50:.2f} GiB (base 1.00, adapter 0.00, {tokens} tokens {tokens / 50:.2f})"
    assert lines[1] == f"  forecast for this micro-batch: {forecast}"
    assert lines[2] == "  what would take less, in order of effect:"
    found = f"{1 + 63 / 50:.2f} -> {1 + 63 / 100:.2f} GiB, same results, more time"
    assert f"    --gradient-checkpointing on: {found}" in lines  # the demo has it off
    assert "last good checkpoint: runs/a b/checkpoints/step-2;" in lines[-2]
    assert lines[-2].endswith(f" {ROOT}/scripts/train.py --resume 'runs/a b'")
    done = script("train.py", "--resume", "runs/a b")  # which is true
    assert "done: 8 steps" in done.stdout
    script("train.py", *options, "--output-dir", "runs/undisturbed")
    assert same_adapter(tmp_path / "runs/a b", tmp_path / "runs/undisturbed")


@pytest.mark.parametrize("where", ["Stepper.step", "evaluate_rows"])
def test_memory_may_run_out_elsewhere_in_the_loop(script, monkeypatch, where):
    if where == "evaluate_rows":  # of step 2: the first one is before training
        fail_at(monkeypatch, "evaluate_rows", {2}, MemoryError("evaluating one row of 33 tokens takes more"))
    else:
        monkeypatch.setattr(qlora_min.optim.Stepper, "step", raiser(ERRORS["driver"]))
    done = script("train.py", *OPTIONS, "--output-dir", "out", expect=1)
    assert "Traceback" not in done.stderr and "last good checkpoint: out/checkpoints/step-0;" in done.stderr
    assert ("error: out of memory at step 1" in done.stderr) == (where == "Stepper.step")


def test_another_error_in_a_step_stays_what_it_is(script, monkeypatch):
    fail_in_micro_batches(monkeypatch, {1}, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        script("train.py", *OPTIONS, "--output-dir", "out")


def test_eval_without_memory_is_one_line(script, adapter_folder, demo_data, monkeypatch):
    monkeypatch.setattr(qlora_min.fused.decoder.Decoder, "hidden_states", raiser(ERRORS["CUDA"]))
    done = script("eval.py", "--adapter", adapter_folder, "--dataset", demo_data[1], "--limit", 4, expect=1)
    assert "error: evaluating one row of" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The forecast
# ---------------------------------------------------------------------------------------------------------------------

WORK = forecast.Workload(n_rows=64, max_seqlen=100, n_supervised=20, bits8=True)


@pytest.mark.parametrize("tokens", [4, 99, 100, 101, 250, 1000])
def test_what_is_measured_is_as_dense_as_training_can_be(tokens):
    rows = WORK.probe(tokens)
    assert tokens - 1 <= sum(map(len, rows)) <= tokens  # a row of one token predicts nothing
    assert all(len(r) == 100 for r in rows[:-1]) and len(rows[-1]) <= 100
    assert all(r.n_supervised == min(20, len(r) - 1) and not r.supervised[0] for r in rows)


@BOTH
def test_measuring_leaves_no_trace(name):
    """A step after it is, bit for bit, the one without it; dropout on, checkpointing as it was."""
    engine, other = (make_engine(adapted(dropout=0.1), name, 100)[0] for _ in range(2))
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    before = engine.adapter.weights.clone()
    forecast.measure(engine, WORK, 400)
    assert states[0].equal(torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert before.equal(engine.adapter.weights) and not engine.adapter.grads.any()
    assert not engine.checkpointing and not engine.base.model.training
    batch, factor, seed = engine.pack(WORK.probe(150)), torch.tensor(0.25), torch.tensor(7, dtype=torch.int32)
    losses = [e.loss_and_gradients(batch, factor, seed) for e in (engine, other)]
    assert losses[0].equal(losses[1]) and engine.adapter.grads.equal(other.adapter.grads) and losses[0] > 0
    assert engine.adapter.grads.any()


@BOTH
@pytest.mark.parametrize("bits8", [True, False])
def test_the_line_goes_through_two_sizes(monkeypatch, name, bits8):
    engine, tried = engine_of(name), []

    def measured(limit: int, tokens: int) -> forecast.Footprint:
        def added(engine, work, n):
            tried.append(n)
            return None if n > limit else 5000 + 30 * n

        tried.clear()
        monkeypatch.setattr(forecast, "_added", added)
        return forecast.measure(engine, replace(WORK, bits8=bits8), tokens)

    for limit, tokens, sizes in ((999, 200, [200, 100]), (999, 9**9, [256, 128]), (60, 200, [200, 100, 50, 25])):
        f = measured(limit, tokens)
        assert (f.fixed, f.per_token) == pytest.approx((5000, 30)) and tried[1:] == sizes and tried[0] <= 64
    trained = sum(p.numel() for p in lora_parameters(engine.base.model).values())
    assert f.adapter == trained * (10 if bits8 else 16)  # A and B, gradients, two moments
    frozen = {p.data_ptr(): p.nbytes for p in engine.base.model.parameters() if not p.requires_grad}
    assert sum(frozen.values()) <= f.base <= 1.05 * sum(frozen.values())  # and tables of angles
    assert f.total(77) == int(f.program + f.base + f.adapter + 5000 + 30 * 77)
    assert device.GIB / 10 < f.program < f.total(77) <= device.peak_bytes(engine.device) + 2**24  # torch and the like
    with pytest.raises(MemoryError, match="not even 2 tokens fit into the memory"):
        measured(1, 400)


def test_more_tokens_are_never_forecast_to_take_less(monkeypatch):
    """However the measurement was disturbed."""
    for sizes in ({100: 10, 50: 900}, {100: -70, 50: -90}):
        monkeypatch.setattr(forecast, "_added", lambda engine, work, tokens, sizes=sizes: sizes.get(tokens, 0))
        f = forecast.measure(engine_of("fused"), WORK, 100)
        totals = [f.total(n) for n in (1, 50, 100, 10_000)]
        assert totals == sorted(totals) and totals[0] >= f.base + f.adapter


@BOTH
def test_what_a_larger_micro_batch_takes_is_foreseen(monkeypatch, name):
    """Really measured, as resident memory: malloc's habits are in it. With checkpointing it is less."""
    monkeypatch.setitem(forecast.TRIED_TOKENS, "cpu", 1024)
    engine, work, totals = engine_of(name, 256), replace(WORK, max_seqlen=256), []
    for engine.checkpointing in (False, True):
        measured = [forecast.measure(engine, work, 2048) for _ in range(5)]  # of which any one may be far off
        totals.append(statistics.median(f.fixed + 4096 * f.per_token for f in measured))
        assert 0.5 < forecast._added(engine, work, 4096) / totals[-1] < 2
    assert totals[1] < 0.9 * totals[0]


def test_another_error_while_measuring_stays_what_it_is(monkeypatch):
    engine = engine_of("fused")
    monkeypatch.setattr(engine, "loss_and_gradients", raiser(RuntimeError("mat1 and mat2")))
    with pytest.raises(RuntimeError, match="mat1"):
        forecast.measure(engine, WORK, 400)
    monkeypatch.setattr(engine, "loss_and_gradients", raiser(ERRORS["Linux"]))
    with pytest.raises(MemoryError, match="not even"):
        forecast.measure(engine, WORK, 400)


@pytest.mark.parametrize(
    "room, asked, tokens, wanted",
    [
        (10**9, "auto", None, (False, 1600)),  # all of a step
        (160_000, "auto", None, (False, 1600)),
        (159_999, "auto", None, (False, 800)),
        (10_000, "auto", None, (False, 100)),  # the longest row
        (9_999, "auto", None, (True, 800)),  # only now checkpointing, at a tenth a token
        (0, "auto", None, (True, 100)),  # nothing fits: as little as there is
        (9_999, "off", None, (False, 100)),
        (10**9, "on", None, (True, 1600)),
        (10**9, "on", 7, (True, 100)),
        (10**9, "auto", 500, (False, 500)),
        (10**9, "auto", 7, (False, 100)),
        (49_999, "auto", 500, (True, 500)),
    ],
)
def test_the_plan_takes_the_most_tokens_that_fit_and_then_checkpointing(monkeypatch, room, asked, tokens, wanted):
    engine = SimpleNamespace(device=CPU, checkpointing=False)
    monkeypatch.setattr(
        forecast, "measure", lambda engine, *_: forecast.Footprint(0, 0, 0, 10 if engine.checkpointing else 100)
    )
    work, tried = replace(WORK, n_rows=16), []

    def fits(peak: int) -> bool:
        tried.append(peak)
        return peak <= room

    on, n, footprint = forecast.plan(engine, work, fits, asked, tokens)
    assert (on, n) == wanted and footprint.per_token == (10 if on else 100)
    assert tried[-1] == footprint.total(n) and all(peak > room for peak in tried[:-1])
    assert forecast.plan(engine, replace(work, n_rows=10**6), lambda _: True)[1] == forecast.MOST_TOKENS["cpu"]
    assert forecast.plan(engine, replace(work, max_seqlen=5000), lambda _: True)[1] == 5000


@pytest.fixture
def ways(monkeypatch):
    """ways(...) -> (option, GiB after it, effect) of every way to save in a micro-batch of 400 tokens.

    These take `taken` bytes besides the base, half of that with checkpointing.
    """

    def find(
        base: Base | None = None, taken: float = 2 * device.GIB, lengths=(400, 301, 300, 90), room: float = 0.0,
        on: bool = False, bits8: bool = True,
    ) -> list[tuple[str, float, str]]:  # fmt: skip
        def measure(engine, work, tokens):
            size = forecast.stored_bytes(engine.base.model)
            return forecast.Footprint(size, 0, 0.0, taken / 400 / (2 if engine.checkpointing else 1))

        monkeypatch.setattr(forecast, "measure", measure)
        engine = make_engine(base or adapted(rank=32), "fused", 400)[0]
        engine.checkpointing = on
        work = replace(WORK, max_seqlen=400, bits8=bits8)
        footprint = forecast.measure(engine, work, 400)
        lines = forecast.ways_to_save(engine, work, footprint, lengths, room)
        assert engine.checkpointing is on
        found = [re.fullmatch(r"(--.*): ([\d.]+) -> ([\d.]+) GiB, (.*)", line).groups() for line in lines]
        for _, before, after, _ in found:
            assert float(before) == round(footprint.total(400) / device.GIB, 2) >= float(after)
        found = [(option, float(after), effect) for option, _, after, effect in found]
        assert [f[1] for f in found] == sorted(f[1] for f in found)  # in order of effect
        return found

    return find


def test_the_ways_to_save_follow_the_forecast(ways):
    shorter, checkpointing = ways()  # nothing fits into 0 bytes: the strongest of each option
    assert shorter == ("--max-length 100", 0.5, "leaves 3 of 4 rows out")
    assert checkpointing == ("--gradient-checkpointing on", 1.0, "same results, more time")
    assert [w[0] for w in ways(on=True)] == ["--max-length 100"]


def test_of_an_options_values_the_mildest_that_fits_is_named(ways):
    for room, wanted in ((2**60, 300), (1.6 * device.GIB, 300), (1.2 * device.GIB, 200), (0.6 * device.GIB, 100)):
        assert [w[0] for w in ways(room=room) if "length" in w[0]] == [f"--max-length {wanted}"]


def test_small_parts_are_named_only_where_they_count(ways):
    small = {"--quantization nf4", "--optimizer paged_adamw8bit"}
    few = {"taken": 1000, "bits8": False}  # bytes: here the base and the optimizer are most of it
    assert small <= {w[0] for w in ways(**few)}
    assert not small & {w[0] for w in ways(bits8=False)}
    assert "--optimizer paged_adamw8bit" not in [w[0] for w in ways(taken=1000)]
    quantised = load_base(str(world.MODEL_DIR), "nf4", device=CPU)
    add_lora(quantised, LoraSpec(32, 8.0, 0.0, ("q_proj",)))
    assert small & {w[0] for w in ways(quantised, **few)} == {"--optimizer paged_adamw8bit"}


def test_how_many_rows_a_shorter_length_leaves_out(ways):
    assert ("--max-length 300", 1.5, "leaves 2 of 4 rows out") in ways(room=2**60)
    assert not any("--max-length" in w[0] for w in ways(lengths=(400, 390)))  # no row would be left


# ---------------------------------------------------------------------------------------------------------------------
# Adapters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base() -> Base:
    return adapted()


@pytest.fixture
def adapter_folder(tmp_path, base) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    spec = LoraSpec(4, 8.0, 0.0, ("q_proj", "v_proj"))
    config = AdapterConfig(spec, str(world.MODEL_DIR), None, base.fingerprint, quantization="none")
    save_adapter(folder, base.model, config, base.encoder.tokenizer)
    return folder


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


LONG = "x" * 100_000
HOSTILE = {
    "base_model_name_or_path": [
        "../../etc", "a/../../b", "..", "a\\..\\b", "/etc/../home", "nul\0byte", "two\nlines", LONG, "", 7, None, True,
        ["a/b"], {"a": 1}, "\x1b[31mred", "https://user:hf_abcdefghijklmnopqrstuvwxyz@huggingface.co/a/b",
    ],
    "revision": ["../../x", "/etc/passwd", "a/../b", "..", ".", "", "a\nb", LONG, 3, True, ["main"], "a//b", "-x"],
    "r": [0, 2**63, 10**400, -1, -(2**70), 2.0, 1.5, True, "16", None, [4], LONG],
    "lora_alpha": [0, -8, True, "8", None, [8], 10**400, -1e-3, LONG],
    "lora_dropout": [1, 1.0, -0.1, 2, True, "0.1", [0], 10**400],
    "target_modules": [
        ".*", r".*\.q_proj", [".*_proj"], ["q_proj", ""], [""], ["../q_proj"], ["q_proj/.."], ["a..b"], [".q_proj"],
        ["q_proj"] * 1001, [LONG], [None], [["q_proj"]], {"q_proj": 1}, 7, [], ["q_proj\n"], "ALL-LINEAR",
    ],
    "use_rslora": ["yes", 2, [], LONG],
    "rank_pattern": [["q_proj"], "q_proj", {"q_proj": 0}, {"q_proj": True}, {"q_proj": "4"}, {"(a*)*b": 4}, {"(": 4},
                     {".*.*.*.*.*x": 4}, {LONG: 4}, {"(?P<x>a)": 4}, {"x{1,99}{1,99}{1,99}{1,99}{1,99}": 4},
                     {f"q_proj{i}": 4 for i in range(1001)}],
    "alpha_pattern": [{"q_proj": 0}, {"q_proj": -1}, {"q_proj": 10**400}, {"q_proj": None}, {"(a|b)+": 4}, [1]],
    "layers_to_transform": ["0", -1, True, [0, "1"], [-1], {"0": 1}, 1.5, [0] * 1001],
    "layers_pattern": ["a.b", "(a*)*", 7, ["layers", ""], LONG],
    "auto_map": [{"AutoModel": "evil.Evil"}],
    "parent_library": ["os"],
    "megatron_core": ["os", "evil.py", 1, True],
    "peft_type": ["IA3", LONG, 1, None, ["LORA"]],
    "init_lora_weights": ["pissa", LONG, "evil.py"],
    LONG: [1],
    "new\nline": [1],
    "layer_replication": [[[[[[[[[[1]]]]]]]]], [0] * 100_000],
}  # fmt: skip
CASES = [(k, v) for k, values in HOSTILE.items() for v in values]


@pytest.mark.parametrize("field, value", CASES, ids=[f"{k[:20]!r}-{shown(v)[:20]}" for k, v in CASES])
def test_hostile_fields(adapter_folder, field, value):
    edit(adapter_folder / CONFIG, **{field: value})
    with pytest.raises(ValueError) as error:
        AdapterConfig.read(adapter_folder)
    message = message_of(error, adapter_folder)
    assert field[:20].split("\n")[0] in message and "abcdefghijkl" not in message


@pytest.mark.parametrize("field, value", [
    ("fingerprint", 5), ("fingerprint", "zz"), ("fingerprint", ["a"]),
    ("quantization", "int8"), ("quantization", [1]), ("quantization", LONG),
])  # fmt: skip
def test_hostile_origin(adapter_folder, field, value):
    edit(adapter_folder / ORIGIN, **{field: value})
    with pytest.raises(ValueError, match=field) as error:
        AdapterConfig.read(adapter_folder)
    message_of(error, adapter_folder)


BROKEN_JSON = {
    "a duplicate key": ('{"r": 1, "r": 2}', "the key 'r' is repeated"),
    "a long duplicate key": (f'{{"{LONG}": 1, "{LONG}": 2}}', "is repeated"),
    "NaN": ('{"lora_alpha": NaN}', "NaN is not JSON"),
    "-Infinity": ('{"lora_alpha": -Infinity}', "Infinity is not JSON"),
    "deep nesting": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "a long number": ('{"r": ' + "9" * 5000 + "}", "not readable JSON"),
    "no UTF-8": (b'{"r": "\xff"}', "not readable JSON"),
    "nothing": ("", "not readable JSON"),
    "too much": (" " * (2**26 + 1), "larger than 64 MiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_JSON)
@pytest.mark.parametrize("file", [CONFIG, ORIGIN])
def test_broken_json(adapter_folder, file, name):
    content, words = BROKEN_JSON[name]
    (adapter_folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=words) as error:
        AdapterConfig.read(adapter_folder)
    assert file in message_of(error, adapter_folder)


@pytest.mark.parametrize("alpha", ["1e999", "-1e999"])
def test_numbers_that_json_reads_as_infinite(adapter_folder, alpha):
    path = adapter_folder / CONFIG
    path.write_text(path.read_text().replace('"lora_alpha": 8', f'"lora_alpha": {alpha}'))
    with pytest.raises(ValueError, match=r"lora_alpha -?inf, expected a number above 0"):
        AdapterConfig.read(adapter_folder)


@pytest.mark.parametrize("rank", [65, 10**6, 10**12, 2**62])
def test_a_rank_larger_than_the_layer_allocates_nothing(adapter_folder, rank, monkeypatch):
    edit(adapter_folder / CONFIG, r=rank)  # q_proj is 64 x 64
    monkeypatch.setattr(qlora_min.lora.LoRALinear, "__init__", raiser(AssertionError("a layer was made")))
    with pytest.raises(
        ValueError, match=r"adapter .*: rank .* is above the larger dimension of 'model\.layers\.0"
    ) as error:
        load_adapter(adapter_folder)
    message_of(error, adapter_folder)


def test_a_rank_above_the_smaller_side_only_is_loaded(tmp_path):
    """No use, but no harm: rank 256 on key projections of 896 x 128 is common, and PEFT trains it."""
    base = adapted(rank=64)  # v_proj is 32 x 64
    config = AdapterConfig(LoraSpec(64, 8.0, 0.0, ("q_proj", "v_proj")), base.name, None, base.fingerprint, "none")
    save_adapter(tmp_path, base.model, config, base.encoder.tokenizer)
    assert load_adapter(tmp_path)


def test_many_unknown_targets_are_a_short_message(adapter_folder):
    edit(adapter_folder / CONFIG, target_modules=[f"evil_{i}" for i in range(1000)])
    with pytest.raises(ValueError, match="matches no linear layer") as error:
        load_adapter(adapter_folder)
    message_of(error, adapter_folder)


def test_what_names_may_be(adapter_folder):
    """The checks leave room for what is usual."""
    for field, values in {
        "base_model_name_or_path": ["Qwen/Qwen2-0.5B-Instruct", "gpt2", "./local", str(world.MODEL_DIR), "models/mine",
                                    "/home/a user/modèle", "C:\\models\\qwen", "a..b/c"],
        "revision": [None, "main", "refs/pr/1", "v1.0", "0123456789abcdef0123456789abcdef01234567", "my-branch_2"],
        "lora_dropout": [None, 0, 0.5], "target_modules": [["self_attn.q_proj"], ["fc1"]],
        "megatron_core": [None, "megatron.core"], "r": [1, 512],
    }.items():  # fmt: skip
        for value in values:
            before = (adapter_folder / CONFIG).read_text()
            edit(adapter_folder / CONFIG, **{field: value})
            AdapterConfig.read(adapter_folder)
            (adapter_folder / CONFIG).write_text(before)


@pytest.mark.parametrize("name", ["/etc", "/no/such/folder", "no/such-model"])
def test_a_base_that_is_no_model(adapter_folder, name):
    edit(adapter_folder / CONFIG, base_model_name_or_path=name)
    with pytest.raises(ValueError, match=f"model '{name}'"):
        load_adapter(adapter_folder)


def test_a_base_at_an_absolute_path_must_be_the_recorded_one(adapter_folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(world.MODEL_DIR, other)
    edit(adapter_folder / CONFIG, base_model_name_or_path=str(other))
    assert load_adapter(adapter_folder).folder == other  # a copy is as good
    flip(other / "model.safetensors", -1000)
    with pytest.raises(ValueError, match=r"before its base changed or was damaged: .* give its own base with --model"):
        load_adapter(adapter_folder)


def flip(path: Path, at: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def damages(path: Path, cuts: int, flips: int):
    """A file truncated at many places and with random bytes changed; put right again at the end."""
    good, rng = path.read_bytes(), random.Random(0)
    header = 8 + struct.unpack("<Q", good[:8])[0]
    try:
        for n in range(cuts):
            path.write_bytes(good[: rng.randrange(header) if n % 2 else rng.randrange(len(good))])
            yield "cut"
        for n in range(flips):
            at = rng.randrange(header) if n % 2 else rng.randrange(header, len(good))
            changed = bytearray(good)
            changed[at] = (changed[at] + rng.randrange(1, 256)) % 256
            path.write_bytes(changed)
            yield f"byte {at}"
    finally:
        path.write_bytes(good)


def test_damaged_adapters_are_always_noticed(adapter_folder, base):
    before = {n: p.clone() for n, p in lora_parameters(base.model).items()}
    for damage in damages(adapter_folder / WEIGHTS, 50, 200):
        with pytest.raises(ValueError) as error:
            load_weights(adapter_folder, base.model)
        assert len(str(error.value)) < 2 * LONGEST and str(error.value).isprintable(), damage
    assert all(torch.equal(p, before[n]) for n, p in lora_parameters(base.model).items())
    load_weights(adapter_folder, base.model)


def test_damaged_adapters_of_other_tools_never_crash(adapter_folder, base):
    (adapter_folder / ORIGIN).unlink()  # no sha256 to compare with
    loaded = 0
    other = adapted()
    for damage in damages(adapter_folder / WEIGHTS, 20, 100):
        try:
            load_weights(adapter_folder, other.model)
            loaded += 1
            assert damage != "cut"
        except ValueError as e:
            assert str(e).isprintable()
        assert all(p.isfinite().all() for p in lora_parameters(other.model).values())
    assert 20 < loaded < 60  # changed data can't be noticed, as the docstring of the module says


def test_an_exchanged_file_is_named(adapter_folder, base):
    tensors = {k: t * 2 for k, t in load_file(adapter_folder / WEIGHTS).items()}
    save_file(tensors, adapter_folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{WEIGHTS} is not as it was saved .*{ORIGIN}.*: damaged or exchanged"):
        load_adapter(adapter_folder)
    edit(adapter_folder / ORIGIN, weights_sha256=None)
    load_adapter(adapter_folder)


def test_an_edited_alpha_is_named(adapter_folder):
    """Another scaling of the update fits the weights, and would pass in silence."""
    edit(adapter_folder / CONFIG, lora_alpha=7)
    with pytest.raises(ValueError) as error:
        AdapterConfig.read(adapter_folder)
    assert "lora_alpha 7.0, but the weights were trained with 8.0" in message_of(error, adapter_folder)


def raw_file(path: Path, header: bytes | str, data: bytes = b"", length: int | None = None) -> None:
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


ONE = '"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
HEADERS = {  # header, data, and its length as declared
    "an absurd length": (f"{{{ONE}}}", bytes(4), 2**63),
    "a length beyond the file": (f"{{{ONE}}}", bytes(4), 99_000_000),
    "an absurd shape": ('{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 4]}}', bytes(4)),
    "a tensor beyond the file": ('{"a": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4000000]}}', bytes(4)),
    "overlapping tensors": ("{" + ONE + ", " + ONE.replace('"a"', '"b"') + "}", bytes(4)),
    "a name twice": (f"{{{ONE}, {ONE}}}", bytes(4)),
    "deep nesting": ("[" * 100_000, b""),
    "an unknown dtype": (f"{{{ONE.replace('F32', LONG)}}}", bytes(4)),
    "no UTF-8": (b'{"\xff": 1}', b""),
    "fp8": ('{"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}', bytes(4)),
    "int64": ('{"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}', bytes(8)),
    "bool": ('{"a": {"dtype": "BOOL", "shape": [4], "data_offsets": [0, 4]}}', bytes(4)),
    "a long name, int8": (f'{{"{LONG}": {{"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}}}', bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(adapter_folder, base, tmp_path, name):
    raw_file(adapter_folder / WEIGHTS, *HEADERS[name])
    other = name in ("fp8", "int64", "bool", "a long name, int8")  # the file is sound, but not what is expected
    with pytest.raises(ValueError, match="does not fit" if other else "damaged or missing weights") as error:
        load_weights(adapter_folder, base.model)
    if not other:  # lists what is missing, which is long here
        message_of(error, adapter_folder)
    folder = tmp_path / "model"
    shutil.copytree(world.MODEL_DIR, folder)
    raw_file(folder / "model.safetensors", *HEADERS[name])
    with pytest.raises(ValueError, match="unexpected weight" if other else "damaged or missing weights") as error:
        load_base(str(folder), device=CPU)
    message_of(error, folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_wrong_dtypes_of_the_right_tensors(adapter_folder, base, dtype):
    tensors = load_file(adapter_folder / WEIGHTS)
    name = sorted(tensors)[3]
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, adapter_folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"is stored as .*, expected fp16, bf16 or fp32") as error:
        load_weights(adapter_folder, base.model)
    assert name.removeprefix("base_model.model.")[:10] in message_of(error, adapter_folder)


def test_strange_tensors_are_counted_not_listed(adapter_folder, base):
    tensors = load_file(adapter_folder / WEIGHTS)
    save_file(tensors | {f"{i}" + "\n" * 500: torch.ones(1) for i in range(300)}, adapter_folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"unexpected 0; unexpected 1; .*unexpected: 297 more") as error:
        load_weights(adapter_folder, base.model)
    message_of(error, adapter_folder)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(world.MODEL_DIR, folder)
    return folder


def test_damaged_models_are_refused_or_have_another_fingerprint(model_folder):
    good = load_base(str(model_folder), "none", device=CPU).fingerprint
    loaded = 0
    for damage in damages(model_folder / "model.safetensors", 20, 80):
        try:
            assert load_base(str(model_folder), "none", device=CPU).fingerprint != good, damage
            loaded += 1
            assert damage != "cut"
        except ValueError as e:
            assert str(e).isprintable() and len(str(e)) < 2 * LONGEST, damage
    assert loaded > 15  # changed data: the fingerprint that a run or an adapter has recorded is what tells


def test_hostile_values_in_a_models_config(model_folder):
    values = [None, -1, 0, 3, 10**6, 10**12, 2**63, 10**30, "../x", LONG, [], {"a": {}}]
    outcomes = set()
    for file, keys in {
        "config.json": ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                        "head_dim", "vocab_size", "intermediate_size", "layer_types", "rope_parameters", "hidden_act",
                        "quantization_config", "dtype", "num_layers"],
        "generation_config.json": ["eos_token_id"],
        "tokenizer_config.json": ["tokenizer_class", "model_max_length", "chat_template", "added_tokens_decoder"],
    }.items():  # fmt: skip
        good = (model_folder / file).read_text()
        for key in keys:
            for value in values:
                edit(model_folder / file, **{key: value})
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        load_base(str(model_folder), "none", device=CPU)
                        outcomes.add("loaded")
                    except ValueError as e:
                        text = str(e).replace(str(model_folder), "FOLDER")
                        assert text.isprintable() and len(text) < LONGEST, text
                        outcomes.add("refused")
                (model_folder / file).write_text(good)
    assert outcomes == {"loaded", "refused"}


@pytest.mark.parametrize("layers", [1001, 10**9, 10**400])
def test_more_layers_than_weights_are_never_built(model_folder, monkeypatch, layers):
    edit(model_folder / "config.json", num_hidden_layers=layers, layer_types=None)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", raiser(AssertionError("the config was built")))
    with pytest.raises(ValueError, match=r"config\.json says .* layers, more than there are weights") as error:
        load_base(str(model_folder), device=CPU)
    message_of(error, model_folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "nul\0", LONG, 7])
def test_an_index_names_files_beside_it_only(model_folder, tmp_path, name):
    shutil.copy(model_folder / "model.safetensors", tmp_path)  # what the first would reach
    index = {"weight_map": {"model.norm.weight": name}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"expected files beside the index|is missing|no readable index") as error:
        load_base(str(model_folder), device=CPU)
    message_of(error, model_folder)


def test_one_weight_in_two_files(model_folder):
    tensors = load_file(model_folder / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"] * 2}, model_folder / "second.safetensors")
    weight_map = dict.fromkeys(tensors, "model.safetensors") | {"model.norm.weight": "second.safetensors"}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is in another file too"):
        load_base(str(model_folder), device=CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_models_link_out_of_its_folder_is_refused(model_folder, tmp_path, name):
    (model_folder / name).rename(tmp_path / "elsewhere")
    (model_folder / name).symlink_to(tmp_path / "elsewhere")
    for load in (load_base, load_encoder, find_model):
        with pytest.raises(ValueError, match=f"'{name}' is a link to a file outside of the folder"):
            load(str(model_folder))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, ORIGIN])
def test_an_adapters_link_out_of_its_folder_is_refused(adapter_folder, tmp_path, name):
    (adapter_folder / name).rename(tmp_path / "elsewhere")
    (adapter_folder / "inner").symlink_to(tmp_path / "elsewhere")
    (adapter_folder / name).symlink_to("inner")  # a link within, to a link that leads out
    with pytest.raises(ValueError, match="is a link to a file outside of the folder"):
        load_adapter(adapter_folder)


def test_a_linked_folder_of_templates_is_refused(model_folder, tmp_path):
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("x")
    (model_folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    with pytest.raises(ValueError, match=r"'x\.jinja' is a link to a file outside"):
        find_model(str(model_folder))


def test_links_that_stay_inside_and_linked_folders_are_fine(model_folder, adapter_folder, tmp_path):
    (model_folder / "model.safetensors").rename(model_folder / "weights")
    (model_folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "base").symlink_to(model_folder)
    (tmp_path / "linked").symlink_to(adapter_folder)
    (model_folder / "README.md").symlink_to("gone")  # leads nowhere
    assert load_adapter(tmp_path / "linked", model=str(tmp_path / "base"))


def test_the_hubs_cache_goes_on_to_work(tmp_path, monkeypatch):
    """models--A--B/snapshots/REV/FILE -> ../../blobs/HASH, found by its name; and only the repository's own blobs."""
    repo = tmp_path / "hub" / "models--some--model"
    snapshot = repo / "snapshots" / ("0" * 40)
    for folder in (repo / "blobs", repo / "refs", snapshot):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    for i, path in enumerate(sorted(world.MODEL_DIR.iterdir())):
        shutil.copy(path, repo / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    base = load_base("some/model", "none", device=CPU)
    assert (base.folder, base.revision) == (snapshot, "0" * 40)
    assert load_base(str(snapshot), "none", device=CPU).fingerprint == base.fingerprint

    (tmp_path / "hub" / "blobs").mkdir()
    shutil.copy(world.MODEL_DIR / "config.json", tmp_path / "hub" / "blobs" / "x")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../blobs/x")  # another repository's
    for name in ("some/model", str(snapshot)):
        with pytest.raises(ValueError, match=r"'config\.json' is a link to a file outside of the folder"):
            find_model(name)
    (repo / "blobs").rename(repo / "former")
    (repo / "blobs").symlink_to("/etc")  # blobs that are themselves elsewhere
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../blobs/hostname")
    with pytest.raises(ValueError, match=r"no config\.json|outside of the folder"):
        find_model(str(snapshot))


# ---------------------------------------------------------------------------------------------------------------------
# Code that comes with a model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "evil", "evil without config", "clip_text_model"])
def test_a_models_code_never_runs(model_folder, tmp_path, script, kind):
    """Whether or not the type is known. transformers would ask on the terminal: "y" stands ready."""
    marker = tmp_path / "it-ran"
    code = f"open({str(marker)!r}, 'w').close()\nfrom transformers import *\n"
    code += "class C(PreTrainedConfig): model_type = 'evil'\nclass M(PreTrainedModel): pass\n"
    code += "class T(Qwen2Tokenizer): pass\n"
    (model_folder / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit(model_folder / "config.json", auto_map=auto)
    edit(model_folder / "tokenizer_config.json", auto_map=auto)
    if kind != "qwen2":
        edit(model_folder / "config.json", model_type=kind.split()[0])
        edit(model_folder / "tokenizer_config.json", tokenizer_class="T")
    if kind == "evil without config":
        (model_folder / "config.json").unlink()
    done = script(
        "chat.py", "--model", model_folder, "--prompt", "x", "--max-new-tokens", "1", expect=None, input="y\n" * 9
    )
    assert not marker.exists()
    if kind == "qwen2":
        assert done.returncode == 0, done.stderr
        script(
            "train.py", "--demo", "--model", model_folder, "--max-steps", "1", "--output-dir", "run", input="y\n" * 9
        )
        script("merge.py", "--adapter", "run/adapter", "--output-dir", "merged", "--dtype", "fp32", input="y\n" * 9)
        assert not marker.exists()
    else:
        one_line_error(done, "config.json" if "clip" not in kind else "model")


# ---------------------------------------------------------------------------------------------------------------------
# Secrets
# ---------------------------------------------------------------------------------------------------------------------

TOKEN = "hf_plantedABCDEFGHIJKLMNOPQRSTUVWXYZ"
OTHER = "planted-without-the-usual-form"
NAMES = [f"https://user:{TOKEN}@huggingface.co/a/b", f"https://{TOKEN}@huggingface.co/a/b", f"user:{OTHER}@host/b",
         f"https://user:pa/ss{OTHER}@huggingface.co/a/b", f"a/b?token={TOKEN}", f"a/{TOKEN}", f"a/{OTHER}"]  # fmt: skip


@pytest.fixture
def planted(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", OTHER)


def assert_nothing_leaks(done, folder: Path) -> None:
    texts = [done.stdout.encode(), done.stderr.encode()]
    texts += [p.read_bytes() + str(p).encode() for p in folder.rglob("*") if p.is_file()]
    for secret in (TOKEN, OTHER, TOKEN[3:]):
        assert not any(secret.encode() in t for t in texts)


def test_a_run_leaves_no_token_anywhere(planted, script, tmp_path):
    done = script(
        "train.py", "--demo", "--max-steps", "2", "--eval-limit", "8", "--limit", "64", "--output-dir", "runs/a"
    )
    assert_nothing_leaks(done, tmp_path)
    assert (tmp_path / "runs" / "a" / "adapter" / ORIGIN).is_file()
    done = script("eval.py", "--adapter", "runs/a/adapter", "--json", "--limit", "4")
    assert_nothing_leaks(done, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "command",
    ["train.py --demo --model", "train.py --demo --dataset", "train.py --demo --eval-dataset",
     "train.py --demo --output-dir", "train.py --preview 1 --model", "train.py --resume", "train.py --config",
     "chat.py --model", "chat.py --adapter",
     "eval.py --adapter ADAPTER --model", "eval.py --adapter ADAPTER --dataset", "merge.py --output-dir m --adapter",
     "merge.py --output-dir m --adapter ADAPTER --model", "train.py --demo --push-to-hub",
     "merge.py --output-dir m --adapter ADAPTER --push-to-hub"],
)  # fmt: skip
def test_a_name_with_a_secret_is_refused_without_it(planted, script, adapter_folder, tmp_path, command, name):
    script_name, *options = command.replace("ADAPTER", str(adapter_folder)).split()
    done = script(script_name, *options, name, expect=None)
    assert done.returncode == 2 and "***" in done.stderr and done.stderr.count("\n") == 1
    assert_nothing_leaks(done, tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_mistyped_command_line_shows_no_secret(planted, script, tmp_path, name):
    for options in (["--no-such-option", "--model", name], [name], [f"--modle={name}"], ["--optimizer", name]):
        assert_nothing_leaks(script("train.py", *options, expect=2), tmp_path)


def test_a_secret_in_a_file_of_options(planted, script, tmp_path):
    for line in (f'model = "{NAMES[0]}"', f'dataset = ["{NAMES[1]}"]', f'epochs = "{NAMES[2]}"', f'"{NAMES[5]}" = 1'):
        (tmp_path / "o.toml").write_text(line)
        done = script("train.py", "--demo", "--config", "o.toml", expect=2)
        (tmp_path / "o.toml").unlink()
        one_line_error(done, "***")
        assert_nothing_leaks(done, tmp_path)


def test_ordinary_names_carry_no_secret():
    for name in ("Qwen/Qwen2-0.5B-Instruct", "hf_models/base", "/data/hf_cache/x", "C:\\a\\b", "a@b", "/mnt/me@host/x",
                 "runs/a:b", "train.jsonl:12: x"):  # fmt: skip
        assert redacted(name) == name
        assert Config(model=name).model == name


def test_secrets_in_the_package(planted):
    for name in NAMES:
        for use in (find_model, lambda n: Config(model=n), lambda n: Config(dataset=("a", n))):
            with pytest.raises(ValueError, match=r"\*\*\*.*carries a token or password.*HF_TOKEN") as error:
                use(name)
            assert not any(s in str(error.value) for s in (TOKEN, OTHER))


# ---------------------------------------------------------------------------------------------------------------------
# Foreign text in messages
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["x" * 10**6, ["y" * 10**5] * 10, {"k" * 10**6: "v" * 10**6}, "\x1b[31m\r\n\0", 1e300]
)
def test_shown_is_short_and_printable(value):
    for text in (shown(value), clipped(value, 120)):
        assert len(text) <= 120 and text.isprintable()


def test_short_texts_are_shown_whole():
    assert (shown("q_proj"), shown(["a", 1]), clipped(" two\nlines ")) == ("'q_proj'", "['a', 1]", "two lines")
    assert clipped("x" * 160) == "x" * 160 and clipped("x" * 161) == "x" * 157 + "..."
