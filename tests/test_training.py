"""The loop: it trains as peft does, what must not change anything changes nothing, and a stopped run goes on."""

import math
import random
import re
from pathlib import Path

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import assert_same
from safetensors.torch import load_file

import qlora_min.base
import qlora_min.run.ending
import qlora_min.run.trainer
from qlora_min import loop
from qlora_min.base import add_lora, load_base
from qlora_min.batches import Packed, Schedule, cut, dropout_seed
from qlora_min.config import Config
from qlora_min.data.rows import Row
from qlora_min.demo import world
from qlora_min.engine import PACKED, Engine
from qlora_min.evaluation import Evaluation
from qlora_min.fused.decoder import Layer
from qlora_min.lora import LoraSpec, inject_lora, lora_layers, lora_parameters
from qlora_min.ops import masks
from qlora_min.ops.dropout import Dropout, Tokens
from qlora_min.optim import TrainingError
from qlora_min.run import checkpoint
from qlora_min.run.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Bitwise claims are about one device; and samples need not be long here."""
    monkeypatch.setattr(qlora_min.run.trainer, "pick_device", lambda: CPU)
    monkeypatch.setattr(qlora_min.run.ending, "SAMPLE_TOKENS", 4)


def conversations(count: int, seed: int) -> list[dict]:
    """Rows with one to three of the demo's questions each: ragged, with several answers in some."""
    questions = iter(world.rows(world.CONDITIONS, 3 * count, seed))
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(rng.randint(1, 3)):
            q = next(questions)
            messages.append({"role": "user", "content": f"{q['instruction']}\n\n{q['input']}"})
            messages.append({"role": "assistant", "content": q["output"]})
        rows.append({"messages": messages})
    return rows


@pytest.fixture
def make(tmp_path, write_rows):
    """make(name, rows=N, held=N, **options) -> a Trainer on N conversations that writes to tmp_path/name."""

    def trainer(name: str = "run", rows: int = 10, held: int = 0, **options) -> Trainer:
        given = {
            "model": str(world.MODEL_DIR),
            "dataset": (str(write_rows(conversations(rows, seed=1), "train.jsonl")),),
            "eval_dataset": (str(write_rows(conversations(held, seed=2), "held.jsonl")),) if held else (),
            "eval_fraction": 0.0,
            "output_dir": str(tmp_path / name),
            "batch_size": 2,
            "grad_accum": 2,
            "learning_rate": 1e-2,
            "rank": 16,
            "alpha": 24.0,  # alpha / rank is no power of two, so the order of operations shows
            "dropout": 0.1,
            "precision": "fp32",
            "gradient_checkpointing": "off",
            "log_every": 1,
        }
        return Trainer(Config(**given | options))

    return trainer


def trained(trainer: Trainer | Engine) -> dict[str, nn.Parameter]:
    return lora_parameters(trainer.base.model)


def weights(trainer: Trainer | Engine) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trained(trainer).items()}


def last_checkpoint(run: Path) -> dict:
    return checkpoint.load_checkpoint(run / "checkpoints" / f"step-{checkpoint.checkpoint_steps(run)[-1]}")


