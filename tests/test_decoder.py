"""The decoder by hand computes what the modules compute, forwards and backwards, however rows are packed."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_min import decoder, demo, ops
from qlora_min.data import Row, collate
from qlora_min.decoder import Decoder, cut, dropout_seed, pack, unsupported
from qlora_min.lora import lora_disabled, lora_layers, lora_parameters
from qlora_min.loss import masked_cross_entropy
from qlora_min.model import add_lora, autocast, dequantized_weight, hidden_states, load_base, output_head

CPU = torch.device("cpu")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
FACTOR = 0.25
SEED = torch.tensor(7)

FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False, "attention_bias": False, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family, **config) -> folder of a random model of two layers, with the demo's tokenizer."""

    def make(family: str, **more) -> str:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512}  # fmt: skip
        config = AutoConfig.for_model(family, **shape, **FAMILIES.get(family, {}), **more)
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1 if p.dim() > 1 else 0.5)  # norms and biases other than 1 and 0
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(demo.MODEL_DIR).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="module")
def qwen2(models):
    return models("qwen2")


def make_rows(count: int = 7, seed: int = 0) -> list[Row]:
    """Ragged rows, some with several answers, one supervised from its first token on, one of two tokens."""
    rng, rows = random.Random(seed), []
    for i in range(count):
        length = 2 if i == 3 else rng.randint(5, 40)
        supervised = torch.tensor([rng.random() < 0.4 for _ in range(length)])
        supervised[-1] = True
        supervised[0] = i == 1
        rows.append(
            Row(torch.tensor([rng.randrange(1024) for _ in range(length)], dtype=torch.int32), supervised, f"{i}")
        )
    return rows


def make_base(folder, targets=ATTENTION, quantization="nf4", precision="fp32", dropout=0.0, rank=8):
    base = load_base(str(folder), quantization, precision, CPU)
    torch.manual_seed(1)
    add_lora(base, targets, rank, 1.5 * rank, dropout)
    for name, p in lora_parameters(base.model).items():
        if name.endswith("B"):
            torch.nn.init.normal_(p, std=0.1)
    base.model.train()
    return base


def by_modules(base, rows) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by autograd, through the model's own forward on a padded batch."""
    batch = collate(rows)
    with autocast(CPU, base.dtype):
        hidden = hidden_states(base.model, batch.input_ids)
        loss, _ = masked_cross_entropy(hidden, output_head(base.model), batch.input_ids, batch.supervised)
    (loss * FACTOR).backward()
    grads = {n: p.grad.clone() for n, p in lora_parameters(base.model).items()}
    base.model.zero_grad()
    return loss.item(), grads


def by_hand(base, batch, checkpointing=False, seed=SEED) -> tuple[float, dict[str, torch.Tensor]]:
    mine = Decoder(base, checkpointing, 512)
    loss = mine.loss_and_gradients(batch, torch.tensor(FACTOR), seed)
    return loss.item(), {n: p.grad.clone() for n, p in lora_parameters(base.model).items()}


def worst(mine: dict, reference: dict) -> float:
    assert mine.keys() == reference.keys()
    assert all(g.norm() > 0 for g in reference.values())
    return max(((mine[n] - g).norm() / g.norm()).item() for n, g in reference.items())


def largest_supervised(rows) -> int:
    return sum(int(r.supervised[1:].sum()) for r in rows)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [ATTENTION, ALL, ("v_proj", "down_proj"), ("up_proj",)], ids=lambda t: "+".join(t))
def test_gradients_are_those_of_autograd(qwen2, targets, checkpointing):
    rows = make_rows()
    base = make_base(qwen2, targets)
    loss, grads = by_modules(base, rows)
    mine, my_grads = by_hand(base, pack(rows), checkpointing)
    assert mine == pytest.approx(loss, rel=1e-5)
    assert worst(my_grads, grads) < 1e-4


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_and_quantization(models, family, quantization):
    rows = make_rows()
    base = make_base(models(family), ALL, quantization)
    assert unsupported(base, 512) is None
    loss, grads = by_modules(base, rows)
    batch = pack(rows)
    mine, my_grads = by_hand(base, batch)
    assert mine == pytest.approx(loss, rel=1e-5)
    assert worst(my_grads, grads) < 1e-4
    hidden = Decoder(base, False, 512).hidden_states(batch)
    padded = hidden_states(base.model.eval(), collate(rows).input_ids).detach()
    reference = torch.cat([padded[i, : len(r)] for i, r in enumerate(rows)])
    assert torch.allclose(hidden, reference, atol=1e-4 * reference.abs().max())
    if quantization == "none":  # the modules' weights are still theirs
        assert torch.equal(
            dequantized_weight(base.model.model.layers[0].mlp.up_proj.base)[:2].isfinite().all(), torch.tensor(True)
        )


