"""The schedule against numbers, and the optimizer step: scaling, clipping, skipping, and going on after a reload."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import assert_same
from transformers import get_scheduler

from qlora_min.config import Config
from qlora_min.lora import LoraSpec, inject_lora, lora_layers, lora_parameters
from qlora_min.ops.flat import FlatLoRA
from qlora_min.optim import SKIPS_IN_A_ROW, Stepper, TrainingError, lr_schedule, make_optimizer
from qlora_min.run.checkpoint import flatten, unflatten

CPU = torch.device("cpu")
LR = 1e-2
OPTIMIZERS = ["adamw", "paged_adamw8bit"]
NOT_FINITE = [math.inf, -math.inf, math.nan]


# ---------------------------------------------------------------------------------------------------------------------
# The schedule
# ---------------------------------------------------------------------------------------------------------------------


def test_schedule_by_hand():
    """10 steps, 3 of them warm-up: quarters up to the peak, then half a cosine over 7 steps that ends at 0."""
    factor = lr_schedule(Config(warmup_ratio=0.3), 10)
    expected = [0.25, 0.5, 0.75, 1.0, 0.95048443, 0.81174490, 0.61126047, 0.38873953, 0.18825510, 0.04951557, 0.0]
    assert [factor(s) for s in range(11)] == pytest.approx(expected, abs=1e-8)
    factor = lr_schedule(Config(warmup_steps=2, schedule="linear"), 6)
    assert [factor(s) for s in range(8)] == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0, 0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(
    ("total", "given", "warmup"),
    [(10, {"warmup_ratio": 0.3}, 3), (100, {}, 3), (50, {"warmup_ratio": 0.03}, 2), (10, {"warmup_ratio": 0.0}, 0),
     (1, {"warmup_ratio": 0.0}, 0), (1, {"warmup_ratio": 0.5}, 1), (10, {"warmup_steps": 4}, 4),
     (10, {"warmup_steps": 0}, 0), (10, {"warmup_steps": 12}, 12)],
)  # fmt: skip
def test_schedule_is_transformers_after_the_warmup(schedule, total, given, warmup):
    factor = lr_schedule(Config(schedule=schedule, **given), total)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, warmup, total).lr_lambdas[0]
    after = range(warmup, total + 1) if warmup < total else ()
    assert [factor(s) for s in after] == pytest.approx([theirs(s) for s in after], rel=1e-12, abs=1e-15)
    assert [factor(s) for s in range(warmup)] == [(s + 1) / (warmup + 1) for s in range(warmup)]


def test_schedule_trains_at_every_step_and_stays_at_zero_after_the_end():
    factor = lr_schedule(Config(), 218)
    assert all(0 < factor(s) <= 1 for s in range(218))
    assert factor(218) == factor(1000) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------------------------


class Setup:
    """Two LoRA layers: at width 256 their A have 4,096 elements (8-bit state), their B 512 (fp32 state)."""

    def __init__(self, optimizer: str, fp16: bool = True, max_grad_norm: float = 1.0, width: int = 256):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(width, 32), nn.Linear(32, width), nn.Linear(width, 32))
        self.width = width
        inject_lora(self.model, LoraSpec(16, 24, targets=("0", "2")))
        for layer in lora_layers(self.model).values():
            nn.init.normal_(layer.lora_B)
        self.params = lora_parameters(self.model)
        config = Config(optimizer=optimizer, learning_rate=LR, warmup_ratio=0.1, max_grad_norm=max_grad_norm)
        self.stepper = Stepper(FlatLoRA(lora_layers(self.model).values(), CPU), config, 50, fp16)

    def backward(self, seed: int, size: float = 1.0) -> None:
        g = torch.Generator().manual_seed(seed)
        loss = size * self.model(torch.randn(8, self.width, generator=g)).square().mean()
        self.stepper.scaler.scale(loss).backward()

    def step(self, seed: int) -> tuple[float, bool]:
        self.backward(seed)
        return self.stepper.step()

    def broken_step(self, name: str, value: float) -> tuple[float, bool]:
        """A step with one element of one gradient not finite."""
        self.backward(99)
        self.params[name].grad.view(-1)[-1] = value
        return self.stepper.step()

    def everything(self) -> dict:
        """Weights, optimizer state and the schedule's position, as they are now."""
        weights = {n: p.detach() for n, p in self.params.items()}
        lr = self.stepper.lr
        return copy.deepcopy(
            {
                "weights": weights,
                "optimizer": self.stepper.optimizer.state_dict(),
                "taken": self.stepper.taken,
                "lr": lr,
            }
        )


PARAMETERS = list(Setup("adamw").params)


