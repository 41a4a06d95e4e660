"""The frozen base: weights from disk straight into NF4, one linear layer at a time, with LoRA on top.

What the base consists of (QLoRA, section 3):

    linear layers of the decoder   4-bit NF4, doubly quantised: 4.127 bits a parameter   (see nf4.py)
    embedding and output head      the compute dtype; tied weights stay tied
    biases                         the compute dtype
    norms                          fp32
    between the layers             fp32: the residual stream overflows fp16 on some Qwen2 models
    LoRA's A and B                 fp32, the only weights that train

The model is built on the meta device, where tensors have shapes and no memory. Then one tensor is read at a time,
quantised if it belongs to a linear layer of the decoder and is not stored in 4 bits, and put in place. (Transformers'
own loading in 4 bits needs accelerate.)
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
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from .chat import ChatEncoder
from .data.templates import named_template
from .lora import LoraSpec, inject_lora, lora_parameters
from .system import weights
from .system.bits import dequantized, linear_4bit, quantized, stored_4bit
from .system.device import DTYPES, pick_device, resolve_precision
from .system.files import read_json
from .system.hub import find_model, read_config, refusing
from .system.peft_files import has_template

# 8 MiB of cuBLAS workspace per stream. PyTorch's default is 32 MiB on Hopper; measured: no slower.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")

transformers.logging.set_verbosity_error()  # its warnings are about calls that are ours, not the user's
transformers.logging.disable_progress_bar()

Shard = Callable[[PreTrainedModel, torch.device, nn.ModuleList], None]


@dataclass(frozen=True)
class Base:
    """A loaded base: the model, its encoder, and what identifies it.

    name: as the user gave it. folder: where its files are. revision: the hub's commit, if from there. fingerprint:
    sha256 of the architecture and of every weight as stored. dtype: what it computes in. quantization: nf4, fp4 or
    none. prequantized: it is stored so.
    """

    model: PreTrainedModel
    encoder: ChatEncoder
    name: str
    folder: Path
    revision: str | None
    fingerprint: str
    dtype: torch.dtype
    quantization: str = "nf4"
    prequantized: bool = False
    sharded: bool = False  # each process holds a part of the weights

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_encoder(
    name: str, revision: str | None = None, template: str | None = None, adapter: Path | None = None, **settings: Any
) -> ChatEncoder:
    """The encoder of a model, without its weights; arguments and errors as for `load_base`.

    Args:
        template: another chat template than the model's: a file, or "chatml". settings: of `ChatEncoder`.
        adapter: a folder whose tokenizer and chat template, if it has both, go before the model's.
    """
    folder, what = find_model(name, revision, weights=False)[0], f"model '{name}'"
    config = read_config(folder, name)
    if adapter and has_template(adapter):
        folder, what = adapter, f"adapter '{adapter}'"
    with refusing(f"{what}: no usable tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    if template:
        tokenizer.chat_template = named_template(template, tokenizer)
    with refusing(f"{what}: no usable tokenizer"):
        return ChatEncoder(tokenizer, vocab_size=getattr(config.get_text_config(), "vocab_size", None), **settings)


def load_base(
    name: str,
    quantization: str | None = "nf4",
    precision: str = "fp32",
    device: torch.device | None = None,
    revision: str | None = None,
    encoder: ChatEncoder | None = None,
    shard: Shard | None = None,
) -> Base:
    """Load a causal language model with the linear layers of its decoder in 4 bits, everything frozen.

    Args:
        name: a local folder or a hub id.
        quantization: nf4, fp4 (both doubly quantised) or none; None: as stored. A model stored in 4 bits is unchanged.
        precision: fp32, fp16, bf16 or auto: what matrix products are computed in (under autocast, see `autocast`).
        revision: of a model on the hub; the newest if not given.
        encoder: the model's, if it is loaded already.
        shard: leaves each process a part of the weights (`scale.sharding.shard`).

    Raises:
        ValueError: no such model, weights missing, unexpected, damaged or quantised otherwise, or no chat template.
    """
    device = device or pick_device()
    dtype = DTYPES[resolve_precision(precision, device)]
    folder, revision = find_model(name, revision)
    encoder = encoder or load_encoder(str(folder))
    model, generation = _empty_model(name, folder)
    packed = weights.PackedWeights(shapes := weights.weight_shapes(folder))
    quantization = packed.agree(name, quantization)
    expected = weights.expected_weights(name, model, shapes, packed)
    weights.materialise_buffers(model, device)
    place = _Place(model, "none" if packed.quantization else quantization, dtype, device, sharded=shard is not None)
    fingerprint = weights.Fingerprint(model.config)
    with ThreadPoolExecutor(1) as other:  # hashing takes as long as the rest, and releases the GIL
        for key, tensor in weights.read_weights(folder):
            hashed = other.submit(fingerprint.add, key, tensor)
            whole = packed.add(key, tensor)
            if whole and whole[0] in expected:
                place(expected[whole[0]], whole[1])
            hashed.result()
    model.tie_weights()
    model.requires_grad_(False).eval()
    model.config.use_cache = False
    model.generation_config = generation or model.generation_config
    if shard:
        shard(model, device, decoder_layers(model))
    if dtype != torch.float32:  # keep the residual stream in fp32 from its first value on
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.float())
    digest, stored = fingerprint.digest.hexdigest(), bool(packed.quantization)
    return Base(model, encoder, name, folder, revision, digest, dtype, quantization, stored, sharded=shard is not None)


def _empty_model(name: str, folder: Path) -> tuple[PreTrainedModel, GenerationConfig | None]:
    """The model that config.json describes, on the meta device, and its generation settings."""
    config, settings = read_config(folder, name), folder / "generation_config.json"
    with refusing(f"model '{name}': no usable generation_config.json"):
        generation = GenerationConfig.from_dict(read_json(settings)) if settings.is_file() else None
    with refusing(f"model '{name}': config.json makes no model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        layers = decoder_layers(model)
    if not any(isinstance(m, nn.Linear) for m in layers.modules()):
        raise ValueError(f"model '{name}': {config.model_type} is not supported, since it has no layers of nn.Linear")
    return model, generation


class _Place:
    """Puts a weight from disk into its module, in its dtype, or in 4 bits for linear layers of the decoder.

    quantization: nf4, fp4 or none, for those layers. Weights that will be sharded stay on the CPU.
    """

    def __init__(self, model: PreTrainedModel, quantization: str, dtype: torch.dtype, device, sharded: bool):
        self.model, self.quantization, self.dtype, self.device = model, quantization, dtype, device
        self.sharded, self.decoder = sharded, decoder_prefix(model)

    def __call__(self, key: str, tensor: Tensor | dict[str, Tensor]) -> None:
        """tensor: a dictionary of the parts of a weight that is stored in 4 bits."""
        owner, _, leaf = key.rpartition(".")
        module = self.model.get_submodule(owner)
        linear = isinstance(module, nn.Linear) and key.startswith(self.decoder)
        if isinstance(tensor, dict):
            packed = stored_4bit(key, tensor, getattr(module, leaf).shape, self.dtype, self.device)
            if linear:
                return self._put_4bit(owner, module, packed)
            tensor = dequantized(packed)  # of the head, say
        four_bit = linear and leaf == "weight" and self.quantization != "none"
        if four_bit:
            tensor = tensor.to(self.device)
        if why := weights.unusable(tensor):
            raise ValueError(f"weight '{key}' {why}; copy, convert or download the model again")
        if four_bit:
            return self._put_4bit(owner, module, quantized(tensor, self.quantization, self.dtype))
        ends = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        wide = not linear and module not in ends
        waits = self.sharded and leaf == "weight" and not wide
        value = tensor.to("cpu" if waits else self.device, torch.float32 if wide else self.dtype)
        if isinstance(getattr(module, leaf), nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, leaf, value)

    def _put_4bit(self, owner: str, module: nn.Linear, weight: nn.Parameter) -> None:
        if self.sharded:
            weight.data = weight.data.cpu()
        self.model.set_submodule(owner, linear_4bit(module, weight, self.dtype))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, whatever the family calls them (layers, h)."""
    lists = (m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList))
    return max(lists, key=len, default=nn.ModuleList())


def decoder_prefix(model: PreTrainedModel) -> str:
    """What the names of the decoder layers begin with, "model.layers." in Qwen2."""
    layers = decoder_layers(model)
    return next(n for n, m in model.named_modules() if m is layers) + "."


def add_lora(base: Base, spec: LoraSpec) -> list[str]:
    """Inject LoRA into the decoder layers of a base; returns the wrapped modules' names."""
    names = inject_lora(base.model, spec, within=decoder_prefix(base.model))
    assert all(w.dtype == torch.float32 for w in lora_parameters(base.model).values())
    return names
