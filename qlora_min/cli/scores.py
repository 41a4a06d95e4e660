"""Measures computed from counts and texts: intervals, confusion, calibration, similarity of answers and references.

    wilson       (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)         Wilson 1927; z = 1.96 for 95%
    calibration  ECE = sum over bins of (rows in it / rows) · |accuracy - mean confidence|     Guo et al. 2017
    ROUGE-L      F1 of the longest common subsequence of words, a mean over rows               Lin 2004, rouge-score
    BLEU         geometric mean of 1- to 4-gram precisions with a brevity penalty, over all rows   Papineni et al. 2002,
                 sacrebleu (Post 2018); orders longer than all answers are left out

ROUGE-L and BLEU need the extra `eval` (rouge-score and sacrebleu).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..evaluation import Choice

Z95 = 1.959963984540054  # the 97.5% quantile of the normal distribution
BINS = 10


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


@dataclass(frozen=True)
class Choices:
    """The answers to n multiple-choice rows.

    Attributes:
        right, chosen: (n,) letters.
        confidence: (n,) the probability of the chosen option, by a softmax over the options of the row.
    """

    right: np.ndarray
    chosen: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Choice]) -> "Choices":
        """From `Evaluation.choices`."""
        right, chosen, confidence, _ = zip(*rows) if rows else ((), (), (), ())
        return cls(np.array(right, str), np.array(chosen, str), np.array(confidence, float))

    def __len__(self) -> int:
        return len(self.right)

    @property
    def hits(self) -> np.ndarray:
        return self.right == self.chosen

    @property
    def letters(self) -> list[str]:
        return sorted({*self.right.tolist(), *self.chosen.tolist()})

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of the option accuracy."""
        return wilson(int(self.hits.sum()), len(self))

    @property
    def confusion(self) -> np.ndarray:
        """(L, L) numbers of rows by right letter and chosen letter, in the order of `letters`."""
        pairs = Counter(zip(self.right.tolist(), self.chosen.tolist()))
        return np.array([[pairs[right, chosen] for chosen in self.letters] for right in self.letters], int)

    @property
    def bins(self) -> list[tuple[int, float, float]]:
        """(rows, mean confidence, accuracy) of ten bins of confidence of equal width; (0, nan, nan) if empty."""
        at = np.minimum((np.nan_to_num(self.confidence) * BINS).astype(int), BINS - 1)
        parts = [(self.confidence[at == i], self.hits[at == i]) for i in range(BINS)]
        return [(len(c), c.mean().item(), h.mean().item()) if len(c) else (0, math.nan, math.nan) for c, h in parts]

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: 0 where answers given with 60% confidence are right in 60% of the rows."""
        return sum(n / len(self) * abs(accuracy - confidence) for n, confidence, accuracy in self.bins if n)

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
    """Scores of generated answers: fractions in [0, 1], ROUGE-L and BLEU in [0, 100]. valid_format: None if no row is
    multiple choice."""

    rows: int
    exact_match: float
    valid_format: float | None
    rouge_l: float
    bleu: float

    as_dict = asdict


def need_libraries() -> None:
    """Raise ValueError if rouge-score or sacrebleu is not installed."""
    try:
        import rouge_score.rouge_scorer  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as e:
        raise ValueError(f"--generate needs rouge-score and sacrebleu ({e}): pip install 'qlora_min[eval]'") from None


def text_scores(
    answers: Sequence[str], references: Sequence[str], letters: Sequence[Sequence[str] | None]
) -> TextScores:
    """Compare answers with their references.

    Args:
        letters: the option letters of each row, None if it is not multiple choice. The format of an answer is valid if
            it begins with one of them and a colon.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    scorer = RougeScorer(["rougeL"])  # without a stemmer, the library's default; its words are [a-z0-9]+
    rouge = [scorer.score(r, a)["rougeL"].fmeasure for a, r in zip(answers, references, strict=True)]
    exact = [" ".join(a.split()) == " ".join(r.split()) for a, r in zip(answers, references)]
    valid = [valid_format(a, some) for a, some in zip(answers, letters, strict=True) if some]
    return TextScores(
        rows=len(answers),
        exact_match=float(np.mean(exact)),
        valid_format=float(np.mean(valid)) if valid else None,
        rouge_l=100 * float(np.mean(rouge)),
        bleu=float(BLEU(effective_order=True).corpus_score(list(answers), [list(references)]).score),
    )


def valid_format(answer: str, letters: Sequence[str]) -> bool:
    """Whether an answer begins with a letter of an option and a colon: "B: ..." does, "B" does not."""
    return answer.startswith(tuple(f"{letter}:" for letter in letters))
