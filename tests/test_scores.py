"""Measures against their definitions, and against the libraries' own calls."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_min.cli import scores
from qlora_min.cli.scores import Answer, Choices, text_scores, wilson
from qlora_min.evaluation import Choice, Evaluation


def test_wilson_by_hand():
    """Published values: Newcombe 1998, table I, method 3 (score)."""
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(1, 3000), st.data())
def test_wilson_holds_the_fraction_and_solves_its_equation(total, data):
    right = data.draw(st.integers(0, total))
    p = right / total
    for bound in wilson(right, total):
        assert 0 <= bound <= 1
        if 1e-9 < bound < 1 - 1e-9:  # (p - bound)² = z² bound (1 - bound) / n
            assert (p - bound) ** 2 == pytest.approx(scores.Z95**2 * bound * (1 - bound) / total, rel=1e-6)
    assert wilson(right, total)[0] <= p + 1e-12 and p - 1e-12 <= wilson(right, total)[1]


CHOSEN = [("A", "A", 0.95), ("A", "B", 0.55), ("B", "B", 0.92), ("C", "A", 0.31), ("B", "B", 1.0), ("A", "A", 0.58)]
ROWS = [Choice(*row, chance=1 / 3) for row in CHOSEN]


def test_confusion_by_hand():
    choices = Choices(ROWS)
    assert choices.letters == ["A", "B", "C"]
    assert choices.confusion.tolist() == [[2, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert choices.hits.tolist() == [True, False, True, False, True, True]
    assert choices.interval == wilson(4, 6)
    whole, none = Evaluation(6, 6, 0.0, 0, tuple(ROWS)), Evaluation(0, 0, 0.0, 0)
    assert whole.majority == ["A", 0.5] and none.majority is None and len(Choices(none.choices).hits) == 0
    parts = [Evaluation(len(some), len(some), 0.0, 0, tuple(some)) for some in (ROWS[:2], (), ROWS[2:])]
    joined = Evaluation.join(parts)
    assert joined == whole and Choices(joined.choices).as_dict() == choices.as_dict()


def test_calibration_by_hand():
    choices = Choices(ROWS)
    bins = choices.bins
    assert [n for n, _, _ in bins] == [0, 0, 0, 1, 0, 2, 0, 0, 0, 3]
    assert bins[5] == pytest.approx((2, 0.565, 0.5)) and bins[9] == pytest.approx(
        (3, 2.87 / 3, 1.0)
    )  # 1.0 is in the last
    error = 1 / 6 * abs(0 - 0.31) + 2 / 6 * abs(0.5 - 0.565) + 3 / 6 * abs(1 - 2.87 / 3)
    assert choices.calibration_error == pytest.approx(error)


def test_calibration_tells_the_calibrated_from_the_overconfident():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.25, 1, 20000)
    right = rng.uniform(size=20000) < confidence
    honest = Choices([Choice("A", "AB"[not hit], c, 0.5) for hit, c in zip(right, confidence)])
    assert honest.calibration_error < 0.015
    boasting = Choices([Choice("A", "AB"[not hit], 1.0, 0.5) for hit in right])
    assert boasting.calibration_error == pytest.approx(1 - right.mean())


def test_confidence_that_is_not_finite_is_no_error():
    choices = Choices([Choice("A", "A", math.nan, 0.25)])
    assert math.isnan(choices.calibration_error) and choices.bins[0][0] == 1


def score(answers, references, letters):
    return text_scores([Answer("", "", *row) for row in zip(references, answers, letters)])


REFERENCES = ["B: Vitamin C deficiency", "A: The cat sat on the mat with the dog", "so it is"]
ANSWERS = ["B: Vitamin C", "C: the cat is on the mat with a dog", "so  it is\n"]


def test_texts_by_hand():
    found = score(ANSWERS, REFERENCES, [["A", "B"], ["A", "B"], None])
    assert found.rows == 3
    assert found.exact_match == pytest.approx(1 / 3)  # spacing aside
    assert found.valid_format == 0.5  # of two rows with options: C is none of A, B
    # F1 of the longest common subsequence: b vitamin c (3 of 3 and 4), the cat on the mat with dog (7 of 10 twice), all
    assert found.rouge_l == pytest.approx(100 / 3 * (6 / 7 + 7 / 10 + 1))


def test_the_librarys_own_calls_give_the_same():
    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU

    found = score(ANSWERS, REFERENCES, [None] * 3)
    theirs = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    each = [theirs.score(target=r, prediction=a)["rougeL"].fmeasure for r, a in zip(REFERENCES, ANSWERS)]
    assert found.rouge_l == pytest.approx(100 * sum(each) / 3)
    assert found.bleu == BLEU(effective_order=True).corpus_score(hypotheses=ANSWERS, references=[REFERENCES]).score
    short = ["C: Movupril", "A: Movupril"]  # no four words in either
    assert score(short, short, [None] * 2).bleu == pytest.approx(100)
    assert 10 < found.bleu < 90 and score(REFERENCES, REFERENCES, [None] * 3).bleu == pytest.approx(100)
    assert score(REFERENCES, ANSWERS, [None] * 3).bleu != found.bleu  # which is which matters
    assert found.valid_format is None


@pytest.mark.parametrize("answer, valid", [
    ("B: yes", True), ("E:", True), ("F: yes", False), ("B", False), ("B yes", False), (" B: yes", False),
    ("b: yes", False), ("The answer is B: yes", False), ("", False), ("BB: yes", False),
])  # fmt: skip
def test_valid_format(answer, valid):
    assert scores.valid_format(answer, "ABCDE") is valid


@pytest.mark.parametrize("missing", ["rouge_score", "sacrebleu"])
def test_a_missing_library_is_one_line_before_any_work(script, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    done = script("eval.py", "--adapter", "nowhere", "--generate", 3, expect=2)
    assert done.stderr.startswith(f"error: --generate needs {missing}") and done.stderr.count("\n") == 1
    assert "pip install 'qlora_min[eval]'" in done.stderr and missing in done.stderr and done.stdout == ""
