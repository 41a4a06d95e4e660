"""The frozen base: weights from disk straight into NF4, one linear layer at a time, with LoRA on top.

What is what in the base (QLoRA, section 3):

    linear layers of the decoder   4-bit NF4, doubly quantised: 4.127 bits a parameter   (see nf4.py)
    embedding and output head      the compute dtype; tied weights stay tied
    biases                         the compute dtype
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

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from .bits import bnb
from .config import clipped, refuse_secrets, shown
from .data import ChatEncoder
from .files import Fingerprint, check_links, read_json, read_weights, weight_shapes
from .lora import inject_lora, lora_parameters
from .sharding import shard

# cuBLAS's workspace: 8 MiB a stream, as on GPUs before Hopper, where PyTorch takes 32. Measured: no slower.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")

transformers.logging.set_verbosity_error()  # its warnings are about calls that are ours, not the user's
transformers.logging.disable_progress_bar()

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

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
# Finding a model
# ---------------------------------------------------------------------------------------------------------------------


def find_model(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """(folder, revision) of a local model folder or of a model on the hub, downloaded if need be.

    Args:
        revision: a commit or branch on the hub; the newest if not given.

    Raises:
        ValueError: no such model, one that is not to be trusted with being read, or the hub can't be reached.
    """
    refuse_secrets(name, "model")
    path = Path(name)
    if path.is_dir():
        _check_folder(path, name)
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
    _check_folder(folder, name)
    return folder, folder.name


def _check_folder(folder: Path, name: str) -> None:
    """Refuse, before any library reads them, files of a model that ask for more than being read.

    Raises:
        ValueError: links out of the folder, no readable config.json, an architecture that would need the model's own
            code, or more layers than there are weights (building them would take for ever).
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"model '{name}': the folder has no config.json; expected a Hugging Face model folder")
    check_links(folder)
    config = read_json(folder / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"model '{name}': model_type {shown(kind)} in config.json is none that transformers "
            f"{transformers.__version__} knows; code that comes with a model is never run"
        )
    layers = [v for k, v in config.items() if re.fullmatch("(num|n)(_hidden)?_layers?", k) and isinstance(v, int)]
    if any(abs(n) > 1000 for n in layers) and max(map(abs, layers)) > len(weight_shapes(folder)):
        raise ValueError(
            f"model '{name}': config.json says {clipped(max(layers), 20)} layers, more than there are weights"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Building the model
# ---------------------------------------------------------------------------------------------------------------------


def load_encoder(name: str, revision: str | None = None) -> ChatEncoder:
    """The encoder of a model, without its weights; arguments and errors as for `load_base`."""
    folder, _ = find_model(name, revision)
    with _refusing(f"model '{name}': no usable tokenizer"):
        return ChatEncoder(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """A ValueError of one line, whatever a library raises: damaged files end in errors of every kind."""
    try:
        yield
    except Exception as e:
        first = next(iter(str(e).strip().splitlines()), type(e).__name__)
        raise ValueError(f"{what} ({clipped(first)})") from None


def load_base(
    name: str,
    quantization: str = "nf4",
    precision: str = "fp32",
    device: torch.device | None = None,
    revision: str | None = None,
    sharded: bool = False,
    encoder: ChatEncoder | None = None,
) -> Base:
    """Load a causal language model with the linear layers of its decoder in 4 bits, everything frozen.

    Args:
        name: a local folder or a hub id.
        quantization: nf4, fp4 (both doubly quantised) or none.
        precision: fp32, fp16 or bf16: what matrix products are computed in (under autocast, see `autocast`).
        revision: of a model on the hub; the newest if not given.
        sharded: each rank keeps its part of the weights only (see sharding.py).
        encoder: the model's, where it is there already.

    Raises:
        ValueError: no such model, weights that are missing, unexpected or damaged, or no chat template.
    """
    device = device or pick_device()
    dtype = DTYPES[precision]
    folder, revision = find_model(name, revision)
    encoder = encoder or load_encoder(str(folder))
    with _refusing(f"model '{name}': no usable config.json"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        has_settings = (folder / "generation_config.json").is_file()
        generation = GenerationConfig.from_pretrained(folder) if has_settings else None
    with _refusing(f"model '{name}': config.json makes no model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        decoder = decoder_prefix(model)

    # Names and shapes first, from the files' headers: what does not fit is found before anything is allocated for it.
    weights = model.state_dict()
    expected = set(weights) - set(model._tied_weights_keys or () if config.tie_word_embeddings else ())
    stored = weight_shapes(folder)
    for key, shape in stored.items():
        if key in expected and shape != tuple(weights[key].shape):
            raise ValueError(f"weight '{key}' has shape {shape}, expected {tuple(weights[key].shape)}")
        # not used are the copy of a tied weight, and buffers that the model computes
        if key not in weights and not key.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"model '{name}': unexpected weight {shown(key)} for a {config.model_type} model")
    if lost := sorted(expected - stored.keys()):
        raise ValueError(f"model '{name}': {len(lost)} weights are missing, among them '{lost[0]}'")

    _materialise_buffers(model, device)
    fingerprint = Fingerprint(config)
    with ThreadPoolExecutor(1) as other:  # hashing takes as long as the rest, and lets go of the interpreter
        for key, tensor in read_weights(folder):
            hashed = other.submit(fingerprint.add, key, tensor)
            if key in expected:
                _place(model, key, tensor, decoder, quantization, dtype, device, sharded)
            hashed.result()

    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if generation:
        model.generation_config = generation
    if sharded:
        shard(model, device, decoder_layers(model))
    if dtype != torch.float32:  # keep the residual stream in fp32 from its first value on
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.float())
    return Base(model, encoder, name, folder, revision, fingerprint.digest.hexdigest(), dtype)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, whatever the family calls them (layers, h)."""
    return max((m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList)), key=len)


def decoder_prefix(model: PreTrainedModel) -> str:
    """The name under which the decoder layers stand, "model.layers." in Qwen2."""
    layers = decoder_layers(model)
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
    model: nn.Module, key: str, tensor: torch.Tensor, decoder: str, quantization: str, dtype: torch.dtype, device,
    sharded: bool,
) -> None:  # fmt: skip
    """Put one weight from disk where it belongs, in its dtype, quantised if it is a linear layer's of the decoder.

    What will be shared out waits on the CPU.
    """
    owner, _, leaf = key.rpartition(".")
    module = model.get_submodule(owner)
    linear = isinstance(module, nn.Linear) and key.startswith(decoder)
    four_bit = linear and quantization != "none"
    if four_bit and leaf == "weight":
        tensor = tensor.to(device)
    if not torch.stack(tensor.aminmax()).isfinite().all():  # NaN is its own minimum
        raise ValueError(f"weight '{key}' holds NaN or infinite values; copy or download the model again")
    if four_bit:
        if not isinstance(module, bnb.nn.Linear4bit):
            module = _linear4bit(module, quantization, dtype)
            model.set_submodule(owner, module)
        if leaf == "weight":
            if device.type == "cpu" and module.in_features % 64:
                raise ValueError(
                    f"'{key}' has rows of {module.in_features}, no multiple of 64, which bitsandbytes dequantises "
                    "wrongly on a CPU; use --quantization none, or a GPU"
                )
            _quantize(module, tensor, quantization, dtype)
            if sharded:
                module.weight.data = module.weight.data.cpu()
            return
    wide = not linear and module is not model.get_input_embeddings() and module is not model.get_output_embeddings()
    if sharded and leaf == "weight" and not wide:
        device = torch.device("cpu")
    value = tensor.to(device, torch.float32 if wide else dtype)
    if isinstance(getattr(module, leaf), nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)


class Linear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' layer, whose result has the compute dtype, as `nn.Linear`'s has under autocast, not its input's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        return super().forward(x.to(self.compute_dtype))


def _linear4bit(module: nn.Linear, quantization: str, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    """A Linear4bit of the same shape, without its weight."""
    with torch.device("meta"):
        layer = Linear4bit(
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


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of the model as if unquantised (a packed weight holds two a byte), tied ones once."""
    packed = bnb.nn.Params4bit
    return sum(p.quant_state.shape.numel() if isinstance(p, packed) else p.numel() for p in model.parameters())


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context of a compute dtype; for fp32, one that does nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def output_head(model: PreTrainedModel) -> nn.Module:
    """The head: (N, D) -> (N, V)."""
    return model.get_output_embeddings()