def test_bf16(qwen2):
    rows = make_rows()
    _, exact = by_modules(make_base(qwen2), rows)
    loss, theirs = by_modules(make_base(qwen2, precision="bf16"), rows)
    mine, my_grads = by_hand(make_base(qwen2, precision="bf16"), pack(rows))
    assert mine == pytest.approx(loss, rel=2e-2)
    assert worst(my_grads, exact) < 1.5 * worst(theirs, exact) < 0.3  # as near to fp32 as autocast is


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_same_forwards_and_backwards(qwen2, checkpointing):
    """Autograd through the same masks gives the same gradients; other seeds give others."""
    rows = make_rows(1)  # one row: its padded and its packed form are the same elements
    base = make_base(qwen2, ALL, dropout=0.3)
    streams = {name: 4 * i + j for i in range(2) for j, names in enumerate(
        (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)))
        for name in (f"{i}/{n}" for n in names)}  # fmt: skip

    class Masked(torch.nn.Module):
        def __init__(self, stream):
            super().__init__()
            self.stream = stream

        def forward(self, x):
            return (x[0] * ops._mask(x[0], 0.3, SEED, self.stream))[None]

    own = {n: layer.dropout for n, layer in lora_layers(base.model).items()}
    for name, layer in lora_layers(base.model).items():
        parts = name.split(".")
        layer.dropout = Masked(streams[f"{parts[2]}/{parts[-1]}"])
    loss, grads = by_modules(base, rows)
    for name, layer in lora_layers(base.model).items():
        layer.dropout = own[name]
    mine, my_grads = by_hand(base, pack(rows), checkpointing)
    assert mine == pytest.approx(loss, rel=1e-5)
    assert worst(my_grads, grads) < 1e-4
    other, other_grads = by_hand(base, pack(rows), checkpointing, torch.tensor(8))
    assert other != mine and worst(other_grads, grads) > 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_nothing(qwen2, precision):
    """Bit for bit, with dropout, whose mask is drawn again."""
    (loss, grads), (other, other_grads) = (
        by_hand(make_base(qwen2, ALL, precision=precision, dropout=0.1), pack(make_rows()), on) for on in (False, True)
    )
    assert loss == other and all(torch.equal(g, other_grads[n]) for n, g in grads.items())


def test_dropout_keeps_what_it_says_and_scales():
    x = torch.ones(1000, 1000)
    y = ops.dropout(x, 0.05, SEED, 3)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.95])
    assert (y == 0).float().mean().item() == pytest.approx(0.05, abs=0.001)
    assert torch.equal(y, ops.dropout(x, 0.05, SEED, 3))
    assert not torch.equal(y, ops.dropout(x, 0.05, SEED, 4))
    assert not torch.equal(y, ops.dropout(x, 0.05, dropout_seed(1, 2, 3), 3))
    seeds = {int(dropout_seed(*at)) for at in [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3)]}
    assert len(seeds) == 4 and int(dropout_seed(1, 2, 3)) in seeds


def test_neither_the_cut_nor_the_filling_changes_a_step(qwen2):
    rows = make_rows(9)
    base = make_base(qwen2)
    whole, grads = by_hand(base, pack(rows))
    n = largest_supervised(rows)
    filled = pack(rows, tokens=sum(map(len, rows)) + 77, supervised=n + 13, count=12, longest=90)
    again, filled_grads = by_hand(base, filled)
    assert again == pytest.approx(whole, rel=1e-6) and worst(filled_grads, grads) < 1e-5
    mine = Decoder(base, False, 512)
    total = 0.0
    for part in cut([len(r) for r in rows], 60):
        total += mine.loss_and_gradients(pack([rows[i] for i in part]), torch.tensor(FACTOR), SEED).item()
    assert total == pytest.approx(whole, rel=1e-6)
    assert worst({n: p.grad for n, p in lora_parameters(base.model).items()}, grads) < 1e-5


def test_many_supervised_positions_are_taken_in_parts(qwen2, monkeypatch):
    rows = make_rows()
    base = make_base(qwen2)
    loss, grads = by_hand(base, pack(rows))
    seen = []
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, h: seen.append(len(h)) or logits(self, h))
    monkeypatch.setattr(decoder, "LOGIT_ROWS", 5)
    mine, my_grads = by_hand(base, pack(rows))
    assert max(seen) == 5 and sum(seen) == largest_supervised(rows)
    assert mine == pytest.approx(loss, rel=1e-6) and worst(my_grads, grads) < 1e-5


def test_without_lora_it_is_the_base(qwen2):
    rows = make_rows()
    base = make_base(qwen2)
    mine, batch = Decoder(base, False, 512), pack(rows)
    with lora_disabled(base.model):
        plain = mine.hidden_states(batch)
    assert not torch.allclose(plain, mine.hidden_states(batch))
    bare = load_base(qwen2, "nf4", "fp32", CPU)
    assert torch.equal(plain, Decoder(bare, False, 512).hidden_states(batch))