def relative(mine: torch.Tensor, reference: torch.Tensor) -> float:
    return ((mine - reference).norm() / reference.norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Against peft
# ---------------------------------------------------------------------------------------------------------------------

STEPS = 30
ENGINES = pytest.mark.parametrize("engine", ["modules", "fused"])
BOUND = {"adamw": 1e-5, "paged_adamw8bit": 3e-3}  # 8-bit state amplifies rounding


def backward(trainer: Trainer, batch: Packed, supervised: int, step: int) -> torch.Tensor:
    """Forward and backward of a micro-batch, as in `loop.compute_gradients`; the sum of its losses."""
    factor = trainer.stepper.scaled(1 / supervised)
    return trainer.feed.engine.loss_and_gradients(batch, factor, dropout_seed(trainer.config.seed, step))


def train_ours(trainer: Trainer, steps: int = STEPS) -> list[float]:
    """Optimizer steps as the loop takes them; the losses."""
    losses = []
    for step in range(steps):
        batches, supervised, _ = trainer.feed[step]
        losses.append(sum(backward(trainer, b, supervised, step).item() for b in batches) / supervised)
        assert trainer.stepper.step()[1]
    return losses


def peft_model(trainer: Trainer) -> tuple[nn.Module, Tokens]:
    """peft's model around a second load of the base, with our initial adapter; and what decides its dropouts' masks.

    peft's layers have our dropout: each draws the mask of our layer of the same name.
    """
    c = trainer.config
    base = load_base(c.model, c.quantization, "fp32", CPU).model
    base.is_loaded_in_4bit = True  # what transformers' own loading sets, and what peft asks for
    config = peft.LoraConfig(
        r=c.rank, lora_alpha=c.alpha, lora_dropout=c.dropout, use_rslora=c.rslora, target_modules=targets_of(c)
    )
    model, tokens = peft.get_peft_model(base, config), Tokens()
    named = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {type(m) for m in named.values()} == {peft.tuners.lora.Linear4bit}
    for name, layer in named.items():
        stream = trainer.base.model.get_submodule(name.removeprefix("base_model.model.")).dropout.stream
        assert isinstance(layer.lora_dropout["default"], nn.Dropout)
        layer.lora_dropout["default"] = Dropout(c.dropout, tokens, stream)
    with torch.no_grad():
        for name, p in peft_weights(model).items():
            p.copy_(trained(trainer)[name])
    return model.train(), tokens


def targets_of(c: Config) -> list[str] | str:
    return "all-linear" if c.targets == ("all-linear",) else list(c.targets)


def peft_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in peft's model, under our names."""
    named = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
    return {n.removeprefix("base_model.model.").replace(".default.weight", ""): p for n, p in named}


def full_logits_loss(model: nn.Module, rows: list[Row], places: list[int], tokens: Tokens, seed: torch.Tensor):
    """As everybody does it: padding and an attention mask, logits everywhere, labels -100 where nothing is learned."""
    longest = max(map(len, rows))
    ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (3, -100, 0))
    for i, r in enumerate(rows):
        ids[i, : len(r)], mask[i, : len(r)] = r.input_ids, 1
        labels[i, : len(r)] = torch.where(r.supervised, r.input_ids, -100)
    row_ids, position_ids = torch.tensor(places).repeat_interleave(longest), torch.arange(longest).repeat(len(rows))
    tokens.keys = masks.dropout_keys(seed, row_ids, position_ids)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


def same_order_loss(model: nn.Module, rows: list[Row], places: list[int], tokens: Tokens, seed: torch.Tensor):
    """The same number by our order of operations: rows packed, logits at the supervised positions, 64 at a time."""
    inner, lengths = model.get_base_model(), torch.tensor([len(r) for r in rows])
    ids, position_ids = torch.cat([r.input_ids for r in rows]).long(), torch.cat([torch.arange(len(r)) for r in rows])
    learned = torch.cat([r.supervised for r in rows])[1:] & (position_ids[1:] > 0)
    ends = F.pad(lengths.cumsum(0), (1, 0)).int()
    tokens.keys = masks.dropout_keys(seed, torch.tensor(places).repeat_interleave(lengths), position_ids)
    inner.config._attn_implementation = PACKED
    states = inner.model(
        input_ids=ids[None], position_ids=position_ids[None], use_cache=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends,
        max_length_q=max(lengths), max_length_k=max(lengths),
    ).last_hidden_state[0]  # fmt: skip
    parts = zip(states[:-1][learned].split(64), ids[1:][learned].split(64))
    return sum(F.cross_entropy(inner.lm_head(h), targets, reduction="none").sum() for h, targets in parts)


