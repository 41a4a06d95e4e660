"""Bases that are stored in 4 bits: what bitsandbytes wrote is what computes; and quantisations that are refused."""

import json
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter import edit as edit_adapter
from test_adapter import save_peft
from test_scripts import one_line_error
from transformers import AutoModelForCausalLM

import qlora_min
import qlora_min.run.trainer
from qlora_min.adapter import AdapterConfig, load_adapter
from qlora_min.base import add_lora, load_base, load_encoder
from qlora_min.data.rows import Row
from qlora_min.demo import world
from qlora_min.fused.select import make_engine
from qlora_min.lora import LoraSpec, lora_parameters
from qlora_min.merging import merge_adapter
from qlora_min.system.bits import dequantized_weight
from qlora_min.system.device import DTYPES, autocast

CPU = torch.device("cpu")
IDS = torch.arange(5, 29).view(2, 12)
STATE = "quant_state.bitsandbytes__"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(qlora_min.run.trainer, "pick_device", lambda: CPU)


def quantized_copy(folder: Path, bits: str = "nf4", keep=(), also=(), storage=torch.uint8, **how) -> Path:
    """The demo's model with the linear layers of its decoder as bitsandbytes serialises them.

    keep: parts of the names of layers that stay in 16 bits. also: names of other weights that are quantised. how:
    blocksize and compress_statistics of `quantize_4bit`.
    """
    shutil.copytree(world.MODEL_DIR, folder)
    stored = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        linear = name.endswith("proj.weight") and not any(part in name for part in keep)
        if not linear and name not in also:
            stored[name] = weight
            continue
        packed, state = bnb.functional.quantize_4bit(
            weight.float(), quant_type=bits, quant_storage=storage, **{"compress_statistics": True, **how}
        )
        state.dtype = torch.bfloat16
        stored |= {name: packed} | {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": bits}
    edit_config(folder, quantization_config=method)
    return folder


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def by_bitsandbytes(folder: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    """The weight that bitsandbytes itself makes of a file; as one row, which it always gets right."""
    parts = {k: t for k, t in load_file(folder / "model.safetensors").items() if k.startswith(f"{name}.")}
    packed = load_file(folder / "model.safetensors")[name].view(torch.uint8).view(-1, 1)
    state = bnb.functional.QuantState.from_dict(parts, CPU)
    shape, state.dtype = state.shape, dtype
    state.shape = torch.Size((1, shape.numel()))
    return bnb.functional.dequantize_4bit(packed, state).view(shape)


@torch.no_grad()
def logits(base) -> torch.Tensor:
    with autocast(CPU, base.dtype):
        return base.model(IDS, use_cache=False).logits


@pytest.mark.parametrize("bits", ["nf4", "fp4"])
def test_quantised_once_is_exact(tmp_path, bits):
    """What we quantise, saved in this form, computes the same; and its fingerprint is its own."""
    folder = quantized_copy(tmp_path / "model", bits)
    for precision in ("fp32", "bf16"):
        ours, theirs = (load_base(str(f), bits, precision, CPU) for f in (world.MODEL_DIR, folder))
        assert torch.equal(logits(theirs), logits(ours))
    assert (theirs.quantization, theirs.prequantized, ours.prequantized) == (bits, True, False)
    assert theirs.fingerprint != ours.fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight.nested_absmax"][0] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_base(str(folder), bits, device=CPU).fingerprint != theirs.fingerprint


FORMS = {
    "doubly quantised": {},
    "blocks of 128": {"blocksize": 128},  # the rows of most layers are 64
    "blocks of 32": {"blocksize": 32},
    "plain scales": {"compress_statistics": False},
    "plain scales, fp4, blocks of 256": {"compress_statistics": False, "bits": "fp4", "blocksize": 256},
    "bytes held as bf16": {"storage": torch.bfloat16},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_with_bitsandbytes_weights(tmp_path, form):
    """Bit for bit, with 16-bit layers among them as they are, and by both engines."""
    folder = quantized_copy(tmp_path / "model", keep=("layers.0.mlp", "layers.1.self_attn.k_proj"), **FORMS[form])
    original = load_file(world.MODEL_DIR / "model.safetensors")
    bits, found = FORMS[form].get("bits", "nf4"), []
    for precision in ("bf16", "fp32"):
        base = load_base(str(folder), bits, precision, CPU)
        for name, layer in base.model.named_modules():
            if name.endswith("_proj"):
                key, kept = f"{name}.weight", "layers.0.mlp" in name or "layers.1.self_attn.k_proj" in name
                assert isinstance(layer, bnb.nn.Linear4bit) != kept
                dtype = DTYPES[precision]
                expected = original[key].to(dtype) if kept else by_bitsandbytes(folder, key, dtype)
                assert torch.equal(dequantized_weight(layer), expected), name
    torch.manual_seed(0)
    add_lora(base, LoraSpec(4, 8.0, 0.1, ("q_proj", "v_proj", "down_proj")))
    for p in lora_parameters(base.model).values():
        torch.nn.init.normal_(p, std=0.1)
    rows = [Row(torch.arange(3, 3 + n, dtype=torch.int32), torch.arange(n) > 2, "") for n in (9, 30)]
    for name in ("fused", "modules"):
        engine, kind, _ = make_engine(base, name, 32)
        loss = engine.loss_and_gradients(engine.pack(rows), torch.tensor(1.0), torch.tensor(3, dtype=torch.int32))
        found.append((loss.item(), engine.adapter.grads.clone()))
        assert kind == name
    (a, by_hand), (b, by_autograd) = found
    assert a == pytest.approx(b, rel=1e-6) and (by_hand - by_autograd).norm() < 1e-5 * by_autograd.norm()


def test_a_head_in_4_bits_computes_as_the_16_bits_that_it_stands_for(tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(world.MODEL_DIR, whole)
    tensors = load_file(whole / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    edit_config(whole, tie_word_embeddings=False)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(world, "MODEL_DIR", whole)
        folder = quantized_copy(tmp_path / "model", also=("lm_head.weight",))
    head = load_base(str(folder), device=CPU).model.lm_head
    assert not isinstance(head, bnb.nn.Linear4bit)
    assert torch.equal(head.weight, by_bitsandbytes(folder, "lm_head.weight", torch.float32))


def test_a_run_on_a_4_bit_base_and_all_that_follows(tmp_path, script, demo_data):
    """--quantization says what is true, or is refused; the merged folder is an ordinary checkpoint."""
    folder = quantized_copy(tmp_path / "model", keep=("layers.0.mlp",))
    training = ["train.py", "--model", folder, "--dataset", demo_data[0], "--limit", 32, "--eval-limit", 8]
    for other in ("none", "fp4"):
        done = script(*training, "--quantization", other, "--output-dir", "other", expect=2)
        one_line_error(done, f"'{folder}' is stored in nf4", f"--quantization {other}", "give --quantization nf4")
    script(*training, "--max-steps", 2, "--output-dir", "run")
    adapter = tmp_path / "run" / "adapter"
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["options"]["quantization"] == AdapterConfig.read(adapter).quantization == "nf4"
    assert "loss" in script("eval.py", "--adapter", adapter).stdout
    done = script("merge.py", "--adapter", adapter, "--output-dir", "m", "--base", "original", expect=2)
    one_line_error(done, "is stored in nf4", "--base original")
    assert "original" not in script("merge.py", "--adapter", adapter, "--compare").stdout
    script("merge.py", "--adapter", adapter, "--output-dir", "merged", "--dtype", "fp32")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    ours = logits(qlora_min.load(adapter, precision="fp32").base)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
    assert (theirs - ours).norm() < 1e-5 * ours.norm()
    assert script("chat.py", "--model", folder, "--prompt", "Hi", "--max-new-tokens", 2).stdout


def without(part: str):
    return lambda t: [t.pop(k) for k in list(t) if k.endswith(f"up_proj.weight{part}")]


def changed(part: str, change):
    def edit(tensors):
        key = f"model.layers.1.mlp.up_proj.weight{part}"
        tensors[key] = change(tensors[key]).contiguous()

    return edit


def said(**values):
    """Other values in the JSON of the settings."""

    def change(tensor):
        text = json.dumps(json.loads(bytes(tensor.tolist())) | values)
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    return changed(f".{STATE}nf4", change)


DAMAGED = {
    "no scales": without(".absmax"),
    "no levels": without(".quant_map"),
    "half of the scales": changed(".absmax", lambda t: t[: len(t) // 2]),
    "half of the bytes": changed("", lambda t: t[: len(t) // 2]),
    "another type of scales": changed(".absmax", lambda t: t.float()),
    "NaN": changed(".nested_absmax", lambda t: t * float("nan")),
    "other levels": changed(".quant_map", lambda t: t.flip(0)),
    "no JSON": changed(f".{STATE}nf4", lambda t: t[:5]),
    "another shape": said(shape=[64, 128]),
    "a hostile shape": said(shape=[2**62, 2**62]),
    "no blocks": said(blocksize=0),
    "odd blocks": said(blocksize=63),
    "an infinite mean": said(nested_offset=1e999),
    "nothing": said(quant_type=None),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_parts(tmp_path, name):
    folder = quantized_copy(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    DAMAGED[name](tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"4-bit parts are damaged or missing; copy or download the model") as error:
        load_base(str(folder), device=CPU)
    assert "up_proj.weight'" in str(error.value) and str(error.value).isprintable() and len(str(error.value)) < 330


def test_16_bit_weights_whose_config_names_4_bits(tmp_path, script):
    """The weights decide, and what is merged has a config that says what it is."""
    folder = tmp_path / "model"
    shutil.copytree(world.MODEL_DIR, folder)
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    base = load_base(str(folder), device=CPU)
    assert not base.prequantized and base.fingerprint == load_base(str(world.MODEL_DIR), device=CPU).fingerprint
    script("train.py", "--demo", "--model", folder, "--limit", 16, "--max-steps", 1, "--output-dir", "run")
    script("merge.py", "--adapter", "run/adapter", "--output-dir", "merged", "--dtype", "fp32")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


REFUSED = {
    "bitsandbytes int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "awq": {"quant_method": "awq", "bits": 4},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_quantisation_is_refused_by_name_before_weights_are_read(tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(world.MODEL_DIR, folder)
    (folder / "model.safetensors").write_bytes(b"never read")
    edit_config(folder, quantization_config=REFUSED[name])
    for load in (load_base, load_encoder):
        with pytest.raises(ValueError, match=f"weights are quantised by {name}.* give the unquantised model"):
            load(str(folder))


def test_an_adapter_without_a_record_is_put_on_what_its_base_is_stored_in(tmp_path, capsys):
    """As unsloth's are: made on a base in 4 bits, by files that don't say so."""
    _, adapter = save_peft(tmp_path / "adapter")
    edit_adapter(adapter / "adapter_config.json", base_model_name_or_path=str(quantized_copy(tmp_path / "base", "fp4")))
    assert load_adapter(adapter, device=CPU).quantization == "fp4"
    assert "the base's own are taken" in capsys.readouterr().err
    merged = merge_adapter(adapter, tmp_path / "merged", "fp32")
    assert (merged.bits, merged.onto) == ("fp4", "dequantized") and merged.difference < 1e-5
