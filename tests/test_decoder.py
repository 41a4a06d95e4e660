"""Both engines compute what the model computes, forwards and backwards, however rows are packed; dropout's masks."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_min import loss
from qlora_min.base import add_lora, load_base
from qlora_min.batches import cut, dropout_seed, pack
from qlora_min.data.rows import Row
from qlora_min.demo import world
from qlora_min.engine import Modules
from qlora_min.fused import decoder, select, weights
from qlora_min.fused.decoder import Decoder, unsupported
from qlora_min.fused.graphs import shape
from qlora_min.fused.select import make_engine, modules_of
from qlora_min.fused.weights import Weights
from qlora_min.lora import LoraSpec, lora_disabled, lora_layers, lora_parameters
from qlora_min.ops import formulas, masks
from qlora_min.system.device import autocast

CPU = torch.device("cpu")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
FACTOR = 0.25
SEED = torch.tensor(7, dtype=torch.int32)
ENGINES = {"modules": modules_of, "fused": Decoder}
CLASSES = {"modules": Modules, "fused": Decoder}
both_engines = pytest.mark.parametrize("engine", ENGINES)
both_checkpointings = pytest.mark.parametrize("checkpointing", [False, True])

FAMILIES = {
    "qwen2": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False, "attention_bias": False, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 32},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(family, **config) -> folder of a random model of two layers, with the demo's tokenizer."""

    def make(family: str, **more) -> str:
        folder = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 512}  # fmt: skip
        config = AutoConfig.for_model(family, **sizes, **FAMILIES.get(family, {}), **more)
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1 if p.dim() > 1 else 0.5)  # norms and biases other than 1 and 0
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(folder)
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
    add_lora(base, LoraSpec(rank, 1.5 * rank, dropout, targets))
    for name, p in lora_parameters(base.model).items():
        if name.endswith("B"):
            torch.nn.init.normal_(p, std=0.1)
    return base


