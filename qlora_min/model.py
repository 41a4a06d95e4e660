"""The frozen base: weights from disk straight into NF4, one linear layer at a time, with LoRA on top.

What is what in the base (QLoRA, section 3):

    linear layers of the decoder   4-bit NF4, doubly quantised: 4.127 bits a parameter   (see nf4.py)
    embedding and output head      the compute dtype; tied weights stay tied
    norms                          fp32
    between the layers             fp32: the residual stream overflows fp16 on some Qwen2 models
    LoRA's A and B                 fp32, the only weights that train

Transformers can load in 4 bits too, but needs accelerate for it. Doing it here is short: build the model's skeleton on
the meta device, where tensors have shapes and no memory, then read one tensor at a time, quantise it if it belongs to a
linear layer of the decoder, and put it in place. At no time is more than one layer in memory unquantised.

Three traps of bitsandbytes 0.50 are closed here. A layer's forward dequantises to the compute dtype, but its backward
and `dequantize_4bit` to the dtype that the weight had when it was quantised: we quantise from fp32 and then set the
quant state's dtype to the compute dtype, so that forward, backward and merge use one weight. On CPUs with AVX512-BF16 a
forward in eval mode repacks the weight in place for an inference kernel, after which dequantising is silently wrong: we
switch that kernel off. And on CPUs with AVX512 a matrix whose rows are no multiple of the block of 64 is dequantised
with the wrong scales: such a model is refused on a CPU.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.utils.checkpoint
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from .bits import bnb
from .data import ChatEncoder
from .lora import inject_lora, lora_parameters

transformers.logging.set_verbosity_error()  # its warnings are about calls that are ours, not the user's
transformers.logging.disable_progress_bar()

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Options by which some families' logits are more than head(hidden states), which is what we compute.
LOGIT_SCALINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")

# What a model consists of on the hub: weights only as safetensors (no pickles), no code.
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "merges.txt", "vocab.txt", "*.model"]


@dataclass(frozen=True)
class Base:
    """A loaded base: the model, its encoder, and what identifies it.

    name: as the user gave it; folder: where it lies; revision: the hub's commit, if from there; fingerprint: sha256 of
    the architecture and of every weight as stored, so that an adapter can tell the base that it was trained on.
    """

    model: PreTrainedModel
    encoder: ChatEncoder
    name: str
    folder: Path
    revision: str | None
    fingerprint: str
    dtype: torch.dtype


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """--precision as bf16, fp16 or fp32. auto: bf16 where the hardware has it, else fp16 on a GPU, fp32 on a CPU.

    A plain `torch.cuda.is_bf16_supported()` says True on a T4, which emulates bf16, slowly: we ask for the hardware's.

    Raises:
        ValueError: bf16 on a GPU without it.
    """
    hardware_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "fp32" if device.type == "cpu" else "bf16" if hardware_bf16 else "fp16"
    if precision == "bf16" and device.type == "cuda" and not hardware_bf16:
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, "
            "bf16 needs 8.0; use --precision fp16 or auto"
        )
    return precision


# ---------------------------------------------------------------------------------------------------------------------
# Finding and reading the weights
# ---------------------------------------------------------------------------------------------------------------------


def find_model(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """(folder, revision) of a local model folder or of a model on the hub, downloaded if need be.

    Args:
        revision: a commit or branch on the hub; the newest if not given.

    Raises:
        ValueError: no such model, or the hub can't be reached.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model '{name}': the folder has no config.json; expected a Hugging Face model folder")
        return path, None
    if path.is_absolute() or name.count("/") != 1 or name.startswith("."):
        raise ValueError(f"model '{name}': no such folder; expected a local model folder or a hub id like OWNER/NAME")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise ValueError(f"model '{name}': not on the Hugging Face hub (or private), and no local folder") from None
    except HFValidationError:
        raise ValueError(f"model '{name}': no local folder, and no valid hub id") from None
    except (LocalEntryNotFoundError, OSError):
        raise ValueError(
            f"model '{name}': no local folder of this name, and the Hugging Face hub can't be reached; "
            "give a local model folder with --model DIR, or try --demo, which needs no network"
        ) from None
    return folder, folder.name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        ValueError: there are none, or the index names one that is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: no readable index of weights; copy or download the model again") from None
        lost = [f.name for f in files if not f.is_file()]
        if lost:
            raise ValueError(f"model '{folder}': {', '.join(lost)} is missing; copy or download the model again")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ValueError(f"model '{folder}': no model.safetensors; expected weights in the safetensors format")


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every weight of a model folder, memory-mapped: one is in memory at a time."""
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as f:
                for name in sorted(f.keys()):
                    yield name, f.get_tensor(name)
        except SafetensorError as e:
            raise ValueError(f"{path}: damaged weights ({e}); copy or download the model again") from None


class Fingerprint:
    """sha256 over a model's architecture and its weights as stored on disk, fed tensor by tensor."""

    # Plain numbers and names: what is derived from them differs between versions of transformers.
    KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "vocab_size", "rms_norm_eps", "hidden_act", "sliding_window", "tie_word_embeddings")  # fmt: skip

    def __init__(self, config):
        values = config.to_dict()
        rope = values.get("rope_parameters") or {}
        known = {k: values.get(k) for k in self.KEYS} | {"rope_theta": rope.get("rope_theta", values.get("rope_theta"))}
        self.digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode())

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self.digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        self.digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        return self.digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Building the model
# ---------------------------------------------------------------------------------------------------------------------


