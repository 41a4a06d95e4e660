"""What an epoch shows of the rows: how often each data set's, and multiple-choice options in which order."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from .examples import permute_options
from .rows import Row


def epoch_rows(sizes: Sequence[int], mix: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The rows that an epoch visits: (n,) indices into the rows of all data sets, one behind the other.

    A weight of 2 visits each row of its data set twice; 0.5 half of them, and the other half in the next epoch; 1.25
    each once and a quarter again. n is the same in all epochs. Without a mix, each row once.

    Args:
        sizes: rows of each data set. mix: a weight for each, or nothing.
    """
    parts, start = [np.arange(0)], 0
    for number, (size, weight) in enumerate(zip(sizes, mix or [1.0] * len(sizes), strict=True)):
        whole, fraction = divmod(weight, 1)
        some = max(round(fraction * size), int(not whole and size > 0))
        order = list(range(size))
        random.Random(f"{seed}/mix/{number}").shuffle(order)
        in_turn = [order[(epoch * some + i) % size] for i in range(some)]
        parts += [np.arange(start, start + size)] * int(whole) + [start + np.array(in_turn, int)]
        start += size
    return np.concatenate(parts)


def shuffle_options(row: Row, encoder: Any, max_length: int, seed: int, epoch: int, visit: int) -> Row:
    """A multiple-choice row with its options in the order of this visit (an index into `epoch_rows`), encoded anew.

    Returns the row as it is if its options can't change places (`permute_options`), or if it would become longer than
    `max_length` tokens or have more supervised tokens: so the memory that was planned suffices. Takes some 2 ms.
    """
    example = row.example
    order = list(range(len(example.choice.letters) if example.choice else 0))
    random.Random(f"{seed}/{epoch}/{visit}/options").shuffle(order)
    permuted = permute_options(example, order)
    new = encoder.encode_examples([permuted])[0] if permuted else row
    fits = isinstance(new, Row) and len(new) <= max_length and new.supervised.sum() <= row.supervised.sum()
    return new if fits else row