def by_model(base, rows, seed=None) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and hidden states by the model's own forward and autograd, a row at a time.

    Dropout, with a seed, is what this file says below that it is: `Formula`.
    """
    own = {n: layer.dropout for n, layer in lora_layers(base.model).items()}
    base.model.eval().zero_grad()
    total, hidden = 0.0, []
    for place, row in enumerate(rows):
        for name, layer in lora_layers(base.model).items():
            if seed is not None:
                layer.dropout = Formula(name, int(seed), place, own[name].p)
        ids = row.input_ids.long()
        with autocast(CPU, base.dtype):
            out = base.model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        taught = row.supervised[1:]
        total = total + F.cross_entropy(out.logits[0, :-1][taught].float(), ids[1:][taught], reduction="sum")
        hidden.append(out.hidden_states[-1][0].detach())
    for name, layer in lora_layers(base.model).items():
        layer.dropout = own[name]
    (total * FACTOR).backward()
    return total.item(), {n: p.grad.clone() for n, p in lora_parameters(base.model).items()}, torch.cat(hidden)


def by_engine(engine, base, batch, checkpointing=False, seed=SEED) -> tuple[float, dict[str, torch.Tensor]]:
    mine = ENGINES[engine](base, 512)
    assert not getattr(mine, "mixing", "")
    mine.checkpointing = checkpointing
    total = mine.loss_and_gradients(batch, torch.tensor(FACTOR), seed)
    mine.checkpointing = False  # another engine of the same base runs through this one's layers
    return total.item(), {n: p.grad.clone() for n, p in lora_parameters(base.model).items()}


def worst(mine: dict, reference: dict) -> float:
    assert mine.keys() == reference.keys()
    assert all(g.norm() > 0 for g in reference.values())
    return max(((mine[n] - g).norm() / g.norm()).item() for n, g in reference.items())


def n_supervised(rows) -> int:
    return sum(int(r.supervised[1:].sum()) for r in rows)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers
# ---------------------------------------------------------------------------------------------------------------------


@both_engines
@both_checkpointings
@pytest.mark.parametrize("targets", [ATTENTION, ALL, ("v_proj", "down_proj"), ("up_proj",)], ids=lambda t: "+".join(t))
def test_gradients_are_those_of_autograd(qwen2, targets, checkpointing, engine):
    rows = make_rows()
    base = make_base(qwen2, targets)
    total, grads, _ = by_model(base, rows)
    mine, my_grads = by_engine(engine, base, pack(rows), checkpointing)
    assert mine == pytest.approx(total, rel=1e-5)
    assert worst(my_grads, grads) < 1e-4


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_and_quantization(models, family, quantization):
    rows = make_rows()
    base = make_base(models(family), ALL, quantization)
    assert unsupported(base, 512) is None and make_engine(base, "auto", 512)[1] == "fused"
    total, grads, reference = by_model(base, rows)
    batch = pack(rows)
    for engine in ENGINES:
        mine, my_grads = by_engine(engine, base, batch)
        assert mine == pytest.approx(total, rel=1e-5)
        assert worst(my_grads, grads) < 1e-4
        hidden = ENGINES[engine](base, 512).hidden_states(batch)
        assert torch.allclose(hidden, reference, atol=1e-4 * reference.abs().max())
    if quantization == "none":  # the modules' weights are still theirs
        fresh = load_base(base.name, "none", "fp32", CPU).model
        for name, layer in lora_layers(base.model).items():
            assert torch.equal(layer.linear.weight, fresh.get_submodule(name).weight)


@both_checkpointings
def test_the_engines_are_equal_with_dropout_on(qwen2, checkpointing):
    """In fp32 to 1e-5: the loss and all gradients, rows standing at any places of the step."""
    rows, base = make_rows(), make_base(qwen2, ALL, dropout=0.1)
    batch = pack(rows, row_ids=[5, 0, 31, 2, 3, 17, 1])
    (total, grads), (mine, my_grads) = (by_engine(engine, base, batch, checkpointing) for engine in ENGINES)
    assert mine == pytest.approx(total, rel=1e-5)
    assert worst(my_grads, grads) < 1e-5
    assert worst(by_engine("fused", base, pack(rows))[1], grads) > 0.01  # at other places other masks


def test_bf16(qwen2):
    rows = make_rows()
    _, exact, _ = by_model(make_base(qwen2), rows)
    total, theirs, _ = by_model(make_base(qwen2, precision="bf16"), rows)
    for engine in ENGINES:
        mine, my_grads = by_engine(engine, make_base(qwen2, precision="bf16"), pack(rows))
        assert mine == pytest.approx(total, rel=2e-2)
        assert worst(my_grads, exact) < 1.5 * worst(theirs, exact) < 0.3  # as near to fp32 as autocast is


@both_engines
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_changes_nothing(qwen2, precision, engine):
    """Bit for bit, with dropout, whose mask is drawn again."""
    (total, grads), (other, other_grads) = (
        by_engine(engine, make_base(qwen2, ALL, precision=precision, dropout=0.1), pack(make_rows()), on)
        for on in (False, True)
    )
    assert total == other and all(torch.equal(g, other_grads[n]) for n, g in grads.items())


@both_engines
def test_neither_the_cut_nor_the_padding_changes_a_step(qwen2, engine):
    """With dropout: a row's mask follows its place in the step."""
    rows = make_rows(9)
    base = make_base(qwen2, dropout=0.2)
    whole, grads = by_engine(engine, base, pack(rows))
    padded = pack(rows, None, sum(map(len, rows)) + 77, n_supervised(rows) + 13, n_rows=12, max_seqlen=90)
    again, padded_grads = by_engine(engine, base, padded)
    assert again == pytest.approx(whole, rel=1e-6) and worst(padded_grads, grads) < 1e-5
    mine = ENGINES[engine](base, 512)
    total = 0.0
    for part in cut([len(r) for r in rows], 60):
        total += mine.loss_and_gradients(pack([rows[i] for i in part], part), torch.tensor(FACTOR), SEED).item()
    assert total == pytest.approx(whole, rel=1e-6)
    assert worst({n: p.grad for n, p in lora_parameters(base.model).items()}, grads) < 1e-5


