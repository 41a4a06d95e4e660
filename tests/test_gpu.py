"""What only a GPU can show. Run with: pytest -m gpu"""

import os
import random
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import ROOT
from test_prequantized import quantized_copy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_min import loop
from qlora_min.base import add_lora, load_base
from qlora_min.batches import dropout_seed, pack
from qlora_min.config import Config
from qlora_min.data.rows import Row
from qlora_min.demo import world
from qlora_min.evaluation import Evaluation, evaluate_rows
from qlora_min.fused.decoder import Decoder
from qlora_min.fused.graphs import Captured
from qlora_min.fused.select import captured, make_engine, modules_of
from qlora_min.lora import LoraSpec, lora_parameters
from qlora_min.ops import formulas, masks
from qlora_min.ops.attention import attention
from qlora_min.run import checkpoint
from qlora_min.run.resume import run_config
from qlora_min.run.trainer import Trainer
from qlora_min.system import device
from qlora_min.system.bits import dequantized_weight
from qlora_min.system.device import resolve_precision

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def options(demo_data, run, **more):
    train, held = demo_data
    files = {"model": str(world.MODEL_DIR), "dataset": (str(train),), "eval_dataset": (str(held),)}
    fixed = {"limit": 128, "eval_limit": 32, "batch_size": 4, "grad_accum": 2, "max_steps": 12, "log_every": 1}
    return Config(**{**files, **fixed, "output_dir": str(run), "learning_rate": 2e-3, **more})


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_forward_backward_and_dequantize_use_one_weight(precision):
    base = load_base(str(world.MODEL_DIR), "nf4", precision, CUDA)
    layer = base.model.model.layers[0].mlp.down_proj
    x = torch.randn(2000, layer.in_features, device=CUDA, dtype=base.dtype, requires_grad=True)
    y = layer(x)
    w = dequantized_weight(layer)
    assert w.dtype == base.dtype and torch.equal(y, torch.nn.functional.linear(x, w))
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, g)
    assert torch.equal(grad, g @ w)


@pytest.mark.parametrize("how", [{}, {"keep": ("layers.0.mlp",)}, {"blocksize": 128, "compress_statistics": False}])
def test_a_base_stored_in_4_bits(tmp_path, how):
    """Our kernel dequantises the layers that have its form, bitsandbytes the others; both engines agree."""
    base = load_base(str(quantized_copy(tmp_path / "model", **how)), "nf4", "fp32", CUDA)
    add_lora(base, LoraSpec(8, 16.0, 0.1, ATTENTION))
    for p in lora_parameters(base.model).values():
        torch.nn.init.normal_(p, std=0.1)
    rows, found = [Row(torch.arange(3, 43, dtype=torch.int32), torch.arange(40) > 5, "")], []
    for name in ("fused", "modules"):
        engine = make_engine(base, name, 64)[0]
        engine.loss_and_gradients(engine.pack(rows), torch.tensor(1.0, device=CUDA), dropout_seed(0, 0).to(CUDA))
        found.append(engine.adapter.grads.clone())
        if name == "fused" and formulas.have_kernels():
            assert [d is None for d in engine.weights.dequantizers] == [bool(how) and ("keep" not in how or i == 0)
                                                                for i in range(len(engine.layers))]  # fmt: skip
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


def test_auto_precision_asks_the_hardware():
    major, _ = torch.cuda.get_device_capability()
    assert resolve_precision("auto", CUDA) == ("bf16" if major >= 8 else "fp16")


ENGINES = pytest.mark.parametrize("engine", ["fused", "modules"])


@ENGINES
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_checkpointing_changes_no_gradient(demo_data, tmp_path, precision, engine):
    grads = []
    for on in ("on", "off"):
        how = {"gradient_checkpointing": on, "engine": engine, "micro_batch_tokens": 300}
        trainer = Trainer(options(demo_data, tmp_path / on, precision=precision, dropout=0.1, **how))
        for batch in trainer.feed[0][0]:
            trainer.feed.engine.loss_and_gradients(batch, torch.tensor(0.1), dropout_seed(1, 0))
        grads.append(trainer.engine.adapter.grads.clone())
    assert torch.equal(*grads) and grads[0].norm() > 0


