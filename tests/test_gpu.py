"""What only a GPU can show. Run with: pytest -m gpu"""

import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from qlora_min import checkpoint, demo, ops
from qlora_min.config import Config
from qlora_min.data import Row, collate
from qlora_min.decoder import Captured, Decoder, computer, dropout_seed, pack
from qlora_min.lora import lora_parameters
from qlora_min.loss import masked_cross_entropy
from qlora_min.model import (
    add_lora,
    autocast,
    dequantized_weight,
    hidden_states,
    load_base,
    output_head,
    resolve_precision,
)
from qlora_min.train import Trainer, resume_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def options(demo_data, run, **more):
    train, held = demo_data
    files = {"model": str(demo.MODEL_DIR), "dataset": (str(train),), "eval_dataset": (str(held),)}
    fixed = {"limit": 128, "eval_limit": 32, "batch_size": 4, "grad_accum": 2, "max_steps": 12, "log_every": 1}
    return Config(**{**files, **fixed, "output_dir": str(run), "learning_rate": 2e-3, **more})


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_forward_backward_and_dequantize_use_one_weight(precision):
    base = load_base(str(demo.MODEL_DIR), "nf4", precision, CUDA)
    layer = base.model.model.layers[0].mlp.down_proj
    x = torch.randn(2000, layer.in_features, device=CUDA, dtype=base.dtype, requires_grad=True)
    y = layer(x)
    w = dequantized_weight(layer)
    assert w.dtype == base.dtype and torch.equal(y, torch.nn.functional.linear(x, w))
    g = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, g)
    assert torch.equal(grad, g @ w)