@both_engines
def test_rows_one_at_a_time_are_the_same_step(qwen2, engine):
    """`Packed.spans` and `select`, by which a model whose rows would mix is computed."""
    rows = make_rows()
    base = make_base(qwen2, dropout=0.2)
    batch = pack(rows, range(3, 10), sum(map(len, rows)) + 5, n_supervised(rows) + 3, n_rows=9)
    whole, grads = by_engine(engine, base, batch)
    mine = ENGINES[engine](base, 512)
    parts = [batch.select(*span) for span in batch.spans()]
    assert [p.n_tokens for p in parts] == [*map(len, rows), 5]
    total = sum(mine.loss_and_gradients(p, torch.tensor(FACTOR), SEED).item() for p in parts)
    assert total == pytest.approx(whole, rel=1e-6)
    assert worst({n: p.grad for n, p in lora_parameters(base.model).items()}, grads) < 1e-5
    if engine == "modules":
        hidden = mine.hidden_states(batch)
        mine.mixing = "tried"
        mine.adapter.grads.zero_()
        assert mine.loss_and_gradients(batch, torch.tensor(FACTOR), SEED).item() == pytest.approx(whole, rel=1e-6)
        assert worst({n: p.grad for n, p in lora_parameters(base.model).items()}, grads) < 1e-5
        assert torch.allclose(mine.hidden_states(batch), hidden, atol=1e-5)


@both_engines
def test_many_supervised_positions_are_taken_in_parts(qwen2, monkeypatch, engine):
    rows = make_rows()
    base = make_base(qwen2)
    whole, grads = by_engine(engine, base, pack(rows))
    seen = []
    logits = CLASSES[engine].logits
    for module in (decoder, loss):
        monkeypatch.setattr(module, "LOGIT_ROWS", 5)
    monkeypatch.setattr(select, "why_rows_mix", lambda engine, max_seqlen: "")  # which computes logits, too
    monkeypatch.setattr(CLASSES[engine], "logits", lambda self, h: seen.append(len(h)) or logits(self, h))
    mine, my_grads = by_engine(engine, base, pack(rows))
    assert max(seen) == 5 and sum(seen) == n_supervised(rows)
    assert mine == pytest.approx(whole, rel=1e-6) and worst(my_grads, grads) < 1e-5


@both_engines
def test_without_lora_it_is_the_base(qwen2, engine):
    rows = make_rows()
    base = make_base(qwen2)
    mine, batch = ENGINES[engine](base, 512), pack(rows)
    with lora_disabled(base.model):
        plain = mine.hidden_states(batch)
    assert not torch.allclose(plain, mine.hidden_states(batch))
    bare = load_base(qwen2, "nf4", "fp32", CPU)
    assert torch.equal(plain, ENGINES[engine](bare, 512).hidden_states(batch))


# ---------------------------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------------------------


def mix(x: int) -> int:
    """The mixer on integers of any size, cut to 32 bits."""
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0x735A2D97 % 2**32
    return x ^ x >> 15