def train_peft(model: nn.Module, tokens: Tokens, trainer: Trainer, same_order: bool) -> list[float]:
    """A plain training loop around peft's model. From the trainer: options, which rows make up a step, seeds; and, in
    the same order, how these are cut, and which gradients' squares are summed together."""
    c, params = trainer.config, peft_weights(model)
    kind = {"adamw": torch.optim.AdamW, "paged_adamw8bit": bnb.optim.PagedAdamW8bit}[c.optimizer]
    optimizer = kind(params.values(), lr=c.learning_rate, weight_decay=0.0)
    flat = sorted(params, key=lambda name: trained(trainer)[name].data_ptr())
    warmup = math.ceil((c.warmup_ratio or 0.03) * STEPS)
    n, size = len(trainer.schedule.rows), c.batch_size * c.grad_accum
    per_epoch = -(-n // size)
    losses = []
    for step in range(STEPS):
        epoch, index = divmod(step, per_epoch)
        order = list(range(n))
        random.Random(f"{c.seed}/{epoch}").shuffle(order)
        rows = [trainer.schedule.rows[i] for i in order[index * size : (index + 1) * size]]
        count = sum(int(r.supervised.sum()) for r in rows)
        parts = [list(range(len(rows)))[i : i + c.batch_size] for i in range(0, len(rows), c.batch_size)]
        if same_order:
            parts = cut([len(r) for r in rows], trainer.feed.n_tokens)
        total = 0.0
        for part in parts:
            loss_of = same_order_loss if same_order else full_logits_loss
            loss = loss_of(model, [rows[i] for i in part], part, tokens, dropout_seed(c.seed, step))
            (loss / count).backward()
            total += loss.item()
        done = (step - warmup) / (STEPS - warmup)
        factor = (step + 1) / (warmup + 1) if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = c.learning_rate * factor
        grads = torch.cat([params[name].grad.flatten() for name in flat])
        grads = grads.split([p.numel() for p in trainer.stepper.params] if same_order else len(grads))
        nn.utils.clip_grads_with_norm_(params.values(), c.max_grad_norm, nn.utils.get_total_norm(grads))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
    return losses


def compare_with_peft(trainer: Trainer, bound: float) -> None:
    """30 steps of both: losses and every tensor of the adapters within `bound`, or equal where it is 0."""
    start = weights(trainer)
    model, tokens = peft_model(trainer)
    reference = train_peft(model, tokens, trainer, same_order=not bound)
    losses = train_ours(trainer)
    theirs = peft_weights(model)
    assert losses[-1] < 0.9 * losses[0], "nothing was learned: the comparison shows nothing"
    assert theirs.keys() == trained(trainer).keys()
    for name, p in trained(trainer).items():
        assert relative(p, start[name]) > 0.01, f"{name} has not moved"
        assert relative(p, theirs[name]) <= bound, name
    state = trainer.stepper.optimizer.state
    kinds = {v.dtype for s in state.values() for k, v in s.items() if k in ("state1", "exp_avg")}
    assert (torch.uint8 in kinds) == (trainer.config.optimizer == "paged_adamw8bit")
    assert losses == (pytest.approx(reference, rel=bound) if bound else reference)


def options_of_the_comparison(optimizer: str) -> dict:
    """Ragged rows, the last step of each epoch incomplete (10 rows, 4 a step), dropout, alpha / rank = 24 / 16."""
    rank = {"adamw": 16, "paged_adamw8bit": 64}[optimizer]  # at 64 the larger tensors have 4,096 elements: 8-bit state
    return {
        "optimizer": optimizer, "rank": rank, "alpha": 1.5 * rank, "dropout": 0.1, "learning_rate": 2e-4,
        "epochs": 100, "max_steps": STEPS, "warmup_ratio": 0.1, "micro_batch_tokens": 300,
    }  # fmt: skip


OPTIMIZERS = ["paged_adamw8bit", pytest.param("adamw", marks=pytest.mark.slow)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_peft_bit_for_bit_in_the_same_order(make, optimizer):
    compare_with_peft(make(**options_of_the_comparison(optimizer), engine="modules"), 0.0)


def test_trains_as_peft_with_rslora_on_all_linear_layers(make):
    options = options_of_the_comparison("adamw") | {"alpha": 6.0, "rslora": True, "targets": ("all-linear",)}
    trainer = make(**options, engine="fused")
    assert len(trainer.wrapped) == 4 * 7
    compare_with_peft(trainer, BOUND["adamw"])


@ENGINES
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_peft_in_a_plain_loop(make, optimizer, engine):
    """With padding, an attention mask and all logits, whose sums run in another order."""
    compare_with_peft(make(**options_of_the_comparison(optimizer), engine=engine), BOUND[optimizer])


def smollm2_options(optimizer: str, smollm2: Path, write_rows) -> dict:
    """Three rows of 21 to 36 tokens."""
    rows = [
        [("user", "Niacin?"), ("assistant", "Yes")],
        [
            ("user", "Why?"),
            ("assistant", "Beta blockers slow the heart, so that it needs less oxygen when it works hard"),
        ],
        [("user", "Which?"), ("assistant", "B"), ("user", "Sure?"), ("assistant", "Ask your doctor")],
    ]
    messages = [[("system", "Hi."), *row] for row in rows]
    path = write_rows([{"messages": [{"role": r, "content": text} for r, text in row]} for row in messages])
    options = options_of_the_comparison(optimizer)
    own = {"model": str(smollm2), "dataset": (str(path),), "rank": 16, "alpha": 24.0}
    return options | own


@pytest.mark.real
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw8bit"])
def test_trains_as_peft_on_smollm2_bit_for_bit_in_the_same_order(make, smollm2, write_rows, optimizer):
    """Steps of a packed batch of two and of one row."""
    options = smollm2_options(optimizer, smollm2, write_rows) | {"grad_accum": 1, "engine": "modules"}
    compare_with_peft(make(**options), 0.0)


@pytest.mark.real
@ENGINES
def test_trains_as_peft_on_smollm2_in_a_plain_loop(make, smollm2, write_rows, engine):
    """Steps of two micro-batches and of one, a row each.

    The bound is what peft keeps to itself when its own sums run in another order. Adam's first steps take the sign of
    each gradient; among 1.8 million elements some gradients are as small as rounding, and one sign that flips moves its
    tensor by about 1 / sqrt(9216).
    """
    trainer = make(**smollm2_options("adamw", smollm2, write_rows) | {"batch_size": 1, "engine": engine})
    compare_with_peft(trainer, 1e-2)


def compare_engines(make, **options) -> None:
    """20 steps, dropout on, cut into micro-batches in two ways."""
    options = {"optimizer": "adamw", "dropout": 0.1, "epochs": 100} | options | {"max_steps": 20}
    cuts = (("modules", 1), ("fused", 300))
    trainers = [make(name, **options | {"engine": name, "micro_batch_tokens": n}) for name, n in cuts]
    assert len(trainers[0].feed[0][0]) > len(trainers[1].feed[0][0])
    before = weights(trainers[0])
    mine, theirs = (train_ours(t, 20) for t in trainers)
    assert mine[-1] < 0.9 * mine[0] and mine == pytest.approx(theirs, rel=1e-4)
    flat = [torch.cat([w.flatten() for w in x.values()]) for x in (before, *map(weights, trainers))]
    assert relative(flat[1], flat[0]) > 0.02 and relative(flat[1], flat[2]) < 1e-4


def test_both_engines_train_the_same(make):
    compare_engines(make)


@pytest.mark.real
def test_both_engines_train_the_same_on_smollm2(make, smollm2, write_rows):
    compare_engines(make, **smollm2_options("adamw", smollm2, write_rows))


# ---------------------------------------------------------------------------------------------------------------------
# What must change nothing
# ---------------------------------------------------------------------------------------------------------------------


@ENGINES
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradient_checkpointing_changes_no_gradient(make, monkeypatch, precision, engine):
    """With dropout, whose mask the second forward has to draw again: equal bit for bit."""
    results, calls, until_gate = {}, [], Layer.until_gate
    monkeypatch.setattr(Layer, "until_gate", lambda *args: calls.append(1) or until_gate(*args))
    for setting in ("off", "on"):
        options = {"precision": precision, "engine": engine, "micro_batch_tokens": 200}
        trainer = make(setting, gradient_checkpointing=setting, dropout=0.1, **options)
        for layer in lora_layers(trainer.base.model).values():
            nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(3))
        layers = trainer.base.model.get_decoder().layers
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
        batches = trainer.feed[0][0]
        calls.clear()
        losses = [backward(trainer, batch, 100, 0) for batch in batches]
        assert len(calls) == {"off": 1, "on": 2}[setting] * len(batches) * len(layers)  # it is off, and it is on
        results[setting] = (losses, {n: p.grad for n, p in trained(trainer).items()})
    assert all(g.any() for g in results["off"][1].values())
    assert_same(results["on"], results["off"])


@ENGINES
def test_evaluation_changes_nothing(make, engine):
    """Adapter, optimizer, random state and logged losses after 7 steps, with 7 evaluations and with none."""
    states, losses = [], []
    for name, held in (("with", 6), ("without", 0)):
        trainer = make(name, held=held, epochs=3, max_steps=7, eval_every=1, patience=100, engine=engine)
        trainer.train()
        states.append(last_checkpoint(trainer.folder))
        events = checkpoint.read_metrics(trainer.folder)
        assert sum(e["event"] == "eval" for e in events) == (8 if held else 0)
        losses.append([(e["loss"], e["grad_norm"], e["lr"]) for e in events if e["event"] == "train"])
    assert len(losses[0]) == 7
    assert losses[0] == losses[1]
    for key in ("adapter", "stepper"):
        assert_same(states[0][key], states[1][key], key)


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that must not move: codes, both levels of scales, norms, embedding, biases, buffers."""
    found = {n: p for n, p in model.named_parameters() if not n.endswith(("lora_A", "lora_B"))}
    found |= dict(model.named_buffers())
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            found |= {f"{name}.absmax": state.absmax, f"{name}.code": state.code, f"{name}.offset": state.offset}
            found |= {f"{name}.absmax2": state.state2.absmax, f"{name}.code2": state.state2.code}
    return {n: t.detach().clone() for n, t in found.items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_base_does_not_move(make, precision):
    trainer = make(held=4, epochs=1, precision=precision, weight_decay=0.1)
    before, start = frozen(trainer.base.model), weights(trainer)
    layers = trainer.base.model.config.num_hidden_layers
    assert sum(n.endswith(".absmax2") for n in before) == 7 * layers  # all linears of a layer are quantised
    assert sum(t.dtype == torch.uint8 for t in before.values()) >= 7 * layers
    trainer.train()
    assert_same(frozen(trainer.base.model), before)
    end = last_checkpoint(trainer.folder)["adapter"]
    assert all(not torch.equal(end[n], w) for n, w in start.items()), "the adapter has not moved: nothing was trained"


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_trains_is_fp32_and_nothing_else_trains(make, precision):
    trainer = make(precision=precision)
    training = {n: p for n, p in trainer.base.model.named_parameters() if p.requires_grad}
    assert training.keys() == trained(trainer).keys()
    assert {p.dtype for p in training.values()} == {torch.float32}
    linear = trainer.base.model.get_decoder().layers[0].self_attn.q_proj.linear
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert linear.compute_dtype == linear.weight.quant_state.dtype == dtype
    assert trainer.base.model.config._attn_implementation == "sdpa"  # eager overflows fp16


def test_the_default_dtype_does_not_reach_what_trains():
    base = load_base(str(world.MODEL_DIR), "nf4", "fp32", CPU)
    torch.set_default_dtype(torch.float16)
    try:
        add_lora(base, LoraSpec(4, 6.0, targets=("q_proj",)))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in lora_parameters(base.model).values()} == {torch.float32}


def test_trainable_weights_in_half_precision_are_refused(monkeypatch):
    base = load_base(str(world.MODEL_DIR), "nf4", "fp32", CPU)
    monkeypatch.setattr(
        qlora_min.base,
        "inject_lora",
        lambda model, *args, **kwargs: inject_lora(model, *args, **kwargs) and model.half(),
    )
    with pytest.raises(AssertionError):
        add_lora(base, LoraSpec(4, 6.0, targets=("q_proj",)))


def test_fp16_trains_on_the_cpu(make):
    """Autocast in fp16 and a loss scale: the loss begins as in fp32 and falls, and all stays finite."""
    losses = {}
    for precision in ("fp16", "fp32"):
        trainer = make(precision, precision=precision, epochs=4)
        assert trainer.stepper.scaler.is_enabled() == (precision == "fp16")
        trainer.train()
        events = checkpoint.read_metrics(trainer.folder)
        losses[precision] = [e["loss"] for e in events if e["event"] == "train"]
        assert all(p.isfinite().all() for p in trained(trainer).values())
        assert events[-1]["skipped"] == trainer.stepper.skipped <= (5 if precision == "fp16" else 0)
        if precision == "fp16":
            assert trainer.stepper.scaler.get_scale() == 65536 / 2**trainer.stepper.skipped
    assert losses["fp16"][0] != losses["fp32"][0], "fp16 computed in fp32"
    assert losses["fp16"][0] == pytest.approx(losses["fp32"][0], rel=0.01)
    assert all(map(math.isfinite, losses["fp16"]))
    assert losses["fp16"][-1] < 0.8 * losses["fp16"][0]


def scale_that_fits(trainer: Trainer) -> None:
    """Begin with a loss scale at which this model's gradients do not overflow by themselves, as at 65,536 they may."""
    trainer.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)