def moved(a: dict, b: dict) -> list[str]:
    return [n for n in a["weights"] if not torch.equal(a["weights"][n], b["weights"][n])]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_in_any_one_gradient_leaves_no_trace(optimizer, name, value):
    """fp16: the step is skipped and counted, the scale halved; weights, optimizer and schedule stay where they were."""
    setup = Setup(optimizer)
    start = setup.everything()
    assert setup.step(0)[1]
    before, scale = setup.everything(), setup.stepper.scaler.get_scale()
    assert moved(start, before) == PARAMETERS
    assert before["lr"] > start["lr"]  # warming up

    norm, taken = setup.broken_step(name, value)

    assert not taken
    assert not math.isfinite(norm)
    assert_same(setup.everything(), before)
    assert (setup.stepper.taken, setup.stepper.skipped, setup.stepper.skipped_in_a_row) == (1, 1, 1)
    assert setup.stepper.scaler.get_scale() == scale / 2
    assert not any(p.grad.any() for p in setup.params.values())

    assert setup.step(1)[1]  # and training goes on, as if nothing had been
    other = Setup(optimizer)
    other.step(0), other.step(1)
    assert_same(setup.everything(), other.everything())
    assert (setup.stepper.taken, setup.stepper.skipped, setup.stepper.skipped_in_a_row) == (2, 1, 0)


def test_an_overflow_in_an_earlier_micro_batch_is_not_forgotten():
    """An inf of the first backward survives the adding-up of the second."""
    setup = Setup("adamw")
    before = setup.everything()
    setup.backward(0)
    setup.params[PARAMETERS[0]].grad[0, 0] = math.inf
    setup.backward(1)
    assert not setup.stepper.step()[1]
    assert_same(setup.everything(), before)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_guard_without_fp16(optimizer):
    setup = Setup(optimizer, fp16=False)
    setup.step(0)
    before = setup.everything()
    assert not setup.broken_step(PARAMETERS[1], math.nan)[1]
    assert_same(setup.everything(), before)
    assert setup.stepper.skipped == 1


@pytest.mark.parametrize("fp16", [True, False])
def test_twenty_skips_in_a_row_end_the_run(fp16):
    assert SKIPS_IN_A_ROW == 20
    setup = Setup("adamw", fp16)
    for _ in range(19):
        setup.broken_step(PARAMETERS[0], math.inf)
    assert setup.step(0)[1], "19 in a row are borne"
    before = setup.everything()
    for _ in range(19):
        setup.broken_step(PARAMETERS[0], math.inf)
    with pytest.raises(TrainingError, match="20 optimizer steps in a row"):
        setup.broken_step(PARAMETERS[0], math.inf)
    assert (setup.stepper.taken, setup.stepper.skipped) == (1, 39)
    assert_same(setup.everything(), before)


