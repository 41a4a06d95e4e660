"""Every family of transformers by its own modules: packed where its rows stay apart, which is found by trying."""

import random

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qlora_min.base import add_lora, load_base
from qlora_min.batches import dropout_seed
from qlora_min.data.rows import Row
from qlora_min.demo import world
from qlora_min.fused.select import make_engine
from qlora_min.lora import LoraSpec, lora_parameters

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 256, "pad_token_id": 0}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
WINDOW = {"sliding_window": 16}

# name -> (model type, its options, targets, why rows are computed one at a time)
FAMILIES = {
    "qwen2": ("qwen2", {}, ATTENTION, ""),
    "qwen2 with a window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0, **WINDOW}, ATTENTION, ""),
    "qwen3": ("qwen3", {"head_dim": 32}, ATTENTION, ""),
    "llama": ("llama", {}, ATTENTION, ""),
    "mistral with a window": ("mistral", WINDOW, ATTENTION, ""),
    "gemma2 without soft caps": ("gemma2", {"head_dim": 16, "attn_logit_softcapping": None, **WINDOW}, ATTENTION, ""),
    "gemma3": ("gemma3_text", {"head_dim": 16, "final_logit_softcapping": 5.0, **WINDOW}, ATTENTION, ""),
    "phi3": ("phi3", {}, ("qkv_proj", "o_proj"), ""),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
                ATTENTION, ""),
    "smollm3": ("smollm3", {}, ATTENTION, ""),
    "opt": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}, ("q_proj", "k_proj", "v_proj", "out_proj"), ""),
    "gpt_neox": ("gpt_neox", {}, ("query_key_value", "dense"), ""),
    "cohere": ("cohere", {"logit_scale": 0.25}, ATTENTION, ""),
    "cohere2": ("cohere2", {"logit_scale": 0.25, **WINDOW}, ATTENTION, ""),
    "olmo2": ("olmo2", {}, ATTENTION, ""),
    "gemma2": ("gemma2", {"head_dim": 16, **WINDOW}, ATTENTION, "its attention takes softcap"),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 2, **WINDOW,
                            "layer_types": ["sliding_attention", "full_attention"]},
                ATTENTION, "its attention takes s_aux"),
    "phi3 with longrope": ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
                           ("qkv_proj", "o_proj"), "packed rows would mix"),
    "stablelm": ("stablelm", {}, ATTENTION, "it does not tell its attention where rows end"),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 64, "attention_window_size": 16}, ("gate_proj", "down_proj"),
                        "packed rows would mix"),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}, ("q_proj", "v_proj"), "packed rows would mix"),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, ("query_key_value", "dense"), "packed rows would mix"),
    "falcon": ("falcon", {}, ("query_key_value", "dense"), "it takes no packed rows"),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2}, ("Wqkv",), "it takes no packed rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_by_its_modules_is_its_own_forward(name, tmp_path):
    """Loss and gradients of ragged rows together, one beyond the window and the rotary limit, and one row by one."""
    family, options, targets, mixing = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | options))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1 if p.dim() > 1 else 0.5)
    model.save_pretrained(tmp_path, save_original_format=False)
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), "none", "fp32", CPU)
    if targets:
        add_lora(base, LoraSpec(8, 12.0, 0.0, targets))
    parameters = list(lora_parameters(base.model).values())
    for p in parameters:
        torch.nn.init.normal_(p, std=0.1)
    engine, kind, why = make_engine(base, "modules", 60)
    assert kind == "modules" and engine.mixing.startswith(mixing) and bool(engine.mixing) == bool(mixing)
    assert engine.mixing in why
    rng, rows = random.Random(0), []
    for n in (5, 60, 33, 2):
        supervised = torch.tensor([rng.random() < 0.5 for _ in range(n - 1)] + [True])
        rows.append(Row(torch.tensor([rng.randrange(1000) for _ in range(n)], dtype=torch.int32), supervised, ""))
    loss = engine.loss_and_gradients(engine.pack(rows), torch.tensor(0.25), dropout_seed(0, 0)).item()
    expected, summed = 0.0, [torch.zeros_like(p) for p in parameters]
    for row in rows:
        logits = base.model(input_ids=row.input_ids.long()[None], use_cache=False).logits[0, :-1]
        taught = row.supervised[1:]
        own = F.cross_entropy(logits[taught], row.input_ids[1:].long()[taught], reduction="sum")
        expected += own.item()
        for total, g in zip(summed, torch.autograd.grad(0.25 * own, parameters) if parameters else ()):
            total += g
    assert loss == pytest.approx(expected, rel=1e-6)
    for p, g in zip(parameters, summed, strict=True):
        assert (p.grad - g).norm() < 1e-5 * g.norm()


