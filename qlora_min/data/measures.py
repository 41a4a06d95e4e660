"""What an evaluation measured: sums over rows, and the figures that follow from them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np


class Choice(NamedTuple):
    """A multiple-choice row: the right letter, the chosen one, its probability, and 1 / number of options."""

    right: str
    chosen: str
    probability: float
    chance: float


@dataclass(frozen=True)
class Evaluation:
    """Results over a set of rows: sums, and what follows from them.

    choices: one for each multiple-choice row, ordered by row length.
    """

    rows: int
    supervised_tokens: int
    loss_sum: float
    right_tokens: int
    choices: tuple[Choice, ...] = ()

    @property
    def loss(self) -> float:
        return self.loss_sum / max(1, self.supervised_tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp overflows above 709

    @property
    def token_accuracy(self) -> float:
        return self.right_tokens / max(1, self.supervised_tokens)

    @property
    def option_rows(self) -> int:
        return len(self.choices)

    @property
    def option_accuracy(self) -> float | None:
        """None without multiple-choice rows, as `chance` and `majority`."""
        return float(np.mean([c.right == c.chosen for c in self.choices])) if self.choices else None

    @property
    def chance(self) -> float | None:
        return float(np.mean([c.chance for c in self.choices])) if self.choices else None

    @property
    def majority(self) -> list | None:
        """[the letter that is right most often, the accuracy of always choosing it]."""
        if not self.choices:
            return None
        ((letter, count),) = Counter(sorted(c.right for c in self.choices)).most_common(1)
        return [letter, count / self.option_rows]

    def as_dict(self) -> dict[str, Any]:
        names = "rows supervised_tokens loss token_accuracy option_rows option_accuracy chance majority perplexity"
        return {name: getattr(self, name) for name in names.split()}

    @classmethod
    def join(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Of all parts' rows together."""
        sums = (sum(getattr(p, f.name) for p in parts) for f in fields(cls)[:-1])
        return cls(*sums, tuple(c for p in parts for c in p.choices))
