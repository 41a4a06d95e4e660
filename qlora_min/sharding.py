"""A base larger than a GPU: N ranks keep 1/N of its frozen weights each, by torch's FSDP2 (`fully_shard`).

What is shared out are the weights of the decoder's linear layers (4-bit ones as the bytes that bitsandbytes packed),
the embedding and the head. A matrix is gathered where it is needed and let go of behind it; embedding and head in
slices of rows, so that no rank ever holds one of them whole. W is frozen: nothing of it is ever reduced, saved or
stepped. Whole on each rank stay the scales of the 4-bit weights (1/32 of them), norms, biases, and all that trains.

Two things of bitsandbytes' parameters FSDP2 does not take as they are. Bytes: up to torch 2.11 at least it makes every
parameter one that could have a gradient, and so none of integers; two bytes pass for one bf16 here, which is never
computed with. And quant_state is lost, but the layer has it still (`Linear4bit.quant_state`, put back by its forward),
and `model.dequantized_weight` reads it there. FSDP's hooks gather for the modules' own forward, as transformers'
`generate` runs it; `gathered` does so for decoder.py, which calls no module.

Gathering is a collective: every rank must come to the same ones in the same order. So all ranks compute as many
micro-batches a step, with as many slices of logits (`Trainer._in_step`), and the same evaluations and samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from .distributed import size

SLICE = 2**26  # bytes of the embedding or the head that are gathered at a time


class Sliced(nn.Module):
    """A matrix (V, D) as slices of its rows, modules with a weight each."""

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


def _cut(weight: Tensor) -> nn.ModuleList:
    rows = max(size(), SLICE // (weight.shape[1] * weight.element_size()))
    parts = nn.ModuleList(nn.Module() for _ in range(0, len(weight), rows))
    for part, rows_of_it in zip(parts, weight.split(rows)):
        part.weight = nn.Parameter(rows_of_it.clone(), requires_grad=False)
    return parts


def slices(module: nn.Module) -> Iterator[Tensor]:
    """A matrix (V, D) by slices of its rows, each there until the next is asked for; of a module that has none, all."""
    for part in getattr(module, "parts", [module]):
        with gathered(part):
            yield part.weight


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A module's own share of the base is whole within this context."""
    shared = hasattr(module, "unshard")  # made by fully_shard
    if shared:
        module.unshard()
    try:
        yield
    finally:
        if shared:
            module.reshard()


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Share out the weights of linear layers, embedding and head over all ranks; this rank's part goes to its device.

    They may be on the CPU until then, so that no GPU holds more than a matrix beside its own part.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size(),))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = _cut(embedding.weight.data)
    rows_of_head = rows if head.weight is embedding.weight else _cut(head.weight.data)
    model.set_input_embeddings(SlicedEmbedding(rows))
    model.set_output_embeddings(SlicedHead(rows_of_head))
    linears = [m for m in model.get_decoder().layers.modules() if isinstance(m, nn.Linear)]
    for module in linears:
        if module.weight.dtype == torch.uint8:  # (bytes, 1) -> (bytes / 2, 1)
            packed = module.weight.data.as_subclass(Tensor).flatten().view(torch.bfloat16)[:, None]
            module.weight = nn.Parameter(packed, requires_grad=False)
    for module in dict.fromkeys([*rows, *rows_of_head, *linears]):
        whole = {p for p in module.parameters() if p is not module.weight}
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether a model's weights are shared out."""
    return any(hasattr(m, "unshard") for m in model.get_decoder().layers[0].modules())


def kept(tensor: Tensor) -> int:
    """Bytes that this rank holds of a tensor."""
    mine = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return mine.numel() * mine.element_size()
