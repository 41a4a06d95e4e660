"""Which engine computes a model, and whether as CUDA graphs."""

from ..base import Base
from ..engine import Engine
from .decoder import Decoder, unsupported
from .graphs import Captured
from .probe import modules_of


def make_engine(base: Base, name: str, max_seqlen: int) -> tuple[Engine, str, str]:
    """(engine, its name, a remark on it or "") for a base.

    Args:
        name: auto, modules or fused. max_seqlen: of the rows that may come.

    Raises:
        ValueError: the engine asked for can't compute the model.
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
    """An engine as CUDA graphs, where there are any; micro-batches have at most `n_tokens` tokens."""
    graphs = engine.device.type == "cuda" and engine.capturable
    return Captured(engine, max_seqlen, max(64, n_tokens // 32)) if graphs else engine


def for_evaluation(base: Base, max_seqlen: int, n_tokens: int) -> Engine:
    """The engine for `hidden_states` of rows of up to `max_seqlen` tokens, `n_tokens` at a time."""
    return captured(make_engine(base, "auto", max_seqlen)[0], max_seqlen, n_tokens)
