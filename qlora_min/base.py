"""The frozen base: weights from disk straight into NF4, one linear layer at a time, with LoRA on top.

What the base consists of (QLoRA, section 3):

    linear layers of the decoder   4-bit NF4, doubly quantised: 4.127 bits a parameter   (see nf4.py)
    embedding and output head      the compute dtype; tied weights stay tied
    biases                         the compute dtype
    norms                          fp32
    between the layers             fp32: the residual stream overflows fp16 on some Qwen2 models
    LoRA's A and B                 fp32, the only weights that train

The model is built on the meta device, where tensors have shapes and no memory. Then one tensor is read at a time,
quantised if it belongs to a linear layer of the decoder, and put in place. (Transformers' own loading in 4 bits needs
accelerate.)
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from .chat import ChatEncoder
from .data.templates import named_template
from .lora import LoraSpec, inject_lora, lora_parameters
from .system.bits import Linear4bit, empty_4bit, quantize_into
from .system.device import DTYPES, pick_device
from .system.hub import find_model, refusing
from .system.weights import Fingerprint, expected_weights, read_weights, weight_shapes

# 8 MiB of cuBLAS workspace per stream. PyTorch's default is 32 MiB on Hopper; measured: no slower.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")

transformers.logging.set_verbosity_error()  # its warnings are about calls that are ours, not the user's
transformers.logging.disable_progress_bar()

Shard = Callable[[PreTrainedModel, torch.device, nn.ModuleList], None]


@dataclass(frozen=True)
class Base:
    """A loaded base: the model, its encoder, and what identifies it.

    name: as the user gave it. folder: where its files are. revision: the hub's commit, if from there. fingerprint:
    sha256 of the architecture and of every weight as stored. dtype: what it computes in.
    """

    model: PreTrainedModel
    encoder: ChatEncoder
    name: str
    folder: Path
    revision: str | None
    fingerprint: str
    dtype: torch.dtype
    sharded: bool = False  # each process holds a part of the weights

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_encoder(name: str, revision: str | None = None, template: str | None = None, **settings: Any) -> ChatEncoder:
    """The encoder of a model, without its weights; arguments and errors as for `load_base`.

    Args:
        template: another chat template than the model's: a file, or "chatml". settings: of `ChatEncoder`.
    """
    folder, _ = find_model(name, revision)
    with refusing(f"model '{name}': no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if template:
        tokenizer.chat_template = named_template(template, tokenizer)
    with refusing(f"model '{name}': no usable tokenizer"):
        return ChatEncoder(tokenizer, **settings)


def load_base(
    name: str,
    quantization: str = "nf4",
    precision: str = "fp32",
    device: torch.device | None = None,
    revision: str | None = None,
    encoder: ChatEncoder | None = None,
    shard: Shard | None = None,
) -> Base:
    """Load a causal language model with the linear layers of its decoder in 4 bits, everything frozen.

    Args:
        name: a local folder or a hub id.
        quantization: nf4, fp4 (both doubly quantised) or none.
        precision: fp32, fp16 or bf16: what matrix products are computed in (under autocast, see `autocast`).
        revision: of a model on the hub; the newest if not given.
        encoder: the model's, if it is loaded already.
        shard: leaves each process a part of the weights (`scale.sharding.shard`).

    Raises:
        ValueError: no such model, weights that are missing, unexpected or damaged, or no chat template.
    """
    device, dtype = device or pick_device(), DTYPES[precision]
    folder, revision = find_model(name, revision)
    encoder = encoder or load_encoder(str(folder))
    model, generation = _empty_model(name, folder)
    expected = expected_weights(name, model, weight_shapes(folder))
    _materialise_buffers(model, device)
    place = _Place(model, quantization, dtype, device, sharded=shard is not None)
    fingerprint = Fingerprint(model.config)
    with ThreadPoolExecutor(1) as other:  # hashing takes as long as the rest, and releases the interpreter's lock
        for key, tensor in read_weights(folder):
            hashed = other.submit(fingerprint.add, key, tensor)
            if key in expected:
                place(key, tensor)
            hashed.result()
    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    model.generation_config = generation or model.generation_config
    if shard:
        shard(model, device, decoder_layers(model))
    if dtype != torch.float32:  # keep the residual stream in fp32 from its first value on
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.float())
    digest = fingerprint.digest.hexdigest()
    return Base(model, encoder, name, folder, revision, digest, dtype, sharded=shard is not None)


def _empty_model(name: str, folder: Path) -> tuple[PreTrainedModel, GenerationConfig | None]:
    """The model that config.json describes, on the meta device, and its generation settings."""
    with refusing(f"model '{name}': no usable config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has_settings = (folder / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(folder) if has_settings else None
    with refusing(f"model '{name}': config.json makes no model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        decoder_prefix(model)
    return model, generation


def _materialise_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give buffers that no checkpoint stores (rotary frequencies) their values; parameters stay on meta.

    `_init_weights` is the hook by which every transformers model computes them; on meta parameters it does nothing.
    """
    for module in model.modules():
        if any(b.is_meta for b in module._buffers.values() if b is not None):
            for key, buffer in module._buffers.items():
                module._buffers[key] = torch.empty_like(buffer, device=device)
            model._init_weights(module)


