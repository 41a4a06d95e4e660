"""Forward and backward of a packed micro-batch, by the model's own modules and autograd.

There are two engines, which compute the same:

    modules   the transformers modules, LoRALinear and autograd: this file, for every family that base.py loads
    fused     forward and backward by hand, with kernels, for Llama-shaped models: fused/decoder.py

transformers lets an attention function be registered by name. Ours, `packed_attention`, keeps packed rows apart, so
most of the library's decoders compute packed rows unchanged. A trial shows whether a model does (fused/select.py); rows
that would mix are computed one at a time. On a GPU either engine is captured as CUDA graphs (fused/graphs.py).
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from .base import Base, decoder_layers
from .batches import Packed, pack
from .data.rows import Row
from .lora import lora_layers
from .loss import masked_loss
from .ops import masks
from .ops.attention import attention
from .ops.flat import FlatLoRA
from .system.device import autocast

PACKED = "qlora_min_packed"  # our attention function's name in transformers
# Arguments that change nothing here: causal attention, no cache, no other outputs asked for.
HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "is_causal",
            "cu_seq_lens_k", "max_length_k", "return_dict"}  # fmt: skip


class Engine:
    """What computes packed rows: what `Modules` and `fused.decoder.Decoder` have in common."""

    base: Base
    device: torch.device
    adapter: FlatLoRA
    checkpointing: bool  # keep only each layer's input for the backward pass
    capturable: bool  # as CUDA graphs
    buffers: Sequence[Tensor] = ()  # what it holds besides the model and the adapter

    def loss_and_gradients(self, batch: Packed, factor: Tensor, seed: Tensor) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            factor: 0-dim fp32, loss scale / supervised tokens of the optimizer step.
            seed: 0-dim int32, of the optimizer step's dropout.

        Returns:
            0-dim fp32, the sum of the supervised tokens' losses. The gradients of factor * this sum are added to
            `adapter.grads`.
        """

    def hidden_states(self, batch: Packed) -> Tensor:
        """(N, D): the decoder's output before the head, without dropout."""

    def logits(self, hidden: Tensor) -> Tensor:
        """(S, D) -> (S, V) in fp32."""

    def pack(self, rows: Sequence[Row], row_ids=None, n_rows: int = 0, n_supervised: int | None = None) -> Packed:
        """`batches.pack`, on the device. `fused.graphs.Captured` pads it (also to `n_rows`) and keeps it on the CPU."""
        return pack(rows, row_ids, n_supervised=n_supervised).to(self.device)

    def release(self) -> None:
        """Give back memory that can be taken again."""


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **given: Any
) -> tuple[Tensor, None]:
    """`ops.attention` as transformers calls it: query (1, H, N, P), key and value (1, K, N, P) -> (1, N, H, P).

    Raises:
        NotImplementedError: the model needs something else (`softcap`, a mask), or does not pass on `cu_seq_lens_q`.
    """
    known = ("scaling", "sliding_window", "cu_seq_lens_q", "max_length_q", "dropout")
    scaling, window, cu_seqlens, max_seqlen, dropout = (given.pop(name, None) for name in known)
    more = sorted(k for k, v in given.items() if k not in HARMLESS and v is not None)
    if more or dropout or attention_mask is not None:
        raise NotImplementedError(f"its attention takes {', '.join(more) or 'a mask or dropout'}")
    if value.shape[3] != key.shape[3]:
        raise NotImplementedError("its values have heads of another size")
    if cu_seqlens is None:
        raise NotImplementedError("it does not tell its attention where rows end")
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    qkv = torch.cat([t[0].transpose(0, 1).to(dtype) for t in (query, key, value)], 1)  # (N, H + 2K, P)
    return attention(qkv, key.shape[1], cu_seqlens, max_seqlen, scaling, window or 0)[None], None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


class Modules(Engine):
    """The transformers modules of a base with its LoRA layers, by autograd, under autocast.

    Args:
        mixing: why packed rows would mix, in words, so that they are computed one at a time; "" if they don't. Found by
            trying (fused/select.py).
    """

    def __init__(self, base: Base, mixing: str = ""):
        self.base, self.checkpointing = base, False
        self.decoder, self.lm_head = base.model.get_decoder(), base.model.get_output_embeddings()
        self.device = self.lm_head.weight.device
        self.loras = list(lora_layers(base.model).values())
        self.adapter = FlatLoRA(self.loras, self.device)
        base.model.eval()  # the base's own dropout is off: it is frozen
        self._checkpoint_layers()
        self.mixing, self.capturable = mixing, not mixing

    def _checkpoint_layers(self) -> None:
        """With `checkpointing` keep each layer's input only, and run the layer again in the backward pass.

        No random state is kept: dropout draws the same mask again by itself.
        """
        for layer in decoder_layers(self.base.model):
            # The class's own forward, in case another engine of this base has wrapped it.
            plain = functools.partial(type(layer).forward, layer)

            def forward(*args, inner=plain, **kwargs):
                if self.checkpointing and torch.is_grad_enabled():
                    return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
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
            keys = masks.dropout_keys(seed, part.row_ids, part.position_ids)
            with self._computing(keys), torch.enable_grad():
                hidden = self._forward(part)[part.loss_positions]  # (N, D) -> (S, D)
                loss, gradient = masked_loss(hidden, self.logits, part.targets, part.loss_weights, factor)
                if hidden.requires_grad:
                    hidden.backward(gradient)
            total += loss
        return total

    def _parts(self, batch: Packed) -> list[Packed]:
        """What is computed at a time: the whole batch, or one row after the other where they would mix."""
        return [batch.select(a, b) for a, b in batch.spans()] if self.mixing else [batch]

    def _forward(self, batch: Packed) -> Tensor:
        """(N, D), within `_computing`."""
        lengths = {"cu_seq_lens_q": batch.cu_seqlens, "max_length_q": batch.max_seqlen}
        packed = {} if self.mixing else {"position_ids": batch.position_ids[None], **lengths}
        with autocast(self.device, self.base.dtype):
            return self.decoder(input_ids=batch.input_ids[None], use_cache=False, **packed).last_hidden_state[0]

    @contextmanager
    def _computing(self, keys: Tensor | None) -> Iterator[None]:
        """Context of a forward and its backward pass, recomputation included: enables our attention function, unless
        rows would mix, and dropout with these keys."""
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
        config = self.base.model.config.get_text_config()
        with autocast(self.device, self.base.dtype):
            logits = self.lm_head(hidden).float()
        if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
            logits = logits * scale
        if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
            logits = logits / scale
        for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma 2, RecurrentGemma
            if (cap := getattr(config, name, None)) is not None:
                logits = cap * torch.tanh(logits / cap)
        return logits
