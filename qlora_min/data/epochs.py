"""What differs between epochs: which rows are visited, and in which order multiple-choice options are shown."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from .examples import permute_options
from .rows import Row


def epoch_rows(sizes: Sequence[int], mix: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The rows that an epoch visits, as indices (n,) into the concatenated rows of all data sets.

    With a weight of 2, each row of the data set is visited twice in an epoch; with 0.5, half of the rows, and the other
    half in the next epoch; with 1.25, each row once and a quarter of them again. n is the same in all epochs.

    Args:
        sizes: the number of rows of each data set. mix: the weight of each data set; if empty, all are 1.
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
    """Encode a multiple-choice row with its options in a random order that depends on (seed, epoch, visit).

    The row is returned unchanged if its options can't be reordered (`permute_options`), or if it would become longer
    than `max_length` tokens or have more supervised tokens, so that it fits the planned memory. Takes about 2 ms.

    Args:
        visit: the index into `epoch_rows`.
    """
    example = row.example
    order = list(range(len(example.choice.letters) if example.choice else 0))
    random.Random(f"{seed}/{epoch}/{visit}/options").shuffle(order)
    permuted = permute_options(example, order)
    new = encoder.encode_examples([permuted])[0] if permuted else row
    fits = isinstance(new, Row) and len(new) <= max_length and new.supervised.sum() <= row.supervised.sum()
    return new if fits else row
