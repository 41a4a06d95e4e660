"""Merged checkpoints compute what the adapter computed; folders appear whole or not at all; damage is noticed."""

import ast
import json
import os
import re
import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_adapter import save_peft
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import qlora_min.merging
from qlora_min.adapter import WEIGHTS, AdapterConfig, load_adapter, save_adapter
from qlora_min.base import add_lora, load_base
from qlora_min.cli.merge import compare_merges
from qlora_min.data import readers
from qlora_min.demo import world
from qlora_min.fused.select import make_engine
from qlora_min.generate import end_ids, generate
from qlora_min.lora import LoraSpec, lora_layers, lora_parameters
from qlora_min.merging import MergeError, decoder_linears, fold, merge_adapter
from qlora_min.run import checkpoint, datasets
from qlora_min.system import files
from qlora_min.system.bits import dequantized_weight
from qlora_min.system.device import DTYPES
from qlora_min.system.files import write_json, write_jsonl
from qlora_min.system.peft_files import ORIGIN
from qlora_min.system.serving import save_rounded

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_data) -> Path:
    """An adapter with real effect: 20 steps of AdamW on the demo's data at a high learning rate."""
    base = load_base(str(world.MODEL_DIR), "nf4")
    torch.manual_seed(0)
    spec = LoraSpec(8, 16.0, 0.0, TARGETS)
    add_lora(base, spec)
    rows = datasets.encode_dataset("demo", readers.read(str(demo_data[0]), 320), base.encoder, 64).rows
    engine, *_ = make_engine(base, "auto", 64)
    optimizer = torch.optim.AdamW(lora_parameters(base.model).values(), lr=5e-3)
    losses = []
    for start in range(0, 320, 16):
        batch = engine.pack(rows[start : start + 16])
        factor = torch.tensor(1 / batch.n_supervised, device=engine.device)
        loss = engine.loss_and_gradients(batch, factor, torch.zeros((), dtype=torch.int32, device=engine.device))
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        losses.append((loss * factor).item())
    assert losses[-1] < losses[0]
    folder = tmp_path_factory.mktemp("trained")
    config = AdapterConfig(spec, base.name, None, base.fingerprint)
    save_adapter(folder, base.model, config, base.encoder.tokenizer)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """norm(difference) / norm(reference b)"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def some_ids() -> torch.Tensor:
    return torch.randint(0, 290, (4, 24), generator=torch.Generator().manual_seed(3))


# ---------------------------------------------------------------------------------------------------------------------
# Merging
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("onto", ["dequantized", "original"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_file_computes_what_the_adapter_did(trained, tmp_path, dtype, onto):
    out = tmp_path / "merged"
    result = merge_adapter(trained, out, dtype, onto)
    bound = {"fp32": 1e-5, "fp16": 1.5e-3, "bf16": 1e-2}[dtype]
    assert (result.dtype, result.onto, result.bits) == (dtype, onto, "nf4") and result.exact <= 1e-5
    assert 0 <= result.difference <= bound and result.agreement > 0.9
    assert result.loss_before == pytest.approx(result.loss_after, rel=bound) and result.loss_before > 0

    # Our own measurement, on other rows than merge's.
    reference = load_adapter(trained, quantization=None if onto == "dequantized" else "none")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = some_ids()
    assert distance(logits(merged, ids), logits(reference.model, ids)) <= bound
    with torch.no_grad():
        assert distance(merged(ids).logits, logits(reference.model, ids)) <= bound
    without = AutoModelForCausalLM.from_pretrained(world.MODEL_DIR, dtype=torch.float32).eval()
    assert distance(logits(without, ids), logits(reference.model, ids)) > 0.05  # the adapter has an effect
    if onto == "dequantized":
        assert result.from_trained == result.difference
    else:
        assert result.from_trained > 1e-4  # NF4's error

    # An ordinary checkpoint, in its dtype.
    assert merged.config.architectures == ["Qwen2ForCausalLM"]
    stored = load_file(out / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {DTYPES[dtype]}
    assert AutoModelForCausalLM.from_pretrained(out).dtype == DTYPES[dtype]
    config = json.loads((out / "config.json").read_text())
    assert config["use_cache"] is True and "quantization_config" not in config
    assert not any(p.name.startswith("adapter") for p in out.iterdir())


def test_each_way_to_merge_is_evaluated_by_its_own_weights(trained, demo_data):
    encoder = load_base(str(world.MODEL_DIR), "nf4").encoder
    rows = datasets.encode_dataset("demo", readers.read(str(demo_data[1]), 20), encoder, 64).rows
    losses = {name: e.loss for name, e in compare_merges(trained, rows, None, "fp32").items()}
    bare, adapted, merged, again, original = losses.values()
    assert merged == pytest.approx(adapted, rel=1e-5) and adapted < bare
    assert len({round(loss, 5) for loss in (bare, merged, again, original)}) == 4, losses


def test_the_merged_folder_is_complete(trained, tmp_path):
    out = tmp_path / "merged"
    merge_adapter(trained, out, "fp32")
    original = AutoTokenizer.from_pretrained(world.MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == original.chat_template is not None
    assert tokenizer.get_vocab() == original.get_vocab()
    generation = json.loads((out / "generation_config.json").read_text())
    before = json.loads((world.MODEL_DIR / "generation_config.json").read_text())
    assert generation["eos_token_id"] == before["eos_token_id"]

    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert "lm_head.weight" not in load_file(out / "model.safetensors")  # one copy on disk


def test_merged_generates_the_same_tokens(trained, tmp_path, demo_data):
    out = tmp_path / "merged"
    merge_adapter(trained, out, "fp32")
    adapter, merged = load_adapter(trained), load_base(str(out), "none")
    examples = list(readers.read(str(demo_data[1]), 8))
    prompts = [adapter.encoder.prompt(e.messages[:-1]) for e in examples]
    assert prompts == [merged.encoder.prompt(e.messages[:-1]) for e in examples]
    answers = generate(adapter, prompts, 16)
    assert answers == generate(merged, prompts, 16)
    assert any(answers) and end_ids(adapter) == end_ids(merged)
    ids = [
        b.model.generate(torch.tensor([prompts[0]]), max_new_tokens=16, min_new_tokens=16, do_sample=False)
        for b in (adapter, merged)
    ]
    assert torch.equal(*ids)


@pytest.mark.slow
def test_a_tied_head_of_qwen2_0_5b_s_shape(tmp_path):
    """Its widths, heads and vocabulary, with 2 of its 24 layers."""
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=None, eos_token_id=AutoTokenizer.from_pretrained(world.MODEL_DIR).eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), "nf4", "fp32", torch.device("cpu"))
    spec = LoraSpec(16, 32.0, 0.0, TARGETS)
    add_lora(base, spec)
    with torch.no_grad():
        for p in lora_parameters(base.model).values():
            p.normal_(std=0.05)
    (tmp_path / "adapter").mkdir()
    described = AdapterConfig(spec, base.name, None, base.fingerprint)
    save_adapter(tmp_path / "adapter", base.model, described, base.encoder.tokenizer)
    base.model.eval()
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", "fp32")
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    merged = load_base(str(tmp_path / "merged"), "none", "fp32", torch.device("cpu"))
    assert merged.model.get_output_embeddings().weight is merged.model.get_input_embeddings().weight
    prompt = torch.tensor([base.encoder.prompt([{"role": "user", "content": "Which drug?"}])])
    tokens = [
        m.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False) for m in (base.model, merged.model)
    ]
    assert torch.equal(*tokens)


@torch.no_grad()
def scaled(model):
    """An update that is half as large."""
    for layer in lora_layers(model).values():
        layer.lora_B.mul_(0.5)
    fold(model)


@torch.no_grad()
def without_a_layer(model):
    list(lora_layers(model).values())[5].lora_B.zero_()
    fold(model)


@torch.no_grad()
def transposed(model):
    """The update of a square layer, turned."""
    layer = next(layer for layer in lora_layers(model).values() if layer.in_features == layer.out_features)
    update = layer.delta()
    layer.delta = lambda: update.T
    fold(model)


def unfolded(model):
    """A layer that is written as a LoRA layer."""
    name, layer = list(lora_layers(model).items())[5]
    fold(model)
    model.set_submodule(name, layer)


@torch.no_grad()
def spoiled_elsewhere(model):
    model.get_decoder().norm.weight.mul_(1.01)
    fold(model)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("wrong", [scaled, without_a_layer, transposed, unfolded, spoiled_elsewhere])
def test_a_wrong_merge_is_noticed_in_every_dtype(trained, tmp_path, monkeypatch, wrong, dtype):
    monkeypatch.setattr(qlora_min.merging, "fold", wrong)
    for onto in ("dequantized", "original"):
        with pytest.raises(MergeError, match=r"the merge is wrong: .* (logits \S+ of their norm away|still quantised)"):
            merge_adapter(trained, tmp_path / "merged", dtype, onto)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_what_was_written_is_noticed(trained, tmp_path, monkeypatch):
    def spoiled(folder, *args):
        save_rounded(folder, *args)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 1.01
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(qlora_min.merging, "save_rounded", spoiled)
    with pytest.raises(MergeError, match="the merge is wrong: the file computes"):
        merge_adapter(trained, tmp_path / "merged", "bf16")
    assert list(tmp_path.iterdir()) == []


def test_what_a_dtype_costs_is_measured_and_fails_nothing(trained, tmp_path):
    """An update a hundred times as large, beyond what a fixed bound for rounding would allow; exact in fp32."""
    strong = tmp_path / "strong"
    shutil.copytree(trained, strong)
    tensors = {n: t * (10 if "lora_B" in n or "lora_A" in n else 1) for n, t in load_file(strong / WEIGHTS).items()}
    save_file(tensors, strong / WEIGHTS, metadata={"format": "pt"})
    (strong / ORIGIN).write_text(json.dumps(json.loads((strong / ORIGIN).read_text()) | {"weights_sha256": None}))
    costs = {dtype: merge_adapter(strong, tmp_path / dtype, dtype) for dtype in ("fp32", "fp16", "bf16")}
    assert all(r.exact < 1e-4 for r in costs.values())
    assert costs["fp32"].difference < 1e-4 < costs["fp16"].difference < costs["bf16"].difference
    assert costs["bf16"].difference > 1e-2


def test_a_weight_that_the_dtype_cannot_hold_is_named(trained, tmp_path):
    huge = tmp_path / "huge"
    shutil.copytree(trained, huge)
    tensors = {n: t * (1e4 if ".0.self_attn.o_proj." in n else 1) for n, t in load_file(huge / WEIGHTS).items()}
    save_file(tensors, huge / WEIGHTS, metadata={"format": "pt"})
    (huge / ORIGIN).write_text(json.dumps(json.loads((huge / ORIGIN).read_text()) | {"weights_sha256": None}))
    with pytest.raises(
        ValueError, match=r"--dtype fp16: the merged weight 'model.layers.0.self_attn.o_proj.weight' ov"
    ):
        merge_adapter(huge, tmp_path / "merged", "fp16")
    assert not (tmp_path / "merged").exists()
    assert merge_adapter(huge, tmp_path / "merged", "bf16").dtype == "bf16"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", None])
def test_the_default_dtype_is_the_bases_own(trained, tmp_path, dtype):
    model = tmp_path / "model"
    shutil.copytree(world.MODEL_DIR, model)
    config = json.loads((model / "config.json").read_text()) | {"dtype": dtype}
    (model / "config.json").write_text(json.dumps(config))
    result = merge_adapter(trained, tmp_path / "merged", model=str(model))
    expected = {"float16": "fp16", "bfloat16": "bf16"}.get(dtype, "fp32")
    assert result.dtype == expected
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {DTYPES[expected]}


NOTE = "does not say which weights it was trained on: the base's own are taken"


def test_an_adapter_of_peft_is_merged_onto_what_it_was_trained_on(script, tmp_path):
    """PEFT's files don't say; --quantization or --base does, else the base's own weights are taken, with a note."""
    theirs, _ = save_peft(tmp_path / "theirs", r=4, lora_alpha=16, target_modules=list(TARGETS))

    def merge(name: str, *options: str, expect: int = 0):
        return script(
            "merge.py", "--adapter", "theirs", "--output-dir", name, "--dtype", "fp32", *options, expect=expect
        )

    for options, onto, noted in (
        ([], "original", True), (["--base", "original"], "original", False),
        (["--quantization", "none"], "original", False), (["--base", "dequantized"], "dequantised NF4", False),
        (["--quantization", "fp4"], "dequantised FP4", False),
    ):  # fmt: skip
        done = merge("-".join(["out", *options]), *options)
        assert f"(fp32, onto the {onto} weights)" in done.stdout
        assert (NOTE in done.stderr) == noted and "as trained" not in done.stdout
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert distance(logits(merged, some_ids()), logits(theirs, some_ids())) < 1e-5
    assert "as trained, on the NF4 base" in merge("both", "--base", "original", "--quantization", "nf4").stdout
    card = (tmp_path / "both" / "README.md").read_text()
    assert "onto its original weights, in fp32" in card and "trained on the base in 4-bit NF4: from there" in card