def evaluation(trainer: Trainer) -> Evaluation:
    """Of the held-out rows, as the loop makes it."""
    return evaluate_rows(trainer.feed.engine, trainer.held_out_here, loop.EVALUATED, None, trainer.feed.n_tokens)


def test_gpu_and_cpu_agree(demo_data, tmp_path, monkeypatch):
    on_gpu = evaluation(Trainer(options(demo_data, tmp_path / "gpu", precision="fp32")))
    monkeypatch.setattr("qlora_min.run.trainer.pick_device", lambda: torch.device("cpu"))
    on_cpu = evaluation(Trainer(options(demo_data, tmp_path / "cpu", precision="fp32")))
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)  # the two quantise absmaxes a code apart here and there


@ENGINES
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_resume_is_bitwise(demo_data, tmp_path, monkeypatch, precision, engine):
    whole = Trainer(options(demo_data, tmp_path / "whole", precision=precision, eval_every=4, engine=engine))
    whole.train()
    part = Trainer(options(demo_data, tmp_path / "part", precision=precision, eval_every=4, engine=engine))
    part.schedule.total_steps, total = 8, part.schedule.total_steps
    with monkeypatch.context() as m:
        m.setattr("qlora_min.run.trainer.finish", lambda trainer: None)
        part.train()
    assert part.progress.step < total
    torch.cuda.manual_seed_all(0)  # the checkpoint's own state must come back
    again = Trainer(*run_config(str(tmp_path / "part"), {}))
    again.train()
    for (name, a), b in zip(lora_parameters(whole.base.model).items(), lora_parameters(again.base.model).values()):
        assert torch.equal(a, b), name


def test_adapters_start_equal_on_gpu_and_cpu():
    made = []
    for where in (CUDA, CPU):
        torch.manual_seed(3)
        base = load_base(str(world.MODEL_DIR), "nf4", "fp32", where)
        torch.manual_seed(3)
        add_lora(base, LoraSpec(8, 16.0, 0.0, ("q_proj",)))
        made.append([p.cpu() for p in lora_parameters(base.model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*made))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels and graphs
# ---------------------------------------------------------------------------------------------------------------------


def plain(function, *args, **kwargs):
    """What the formula in ops/formulas.py computes on the GPU."""
    with formulas.use_formulas():
        return function(*args, **kwargs)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def near(mine, reference, dtype=None):
    assert mine.dtype == reference.dtype and mine.shape == reference.shape
    error = (mine.double() - reference.double()).norm() / reference.double().norm()
    assert error < NEAR[dtype or mine.dtype], error


@DTYPES
def test_kernels_compute_the_formulas(dtype):
    torch.manual_seed(0)
    n, d, inner, heads, half = 67, 896, 4864, 16, 32  # sizes that are no powers of 2

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, device=CUDA, dtype=dtype)

    x, delta, w, dres = (
        draw(n, d, dtype=torch.float32),
        draw(n, d),
        draw(d, dtype=torch.float32),
        draw(n, d, dtype=torch.float32),
    )
    for more in (None, delta):
        mine, reference = formulas.add_norm(x, more, w, 1e-6, dtype), plain(formulas.add_norm, x, more, w, 1e-6, dtype)
        for a, b in zip(mine, reference):
            near(a, b)
    dy, rstd = draw(n, d), mine[2]
    for a, b in zip(
        formulas.norm_backward(dy, x, rstd, w, dres.clone()),
        plain(formulas.norm_backward, dy, x, rstd, w, dres.clone()),
    ):
        near(a, b, dtype)
    gate_up, dh = draw(n, 2 * inner), draw(n, inner)
    near(formulas.swiglu(gate_up), plain(formulas.swiglu, gate_up))
    a, b = gate_up.clone(), gate_up.clone()
    formulas.swiglu_backward_(dh, a), plain(formulas.swiglu_backward_, dh, b)
    near(a, b)
    qkv, positions = draw(n, (heads + 2) * 2 * half), torch.arange(n, device=CUDA)
    angles = torch.rand(100, half, device=CUDA)
    rotary = angles.cos(), angles.sin(), positions, heads
    for norm in (None, (draw(heads, 2 * half, dtype=torch.float32), 1e-6)):
        a, b = formulas.rotate(qkv.clone(), *rotary, norm), plain(formulas.rotate, qkv.clone(), *rotary, norm)
        near(a, b)
        assert torch.equal(a[:, heads * 2 * half :], qkv[:, heads * 2 * half :])
        a, b = draw(*qkv.shape), None
        b = a.clone()
        formulas.rotate_backward_(a, qkv, *rotary, norm), plain(formulas.rotate_backward_, b, qkv, *rotary, norm)
        near(a, b)
    vocab = 151936
    logits, targets = 3 * draw(9, vocab, dtype=torch.float32), torch.randint(vocab, (9,), device=CUDA)
    weights, factor = (torch.arange(9, device=CUDA) < 7).float(), torch.tensor(8.0, device=CUDA)
    for a, b in zip(
        formulas.cross_entropy(logits, targets, weights, factor, dtype),
        plain(formulas.cross_entropy, logits, targets, weights, factor, dtype),
    ):
        near(a, b)


