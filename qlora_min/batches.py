"""Batches: rows -> optimizer steps -> micro-batches, and the one layout that every model computes on.

A micro-batch is packed: its rows are concatenated into one sequence of N tokens, `cu_seqlens` says where each begins
and ends, and attention stays within a row. There is padding only where shapes must repeat (CUDA graphs) or be equal in
all processes (a sharded base): tokens at the end, in a row of their own, and loss positions of weight 0.

The result of an optimizer step does not depend on how its rows are cut into micro-batches or divided between
processes: losses are summed, not averaged, and dropout's mask follows the row's place in the step (`row_ids`).
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .chat import ChatEncoder
from .config import Config
from .data.epochs import epoch_rows, shuffle_options
from .data.rows import Row, Rows


@dataclass(frozen=True)
class Packed:
    """R rows one behind the other: N tokens, S positions whose next token is supervised (padding included).

    Attributes:
        input_ids, position_ids: (N,) int64, the position within the row.
        row_ids: (N,) int32, the row's place in its optimizer step.
        cu_seqlens: (R + 1,) int32, where rows begin and end; the last end is repeated for rows without tokens.
        loss_positions, targets: (S,) int64, where a supervised token is predicted, and that token.
        loss_weights: (S,) fp32, 1, or 0 for padding.
        max_seqlen: an upper bound on the rows' lengths. n_tokens, n_supervised: without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    row_ids: Tensor
    cu_seqlens: Tensor
    loss_positions: Tensor
    targets: Tensor
    loss_weights: Tensor
    max_seqlen: int
    n_tokens: int
    n_supervised: int

    @property
    def n_rows(self) -> int:
        """Without padding."""
        return sum(begin < self.n_tokens for begin, _ in self.spans())

    def to(self, device: torch.device) -> "Packed":
        values = (getattr(self, f.name) for f in fields(self))
        return Packed(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in values))

    def spans(self) -> list[tuple[int, int]]:
        """(begin, end) of each row."""
        return [(a, b) for a, b in itertools.pairwise(self.cu_seqlens.tolist()) if b > a]

    def select(self, begin: int, end: int) -> "Packed":
        """One row by itself, found by `spans`."""
        chosen = (self.loss_positions >= begin) & (self.loss_positions < end)
        tokens = (t[begin:end] for t in (self.input_ids, self.position_ids, self.row_ids))
        return Packed(
            *tokens, self.cu_seqlens.new_tensor([0, end - begin]), self.loss_positions[chosen] - begin,
            self.targets[chosen], self.loss_weights[chosen], end - begin, end - begin, int(chosen.sum()),
        )  # fmt: skip


def pack(
    rows: Sequence[Row],
    row_ids: Sequence[int] | None = None,
    n_tokens: int | None = None,
    n_supervised: int | None = None,
    n_rows: int | None = None,
    max_seqlen: int | None = None,
) -> Packed:
    """Rows -> Packed, on the CPU.

    Args:
        row_ids: each row's place in its optimizer step; 0, 1, ... if not given.
        n_tokens, n_supervised: N and S to pad to. n_rows: pad to R = n_rows + 1, one of them padding. Default: none.
        max_seqlen: the upper bound to record, which covers the row of padding too; by default the smallest one.
    """
    lengths = [len(r) for r in rows]
    total = sum(lengths)
    n_tokens = n_tokens or total
    # In NumPy: small operations cost PyTorch several times as much on the CPU, and this is done for every micro-batch.
    input_ids = np.concatenate([r.input_ids.numpy() for r in rows], dtype=np.int64)
    supervised = np.concatenate([r.supervised.numpy() for r in rows])
    ends = np.cumsum([0, *lengths], dtype=np.int64)
    supervised[ends[:-1]] = False  # the first token of a row has no predecessor
    positions = supervised.nonzero()[0] - 1
    position_ids = np.arange(total) - ends[:-1].repeat(lengths)
    places = np.array(range(len(rows)) if row_ids is None else row_ids, np.int32).repeat(lengths)
    pad_tokens, pad_positions = n_tokens - total, (n_supervised or len(positions)) - len(positions)
    pad_rows = 1 + n_rows - len(rows) if n_rows else int(pad_tokens > 0)  # a row of padding, the others without tokens
    longest = max([*lengths, pad_tokens])
    max_seqlen = min(n_tokens, max_seqlen or longest)
    assert min(pad_tokens, pad_positions, pad_rows, max_seqlen - longest) >= 0

    def padded(values: np.ndarray, n: int, value: int = 0) -> Tensor:
        return torch.from_numpy(np.concatenate([values, np.full(n, value, values.dtype)]))

    return Packed(
        input_ids=padded(input_ids, pad_tokens),
        position_ids=padded(position_ids, pad_tokens),
        row_ids=padded(places, pad_tokens),
        cu_seqlens=padded(ends.astype(np.int32), pad_rows, n_tokens),
        loss_positions=padded(positions, pad_positions),
        targets=padded(input_ids[positions + 1], pad_positions),
        loss_weights=padded(np.ones(len(positions), np.float32), pad_positions),
        max_seqlen=max_seqlen,
        n_tokens=total,
        n_supervised=len(positions),
    )


