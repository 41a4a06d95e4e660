"""What computes: forward and backward of a packed micro-batch.

An engine has `loss_and_gradients(batch, factor, seed)`, `hidden_states(batch)`, `logits(hidden)` and `pack(rows)`.
There are two, which compute the same:

    modules   the model's own modules, LoRALinear and autograd: this file, and every family of transformers
    fused     forward and backward by hand, with kernels, for Llama-shaped models: decoder.py

transformers lets an attention function be registered by name: `packed_attention` keeps packed rows apart, so most of
the library's decoders compute on packed rows with nothing written for them. Which do is found by trying: rows packed
and rows apart must give the same hidden states. A model whose rows mix is computed a row at a time.

`Captured` makes one CUDA graph of a micro-batch's forward and backward, by either engine. A step of a small model is
tens of thousands of launches, each of which costs the CPU more time than the GPU; a graph is one.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
import torch.utils.deterministic
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from . import ops
from .batches import Packed, pack, round_up
from .config import clipped
from .data import Row
from .lora import FlatLoRA, lora_layers
from .loss import masked_loss
from .memory import is_out_of_memory
from .model import Base, autocast, decoder_layers, output_head
from .report import say
from .sharding import is_sharded

PACKED = "qlora_min_packed"  # our attention function's name in transformers
# Arguments that change nothing here: causal attention, no cache, no other outputs asked for.
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal",
            "cu_seq_lens_k", "max_length_k", "return_dict"}  # fmt: skip


class Engine:
    """What computes packed rows: what `Modules` and `fused`'s Decoder have in common."""

    base: Base
    device: torch.device
    adapter: FlatLoRA
    checkpointing: bool  # keep only each layer's input for the backward pass
    graphs: bool  # whether it can be captured
    buffers: Sequence[Tensor]  # what it holds besides the model and the adapter

    def loss_and_gradients(self, batch: Packed, factor: Tensor, seed: Tensor) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            factor: 0-dim fp32; the gradients are those of factor * the summed loss (loss scale / supervised tokens).
            seed: 0-dim int32, of the optimizer step's dropout.

        Returns:
            0-dim fp32, the sum of the supervised tokens' losses; its gradients, times factor, are added to
            `adapter.grads`.
        """

    def hidden_states(self, batch: Packed) -> Tensor:
        """(N, D): the decoder's output before the head, without dropout."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(S, D) -> (S, V) in fp32."""

    def pack(self, rows: Sequence[Row], places=None, count: int = 0, supervised: int | None = None) -> Packed:
        """Rows as a batch on the device, padded to `supervised` positions; where shapes must repeat, to `count` rows
        and more (`Captured`). See `batches.pack`."""
        return pack(rows, places, supervised=supervised).to(self.device)


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None = None, window: int = 0
) -> Tensor:
    """Causal attention within each row: q (N, H, P), k and v (N, K, P) with H a multiple of K -> (N, H, P).

    On a GPU PyTorch's flash attention, or its memory-efficient one for fp32 and for GPUs before Ampere; both take
    packed rows. On a CPU one row after the other.

    Args:
        longest: an upper bound of the rows' lengths. scale: of the scores; 1 / sqrt(P) if not given.
        window: how many tokens a token sees, itself included; 0: all before it.
    """
    if q.is_cuda:
        return _Attention.apply(q, k, v, cu_seqlens, longest, scale, window)
    rows = zip(*(t.split(cu_seqlens.diff().tolist()) for t in (q, k, v)))  # whose backward is one concatenation each
    out = []
    for row in rows:
        n, mask = len(row[0]), None
        if window and n > window:
            mask = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - window)
        if n:
            heads = (t.transpose(0, 1)[None] for t in row)  # (1, H or K, n, P)
            out.append(F.scaled_dot_product_attention(
                *heads, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)[0].transpose(0, 1)
            )  # fmt: skip
    return torch.cat(out)


