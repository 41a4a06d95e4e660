"""The decoder by hand: forward and backward of a Qwen2 or Llama over packed rows, without autograd.

A decoder layer, with x the residual stream (N tokens, D wide) and projections P(u) = W u + b + (alpha/r) B A drop(u):

    n = norm(x)        q, k, v = P(n)       q, k turned by their positions
    x = x + P(attention(q, k, v))
    n = norm(x)        x = x + P(silu(P_gate(n)) * P_up(n))

Backwards, for y = W u + (alpha/r) B h, h = A drop(u):

    dB += (alpha/r) dy^T h      dh = (alpha/r) dy B      dA += dh^T drop(u)      du = dy W + drop'(dh A)

Nothing else trains, so a layer keeps for its backward what these lines name and no more: 33 KB a token and layer of
Qwen2-0.5B in 16 bits. With checkpointing it keeps x alone (3.6 KB) and computes the rest again.

What makes it fast, where a step of a small model by autograd is tens of thousands of launches:

- Rows are packed: a micro-batch is one sequence of N tokens, attention stays within each row, and nothing is padded
  but the end. Every other operation sees one (N, D) matrix.
- Projections of one input are one product: q, k, v; gate and up. All matrices of a layer are dequantised in one launch.
- What lies between products is one kernel each (ops.py).
- On a GPU forward and backward of each N are captured once as a CUDA graph: a micro-batch is then one launch.

The numbers are those of the modules' own forward under autocast, up to the rounding of the compute dtype: fewer values
are rounded here. Which models fit is asked of `unsupported`.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor

from . import ops
from .bits import bnb
from .data import Row, Rows, share
from .lora import LoRALinear
from .memory import LOGIT_ROWS
from .model import Base, dequantized_weight, output_head
from .sharding import gather, is_sharded, slices

FAMILIES = ("qwen2", "llama", "mistral")
ROTARY = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the rows' lengths
PROJECTIONS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)),
               ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)))  # fmt: skip


def unsupported(base: Base, max_length: int) -> str | None:
    """Why this module can't compute a model, or None."""
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
        return "the model has rows that are no multiple of 64"
    if output_head(base.model).bias is not None:
        return "the output head has a bias"
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Packed rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Rows one behind the other, on a device; what fills up the N tokens is a row of its own.

    ids, positions: (N,), position within the row. ends: (R + 1,) int32, where rows begin and end, the last repeated.
    where, targets: (S,), the tokens that predict a supervised one, and those. weights: (S,) fp32, 0 on filling.
    longest: a bound of the rows' lengths. n_tokens, n_supervised: without what fills up.
    """

    ids: Tensor
    positions: Tensor
    ends: Tensor
    where: Tensor
    targets: Tensor
    weights: Tensor
    longest: int
    n_tokens: int
    n_supervised: int

    def copy_(self, other: "Packed") -> None:
        """Take over the values of another of the same shape."""
        for name in ("ids", "positions", "ends", "where", "targets", "weights"):
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)

    def to(self, device: torch.device) -> "Packed":
        tensors = (self.ids, self.positions, self.ends, self.where, self.targets, self.weights)
        moved = (t.to(device, non_blocking=True) for t in tensors)
        return Packed(*moved, self.longest, self.n_tokens, self.n_supervised)


def pack(rows: Sequence[Row], tokens: int | None = None, supervised: int | None = None, count: int | None = None,
         longest: int | None = None) -> Packed:  # fmt: skip
    """Rows -> Packed, on the CPU.

    Args:
        tokens, supervised, count: fill up to N tokens, S supervised positions and R rows. Not at all if not given.
        longest: the bound of lengths to state, the filling's included; the least if not given.
    """
    lengths = [len(r) for r in rows]
    total = sum(lengths)
    tokens = tokens or total
    ids = torch.cat([r.ids for r in rows]).long()
    taught = torch.cat([r.supervised for r in rows])
    ends = torch.tensor([0, *lengths]).cumsum(0)
    taught[ends[:-1]] = False  # the first token of a row has no predecessor
    where = taught.nonzero()[:, 0] - 1
    positions = torch.arange(total) - ends[:-1].repeat_interleave(torch.tensor(lengths))
    more, fewer = tokens - total, (supervised or len(where)) - len(where)
    longest = min(tokens, longest or max([*lengths, more]))
    assert min(more, fewer) >= 0 and len(rows) <= (count or len(rows)) and longest >= max([*lengths, more])
    rest = 1 + count - len(rows) if count else int(more > 0)  # the filling, and rows of no tokens
    ends = torch.cat([ends, ends.new_full((rest,), tokens)])
    return Packed(
        ids=F.pad(ids, (0, more)),
        positions=torch.cat([positions, torch.arange(more)]).int(),
        ends=ends.int(),
        where=F.pad(where, (0, fewer)),
        targets=F.pad(ids[where + 1], (0, fewer)),
        weights=F.pad(torch.ones(len(where)), (0, fewer)),
        longest=longest,
        n_tokens=total,
        n_supervised=len(where),
    )


def cut(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Divide rows evenly into micro-batches of at most `tokens` tokens (or the longest row), as few as a rule finds.

    Returns:
        Indices into `lengths`, a list a micro-batch.
    """
    tokens = max([tokens, *lengths])
    for count in range(-(-sum(lengths) // tokens), len(lengths) + 1):
        parts = share(lengths, count)
        if all(sum(lengths[i] for i in part) <= tokens for part in parts):
            break
    return [part for part in parts if part]


def dropout_seed(seed: int, step: int, micro_batch: int) -> Tensor:
    """The seed of a micro-batch's dropout: a function of where it stands, so that a resumed run draws the same."""
    return torch.tensor(random.Random(f"dropout/{seed}/{step}/{micro_batch}").getrandbits(62))


def attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Causal attention within each row: q (N, H, P), k and v (N, K, P) with H a multiple of K -> (N, H, P).

    On a GPU PyTorch's flash attention, or its memory-efficient one for fp32 and for GPUs before Ampere; both take
    packed rows. On a CPU one row after the other.
    """
    if not q.is_cuda:
        rows = zip(*(t.split(ends.diff().tolist()) for t in (q, k, v)))  # whose backward is one concatenation each
        sdpa = F.scaled_dot_product_attention
        out = [
            sdpa(*(t.transpose(0, 1)[None] for t in row), is_causal=True, enable_gqa=True)[0]
            for row in rows
            if len(row[0])
        ]
        return torch.cat([o.transpose(0, 1) for o in out])
    if q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device)[0] >= 8:
        return torch.ops.aten._flash_attention_forward(q, k, v, ends, ends, longest, longest, 0.0, True, False)[0]
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    causal = 1
    return torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, ends, ends, longest, longest, 0.0, causal, True
    )[0][0]


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


# ---------------------------------------------------------------------------------------------------------------------
# Projections
# ---------------------------------------------------------------------------------------------------------------------


class Projections:
    """Linear layers that share an input, as one product: W = [W1; W2; ...] (out, in), with their LoRA updates.

    Attributes:
        weight: (out, in) in the compute dtype; of a quantised base a view that is valid while its layer is dequantised.
        stream: which dropout this is.
    """

    def __init__(self, modules: Sequence[nn.Module], dtype: torch.dtype, stream: int):
        bases = [m.base if isinstance(m, LoRALinear) else m for m in modules]
        self.bases, self.stream = bases, stream
        self.loras = [m for m in modules if isinstance(m, LoRALinear)]
        biases = [b.bias for b in bases]
        self.bias = None
        if any(b is not None for b in biases):
            zeros = [torch.zeros(m.out_features, device=m.weight.device) for m in bases]
            self.bias = torch.cat([(z if b is None else b).to(dtype) for b, z in zip(biases, zeros)])
        self.shape = (sum(m.out_features for m in bases), bases[0].in_features)
        self.weight: Tensor
        starts = [sum(m.out_features for m in bases[:i]) for i in range(len(bases))]
        self.rows = [slice(s, s + m.out_features) for s, m in zip(starts, modules) if isinstance(m, LoRALinear)]
        self.ranks = [slice(i * m.rank, (i + 1) * m.rank) for i, m in enumerate(self.loras)]
        self.A = self.dA = None  # (R, in), of all together; set by Decoder
        self.B: list[Tensor] = []  # (out, r) each
        self.dB: list[Tensor] = []

    @property
    def enabled(self) -> bool:
        return any(m.enabled for m in self.loras)

    def forward(self, x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (N, in) -> y (N, out), and h = A drop(x) (N, R)."""
        y = F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return y, None
        h = F.linear(ops.dropout(x, p, seed, self.stream) if p else x, self.A)  # (N, in) @ (in, R) -> (N, R)
        for lora, rows, ranks, B in zip(self.loras, self.rows, self.ranks, self.B):
            if lora.enabled:
                y[:, rows].addmm_(h[:, ranks], B.T, alpha=lora.scaling)  # (N, r) @ (r, out) -> (N, out)
        return y, h

    def backward(self, dy: Tensor, x: Tensor | None, h: Tensor | None, p: float, seed: Tensor) -> Tensor:
        """dy (N, out) -> dx (N, in); adds to dA and dB."""
        dx = dy @ self.weight  # (N, out) @ (out, in) -> (N, in)
        if not self.enabled:
            return dx
        dh = torch.empty_like(h)
        for lora, rows, ranks, B, dB in zip(self.loras, self.rows, self.ranks, self.B, self.dB):
            part = dh[:, ranks]
            if not lora.enabled:
                part.zero_()
                continue
            _add_product(dB, dy[:, rows].T, h[:, ranks], lora.scaling)  # (out, N) @ (N, r)
            torch.addmm(part, dy[:, rows], B, beta=0, alpha=lora.scaling, out=part)  # (N, out) @ (out, r)
        _add_product(self.dA, dh.T, ops.dropout(x, p, seed, self.stream) if p else x)  # (R, N) @ (N, in)
        if p:
            ops.dropout_backward_(dx, dh @ self.A, p, seed, self.stream)
        else:
            dx.addmm_(dh, self.A)
        return dx


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha a @ b, out in fp32; products of 16-bit numbers are summed, and stay, in fp32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b, alpha=alpha)
    elif a.is_cuda:
        out.add_(torch.mm(a, b, out_dtype=torch.float32), alpha=alpha)
    else:
        out.addmm_(a.float(), b.float(), alpha=alpha)


# ---------------------------------------------------------------------------------------------------------------------
# A layer
# ---------------------------------------------------------------------------------------------------------------------


class Layer:
    """One decoder layer. `saved` is what its forward keeps for its backward."""

    def __init__(self, module: nn.Module, index: int, dtype: torch.dtype, head_dim: int):
        self.dtype, self.head_dim = dtype, head_dim
        self.norm1, self.norm2 = module.input_layernorm, module.post_attention_layernorm
        groups = ([getattr(getattr(module, part), n) for n in names] for part, names in PROJECTIONS)
        self.qkv, self.o, self.gate_up, self.down = (Projections(g, dtype, 4 * index + i) for i, g in enumerate(groups))
        self.heads = [m.out_features // head_dim for m in self.qkv.bases]  # of q, k, v

    @property
    def projections(self) -> tuple[Projections, ...]:
        return self.qkv, self.o, self.gate_up, self.down

    def until_gate(self, x: Tensor, delta: Tensor | None, run: "Run") -> dict:
        """All but the last projection: x (N, D), delta (N, D) what the layer before adds to it -> saved."""
        p, seed = run.dropout, run.seed
        x, n, r = ops.add_norm(x, delta, self.norm1.weight, self.norm1.variance_epsilon, self.dtype)
        qkv, h_qkv = self.qkv.forward(n, p, seed)  # (N, q + k + v)
        ops.rotate_(qkv, run.cos, run.sin, run.batch.positions, self.heads[0] + self.heads[1])
        leaves = [t.unflatten(1, (-1, self.head_dim)) for t in qkv.split([h * self.head_dim for h in self.heads], 1)]
        if run.keep:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in leaves]
                attended = attention(*leaves, run.batch.ends, run.batch.longest)
        else:
            attended = attention(*leaves, run.batch.ends, run.batch.longest)
        a = attended.detach().flatten(1)  # (N, H P)
        o, h_o = self.o.forward(a, p, seed)
        x2, n2, r2 = ops.add_norm(x, o, self.norm2.weight, self.norm2.variance_epsilon, self.dtype)
        gate_up, h_gate_up = self.gate_up.forward(n2, p, seed)
        return {
            "x": x, "n": n, "r": r, "h_qkv": h_qkv, "leaves": leaves, "attended": attended, "a": a, "h_o": h_o,
            "x2": x2, "n2": n2, "r2": r2, "gate_up": gate_up, "h_gate_up": h_gate_up,
        }  # fmt: skip

    def forward(self, x: Tensor, delta: Tensor | None, run: "Run") -> tuple[Tensor, Tensor, dict]:
        """-> the stream, what is still to be added to it, and saved."""
        saved = self.until_gate(x, delta, run)
        out, saved["h_down"] = self.down.forward(ops.swiglu(saved["gate_up"]), run.dropout, run.seed)
        return saved["x2"], out, saved

    def backward(self, saved: dict, dx: Tensor, dx_low: Tensor, run: "Run") -> tuple[Tensor, Tensor]:
        """The gradient of the stream above the layer (N, D), in fp32 and in the compute dtype -> below it."""
        p, seed = run.dropout, run.seed
        act = ops.swiglu(saved["gate_up"]) if self.down.enabled else None
        dact = self.down.backward(dx_low, act, saved.get("h_down"), p, seed)
        ops.swiglu_backward_(dact, saved["gate_up"])
        dn2 = self.gate_up.backward(saved.pop("gate_up"), saved["n2"], saved["h_gate_up"], p, seed)
        dx, dx_low = ops.norm_backward(dn2, saved["x2"], saved["r2"], self.norm2.weight, dx)
        da = self.o.backward(dx_low, saved["a"], saved["h_o"], p, seed)
        with _deterministic():
            grads = torch.autograd.grad(saved["attended"], saved["leaves"], da.view_as(saved["attended"]))
        dqkv = torch.cat([g.flatten(1) for g in grads], 1)
        ops.rotate_(dqkv, run.cos, run.sin, run.batch.positions, self.heads[0] + self.heads[1], backward=True)
        dn = self.qkv.backward(dqkv, saved["n"], saved["h_qkv"], p, seed)
        return ops.norm_backward(dn, saved["x"], saved["r"], self.norm1.weight, dx)


@dataclass(frozen=True)
class Run:
    """What all layers of one pass share."""

    batch: Packed
    cos: Tensor
    sin: Tensor
    dropout: float
    seed: Tensor
    keep: bool  # a backward follows


# ---------------------------------------------------------------------------------------------------------------------
# The decoder
# ---------------------------------------------------------------------------------------------------------------------


class Decoder:
    """The decoder and head of a base, with its LoRA layers, computing on packed rows.

    Building it moves all LoRA parameters into one flat tensor, and their gradients into another: `weights` and `grads`,
    fp32; every `lora_A` and `lora_B` and its `.grad` become views of them. `large` and `small` are what an optimizer
    steps (see `optim.make_optimizer`).

    Args:
        checkpointing: keep only each layer's input for the backward.
        max_length: of a row.
    """

    def __init__(self, base: Base, checkpointing: bool, max_length: int):
        self.base, self.checkpointing, self.dtype = base, checkpointing, base.dtype
        decoder = base.model.get_decoder()
        self.embedding, self.norm, self.head = decoder.embed_tokens, decoder.norm, output_head(base.model)
        self.device, self.modules = self.norm.weight.device, decoder.layers
        c = base.model.config
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.layers = [Layer(m, i, base.dtype, head_dim) for i, m in enumerate(decoder.layers)]
        positions = torch.arange(max_length, device=self.device)[None]
        cos, sin = decoder.rotary_emb(torch.zeros(1, device=self.device), positions)  # (1, T, P), the halves equal
        self.cos, self.sin = (t[0, :, : head_dim // 2].float().contiguous() for t in (cos, sin))
        self._gather_weights()
        self._gather_lora()

    def _gather_weights(self) -> None:
        """Give each group of projections its one weight."""
        self.dequantizers = []
        groups = [p for layer in self.layers for p in layer.projections]
        self.sharded = is_sharded(self.base.model)
        quantised = isinstance(groups[0].bases[0], bnb.nn.Linear4bit)
        self.stored = not self.sharded and not quantised
        if self.stored:
            for p in groups:
                p.weight = torch.cat([m.weight.data for m in p.bases])
                for m, w in zip(p.bases, p.weight.split([m.out_features for m in p.bases])):
                    m.weight.data = w  # a view: nothing is held twice
            return
        sizes = [p.shape[0] * p.shape[1] for p in self.layers[0].projections]
        self.scratch = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        for layer in self.layers:
            for p, part in zip(layer.projections, self.scratch.split(sizes)):
                p.weight = part.view(p.shape)
            if quantised and self.device.type == "cuda" and ops.have_kernels():
                from .kernels import Dequantizer

                modules = [m for p in layer.projections for m in p.bases]
                self.dequantizers.append(Dequantizer([(m.weight.data, m.weight.quant_state) for m in modules]))

    def _dequantize(self, index: int) -> None:
        """Fill the scratch with a layer's weights."""
        gather(self.modules[index])
        if self.dequantizers:
            self.dequantizers[index](self.scratch)
        elif not self.stored:
            for p in self.layers[index].projections:
                for m, out in zip(p.bases, p.weight.split([m.out_features for m in p.bases])):
                    out.copy_(dequantized_weight(m))

    def _gather_lora(self) -> None:
        """All A and B in one tensor: first those large enough for 8-bit optimizer state; the As of a group touch."""
        groups = [p for layer in self.layers for p in layer.projections if p.loras]
        params = [m.lora_A for p in groups for m in p.loras] + [m.lora_B for p in groups for m in p.loras]
        params.sort(key=lambda w: w.numel() < 4096)
        starts = dict(zip(map(id, params), torch.tensor([0, *(w.numel() for w in params)]).cumsum(0).tolist()))
        total = sum(w.numel() for w in params)
        self.weights = torch.empty(total, dtype=torch.float32, device=self.device)
        self.grads = torch.zeros_like(self.weights)
        self.low = self.weights if self.dtype == torch.float32 else torch.empty_like(self.weights, dtype=self.dtype)

        def view(flat: Tensor, first: nn.Parameter, rows: int) -> Tensor:
            start, columns = starts[id(first)], first.shape[1]
            return flat[start : start + rows * columns].view(rows, columns)

        with torch.no_grad():
            for w in params:
                mine = view(self.weights, w, w.shape[0])
                mine.copy_(w)
                w.data, w.grad = mine, view(self.grads, w, w.shape[0])
        for p in groups:
            rank = sum(m.rank for m in p.loras)
            p.A, p.dA = (view(flat, p.loras[0].lora_A, rank) for flat in (self.low, self.grads))
            p.B, p.dB = ([view(flat, m.lora_B, m.out_features) for m in p.loras] for flat in (self.low, self.grads))
        self.dropout = groups[0].loras[0].dropout.p if groups else 0.0

        # What an optimizer steps: two flat tensors, if the blocks of 8-bit state then end where the matrices do.
        self.large, self.small = ([w for w in params if (w.numel() < 4096) == small] for small in (False, True))
        if all(w.numel() % 256 == 0 for w in self.large):
            bounds = [0, sum(w.numel() for w in self.large), total]
            flat = [nn.Parameter(self.weights[a:b]) for a, b in itertools.pairwise(bounds)]
            for w, (a, b) in zip(flat, itertools.pairwise(bounds)):
                w.grad = self.grads[a:b]
            self.large, self.small = ([w] if w.numel() else [] for w in flat)

    @torch.no_grad()
    def hidden_states(self, batch: Packed) -> Tensor:
        """(N, D): the decoder's output before the head, without dropout."""
        run = Run(batch, self.cos, self.sin, 0.0, torch.zeros((), dtype=torch.int64, device=self.device), False)
        return self._forward(run)[0]

    def _forward(self, run: Run) -> tuple[Tensor, Tensor, Tensor, list]:
        assert run.batch.longest <= len(self.cos), "a row is longer than max_length"
        if self.low is not self.weights:
            self.low.copy_(self.weights)
        x, delta, saved = self.embedding(run.batch.ids).float(), None, []
        for i, layer in enumerate(self.layers):
            self._dequantize(i)
            x, delta, kept = layer.forward(x, delta, run)
            if run.keep:
                saved.append(kept["x"] if self.checkpointing else kept)
            del kept
        x, y, r = ops.add_norm(x, delta, self.norm.weight, self.norm.variance_epsilon, self.dtype)
        return y, x, r, saved

    @torch.no_grad()
    def loss_and_gradients(self, batch: Packed, factor: Tensor, seed: Tensor) -> Tensor:
        """Forward and backward of one micro-batch.

        Args:
            factor: 0-dim fp32; the gradients are those of factor * the summed loss (loss scale / supervised tokens).
            seed: 0-dim int64, of this micro-batch's dropout.

        Returns:
            0-dim fp32, the sum of the supervised tokens' losses; its gradients, times factor, are added to `grads`.
        """
        run = Run(batch, self.cos, self.sin, self.dropout, seed, True)
        y, x, r, saved = self._forward(run)
        loss, dy = self._head(y, batch, factor)
        dx, dx_low = ops.norm_backward(dy, x, r, self.norm.weight, torch.zeros_like(x))
        del y, x, dy
        for i in reversed(range(len(self.layers))):
            self._dequantize(i)
            kept = saved.pop()
            if self.checkpointing:
                kept = self.layers[i].until_gate(kept, None, run)
                if self.layers[i].down.enabled:
                    act = ops.swiglu(kept["gate_up"])
                    kept["h_down"] = self.layers[i].down.forward(act, run.dropout, run.seed)[1]
            dx, dx_low = self.layers[i].backward(kept, dx, dx_low, run)
            del kept
        return loss

    def pack(self, rows: Sequence[Row], count: int, supervised: int | None = None) -> Packed:
        """Rows as a batch for this decoder, without filling but up to `supervised` positions."""
        return pack(rows, supervised=supervised).to(self.device)

    def _head(self, y: Tensor, batch: Packed, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the gradient (N, D) of the head's input: logits exist for LOGIT_ROWS positions at a time."""
        hidden = y[batch.where]  # (N, D) -> (S, D)
        dhidden, loss = torch.empty_like(hidden), torch.zeros((), device=y.device)
        for start in range(0, len(hidden), LOGIT_ROWS):
            part = slice(start, start + LOGIT_ROWS)
            logits = self.logits(hidden[part])
            nll, dlogits = ops.cross_entropy(logits, batch.targets[part], batch.weights[part], factor, self.dtype)
            loss += nll.sum()
            if not self.sharded:
                torch.mm(dlogits, self.head.weight, out=dhidden[part])  # (S, V) @ (V, D) -> (S, D)
                continue
            total, begin = torch.zeros(len(logits), y.shape[1], device=y.device), 0
            for weight in slices(self.head):
                _add_product(total, dlogits[:, begin : begin + len(weight)], weight)
                begin += len(weight)
            dhidden[part] = total
        return loss, torch.zeros_like(y).index_add_(0, batch.where, dhidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """(S, D) -> (S, V) in fp32."""
        low = hidden.is_cuda and hidden.dtype != torch.float32
        parts = [
            torch.mm(hidden, w.T, out_dtype=torch.float32) if low else F.linear(hidden, w).float()
            for w in slices(self.head)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Captured:
    """A decoder's `loss_and_gradients` and `hidden_states` on a GPU as one launch each, for batches on the CPU.

    Each shape is captured once as a CUDA graph, and so is which LoRA layers are enabled. All graphs share one memory
    pool: they run one after the other. What is returned is overwritten by the next call.

    Args:
        grain: batches are filled up to a multiple of so many tokens, and to R rows, so that there are few shapes.
    """

    def __init__(self, decoder: Decoder, grain: int = 256):
        self.decoder, self.grain, device = decoder, grain, decoder.device
        self.logits = decoder.logits
        self.graphs: dict[tuple, tuple[Packed, torch.cuda.CUDAGraph, Tensor]] = {}
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self.factor = torch.zeros((), device=device)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)

    def pack(self, rows: Sequence[Row], count: int) -> Packed:
        """At most `count` rows, filled up."""
        tokens = -(-sum(map(len, rows)) // self.grain) * self.grain
        supervised = sum(r.n_supervised for r in rows)
        supervised = 2 ** max(6, (supervised - 1).bit_length())
        return pack(rows, tokens, supervised, count, len(self.decoder.cos))

    def loss_and_gradients(self, batch: Packed, factor: Tensor, seed: Tensor) -> Tensor:
        """As Decoder's."""
        self.factor.copy_(factor, non_blocking=True)
        self.seed.copy_(seed, non_blocking=True)

        def compute(mine: Packed) -> Tensor:
            return self.loss.copy_(self.decoder.loss_and_gradients(mine, self.factor, self.seed))

        return self._replay("train", compute, batch)

    def hidden_states(self, batch: Packed) -> Tensor:
        """As Decoder's."""
        return self._replay("evaluate", self.decoder.hidden_states, batch)

    def _replay(self, kind: str, compute: Callable[[Packed], Tensor], batch: Packed) -> Tensor:
        enabled = tuple(m.enabled for layer in self.decoder.layers for p in layer.projections for m in p.loras)
        key = (kind, len(batch.ids), len(batch.where), len(batch.ends), batch.longest, enabled)
        if key not in self.graphs:
            mine = batch.to(self.decoder.device)
            if not any(k[0] == kind for k in self.graphs):
                self._try(compute, mine)
            torch.cuda.synchronize()
            graph, mode = torch.cuda.CUDAGraph(), "thread_local"  # NCCL's own thread may ask the device meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
                result = compute(mine)
            self.graphs[key] = mine, graph, result
        mine, graph, result = self.graphs[key]
        mine.copy_(batch)
        graph.replay()
        return result

    def _try(self, compute: Callable[[Packed], Tensor], mine: Packed) -> None:
        """Run once before the first capture: kernels are compiled, cuBLAS takes its memory. Leaves no trace."""
        grads = self.decoder.grads.clone()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            compute(mine)
        torch.cuda.synchronize()
        self.decoder.grads.copy_(grads)


def computer(base: Base, checkpointing: bool, longest: int, tokens: int) -> tuple[Decoder, Decoder | Captured]:
    """A decoder, and what computes it: as CUDA graphs on a GPU with Triton, if the base is not shared out.

    Args:
        longest: row that may come. tokens: at a time, at most.
    """
    grain = max(64, tokens // 32)  # of the tokens in a captured batch
    decoder = Decoder(base, checkpointing, max(longest, grain))
    graphs = decoder.device.type == "cuda" and not decoder.sharded and ops.have_kernels()
    return decoder, Captured(decoder, grain) if graphs else decoder


def for_evaluation(base: Base, parts: Sequence[Rows], tokens: int) -> Decoder | Captured | None:
    """What computes `hidden_states` of these rows on packed ones, `tokens` at a time; None where the model is odd."""
    longest = max(int(rows.lengths.max()) for rows in parts)
    return None if unsupported(base, longest) else computer(base, False, longest, tokens)[1]
