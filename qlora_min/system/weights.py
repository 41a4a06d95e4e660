"""Weights in safetensors files, which may be hostile: names and shapes are checked before anything is allocated."""

import hashlib
import json
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from .files import _once, read_json
from .text import clipped, refusing, shown

Shapes = dict[str, tuple[int, ...]]  # the shape of each tensor, by its name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        ValueError: there are none, or the index is unreadable or names a file that is missing or outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with refusing(f"{index}: no readable index of weights", "copy or download the model again"):
            names = sorted(set(read_json(index)["weight_map"].values()))
            elsewhere = [n for n in names if Path(n).name != n or "\0" in n or not 1 <= len(n) <= 255]
        if elsewhere:
            raise ValueError(f"{index}: names {shown(elsewhere[0])}; expected files beside the index")
        if lost := ", ".join(n for n in names if not (folder / n).is_file()):
            raise ValueError(f"model '{folder}': {clipped(lost)} is missing; copy or download the model again")
        return [folder / n for n in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    raise ValueError(
        f"model '{folder}': no model.safetensors; expected weights in the safetensors format"
        + (f", and {clipped(pickles[0], 40)} is a pickle, which can run code and is never read" if pickles else "")
        + "; if you trust the model, convert it: transformers' AutoModelForCausalLM.from_pretrained(MODEL)"
        ".save_pretrained(FOLDER), and the tokenizer's likewise"
    )


def tensor_shapes(path: Path) -> Shapes:
    """Name -> shape of every tensor of a safetensors file, from its header; no tensor is read.

    safetensors itself checks that the header fits into the file, that its JSON is valid, and that the tensors fill the
    file exactly, without gaps or overlaps.

    Raises:
        ValueError: the header is damaged or repeats a name.
    """
    with _opened(path) as f, path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        json.loads(file.read(length), object_pairs_hook=_once)
        return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (not a dict)


def read_tensors(path: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a safetensors file, memory-mapped; only those in `names` if given."""
    with _opened(path) as f:
        for name in sorted(f.keys()):
            if names is None or name in names:
                yield name, f.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    errors = OSError, SafetensorError, ValueError  # not for want of memory
    damaged = refusing(f"{path}: damaged or missing weights", "copy or download the file again", errors)
    with damaged, safe_open(path, framework="pt") as f:
        yield f


def weight_shapes(folder: Path) -> Shapes:
    """Name -> shape of every weight of a model folder.

    Raises:
        ValueError: as `weight_files` and `tensor_shapes`, or two files contain a weight of the same name.
    """
    shapes: Shapes = {}
    for path in weight_files(folder):
        new = tensor_shapes(path)
        if twice := shapes.keys() & new.keys():
            raise ValueError(f"{path}: weight {shown(min(twice))} is in another file too; copy the model again")
        shapes |= new
    return shapes


def unusable(tensor: torch.Tensor) -> str:
    """Why a tensor can't be a weight: "is stored as int64, ...", "holds NaN or infinite values"; "" if it can."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"is stored as {str(tensor.dtype).removeprefix('torch.')}, expected fp16, bf16 or fp32"
    # NaN is its own minimum
    return "" if torch.stack(tensor.aminmax()).isfinite().all() else "holds NaN or infinite values"


class PackedWeights:
    """The weights that bitsandbytes has packed into 4 bits, and the parts in which a file holds one:

        NAME                  the packed bytes                  NAME.nested_absmax     the scales of absmax, if it is
        NAME.absmax           the scales of its blocks          NAME.nested_quant_map  quantised again, and its levels
        NAME.quant_map        the 16 levels                     NAME.quant_state.bitsandbytes__nf4 (or fp4): JSON

    Attributes:
        owner: part -> NAME. quantization: "nf4" or "fp4", "" if there are none.
    """

    PART = re.compile(r"(.+)\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(nf4|fp4))")

    def __init__(self, names: Iterable[str]):
        found = [match for name in names if (match := self.PART.fullmatch(name))]
        types = {match[1]: match[2] for match in found if match[2]}
        self.owner = {match[0]: match[1] for match in found if match[1] in types} | {name: name for name in types}
        self.quantization = " and ".join(sorted(set(types.values())))
        self._parts, self._read = Counter(self.owner.values()), defaultdict(dict)

    def agree(self, model: str, quantization: str | None) -> str:
        """The quantization of a model: as asked for, else as stored. Raises ValueError if it is stored in another."""
        if self.quantization and quantization not in (None, self.quantization):
            raise ValueError(
                f"model '{model}' is stored in {self.quantization} and has no other weights: --quantization "
                f"{quantization} and --base original are not possible; give --quantization {self.quantization}, or "
                "train on the unquantised model"
            )
        return quantization or self.quantization or "none"

    def add(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor | dict[str, torch.Tensor]] | None:
        """Take a tensor; returns (name, tensor). For packed weights: None, and with the last part (NAME, its parts)."""
        owner = self.owner.get(name)
        if owner is None:
            return name, tensor
        self._read[owner][name] = tensor
        return (owner, self._read.pop(owner)) if len(self._read[owner]) == self._parts[owner] else None


def expected_weights(name: str, model: Any, stored: Shapes, packed: PackedWeights) -> dict[str, str]:
    """The weights to load, checked against those stored: name in the file -> name in the model, where transformers may
    call it otherwise. Parts of packed weights are not among them, and their shapes are not checked.

    Args:
        name: of the model, for messages. model: on the meta device. stored: name -> shape.

    Raises:
        ValueError: a weight is missing, unexpected or of the wrong shape, or transformers would compute it from those
            stored.
    """
    weights, kind, tied, names = model.state_dict(), model.config.model_type, model.all_tied_weights_keys, {}
    conversions = get_model_conversion_mapping(model)
    computed = [c for c in conversions if isinstance(c, WeightConverter)]
    renamed = [c for c in conversions if not isinstance(c, WeightConverter)]
    unused = re.compile("|".join([r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]))
    for key, shape in stored.items():
        if packed.owner.get(key, key) != key:
            continue
        own, computed_by = rename_source_key(key, renamed, computed, model.base_model_prefix, weights)
        if computed_by:
            raise ValueError(
                f"model '{name}': {kind} is not supported, since transformers puts its weights together from those "
                f"that are stored, such as {shown(key)}"
            )
        if own in weights and key not in packed.owner and shape != tuple(weights[own].shape):
            raise ValueError(f"weight '{key}' has shape {shape}, expected {tuple(weights[own].shape)}")
        if own in names:
            raise ValueError(f"model '{name}': {shown(key)} and {shown(names[own])} are one weight, stored twice")
        if own in weights:
            names[own] = key
        elif not unused.search(key):
            raise ValueError(f"model '{name}': unexpected weight {shown(key)} for a {kind} model")
    if lost := sorted(weights.keys() - names.keys() - tied.keys()):
        raise ValueError(f"model '{name}': {len(lost)} weights are missing, among them '{lost[0]}'")
    return {key: own for own, key in names.items() if own not in tied}


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every weight of a model folder, one in memory at a time."""
    for path in weight_files(folder):
        yield from read_tensors(path)


def materialise_buffers(model: Any, device: torch.device) -> None:
    """Give buffers that no checkpoint stores (rotary frequencies) their values; parameters stay on meta.

    `_init_weights` is the hook by which every transformers model computes them; on meta parameters it does nothing.
    """
    for module in model.modules():
        if any(b.is_meta for b in module._buffers.values() if b is not None):
            for key, buffer in module._buffers.items():
                module._buffers[key] = torch.empty_like(buffer, device=device)
            model._init_weights(module)


class Fingerprint:
    """The sha256 of a model's architecture and its weights as stored on disk, added one at a time."""

    # Numbers and names only: derived values differ between versions of transformers.
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


def read_exactly(path: Path, expected: Shapes, prefix: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Read a file that should contain exactly the expected tensors, with finite values.

    Args:
        expected: name -> shape. prefix: a prefix of the names, omitted in messages.

    Returns:
        name -> tensor, and a list of what is wrong with the file. Tensors of another name or shape are never read.
    """

    def named(key: str) -> str:
        return key.removeprefix(prefix).removesuffix(".weight")

    shapes = tensor_shapes(path)
    wrong = [f"missing {named(k)}" for k in expected if k not in shapes]
    stray = sorted(map(named, shapes.keys() - expected.keys()))
    wrong += [f"unexpected {clipped(n, 80)}" for n in stray[:3]]
    wrong += [f"unexpected: {len(stray) - 3:,} more"] if len(stray) > 3 else []
    fitting = {k for k, shape in expected.items() if shapes.get(k) == shape}
    for key in shapes.keys() & expected.keys() - fitting:
        wrong.append(f"{named(key)} of shape {clipped(shapes[key], 40)}, expected {expected[key]}")
    stored = dict(read_tensors(path, fitting))
    wrong += [f"{named(key)} {why}" for key, tensor in stored.items() if (why := unusable(tensor))]
    return stored, wrong
