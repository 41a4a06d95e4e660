"""Adapters on disk: PEFT reads ours, we read PEFT's, and what does not fit is refused in one message."""

import dataclasses
import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_min
from qlora_min.adapter import PEFT_PREFIX, WEIGHTS, AdapterConfig, load_adapter, load_weights, save_adapter
from qlora_min.base import Base, add_lora, load_base
from qlora_min.batches import pack
from qlora_min.data.rows import Row
from qlora_min.demo import world
from qlora_min.fused.select import make_engine
from qlora_min.lora import LoraSpec, lora_disabled, lora_parameters
from qlora_min.run.datasets import evaluation_data
from qlora_min.system.peft_files import ADAPTER, ALLOWED, CONFIG, HARMLESS, ORIGIN

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
VARIANTS = [(16, 32.0, ATTENTION), (1, 1.0, ("q_proj",)), (8, 12.5, ("self_attn.v_proj", "down_proj")),
            (24, 16.0, ATTENTION + MLP)]  # fmt: skip
IDS = torch.arange(5, 29).view(2, 12)


def plain_model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(world.MODEL_DIR, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def by_engine(base: Base, name: str) -> torch.Tensor:
    """As `logits`, of packed rows by an engine."""
    engine, made, _ = make_engine(base, name, IDS.shape[1])
    assert made == name
    hidden = engine.hidden_states(pack([Row(ids.int(), torch.ones(len(ids), dtype=torch.bool), "") for ids in IDS]))
    return engine.logits(hidden).unflatten(0, IDS.shape)


@torch.no_grad()
def give_effect(parameters, seed: int = 0) -> None:
    """Random A and B, large enough that the adapter changes the logits a lot."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.copy_(torch.randn(p.shape, generator=generator) * 0.1)


def adapted(
    rank: int, alpha: float, targets: tuple[str, ...], quantization: str = "none", model: str = str(world.MODEL_DIR)
) -> tuple[Base, AdapterConfig]:
    base = load_base(model, quantization)
    spec = LoraSpec(rank, alpha, 0.1, targets)
    add_lora(base, spec)
    base.model.eval()
    give_effect(lora_parameters(base.model).values())
    return base, AdapterConfig(spec, base.name, base.revision, base.fingerprint, quantization)


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Base]:
    """A folder with our adapter of rank 4 on q_proj and v_proj of the unquantised base, and the model with it."""
    base, config = adapted(4, 8.0, ("q_proj", "v_proj"))
    save_adapter(tmp_path, base.model, config, base.encoder.tokenizer)
    return tmp_path, base


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---------------------------------------------------------------------------------------------------------------------
# Both ways
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, alpha, targets", VARIANTS)
def test_ours_into_peft(tmp_path, rank, alpha, targets):
    base, config = adapted(rank, alpha, targets)
    save_adapter(tmp_path, base.model, config, base.encoder.tokenizer)
    theirs = peft.PeftModel.from_pretrained(plain_model(), tmp_path).eval()

    ours = lora_parameters(base.model)
    read = {
        n.removeprefix(PEFT_PREFIX).removesuffix(".default.weight"): p
        for n, p in theirs.named_parameters() if ".lora_" in n
    }  # fmt: skip
    assert ours.keys() == read.keys() and len(ours) == 2 * len(
        [n for n, m in plain_model().named_modules() if any(n.endswith("." + t) for t in targets)]
    )
    for name, p in ours.items():
        assert p.dtype == read[name].dtype == torch.float32
        assert torch.equal(p, read[name]), name

    mine, base_alone, wanted = logits(base.model), logits(plain_model()), logits(theirs)
    assert (mine - wanted).abs().max() <= 1e-5
    for name in ("modules", "fused"):
        assert (by_engine(base, name) - wanted).norm() <= 1e-6 * wanted.norm()
    assert (mine - base_alone).abs().max() > 1e-3  # the adapter does something


def save_peft(folder: Path, **options) -> tuple[peft.PeftModel, Path]:
    """An adapter made and saved by PEFT."""
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **options}
    model = peft.get_peft_model(plain_model(), peft.LoraConfig(**options)).eval()
    give_effect([p for n, p in model.named_parameters() if ".lora_" in n])
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("rank, alpha, targets", VARIANTS)
def test_peft_into_ours(tmp_path, rank, alpha, targets):
    theirs, _ = save_peft(tmp_path, r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.1)
    base = load_adapter(tmp_path, quantization="none")
    assert not base.model.training
    stored = load_file(tmp_path / WEIGHTS)
    ours = lora_parameters(base.model)
    assert {f"{PEFT_PREFIX}{n}.weight" for n in ours} == stored.keys()
    assert all(torch.equal(p, stored[f"{PEFT_PREFIX}{n}.weight"]) for n, p in ours.items())
    wanted = logits(theirs)
    assert (logits(base.model) - wanted).abs().max() <= 1e-5
    for name in ("modules", "fused"):
        assert (by_engine(base, name) - wanted).norm() <= 1e-6 * wanted.norm()
    layer = next(m for m in base.model.modules() if hasattr(m, "lora_A"))
    assert (layer.spec.rank, layer.spec.alpha, layer.spec.scaling, layer.dropout.p) == (rank, alpha, alpha / rank, 0.1)


SEVERAL = ATTENTION + MLP
PEFTS_OWN = {  # what PEFT can do besides one rank and alpha everywhere
    "rslora": {"r": 6, "lora_alpha": 16, "use_rslora": True, "target_modules": list(ATTENTION)},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "target_modules": list(SEVERAL),
                     "rank_pattern": {"q_proj": 7, r"layers\.[12]\..*k_proj": 64, "model.layers.3.mlp.up_proj": 2}},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
                      "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 30, "v_proj": 2.5},
                      "rank_pattern": {"v_proj": 3}},
    "layers_to_transform": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "patterns of layers": {"target_modules": ["o_proj"], "layers_to_transform": [3], "layers_pattern": ["h", "layers"]},
    "whole names": {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"], "layers_to_transform": [2]},
    "all-linear": {"target_modules": "all-linear"},
}  # fmt: skip


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_what_peft_can_do_besides_loads_and_computes_the_same(tmp_path, name):
    """Both engines, forwards and backwards; and saved by us, PEFT computes it again."""
    theirs, folder = save_peft(tmp_path / "theirs", lora_dropout=0.0, **PEFTS_OWN[name])
    base = load_adapter(folder, quantization="none")
    wanted, stored = logits(theirs), load_file(folder / WEIGHTS)
    assert {f"{PEFT_PREFIX}{n}.weight" for n in lora_parameters(base.model)} == stored.keys()
    assert (wanted - logits(plain_model())).abs().max() > 1e-3
    theirs.get_base_model().set_attn_implementation("eager")
    theirs.requires_grad_(False)
    params = {n.replace(".default", ""): p.requires_grad_() for n, p in theirs.named_parameters() if ".lora_" in n}
    loss = torch.nn.functional.cross_entropy(theirs(IDS).logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    loss.backward()
    rows = [Row(ids.int(), torch.ones(len(ids), dtype=torch.bool), "") for ids in IDS]
    for engine_name in ("modules", "fused"):
        assert (by_engine(base, engine_name) - wanted).norm() <= 1e-6 * wanted.norm()
        engine, *_ = make_engine(base, engine_name, IDS.shape[1])
        engine.loss_and_gradients(pack(rows), torch.tensor(1 / IDS[:, 1:].numel()), torch.tensor(7, dtype=torch.int32))
        for key, p in lora_parameters(base.model).items():
            expected = params[f"{PEFT_PREFIX}{key}.weight"].grad
            assert (p.grad - expected).norm() <= 1e-4 * expected.norm(), (engine_name, key)

    (tmp_path / "ours").mkdir()
    config = AdapterConfig.read(folder)
    save_adapter(tmp_path / "ours", base.model, config, base.encoder.tokenizer)
    assert AdapterConfig.read(tmp_path / "ours").lora == config.lora
    again = peft.PeftModel.from_pretrained(plain_model(), tmp_path / "ours").eval()
    assert (logits(again) - wanted).norm() <= 1e-6 * wanted.norm()


def test_what_the_weights_do_not_show_can_not_be_edited(tmp_path):
    _, folder = save_peft(tmp_path / "theirs", **PEFTS_OWN["alpha_pattern"])
    base = load_adapter(folder, quantization="none")
    (tmp_path / "ours").mkdir()
    for field, value in (("use_rslora", False), ("alpha_pattern", {"v_proj": 2})):
        save_adapter(tmp_path / "ours", base.model, AdapterConfig.read(folder), base.encoder.tokenizer)
        edit(tmp_path / "ours" / CONFIG, **{field: value})
        with pytest.raises(ValueError, match=f"says {field} .*, but the weights were trained with .*; put it back"):
            AdapterConfig.read(tmp_path / "ours")


def test_an_adapter_without_a_task_type(tmp_path):
    """PEFT writes auto_mapping then; unsloth's adapters have it too."""
    model = peft.get_peft_model(plain_model(), peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    give_effect([p for n, p in model.named_parameters() if ".lora_" in n])
    model.save_pretrained(tmp_path)
    edit(tmp_path / CONFIG, auto_mapping={"base_model_class": "Qwen2ForCausalLM", "parent_library": "evil.py"})
    assert (logits(load_adapter(tmp_path, quantization="none").model) - logits(model)).abs().max() <= 1e-5


def test_weights_in_a_pickle_are_named_with_the_way_out(saved):
    folder, _ = saved
    (folder / "adapter_model.bin").write_bytes(b"evil")
    load_adapter(folder)  # beside safetensors it is of no account
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"its weights are in adapter_model.bin, a pickle, .* never read; save it as"):
        load_adapter(folder)


@pytest.mark.parametrize(("given", "bits"), [(None, "none"), ("none", "none"), ("nf4", "nf4")])
def test_without_our_record_the_quantization_is_not_assumed(tmp_path, capsys, given, bits):
    _, folder = save_peft(tmp_path)
    assert AdapterConfig.read(folder).quantization is None
    base = load_adapter(folder, quantization=given)
    packed = any(p.dtype == torch.uint8 for p in base.model.parameters())
    assert packed == (bits == "nf4")
    err = capsys.readouterr().err
    told = f"note: adapter '{folder}' does not say which weights it was trained on: the base's own are taken"
    assert err.startswith(told) and err.count("\n") == 1 if given is None else not err


def test_the_commands_ask_for_it(tmp_path, script, demo_data):
    save_peft(tmp_path / "theirs")
    losses = {}
    for options in ([], ["--quantization", "none"], ["--quantization", "nf4"]):
        done = script("eval.py", "--adapter", "theirs", "--dataset", demo_data[1], "--limit", 4, "--json", *options)
        losses[options[1] if options else None] = json.loads(done.stdout)["with_adapter"]["loss"]
        assert (done.stderr.count("does not say which weights") == 1) == (not options)
    assert losses[None] == losses["none"] != losses["nf4"]
    script("chat.py", "--adapter", "theirs", "--quantization", "nf4", "--prompt", "Which drug?", "--max-new-tokens", 2)
    assert qlora_min.evaluate(tmp_path / "theirs", demo_data[1], limit=4, quantization="nf4").loss == losses["nf4"]


def test_with_our_record_it_is_what_that_says(saved, capsys):
    folder, _ = saved
    edit(folder / ORIGIN, quantization="nf4")
    assert any(p.dtype == torch.uint8 for p in load_adapter(folder).model.parameters())
    assert not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Its tokenizer and template
# ---------------------------------------------------------------------------------------------------------------------


def test_an_adapters_own_tokenizer_and_template_are_used(saved, tmp_path_factory, demo_data):
    folder, base = saved
    own = AutoTokenizer.from_pretrained(world.MODEL_DIR)
    own.chat_template = own.chat_template.replace("<|im_start|>", "<|im_start|>role ")
    own.save_pretrained(folder)
    messages = [{"role": "user", "content": "Which drug?"}]
    loaded = load_adapter(folder)
    assert loaded.encoder.tokenizer.decode(loaded.encoder.prompt(messages)).startswith("<|im_start|>role user")
    parts = evaluation_data(folder, None, [str(demo_data[1])], 2)
    assert "role user" in own.decode(parts[0].rows[0].input_ids.tolist())
    own.chat_template = None  # a tokenizer without a template is the base's business
    for path in folder.glob("chat_template*"):
        path.unlink()
    own.save_pretrained(folder)
    assert load_adapter(folder).encoder.prompt(messages) == base.encoder.prompt(messages)
    (folder / "tokenizer.json").write_text("{")
    edit(folder / "tokenizer_config.json", chat_template="{{ messages }}")
    with pytest.raises(ValueError, match=f"adapter '{folder}': no usable tokenizer"):
        load_adapter(folder)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_ours_into_ours(tmp_path, quantization):
    base, config = adapted(4, 6.0, ATTENTION, quantization)
    save_adapter(tmp_path, base.model, config, base.encoder.tokenizer)
    assert AdapterConfig.read(tmp_path) == config
    again = load_adapter(tmp_path)
    for (name, a), (other, b) in zip(lora_parameters(base.model).items(), lora_parameters(again.model).items()):
        assert name == other and torch.equal(a, b)
    assert torch.equal(logits(base.model), logits(again.model))


def test_tokenizer_and_chat_template_are_saved(saved):
    folder, base = saved
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == base.encoder.tokenizer.chat_template
    text = "Which drug? <|im_end|>"
    assert tokenizer(text)["input_ids"] == base.encoder.tokenizer(text)["input_ids"]


def test_the_files_say_what_the_adapter_is(saved):
    folder, base = saved
    config = json.loads((folder / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == str(world.MODEL_DIR)
    origin = json.loads((folder / ORIGIN).read_text())
    assert (origin["fingerprint"], origin["quantization"]) == (base.fingerprint, "none")
    assert all(t.dtype == torch.float32 for t in load_file(folder / WEIGHTS).values())


# ---------------------------------------------------------------------------------------------------------------------
# Weights that do not fit
# ---------------------------------------------------------------------------------------------------------------------


def test_everything_that_does_not_fit_is_listed_at_once(saved):
    folder, base = saved
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:-1].clone()
    tensors[names[2]] = tensors[names[2]].T.contiguous()
    tensors[names[3]][0, 0] = float("nan")
    tensors[names[4]][1, 0] = float("inf")
    tensors[PEFT_PREFIX + "model.layers.0.self_attn.k_proj.lora_A.weight"] = torch.ones(4, 64)
    tensors["stray"] = torch.ones(1)
    save_file(tensors, folder / WEIGHTS)
    before = {n: p.clone() for n, p in lora_parameters(base.model).items()}
    with pytest.raises(ValueError) as error:
        load_weights(folder, base.model)
    message, short = str(error.value), [n.removeprefix(PEFT_PREFIX).removesuffix(".weight") for n in names]
    assert message.startswith(f"adapter '{folder}' does not fit the model: ") and "\n" not in message
    shape = tuple(before[short[1]].shape)
    for part in (
        f"missing {short[0]}",
        f"{short[1]} of shape {(shape[0] - 1, shape[1])}, expected {shape}",
        f"{short[2]} of shape {tuple(before[short[2]].T.shape)}, expected {tuple(before[short[2]].shape)}",
        f"{short[3]} holds NaN or infinite values",
        f"{short[4]} holds NaN or infinite values",
        "unexpected model.layers.0.self_attn.k_proj.lora_A",
        "unexpected stray",
    ):
        assert part in message
    assert message.count(";") == 6 and short[5] not in message
    assert all(torch.equal(p, before[n]) for n, p in lora_parameters(base.model).items())  # nothing half loaded


def test_another_ranks_tensors(saved):
    folder, _ = saved
    edit(folder / CONFIG, r=8)
    with pytest.raises(ValueError, match=r"q_proj.lora_A of shape \(4, 64\), expected \(8, 64\)"):
        load_adapter(folder)


def test_unreadable_weights(saved):
    folder, base = saved
    content = (folder / WEIGHTS).read_bytes()
    for broken in (content[: len(content) // 2], b"", b"{}" * 40):
        (folder / WEIGHTS).write_bytes(broken)
        with pytest.raises(ValueError, match=f"{WEIGHTS}: damaged or missing weights"):
            load_weights(folder, base.model)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"{WEIGHTS}: damaged or missing weights"):
        load_weights(folder, base.model)


def test_another_base_is_refused(saved, tmp_path_factory):
    folder, base = saved
    other = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(world.MODEL_DIR, other)
    tensors = load_file(other / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm] = tensors[norm] * 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        load_adapter(folder, model=str(other))
    for part in ("another base", str(world.MODEL_DIR), base.fingerprint[:12], str(other), "--model"):
        assert part in str(error.value)
    (folder / ORIGIN).unlink()  # an adapter of another tool has no fingerprint to compare
    assert load_adapter(folder, model=str(other), quantization="none")


def test_the_same_base_elsewhere_is_accepted(saved, tmp_path_factory):
    folder, base = saved
    copy = tmp_path_factory.mktemp("copy") / "model"
    shutil.copytree(world.MODEL_DIR, copy)
    assert torch.equal(logits(load_adapter(folder, model=str(copy)).model), logits(base.model))
    assert AdapterConfig.read(folder).fingerprint == base.fingerprint
    edit(folder / ORIGIN, fingerprint="0" * 64)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(folder, model=str(copy))


def test_a_target_that_the_base_does_not_have(saved):
    folder, _ = saved
    edit(folder / CONFIG, target_modules=["q_proj", "qkv_proj"])
    with pytest.raises(ValueError, match=r"'qkv_proj' matches no linear layer .* down_proj, gate_proj, k_proj"):
        load_adapter(folder)


# ---------------------------------------------------------------------------------------------------------------------
# adapter_config.json
# ---------------------------------------------------------------------------------------------------------------------

REFUSED = {  # what changes the adapter's function, or where it applies
    "use_dora": True,
    "use_qalora": True,
    "lora_bias": True,
    "fan_in_fan_out": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "exclude_modules": ["v_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.gate_up_proj"],
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 3},
    "velora_config": {"rank": 2},
    "monteclora_config": {"a": 1},
    "kasa_config": {"a": 1},
    "use_bdlora": {"a": 1},
    "megatron_config": {"a": 1},
    "ensure_weight_tying": True,
    "a_field_of_the_future": "on",
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_changes_what_is_computed_is_refused_by_name(saved, field):
    folder, _ = saved
    edit(folder / CONFIG, **{field: REFUSED[field]})
    with pytest.raises(ValueError, match=rf"{CONFIG} asks for .*{field}=.*, which qlora_min does not implement"):
        AdapterConfig.read(folder)
    with pytest.raises(ValueError, match=field):
        load_adapter(folder)


def test_lora_only_bias_is_refused_and_several_fields_are_named_together(saved):
    folder, _ = saved
    edit(folder / CONFIG, bias="lora_only", use_dora=True)
    with pytest.raises(ValueError, match="bias='lora_only', use_dora=True"):
        AdapterConfig.read(folder)


READ = ALLOWED.keys() | {theirs for theirs, *_ in ADAPTER.values()}  # fields that we read


def installed_fields() -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(peft.LoraConfig)}


def test_every_field_of_the_installed_peft_is_known_here():
    """READ and HARMLESS name no field by mistake, and what neither names is refused when set to anything unknown."""
    read_or_harmless = READ | HARMLESS
    assert not read_or_harmless & REFUSED.keys()
    old = {"megatron_core", "auto_mapping", "runtime_config", "peft_version"}  # fields that versions add and remove
    assert read_or_harmless - old <= installed_fields().keys()


@pytest.mark.parametrize("field", sorted(installed_fields().keys() - READ - HARMLESS))
def test_a_field_that_is_neither_read_nor_harmless_is_refused(saved, field):
    folder, _ = saved
    edit(folder / CONFIG, **{field: "something"})
    with pytest.raises(ValueError, match=field):
        AdapterConfig.read(folder)


def test_a_default_config_of_the_installed_peft_loads(tmp_path):
    _, folder = save_peft(tmp_path)
    written = json.loads((folder / CONFIG).read_text())
    assert written["r"] == 4
    assert AdapterConfig.read(folder).lora.targets == ("q_proj",)


INIT_ONLY = [True, False, "gaussian", "orthogonal"]  # how A and B begin: nothing that an adapter computes later
CHANGES_BASE = ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]  # these take a part out of W


@pytest.mark.parametrize("init", INIT_ONLY)
def test_how_the_adapter_was_initialised_does_not_matter(saved, init):
    folder, base = saved
    edit(folder / CONFIG, init_lora_weights=init)
    assert torch.equal(logits(load_adapter(folder).model), logits(base.model))


@pytest.mark.parametrize("init", CHANGES_BASE)
def test_an_initialisation_that_changes_the_base_is_refused(saved, init):
    folder, _ = saved
    edit(folder / CONFIG, init_lora_weights=init)
    with pytest.raises(ValueError, match="init_lora_weights"):
        AdapterConfig.read(folder)


def test_peft_itself_computes_another_function_with_pissa(tmp_path):
    """Why those are refused: the same tensors on the untouched W are not what PEFT computes."""
    theirs, folder = save_peft(tmp_path, init_lora_weights="pissa")
    edit(folder / CONFIG, init_lora_weights=True)
    ignored = peft.PeftModel.from_pretrained(plain_model(), folder).eval()
    with torch.no_grad():
        assert (theirs(IDS).logits - ignored(IDS).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    "values, message",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3', expected 'LORA'"),
        ({"target_modules": ".*q_proj"}, r"target_modules '\.\*q_proj', expected a list of .*names .*or 'all-linear'"),
        ({"rank_pattern": {"(a*)*b": 4}}, r"rank_pattern .*, expected a mapping of names of layers, or of simple reg"),
        ({"target_modules": []}, r"target_modules \[\], expected a list of .*names"),
        ({"target_modules": None}, "target_modules None, expected a list of .*names"),
        ({"target_modules": [1]}, r"target_modules \[1\], expected a list of .*names"),
        ({"r": None}, "r None, expected an integer of at least 1"),
        ({"r": "many"}, "r 'many', expected an integer of at least 1"),
        ({"lora_alpha": [8]}, r"lora_alpha \[8\], expected a number above 0"),
    ],
)
def test_a_malformed_config(saved, values, message):
    folder, _ = saved
    edit(folder / CONFIG, **values)
    with pytest.raises(ValueError, match=rf"adapter '{folder}': .*{message}"):
        AdapterConfig.read(folder)


