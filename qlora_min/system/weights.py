"""Weights in safetensors files, which may be hostile: names and shapes are checked before anything is allocated."""

import hashlib
import json
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .files import _once, read_json
from .text import clipped, shown


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order.

    Raises:
        ValueError: there are none, or the index is unreadable or names a file that is missing or outside the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
            elsewhere = [n for n in names if Path(n).name != n or "\0" in n or not 1 <= len(n) <= 255]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{index}: no readable index of weights; copy or download the model again") from None
        if elsewhere:
            raise ValueError(f"{index}: names {shown(elsewhere[0])}; expected files beside the index")
        if lost := [n for n in names if not (folder / n).is_file()]:
            raise ValueError(
                f"model '{folder}': {clipped(', '.join(lost))} is missing; copy or download the model again"
            )
        return [folder / n for n in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ValueError(f"model '{folder}': no model.safetensors; expected weights in the safetensors format")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file, from its header; no tensor is read.

    safetensors itself checks that the header fits into the file, that its JSON is valid, and that the tensors fill the
    file exactly, without gaps or overlaps.

    Raises:
        ValueError: the header is damaged or repeats a name, or a tensor is not fp16, bf16, fp32 or fp64.
    """
    shapes = {}
    with _opened(path) as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            part = f.get_slice(name)
            if part.get_dtype() not in ("F16", "BF16", "F32", "F64"):
                raise ValueError(f"{shown(name)} is stored as {part.get_dtype()}, expected fp16, bf16 or fp32")
            shapes[name] = tuple(part.get_shape())
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            json.loads(file.read(length), object_pairs_hook=_once)
    return shapes


def read_tensors(path: Path, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of a safetensors file, memory-mapped; only those in `names` if given."""
    with _opened(path) as f:
        for name in sorted(f.keys()):
            if names is None or name in names:
                yield name, f.get_tensor(name)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (OSError, SafetensorError, ValueError) as e:
        raise ValueError(
            f"{path}: damaged or missing weights ({clipped(e)}); copy or download the file again"
        ) from None


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a model folder.

    Raises:
        ValueError: as `weight_files` and `tensor_shapes`, or two files contain a weight of the same name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        new = tensor_shapes(path)
        if twice := shapes.keys() & new.keys():
            raise ValueError(f"{path}: weight {shown(min(twice))} is in another file too; copy the model again")
        shapes |= new
    return shapes


def expected_weights(name: str, model: Any, stored: dict[str, tuple[int, ...]]) -> set[str]:
    """The names of the weights to load, checked against those stored.

    Args:
        name: of the model, for messages. model: on the meta device. stored: name -> shape.

    Raises:
        ValueError: a weight is missing, unexpected or of the wrong shape.
    """
    weights = model.state_dict()
    expected = set(weights) - set(model._tied_weights_keys or () if model.config.tie_word_embeddings else ())
    for key, shape in stored.items():
        if key in expected and shape != tuple(weights[key].shape):
            raise ValueError(f"weight '{key}' has shape {shape}, expected {tuple(weights[key].shape)}")
        # Unused: the copy of a tied weight, and a buffer that the model computes.
        if key not in weights and not key.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"model '{name}': unexpected weight {shown(key)} for a {model.config.model_type} model")
    if lost := sorted(expected - stored.keys()):
        raise ValueError(f"model '{name}': {len(lost)} weights are missing, among them '{lost[0]}'")
    return expected


def read_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of every weight of a model folder, one in memory at a time."""
    for path in weight_files(folder):
        yield from read_tensors(path)


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


def read_exactly(
    path: Path, expected: Mapping[str, tuple[int, ...]], prefix: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
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
    wrong += [f"{named(k)} holds NaN or infinite values" for k, t in stored.items() if not t.isfinite().all()]
    return stored, wrong
