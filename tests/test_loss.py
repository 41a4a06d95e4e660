"""The masked loss against cross-entropy over all logits, and: the step does not depend on how it is cut."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import qlora_min.train
from qlora_min import demo
from qlora_min.config import Config
from qlora_min.data import Batch, Row, collate, optimizer_steps
from qlora_min.lora import lora_parameters
from qlora_min.loss import masked_cross_entropy, supervised_states
from qlora_min.model import add_lora, hidden_states, load_base, output_head
from qlora_min.optim import Stepper
from qlora_min.train import Trainer

CPU = torch.device("cpu")
B, T, D, V = 3, 9, 16, 50


@pytest.fixture
def case():
    """(hidden, head, input_ids, supervised) at random, with a gradient for hidden."""
    torch.manual_seed(0)
    hidden = torch.randn(B, T, D, requires_grad=True)
    return hidden, nn.Linear(D, V), torch.randint(V, (B, T)), torch.rand(B, T) < 0.4


def over_all_logits(hidden, head, input_ids, supervised) -> torch.Tensor:
    """The same sum as everybody computes it: logits everywhere, shifted, labels -100 where nothing is supervised."""
    labels = input_ids.masked_fill(~supervised, -100)
    logits = head(hidden)[:, :-1]  # (B, T-1, V)
    return F.cross_entropy(logits.reshape(-1, V), labels[:, 1:].reshape(-1), ignore_index=-100, reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# Against the full logits
# ---------------------------------------------------------------------------------------------------------------------


def test_sum_and_gradients_are_those_over_all_logits(case):
    hidden, head, *_ = case
    total, _ = masked_cross_entropy(*case)
    expected = over_all_logits(*case)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    wrt = [hidden, *head.parameters()]
    for mine, reference in zip(torch.autograd.grad(total, wrt), torch.autograd.grad(expected, wrt)):
        assert (mine - reference).norm() / reference.norm() < 1e-6


def test_sum_by_hand():
    """Logits that are log-probabilities: the sum is minus the log of those of the supervised next tokens."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4], [0.9, 0.05, 0.05]])
    input_ids = torch.tensor([[0, 1, 2, 0]])
    supervised = torch.tensor([[False, True, False, True]])
    total, count = masked_cross_entropy(p.log()[None], nn.Identity(), input_ids, supervised)
    # position 0 predicts token 1 (an id of 1, p = 0.25), position 2 predicts token 3 (an id of 0, p = 0.3)
    assert total.item() == pytest.approx(-math.log(0.25) - math.log(0.3), rel=1e-6)
    assert count.item() == 2


def test_an_undecided_head_costs_log_V_a_token(case):
    hidden, head, input_ids, supervised = case
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    total, count = masked_cross_entropy(hidden, head, input_ids, supervised)
    assert count == supervised[:, 1:].sum()
    assert total.item() == pytest.approx(count.item() * math.log(V), rel=1e-6)


def test_sum_and_count_are_scalars_in_fp32(case):
    hidden, head, input_ids, supervised = case
    total, count = masked_cross_entropy(hidden.bfloat16(), head.bfloat16(), input_ids, supervised)
    assert total.shape == count.shape == ()
    assert total.dtype == torch.float32
    assert not count.is_floating_point()


def test_position_0_never_counts(case):
    """Nothing predicts it, so supervising it changes nothing; and the last row's end is not taken for it."""
    hidden, head, input_ids, supervised = case
    outcomes = [
        masked_cross_entropy(hidden, head, input_ids, torch.cat([first.expand(B, 1), supervised[:, 1:]], dim=1))
        for first in (torch.tensor([[True]]), torch.tensor([[False]]))
    ]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    only_first = torch.zeros(B, T, dtype=torch.bool)
    only_first[:, 0] = True
    assert masked_cross_entropy(hidden, head, input_ids, only_first)[1] == 0


def test_nothing_supervised_is_a_sum_of_zero_without_nan(case):
    hidden, head, input_ids, supervised = case
    total, count = masked_cross_entropy(hidden, head, input_ids, torch.zeros_like(supervised))
    assert (total.item(), count.item()) == (0, 0)
    total.backward()
    assert not hidden.grad.any()


def test_the_head_sees_supervised_positions_only(case):
    hidden, head, input_ids, supervised = case
    seen = []
    head.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    states, targets = supervised_states(hidden, input_ids, supervised)
    n = int(supervised[:, 1:].sum())
    assert states.shape == (n, hidden.shape[-1])
    masked_cross_entropy(hidden, head, input_ids, supervised)
    assert seen == [(n, V)]
    assert n < B * (T - 1)
    assert targets.tolist() == [input_ids[b, t].item() for b in range(B) for t in range(1, T) if supervised[b, t]]


# ---------------------------------------------------------------------------------------------------------------------
# Through the model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_base(tmp_path_factory) -> Path:
    """A Qwen2 with random weights and the demo's tokenizer.

    In the demo's trained base attention is sharp: the gradients of q and k are what cancellation leaves of larger
    numbers, and rounding alone moves them by up to 1e-5.
    """
    folder = tmp_path_factory.mktemp("random")
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def randomise_B(model) -> None:
    """B begins at zero, and so does A's gradient: fill it."""
    g = torch.Generator().manual_seed(1)
    for name, p in lora_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.05, generator=g)


@pytest.fixture(scope="module")
def model(random_base):
    """The random base in NF4, in fp32 on the CPU, with LoRA."""
    base = load_base(str(random_base), "nf4", "fp32", CPU)
    add_lora(base, ("q_proj", "k_proj", "v_proj", "o_proj"), 16, 24, dropout=0.0)
    randomise_B(base.model)
    return base.model.train()