def break_gradients(trainer: Trainer, steps: set[int]) -> None:
    """Put an inf into one gradient just before the optimizer steps (0-based) of `steps`."""
    inner, at, name = trainer.stepper.step, iter(range(10_000)), next(reversed(trained(trainer)))

    def step(*meanwhile):
        if next(at) in steps:
            trained(trainer)[name].grad[0, 0] = math.inf
        return inner(*meanwhile)

    trainer.stepper.step = step


def test_a_skipped_step_is_counted_and_the_run_goes_on(make):
    trainer = make(precision="fp16", epochs=2)  # 6 steps
    scale_that_fits(trainer)
    break_gradients(trainer, {1, 4})
    end = trainer.train()
    events = checkpoint.read_metrics(trainer.folder)
    steps = [e for e in events if e["event"] == "train"]
    assert end.step == 6
    assert [e["skipped"] for e in steps] == [0, 1, 1, 1, 2, 2]
    assert steps[1]["lr"] == steps[2]["lr"], "the schedule went on over a skipped step"
    assert events[-1]["skipped"] == 2
    assert last_checkpoint(trainer.folder)["stepper"]["taken"] == 4


@pytest.mark.parametrize("optimizer", ["paged_adamw8bit", "adamw"])
def test_gradients_computed_ahead_change_no_bit(make, optimizer):
    """As on a GPU: the next step's gradients are queued before it is known whether this step's are finite."""
    found = []
    for waits in (True, False):
        trainer = make(f"waits-{waits}", optimizer=optimizer, precision="fp16", epochs=4, eval_every=5, patience=100)
        trainer.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=4)
        trainer.stepper.waits, computed, inner = waits, [], trainer.feed.engine.loss_and_gradients

        def compute(*given, computed=computed, inner=inner, trainer=trainer):
            computed.append(trainer.progress.step)
            return inner(*given)

        trainer.feed.engine.loss_and_gradients = compute
        break_gradients(trainer, {0, 3, 8})
        trainer.train()
        events = [{k: e[k] for k in ("step", "loss", "lr", "grad_norm", "skipped", "eval_loss") if k in e}
                  for e in checkpoint.read_metrics(trainer.folder)]  # fmt: skip
        found.append((events, {n: p.detach().clone() for n, p in trained(trainer).items()},
                      last_checkpoint(trainer.folder)["stepper"], computed))  # fmt: skip
    (events, weights, stepper, once), (others, same, again, ahead) = found
    assert len(once) == len(ahead) and once != ahead, "nothing was computed ahead"
    assert events == others
    assert all(torch.equal(weights[n], same[n]) for n in weights)
    assert_same(stepper, again)


def test_twenty_skips_name_step_rows_and_checkpoint(make):
    trainer = make(rows=3, precision="fp16", held=1, epochs=20, batch_size=1, eval_every=5, patience=100)
    scale_that_fits(trainer)
    break_gradients(trainer, set(range(2, 100)))
    with pytest.raises(TrainingError) as error:
        trainer.train()
    # Steps 3 to 22 were skipped, the last with the one row of an epoch's end.
    locations = [r.location for r in trainer.schedule[21]]
    assert len(locations) == 1
    message = str(error.value)
    assert "20 optimizer steps in a row" in message
    assert "step 22 " in message
    assert f"with rows {locations[0]};" in message
    assert str(trainer.folder / "checkpoints" / "step-20") in message


# Memory
# ---------------------------------------------------------------------------------------------------------------------


def limit_memory(trainer: Trainer, tokens: int) -> list[int]:
    """Let memory run out above so many tokens, when gradients have been added; the tokens of each micro-batch tried."""
    inner, tried = trainer.engine.loss_and_gradients, []

    def limited(batch, factor, seed):
        tried.append(batch.n_tokens)
        assert len(tried) < 100, "it tries for ever"
        loss = inner(batch, factor, seed)
        if batch.n_tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    trainer.engine.loss_and_gradients = limited
    return tried


