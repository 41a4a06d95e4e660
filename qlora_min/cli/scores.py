"""What is computed from answers: intervals, confusion, calibration, and how alike answers and references are.

    wilson       (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)         Wilson 1927; z = 1.96 for 95%
    calibration  ECE = sum over bins of (rows in it / rows) · |accuracy - mean confidence|     Guo et al. 2017
    ROUGE-L      F1 of the longest common subsequence of words, averaged over rows             Lin 2004, rouge-score
    BLEU         geometric mean of 1- to 4-gram precisions with a brevity penalty, over all rows   Papineni et al. 2002,
                 sacrebleu (Post 2018); n-gram orders longer than every answer are ignored

ROUGE-L and BLEU need the extra `eval` (rouge-score and sacrebleu).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..data.measures import Choice
from ..run.answers import Answer

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution
BINS = 10  # of confidence


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% interval of the fraction right / total, within [0, 1]; (0, 1) if total is 0."""
    if not total:
        return 0.0, 1.0
    p, zz = right / total, Z95**2 / total
    half = Z95 * math.sqrt(p * (1 - p) / total + zz / (4 * total))
    return max(0.0, (p + zz / 2 - half) / (1 + zz)), min(1.0, (p + zz / 2 + half) / (1 + zz))


def between(interval: tuple[float, float]) -> str:
    """(0.1, 0.256) -> 10.0-25.6%"""
    return f"{100 * interval[0]:.1f}-{interval[1]:.1%}"


class Choices:
    """The answers to n multiple-choice rows, those of `Evaluation.choices`.

    Attributes:
        right, chosen: (n,) letters.
        hits: (n,) bool, whether the right letter was chosen.
        confidence: (n,) the probability of the chosen option, by a softmax over the options of the row.
        letters: all letters that are right or chosen in some row, sorted.
    """

    def __init__(self, rows: Sequence[Choice]):
        right, chosen, confidence, _ = zip(*rows) if rows else ((), (), (), ())
        self.right, self.chosen, self.confidence = np.array(right, str), np.array(chosen, str), np.array(confidence)
        self.hits, self.letters = self.right == self.chosen, sorted({*right, *chosen})

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the option accuracy."""
        return wilson(int(self.hits.sum()), len(self.hits))

    @property
    def confusion(self) -> np.ndarray:
        """(L, L) number of rows of each right letter (first dimension) and chosen letter, in the order of `letters`."""
        pairs = Counter(zip(self.right.tolist(), self.chosen.tolist()))
        return np.array([[pairs[right, chosen] for chosen in self.letters] for right in self.letters], int)

    @property
    def bins(self) -> list[tuple[int, float, float]]:
        """(rows, mean confidence, accuracy) of each of ten equal bins of confidence; (0, nan, nan) for an empty one."""
        at = np.minimum((np.nan_to_num(self.confidence) * BINS).astype(int), BINS - 1)
        parts = [(self.confidence[at == i], self.hits[at == i]) for i in range(BINS)]
        return [(len(c), c.mean().item(), h.mean().item()) if len(c) else (0, math.nan, math.nan) for c, h in parts]

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: 0 if answers of 60% confidence are right in 60% of the rows, and so on."""
        return sum(n / len(self.hits) * abs(accuracy - confidence) for n, confidence, accuracy in self.bins if n)

    def as_dict(self) -> dict[str, Any]:
        return {
            "interval": list(self.interval),
            "letters": self.letters,
            "confusion": self.confusion.tolist(),
            "mean_confidence": float(self.confidence.mean()),
            "calibration_error": self.calibration_error,
            "calibration_bins": [{"rows": n, "confidence": c, "accuracy": a} for n, c, a in self.bins if n],
        }


@dataclass(frozen=True)
class TextScores:
    """Scores of generated answers. exact_match, valid_format: fractions in [0, 1]; rouge_l, bleu: in [0, 100].

    valid_format: None if no row is multiple choice.
    """

    rows: int
    exact_match: float
    valid_format: float | None
    rouge_l: float
    bleu: float

    as_dict = asdict


def text_scores(rows: Sequence[Answer]) -> TextScores:
    """Compare answers with their references."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    scorer = RougeScorer(["rougeL"])  # without a stemmer, the library's default; its words are [a-z0-9]+
    valid = [valid_format(row.answer, row.letters) for row in rows if row.letters]
    bleu = BLEU(effective_order=True).corpus_score([row.answer for row in rows], [[row.reference for row in rows]])
    return TextScores(
        rows=len(rows),
        exact_match=float(np.mean([row.answer.split() == row.reference.split() for row in rows])),
        valid_format=float(np.mean(valid)) if valid else None,
        rouge_l=100 * float(np.mean([scorer.score(row.reference, row.answer)["rougeL"].fmeasure for row in rows])),
        bleu=float(bleu.score),
    )


def valid_format(answer: str, letters: Sequence[str]) -> bool:
    """Whether an answer begins with an option's letter and a colon: "B: ..." does, "B" does not."""
    return answer.startswith(tuple(f"{letter}:" for letter in letters))