def balance(lengths: Sequence[int], n_parts: int) -> list[list[int]]:
    """Divide rows evenly by tokens: the longest first, each to the part that has the fewest tokens so far.

    Returns:
        Indices into `lengths`, ascending, a list a part; where there are fewer rows than parts, some are empty.
    """
    parts, filled = [[] for _ in range(n_parts)], [0] * n_parts
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = filled.index(min(filled))
        parts[emptiest].append(i)
        filled[emptiest] += lengths[i]
    return [sorted(p) for p in parts]


def cut(lengths: Sequence[int], n_tokens: int) -> list[list[int]]:
    """Divide rows evenly into micro-batches of at most `n_tokens` tokens (or the longest row), and as few as possible.

    Returns:
        Indices into `lengths`, a list a micro-batch.
    """
    n_tokens = max([n_tokens, *lengths])
    for count in range(-(-sum(lengths) // n_tokens), len(lengths) + 1):
        parts = balance(lengths, count)
        if all(sum(lengths[i] for i in part) <= n_tokens for part in parts):
            break
    return [part for part in parts if part]


def dropout_seed(seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """0-dim int32: the seed of an optimizer step's dropout, so that a resumed run draws the same masks."""
    return torch.full((), random.Random(f"dropout/{seed}/{step}").getrandbits(31), dtype=torch.int32, device=device)


def optimizer_steps(n_rows: int, rows_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch in its random order, a function of (seed, epoch) alone, as optimizer steps: lists of row indices."""
    order = list(range(n_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[i : i + rows_per_step] for i in range(0, n_rows, rows_per_step)]


class Schedule:
    """What each optimizer step learns from: a function of the options and the step alone.

    Args:
        rows: the training rows of all data sets; sizes: how many each has.

    Attributes:
        n_rows, n_tokens: visited in an epoch. steps_per_epoch: the last, incomplete one included.
        total_steps: of the run. eval_every: steps between evaluations.
    """

    def __init__(self, rows: Rows, sizes: Sequence[int], config: Config, encoder: ChatEncoder):
        self.rows, self.sizes, self.config, self.encoder = rows, sizes, config, encoder
        visited = epoch_rows(sizes, config.mix, config.seed, 0)
        self.n_rows, self.n_tokens = len(visited), int(rows.lengths[visited].sum())
        self.rows_per_step = config.batch_size * config.grad_accum
        self.steps_per_epoch = math.ceil(self.n_rows / self.rows_per_step)
        total = math.ceil(config.epochs * self.steps_per_epoch)
        self.total_steps = min(total, config.max_steps or total)
        self.eval_every = config.eval_every or math.ceil(self.steps_per_epoch / 4)
        self._epoch = lru_cache(1)(self._epoch)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, list[list[int]]]:
        steps = optimizer_steps(self.n_rows, self.rows_per_step, self.config.seed, epoch)
        return epoch_rows(self.sizes, self.config.mix, self.config.seed, epoch), steps

    def __getitem__(self, step: int) -> list[Row]:
        """The rows of an optimizer step (0-based), those of all processes."""
        c, (epoch, index) = self.config, divmod(step, self.steps_per_epoch)
        visited, steps = self._epoch(epoch)
        rows = [self.rows[visited[visit]] for visit in steps[index]]
        if not c.shuffle_options:
            return rows
        longest = int(self.rows.lengths.max())
        return [shuffle_options(r, self.encoder, longest, c.seed, epoch, v) for r, v in zip(rows, steps[index])]

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after so many steps: at the start, every `eval_every` steps, and at the end."""
        return step % self.eval_every == 0 or step == self.total_steps