def test_our_record_is_not_overruled(trained, script):
    options = ["merge.py", "--adapter", trained, "--output-dir", "merged", "--quantization"]
    assert (
        f"--quantization none: adapter '{trained}' was trained on nf4; leave it"
        in script(*options, "none", expect=2).stderr
    )
    done = script(*options, "nf4")
    assert "what fp16 costs, read back: logits" in done.stdout and "the merge is right: computed in fp32" in done.stdout


def test_not_a_number_is_above_any_bound(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(qlora_min.merging, "distance", lambda a, b: float("nan"))
    with pytest.raises(MergeError):
        merge_adapter(trained, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_never_overwritten(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me too")
    for name in ("full", "file"):
        with pytest.raises(ValueError, match=f"--output-dir {tmp_path / name}: exists and is not an empty directory"):
            merge_adapter(trained, tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep me"
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert (tmp_path / "file").read_text() == "keep me too"
    (tmp_path / "empty").mkdir()
    merge_adapter(trained, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_fold_adds_the_update_to_the_weight_that_computes():
    base = load_base(str(world.MODEL_DIR), "nf4")
    add_lora(base, LoraSpec(4, 6.0, 0.0, ("q_proj",)))
    with torch.no_grad():
        for p in lora_parameters(base.model).values():
            p.normal_()
    expected = {}
    for name, module in base.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            expected[name.removesuffix(".linear")] = dequantized_weight(module).clone()
    for name, layer in lora_layers(base.model).items():
        expected[name] += (layer.lora_B @ layer.lora_A).detach() * (6.0 / 4)
    biases = {n.replace(".linear.", "."): p.clone() for n, p in base.model.named_parameters() if n.endswith("bias")}
    fold(base.model)
    linears = {n: m for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert linears.keys() == expected.keys() and {type(m) for m in linears.values()} == {torch.nn.Linear}
    assert all(torch.equal(m.weight, expected[n]) for n, m in linears.items())
    assert biases.keys() == {f"{n}.bias" for n, m in linears.items() if m.bias is not None}
    assert all(torch.equal(b, linears[n.removesuffix(".bias")].bias) for n, b in biases.items())


def test_a_models_own_layer_of_any_name_is_folded():
    """Zamba's decoder layers have a linear layer called `linear`, as LoRALinear calls the one that it wraps."""
    base = load_base(str(world.MODEL_DIR), "none")
    add_lora(base, LoraSpec(4, 6.0, 0.0, ("q_proj",)))
    mlp = base.model.get_decoder().layers[0].mlp
    mlp.linear = torch.nn.Linear(64, 64, dtype=torch.float16)
    names = [name for name, _ in decoder_linears(base.model)]
    assert "model.layers.0.mlp.linear" in names and "model.layers.0.self_attn.q_proj" in names
    assert not any("q_proj." in name for name in names)
    fold(base.model)
    assert mlp.linear.weight.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# Atomic folders
# ---------------------------------------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_atomic_folder_appears_whole(tmp_path):
    out = tmp_path / "a" / "b"
    with files.atomic_folder(out) as new:
        assert new.parent == out.parent and not out.exists()
        (new / "deep").mkdir()
        (new / "deep" / "x").write_text("1")
        assert not out.exists()
    assert everything(tmp_path) == {"a/b/deep/x": "1"}
    with files.atomic_folder(out) as new:
        (new / "y").write_text("2")
        assert everything(out) == {"deep/x": "1"}
    assert everything(tmp_path) == {"a/b/y": "2"}
    assert [p.name for p in out.parent.iterdir()] == ["b"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_saved_files_have_the_mode_of_the_umask(tmp_path, umask, mode):
    """safetensors itself makes files that only their owner can read."""
    former = os.umask(umask)
    try:
        with files.atomic_folder(tmp_path / "out") as new:
            (new / "inner").mkdir()
            (new / "inner" / "config.json").write_text("{}")
            save_file({"a": torch.zeros(1)}, new / "model.safetensors")
    finally:
        os.umask(former)
    saved = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert [p.stat().st_mode & 0o777 for p in saved] == [mode, mode]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("former", [True, False])
def test_atomic_folder_leaves_nothing_behind_after_an_error(tmp_path, former, error):
    out = tmp_path / "out"
    if former:
        out.mkdir()
        (out / "x").write_text("former")
    with pytest.raises(error), files.atomic_folder(out) as new:
        (new / "x").write_text("half")
        raise error
    assert everything(tmp_path) == ({"out/x": "former"} if former else {})
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if former else [])


def test_atomic_folder_keeps_the_former_content_when_the_rename_fails(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").write_text("former")
    rename = Path.rename

    def full_disk(self, target):
        if ".new-" in self.name:
            raise OSError("No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="No space"), files.atomic_folder(out) as new:
        (new / "x").write_text("latter")
    assert everything(tmp_path) == {"out/x": "former"}


def test_files_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    write_jsonl(tmp_path / "b.jsonl", [{"é": 1}, 2])
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text("utf-8").splitlines()] == [{"é": 1}, 2]
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.jsonl"]


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------

leaves = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text()
    | st.builds(
        lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
        st.sampled_from([(), (0,), (3,), (2, 3)]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool]),
        st.integers(0, 99),
    )
)  # fmt: skip
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("aé. ", max_size=3), inner, max_size=3)
        | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(deadline=None)
@given(state=states)
def test_flatten_and_back(state):
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(checkpoint.flatten(state, tensors)))
    assert same(checkpoint.unflatten(plain, tensors), state)


@pytest.mark.parametrize(
    "state",
    [{"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}, {0: torch.ones(1), "0": torch.zeros(1)}],
    ids=["slash", "number"],
)
def test_two_keys_do_not_share_a_tensors_name(state):
    tensors: dict[str, torch.Tensor] = {}
    plain = json.loads(json.dumps(checkpoint.flatten(state, tensors)))
    assert same(checkpoint.unflatten(plain, tensors), state)


def some_state(step: int = 0) -> dict:
    shared = torch.arange(6.0)
    return {
        "progress": {"step": step, "best": None, "losses": [0.1, 1 / 3]},
        "adapter": {"x": torch.randn(4, 5), "view": shared[:3], "whole": shared, "transposed": torch.randn(3, 2).T},
        "stepper": {
            "optimizer": {"state": {0: {"m": torch.zeros(3, dtype=torch.uint8)}, 1: {}}, "betas": (0.9, 0.999)}
        },
    }


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = some_state()
    folder = checkpoint.save_checkpoint(tmp_path, 7, state, keep=set())
    assert folder == tmp_path / "checkpoints" / "step-7"
    assert same(checkpoint.load_checkpoint(folder), state)
    step, newest = checkpoint.newest_checkpoint(tmp_path)
    assert step == 7 and same(newest, state)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for step in (0, 5, 10, 15, 100):
        checkpoint.save_checkpoint(tmp_path, step, {"step": step}, keep={5})
    assert checkpoint.checkpoint_steps(tmp_path) == [5, 15, 100]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-100", "step-15", "step-5"]
    assert checkpoint.checkpoint_steps(tmp_path / "nowhere") == []
    assert checkpoint.newest_checkpoint(tmp_path / "nowhere") is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


DAMAGE = [truncate, empty, flip, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.TENSORS, checkpoint.MANIFEST])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, capsys, name, damage):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, some_state(step), keep=set())
    newest = tmp_path / "checkpoints" / "step-2"
    damage(newest / name)
    with pytest.raises(ValueError, match=r"step-2|Expecting|delimiter|column"):
        checkpoint.load_checkpoint(newest)
    step, state = checkpoint.newest_checkpoint(tmp_path)
    assert step == 1 and state["progress"]["step"] == 1
    assert "note: skipped a damaged checkpoint" in capsys.readouterr().err
    damage(tmp_path / "checkpoints" / "step-1" / name)
    assert checkpoint.newest_checkpoint(tmp_path) is None


def test_a_damaged_manifest_is_named(tmp_path):
    folder = checkpoint.save_checkpoint(tmp_path, 3, {}, keep=set())
    empty(folder / checkpoint.MANIFEST)
    with pytest.raises(ValueError, match="step-3"):
        checkpoint.load_checkpoint(folder)


def test_a_folder_half_written_is_no_checkpoint(tmp_path):
    checkpoint.save_checkpoint(tmp_path, 3, {}, keep=set())
    for name in (".step-9.new-77", "step-", "step-9x", ".step-2.old"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert checkpoint.checkpoint_steps(tmp_path) == [3]


def test_metrics(tmp_path):
    metrics = checkpoint.Metrics(tmp_path)
    assert checkpoint.read_metrics(tmp_path) == [] and metrics.size == 0
    metrics.write("train", step=1, loss=0.5)
    assert checkpoint.read_metrics(tmp_path) == []  # it waits
    metrics.flush()
    size = metrics.size
    metrics.write("eval", step=1)
    metrics.flush()
    assert [e["event"] for e in checkpoint.read_metrics(tmp_path)] == ["train", "eval"]
    assert metrics.size == metrics.path.stat().st_size > size
    checkpoint.Metrics(tmp_path).cut(size)  # another process
    assert checkpoint.read_metrics(tmp_path) == [{"event": "train", "step": 1, "loss": 0.5}]
    with metrics.path.open("a") as f:
        f.write('{"event": "ev')  # a crash
    assert len(checkpoint.read_metrics(tmp_path)) == 1
    assert not checkpoint.is_finished(tmp_path)


def test_a_checkpoint_after_a_fall_back_is_not_pruned(tmp_path):
    """Newer checkpoints that were damaged don't count as the last two."""
    for step in (5, 10, 15):
        checkpoint.save_checkpoint(tmp_path, step, some_state(step), keep={5})
    for step in (10, 15):
        (tmp_path / "checkpoints" / f"step-{step}" / checkpoint.TENSORS).write_bytes(b"cut short")
    assert checkpoint.newest_checkpoint(tmp_path)[0] == 5
    checkpoint.save_checkpoint(tmp_path, 7, some_state(7), keep={5})
    assert checkpoint.newest_checkpoint(tmp_path)[0] == 7


def test_clean_removes_what_a_kill_left_and_puts_the_adapter_back(tmp_path):
    (tmp_path / "checkpoints" / ".step-9.new-77").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-5").mkdir()
    (tmp_path / ".config.json.new").write_text("{")
    (tmp_path / ".adapter.old-77").mkdir()
    (tmp_path / ".adapter.old-77" / "x").write_text("the best so far")
    checkpoint.clean(tmp_path)
    assert everything(tmp_path) == {"adapter/x": "the best so far"}
    assert (tmp_path / "checkpoints" / "step-5").is_dir()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_the_newest_unfinished_run(tmp_path):
    with pytest.raises(ValueError, match="--resume: no unfinished run under"):
        checkpoint.newest_unfinished(tmp_path)
    for age, (name, finished) in enumerate({"old": False, "newer": False, "newest": True}.items()):
        run = tmp_path / name
        run.mkdir()
        write_json(run / "config.json", {part: {"name": name} for part in checkpoint.RECORDED})
        os.utime(run / "config.json", (1e9 + age, 1e9 + age))
        if finished:
            metrics = checkpoint.Metrics(run)
            metrics.write("end")
            metrics.flush()
    assert checkpoint.newest_unfinished(tmp_path).name == "newer"
    assert checkpoint.read_record(tmp_path / "old")["options"] == {"name": "old"}
    with pytest.raises(ValueError, match="holds no run"):
        checkpoint.read_record(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading weights runs no code
# ---------------------------------------------------------------------------------------------------------------------

SOURCES = sorted([*(ROOT / "qlora_min").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
FORBIDDEN_CALLS = {"torch.load", "torch.save", "eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads",
                   "np.load", "np.save", "numpy.load", "numpy.save"}  # fmt: skip
FORBIDDEN_IMPORTS = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "importlib", "runpy",
                     "peft", "trl", "accelerate"}  # fmt: skip


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(code: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and dotted(node.func) in FORBIDDEN_CALLS:
            found.append(f"{node.lineno}: {dotted(node.func)}")
        # trust_remote_code=False is said aloud: left out, transformers asks on the terminal
        said = isinstance(node, ast.keyword) and ast.unparse(node) != "trust_remote_code=False"
        if said and node.arg in ("trust_remote_code", "allow_pickle", "weights_only"):
            found.append(f"{node.value.lineno}: {node.arg}")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [f"{node.lineno}: {m}" for m in modules if m.split(".")[0] in FORBIDDEN_IMPORTS]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_and_no_remote_code(path):
    code = path.read_text(encoding="utf-8")
    peers = {"bench_peers.py": {"peft", "trl"}}.get(path.name, set())  # which it measures, in processes of their own
    assert [o for o in offences(code) if o.rpartition(": ")[2] not in peers] == []
    assert not re.search(r"trust_remote_code(?!=False\b)|torch\.load\(|\.bin\b.*allow_patterns", code)


def test_the_reader_of_the_code_finds_what_it_looks_for():
    code = "import torch, pickle\nfrom peft import x\ntorch.load('x')\nf(trust_remote_code=True)\nmodel.eval()\n"
    assert offences(code) == ["1: pickle", "2: peft", "3: torch.load", "4: trust_remote_code"]
    assert offences("f(trust_remote_code=False)\nf(trust_remote_code=x)") == ["2: trust_remote_code"]
    assert offences("import importlib.util\n__import__(name)") == ["1: importlib.util", "2: __import__"]
    assert len(SOURCES) > 60
