"""A base larger than one GPU: each of N processes keeps 1/N of the frozen weights.

The weights of the decoder's linear layers (4-bit ones as the bytes that bitsandbytes packed), the embedding and the
head are sharded. Before a layer computes, its bytes are gathered into one buffer that all layers share. The embedding
and the head are gathered in slices of rows, so that no process ever holds one of them whole. W is frozen, so it is
never reduced, updated or saved: an all-gather by NCCL (gloo on CPUs) is the only collective needed. The scales of the
4-bit weights (1/32 of their size), norms, biases and all trainable weights are replicated.

    layer.shard                    this process's part of the layer's bytes
    layer.whole                    the buffer, which holds the layer's bytes after unshard(layer)
    layer.self_attn.q_proj.weight  a view of the buffer

torch's FSDP2 (`fully_shard`) does the same for layers that train. In torch 2.11 it rejects uint8 parameters ("only
Tensors of floating point dtype can require gradients"; later versions accept them). With the bytes viewed as bf16,
training on CPUs is bit-identical, but on GPUs the bytes came back changed, and each gather costs too much host time.

An all-gather is a collective: all processes must call the same ones in the same order. So all of them compute the same
number of micro-batches a step, with the same number of supervised positions (`feed.Feed`), and the same evaluations and
samples.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .processes import all_gather, process_index, world_size

SLICE = 2**26  # bytes of the embedding or the head to gather at a time


class Sliced(nn.Module):
    """A matrix (V, D) split into slices of rows: one module with a `weight` for each slice."""

    def __init__(self, parts: nn.ModuleList):
        super().__init__()
        self.parts = parts


class SlicedEmbedding(Sliced):
    """(...) ids -> (..., D)."""

    def forward(self, ids: Tensor) -> Tensor:
        out, start = None, 0
        for weight in slices(self):
            rows = F.embedding((ids - start).clamp(0, len(weight) - 1), weight)
            here = (ids >= start) & (ids < start + len(weight))
            out = rows if out is None else torch.where(here[..., None], rows, out)
            start += len(weight)
        return out


class SlicedHead(Sliced):
    """(..., D) -> (..., V)."""

    bias = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, weight) for weight in slices(self)], -1)


def slices(module: nn.Module) -> Iterator[Tensor]:
    """Yield a matrix (V, D) in slices of rows, each valid until the next is yielded; one slice without --shard."""
    for part in getattr(module, "parts", [module]):
        unshard(part)
        yield part.weight


def unshard(module: nn.Module) -> None:
    """Gather the weights of a layer or a slice, valid until the next gather. Without --shard, do nothing."""
    if hasattr(module, "shard"):
        wait = module.__dict__.pop("arriving", None) or all_gather(module.whole, module.shard)
        wait()


def prefetch(module: nn.Module) -> None:
    """Start to gather the weights of a layer, for which `unshard` then waits; they overwrite those of the last one."""
    if hasattr(module, "shard"):
        module.arriving = all_gather(module.whole, module.shard)


def shard(model: PreTrainedModel, device: torch.device, layers: nn.ModuleList) -> None:
    """Shard the weights of linear layers, embedding and head, and move this process's part to its device.

    The weights should be on the CPU before, so that no GPU ever holds more than its part.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = _cut(embedding.weight.data)
    rows_of_head = rows if head.weight is embedding.weight else _cut(head.weight.data)
    model.set_input_embeddings(SlicedEmbedding(rows))
    model.set_output_embeddings(SlicedHead(rows_of_head))
    owners = {part: [part] for part in [*rows, *rows_of_head]}
    owners |= {layer: [m for m in layer.modules() if isinstance(m, nn.Linear)] for layer in layers}
    for module, linears in owners.items():
        module.register_buffer("shard", _part([m.weight.data for m in linears]).to(device), persistent=False)
    buffer = torch.empty(max(len(m.shard) for m in owners) * world_size(), dtype=torch.uint8, device=device)
    for module, linears in owners.items():
        module.whole = buffer[: len(module.shard) * world_size()]
        sizes = [m.weight.nbytes for m in linears]
        for m, part in zip(linears, buffer[: sum(sizes)].split(sizes)):
            m.weight.data = part.view(m.weight.dtype).view(m.weight.shape)
    # For the modules' own forward, which `generate` calls; fused/decoder.py calls `unshard` itself.
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, _: unshard(layer))


def _cut(weight: Tensor) -> nn.ModuleList:
    """Split a matrix into slices of about SLICE bytes: a multiple of 64 rows, for which matrix products are fastest."""
    rows = 64 * max(1, SLICE // (64 * weight.shape[1] * weight.element_size()))
    parts = nn.ModuleList(nn.Module() for _ in range(0, len(weight), rows))
    for part, rows_of_it in zip(parts, weight.split(rows)):
        part.weight = nn.Parameter(rows_of_it, requires_grad=False)
    return parts


def _part(weights: Sequence[Tensor]) -> Tensor:
    """This process's part of the concatenated bytes of `weights`. All parts have the same length, by padding."""
    flat = torch.cat([w.contiguous().flatten().view(torch.uint8) for w in weights])
    each = -(-len(flat) // (16 * world_size())) * 16
    return F.pad(flat, (0, each * world_size() - len(flat))).view(-1, each)[process_index()].clone()
