"""What only a GPU can show. Run with: pytest -m gpu"""

import pytest
import torch

from qlora_min import demo
from qlora_min.config import Config
from qlora_min.lora import lora_parameters
from qlora_min.model import add_lora, dequantized_weight, load_base, resolve_precision
from qlora_min.train import Trainer, resume_config

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


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
            options(demo_data, tmp_path / on, precision=precision, dropout=0.1, gradient_checkpointing=on)
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