def load_encoder(name: str, revision: str | None = None) -> ChatEncoder:
    """The encoder of a model, without its weights; arguments and errors as for `load_base`."""
    folder, _ = find_model(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as e:  # tokenizers raises bare Exceptions for a damaged tokenizer.json
        raise ValueError(f"model '{name}': no usable tokenizer ({str(e).splitlines()[0]})") from None
    try:
        return ChatEncoder(tokenizer)
    except ValueError as e:
        raise ValueError(f"model '{name}': {e}") from None


def load_base(
    name: str,
    quantization: str = "nf4",
    precision: str = "fp32",
    device: torch.device | None = None,
    revision: str | None = None,
) -> Base:
    """Load a causal language model with the linear layers of its decoder in 4 bits, everything frozen.

    Args:
        name: a local folder or a hub id.
        quantization: nf4, fp4 (both doubly quantised) or none.
        precision: fp32, fp16 or bf16: what matrix products are computed in (under autocast, see `autocast`).
        revision: of a model on the hub; the newest if not given.

    Raises:
        ValueError: no such model, weights that are missing, unexpected or damaged, or no chat template.
    """
    device = device or pick_device()
    dtype = DTYPES[precision]
    folder, revision = find_model(name, revision)
    encoder = load_encoder(str(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
        has_settings = (folder / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(folder) if has_settings else None
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"model '{name}': {str(e).splitlines()[0]}") from None
    scaled = [k for k in LOGIT_SCALINGS if getattr(config, k, None) not in (None, 1)]
    if scaled:
        raise ValueError(
            f"model '{name}': {config.model_type} changes its logits by {scaled[0]}, which is not implemented"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    _materialise_buffers(model, device)

    decoder = decoder_prefix(model)
    expected = set(model.state_dict()) - set(model._tied_weights_keys or () if config.tie_word_embeddings else ())
    fingerprint, seen = Fingerprint(config), set()
    for key, tensor in read_weights(folder):
        fingerprint.add(key, tensor)
        if key not in expected:
            if key in model.state_dict() or key.endswith("rotary_emb.inv_freq"):
                continue  # the copy of a tied weight, or a buffer that the model computes
            raise ValueError(f"model '{name}': unexpected weight '{key}' for a {config.model_type} model")
        seen.add(key)
        _place(model, key, tensor, decoder, quantization, dtype, device)
    if expected - seen:
        lost = sorted(expected - seen)
        raise ValueError(f"model '{name}': {len(lost)} weights are missing, among them '{lost[0]}'")

    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if generation:
        model.generation_config = generation
    embedding = model.get_input_embeddings()
    if embedding.weight.dtype != torch.float32:  # keep the residual stream in fp32 from its first value on
        embedding.register_forward_hook(lambda module, args, out: out.float())
    return Base(model, encoder, name, folder, revision, fingerprint.hexdigest(), dtype)


def decoder_prefix(model: PreTrainedModel) -> str:
    """The name under which the decoder layers stand, "model.layers." in Qwen2."""
    layers = model.get_decoder().layers
    return next(n for n, m in model.named_modules() if m is layers) + "."


def _materialise_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give buffers that no checkpoint stores (rotary frequencies) their values; parameters stay on meta.

    `_init_weights` is the hook by which every transformers model computes them; on meta parameters it does nothing.
    """
    for module in model.modules():
        if any(b.is_meta for b in module._buffers.values() if b is not None):
            for key, buffer in module._buffers.items():
                module._buffers[key] = torch.empty_like(buffer, device=device)
            model._init_weights(module)


def _place(
    model: nn.Module, key: str, tensor: torch.Tensor, decoder: str, quantization: str, dtype: torch.dtype, device
) -> None:
    """Put one weight from disk where it belongs, in its dtype, quantised if it is a linear layer's of the decoder."""
    owner, _, leaf = key.rpartition(".")
    module = model.get_submodule(owner)
    if tuple(getattr(module, leaf).shape) != tuple(tensor.shape):
        raise ValueError(
            f"weight '{key}' has shape {tuple(tensor.shape)}, expected {tuple(getattr(module, leaf).shape)}"
        )
    if not tensor.isfinite().all():
        raise ValueError(f"weight '{key}' holds NaN or infinite values; copy or download the model again")
    linear = isinstance(module, nn.Linear) and key.startswith(decoder)
    if linear and quantization != "none":
        if not isinstance(module, bnb.nn.Linear4bit):
            module = _linear4bit(module, quantization, dtype)
            parent, _, child = owner.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        if leaf == "weight":
            if device.type == "cpu" and module.in_features % 64:
                raise ValueError(
                    f"'{key}' has rows of {module.in_features}, no multiple of 64, which bitsandbytes dequantises "
                    "wrongly on a CPU; use --quantization none, or a GPU"
                )
            _quantize(module, tensor.to(device), quantization, dtype)
            return
    wide = not linear and module is not model.get_input_embeddings() and module is not model.get_output_embeddings()
    value = tensor.to(device, torch.float32 if wide else dtype)
    if isinstance(getattr(module, leaf), nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)


def _linear4bit(module: nn.Linear, quantization: str, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A Linear4bit of the same shape, without its weight."""
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None,
            compute_dtype=dtype, compress_statistics=True, quant_type=quantization,
        )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False
    return layer


def _quantize(layer: bnb.nn.Linear4bit, weight: torch.Tensor, quantization: str, dtype: torch.dtype) -> None:
    """Quantise (out, in) weights into a Linear4bit, on the device where they are; they dequantise to `dtype`."""
    packed = bnb.nn.Params4bit(weight.float(), quant_type=quantization, compress_statistics=True, module=layer)
    layer.weight = packed.to(weight.device)  # this is where bitsandbytes quantises
    layer.weight.quant_state.dtype = dtype


def quantize_linear(linear: nn.Linear, quantization: str, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A Linear4bit with the weight of an ordinary linear layer, on the same device."""
    layer = _linear4bit(linear, quantization, dtype)
    _quantize(layer, linear.weight.detach(), quantization, dtype)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return layer


def dequantized_weight(linear: nn.Module) -> torch.Tensor:
    """A linear layer's weight as it computes with it: (out, in), in the compute dtype."""
    if isinstance(linear, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return linear.weight.data


def add_lora(base: Base, targets: Sequence[str], rank: int, alpha: float, dropout: float) -> list[str]:
    """Inject LoRA into the decoder layers of a base; returns the wrapped modules' names."""
    names = inject_lora(base.model, targets, rank, alpha, dropout, within=decoder_prefix(base.model))
    assert all(p.dtype == torch.float32 for p in lora_parameters(base.model).values())
    return names


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing: keep each decoder layer's input only, and run the layer again in the backward pass.

    Non-reentrant, and the random state is kept, so that dropout draws the same mask both times: with another mask the
    loss is the same and the gradients are wrong.
    """
    for layer in model.get_decoder().layers:

        def forward(*args, layer=layer, inner=layer.forward, **kwargs):
            if layer.training and torch.is_grad_enabled():
                return torch.utils.checkpoint.checkpoint(
                    inner, *args, use_reentrant=False, preserve_rng_state=True, **kwargs
                )
            return inner(*args, **kwargs)

        layer.forward = forward


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of the model as if unquantised (a packed weight holds two a byte), tied ones once."""
    count = {}
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            count[id(module.weight)] = module.in_features * module.out_features
        for p in module.parameters(recurse=False):
            count.setdefault(id(p), p.numel())
    return sum(count.values())


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context of a compute dtype; for fp32, one that does nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) ids -> (B, T, D): the decoder's output before the head. Right-padded and causal: no mask is needed."""
    return model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state


def output_head(model: PreTrainedModel) -> nn.Module:
    """The head: (N, D) -> (N, V)."""
    return model.get_output_embeddings()