@DTYPES
@pytest.mark.parametrize("features", [1000, 1031])
def test_the_dropout_kernel_draws_the_formulas_bits(dtype, features):
    """As a CPU does, too."""
    row_ids, positions = torch.arange(300) // 7, torch.arange(300) % 7
    keys = masks.dropout_keys(torch.tensor(5, dtype=torch.int32), row_ids, positions)
    on_gpu = masks.dropout_keys(torch.tensor(5, dtype=torch.int32, device=CUDA), row_ids.cuda(), positions.cuda())
    assert torch.equal(keys, on_gpu.cpu())
    x = torch.randn(300, features, device=CUDA, dtype=dtype).abs() + 1
    y = formulas.dropout(x, 0.05, on_gpu, 3)
    assert torch.equal((y != 0).cpu(), masks.dropout_mask(keys, 0.05, 3, features))
    assert torch.equal(y, plain(formulas.dropout, x, 0.05, on_gpu, 3))
    dx, reference = torch.ones_like(x), torch.ones_like(x)
    formulas.dropout_backward_(dx, x, 0.05, on_gpu, 3), plain(formulas.dropout_backward_, reference, x, 0.05, on_gpu, 3)
    near(dx, reference)


def by_formula(q, k, v, lengths, scale, window):
    """Attention row by row, in fp64."""
    out = []
    for a, b, c in zip(*(t.double().split(lengths) for t in (q, k, v))):
        b, c = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (b, c))
        scores = torch.einsum("nhp,mhp->hnm", a, b) * scale
        seen = torch.ones(len(a), len(a), device=CUDA).tril()
        seen = seen.triu(1 - window) if window else seen
        scores = scores.masked_fill(seen == 0, float("-inf")).softmax(-1)
        out.append(torch.einsum("hnm,mhp->nhp", scores, c))
    return torch.cat(out)