def saved(folder, family: str, **options) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | options))
    model.save_pretrained(folder)  # as the hub has it, which is not how transformers 5 names and shapes all weights
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(folder)
    return str(folder)


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


@pytest.mark.parametrize(
    "family, options",
    [("gpt_neox", {}), ("gemma3", {"text_config": SHAPE | {"head_dim": 16}, "vision_config": VISION})],
)
def test_weights_under_the_names_that_the_hub_has(tmp_path, family, options):
    name = saved(tmp_path, family, **options)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        ours = load_base(name, "none", device=CPU).model(input_ids=ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(name).eval()(input_ids=ids).logits
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "family, options, why",
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "it has no layers of nn.Linear"),
        ("bert", {}, "it has no layers of nn.Linear"),
        ("mixtral", {"num_local_experts": 2}, "transformers puts its weights together from those that are stored"),
        ("mamba", {"intermediate_size": 128}, "its forward pass fails"),
    ],
)
def test_a_family_that_is_not_supported_says_why_in_one_line(tmp_path, family, options, why):
    with pytest.raises(ValueError, match=f"^model '{tmp_path}': {family} is not supported, since {why}") as error:
        base = load_base(saved(tmp_path, family, **options), "none", device=CPU)
        add_lora(base, LoraSpec(4, 8.0, 0.0, ("in_proj", "out_proj", "dt_proj")))
        make_engine(base, "auto", 32)
    assert str(error.value).isprintable() and len(str(error.value)) < 330


@pytest.mark.parametrize("which", ["demo", pytest.param("smollm2", marks=pytest.mark.real)])
def test_both_engines_compute_the_same_on_real_weights(which, request):
    """fp32, dropout 0.1: losses to 1e-6, gradients to 1e-5."""
    folder = world.MODEL_DIR if which == "demo" else request.getfixturevalue("smollm2")
    base = load_base(str(folder), "nf4", "fp32", CPU)
    torch.manual_seed(0)
    add_lora(base, LoraSpec(16, 32.0, 0.1, ATTENTION))
    for name, p in lora_parameters(base.model).items():
        if name.endswith("B"):
            torch.nn.init.normal_(p, std=0.02)
    rng, rows = random.Random(0), []
    for n in (40, 12, 57):
        ids = torch.tensor([rng.randrange(290) for _ in range(n)], dtype=torch.int32)
        rows.append(Row(ids, torch.arange(n) >= n - 9, ""))
    found = []
    for name in ("fused", "modules"):
        engine, *_ = make_engine(base, name, 64)
        loss = engine.loss_and_gradients(engine.pack(rows), torch.tensor(1 / 27), dropout_seed(1, 2)).item()
        found.append((loss, engine.adapter.grads.clone()))
    (fused, by_hand), (modules, by_autograd) = found
    assert fused == pytest.approx(modules, rel=1e-6)
    assert (by_hand - by_autograd).norm() < 1e-5 * by_autograd.norm()


def test_a_model_that_overflows_fp16_says_what_to_use(tmp_path):
    """Gemma 3's residual stream does so: a T4's only 16 bits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3_text", **SHAPE, head_dim=16))
    for projection in model.model.layers[0].mlp.children():
        if isinstance(projection, torch.nn.Linear):
            projection.weight.data.fill_(30.0)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(tmp_path)
    for precision, fits in (("fp16", False), ("fp32", True)):
        base = load_base(str(tmp_path), "nf4", precision, CPU)
        if fits:
            assert make_engine(base, "auto", 32)[1] == "modules"
        else:
            with pytest.raises(ValueError, match="hidden states overflow float16; use --precision fp32"):
                make_engine(base, "auto", 32)
