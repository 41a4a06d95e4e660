"""The choice of an engine for a model, and of CUDA graphs for it.

What the modules of a model can compute is found by trying: whether packed rows stay apart, and whether its logits are
what `Modules` makes of its hidden states.
"""

import torch
from torch import Tensor

from ..base import Base
from ..batches import pack
from ..data.rows import Row
from ..engine import Engine, Modules
from ..ops import attention, formulas, masks
from ..system.device import autocast, is_out_of_memory
from ..system.text import clipped
from .decoder import Decoder, unsupported
from .graphs import Captured


def make_engine(base: Base, name: str, max_seqlen: int) -> tuple[Engine, str, str]:
    """Returns (engine, its name, a remark on it or "") for a base.

    Args:
        name: auto, modules or fused. max_seqlen: an upper bound on the lengths of rows.

    Raises:
        ValueError: the requested engine can't compute the model.
    """
    why = None if name == "modules" else unsupported(base, max_seqlen)
    if (why and name == "fused") or (base.sharded and (why or name == "modules")):
        asked = "--engine fused: " if name == "fused" else "--shard: needs --engine fused, and "
        raise ValueError(f"{asked}{'--engine modules is asked for' if name == 'modules' else why}; leave it out")
    if name != "modules" and not why:
        return Decoder(base, max_seqlen), "fused", ""
    engine = modules_of(base, max_seqlen)
    mixing = engine.mixing and f"rows one at a time: {engine.mixing}"
    return engine, "modules", "; ".join(filter(None, [why, mixing]))


def captured(engine: Engine, max_seqlen: int, n_tokens: int) -> Engine:
    """An engine captured as CUDA graphs, or itself if it can't be; micro-batches have at most `n_tokens` tokens."""
    graphs = engine.device.type == "cuda" and engine.capturable
    return Captured(engine, max_seqlen, max(64, n_tokens // 32)) if graphs else engine


def for_evaluation(base: Base, max_seqlen: int, n_tokens: int) -> Engine:
    """The engine for `hidden_states` of rows of up to `max_seqlen` tokens, in batches of `n_tokens`."""
    return captured(make_engine(base, "auto", max_seqlen)[0], max_seqlen, n_tokens)


def modules_of(base: Base, max_seqlen: int) -> Modules:
    """The engine `Modules` of a base, which packs rows if they stay apart.

    Raises:
        ValueError: the model's forward pass fails, its hidden states overflow, or it computes its logits in a way that
            `Modules.logits` does not implement.
    """
    engine = Modules(base)
    if engine.device.type == "cuda":
        tokens = torch.arange(8, device=engine.device)
        x = torch.ones(8, 64, dtype=base.dtype, device=engine.device)
        keys = masks.dropout_keys(tokens[3].int(), tokens, tokens)
        formulas.try_kernels({"dropout": (x, 0.1, keys, 1)}, base.dtype)
        c = base.model.config.get_text_config()
        width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        attention.try_kernels(width, base.dtype, engine.device)
    engine.mixing = why_rows_mix(engine, max_seqlen)
    engine.capturable = not engine.mixing
    return engine


@torch.no_grad()
def why_rows_mix(engine: Modules, max_seqlen: int) -> str:
    """Why packed rows give other hidden states than each row does alone, by the model's own attention; "" if not."""
    generator, vocabulary = torch.Generator().manual_seed(0), engine.lm_head.weight.shape[0]
    rows = []
    for length in (3, max_seqlen, 2 + max_seqlen // 3):  # reaches any window or rotary limit that rows can
        ids = torch.randint(vocabulary, (length,), generator=generator, dtype=torch.int32)
        rows.append(Row(ids, torch.arange(length) > 0, ""))
    bound = 1e-3 if engine.base.dtype == torch.float32 else 0.2  # relative; 16-bit rounding errors accumulate
    inputs = [{"input_ids": r.input_ids.long()[None].to(engine.device), "use_cache": False} for r in rows]
    try:
        with autocast(engine.device, engine.base.dtype):
            own = [engine.decoder(**one).last_hidden_state[0].float() for one in inputs]
            reference = engine.base.model(**inputs[0]).logits[0].float()
    except Exception as e:  # of any type: layers that are used in other ways than by calling them, say
        if is_out_of_memory(e):
            raise
        kind = engine.base.model.config.model_type
        raise ValueError(
            f"model '{engine.base.name}': {kind} is not supported, since its forward pass fails ({clipped(e, 100)})"
        ) from None
    if not all(states.isfinite().all() for states in own):
        raise ValueError(
            f"model '{engine.base.name}': its hidden states overflow {str(engine.base.dtype).removeprefix('torch.')}; "
            "use --precision fp32, or bf16 where the GPU has it"
        )
    if _distance(engine.logits(own[0]), reference) > min(bound, 1e-2):
        raise ValueError(
            f"model '{engine.base.name}': {engine.base.model.config.model_type} changes its logits in a way that is "
            "not implemented"
        )
    try:
        packed = engine.hidden_states(pack(rows).to(engine.device)).float()
    except Exception as e:  # models that do not support packed rows fail in many ways
        if is_out_of_memory(e):
            raise
        return str(e) if type(e) is NotImplementedError else f"it takes no packed rows ({clipped(e, 80)})"
    return "packed rows would mix" if _distance(packed, torch.cat(own)) > bound else ""


def _distance(mine: Tensor, reference: Tensor) -> float:
    """The largest relative distance between the vectors of a token, of (N, D) and (N, D); infinite if it is NaN."""
    error = ((mine - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-6)).max().item()
    return error if error == error else float("inf")