def gradients(model, batches: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of one optimizer step, as the loop computes them: sums, divided by the step's count."""
    supervised = sum(b.n_supervised for b in batches)
    step_loss, counted = 0.0, 0
    for b in batches:
        hidden = hidden_states(model, b.input_ids)
        total, count = masked_cross_entropy(hidden, output_head(model), b.input_ids, b.supervised)
        (total / supervised).backward()
        step_loss, counted = step_loss + total.item() / supervised, counted + int(count)
    assert counted == supervised, "the count known beforehand is not the count of the losses"
    trained = lora_parameters(model)
    grads = {n: p.grad.clone() for n, p in trained.items()}
    for p in trained.values():
        p.grad = None
    return step_loss, grads


def assert_same_gradients(mine: dict[str, torch.Tensor], reference: dict[str, torch.Tensor], bound: float) -> None:
    for name, grad in reference.items():
        assert grad.norm() > 0, name
        assert (mine[name] - grad).norm() / grad.norm() <= bound, name


@st.composite
def ragged_rows(draw) -> list[Row]:
    """9 to 15 rows of 16 to 48 tokens, each with a random mask that supervises at least one of them.

    The tokens come from a seed, so that hypothesis can't make them all equal: attention over equal tokens has gradients
    of zero for q and k, and rounding is all that is left of them.
    """
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = []
    for i in range(draw(st.integers(9, 15))):
        mask = draw(st.lists(st.booleans(), min_size=16, max_size=48))
        mask[draw(st.integers(8, len(mask) - 1))] = True
        rows.append(Row(torch.randint(500, (len(mask),), generator=g), torch.tensor(mask), f"row {i}"))
    return rows


def check_cuts(model, rows: list[Row], seed: int) -> None:
    """Steps of 8 rows as 1x8, 2x4, 4x2 and 8x1, and the last one, incomplete: one loss, one gradient."""
    reference = None
    for batch_size in (1, 2, 4, 8):
        steps = optimizer_steps(len(rows), batch_size, 8 // batch_size, seed, epoch=0)
        assert [sum(map(len, s)) for s in steps] == [8, len(rows) - 8]
        outcome = [gradients(model, [collate([rows[i] for i in part]) for part in step]) for step in steps]
        reference = reference or outcome
        for (loss, grads), (expected, expected_grads) in zip(outcome, reference, strict=True):
            assert loss == pytest.approx(expected, rel=1e-6)
            assert_same_gradients(grads, expected_grads, 2e-6)  # fp32's rounding was seen to reach 1.02e-6


@settings(max_examples=20, deadline=None)
@given(rows=ragged_rows(), seed=st.integers(0, 99))
def test_the_step_does_not_depend_on_how_it_is_cut(model, rows, seed):
    check_cuts(model, rows, seed)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(rows=ragged_rows(), seed=st.integers(0, 99))
def test_the_step_does_not_depend_on_how_it_is_cut_at_length(model, rows, seed):
    check_cuts(model, rows, seed)


@pytest.mark.parametrize(
    ("packing", "cuts"), [("off", (1, 2, 4, 8)), ("auto", (60, 100, 200, 4000))], ids=["padded", "packed"]
)
def test_the_loops_gradients_do_not_depend_on_the_cut(random_base, tmp_path, write_rows, monkeypatch, packing, cuts):
    """Of `Trainer.train` itself, whose steps are recorded instead of taken: 11 rows of one to three questions."""
    questions = iter(demo.rows(demo.CONDITIONS, 33, seed=0))
    rows = []
    for i in range(11):
        turns = [next(questions) for _ in range(1 + i % 3)]
        rows.append(
            {
                "messages": [
                    {"role": r, "content": q[k]} for q in turns for r, k in (("user", "input"), ("assistant", "output"))
                ]
            }
        )
    recorded = []

    def record(stepper):
        recorded[-1].append({str(i): p.grad.clone() for i, p in enumerate(stepper.params)})
        stepper.optimizer.zero_grad(set_to_none=False)
        return 1.0, True

    monkeypatch.setattr(Stepper, "step", record)
    monkeypatch.setattr(qlora_min.train, "pick_device", lambda: CPU)
    for size in cuts:
        batch_size = size if packing == "off" else 4
        recorded.append([])
        config = Config(
            model=str(random_base), dataset=(str(write_rows(rows)),), eval_fraction=0.0, epochs=1, dropout=0.0,
            alpha=24.0, batch_size=batch_size, grad_accum=8 // batch_size,
            output_dir=str(tmp_path / f"run{size}"), packing=packing, micro_batch_tokens=size,
        )  # fmt: skip
        trainer = Trainer(config)
        randomise_B(trainer.model)
        trainer.train()
    for cut in recorded:
        assert len(cut) == 2
        for grads, expected in zip(cut, recorded[0], strict=True):
            assert_same_gradients(grads, expected, 1e-6)


def test_padding_never_counts(model):
    """Another id at the padding: the same loss and gradients, bit for bit."""
    torch.manual_seed(1)
    rows = [Row(torch.randint(1, 500, (n,)), torch.rand(n) < 0.5, "") for n in (31, 12, 23)]
    batch = collate(rows)
    padding = torch.arange(31) >= batch.lengths[:, None]
    assert padding.sum() == (31 - 12) + (31 - 23)
    assert not batch.supervised[padding].any()
    expected_loss, expected = gradients(model, [batch])
    for pad in (1, 7, 499):
        other = Batch(batch.input_ids.masked_fill(padding, pad), batch.supervised, batch.lengths)
        assert not torch.equal(other.input_ids, batch.input_ids)
        loss, grads = gradients(model, [other])
        assert loss == expected_loss
        assert_same_gradients(grads, expected, 0)
