"""The base: NF4 layers that compute with one weight, errors for damaged models, and other families end to end."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_templates import FORMS
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_min
from qlora_min import nf4
from qlora_min.adapter import AdapterConfig, load_adapter, save_adapter
from qlora_min.base import add_lora, decoder_prefix, load_base, load_encoder
from qlora_min.batches import pack
from qlora_min.data import layouts, rows
from qlora_min.demo import world
from qlora_min.fused.select import make_engine
from qlora_min.generate import generate
from qlora_min.lora import LoraSpec, lora_parameters
from qlora_min.merging import merge_adapter
from qlora_min.run import datasets
from qlora_min.run.plan import parameter_count
from qlora_min.system.bits import dequantized_weight
from qlora_min.system.device import DTYPES, autocast, resolve_precision
from qlora_min.system.hub import find_model
from qlora_min.system.weights import weight_files

CPU = torch.device("cpu")
IDS = torch.randint(0, 290, (2, 16), generator=torch.Generator().manual_seed(0))


def demo_base(quantization: str = "nf4", precision: str = "fp32"):
    return load_base(str(world.MODEL_DIR), quantization, precision, CPU)


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def layer_linears(model) -> dict[str, nn.Linear]:
    prefix = decoder_prefix(model)
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(prefix)}


@pytest.fixture
def model_copy(tmp_path) -> Path:
    """A copy of the demo's model folder, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(world.MODEL_DIR, folder)
    return folder


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


# ---------------------------------------------------------------------------------------------------------------------
# What is loaded
# ---------------------------------------------------------------------------------------------------------------------


def test_unquantised_it_is_transformers_own_model():
    base = demo_base("none")
    theirs = AutoModelForCausalLM.from_pretrained(world.MODEL_DIR, dtype=torch.float32).eval()
    assert base.model.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(base.model.state_dict().values(), theirs.state_dict().values()))
    buffers = dict(theirs.named_buffers())
    assert dict(base.model.named_buffers()).keys() == buffers.keys()
    assert all(torch.equal(b, buffers[n]) for n, b in base.model.named_buffers())
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_what_is_quantised_and_what_is_not(quantization, precision):
    base = demo_base(quantization, precision)
    model, dtype, original = base.model, DTYPES[precision], load_file(world.MODEL_DIR / "model.safetensors")
    linears = layer_linears(model)
    assert len(linears) == 7 * model.config.num_hidden_layers
    for name, layer in linears.items():
        assert isinstance(layer, bnb.nn.Linear4bit) and layer.compute_dtype == dtype
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize, state.dtype) == (quantization, True, 64, dtype)
        assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == layer.in_features * layer.out_features // 2
        assert layer.support_avx512bf16_for_cpu is False
        w = original[f"{name}.weight"].float()
        assert (dequantized_weight(layer).float() - w).norm() / w.norm() < 0.15
        # The same as quantising the fp32 weight by bitsandbytes itself, and rounding once.
        packed, reference = bnb.functional.quantize_4bit(w, quant_type=quantization, compress_statistics=True)
        assert torch.equal(dequantized_weight(layer), bnb.functional.dequantize_4bit(packed, reference).to(dtype))
        if f"{name}.bias" in original:
            assert torch.equal(layer.bias, original[f"{name}.bias"].to(dtype))
    assert sum(layer.bias is not None for layer in linears.values()) == 3 * model.config.num_hidden_layers  # q, k, v
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is nn.Linear and head.weight.dtype == dtype
    assert head.weight is embedding.weight
    assert torch.equal(embedding.weight, original["model.embed_tokens.weight"].to(dtype))
    norms = {n: p for n, p in model.named_parameters() if "norm" in n}
    assert len(norms) == 2 * model.config.num_hidden_layers + 1
    assert all(p.dtype == torch.float32 and torch.equal(p, original[n].float()) for n, p in norms.items())
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tokens", [(3, 5), (1, 1)], ids=["many", "one"])
def test_forward_backward_and_merge_use_one_weight(precision, training, tokens):
    dtype = DTYPES[precision]
    for name in ("q_proj", "o_proj", "down_proj"):
        model = demo_base("nf4", precision).model.train(training)
        layer = next(m for n, m in layer_linears(model).items() if n.endswith(name))
        x = torch.randn(*tokens, layer.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        before = dequantized_weight(layer)
        expected = F.linear(x, before, layer.bias)
        with torch.no_grad():
            assert torch.equal(layer(x), expected)
        x.requires_grad_(True)
        out = layer(x)
        assert torch.equal(out, expected)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        out.backward(gradient)
        assert torch.equal(x.grad, gradient @ before)
        assert torch.equal(dequantized_weight(layer), before)  # a forward in eval mode repacks nothing
        assert before.dtype == dtype


def test_the_residual_stream_is_fp32_under_autocast():
    base = demo_base("nf4", "bf16")
    seen = []
    for layer in base.model.get_decoder().layers:
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].dtype))
    with autocast(CPU, base.dtype), torch.no_grad():
        base.model(IDS)
    assert seen == [torch.float32] * base.model.config.num_hidden_layers