def kept(seed: int, row: int, token: int, stream: int, feature: int, p: float) -> bool:
    """Whether dropout keeps an element, in integers: a hash has 16 bits for each of two features."""
    key = mix(mix(mix(seed) ^ row) ^ token)
    bits = mix(mix((key + stream) % 2**32) ^ feature // 2 * 0x9E3779B9 % 2**32) >> 16 * (feature % 2) & 0xFFFF
    return (bits ^ 0x8000) >= round(p * 65536)  # as a signed number, counted from the smallest


class Formula(torch.nn.Module):
    """A layer's dropout of one row, by `kept`; a model's streams in its order, one for the projections of an input."""

    def __init__(self, name: str, seed: int, row: int, p: float):
        super().__init__()
        _, _, layer, _, projection = name.split(".")
        inputs = ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")
        stream = 4 * int(layer) + next(i for i, names in enumerate(inputs) if projection in names)
        self.kept = lambda t, f: kept(seed, row, t, stream, f, p) / (1 - p)

    def forward(self, x):
        return x * torch.tensor([[self.kept(t, f) for f in range(x.shape[-1])] for t in range(x.shape[1])])


def reference_masks(seed: int, rows: int, tokens: int, streams: int, features: int, p: float) -> torch.Tensor:
    """(rows, tokens, streams, features) bool"""
    row_ids, positions = torch.arange(rows).repeat_interleave(tokens), torch.arange(tokens).repeat(rows)
    keys = masks.dropout_keys(torch.tensor(seed, dtype=torch.int32), row_ids, positions)
    parts = [masks.dropout_mask(keys, p, s, features).view(rows, tokens, features) for s in range(streams)]
    return torch.stack(parts, 2)


@both_engines
@both_checkpointings
def test_dropout_is_the_formula_forwards_and_backwards(qwen2, engine, checkpointing):
    """Autograd through the formula's masks gives the same gradients; other seeds give others."""
    rows = make_rows(3)
    base = make_base(qwen2, ALL, dropout=0.3)
    total, grads, _ = by_model(base, rows, SEED)
    mine, my_grads = by_engine(engine, base, pack(rows), checkpointing)
    assert mine == pytest.approx(total, rel=1e-5)
    assert worst(my_grads, grads) < 1e-4
    other, other_grads = by_engine(engine, base, pack(rows), checkpointing, SEED + 1)
    assert other != pytest.approx(total, rel=1e-3) and worst(other_grads, grads) > 0.01


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_is_the_formula_bit_for_bit(p):
    rng = random.Random(0)
    for seed in (0, 1, 2**31 - 1, rng.randrange(2**31)):
        rows, tokens, streams = ([0, 1, *rng.sample(range(most), 3)] for most in (1024, 32768, 1000))
        for row, token, stream in zip(rows, tokens, streams):
            where = (torch.tensor([v], dtype=torch.int32) for v in (row, token))
            keys = masks.dropout_keys(torch.tensor(seed, dtype=torch.int32), *where)
            expected = [kept(seed, row, token, stream, f, p) for f in range(301)]
            assert masks.dropout_mask(keys, p, stream, 301)[0].tolist() == expected


def test_dropout_keeps_what_it_says_and_scales():
    keys = masks.dropout_keys(SEED, torch.arange(1000) // 100, torch.arange(1000) % 100)
    x = torch.ones(1000, 1000)
    y = formulas.dropout(x, 0.05, keys, 3)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.95])
    assert torch.equal(y, formulas.dropout(x, 0.05, keys, 3))
    assert torch.equal(y.view(10, 100, 1000), formulas.dropout(x.view(10, 100, 1000), 0.05, keys, 3))
    assert not torch.equal(y, formulas.dropout(x, 0.05, keys, 4))
    for p in (0.01, 0.05, 0.5):  # a million draws: five standard deviations
        dropped = 1 - masks.dropout_mask(keys, p, 3, 1000).float()
        for share, n in ((dropped.mean(), 10**6), (dropped.mean(0), 1000), (dropped.mean(1), 1000)):
            assert (share - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5 + 1 / 65536


def test_masks_of_rows_tokens_streams_features_and_seeds_are_independent():
    """As +1 and -1, the mean square of all pairs' correlations over n elements is 1/n, and none stands out."""
    m = 2.0 * reference_masks(7, 6, 24, 8, 512, 0.5) - 1
    sets = {
        "rows, tokens and streams": m.flatten(0, 2),
        "features": m.flatten(0, 2).T,
        "seeds": torch.stack([2.0 * reference_masks(s, 4, 8, 2, 32, 0.5).flatten() - 1 for s in range(400)]),
    }
    for name, vectors in sets.items():
        count, n = vectors.shape
        scores = (vectors @ vectors.T / n**0.5)[*torch.triu_indices(count, count, 1)]  # normal, if independent
        assert scores.square().mean().item() == pytest.approx(1, abs=5 * (2 / len(scores)) ** 0.5), name
        assert scores.abs().max() < 7, name


def test_the_seed_of_a_steps_dropout_is_a_function_of_where_it_stands():
    seeds = {int(dropout_seed(seed, step)) for seed in range(20) for step in range(50)}
    assert len(seeds) == 1000 and all(0 <= s < 2**31 for s in seeds)
    assert torch.equal(dropout_seed(3, 4), dropout_seed(3, 4)) and dropout_seed(3, 4).dtype == torch.int32


# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


def test_packing():
    a, b = make_rows(2)
    b = Row(b.input_ids[:4], torch.tensor([True, False, True, True]), "b")
    n = len(a)
    p = pack([a, b], row_ids=[3, 1], n_tokens=n + 4 + 3, n_supervised=20, n_rows=5)
    assert p.input_ids.tolist() == [*a.input_ids.tolist(), *b.input_ids.tolist(), 0, 0, 0]
    assert p.position_ids.tolist() == [*range(n), *range(4), 0, 0, 0]
    assert p.row_ids.tolist() == [3] * n + [1] * 4 + [0] * 3
    assert p.cu_seqlens.tolist() == [0, n, n + 4, n + 7, n + 7, n + 7, n + 7]
    taught = [t for t in range(1, n) if a.supervised[t]]  # a token at position 0 has no predecessor
    count = len(taught) + 2
    assert p.loss_positions.tolist()[:count] == [*(t - 1 for t in taught), n + 1, n + 2]
    assert p.targets.tolist()[:count] == [*a.input_ids[taught].tolist(), *b.input_ids[2:].tolist()]
    assert p.loss_weights.tolist() == [1.0] * count + [0.0] * (20 - count)
    assert (p.max_seqlen, p.n_tokens, p.n_supervised) == (max(n, 4), n + 4, count)
    assert shape(p) == (n + 7, 20, 7, max(n, 4)) and p.spans() == [(0, n), (n, n + 4), (n + 4, n + 7)]
    assert b.supervised[0], "a row is not changed by packing it"
    exact = pack([a, b])
    assert len(exact.input_ids) == n + 4 and exact.cu_seqlens.tolist() == [0, n, n + 4] and exact.loss_weights.all()
    assert exact.row_ids.tolist() == [0] * n + [1] * 4
    kinds = [exact.input_ids, exact.targets, exact.loss_positions, exact.row_ids, exact.cu_seqlens, exact.loss_weights]
    assert [t.dtype for t in kinds] == [torch.int64] * 3 + [torch.int32] * 2 + [torch.float32]
    other = pack([b, a], n_tokens=n + 7, n_supervised=20, n_rows=5)
    assert shape(other) == shape(p)
    assert all(x.shape == getattr(other, k).shape for k, x in vars(p).items() if isinstance(x, torch.Tensor))
    with pytest.raises(AssertionError):
        pack([a, b], n_tokens=n + 3)


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


@pytest.mark.parametrize(
    ("family", "config", "length", "why"),
    [
        ("phi3", {"pad_token_id": 0}, 512, "layers of another form"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            512,
            "another rotary",
        ),
        ("llama", {"logit_scale": 0.5}, 512, "logits are scaled"),
        ("qwen3", {"sliding_window": 100, "use_sliding_window": True}, 512, "attends to 100 tokens"),
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
    base = load_base(folder, "nf4", "fp32", CPU)
    reason = unsupported(base, length)
    assert reason is None if why is None else why in reason
    if "logit_scale" in config:  # which no Llama has: what it would mean there is not known
        with pytest.raises(ValueError, match="changes its logits"):
            make_engine(base, "auto", length)
        return
    _, name, told = make_engine(base, "auto", length)
    assert (name, told) == ("modules", reason) if why else (name, told) == ("fused", "")
    assert make_engine(base, "modules", length)[1:] == ("modules", "")
    if why:
        with pytest.raises(ValueError, match=f"--engine fused: .*{why}.*; leave it out"):
            make_engine(base, "fused", length)


def test_a_step_computes_no_more_than_it_must(qwen2, monkeypatch):
    """Counted, not timed: tokens padded, positions with logits, dequantisations of a layer, kept as on a GPU."""
    monkeypatch.setitem(weights.KEPT, "cpu", 8)
    rows = make_rows(16)
    base = make_base(qwen2)
    counts = {"logits": 0, "dequantised": 0, "tokens": 0}
    logits, dequantize, forward, swiglu = Decoder.logits, Weights._dequantize, Decoder._forward, formulas.swiglu
    activated, found = [], []

    def count(name, by):
        counts[name] += by

    monkeypatch.setattr(Decoder, "logits", lambda self, h: count("logits", len(h)) or logits(self, h))
    monkeypatch.setattr(Weights, "_dequantize", lambda self, i: count("dequantised", 1) or dequantize(self, i))
    monkeypatch.setattr(
        Decoder, "_forward", lambda self, ctx: count("tokens", len(ctx.batch.input_ids)) or forward(self, ctx)
    )
    monkeypatch.setattr(formulas, "swiglu", lambda x: activated.append(len(x)) or swiglu(x))
    for checkpointing in (False, True):
        counts.update(logits=0, dequantised=0, tokens=0)
        activated.clear()
        found.append(by_engine("fused", base, pack(rows), checkpointing))
        assert counts.pop("dequantised") == (2 * 2 + 2 if checkpointing else 2)  # kept afterwards
        assert counts == {"logits": n_supervised(rows), "tokens": sum(map(len, rows))}
        assert activated[:2] == [counts["tokens"], counts["logits"]]  # of the last layer, at supervised positions alone
    (kept, grads), (fetched, same) = found
    assert kept == fetched and all(torch.equal(grads[n], same[n]) for n in grads)
