"""The LoRA layer against peft's: forward, gradients and merged weight, bit for bit, on plain and on NF4 linears."""

import math

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from qlora_min.lora import LoRALinear, LoraSpec, inject_lora, lora_disabled, lora_layers, lora_parameters
from qlora_min.ops import formulas, masks
from qlora_min.ops.dropout import Dropout, Tokens
from qlora_min.ops.flat import FlatLoRA
from qlora_min.system.bits import dequantized_weight

IN, OUT, RANK, ALPHA = 128, 96, 16, 24  # alpha / rank = 1.5 is no power of two: scaling rounds, so its place shows


def base_linear(kind: str, bias: bool = True, seed: int = 0) -> nn.Module:
    """A frozen nn.Linear, or the same one quantised."""
    torch.manual_seed(seed)
    linear = nn.Linear(IN, OUT, bias=bias)
    if kind == "nf4":
        quantised = bnb.nn.Linear4bit(IN, OUT, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
        quantised.load_state_dict(linear.state_dict())
        quantised.support_avx512bf16_for_cpu = False
        linear = quantised.to("cpu")  # quantises
        assert linear.weight.dtype == torch.uint8
    return linear.requires_grad_(False)


def pair(kind: str, dropout: float = 0.0, bias: bool = True) -> tuple[LoRALinear, nn.Module]:
    """Our layer and peft's around one base, with the same random A and B."""
    base = base_linear(kind, bias)
    ours = LoRALinear(base, LoraSpec(RANK, ALPHA, dropout))
    nn.init.normal_(ours.lora_B)

    holder = nn.Module()
    holder.proj = base
    holder.is_loaded_in_4bit = kind == "nf4"
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=["proj"])
    theirs = peft.inject_adapter_in_model(config, holder).proj
    assert type(theirs).__name__ == {"plain": "Linear", "nf4": "Linear4bit"}[kind]
    with torch.no_grad():
        theirs.lora_A.default.weight.copy_(ours.lora_A)
        theirs.lora_B.default.weight.copy_(ours.lora_B)
    return ours.train(), theirs.train()


def run(layer: nn.Module, A: nn.Parameter, B: nn.Parameter, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """[y, dL/dx, dL/dA, dL/dB] of one pass over fixed x and dL/dy, dropout seeded."""
    g = torch.Generator().manual_seed(1)
    leaf = torch.randn(3, 7, IN, generator=g).requires_grad_()  # (B, T, in)
    x = leaf * 1  # as in a model, no leaf: autocast would cast a leaf once for both, and sum its gradients in 16 bits
    upstream = torch.randn(3, 7, OUT, generator=g)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = layer(x)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), leaf.grad, A.grad, B.grad]


def run_both(ours: LoRALinear, theirs: nn.Module, dtype: torch.dtype = torch.float32):
    """(name, our tensor, peft's) of the output and every gradient."""
    mine = run(ours, ours.lora_A, ours.lora_B, dtype)
    reference = run(theirs, theirs.lora_A.default.weight, theirs.lora_B.default.weight, dtype)
    return list(zip(("y", "dx", "dA", "dB"), mine, reference))


# ---------------------------------------------------------------------------------------------------------------------
# Against peft
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_forward_and_gradients_are_pefts_bit_for_bit(kind, bias):
    for name, mine, reference in run_both(*pair(kind, bias=bias)):
        assert mine.abs().max() > 0, name
        assert torch.equal(mine, reference), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_under_autocast_too(kind, dtype):
    for name, mine, reference in run_both(*pair(kind), dtype):
        assert mine.dtype == reference.dtype, name
        assert torch.equal(mine, reference), name


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_dropout_stands_where_pefts_stands(kind, seeded):
    """With our dropout in peft's layer: on the update's input alone, and one mask forwards and backwards.

    Without keys a mask is drawn at random: it follows torch's seed. In eval mode there is none.
    """
    ours, theirs = pair(kind, dropout=0.3)
    theirs.lora_dropout.default = ours.dropout
    if seeded:
        ours.dropout.tokens.keys = masks.dropout_keys(torch.tensor(3), torch.arange(21) // 7, torch.arange(21) % 7)
    results = run_both(ours, theirs)
    for name, mine, reference in results:
        assert torch.equal(mine, reference), name
    ours.eval(), theirs.eval()
    (_, mine, reference), *_ = run_both(ours, theirs)
    assert torch.equal(mine, reference)
    assert not torch.equal(mine, results[0][1]), "dropout did nothing"


def test_dropouts_gradient_is_the_mask_of_the_gradient():
    """Against autograd through `masks.dropout_mask`: bit for bit."""
    keys = torch.randint(2**31, (21,)).int()
    x, upstream = torch.randn(3, 7, 33), torch.randn(3, 7, 33)
    mask = masks.dropout_mask(keys, 0.3, 5, 33).view(3, 7, 33)
    dropout = Dropout(0.3, Tokens(keys), stream=5).train()
    mine, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = dropout(mine), reference * mask * (1 / (1 - 0.3))
    y.backward(upstream), expected.backward(upstream)
    assert torch.equal(y, expected) and torch.equal(mine.grad, reference.grad)
    assert 0.5 < mask.float().mean() < 0.9
    assert torch.equal(Dropout(0.0, Tokens(keys)).train()(x), x)


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_the_layer_is_equation_3(kind):
    """y = W x + b + (alpha / r) B A x, in float64 from the tensors: peft is not the only witness."""
    ours, _ = pair(kind)
    x = torch.randn(5, IN)
    W, A, B = (t.double() for t in (dequantized_weight(ours.linear), ours.lora_A, ours.lora_B))
    expected = x.double() @ W.T + ours.linear.bias.double() + (ALPHA / RANK) * (x.double() @ A.T @ B.T)
    torch.testing.assert_close(ours(x).double(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_delta_is_pefts_bit_for_bit(kind):
    ours, theirs = pair(kind)
    delta = ours.delta()
    assert delta.dtype == torch.float32
    assert delta.shape == (OUT, IN)
    assert not delta.requires_grad
    assert torch.equal(delta, theirs.get_delta_weight("default"))


def test_merged_weight_is_pefts_bit_for_bit():
    """On a plain linear, where peft's merge does not quantise again."""
    ours, theirs = pair("plain")
    expected = dequantized_weight(ours.linear) + ours.delta()  # before peft's merge writes into the shared base
    theirs.merge()
    assert torch.equal(expected, theirs.base_layer.weight)


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_merged_weight_computes_what_the_layer_computes(kind):
    ours, _ = pair(kind)
    x = torch.randn(5, IN)
    y = ours(x)
    merged = F.linear(x, dequantized_weight(ours.linear) + ours.delta(), ours.linear.bias)
    assert (merged - y).norm() / y.norm() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# The layer by itself
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_fresh_adapter_changes_nothing(kind):
    base = base_linear(kind)
    x = torch.randn(4, IN)
    expected = base(x)
    for mode in (True, False):
        assert torch.equal(LoRALinear(base, LoraSpec(RANK, ALPHA, dropout=0.5)).train(mode)(x), expected)


def test_first_gradient_reaches_B_alone():
    """dL/dA carries a factor B, which starts at zero."""
    _, _, dA, dB = run(layer := LoRALinear(base_linear("plain"), LoraSpec(RANK, ALPHA)), layer.lora_A, layer.lora_B)
    assert not dA.any()
    assert dB.all()


def test_init_is_kaiming_uniform_and_zero():
    """A is U(-1/sqrt(in), 1/sqrt(in)), whose standard deviation is 1/sqrt(3 in); B is zero; both are fp32."""
    layer = LoRALinear(nn.Linear(1024, 64), LoraSpec(64, ALPHA))  # 65,536 draws
    bound = 1 / math.sqrt(1024)
    assert 0.999 * bound < layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert layer.lora_A.mean().abs() < 0.01 * bound
    assert not layer.lora_B.any()
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer.lora_A.shape == (64, 1024)
    assert layer.lora_B.shape == (64, 64)


def test_init_follows_the_seed():
    base = nn.Linear(IN, OUT)

    def drawn(seed):
        torch.manual_seed(seed)
        return LoRALinear(base, LoraSpec(RANK, ALPHA)).lora_A

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize(("rank", "dropout"), [(0, 0.0), (-1, 0.0), (4, 1.0), (4, -0.1)])
def test_impossible_ranks_and_dropouts_are_refused(rank, dropout):
    with pytest.raises(ValueError, match=f"got {rank if rank < 1 else dropout}"):
        LoraSpec(rank, ALPHA, dropout)


# ---------------------------------------------------------------------------------------------------------------------
# Injection
# ---------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(32, 16), nn.Linear(16, 32)

    def forward(self, x):
        return x + self.up_proj(self.q_proj(x))


class Model(nn.Module):
    """Two layers and a head, with names like a transformer's."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 10)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


IDS = torch.arange(10)[None]


def randomise_B(model):
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B)


def test_injected_names_are_returned_in_the_models_order():
    model = Model()
    names = inject_lora(model, LoraSpec(4, 6, targets=("up_proj", "q_proj")))
    assert names == ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj"]
    assert names == list(lora_layers(model))
    assert all(type(model.get_submodule(n)) is LoRALinear for n in names)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize(
    ("targets", "within", "expected"),
    [
        (("0.q_proj",), "", ["layers.0.q_proj"]),  # more of the name's end
        (("layers.1.up_proj",), "", ["layers.1.up_proj"]),  # all of it
        (("head",), "", ["head"]),
        (("q_proj", "1.q_proj"), "layers.1.", ["layers.1.q_proj"]),  # named twice, wrapped once
    ],
)
def test_a_target_is_the_end_of_a_name(targets, within, expected):
    assert inject_lora(Model(), LoraSpec(4, 6, targets=targets), within=within) == expected


def test_exactly_A_and_B_train():
    model = Model()
    names = inject_lora(model, LoraSpec(4, 6, targets=("q_proj",)))
    expected = {f"{n}.{k}" for n in names for k in ("lora_A", "lora_B")}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == expected == set(lora_parameters(model))
    randomise_B(model)
    model(IDS).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == expected


def test_projections_of_one_input_share_a_mask():
    """And no others do; all layers of a model take the keys of the same tokens."""
    model = nn.ModuleDict()
    parts = {"attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    for i in "01":
        blocks = {part: nn.ModuleDict({n: nn.Linear(8, 8) for n in names}) for part, names in parts.items()}
        model[i] = nn.ModuleDict(blocks)
    inject_lora(model, LoraSpec(4, 6, dropout=0.5, targets=sum(parts.values(), ())))
    layers = lora_layers(model)
    expected = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]
    streams = {}
    for name, layer in layers.items():
        streams.setdefault(layer.dropout.stream, []).append(name.split(".")[-1])
    assert sorted(streams) == list(range(8)) and [tuple(streams[s]) for s in range(8)] == expected * 2
    x, keys = torch.ones(5, 8), torch.arange(5, dtype=torch.int32)
    next(iter(layers.values())).dropout.tokens.keys = keys
    for layer in layers.values():
        assert torch.equal(layer.dropout.train()(x), formulas.dropout(x, 0.5, keys, layer.dropout.stream))


def test_injection_changes_nothing():
    model = Model()
    before = model(IDS)
    inject_lora(model, LoraSpec(4, 6, dropout=0.5, targets=("q_proj", "up_proj", "head")))
    assert torch.equal(model.train()(IDS), before)


def test_parameter_count_is_r_times_in_plus_out():
    model = Model()
    inject_lora(model, LoraSpec(5, 6, targets=("q_proj", "up_proj")))
    assert sum(p.numel() for p in lora_parameters(model).values()) == 2 * (5 * (32 + 16) + 5 * (16 + 32))


def test_parameter_count_of_qwen2_half_b():
    """24 layers, hidden 896, keys and values 128 wide: the figure of lora.py's opening."""
    config = Qwen2Config(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                         num_key_value_heads=2, tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
        inject_lora(model, LoraSpec(16, 32, targets=("q_proj", "k_proj", "v_proj", "o_proj")))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 24 * 16 * (2 * (896 + 896) + 2 * (896 + 128)) == 2_162_688


@pytest.mark.parametrize(
    ("targets", "within", "words"),
    [
        (("q_porj",), "", ["'q_porj'", "head, q_proj, up_proj"]),  # a typo injects nothing silently
        (("q_proj", "k_proj", "gate"), "", ["'k_proj', 'gate'", "q_proj"]),  # one that matches does not save the rest
        (("proj",), "", ["'proj'"]),  # part of a word is no match
        (("norm",), "", ["'norm'"]),  # there, but no linear layer
        (("head",), "layers.", ["'head'", "q_proj, up_proj"]),  # outside of the decoder
        ((), "", ["none given", "q_proj"]),
    ],
)
def test_a_target_without_a_match_lists_the_candidates(targets, within, words):
    model = Model()
    with pytest.raises(ValueError, match="targets") as error:
        inject_lora(model, LoraSpec(4, 6, targets=targets), within=within)
    assert all(w in str(error.value) for w in words), error.value
    assert not lora_layers(model), "half injected"


def test_a_second_injection_is_refused():
    model = Model()
    inject_lora(model, LoraSpec(4, 6, targets=("q_proj",)))
    with pytest.raises(ValueError, match="already"):
        inject_lora(model, LoraSpec(4, 6, targets=("up_proj",)))
    assert len(lora_layers(model)) == 2


def test_disabled_computes_the_base_and_comes_back():
    model = Model()
    before = model(IDS)
    inject_lora(model, LoraSpec(4, 6, targets=("q_proj", "up_proj")))
    randomise_B(model)
    adapted = model(IDS)
    assert not torch.equal(adapted, before)
    with lora_disabled(model):
        assert torch.equal(model(IDS), before)
        with lora_disabled(model):
            pass
        assert torch.equal(model(IDS), before), "the inner context switched the outer one off"
    assert torch.equal(model(IDS), adapted)


def test_disabled_comes_back_after_an_error():
    model = Model()
    inject_lora(model, LoraSpec(4, 6, targets=("q_proj", "up_proj")))
    first, *rest = lora_layers(model).values()
    first.enabled = False  # what was off stays off
    with pytest.raises(RuntimeError, match="inside"), lora_disabled(model):
        raise RuntimeError("inside")
    assert not first.enabled
    assert all(layer.enabled for layer in rest)


# ---------------------------------------------------------------------------------------------------------------------
# All in one tensor
# ---------------------------------------------------------------------------------------------------------------------


def flat_lora(rank: int) -> tuple[FlatLoRA, dict[str, nn.Parameter], dict[str, torch.Tensor]]:
    """(all in one, the parameters, what they were before): at rank 64 the last B alone is below 4,096 elements."""
    model = nn.ModuleDict({"q_proj": nn.Linear(64, 128), "o_proj": nn.Linear(128, 32)})
    inject_lora(model, LoraSpec(rank, 24, targets=tuple(model)))
    randomise_B(model)
    before = {n: p.detach().clone() for n, p in lora_parameters(model).items()}
    return FlatLoRA(lora_layers(model).values(), torch.device("cpu")), lora_parameters(model), before


def test_one_flat_tensor_holds_all_that_trains():
    flat, params, before = flat_lora(rank=64)
    assert params.keys() == before.keys() and all(torch.equal(before[n], p) for n, p in params.items())
    assert flat.weights.numel() == flat.grads.numel() == sum(p.numel() for p in params.values())
    assert flat.weights.dtype == torch.float32 and not flat.grads.any()
    flat.weights.fill_(3.0), flat.grads.fill_(4.0)
    assert all((p == 3).all() and (p.grad == 4).all() for p in params.values())
    q_A, _, o_A, _ = params.values()
    both = flat.view(flat.weights, q_A, 64 + 128)  # As of as many features touch; here the next is o_A, read as (n, 64)
    q_A.data.fill_(1.0), o_A.data.fill_(2.0)
    assert (both[:64] == 1).all() and (both[64:] == 2).all()


def test_an_optimizer_steps_two_tensors_where_blocks_of_state_end_with_matrices():
    flat, params, _ = flat_lora(rank=64)
    (large,), (small,) = flat.large, flat.small
    assert large.numel() == sum(p.numel() for p in params.values() if p.numel() >= 4096)
    assert small.numel() == sum(p.numel() for p in params.values() if p.numel() < 4096) == 32 * 64
    assert large.data_ptr() == flat.weights.data_ptr() and large.grad.data_ptr() == flat.grads.data_ptr()
    assert small.data_ptr() == large.data_ptr() + 4 * large.numel()
    assert small.grad.data_ptr() == large.grad.data_ptr() + 4 * large.numel()
    assert all((p.data_ptr() - large.data_ptr()) % 1024 == 0 for p in params.values())
    odd, params, _ = flat_lora(rank=70)  # 70 x 64 is no multiple of 256
    assert {id(p) for p in [*odd.large, *odd.small]} == {id(p) for p in params.values()}
    assert [p.numel() for p in odd.small] == [32 * 70]
