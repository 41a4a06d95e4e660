"""A hand-written decoder: forward and backward of Qwen2, Qwen3, Llama and Mistral on packed rows, without autograd.

A decoder layer, with the residual stream x (N, D) and projections P(u) = W u + b + (alpha/r) B A drop(u):

    n = norm(x)        q, k, v = P(n)       q, k rotated by their positions
    x = x + P(attention(q, k, v))
    n = norm(x)        x = x + P(silu(P_gate(n)) * P_up(n))

Backward, for y = W u + (alpha/r) B h, h = A drop(u):

    dB += (alpha/r) dy^T h      dh = (alpha/r) dy B      dA += dh^T drop(u)      du = dy W + drop'(dh A)

Nothing else trains, so a layer saves only the values in these lines for its backward: 34 KB per token and layer of
Qwen2-0.5B in 16 bits. With checkpointing it saves x and each h (3.7 KB) and recomputes the rest.

A step of a small model by autograd takes tens of thousands of kernel launches. What makes this engine faster:

- Rows are packed (batches.py): every operation except attention works on one (N, D) matrix.
- Projections that share an input are one product: q, k and v; gate and up. One launch dequantises a whole layer.
- Each operation between two products is a single kernel (ops/kernels.py).
- On a GPU, forward and backward are captured as CUDA graphs (fused/graphs.py): one launch per micro-batch.

The results equal those of the modules' own forward under autocast up to rounding in the compute dtype; fewer values are
rounded here. `unsupported` says which models this engine can't compute.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..base import Base
from ..batches import Packed
from ..engine import Engine
from ..lora import LoRALinear, lora_layers
from ..loss import LOGIT_ROWS
from ..ops import formulas, masks
from ..ops.attention import attention, try_kernels
from ..ops.flat import FlatLoRA
from ..scale.sharding import slices
from ..system.bits import bnb
from .weights import Weights

FAMILIES = ("qwen2", "llama", "mistral", "qwen3")
LOGIT_SCALINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # implemented by `engine.Modules.logits`
ROTARY = ("default", "linear", "llama3", "yarn")  # the types whose angles do not depend on the rows' lengths
PROJECTIONS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
               ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
CHECKPOINT = ("x", "h_qkv", "h_o", "h_gate_up", "h_down")  # what a layer keeps if it is computed again


def unsupported(base: Base, max_length: int) -> str | None:
    """The reason why `Decoder` can't compute a model, or None if it can."""
    c = base.model.config
    rope = getattr(c, "rope_parameters", None) or {}
    window = getattr(c, "sliding_window", None) if getattr(c, "use_sliding_window", True) else None
    if c.model_type not in FAMILIES:
        return f"{c.model_type} models have layers of another form"
    rotary = rope.get("rope_type", "default")
    if c.hidden_act != "silu" or getattr(c, "mlp_bias", False) or rotary not in ROTARY:
        return "the model has another activation, MLP biases or another rotary embedding"
    if window and window < max_length:
        return f"the model attends to {window} tokens, and rows may be longer"
    if any(m.in_features % 64 for m in base.model.get_decoder().modules() if isinstance(m, bnb.nn.Linear4bit)):
        return "the model has a layer whose input size is not a multiple of 64"
    if base.model.get_output_embeddings().bias is not None or any(getattr(c, k, None) for k in LOGIT_SCALINGS):
        return "the output head has a bias, or its logits are scaled"
    return None