@pytest.mark.parametrize("fp16", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipping_is_to_the_unscaled_gradients_norm(optimizer, fp16):
    """The optimizer sees g * min(1, max / norm(g)), g the unscaled gradient, and the schedule's learning rate."""
    setup = Setup(optimizer, fp16, max_grad_norm=0.5)
    opt, seen = setup.stepper.optimizer, []
    step = opt.step

    def spy(*args, **kwargs):
        seen.append(([p.grad.clone() for p in setup.params.values()], [g["lr"] for g in opt.param_groups]))
        return step(*args, **kwargs)

    opt.step = spy
    factors = [1 / 6, 2 / 6, 3 / 6]  # 5 steps of warm-up
    for i, size in enumerate((1e-4, 1.0, 100.0)):  # the first is not clipped
        setup.backward(2 * i, size), setup.backward(2 * i + 1, size)
        scale = 65536.0 if fp16 else 1.0
        grads = [p.grad.double() / scale for p in setup.params.values()]
        expected_norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        assert (expected_norm < 0.5) == (i == 0)

        norm, taken = setup.stepper.step()

        assert taken
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        clipped, lrs = seen[-1]
        for g, c in zip(grads, clipped, strict=True):
            torch.testing.assert_close(c.double(), g * min(1.0, 0.5 / expected_norm), rtol=5e-6, atol=1e-12)
        assert lrs == [pytest.approx(LR * factors[i], rel=1e-12)] * 2  # of 8-bit state, and of fp32
    assert len(seen) == 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loss_scale_changes_no_step(optimizer):
    """A scale is a power of two, so that scaling and unscaling are exact: fp32 weights move as without."""
    scaled, plain = Setup(optimizer, fp16=True), Setup(optimizer, fp16=False)
    for seed in range(4):
        assert scaled.step(seed) == plain.step(seed)
    assert_same(scaled.everything(), plain.everything())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_reloaded_state_goes_on_bit_for_bit(optimizer):
    """Through the checkpoint's format: JSON and tensors."""
    whole = Setup(optimizer)
    whole.step(0), whole.broken_step(PARAMETERS[0], math.inf), whole.step(1)
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(flatten(whole.stepper.state_dict(), tensors))
    weights = {n: p.detach().clone() for n, p in whole.params.items()}
    for seed in (2, 3, 4):
        whole.step(seed)

    resumed = Setup(optimizer)
    with torch.no_grad():
        for n, p in resumed.params.items():
            p.copy_(weights[n])
    resumed.stepper.load_state_dict(unflatten(json.loads(text), tensors))
    assert resumed.stepper.scaler.get_scale() == 32768.0  # halved once
    for seed in (2, 3, 4):
        resumed.step(seed)

    assert_same(resumed.everything(), whole.everything())
    assert_same(resumed.stepper.state_dict(), whole.stepper.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# The optimizers
# ---------------------------------------------------------------------------------------------------------------------


def optimizer_of(
    name: str,
    large: list[nn.Parameter],
    small: list[nn.Parameter] | tuple = (),
    learning_rate: float = LR,
    weight_decay: float = 0.0,
) -> torch.optim.Optimizer:
    """Of these tensors as they are, which `FlatLoRA` would choose itself."""
    adapter = SimpleNamespace(large=large, small=list(small), largest=max(p.numel() for p in [*large, *small]))
    return make_optimizer(adapter, Config(optimizer=name, learning_rate=learning_rate, weight_decay=weight_decay))


def test_paged_adamw8bit_keeps_8_bits_from_4096_elements_on():
    """And pages from 100,000 on."""
    params = [nn.Parameter(torch.randn(n)) for n in (4095, 4096, 100_000)]
    optimizer = optimizer_of("paged_adamw8bit", params)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    kinds = [{optimizer.state[p][k].dtype for k in ("state1", "state2")} for p in params]
    assert kinds == [{torch.float32}, {torch.uint8}, {torch.uint8}]
    assert optimizer.is_paged
    assert not optimizer_of("paged_adamw8bit", [nn.Parameter(torch.randn(99_999))]).is_paged


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_tensor_has_its_own_state(optimizer):
    """Where blocks of 8-bit state would span two matrices, each matrix is stepped by itself: nothing is flattened."""
    setup = Setup(optimizer, width=260)  # 260 x 16 is no multiple of 256
    setup.step(0)
    opt = setup.stepper.optimizer
    first_A, first_B, second_A, second_B = map(id, setup.params.values())
    assert [[id(p) for p in group["params"]] for group in opt.param_groups] == [
        [first_A, second_A],
        [first_B, second_B],
    ]
    assert set(map(id, opt.state)) == set(map(id, setup.params.values()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_flat_tensor_has_one_state_and_is_not_paged_for_its_size(optimizer):
    setup = Setup(optimizer)
    setup.step(0)
    opt = setup.stepper.optimizer
    assert [[p.numel() for p in group["params"]] for group in opt.param_groups] == [[2 * 4096], [2 * 512]]
    assert [p.numel() for p in opt.state] == [2 * 4096, 2 * 512]
    assert not getattr(opt, "is_paged", False)
    if optimizer == "paged_adamw8bit":
        assert [state["state1"].dtype for state in opt.state.values()] == [torch.uint8, torch.float32]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_first_step_is_adamws(optimizer):
    """By hand: w (1 - lr decay) - lr g / (|g| + eps), since both corrected moments are the first gradient's."""
    torch.manual_seed(0)
    start, grad = torch.randn(1000), torch.randn(1000)
    p = nn.Parameter(start.clone())
    p.grad = grad.clone()
    optimizer_of(optimizer, [p], weight_decay=0.1).step()
    expected = start * (1 - LR * 0.1) - LR * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_flat_tensor_steps_as_its_matrices_do(name):
    """Bit for bit: three matrices with 8-bit state in one tensor, two below 4,096 elements in another."""
    torch.manual_seed(0)
    shapes = [(16, 896), (16, 576), (896, 16), (128, 16), (64, 16)]
    matrices = [nn.Parameter(torch.randn(s)) for s in shapes]
    large, small = (
        nn.Parameter(torch.cat([w.detach().flatten() for w in part])) for part in (matrices[:3], matrices[3:])
    )
    apart = optimizer_of(name, matrices, (), 1e-3, 0.01)
    together = optimizer_of(name, [large], [small], 1e-3, 0.01)
    for _ in range(20):
        for w in matrices:
            w.grad = 1e-3 * torch.randn_like(w)
        large.grad, small.grad = (torch.cat([w.grad.flatten() for w in part]) for part in (matrices[:3], matrices[3:]))
        apart.step(), together.step()
    assert torch.equal(torch.cat([w.flatten() for w in matrices]), torch.cat([large, small]))
    if name == "paged_adamw8bit":
        kinds = [together.state[w]["state1"].dtype for w in (large, small)]
        assert kinds == [torch.uint8, torch.float32]