@ENGINES
def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_micro_batches(make, capsys, engine):
    """The whole step in one micro-batch, then halves until they fit: the same run, dropout on."""
    options = {"epochs": 2, "optimizer": "adamw", "learning_rate": 1e-3, "micro_batch_tokens": 800, "engine": engine}
    whole, limited = (make(name, **options) for name in ("whole", "limited"))
    whole.train()
    tried = limit_memory(limited, 250)
    capsys.readouterr()
    limited.train()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert [n.rpartition(" of up to ")[2] for n in notes] == [
        f"{n} tokens, or one row, from now on" for n in (400, 200)
    ]
    assert all(
        re.match(r"note: step \d: out of memory; its gradients are computed again, in micro-b", n) for n in notes
    )
    assert limited.feed.n_tokens == 200 and max(tried[-10:]) <= 200 < max(tried)
    losses = [[e["loss"] for e in checkpoint.read_metrics(t.folder) if e["event"] == "train"] for t in (whole, limited)]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, w in weights(limited).items():
        assert relative(w, weights(whole)[name]) < 1e-5, name
    assert checkpoint.read_record(limited.folder)["options"]["micro_batch_tokens"] == 800


def test_rows_that_together_are_shorter_than_the_longest_are_taken_apart_too(make, monkeypatch):
    """Where two of the shortest rows do not fit: a step of such rows is taken, before any longer row comes."""
    trainer = make(max_steps=1)
    short = trainer.schedule.rows[int(trainer.schedule.rows.lengths.argmin())]
    assert 2 * len(short) < trainer.schedule.rows.lengths.max()
    monkeypatch.setattr(Schedule, "__getitem__", lambda self, step: [short] * 2)
    limit_memory(trainer, len(short))
    trainer.train()
    assert trainer.progress.step == 1