class _Place:
    """Puts a weight from disk where it belongs, in its dtype, quantised if it is a linear layer's of the decoder.

    Those that will be sharded stay on the CPU.
    """

    def __init__(self, model: PreTrainedModel, quantization: str, dtype: torch.dtype, device, sharded: bool):
        self.model, self.quantization, self.dtype, self.device, self.sharded = (
            model, quantization, dtype, device, sharded
        )  # fmt: skip
        self.decoder = decoder_prefix(model)

    def __call__(self, key: str, tensor: Tensor) -> None:
        owner, _, leaf = key.rpartition(".")
        module = self.model.get_submodule(owner)
        linear = isinstance(module, nn.Linear) and key.startswith(self.decoder)
        four_bit = linear and self.quantization != "none"
        if four_bit and leaf == "weight":
            tensor = tensor.to(self.device)
        if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is its own minimum
            raise ValueError(f"weight '{key}' holds NaN or infinite values; copy or download the model again")
        if four_bit and not isinstance(module, Linear4bit):
            module = empty_4bit(module, self.quantization, self.dtype)
            self.model.set_submodule(owner, module)
        if four_bit and leaf == "weight":
            return self._quantize(key, module, tensor)
        ends = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        wide = not linear and module not in ends
        waits = self.sharded and leaf == "weight" and not wide
        value = tensor.to("cpu" if waits else self.device, torch.float32 if wide else self.dtype)
        if isinstance(getattr(module, leaf), nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, value)

    def _quantize(self, key: str, module: nn.Module, tensor: Tensor) -> None:
        if self.device.type == "cpu" and module.in_features % 64:
            raise ValueError(
                f"'{key}' has rows of {module.in_features}, no multiple of 64, which bitsandbytes dequantises wrongly "
                "on a CPU; use --quantization none, or a GPU"
            )
        quantize_into(module, tensor, self.quantization, self.dtype)
        if self.sharded:
            module.weight.data = module.weight.data.cpu()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, whatever the family calls them (layers, h)."""
    return max((m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)), key=len)


def decoder_prefix(model: PreTrainedModel) -> str:
    """What the names of the decoder layers begin with, "model.layers." in Qwen2."""
    layers = decoder_layers(model)
    return next(n for n, m in model.named_modules() if m is layers) + "."


def add_lora(base: Base, spec: LoraSpec) -> list[str]:
    """Inject LoRA into the decoder layers of a base; returns the wrapped modules' names."""
    names = inject_lora(base.model, spec, within=decoder_prefix(base.model))
    assert all(w.dtype == torch.float32 for w in lora_parameters(base.model).values())
    return names