class Projections:
    """Linear layers that share an input, computed as one product: W = [W1; W2; ...] (out, in), and their LoRA updates.

    Attributes:
        weight: (out, in) in the compute dtype, valid after `Weights.fetch` of its layer.
        stream: the dropout stream, which all of them share.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype):
        linears = [m.linear if isinstance(m, LoRALinear) else m for m in modules]
        self.linears = linears
        self.loras = [m for m in modules if isinstance(m, LoRALinear)]
        self.stream = self.loras[0].dropout.stream if self.loras else 0
        biases = [torch.zeros(m.out_features, device=m.weight.device) if m.bias is None else m.bias for m in linears]
        self.bias = torch.cat([b.to(dtype) for b in biases]) if any(m.bias is not None for m in linears) else None
        self.shape = (sum(m.out_features for m in linears), linears[0].in_features)
        self.weight: Tensor
        starts = [sum(m.out_features for m in linears[:i]) for i in range(len(linears))]
        self.rows = [slice(s, s + m.out_features) for s, m in zip(starts, modules) if isinstance(m, LoRALinear)]
        ends = itertools.accumulate((m.spec.rank for m in self.loras), initial=0)
        self.ranks = [slice(a, b) for a, b in itertools.pairwise(ends)]
        self.A = self.dA = None  # (R, in), the As of all layers stacked; set by Decoder
        self.B: list[Tensor] = []  # (out, r) each; set by Decoder
        self.dB: list[Tensor] = []

    @property
    def enabled(self) -> bool:
        return any(m.enabled for m in self.loras)

    def drop(self, x: Tensor, p: float, keys: Tensor) -> Tensor:
        """x (N, in) -> drop(x), the input of A."""
        return formulas.dropout(x, p, keys, self.stream) if p else x

    def forward(
        self, x: Tensor, p: float, keys: Tensor, h: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x (N, in) -> y (N, out), drop(x), and h = A drop(x) (N, R), which is computed unless it is given."""
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y, None, None
        x = self.drop(x, p, keys)
        h = F.linear(x, self.A) if h is None else h  # (N, in) @ (in, R) -> (N, R)
        for lora, rows, ranks, B in zip(self.loras, self.rows, self.ranks, self.B):
            if lora.enabled:
                y[:, rows].addmm_(h[:, ranks], B.T, alpha=lora.spec.scaling)  # (N, r) @ (r, out) -> (N, out)
        return y, x, h

    def backward(self, dy: Tensor, x: Tensor | None, h: Tensor | None, p: float, keys: Tensor) -> Tensor:
        """dy (N, out), and x and h as `forward` returned them -> dx (N, in). Adds to dA and dB."""
        dx = dy @ self.weight  # (N, out) @ (out, in) -> (N, in)
        if not self.enabled:
            return dx
        dh = torch.empty_like(h)
        for lora, rows, ranks, B, dB in zip(self.loras, self.rows, self.ranks, self.B, self.dB):
            part = dh[:, ranks]
            if not lora.enabled:
                part.zero_()
                continue
            _add_product(dB, dy[:, rows].T, h[:, ranks], lora.spec.scaling)  # (out, N) @ (N, r)
            torch.addmm(part, dy[:, rows], B, beta=0, alpha=lora.spec.scaling, out=part)  # (N, out) @ (out, r)
        _add_product(self.dA, dh.T, x)  # (R, N) @ (N, in)
        if p:
            formulas.dropout_backward_(dx, dh @ self.A, p, keys, self.stream)
        else:
            dx.addmm_(dh, self.A)
        return dx


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha a @ b, with `out` in fp32. Products of 16-bit numbers are accumulated and returned in fp32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b, alpha=alpha)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, out=out)
    else:
        out.addmm_(a.float(), b.float(), alpha=alpha)


