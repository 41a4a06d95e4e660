"""The LoRA layer, and its injection into a model.

The equation (Hu et al. 2021, "LoRA", section 4.1, eq. 3; with QLoRA's frozen 4-bit W, Dettmers et al. 2023, eq. 5):

    y = W x + (alpha / r) B A dropout(x)          A: (r, in)   B: (out, r)

W stays frozen, in 4 bits if the base is quantised; only A and B train, in fp32. B starts at zero, so a model with fresh
adapters computes exactly what its base computes, and the first gradient reaches B alone (dL/dA carries a factor B).
Scaling by alpha / r reduces the need to tune the learning rate again when r changes (LoRA, section 4.1).

Cost: r (in + out) parameters a layer, and as many multiply-adds a token on top of the base's in * out. On Qwen2-0.5B
with r = 16 and q, k, v, o of 24 layers: 2,162,688 parameters, 0.44% of the model.

The tests compare with PEFT's layer bit for bit (peft/tuners/lora/bnb.py). `fused.decoder.Projections` computes the same
by hand. Dropout's masks are hashes of where an element stands, and never stored: see ops/dropout.py.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from .ops.dropout import Dropout, Tokens
from .system.peft_files import PerLayer

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # projections of one input, by name


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is: the rank r, alpha, the probability of dropout, and the layers that get an update, by name.

    rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor"). per_layer: what PEFT's
    adapters may set for single layers: their rank, their alpha, and whether they get an update at all.

    Raises:
        ValueError: rank below 1, or dropout outside [0, 1).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    rslora: bool = False
    per_layer: PerLayer = field(default_factory=PerLayer)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}, expected an integer of at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: got {self.dropout}, expected a probability in [0, 1)")

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def of(self, name: str) -> "LoraSpec":
        """The spec of one layer, by its name."""
        rank, alpha = self.per_layer.rank_and_alpha(name, self.rank, self.alpha)
        return replace(self, rank=rank, alpha=alpha)


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it.

    Args:
        linear: `nn.Linear` or bitsandbytes' `Linear4bit` (anything with `in_features`, `out_features`, a `weight` and
            a forward from (..., in) to (..., out)). It is used as it is: freezing it is the caller's business.
        spec: rank, alpha and dropout. W x never sees dropout.
        dropout: the module that computes it, where its masks are to follow a model's tokens (`inject_lora`).
    """

    def __init__(self, linear: nn.Module, spec: LoraSpec, dropout: Dropout | None = None):
        super().__init__()
        self.linear, self.spec, self.enabled = linear, spec, True
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dropout = dropout or Dropout(spec.dropout, Tokens())
        # Drawn on the CPU whatever the layer's device, so that one seed gives one adapter everywhere.
        lora_A = torch.empty(spec.rank, self.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))  # U(-1/sqrt(in), 1/sqrt(in)), as nn.Linear's own default
        lora_B = torch.zeros(self.out_features, spec.rank, dtype=torch.float32)
        self.lora_A, self.lora_B = (nn.Parameter(w.to(linear.weight.device)) for w in (lora_A, lora_B))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): y = W x + (alpha / r) B A dropout(x)."""
        y = self.linear(x)
        if not self.enabled:
            return y
        kind = x.device.type  # under autocast cast first: autograd then saves the 16-bit input, not the fp32 one
        x = x.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.lora_A.dtype)
        h = F.linear(self.dropout(x), self.lora_A)  # (..., in) @ (in, r) -> (..., r)
        return y + (F.linear(h, self.lora_B) * self.spec.scaling).to(y.dtype)  # (..., r) @ (r, out) -> (..., out)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The update as one matrix, (alpha / r) B A: (out, in), fp32. Merging adds it to W."""
        return (self.lora_B @ self.lora_A) * self.spec.scaling

    def extra_repr(self) -> str:
        return f"rank={self.spec.rank}, alpha={self.spec.alpha}"


def inject_lora(model: nn.Module, spec: LoraSpec, within: str = "") -> list[str]:
    """Freeze every parameter of `model`, then put a LoRALinear around each linear layer that `spec.targets` names.

    A target is the last part of a module's name ("q_proj"), more of its end ("self_attn.q_proj"), or "all-linear". What
    trains follows from the structure: nothing but the new lora_A and lora_B requires a gradient.

    Args:
        within: only modules whose name starts with this are candidates (the decoder layers, say, but not the head).

    Returns:
        The names of the wrapped modules, in the model's order.

    Raises:
        ValueError: a target matches no linear layer (the message lists the candidates), the rank is larger than both
            sides of a layer, or the model has LoRA already. The model is unchanged then.
    """
    names = _matching(model, spec, within)
    model.requires_grad_(False)
    tokens, streams = Tokens(), {}
    for name in names:
        parent, _, child = name.rpartition(".")
        group = next((g for g in SHARED_INPUT if child in g), child)
        stream = streams.setdefault((parent, group), len(streams))
        linear = model.get_submodule(name)
        layer = LoRALinear(linear, spec.of(name), Dropout(spec.dropout, tokens, stream))
        model.set_submodule(name, layer.train(linear.training))
    return names


def _matching(model: nn.Module, spec: LoraSpec, within: str) -> list[str]:
    """The names of the linear layers that `inject_lora` wraps; raises as it does."""
    if lora_layers(model):
        raise ValueError("the model has LoRA layers already: load the base anew to inject another adapter")
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(within)]
    found = {t: [n for n in linears if spec.per_layer.targeted(n, t)] for t in spec.targets}
    unknown = [t for t, names in found.items() if not names]
    if unknown or not spec.targets:
        candidates = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in linears})) or "none"
        raise ValueError(
            f"targets: {', '.join(map(repr, unknown[:8])) or 'none given'} matches no linear layer of the model's "
            f"decoder layers; expected all-linear, or names among: {candidates}"
        )
    chosen = set().union(*found.values())
    names = [n for n in linears if n in chosen]
    for name in names:
        layer, rank = model.get_submodule(name), spec.of(name).rank
        if rank > max(layer.in_features, layer.out_features):
            raise ValueError(
                f"rank {rank} is above the larger dimension of '{name}' ({layer.out_features} x "
                f"{layer.in_features}), more than any update has; lower it"
            )
    return names


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Name -> layer of every LoRALinear in `model`, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of all that trains, e.g. "model.layers.0.self_attn.q_proj.lora_A", in the model's order."""
    return {f"{n}.{k}": getattr(layer, k) for n, layer in lora_layers(model).items() for k in ("lora_A", "lora_B")}


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the model computes what its base computes: y = W x."""
    before = {layer: layer.enabled for layer in lora_layers(model).values()}
    for layer in before:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled
