"""Batches: rows -> optimizer steps -> micro-batches, and the one layout that every model computes on.

A micro-batch is packed: its rows stand one behind the other in a single sequence of N tokens, `cu_seqlens` says where
each begins and ends, and attention stays within a row. Nothing is padded but, where shapes must repeat (CUDA graphs),
the end of the sequence; that padding is a row of its own whose losses have weight 0.

The result of an optimizer step does not depend on how its rows are cut into micro-batches or dealt out to processes:
losses are summed, not averaged, and dropout's mask follows the row's place in the step (`row_ids`), not the cut.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .data import ChatEncoder, Row
from .reading import permute_options


@dataclass(frozen=True)
class Packed:
    """Rows one behind the other.

    input_ids, position_ids: (N,) int64, the position within the row. row_ids: (N,) int32, the row's place in its
    optimizer step. cu_seqlens: (R + 1,) int32, where rows begin and end, the last end repeated for rows that are not
    there. loss_positions, targets: (S,) int64, the tokens that predict a supervised one, and those. loss_weights: (S,)
    fp32, 0 on padding. max_seqlen: an upper bound of the rows' lengths. n_tokens, n_supervised: without padding.
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
    def shape(self) -> tuple[int, ...]:
        """(N, S, R + 1, max_seqlen): batches of one shape can take each other's place."""
        return len(self.input_ids), len(self.targets), len(self.cu_seqlens), self.max_seqlen

    @property
    def n_rows(self) -> int:
        """Without padding."""
        return sum(begin < self.n_tokens for begin, _ in self.spans())

    def copy_(self, other: "Packed") -> None:
        """Take over the values of another of the same shape."""
        for mine, theirs in zip(vars(self).values(), vars(other).values()):
            if isinstance(mine, Tensor):
                mine.copy_(theirs, non_blocking=True)

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
    places: Sequence[int] | None = None,
    tokens: int | None = None,
    supervised: int | None = None,
    count: int | None = None,
    longest: int | None = None,
) -> Packed:
    """Rows -> Packed, on the CPU.

    Args:
        places: each row's place in its optimizer step; 0, 1, ... if not given.
        tokens, supervised, count: pad to N tokens, S supervised positions and R rows. Not at all if not given.
        longest: the bound of lengths to state, the padding's included; the least if not given.
    """
    lengths = [len(r) for r in rows]
    total = sum(lengths)
    tokens = tokens or total
    input_ids = torch.cat([r.ids for r in rows]).long()
    taught = torch.cat([r.supervised for r in rows])
    ends = torch.tensor([0, *lengths]).cumsum(0)
    taught[ends[:-1]] = False  # the first token of a row has no predecessor
    positions = taught.nonzero()[:, 0] - 1
    repeats = torch.tensor(lengths)
    position_ids = torch.arange(total) - ends[:-1].repeat_interleave(repeats)
    row_ids = torch.tensor(range(len(rows)) if places is None else places).repeat_interleave(repeats)
    more, fewer = tokens - total, (supervised or len(positions)) - len(positions)
    longest = min(tokens, longest or max([*lengths, more]))
    assert min(more, fewer) >= 0 and len(rows) <= (count or len(rows)) and longest >= max([*lengths, more])
    rest = 1 + count - len(rows) if count else int(more > 0)  # the padding, and rows of no tokens
    return Packed(
        input_ids=F.pad(input_ids, (0, more)),
        position_ids=F.pad(position_ids, (0, more)),
        row_ids=F.pad(row_ids, (0, more)).int(),
        cu_seqlens=torch.cat([ends, ends.new_full((rest,), tokens)]).int(),
        loss_positions=F.pad(positions, (0, fewer)),
        targets=F.pad(input_ids[positions + 1], (0, fewer)),
        loss_weights=F.pad(torch.ones(len(positions)), (0, fewer)),
        max_seqlen=longest,
        n_tokens=total,
        n_supervised=len(positions),
    )


def round_up(supervised: int) -> int:
    """To how many supervised positions a batch is padded where shapes must repeat: a power of 2, 64 at least."""
    return 2 ** max(6, (supervised - 1).bit_length())


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


def dropout_seed(seed: int, step: int) -> Tensor:
    """The seed of an optimizer step's dropout: a function of where it stands, so that a resumed run draws the same."""
    return torch.tensor(random.Random(f"dropout/{seed}/{step}").getrandbits(31), dtype=torch.int32)


def steps_per_epoch(n_rows: int, batch_size: int, grad_accum: int) -> int:
    """Optimizer steps in one pass, the last incomplete one included."""
    return math.ceil(n_rows / (batch_size * grad_accum))


def epoch_rows(sizes: Sequence[int], mix: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The rows that an epoch visits: (n,) indices into all data sets' rows, one behind the other.

    A weight of 2 visits each row of its data set twice; of 0.5, half of them, and the other half in the next epoch; of
    1.25, each once and a quarter again. n is the same in all epochs. Without a mix, each row once.

    Args:
        sizes: rows of each data set.
        mix: a weight for each, or nothing.
    """
    parts, start = [np.arange(0)], 0
    for number, (size, weight) in enumerate(zip(sizes, mix or [1.0] * len(sizes), strict=True)):
        whole, share = divmod(weight, 1)
        some = max(round(share * size), int(not whole and size > 0))
        order = list(range(size))
        random.Random(f"{seed}/mix/{number}").shuffle(order)
        in_turn = [order[(epoch * some + i) % size] for i in range(some)]
        parts += [np.arange(start, start + size)] * int(whole) + [start + np.array(in_turn, int)]
        start += size
    return np.concatenate(parts)


def shuffle_options(row: Row, encoder: ChatEncoder, longest: int, seed: int, epoch: int, visit: int) -> Row:
    """A multiple-choice row with its options in the order of this visit (an index into `epoch_rows`), encoded anew.

    The row as it is, if it has no options or they can't change places (`permute_options`), or if it would become longer
    than `longest` tokens or learn more tokens than now: what memory was planned for holds for every order. Some 2 ms.
    """
    example = row.example
    order = list(range(len(example.choice.letters) if example.choice else 0))
    random.Random(f"{seed}/{epoch}/{visit}/options").shuffle(order)
    permuted = permute_options(example, order)
    new = encoder.encode_examples([permuted])[0] if permuted else row
    fits = isinstance(new, Row) and len(new) <= longest and new.supervised.sum() <= row.supervised.sum()
    return new if fits else row


def optimizer_steps(n_rows: int, batch_size: int, grad_accum: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """One epoch as optimizer steps, each a list of micro-batches, each a list of row indices.

    The order is a function of (seed, epoch) alone, so a resumed run needs to know only how many steps are behind it.
    """
    order = list(range(n_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    micro = [order[i : i + batch_size] for i in range(0, n_rows, batch_size)]
    return [micro[i : i + grad_accum] for i in range(0, len(micro), grad_accum)]


def share(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Rows dealt out evenly: the longest first, each to the one of `count` parts that has the fewest tokens so far.

    Returns:
        Indices into `lengths`, ascending, a list a part; where there are fewer rows than parts, some are empty.
    """
    parts, filled = [[] for _ in range(count)], [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        emptiest = filled.index(min(filled))
        parts[emptiest].append(i)
        filled[emptiest] += lengths[i]
    return [sorted(p) for p in parts]
