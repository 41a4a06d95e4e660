"""What the modules of a model can compute, found by trying: whether packed rows stay apart, and what its logits are."""

import torch
from torch import Tensor

from ..base import Base
from ..batches import pack
from ..data.rows import Row
from ..engine import Modules
from ..ops import formulas, masks
from ..system.device import autocast, is_out_of_memory
from ..system.text import clipped


def modules_of(base: Base, max_seqlen: int) -> Modules:
    """The engine `Modules` of a base, with packed rows if they stay apart.

    Raises:
        ValueError: the model's logits are not what its head makes of its hidden states, in any way known.
    """
    engine = Modules(base)
    if engine.device.type == "cuda":
        tokens = torch.arange(8, device=engine.device)
        x = torch.ones(8, 64, dtype=base.dtype, device=engine.device)
        keys = masks.dropout_keys(tokens[3].int(), tokens, tokens)
        formulas.try_kernels({"dropout": (x, 0.1, keys, 1)}, base.dtype)
    engine.mixing = why_rows_mix(engine, max_seqlen)
    engine.capturable = not engine.mixing
    return engine


@torch.no_grad()
def why_rows_mix(engine: Modules, max_seqlen: int) -> str:
    """Do packed rows give what each gives by itself, through the model's own forward and attention? "" if they do."""
    generator, vocabulary = torch.Generator().manual_seed(0), engine.lm_head.weight.shape[0]
    rows = []
    for length in (3, max_seqlen, 2 + max_seqlen // 3):  # beyond any window or rotary limit that a row can reach
        ids = torch.randint(vocabulary, (length,), generator=generator, dtype=torch.int32)
        rows.append(Row(ids, torch.arange(length) > 0, ""))
    bound = 1e-3 if engine.base.dtype == torch.float32 else 0.2  # of a token; the rounding of 16 bits adds up
    inputs = [{"input_ids": r.input_ids.long()[None].to(engine.device), "use_cache": False} for r in rows]
    with autocast(engine.device, engine.base.dtype):
        own = [engine.decoder(**one).last_hidden_state[0].float() for one in inputs]
        reference = engine.base.model(**inputs[0]).logits[0].float()
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
    except Exception as e:  # models that know no packed rows fail in all ways
        if is_out_of_memory(e):
            raise
        return str(e) if type(e) is NotImplementedError else f"it takes no packed rows ({clipped(e, 80)})"
    return "packed rows would mix" if _distance(packed, torch.cat(own)) > bound else ""


def _distance(mine: Tensor, reference: Tensor) -> float:
    """The largest relative distance of a token's vector: (N, D), (N, D). Infinite where one is not finite."""
    error = ((mine - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-6)).max().item()
    return error if error == error else float("inf")