@pytest.mark.parametrize("waits", [True, False])
def test_a_row_that_does_not_fit_ends_the_run_with_advice(make, monkeypatch, waits):
    """Also where its step is computed ahead: the step before it is counted and saved."""
    trainer = make(dropout=0.0, epochs=2, save_every=1)
    trainer.stepper.waits, real = waits, Schedule.__getitem__
    monkeypatch.setattr(Schedule, "__getitem__", lambda self, step: sorted(real(self, 0), key=len)[step : step + 1])
    longest = max(map(len, real(trainer.schedule, 0)))
    limit_memory(trainer, longest - 1)
    with pytest.raises(TrainingError) as error:
        trainer.train()
    message = str(error.value)
    assert re.match(
        rf"out of memory at step \d+, in a micro-batch of {longest:,} tokens, \d+ supervised; peak", message
    )
    for words in (f"this micro-batch: .* {longest:,} tokens", "what would take less, in order of effect:",
                  "--max-length", r"last good checkpoint: .*step-\d", f"--resume {trainer.folder}"):  # fmt: skip
        assert re.search(words, message), words
    failed = int(re.search(r"at step (\d+)", message)[1])
    assert failed > 2 and trainer.progress.step == failed - 1
    assert last_checkpoint(trainer.folder)["progress"]["step"] == failed - 1