class _Attention(torch.autograd.Function):
    """PyTorch's attention kernels for packed rows on a GPU. Their registered derivatives do not all take windows, so
    the backward kernels are called here."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int, scale, window: int) -> Tensor:
        aten, recent = torch.ops.aten, torch.cuda.get_device_capability(q.device)[0] >= 8
        ctx.flash = q.dtype != torch.float32 and recent and q.shape[-1] <= 256
        windows = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
        ctx.arguments = longest, scale, window, windows
        if ctx.flash:
            out, *kept, _ = aten._flash_attention_forward(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False, scale=scale, **windows
            )
        else:
            kk, vv = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1)[None] for t in (k, v))
            out, *kept, _, _ = aten._efficient_attention_forward(
                q[None], kk, vv, None, cu_seqlens, cu_seqlens, longest, longest, 0.0, 1, True, scale=scale,
                window_size=window or None,
            )  # fmt: skip
            out = out[0]
        ctx.save_for_backward(q, k, v, cu_seqlens, out, *kept)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple:
        aten, (q, k, v, cu_seqlens, out, *kept) = torch.ops.aten, ctx.saved_tensors
        longest, scale, window, windows = ctx.arguments
        with _deterministic():
            if ctx.flash:
                logsumexp, *state = kept
                grads = aten._flash_attention_backward(
                    dout.contiguous(), q, k, v, out, logsumexp, cu_seqlens, cu_seqlens, longest, longest, 0.0, True,
                    *state, scale=scale, **windows,
                )  # fmt: skip
            else:
                groups = q.shape[1] // k.shape[1]
                kk, vv = (t.repeat_interleave(groups, dim=1)[None] for t in (k, v))
                dq, dk, dv, _ = aten._efficient_attention_backward(
                    dout.contiguous()[None], q[None], kk, vv, None, out[None], cu_seqlens, cu_seqlens, longest, longest,
                    kept[0], 0.0, *kept[1:], 1, False, scale=scale, window_size=window or None,
                )  # fmt: skip
                grads = dq[0], *(d[0].unflatten(1, (k.shape[1], groups)).sum(2) for d in (dk, dv))
        return *grads, None, None, None, None


@contextmanager
def _deterministic() -> Iterator[None]:
    """Flash attention's backward sums in any order unless asked not to; then the same step is the same bits."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None, **more: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`attention` as transformers calls it: query (1, H, N, P), key and value (1, K, N, P) -> (1, N, H, P).

    Raises:
        NotImplementedError: the model asks for more than it does (`softcap`, `s_aux`), or hands no `cu_seq_lens_q` on.
    """
    more = {k: v for k, v in more.items() if k not in HARMLESS and v is not None}
    if more or dropout or attention_mask is not None:
        raise NotImplementedError(f"its attention takes {', '.join(sorted(more)) or 'a mask or dropout'}")
    if cu_seq_lens_q is None:
        raise NotImplementedError("it does not tell its attention where rows end")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    q, k, v = (t[0].transpose(0, 1).to(dtype) for t in (query, key, value))  # (N, H, P)
    return attention(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window or 0)[None], None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


# ---------------------------------------------------------------------------------------------------------------------
# The model's own modules
# ---------------------------------------------------------------------------------------------------------------------


class Modules(Engine):
    """The transformers modules of a base with its LoRA layers, by autograd, under autocast.

    Attributes:
        mixing: why rows would mix if they were packed, in words, and so are computed one at a time; "" if they don't.

    Raises:
        ValueError: the model's logits are not what its head makes of its hidden states, in any way known here.
    """

    def __init__(self, base: Base, longest: int):
        self.base, self.checkpointing, self.buffers = base, False, ()
        self.decoder, self.head = base.model.get_decoder(), output_head(base.model)
        self.device = self.head.weight.device
        self.adapter = FlatLoRA(base.model, self.device)
        self.loras = list(lora_layers(base.model).values())
        base.model.eval()  # the base's own dropout is off: it is frozen
        if self.device.type == "cuda":
            tokens = torch.arange(8, device=self.device)
            x = torch.ones(8, 64, dtype=base.dtype, device=self.device)
            ops.try_kernels({"dropout": (x, 0.1, ops.dropout_keys(tokens[3].int(), tokens, tokens), 1)}, base.dtype)
        self._checkpoint_layers()
        self.mixing = ""
        self.mixing = self._try(longest)
        self.graphs = not self.mixing

    @torch.no_grad()
    def _try(self, longest: int) -> str:
        """Do packed rows give what each gives by itself, through the model's own forward and attention?"""
        generator, vocabulary = torch.Generator().manual_seed(0), self.head.weight.shape[0]
        rows = []
        for length in (3, longest, 2 + longest // 3):  # beyond any window or rotary limit that a row can reach
            ids = torch.randint(vocabulary, (length,), generator=generator, dtype=torch.int32)
            rows.append(Row(ids, torch.arange(length) > 0, ""))
        bound = 1e-3 if self.base.dtype == torch.float32 else 0.2  # of a token; the rounding of 16 bits adds up
        batch, own = pack(rows).to(self.device), []
        for row in rows:
            with autocast(self.device, self.base.dtype):
                states = self.decoder(input_ids=row.ids.long()[None].to(self.device), use_cache=False)
                own.append(states.last_hidden_state[0].float())
        with autocast(self.device, self.base.dtype):
            reference = self.base.model(input_ids=rows[0].ids.long()[None].to(self.device), use_cache=False)
        if not all(states.isfinite().all() for states in own):
            raise ValueError(
                f"model '{self.base.name}': its hidden states overflow {str(self.base.dtype).removeprefix('torch.')}; "
                "use --precision fp32, or bf16 where the GPU has it"
            )
        if _distance(self.logits(own[0]), reference.logits[0].float()) > min(bound, 1e-2):
            raise ValueError(
                f"model '{self.base.name}': {self.base.model.config.model_type} changes its logits in a way that is "
                "not implemented"
            )
        try:
            packed = self.hidden_states(batch).float()
        except Exception as e:  # models that know no packed rows fail in all ways
            if is_out_of_memory(e):
                raise
            return str(e) if type(e) is NotImplementedError else f"it takes no packed rows ({clipped(e, 80)})"
        return "packed rows would mix" if _distance(packed, torch.cat(own)) > bound else ""

    def _checkpoint_layers(self) -> None:
        """With `checkpointing` keep each layer's input only, and run the layer again in the backward pass.

        No random state is kept: dropout draws the same mask again by itself.
        """
        for layer in decoder_layers(self.base.model):
            # The class's own forward, in case another engine of this base has wrapped it.
            plain = functools.partial(type(layer).forward, layer)

            def forward(*args, inner=plain, **kwargs):
                if self.checkpointing and torch.is_grad_enabled():
                    return torch.utils.checkpoint.checkpoint(
                        inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
                    )
                return inner(*args, **kwargs)

            layer.forward = forward

    @torch.no_grad()
    def hidden_states(self, batch: Packed) -> Tensor:
        """As `Engine.hidden_states`."""
        with self._computing(None):
            return torch.cat([self._forward(part) for part in self._parts(batch)])

    def loss_and_gradients(self, batch: Packed, factor: Tensor, seed: Tensor) -> Tensor:
        """As `Engine.loss_and_gradients`."""
        total = torch.zeros((), device=self.device)
        for part in self._parts(batch):
            keys = ops.dropout_keys(seed, part.row_ids, part.position_ids)
            with self._computing(keys), torch.enable_grad():
                hidden = self._forward(part)[part.loss_positions]  # (N, D) -> (S, D)
                loss, gradient = masked_loss(hidden, self.logits, part.targets, part.loss_weights, factor)
                if hidden.requires_grad:
                    hidden.backward(gradient)
            total += loss
        return total

    def _parts(self, batch: Packed) -> list[Packed]:
        """What is computed at a time: all of it, or one row after the other where they would mix."""
        return [batch.select(a, b) for a, b in batch.spans()] if self.mixing else [batch]

    def _forward(self, batch: Packed) -> Tensor:
        """(N, D), within `_computing`."""
        lengths = {
            "position_ids": batch.position_ids[None],
            "cu_seq_lens_q": batch.cu_seqlens,
            "max_length_q": batch.max_seqlen,
        }
        with autocast(self.device, self.base.dtype):
            return self.decoder(
                input_ids=batch.input_ids[None], use_cache=False, **({} if self.mixing else lengths)
            ).last_hidden_state[0]

    @contextmanager
    def _computing(self, keys: Tensor | None) -> Iterator[None]:
        """Forward and backward pass, in which a checkpointed layer is computed again: with our attention, unless rows
        would mix, and with dropout, by these keys."""
        config = self.decoder.config
        before = config._attn_implementation
        config._attn_implementation = before if self.mixing else PACKED
        for layer in self.loras:
            layer.dropout.training, layer.dropout.tokens.keys = keys is not None, keys
        try:
            yield
        finally:
            config._attn_implementation = before
            for layer in self.loras:
                layer.dropout.training, layer.dropout.tokens.keys = False, None

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Engine.logits`, with what some families do to them behind the head."""
        config = self.base.model.config
        with autocast(self.device, self.base.dtype):
            logits = self.head(hidden).float()
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scale
        for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma 2, RecurrentGemma
            if (cap := getattr(config, name, None)) is not None:
                logits = cap * torch.tanh(logits / cap)
        return logits


def _distance(mine: Tensor, reference: Tensor) -> float:
    """The largest relative distance of a token's vector: (N, D), (N, D). Infinite where one is not finite."""
    error = ((mine - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-6)).max().item()
    return error if error == error else float("inf")


# ---------------------------------------------------------------------------------------------------------------------
# CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


class Captured:
    """An engine's `loss_and_gradients` and `hidden_states` on a GPU as one launch each, for batches on the CPU.

    There is one CUDA graph for each shape of a batch and each set of enabled LoRA layers. All graphs share one memory
    pool: they run one after the other. What is returned is overwritten by the next call. A model whose forward asks the
    device for a value can't be captured: it is computed without graphs, and a note says so.

    Args:
        grain: batches are padded to a multiple of so many tokens, and to R rows, so that there are few shapes.
    """

    def __init__(self, engine: Engine, longest: int, grain: int = 256):
        self.engine, self.grain, self.longest, device = engine, grain, max(longest, grain), engine.device
        self.base, self.adapter, self.logits, self.device = engine.base, engine.adapter, engine.logits, device
        self.loras = list(lora_layers(engine.base.model).values())
        self.stream = torch.cuda.Stream(device)
        self.factor = torch.zeros((), device=device)
        self.seed = torch.zeros((), dtype=torch.int32, device=device)
        self.loss = torch.zeros((), device=device)
        self.failed = False  # whether the model can't be captured
        self.release()

    def release(self) -> None:
        """Forget all graphs, with their memory."""
        self.graphs: dict[tuple, tuple[Packed, torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def pack(self, rows, places=None, count: int = 0, supervised: int | None = None) -> Packed:
        """As `Engine.pack`."""
        tokens = -(-sum(map(len, rows)) // self.grain) * self.grain
        return pack(rows, places, tokens, round_up(sum(r.n_supervised for r in rows)), count, self.longest)

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
        key = (kind, *batch.shape, tuple(m.enabled for m in self.loras))
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
        if key not in self.graphs:  # smaller graphs' blocks may be in the way
            self.release()
            torch.cuda.empty_cache()
            self._capture(key, compute, batch)
        mine, graph, result = self.graphs[key]
        mine.copy_(batch)
        graph.replay()
        return result

    def _capture(self, key: tuple, compute: Callable[[Packed], Tensor], batch: Packed) -> None:
        mine = batch.to(self.device)
        if not any(k[0] == key[0] for k in self.graphs):
            self._try(compute, mine)
        torch.cuda.synchronize()
        graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # NCCL's own thread may ask the device meanwhile
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
            result = compute(mine)
        self.graphs[key] = mine, graph, result

    def _try(self, compute: Callable[[Packed], Tensor], mine: Packed) -> None:
        """Run once before the first capture: kernels are compiled, cuBLAS takes its memory. Leaves no trace."""
        grads = self.adapter.grads.clone()
        torch.cuda.synchronize()
        try:
            with torch.cuda.stream(self.stream):
                compute(mine)
        finally:
            torch.cuda.synchronize()
            self.adapter.grads.copy_(grads)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------------------------


def make_engine(base: Base, name: str, longest: int) -> tuple[Engine, str, str]:
    """(engine, its name, what there is to say of that) for a base.

    Args:
        name: auto, modules or fused. longest: row that may come, in tokens.

    Raises:
        ValueError: the engine asked for can't compute the model.
    """
    from .decoder import Decoder, unsupported

    why = None if name == "modules" else unsupported(base, longest)
    if (why and name == "fused") or (is_sharded(base.model) and (why or name == "modules")):
        asked = "--engine fused: " if name == "fused" else "--shard: needs --engine fused, and "
        raise ValueError(f"{asked}{'--engine modules is asked for' if name == 'modules' else why}; leave it out")
    if name != "modules" and not why:
        return Decoder(base, longest), "fused", ""
    engine = Modules(base, longest)
    mixing = engine.mixing and f"rows one at a time: {engine.mixing}"
    return engine, "modules", "; ".join(filter(None, [why, mixing]))


def captured(engine: Engine, longest: int, tokens: int) -> Engine | Captured:
    """An engine as CUDA graphs, where there are any; micro-batches have at most `tokens` tokens."""
    graphs = engine.device.type == "cuda" and engine.graphs
    return Captured(engine, longest, max(64, tokens // 32)) if graphs else engine


def for_evaluation(base: Base, longest: int, tokens: int) -> Engine | Captured:
    """What computes `hidden_states` of rows of up to `longest` tokens, `tokens` at a time."""
    return captured(make_engine(base, "auto", longest)[0], longest, tokens)