def test_a_config_that_is_no_config(saved):
    folder, _ = saved
    path = folder / CONFIG
    for content, message in (("{", "not readable JSON"), ("[]", "a JSON list, expected an object")):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path}: {message}"):
            AdapterConfig.read(folder)
    path.write_text('{"peft_type": "LORA", "target_modules": ["q_proj"], "base_model_name_or_path": "a/b"}')
    with pytest.raises(ValueError, match="r None, expected an integer"):
        AdapterConfig.read(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"no {CONFIG}; expected a folder that train.py or PEFT saved .* to$"):
        AdapterConfig.read(folder)
    with pytest.raises(ValueError, match="no-such-folder': no"):
        load_adapter(folder / "no-such-folder")


@pytest.mark.real
def test_peft_computes_the_same_on_smollm2_in_nf4(tmp_path, smollm2):
    """Transformers' own 4-bit base (it needs accelerate) with our adapter loaded by PEFT: the same logits."""
    pytest.importorskip("accelerate")
    base = load_base(str(smollm2), "nf4", "fp32", torch.device("cpu"))
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    torch.manual_seed(0)
    spec = LoraSpec(16, 24.0, 0.0, targets)
    add_lora(base, spec)
    give_effect(list(lora_parameters(base.model).values()))
    described = AdapterConfig(spec, str(smollm2), None, base.fingerprint)
    save_adapter(tmp_path, base.model, described, base.encoder.tokenizer)

    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2, quantization_config=quantized, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # see system/bits.py
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        mine = logits(base.model)
        difference = (theirs(IDS).logits - mine).abs().max()
    with lora_disabled(base.model):
        assert (logits(base.model) - mine).abs().max() > 0.1  # the adapter has an effect
    assert difference <= 1e-5 * max(1.0, mine.abs().max())