class Layer:
    """One decoder layer. `saved` holds what its forward saves for its backward."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, head_dim: int, last: bool):
        self.dtype, self.head_dim, self.last = dtype, head_dim, last
        self.norm1, self.norm2 = module.input_layernorm, module.post_attention_layernorm
        groups = ([module.get_submodule(name) for name in names] for names in PROJECTIONS)
        self.projections = self.qkv, self.o, self.gate_up, self.down = [Projections(g, dtype) for g in groups]
        self.heads = [m.out_features // head_dim for m in self.qkv.linears]  # of q, k, v
        self.qk_norm = None  # Qwen3: RMSNorm of each head of q and k
        if hasattr(module.self_attn, "q_norm"):
            pair = module.self_attn.q_norm, module.self_attn.k_norm
            norms = [m for m, n in zip(pair, self.heads) for _ in range(n)]
            self.qk_norm = torch.stack([m.weight.data for m in norms]).float(), norms[0].variance_epsilon

    def until_gate(self, x: Tensor, delta: Tensor | None, ctx: "Context", known: dict) -> dict:
        """Compute the layer up to its down projection: x (N, D), and delta (N, D) to add to it, or None -> saved.

        In training, the last layer continues after attention with the S supervised positions only.

        Args:
            known: when the layer is recomputed, what it has kept (`CHECKPOINT`); otherwise empty.
        """
        p, keys = ctx.dropout, ctx.keys
        x, n, r = formulas.add_norm(x, delta, self.norm1.weight, self.norm1.variance_epsilon, self.dtype)
        qkv, x_qkv, h_qkv = self.qkv.forward(n, p, keys, known.get("h_qkv"))  # (N, q + k + v)
        turned = formulas.rotate(qkv, *ctx.angles, self.heads[0] + self.heads[1], self.qk_norm)
        with torch.set_grad_enabled(ctx.keep):
            leaf = turned.unflatten(1, (-1, self.head_dim)).detach().requires_grad_(ctx.keep)
            attended = attention(leaf, self.heads[1], ctx.batch.cu_seqlens, ctx.batch.max_seqlen)
        a, residual = attended.detach().flatten(1), x  # (N, H P), (N, D)
        if self.last and ctx.keep:
            a, residual = (t[ctx.batch.loss_positions] for t in (a, x))
            keys = keys[ctx.batch.loss_positions] if p else None
        o, x_o, h_o = self.o.forward(a, p, keys, known.get("h_o"))
        x2, n2, r2 = formulas.add_norm(residual, o, self.norm2.weight, self.norm2.variance_epsilon, self.dtype)
        gate_up, x_gate_up, h_gate_up = self.gate_up.forward(n2, p, keys, known.get("h_gate_up"))
        return {
            "x": x, "r": r, "x_qkv": x_qkv, "h_qkv": h_qkv, "qkv": qkv, "leaf": leaf, "attended": attended, "x_o": x_o,
            "h_o": h_o, "x2": x2, "r2": r2, "x_gate_up": x_gate_up, "h_gate_up": h_gate_up, "gate_up": gate_up,
            "keys": keys,
        }  # fmt: skip

    def forward(self, x: Tensor, delta: Tensor | None, ctx: "Context") -> tuple[Tensor, Tensor, dict]:
        """-> x (N, D), the output (N, D) still to be added to it, and saved; (S, D) where `until_gate` selects."""
        saved = self.until_gate(x, delta, ctx, {})
        out, _, saved["h_down"] = self.down.forward(formulas.swiglu(saved["gate_up"]), ctx.dropout, saved["keys"])
        return saved["x2"], out, saved

    def backward(self, saved: dict, dx: Tensor, dx_low: Tensor, ctx: "Context") -> tuple[Tensor, Tensor]:
        """dx, dx_low: the gradient of the layer's output, (N, D), or (S, D) in the last layer, in fp32 and the compute
        dtype -> the gradient of its input, (N, D), in both."""
        p, keys = ctx.dropout, saved["keys"]
        x_down = self.down.drop(formulas.swiglu(saved["gate_up"]), p, keys) if self.down.enabled else None
        dact = self.down.backward(dx_low, x_down, saved["h_down"], p, keys)
        formulas.swiglu_backward_(dact, saved["gate_up"])  # which becomes its own gradient
        dn2 = self.gate_up.backward(saved.pop("gate_up"), saved["x_gate_up"], saved["h_gate_up"], p, keys)
        dx, dx_low = formulas.norm_backward(dn2, saved["x2"], saved["r2"], self.norm2.weight, dx)
        da = self.o.backward(dx_low, saved["x_o"], saved["h_o"], p, keys)
        if self.last:  # (S, D) and (S, H P) -> (N, D) and (N, H P)
            n, at = len(saved["x"]), ctx.batch.loss_positions
            dx, da = (t.new_zeros(n, t.shape[1]).index_add_(0, at, t) for t in (dx, da))
        dqkv = torch.autograd.grad(saved["attended"], saved["leaf"], da.view_as(saved["attended"]))[0].flatten(1)
        formulas.rotate_backward_(dqkv, saved["qkv"], *ctx.angles, self.heads[0] + self.heads[1], self.qk_norm)
        dn = self.qkv.backward(dqkv, saved["x_qkv"], saved["h_qkv"], p, ctx.keys)
        return formulas.norm_backward(dn, saved["x"], saved["r"], self.norm1.weight, dx)


@dataclass(frozen=True)
class Context:
    """What all layers share while they compute one batch."""

    batch: Packed
    angles: tuple[Tensor, Tensor, Tensor]  # cos and sin of each position, and position_ids
    dropout: float
    keys: Tensor | None  # (N,), for the dropout masks
    keep: bool  # whether a backward follows


class Decoder(Engine):
    """The decoder and the head of a base with LoRA layers, on packed rows.

    Args:
        max_seqlen: an upper bound on the lengths of rows.
    """

    def __init__(self, base: Base, max_seqlen: int):
        self.base, self.dtype = base, base.dtype
        decoder = base.model.get_decoder()
        self.embedding, self.norm, self.lm_head = decoder.embed_tokens, decoder.norm, base.model.get_output_embeddings()
        self.device = self.norm.weight.device
        c = base.model.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.layers = [Layer(m, base.dtype, head_dim, m is decoder.layers[-1]) for m in decoder.layers]
        positions = torch.arange(max_seqlen, device=self.device)[None]
        cos, sin = decoder.rotary_emb(torch.zeros(1, device=self.device), positions)  # (1, T, P), the halves equal
        self.cos, self.sin = (t[0, :, : head_dim // 2].float().contiguous() for t in (cos, sin))
        self._place_lora()
        self._try_kernels()
        self.weights = Weights(base, self.layers, decoder.layers, self.device)
        self.sharded = base.sharded
        self.capturable, self._checkpointing = not self.sharded, False

    @property
    def checkpointing(self) -> bool:
        return self._checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self._checkpointing = on
        self.weights.keep(not on)

    @property
    def buffers(self) -> list[Tensor]:
        return [self.weights.scratch, self.cos, self.sin, *([self.low] if self.low is not self.adapter.weights else [])]

    def _place_lora(self) -> None:
        """Set A and B of each group of projections, views of the weights in the compute dtype, and dA and dB in fp32.

        The As of a group are adjacent in `FlatLoRA`, so one view holds them all.
        """
        self.adapter = flat = FlatLoRA(lora_layers(self.base.model).values(), self.device)
        self.low = flat.weights if self.dtype == torch.float32 else torch.empty_like(flat.weights, dtype=self.dtype)
        groups = [p for layer in self.layers for p in layer.projections if p.loras]
        for p in groups:
            rank = sum(m.spec.rank for m in p.loras)
            p.A, p.dA = (flat.view(t, p.loras[0].lora_A, rank) for t in (self.low, flat.grads))
            p.B, p.dB = ([flat.view(t, m.lora_B) for m in p.loras] for t in (self.low, flat.grads))
        self.dropout = groups[0].loras[0].dropout.p if groups else 0.0

    def _try_kernels(self) -> None:
        """Try each kernel once, on tensors of this model's sizes."""
        if self.device.type != "cuda":
            return
        layer, n, norm = self.layers[0], 8, self.norm.weight
        heads, inner, d = layer.heads[0] + layer.heads[1], layer.gate_up.shape[0] // 2, norm.numel()
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=self.device).to(dtype)

        x, low, gate_up = draw(n, d, dtype=torch.float32), draw(n, d), draw(n, 2 * inner)
        qkv, positions = draw(n, sum(layer.heads) * layer.head_dim), torch.arange(n, device=self.device)
        rotary = self.cos[:1].expand(n, -1).contiguous(), self.sin[-1:].expand(n, -1).contiguous(), positions, heads
        keys, p = masks.dropout_keys(positions[3].int(), positions, positions), self.dropout or 0.05
        logits = draw(n, self.base.model.config.vocab_size, dtype=torch.float32)
        factor = torch.full((), 8.0, device=self.device)
        formulas.try_kernels({
            "add_norm": (x, low, norm, 1e-6, self.dtype),
            "norm_backward": (low, x, x[:, 0].abs(), norm, x),
            "rotate": (qkv, *rotary, layer.qk_norm),
            "rotate_backward_": (qkv, qkv, *rotary, layer.qk_norm),
            "swiglu": (gate_up,),
            "swiglu_backward_": (low[:, :1].expand(n, inner).contiguous(), gate_up),
            "dropout": (low, p, keys, 1),
            "dropout_backward_": (low, low, p, keys, 2),
            "cross_entropy": (logits, positions, torch.ones(n, device=self.device), factor, self.dtype),
        }, self.dtype)  # fmt: skip
        try_kernels(layer.head_dim, self.dtype, self.device)

    @torch.no_grad()
    def hidden_states(self, batch: Packed) -> Tensor:
        """As `Engine.hidden_states`."""
        return self._forward(Context(batch, (self.cos, self.sin, batch.position_ids), 0.0, None, False))[0]

    def _forward(self, ctx: Context) -> tuple[Tensor, Tensor, Tensor, list]:
        """The final norm's output, input and factors (in training, at supervised positions), and what layers saved."""
        if self.low is not self.adapter.weights:
            self.low.copy_(self.adapter.weights)
        x, delta, saved = self.embedding(ctx.batch.input_ids).float(), None, []
        for i, layer in enumerate(self.layers):
            self.weights.fetch(i, i + 1)
            x, delta, kept = layer.forward(x, delta, ctx)
            if ctx.keep:
                saved.append({name: kept[name] for name in CHECKPOINT} if self.checkpointing else kept)
            del kept
        x, y, r = formulas.add_norm(x, delta, self.norm.weight, self.norm.variance_epsilon, self.dtype)
        return y, x, r, saved

    @torch.no_grad()
    def loss_and_gradients(self, batch: Packed, factor: Tensor, seed: Tensor) -> Tensor:
        """As `Engine.loss_and_gradients`."""
        keys = masks.dropout_keys(seed, batch.row_ids, batch.position_ids) if self.dropout else None
        ctx = Context(batch, (self.cos, self.sin, batch.position_ids), self.dropout, keys, True)
        y, x, r, saved = self._forward(ctx)
        loss, dy = self._head(y, batch, factor)
        dx, dx_low = formulas.norm_backward(dy, x, r, self.norm.weight, torch.zeros_like(x))
        del y, x, dy
        for i in reversed(range(len(self.layers))):
            self.weights.fetch(i, i - 1)
            kept = saved.pop()
            if self.checkpointing:
                kept |= self.layers[i].until_gate(kept["x"], None, ctx, kept)
            dx, dx_low = self.layers[i].backward(kept, dx, dx_low, ctx)
            del kept
        return loss

    def _head(self, hidden: Tensor, batch: Packed, factor: Tensor) -> tuple[Tensor, Tensor]:
        """hidden (S, D) -> the summed loss, and the gradient (S, D) of factor * it; LOGIT_ROWS positions at a time."""
        dhidden, loss = torch.empty_like(hidden), torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits = self.logits(hidden[part])
            nll, dlogits = formulas.cross_entropy(
                logits, batch.targets[part], batch.loss_weights[part], factor, self.dtype
            )
            loss += nll.sum()
            if not self.sharded:
                torch.mm(dlogits, self.lm_head.weight, out=dhidden[part])  # (S, V) @ (V, D) -> (S, D)
                continue
            total, begin = torch.zeros(len(logits), hidden.shape[1], device=hidden.device), 0
            for weight in slices(self.lm_head):
                _add_product(total, dlogits[:, begin : begin + len(weight)], weight)
                begin += len(weight)
            dhidden[part] = total
        return loss, dhidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(S, D) -> (S, V) in fp32."""
        low = hidden.is_cuda and hidden.dtype != torch.float32
        parts = [
            torch.mm(hidden, w.T, out_dtype=torch.float32) if low else F.linear(hidden, w).float()
            for w in slices(self.lm_head)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