@pytest.mark.parametrize("capability", [(9, 0), (7, 5)], ids=["flash", "a T4's"])
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("head_dim", [24, 64, 128, 256])
@DTYPES
def test_attention_stays_within_rows_and_windows(monkeypatch, dtype, head_dim, window, capability):
    """Our kernels, and the memory-efficient attention of fp32 and older GPUs: values, gradients, the same bits."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    torch.manual_seed(0)
    lengths, cu_seqlens = [5, 170, 1, 33], torch.tensor([0, 5, 175, 176, 209, 209], device=CUDA, dtype=torch.int32)
    qkv = torch.randn(209, 8 + 2 + 2, head_dim, device=CUDA, dtype=dtype, requires_grad=True)
    dout = torch.randn(209, 8, head_dim, device=CUDA, dtype=dtype)
    reference = by_formula(*qkv.split([8, 2, 2], 1), lengths, 0.2, window)
    expected = torch.autograd.grad(reference, qkv, dout.double())
    found = []
    for _ in range(2):
        out = attention(qkv, 2, cu_seqlens, 200, 0.2, window)
        found.append((out, *torch.autograd.grad(out, qkv, dout)))
    for again, mine, theirs in zip(*found, (reference, *expected)):
        near(mine, theirs.to(mine.dtype))
        assert torch.equal(mine, again)


def test_without_triton_a_gpu_computes_what_a_cpu_does(monkeypatch):
    """Dropout included, and as graphs."""
    monkeypatch.setattr(formulas, "why_formulas", "a test")
    base, mine, batches = engine_and_batches("fp32")
    graphs = captured(mine, 384, 384)
    assert isinstance(graphs, Captured)
    twin = load_base(str(world.MODEL_DIR), "nf4", "fp32", CPU)
    add_lora(twin, LoraSpec(16, 32.0, 0.1, ATTENTION))
    with torch.no_grad():
        for a, b in zip(lora_parameters(twin.model).values(), lora_parameters(base.model).values()):
            a.copy_(b)
    losses, grads = [], []
    for engine in (graphs, Decoder(twin, 384)):
        batch = pack(batches[0], None, 320, 128, 8)
        losses.append(engine.loss_and_gradients(batch, torch.tensor(0.5), dropout_seed(1, 1)).item())
        grads.append(engine.adapter.grads.cpu())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@pytest.mark.parametrize("how", ["raises", "differs"])
@pytest.mark.parametrize("name", ["rotate", "dropout", "cross_entropy", "Dequantizer"])
def test_a_kernel_that_fails_leaves_the_formulas(monkeypatch, name, how):
    from qlora_min.ops import kernels

    monkeypatch.setattr(formulas, "why_formulas", "")
    real = getattr(kernels, name)

    def broken(*args):
        if how == "raises":
            raise RuntimeError("PassManager::run failed")
        result = real(*args)
        if name == "Dequantizer":
            return lambda out: (result(out), out[:4].add_(1))
        for t in result if isinstance(result, tuple) else (result,):
            t.mul_(1.1)
        return result

    monkeypatch.setattr(kernels, name, broken)
    base, engine, batches = engine_and_batches("fp16")
    assert (
        "does not compile (RuntimeError)" if how == "raises" else "computes something else"
    ) in formulas.why_formulas
    batch = pack(batches[0], None, 320, 128, 8).to(CUDA)
    loss = engine.loss_and_gradients(batch, torch.tensor(0.5, device=CUDA), dropout_seed(1, 1).to(CUDA))
    modules = modules_of(base, 384)
    reference = modules.loss_and_gradients(batch, torch.tensor(0.5, device=CUDA), dropout_seed(1, 1).to(CUDA))
    assert loss.item() == pytest.approx(reference.item(), rel=3e-3)


@pytest.mark.parametrize("triton", [True, False], ids=["Triton 7.5", "no Triton"])
@pytest.mark.parametrize("engine", ["fused", "modules"])
def test_the_demo_trains_on_a_t4_as_software_sees_it(tmp_path, triton, engine):
    environment = os.environ | ({} if triton else {"NO_TRITON": "1"})
    command = [sys.executable, str(ROOT / "tests" / "t4.py"), str(ROOT / "scripts" / "train.py"), "--demo"]
    command += ["--engine", engine, "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fp16 on Tesla T4 (emulated)" in done.stdout and "as CUDA graphs" in done.stdout
    assert ("formulas instead of kernels: Triton is missing" in done.stdout) is (not triton)
    end = checkpoint.read_metrics(tmp_path / "run")[-1]
    assert end["best"]["option_accuracy"] > 0.99


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_kernel_dequantises_as_bitsandbytes_does(precision, quantization):
    base = load_base(str(world.MODEL_DIR), quantization, precision, CUDA)
    mine = Decoder(base, 64)
    for i, layer in enumerate(mine.layers):
        mine.weights.scratch.fill_(float("nan"))
        mine.weights._dequantize(i)
        for p in layer.projections:
            assert torch.equal(p.weight, torch.cat([dequantized_weight(m) for m in p.linears]))


def engine_and_batches(precision, checkpointing=False, dropout=0.1, engine="fused"):
    rng = random.Random(0)
    base = load_base(str(world.MODEL_DIR), "nf4", precision, CUDA)
    torch.manual_seed(0)
    add_lora(base, LoraSpec(16, 32.0, dropout, ATTENTION))
    for name, p in lora_parameters(base.model).items():
        if name.endswith("B"):
            torch.nn.init.normal_(p, std=0.02)
    batches = []
    for _ in range(6):
        rows = []
        for _ in range(5):
            length = rng.randint(5, 60)
            ids = torch.tensor([rng.randrange(500) for _ in range(length)], dtype=torch.int32)
            rows.append(Row(ids, torch.tensor([rng.random() < 0.3 for _ in range(length)]), ""))
        batches.append(rows)
    made, _, _ = make_engine(base, engine, 384)
    made.checkpointing = checkpointing
    return base, made, batches


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_both_engines_compute_the_same(precision, checkpointing):
    """Dropout on."""
    base, fused, batches = engine_and_batches(precision, checkpointing)
    batch = pack(batches[0], None, 320, 128, 8).to(CUDA)
    factor, seed = torch.tensor(0.5, device=CUDA), dropout_seed(1, 1).to(CUDA)
    loss = fused.loss_and_gradients(batch, factor, seed).item()
    grads = fused.adapter.grads.clone()
    modules = modules_of(base, 384)
    modules.checkpointing = checkpointing
    assert not modules.mixing
    reference = modules.loss_and_gradients(batch, factor, seed).item()
    bound = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2}[precision]
    assert loss == pytest.approx(reference, rel=bound / 4)
    assert (grads - modules.adapter.grads).norm() / grads.norm() < bound


@ENGINES
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_change_nothing(precision, checkpointing, engine):
    """100 micro-batches of two shapes: losses and gradients as without graphs, bit for bit, dropout included."""
    _, mine, batches = engine_and_batches(precision, checkpointing, engine=engine)

    def run(compute, device):
        losses = []
        mine.adapter.grads.zero_()
        for i in range(100):
            batch = pack(batches[i % 6], None, 320 + 64 * (i % 2), 128, 8, max_seqlen=384).to(device)
            factor = torch.tensor(0.1, device=CUDA)
            losses.append(compute.loss_and_gradients(batch, factor, dropout_seed(1, i).to(device)).clone())
        return torch.stack(losses), mine.adapter.grads.clone()

    eager, graphs = run(mine, CUDA), captured(mine, 384, 384)
    first, again = run(graphs, CPU), run(graphs, CPU)
    rebuilt = run(captured(mine, 384, 384), CPU)
    for other in (first, again, rebuilt):
        assert torch.equal(eager[0], other[0]) and torch.equal(eager[1], other[1])
    assert len(graphs.graphs) == 2 and eager[1].norm() > 0
    assert len(set(eager[0].tolist())) > 90  # another mask every time


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 32000, "head_dim": 64}  # fmt: skip


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize(("family", "engine"), [("qwen3", "fused"), ("qwen3", "modules"), ("gemma3_text", "modules")])
def test_the_peak_is_within_10_percent_of_what_was_measured_before(tmp_path, family, engine, checkpointing):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE)).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(tmp_path / "base")
    rows = [Row(torch.arange(300, dtype=torch.int32), torch.arange(300) > 250, "") for _ in range(32)]
    for tokens in (1200, 4800):
        device.release()
        before = torch.cuda.memory_allocated()  # what other tests left
        trainer = memory_trainer(tmp_path, rows, engine=engine, gradient_checkpointing=checkpointing, tokens=tokens)
        device.release()
        torch.cuda.reset_peak_memory_stats()
        take_steps(trainer)
        expected = trainer.footprint.total(tokens)
        assert torch.cuda.max_memory_allocated() - before == pytest.approx(expected, rel=0.1, abs=24 * 2**20)
        del trainer
        device.release()


def memory_trainer(tmp_path, rows, tokens=None, **more):
    import numpy as np

    from qlora_min.data.rows import Rows
    from qlora_min.run.datasets import Encoded

    data = Encoded("rows", Rows.write(rows), np.zeros(len(rows), np.uint64), np.ones(len(rows), bool))
    config = Config(
        model=str(tmp_path / "base"), output_dir=tempfile.mkdtemp(dir=tmp_path), precision="bf16",
        batch_size=4, grad_accum=4, micro_batch_tokens=tokens, save_minutes=0, max_steps=3, **more,
    )  # fmt: skip
    return Trainer(config, data=([data], []))


def take_steps(trainer: Trainer) -> None:
    """All three, as a run does, but that nothing is saved."""
    trainer.writer.save = lambda progress, finished: None
    loop.train(trainer.feed, trainer.stepper, trainer.held_out_here, trainer.config, trainer.progress, trainer.writer)
    assert trainer.progress.step == 3


@ENGINES
def test_a_step_that_runs_out_of_memory_is_repeated_with_smaller_micro_batches(tmp_path, engine, capsys, monkeypatch):
    """Memory is taken away behind the plan; the adapter is what it would have been."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SHAPE)).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(tmp_path / "base")
    rows = [Row(torch.arange(300, dtype=torch.int32), torch.arange(300) > 250, "") for _ in range(48)]
    weights = []
    for short in (False, True):
        trainer = memory_trainer(tmp_path, rows, tokens=4800, engine=engine, dropout=0.1, optimizer="adamw")
        device.release()
        if short:
            grows = trainer.footprint.total(4800) - trainer.footprint.total(0)
            most = torch.cuda.memory_reserved() + 0.7 * grows
            torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
        take_steps(trainer)
        torch.cuda.set_per_process_memory_fraction(1.0)
        weights.append(trainer.engine.adapter.weights.clone())
        assert (trainer.feed.n_tokens < 4800) is short
        del trainer
        device.release()
    assert "out of memory; its gradients are computed again" in capsys.readouterr().out
    assert (weights[0] - weights[1]).norm() < 1e-2 * weights[0].norm()


# ---------------------------------------------------------------------------------------------------------------------
# Two GPUs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "how",
    [[], ["--shard"], ["--shard", "--gradient-checkpointing", "on"], ["--shard", "--quantization", "none"]],
    ids=" ".join,
)
def test_two_gpus_make_the_run_of_one(tmp_path, how):
    options = ["--demo", "--max-steps", "20", "--dropout", "0", "--optimizer", "adamw", "--precision", "fp32"]
    options += ["--learning-rate", "2e-4", "--eval-every", "10", "--log-every", "1", *how]
    losses = []
    for count in (1, 2):
        run = tmp_path / str(count)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "--standalone"]
        command += [str(ROOT / "scripts" / "train.py"), *options, "--output-dir", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (run / "samples.jsonl").read_text()
        losses.append([e.get("loss", e.get("eval_loss")) for e in checkpoint.read_metrics(run) if "step" in e])
    assert len(losses[0]) > 20 and losses[1][:-1] == pytest.approx(losses[0][:-1], rel=1e-4)
