"""CUDA graphs: forward and backward of a micro-batch in a single launch, for either engine.

A step of a small model takes tens of thousands of kernel launches, and each costs the CPU more time than the GPU. A
graph takes one. A graph replays the same kernels on the same addresses, so each batch is copied to the graph's inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..batches import Packed, pack
from ..engine import Engine
from ..lora import lora_layers
from ..system.console import say
from ..system.device import is_out_of_memory
from ..system.text import clipped


def round_up(n_supervised: int, n_tokens: int) -> int:
    """The number of supervised positions to pad a batch to, so that shapes repeat: a power of 2, at least 64, but no
    more than the batch has tokens."""
    return min(2 ** max(6, (n_supervised - 1).bit_length()), n_tokens)


def shape(batch: Packed) -> tuple[int, ...]:
    """(N, S, R + 1, max_seqlen): batches of equal shape can be computed by the same graph."""
    return len(batch.input_ids), len(batch.targets), len(batch.cu_seqlens), batch.max_seqlen


class Captured(Engine):
    """An engine on a GPU whose `loss_and_gradients` and `hidden_states` take one launch each, for batches on the CPU.

    There is one CUDA graph for each shape of a batch and each set of enabled LoRA layers. All graphs share one memory
    pool, since only one is replayed at a time. The next call overwrites the returned tensor. A model whose forward
    reads a value back from the device can't be captured: it is computed without graphs, and a note says so.

    Args:
        grain: batches are padded to a multiple of `grain` tokens, and to a fixed number of rows, so that few shapes
            occur.
    """

    def __init__(self, engine: Engine, max_seqlen: int, grain: int = 256):
        self.engine, self.grain, self.max_seqlen, device = engine, grain, max(max_seqlen, grain), engine.device
        self.base, self.adapter, self.logits, self.device = engine.base, engine.adapter, engine.logits, device
        self.loras = list(lora_layers(engine.base.model).values())
        self.stream = torch.cuda.Stream(device)
        self.factor = torch.zeros((), device=device)
        self.seed = torch.zeros((), dtype=torch.int32, device=device)
        self.loss = torch.zeros((), device=device)
        self.failed = False  # True once the model has turned out not to be capturable
        self.release()

    def release(self) -> None:
        """Drop all graphs and their memory."""
        self.graphs: dict[tuple, tuple[Packed, torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def pack(self, rows, row_ids=None, n_rows: int = 0, n_supervised: int | None = None) -> Packed:
        """As `Engine.pack`; the batch stays on the CPU."""
        n_tokens = -(-sum(map(len, rows)) // self.grain) * self.grain
        n_supervised = round_up(sum(r.n_supervised for r in rows), n_tokens)
        return pack(rows, row_ids, n_tokens, n_supervised, n_rows, self.max_seqlen)

    def loss_and_gradients(self, batch: Packed, factor: Tensor, seed: Tensor) -> Tensor:
        """As `Engine.loss_and_gradients`."""
        self.factor.copy_(factor, non_blocking=True)
        self.seed.copy_(seed, non_blocking=True)

        def compute(mine: Packed) -> Tensor:
            return self.loss.copy_(self.engine.loss_and_gradients(mine, self.factor, self.seed))

        return self._replay("train", compute, batch)

    def hidden_states(self, batch: Packed) -> Tensor:
        """As `Engine.hidden_states`."""
        return self._replay("evaluate", self.engine.hidden_states, batch)

    def _replay(self, kind: str, compute: Callable[[Packed], Tensor], batch: Packed) -> Tensor:
        key = (kind, *shape(batch), tuple(m.enabled for m in self.loras))
        if key not in self.graphs and not self.failed:
            try:
                self._capture(key, compute, batch)
            except RuntimeError as e:
                self.failed = not is_out_of_memory(e)
                if self.failed:
                    say(f"note: computed without CUDA graphs: this model can't be captured ({clipped(e)})")
                elif not self.graphs:
                    raise
        if self.failed:
            return compute(batch.to(self.device))
        if key not in self.graphs:  # out of memory: drop the other graphs, whose blocks may be too small to reuse
            self.release()
            torch.cuda.empty_cache()
            self._capture(key, compute, batch)
        mine, graph, result = self.graphs[key]
        for ours, theirs in zip(vars(mine).values(), vars(batch).values()):
            if isinstance(ours, Tensor):
                ours.copy_(theirs, non_blocking=True)
        graph.replay()
        return result

    def _capture(self, key: tuple, compute: Callable[[Packed], Tensor], batch: Packed) -> None:
        mine = batch.to(self.device)
        if not any(k[0] == key[0] for k in self.graphs):
            self._try(compute, mine)
        torch.cuda.synchronize()
        graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # NCCL's own thread may query the device meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
            result = compute(mine)
        self.graphs[key] = mine, graph, result

    def _try(self, compute: Callable[[Packed], Tensor], mine: Packed) -> None:
        """Compute once before the first capture, so that kernels are compiled and cuBLAS allocates its workspace.

        The gradients are restored afterwards.
        """
        grads = self.adapter.grads.clone()
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(self.stream):
                compute(mine)
        finally:
            torch.cuda.synchronize()
            self.adapter.grads.copy_(grads)