def test_auto_precision_asks_the_hardware():
    major, _ = torch.cuda.get_device_capability()
    assert resolve_precision("auto", CUDA) == ("bf16" if major >= 8 else "fp16")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_checkpointing_changes_no_gradient(demo_data, tmp_path, precision):
    grads = []
    for on in ("on", "off"):
        trainer = Trainer(
            options(
                demo_data, tmp_path / on, precision=precision, dropout=0.1, gradient_checkpointing=on, packing="off"
            )
        )
        torch.manual_seed(1)
        batches, _ = trainer.step_batches(0)
        for batch in batches:
            trainer.loss(batch.to(CUDA)).backward()
        grads.append([p.grad.clone() for p in lora_parameters(trainer.model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert any(g.abs().max() > 0 for g in grads[0])


def test_gpu_and_cpu_agree(demo_data, tmp_path, monkeypatch):
    on_gpu = Trainer(options(demo_data, tmp_path / "gpu", precision="fp32")).evaluate()
    monkeypatch.setattr("qlora_min.train.pick_device", lambda: torch.device("cpu"))
    on_cpu = Trainer(options(demo_data, tmp_path / "cpu", precision="fp32")).evaluate()
    assert on_gpu.loss == pytest.approx(on_cpu.loss, rel=1e-3)  # the two quantise absmaxes a code apart here and there


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_resume_is_bitwise(demo_data, tmp_path, precision):
    whole = Trainer(options(demo_data, tmp_path / "whole", precision=precision, eval_every=4))
    whole.train()
    part = Trainer(options(demo_data, tmp_path / "part", precision=precision, eval_every=4))
    part.total_steps, total = 8, part.total_steps
    part._finish = lambda: part.progress
    part.train()
    assert part.progress.step < total
    torch.cuda.manual_seed_all(0)  # the checkpoint's own state must come back
    again = Trainer(*resume_config(str(tmp_path / "part"), {}))
    again.train()
    for (name, a), b in zip(lora_parameters(whole.model).items(), lora_parameters(again.model).values()):
        assert torch.equal(a, b), name


def test_adapters_start_equal_on_gpu_and_cpu():
    made = []
    for device in (CUDA, torch.device("cpu")):
        torch.manual_seed(3)
        base = load_base(str(demo.MODEL_DIR), "nf4", "fp32", device)
        torch.manual_seed(3)
        add_lora(base, ("q_proj",), 8, 16, 0.0)
        made.append([p.cpu() for p in lora_parameters(base.model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*made))


# ---------------------------------------------------------------------------------------------------------------------
# Kernels and graphs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch):
    """plain(function, *args) -> what the formula in ops.py computes on the GPU."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as m:
            m.setattr(ops, "_on_gpu", lambda x: None)
            return function(*args, **kwargs)

    return call


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def near(mine, reference, dtype=None):
    assert mine.dtype == reference.dtype and mine.shape == reference.shape
    error = (mine.double() - reference.double()).norm() / reference.double().norm()
    assert error < NEAR[dtype or mine.dtype], error


@DTYPES
def test_kernels_compute_the_formulas(plain, dtype):
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
        mine, reference = ops.add_norm(x, more, w, 1e-6, dtype), plain(ops.add_norm, x, more, w, 1e-6, dtype)
        for a, b in zip(mine, reference):
            near(a, b)
    dy, rstd = draw(n, d), mine[2]
    for a, b in zip(
        ops.norm_backward(dy, x, rstd, w, dres.clone()), plain(ops.norm_backward, dy, x, rstd, w, dres.clone())
    ):
        near(a, b, dtype)
    gate_up, dh = draw(n, 2 * inner), draw(n, inner)
    near(ops.swiglu(gate_up), plain(ops.swiglu, gate_up))
    a, b = gate_up.clone(), gate_up.clone()
    ops.swiglu_backward_(dh, a), plain(ops.swiglu_backward_, dh, b)
    near(a, b)
    qkv, positions = draw(n, (heads + 2) * 2 * half), torch.arange(n, device=CUDA, dtype=torch.int32)
    angles = torch.rand(100, half, device=CUDA)
    for backward in (False, True):
        a, b = qkv.clone(), qkv.clone()
        ops.rotate_(a, angles.cos(), angles.sin(), positions, heads, backward)
        plain(ops.rotate_, b, angles.cos(), angles.sin(), positions, heads, backward)
        near(a, b)
        assert torch.equal(a[:, heads * 2 * half :], qkv[:, heads * 2 * half :])
    vocab = 151936
    logits, targets = 3 * draw(9, vocab, dtype=torch.float32), torch.randint(vocab, (9,), device=CUDA)
    weights, factor = (torch.arange(9, device=CUDA) < 7).float(), torch.tensor(8.0, device=CUDA)
    for a, b in zip(
        ops.cross_entropy(logits, targets, weights, factor, dtype),
        plain(ops.cross_entropy, logits, targets, weights, factor, dtype),
    ):
        near(a, b)


@DTYPES
def test_the_dropout_kernel(dtype):
    x, seed = torch.randn(300, 1000, device=CUDA, dtype=dtype).abs() + 1, torch.tensor(5, device=CUDA)
    y = ops.dropout(x, 0.05, seed, 3)
    assert (y == 0).float().mean().item() == pytest.approx(0.05, abs=0.003)
    near(y[y != 0], (x.float() / 0.95).to(dtype)[y != 0])
    assert torch.equal(y, ops.dropout(x, 0.05, seed, 3))
    assert not torch.equal(y, ops.dropout(x, 0.05, seed, 4)) and not torch.equal(y, ops.dropout(x, 0.05, seed + 9, 3))
    dx = torch.ones_like(x)
    ops.dropout_backward_(dx, x, 0.05, seed, 3)
    near(dx - 1, y)


def test_without_triton_a_gpu_computes_what_a_cpu_does(monkeypatch):
    """Dropout included, whose mask the formulas draw on the CPU."""
    monkeypatch.setattr(ops, "_kernels", lambda: None)
    base, mine, batches = decoder_and_batches("fp32")
    assert computer(base, False, 384, 384)[1].__class__ is Decoder
    twin = load_base(str(demo.MODEL_DIR), "nf4", "fp32", CPU)
    add_lora(twin, ("q_proj", "k_proj", "v_proj", "o_proj"), 16, 32.0, 0.1)
    with torch.no_grad():
        for a, b in zip(lora_parameters(twin.model).values(), lora_parameters(base.model).values()):
            a.copy_(b)
    losses, grads = [], []
    for decoder in (mine, Decoder(twin, False, 384)):
        batch = pack(batches[0], 320, 128, 8).to(decoder.device)
        factor, seed = (torch.tensor(n, device=decoder.device) for n in (0.5, 1))
        losses.append(decoder.loss_and_gradients(batch, factor, seed).item())
        grads.append(decoder.grads.cpu())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (grads[0] - grads[1]).norm() < 1e-3 * grads[1].norm()


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_kernel_dequantises_as_bitsandbytes_does(precision, quantization):
    base = load_base(str(demo.MODEL_DIR), quantization, precision, CUDA)
    mine = Decoder(base, False, 64)
    for i, layer in enumerate(mine.layers):
        mine.scratch.fill_(float("nan"))
        mine._dequantize(i)
        for p in layer.projections:
            assert torch.equal(p.weight, torch.cat([dequantized_weight(m) for m in p.bases]))


def decoder_and_batches(precision, checkpointing=False, dropout=0.1):
    rng = random.Random(0)
    base = load_base(str(demo.MODEL_DIR), "nf4", precision, CUDA)
    torch.manual_seed(0)
    add_lora(base, ("q_proj", "k_proj", "v_proj", "o_proj"), 16, 32.0, dropout)
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
    return base, Decoder(base, checkpointing, 384), batches


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_decoder_on_a_gpu_is_autograd_through_the_modules(precision, checkpointing):
    base, mine, batches = decoder_and_batches(precision, checkpointing, dropout=0.0)
    rows = batches[0]
    factor = torch.tensor(0.5, device=CUDA)
    loss = mine.loss_and_gradients(pack(rows, 320, 128, 8).to(CUDA), factor, torch.tensor(1, device=CUDA))
    grads = mine.grads.clone()
    mine.grads.zero_()
    batch = collate(rows).to(CUDA)
    with autocast(CUDA, base.dtype):
        hidden = hidden_states(base.model, batch.input_ids)
        reference, _ = masked_cross_entropy(hidden, output_head(base.model), batch.input_ids, batch.supervised)
    (reference * factor).backward()
    bound = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 6e-2}[precision]
    assert loss.item() == pytest.approx(reference.item(), rel=bound / 4)
    assert (grads - mine.grads).norm() / mine.grads.norm() < bound


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_change_nothing(precision, checkpointing):
    """100 micro-batches of two shapes: losses and gradients as without graphs, bit for bit, dropout included."""
    _, mine, batches = decoder_and_batches(precision, checkpointing)

    def run(compute, device):
        losses = []
        mine.grads.zero_()
        for i in range(100):
            batch = pack(batches[i % 6], 320 + 64 * (i % 2), 128, 8, longest=384).to(device)
            factor = torch.tensor(0.1, device=CUDA)
            losses.append(compute.loss_and_gradients(batch, factor, dropout_seed(1, i, 0).to(device)).clone())
        return torch.stack(losses), mine.grads.clone()

    plain, captured = run(mine, CUDA), Captured(mine)
    first, again = run(captured, CPU), run(captured, CPU)
    rebuilt = run(Captured(mine), CPU)
    for other in (first, again, rebuilt):
        assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])
    assert len(captured.graphs) == 2 and plain[1].norm() > 0
    assert len(set(plain[0].tolist())) > 90  # another mask every time


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
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        command += [str(ROOT / "scripts" / "train.py"), *options, "--output-dir", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        assert (run / "samples.jsonl").read_text()
        losses.append([e.get("loss", e.get("eval_loss")) for e in checkpoint.read_metrics(run) if "step" in e])
    assert len(losses[0]) > 20 and losses[1][:-1] == pytest.approx(losses[0][:-1], rel=1e-4)