# ---------------------------------------------------------------------------------------------------------------------
# Early stopping
# ---------------------------------------------------------------------------------------------------------------------


def result(loss: float) -> Evaluation:
    return Evaluation(rows=1, supervised_tokens=1, loss_sum=loss, right_tokens=0)


def saved_adapter(run: Path) -> dict[str, torch.Tensor]:
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    return {n.removeprefix("base_model.model.").removesuffix(".weight"): t for n, t in stored.items()}


@ENGINES
def test_a_layer_that_does_not_train_is_named(make, engine):
    """Is it really training? A layer whose update takes no part in the output ends the run after three steps."""
    trainer = make(rows=16, engine=engine)
    name = trainer.wrapped[5]
    trainer.base.model.get_submodule(name).enabled = False
    with pytest.raises(TrainingError, match=rf"2 of 32 trained matrices did not move: {name}\.lora_A, {name}\.lora_B"):
        trainer.train()
    assert trainer.progress.step == 3


def test_a_learning_rate_that_is_lost_in_rounding_is_named(make):
    trainer = make(rows=16, learning_rate=1e-12)
    with pytest.raises(
        TrainingError, match=r"did not move: .*; a learning rate of 1\.0e-12 is lost in .* raise --learning-rate"
    ):
        trainer.train()


def test_early_stopping_counts_in_a_row_and_keeps_the_best(make, monkeypatch):
    """Losses 3, 2, then one worse, the best, and two in a row not better: stopped there with patience 2."""
    losses, seen = iter([3.0, 2.0, 2.5, 1.5, 1.5, math.nan, 0.1, 0.1]), []

    def evaluate(engine, *_):
        seen.append(weights(engine))
        return result(next(losses))

    monkeypatch.setattr(loop, "evaluate_rows", evaluate)
    trainer = make(held=2, epochs=5, eval_every=2, patience=2)
    end = trainer.train()
    assert (end.step, end.best_step, end.best["loss"], end.stopped_early) == (10, 6, 1.5, True)
    assert end.before["loss"] == 3.0
    assert len(seen) == 6
    assert not torch.equal(seen[3]["model.layers.0.self_attn.q_proj.lora_A"],
                           seen[5]["model.layers.0.self_attn.q_proj.lora_A"])  # fmt: skip
    assert_same(saved_adapter(trainer.folder), seen[3])
    assert_same(weights(trainer), seen[3])  # the model that is left has it too


@pytest.mark.parametrize(("losses", "best"), [([math.nan] * 9, 0), ([math.nan, 2.0, math.nan, math.nan, 1.0], 1)])
def test_a_loss_that_is_no_number_is_no_improvement(make, monkeypatch, losses, best):
    """Every number is better than none; if none ever comes, the run stops all the same."""
    found = iter(losses)
    monkeypatch.setattr(loop, "evaluate_rows", lambda *_: result(next(found)))
    end = make(held=2, epochs=9, eval_every=1, patience=2).train()
    assert (end.step, end.best_step, end.stopped_early) == (best + 2, best, True)


def test_early_stopping_of_a_run_that_gets_worse(make, monkeypatch):
    """Real evaluations, under a learning rate that destroys: it stops 3 after the best, whose adapter is kept."""
    seen, evaluate = [], loop.evaluate_rows

    def record(engine, *args):
        seen.append((evaluate(engine, *args).loss, weights(engine)))
        return evaluate(engine, *args)

    monkeypatch.setattr(loop, "evaluate_rows", record)
    trainer = make(held=4, epochs=20, eval_every=1, patience=3, learning_rate=30.0)
    end = trainer.train()
    losses = [loss for loss, _ in seen]
    best = losses.index(min(losses))
    assert losses[-1] > losses[best]
    assert (end.step, end.best_step, end.stopped_early) == (best + 3, best, True)
    assert end.best["loss"] == losses[best]
    assert_same(saved_adapter(trainer.folder), seen[best][1])
    assert {best, best + 2, best + 3} == set(checkpoint.checkpoint_steps(trainer.folder))  # the best and the last two
    assert checkpoint.is_finished(trainer.folder)