def test_untied_heads_stay_apart(model_copy):
    edit_config(model_copy, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"1 weights are missing, among them 'lm_head\.weight'"):
        load_base(str(model_copy), device=CPU)
    head = torch.randn(load_file(model_copy / "model.safetensors")["model.embed_tokens.weight"].shape)
    edit_weights(model_copy, lambda t: t.update({"lm_head.weight": head}))
    base = load_base(str(model_copy), device=CPU)
    assert torch.equal(base.model.get_output_embeddings().weight, head)
    assert base.model.get_input_embeddings().weight is not base.model.get_output_embeddings().weight


def test_a_stored_copy_of_a_tied_weight_is_no_error(model_copy):
    edit_weights(model_copy, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    edit_weights(model_copy, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    base = load_base(str(model_copy), device=CPU)
    assert torch.equal(logits(base.model), logits(demo_base().model))


def test_sharded_weights(tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(world.MODEL_DIR)
    whole.save_pretrained(tmp_path, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(tmp_path)
    files = weight_files(tmp_path)
    assert len(files) > 2 and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(load_base(str(tmp_path), device=CPU).model), logits(demo_base().model))
    files[1].unlink()
    with pytest.raises(ValueError, match=rf"{files[1].name} is missing; copy or download the model again"):
        load_base(str(tmp_path), device=CPU)


def test_the_fingerprint_is_the_bases_own(model_copy):
    fingerprint = demo_base().fingerprint
    assert fingerprint == demo_base("none").fingerprint == demo_base("fp4", "bf16").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert load_base(str(model_copy), device=CPU).fingerprint == fingerprint
    edit_config(model_copy, rms_norm_eps=1e-5)
    assert load_base(str(model_copy), device=CPU).fingerprint != fingerprint
    edit_config(model_copy, rms_norm_eps=json.loads((world.MODEL_DIR / "config.json").read_text())["rms_norm_eps"])
    assert load_base(str(model_copy), device=CPU).fingerprint == fingerprint

    def nudge(tensors):
        tensors["model.norm.weight"][3] += 0.5

    edit_weights(model_copy, nudge)
    assert load_base(str(model_copy), device=CPU).fingerprint != fingerprint


def test_no_accelerate_and_no_peft_are_needed():
    code = """
import sys
for name in ("accelerate", "peft", "trl"):
    sys.modules[name] = None  # importing it is an ImportError
import torch
from qlora_min.base import add_lora, load_base
from qlora_min.lora import LoraSpec
base = load_base(sys.argv[1], "nf4", "fp32", torch.device("cpu"))
add_lora(base, LoraSpec(4, 8.0, 0.0, ("q_proj",)))
base.model(torch.arange(8)[None]).logits.sum().backward()
assert any(p.grad is not None and p.grad.any() for p in base.model.parameters())
try:
    import accelerate
except ImportError:
    print("trained without it")
"""
    command = [sys.executable, "-c", code, str(world.MODEL_DIR)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout == "trained without it\n", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "nothing", "a/b/c", "../x"])
def test_no_such_folder(name):
    with pytest.raises(ValueError, match=f"model '{re.escape(name)}': no such folder; expected a local model folder"):
        find_model(name)


def test_the_hub_out_of_reach_names_the_demo_and_local_folders():
    with pytest.raises(ValueError) as error:
        load_base("nobody/no-such-model")
    for part in ("model 'nobody/no-such-model'", "can't be reached", "--model DIR", "--demo"):
        assert part in str(error.value)


def test_a_name_that_no_hub_id_can_be():
    with pytest.raises(ValueError, match=r"model 'no body/\?\?\?': .*no valid hub id"):
        load_base("no body/???")


def remove(name):
    return lambda t: t.pop(name)


def spoil(value: float):
    return lambda t: t["model.layers.1.mlp.up_proj.weight"][3].fill_(value)


WRONG_WEIGHTS = {
    "missing": (remove("model.layers.0.mlp.up_proj.weight"), r"1 weights are missing, .*'model\.layers\.0\.mlp"),
    "missing bias": (remove("model.layers.0.self_attn.q_proj.bias"), r"1 weights are missing, .*q_proj\.bias'"),
    "missing embedding": (remove("model.embed_tokens.weight"), r"1 weights are missing, .*'model\.embed_tokens\.w"),
    "unexpected": (
        lambda t: t.update({"model.layers.0.extra.weight": torch.ones(2)}),
        r"unexpected weight 'model\.layers\.0\.extra\.weight' for a qwen2 model",
    ),
    "misshaped": (
        lambda t: t.update({"model.norm.weight": torch.ones(7)}),
        r"weight 'model\.norm\.weight' has shape \(7,\), expected \(64,\)",
    ),
    "NaN": (spoil(float("nan")), r"weight 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinite values"),
    "infinite": (spoil(float("-inf")), r"weight 'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinite values"),
}  # fmt: skip


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("name", WRONG_WEIGHTS)
def test_wrong_weights(model_copy, name, quantization):
    change, message = WRONG_WEIGHTS[name]
    edit_weights(model_copy, change)
    with pytest.raises(ValueError, match=message) as error:
        load_base(str(model_copy), quantization, device=CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights(model_copy, keep):
    path = model_copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=rf"{path}: damaged or missing weights \(.*\); copy or download the file"):
        load_base(str(model_copy), device=CPU)


def test_folders_that_hold_no_model(model_copy, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=f"model '{empty}': the folder has no config.json"):
        load_base(str(empty))
    (model_copy / "model.safetensors").rename(model_copy / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_base(str(model_copy), device=CPU)
    for part in (
        "no model.safetensors",
        "pytorch_model.bin is a pickle",
        "never read",
        "convert it",
        "save_pretrained",
    ):
        assert part in str(error.value)
    (model_copy / "config.json").write_text("{")
    with pytest.raises(ValueError):
        load_base(str(model_copy), device=CPU)
    (model_copy / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match="no-such-type"):
        load_base(str(model_copy), device=CPU)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_byte_order_mark(model_copy, name):
    path = model_copy / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_base(str(model_copy), device=CPU).fingerprint == demo_base().fingerprint


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_index(model_copy, content):
    (model_copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match="index"):
        load_base(str(model_copy), device=CPU)


def test_no_chat_template(model_copy):
    (model_copy / "chat_template.jinja").unlink(missing_ok=True)
    path = model_copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no chat template; use an instruction-tuned model"):
        load_base(str(model_copy), device=CPU)


def test_no_tokenizer(model_copy):
    for path in [*model_copy.glob("tokenizer*"), *model_copy.glob("*.jinja"), *model_copy.glob("vocab*")]:
        path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer"):
        load_base(str(model_copy), device=CPU)


def save_family(folder: Path, config, tokenizer) -> str:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:  # biases and norms begin as all 0 or 1, and a mistake with them would not show
                p.add_(0.1 * torch.randn_like(p))
            elif "embed" in name:
                p.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny(config_class, tokenizer, **values):
    return config_class(**{
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **values,
    })  # fmt: skip


def test_rows_that_bitsandbytes_dequantises_wrongly_on_a_cpu(tmp_path):
    """Those of 96, no multiple of a block of 64: forward and backward use the weight that nf4.py has."""
    tokenizer = load_encoder(str(world.MODEL_DIR)).tokenizer
    name = save_family(tmp_path, tiny(transformers.Qwen2Config, tokenizer, intermediate_size=96), tokenizer)
    original = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    layer = load_base(name, device=CPU).model.model.layers[0].mlp.down_proj
    weight = nf4.dequantize(nf4.quantize(original.float()))
    assert torch.equal(dequantized_weight(layer), weight)
    x = torch.randn(5, 96, requires_grad=True)
    layer(x).backward(torch.ones(5, 64))
    assert torch.equal(layer(x), F.linear(x, weight)) and torch.equal(x.grad, torch.ones(5, 64) @ weight)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens beyond the embedding
# ---------------------------------------------------------------------------------------------------------------------


def with_tokens(folder: Path, *tokens: str, template: str | None = None) -> str:
    """Tokens added to the tokenizer, the embedding not resized."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"|{i}|" for i in range(vocab_size - len(tokenizer))])  # fill the embedding, which is padded
    tokenizer.add_tokens(list(tokens))
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(tokens[-1]) >= vocab_size
    return str(folder)


def test_rows_with_a_token_beyond_the_embedding_are_named(model_copy, script, write_rows, monkeypatch):
    name = with_tokens(model_copy, "Tavorosis")
    good = [{"prompt": f"{i}?", "completion": "Yes"} for i in range(12)]
    training = ["train.py", "--model", name, "--max-steps", 1, "--dataset"]
    script(*training, write_rows(good), "--output-dir", "run")  # no row uses it
    monkeypatch.setattr("qlora_min.system.weights.read_weights", lambda _: pytest.fail("weights were read"))
    rows = write_rows([*good, {"prompt": "What is Tavorosis?", "completion": "Yes"}])
    done = script(*training, rows, "--output-dir", "other", expect=2)
    assert re.search(
        rf"{rows}:13: token id \d+ is beyond the model's embedding of \d+ tokens \(vocab_size", done.stderr
    )
    assert "Tavorosis" not in done.stderr and "Traceback" not in done.stderr


def test_a_prompt_with_a_token_beyond_the_embedding(model_copy, script):
    name = with_tokens(model_copy, "Tavorosis")
    done = script("chat.py", "--model", name, "--prompt", "What is Tavorosis?", expect=2)
    assert done.stderr.startswith("error: token id") and done.stderr.count("\n") == 1
    with pytest.raises(ValueError, match="is beyond the model's embedding"):
        qlora_min.load(name).generate("What is Tavorosis?")


def test_a_template_whose_own_tokens_are_beyond_the_embedding(model_copy):
    name = with_tokens(model_copy, "<|begin|>", template="{{ '<|begin|>' }}" + CHATML)
    with pytest.raises(ValueError, match=r"no usable tokenizer \(token id \d+ is beyond the model's embedding of"):
        load_encoder(name)


# ---------------------------------------------------------------------------------------------------------------------
# Precision, checkpointing, counts
# ---------------------------------------------------------------------------------------------------------------------


def test_precision_on_a_cpu():
    assert resolve_precision("auto", CPU) == "fp32"
    for precision in ("fp32", "fp16", "bf16"):
        assert resolve_precision(precision, CPU) == precision


@pytest.mark.parametrize(
    "name, capability, auto", [("Tesla T4", (7, 5), "fp16"), ("A100", (8, 0), "bf16"), ("H100", (9, 0), "bf16")]
)
def test_precision_on_a_gpu(monkeypatch, name, capability, auto):
    hardware = capability >= (8, 0)
    monkeypatch.setattr(  # torch's own says True on a T4 unless asked to leave emulation out
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or hardware
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
    gpu = torch.device("cuda")
    assert resolve_precision("auto", gpu) == auto
    assert resolve_precision("fp16", gpu) == "fp16" and resolve_precision("fp32", gpu) == "fp32"
    if hardware:
        assert resolve_precision("bf16", gpu) == "bf16"
    else:
        expected = r"--precision bf16: Tesla T4 has compute capability 7\.5, bf16 needs 8\.0; use --precision fp16 or"
        with pytest.raises(ValueError, match=expected):
            resolve_precision("bf16", gpu)


ROWS_OF_IDS = [rows.Row(ids.int(), torch.arange(16) > 3, "") for ids in IDS]


@pytest.mark.parametrize("mixing", ["", "a row at a time"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointing_runs_each_layer_twice_and_changes_nothing(precision, mixing):
    gradients, calls = [], []
    for checkpointing in (False, True):
        base = demo_base("nf4", precision)
        torch.manual_seed(5)
        add_lora(base, LoraSpec(4, 8.0, 0.3, ("q_proj", "v_proj")))
        with torch.no_grad():
            for p in lora_parameters(base.model).values():
                p.normal_(std=0.1)
        engine, runs = make_engine(base, "modules", 16)[0], []
        engine.mixing, engine.checkpointing = mixing, checkpointing
        for layer in base.model.get_decoder().layers:
            layer.input_layernorm.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        engine.loss_and_gradients(pack(ROWS_OF_IDS), torch.tensor(1.0), torch.tensor(6, dtype=torch.int32))
        gradients.append({n: p.grad for n, p in lora_parameters(base.model).items()})
        calls.append(len(runs))
        runs.clear()
        engine.hidden_states(pack(ROWS_OF_IDS))
        passes = base.model.config.num_hidden_layers * (len(ROWS_OF_IDS) if mixing else 1)
        assert len(runs) == passes  # not recomputed without gradients
    assert calls == [passes, 2 * passes]
    assert all(g.any() for g in gradients[0].values())
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


def test_the_base_stays_in_eval_mode():
    """Its own dropout never acts; ours does in a step, and not before or behind it."""
    base = demo_base()
    add_lora(base, LoraSpec(4, 8.0, 0.3, ("q_proj", "v_proj")))
    for p in lora_parameters(base.model).values():
        nn.init.normal_(p, std=0.1)
    engine, batch = make_engine(base, "modules", 16)[0], pack(ROWS_OF_IDS)
    before, seen = engine.hidden_states(batch), []
    modules = dict(base.model.named_modules())
    layers = base.model.get_decoder().layers
    layers[0].register_forward_pre_hook(lambda *_: seen.append({n for n, m in modules.items() if m.training}))
    engine.loss_and_gradients(batch, torch.tensor(1.0), torch.tensor(6, dtype=torch.int32))
    assert seen == [{n for n in modules if n.endswith("_proj.dropout")}] and len(seen[0]) == 2 * len(layers)
    assert not any(m.training for m in modules.values())
    assert torch.equal(engine.hidden_states(batch), before)


def test_parameter_count_by_formula():
    c = json.loads((world.MODEL_DIR / "config.json").read_text())
    d, inner, vocab, layers = (c[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
    kv = d // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = (d * d + d) + 2 * (d * kv + kv) + d * d + 3 * d * inner + 2 * d
    expected = vocab * d + layers * layer + d
    assert c["tie_word_embeddings"]
    for quantization in ("nf4", "none"):
        base = demo_base(quantization)
        assert parameter_count(base.model) == expected
        names = add_lora(base, LoraSpec(4, 8.0, 0.0, ("q_proj", "down_proj")))
        assert len(names) == 2 * layers
        assert parameter_count(base.model) == expected + layers * 4 * ((d + d) + (inner + d))


# ---------------------------------------------------------------------------------------------------------------------
# Other families
# ---------------------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<bos>' }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
QWEN3 = FORMS["qwen3"][0]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

FAMILIES = {  # name -> (config class, its options, chat template, its control tokens, the end token, targets)
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, CHATML, [], "<|im_end|>", ATTENTION),
    "qwen2.5": ("Qwen2Config", {"tie_word_embeddings": False}, CHATML, [], "<|im_end|>", ATTENTION),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}, QWEN3, [], "<|im_end|>", ATTENTION),
    "llama": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
        LLAMA, ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>", ATTENTION,
    ),
    "smollm2": ("LlamaConfig", {"num_key_value_heads": 4, "tie_word_embeddings": True}, CHATML, [], "<|im_end|>",
                ("q_proj", "v_proj", "down_proj")),
    "mistral": ("MistralConfig", {"sliding_window": 8}, MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>",
                ATTENTION),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 32, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        GEMMA, ["<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", ATTENTION,
    ),
    "phi3": ("Phi3Config", {}, PHI, ["<|user|>", "<|assistant|>", "<|end|>"], "<|end|>", ("qkv_proj", "o_proj")),
}  # fmt: skip

BY_MODULES = {"gemma3", "phi3", "mistral"}  # Mistral's window of 8 tokens is shorter than rows


def make_family(name: str, folder: Path) -> str:
    """A random tiny model of a family, saved."""
    config_class, options, template, special, _, _ = FAMILIES[name]
    tokenizer = copy.deepcopy(load_encoder(str(world.MODEL_DIR)).tokenizer)
    tokenizer.add_tokens([t for t in special if t not in tokenizer.get_vocab()], special_tokens=True)
    tokenizer.chat_template = template
    return save_family(folder, tiny(getattr(transformers, config_class), tokenizer, **options), tokenizer)


ROWS = [
    {"prompt": "Which drug treats Tavorosis?", "completion": "Bekoxol."},
    {"messages": [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "\n1 <|im_end|> </s>"},
    ]},
    {"instruction": "Name two", "input": "drugs", "output": "Bekoxol and Vadizine, in that order"},
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_end_to_end(name, tmp_path):
    """Load, encode, train, save, load, merge: the same logits at each point."""
    *_, end, targets = FAMILIES[name]
    folder = make_family(name, tmp_path / "model")

    # Loading: transformers' own numbers, head included.
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    plain = load_base(folder, "none", device=CPU)
    reference = logits(theirs)
    assert torch.equal(logits(plain.model), reference)
    base = load_base(folder, "nf4", device=CPU)
    assert 0 < (logits(base.model) - reference).norm() / reference.norm() < 0.5

    # Encoding: the answers and their end tokens.
    rows = datasets.encode_dataset("rows", [layouts.to_example(r, "r") for r in ROWS], base.encoder, 128).rows
    tokenizer = base.encoder.tokenizer
    learned = [tokenizer.decode(r.input_ids[r.supervised].tolist()) for r in rows]
    plain_text = [re.sub(r"\s|<think>\s*</think>", "", t) for t in learned]  # test_templates.py has the blanks
    assert plain_text[0] == f"Bekoxol.{end}" and plain_text[1] == f"Hello{end}1<|im_end|></s>{end}"

    # Training: packed rows are apart, and the engine's logits are the model's own.
    torch.manual_seed(0)
    add_lora(base, LoraSpec(4, 6.0, 0.1, targets))
    parameters = list(lora_parameters(base.model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    engine, kind, why = make_engine(base, "auto", 128)
    assert kind == ("modules" if name in BY_MODULES else "fused") and not getattr(engine, "mixing", ""), why
    engine.checkpointing = True
    batch, losses = engine.pack(rows), []
    own = torch.cat([logits(base.model, r.input_ids.long()[None])[0] for r in rows])
    mine = engine.logits(engine.hidden_states(batch))
    assert (mine - own).norm() / own.norm() < 1e-5
    for step in range(6):
        factor, seed = torch.tensor(1 / batch.n_supervised), torch.tensor(step, dtype=torch.int32)
        losses.append(engine.loss_and_gradients(batch, factor, seed).item())
        assert all(p.grad.any() for p in parameters[1 if step == 0 else 0 :: 2])
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert losses[-1] < losses[0]

    # Saving and loading: bitwise the same.
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = AdapterConfig(LoraSpec(4, 6.0, 0.0, targets), folder, None, base.fingerprint)
    save_adapter(adapter, base.model, config, tokenizer)
    trained = logits(base.model)
    again = load_adapter(adapter, device=CPU)
    assert torch.equal(logits(again.model), trained)
    assert (trained - logits(load_base(folder, "nf4", device=CPU).model)).norm() / trained.norm() > 1e-3

    # Merging and generating.
    merge_adapter(adapter, tmp_path / "merged", "fp32")
    merged = load_base(str(tmp_path / "merged"), "none", device=CPU)
    assert (logits(merged.model) - trained).norm() / trained.norm() <= 1e-5
    prompts = [base.encoder.prompt(layouts.to_example(ROWS[0], "r").messages[:-1])]
    assert generate(again, prompts, 8) == generate(merged, prompts, 8)


def test_fused_projections_say_what_to_pass(tmp_path):
    base = load_base(make_family("phi3", tmp_path), device=CPU)
    with pytest.raises(ValueError) as error:
        add_lora(base, LoraSpec(4, 8.0, 0.0, ATTENTION))
    assert str(error.value) == (
        "targets: 'q_proj', 'k_proj', 'v_proj' matches no linear layer of the model's decoder layers; "
        "expected all-linear, or names among: down_proj, gate_up_proj, o_proj, qkv_proj"
    )
    assert len(add_lora(base, LoraSpec(4, 8.0, 0.0, ("qkv_proj", "o_proj")))) == 4


def test_logits_that_are_changed_in_an_unknown_way_are_refused(monkeypatch):
    """By trying: the model's own are compared with what the head makes of its hidden states."""
    base = demo_base()
    forward = type(base.model).forward

    def other(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 1.01 * out.logits
        return out

    monkeypatch.setattr(type(base.model), "forward", other)
    with pytest.raises(ValueError, match="qwen2 changes its logits in a way that is not implemented"):
        make_engine(base, "modules", 16)


def test_the_fingerprint_is_the_same_in_every_version():
    """It is written beside adapters: another value for the same base would refuse them all."""
    assert (
        load_base(str(world.MODEL_DIR), device=CPU).fingerprint
        == "997bcd7cc4c07ddc53b4ce35c7f43ecaef8dd6856d5d1a12842de3ce49979d84"
    )