def test_packing():
    a, b = make_rows(2)
    b = Row(b.ids[:4], torch.tensor([True, False, True, True]), "b")
    p = pack([a, b], tokens=len(a) + 4 + 3, supervised=20, count=5)
    n = len(a)
    assert p.ids.tolist() == [*a.ids.tolist(), *b.ids.tolist(), 0, 0, 0]
    assert p.positions.tolist() == [*range(n), *range(4), *range(3)]
    assert p.ends.tolist() == [0, n, n + 4, n + 7, n + 7, n + 7, n + 7]
    taught = [t for t in range(1, n) if a.supervised[t]]  # a token at position 0 has no predecessor
    assert p.where.tolist()[: len(taught) + 2] == [*(t - 1 for t in taught), n + 1, n + 2]
    assert p.targets.tolist()[: len(taught) + 2] == [*a.ids[taught].tolist(), *b.ids[2:].tolist()]
    assert p.weights.tolist() == [1.0] * (len(taught) + 2) + [0.0] * (18 - len(taught))
    assert p.longest == max(n, 4)
    exact = pack([a, b])
    assert len(exact.ids) == n + 4 and exact.ends.tolist() == [0, n, n + 4] and exact.weights.all()


def test_the_cut():
    rng = random.Random(0)
    for _ in range(200):
        lengths = [rng.randint(1, 100) for _ in range(rng.randint(1, 30))]
        tokens = rng.randint(50, 400)
        parts = cut(lengths, tokens)
        assert sorted(i for p in parts for i in p) == list(range(len(lengths)))
        sums = [sum(lengths[i] for i in p) for p in parts]
        most = max([tokens, *lengths])
        assert max(sums) <= most
        assert len(parts) <= 2 * -(-sum(lengths) // most)
    assert cut([5, 5, 5, 5], 10) == [[0, 2], [1, 3]]


def test_one_flat_tensor_holds_all_that_trains(qwen2):
    base = make_base(qwen2, ALL, rank=64)
    before = {n: p.detach().clone() for n, p in lora_parameters(base.model).items()}
    mine = Decoder(base, False, 512)
    params = lora_parameters(base.model)
    assert all(torch.equal(before[n], p) for n, p in params.items())
    assert mine.weights.numel() == sum(p.numel() for p in params.values())
    mine.weights.fill_(3.0), mine.grads.fill_(4.0)
    assert all((p == 3).all() and (p.grad == 4).all() for p in params.values())
    (large,), (small,) = mine.large, mine.small
    assert large.numel() == sum(p.numel() for p in params.values() if p.numel() >= 4096)
    assert small.numel() == sum(p.numel() for p in params.values() if p.numel() < 4096) > 0
    assert large.data_ptr() == mine.weights.data_ptr() and large.grad.data_ptr() == mine.grads.data_ptr()
    assert all(
        p.data_ptr() % 1024 == 0 or p.numel() < 4096 or (p.data_ptr() - large.data_ptr()) % 1024 == 0
        for p in params.values()
    )
    odd = Decoder(make_base(qwen2, ALL[4:], rank=70), False, 512)  # 70 x 64 is no multiple of 256
    assert len(odd.large) > 1 and sum(p.numel() for p in [*odd.large, *odd.small]) == odd.weights.numel()


@pytest.mark.parametrize(
    ("family", "config", "length", "why"),
    [
        ("qwen3", {}, 512, "layers of another form"),
        ("llama", {"mlp_bias": True}, 512, "MLP biases"),
        ("llama", {"hidden_act": "gelu"}, 512, "another activation"),
        ("mistral", {"sliding_window": 100}, 512, "attends to 100 tokens"),
        ("mistral", {"sliding_window": 100}, 100, None),
        ("qwen2", {"sliding_window": 100, "use_sliding_window": False}, 512, None),
    ],
)
def test_what_does_not_fit_is_said(models, family, config, length, why, tmp_path):
    folder = models(family, **{k: v for k, v in config.items() if k not in FAMILIES.get(family, {})})
    if set(config) & set(FAMILIES.get(family, {})):
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    reason = unsupported(load_base(folder, "nf4", "fp32", CPU), length)
    assert reason is None if why is None else why in reason


def test_a_step_computes_no_more_than_it_must(qwen2, monkeypatch):
    """Counted, not timed: tokens filled up, positions with logits, dequantisations of a layer."""
    rows = make_rows(16)
    base = make_base(qwen2)
    counts = {"logits": 0, "dequantised": 0, "tokens": 0}
    logits, dequantize, forward = Decoder.logits, Decoder._dequantize, Decoder._forward

    def count(name, by):
        counts[name] += by

    monkeypatch.setattr(Decoder, "logits", lambda self, h: count("logits", len(h)) or logits(self, h))
    monkeypatch.setattr(Decoder, "_dequantize", lambda self, i: count("dequantised", 1) or dequantize(self, i))
    monkeypatch.setattr(
        Decoder, "_forward", lambda self, run: count("tokens", len(run.batch.ids)) or forward(self, run)
    )
    for checkpointing in (False, True):
        counts.update(logits=0, dequantised=0, tokens=0)
        by_hand(base, pack(rows), checkpointing)
        assert counts == {"logits": largest_supervised(rows), "dequantised": 2 * 2, "tokens": sum(map(len, rows))}
