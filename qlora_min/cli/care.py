"""A report on data before training: lengths, right letters, and questions that occur more than once."""

import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..data.duplicates import ALIKE, WORDS, Pair, near_duplicates
from ..data.examples import Example, permute_options
from ..data.rows import Rows
from ..run.datasets import Encoded
from ..system import console
from .scores import between, wilson

SHOWN = 10  # pairs of each kind that are shown; further ones are only counted
BINS = 12  # at most, of the histogram of lengths


@dataclass(frozen=True)
class Care:
    """The report. A side is "training" or "held out". Of each kind of pair, the first 10 are kept."""

    rows: dict[str, int]  # side -> number of rows
    lengths: dict[str, list[int]]  # side -> number of rows in each bin
    edges: list[int]  # of the bins, in tokens
    letters: dict[str, dict[str, int]]  # side -> right letter -> number of multiple-choice rows
    options: dict[str, dict[int, int]]  # side -> number of options -> number of multiple-choice rows
    can_shuffle: int  # training rows whose options --shuffle-options can reorder
    repeated: int  # training rows with the question, options and answer of an earlier one
    repeated_pairs: Sequence[Pair]
    conflicts: int  # training rows with the question and options of an earlier one, and another answer
    conflict_pairs: Sequence[Pair]
    alike: int | None = None  # training questions that are near-duplicates of an earlier one; None without rensa
    alike_pairs: Sequence[Pair] = ()
    leaks: int = 0  # training questions that are held out too, or with rensa: near-duplicates of a held-out one
    leak_pairs: Sequence[Pair] = ()
    # Kind of --drop -> (n,) bool, the training rows to drop. For alike and leaking, all rows that have such a question;
    # for contradicting, all rows that contradict the first one with their question and options.
    drops: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "drops"}

    def __str__(self) -> str:
        """The text that `qlora-min data` prints."""
        lines = ["tokens       " + "".join(f"{side:>10}" for side in self.lengths)]
        most = max(1, *self.lengths["training"])
        longest = max(1, min(40, console.width() - 15 - 10 * len(self.lengths)))
        for (low, high), *counts in zip(itertools.pairwise(self.edges), *self.lengths.values()):
            bar = "█" * round(longest * counts[0] / most) or "▏" * (counts[0] > 0)
            lines.append(f"{f'{low:,}-{high - 1:,}':<13}{''.join(f'{n:>10,}' for n in counts)}  {bar}".rstrip())
        lines.append("")
        for side, letters in self.letters.items():
            if total := sum(letters.values()):
                ((most_often, count),) = Counter(letters).most_common(1)
                fractions = "  ".join(f"{letter} {n / total:.1%}" for letter, n in letters.items())
                lines.append(f"right letters of {total:,} {side} rows: {fractions}")
                counts = ", ".join(f"{rows:,} with {n}" for n, rows in self.options[side].items())
                sure = f"{count / total:.1%} (95% interval {between(wilson(count, total))})"
                lines += [f"  by number of options: {counts}", f"  always {most_often} would be right in {sure}"]
        if total := sum(self.letters["training"].values()):
            lines.append(f"--shuffle-options can move the options of {self.can_shuffle:,} of {total:,} training rows")
        lines.append("")
        alike = f"{ALIKE} or more of their {WORDS}-word sequences shared"
        for what, count, pairs in (
            ("training rows that repeat another: question, options and answer", self.repeated, self.repeated_pairs),
            ("training rows that contradict another: question and options", self.conflicts, self.conflict_pairs),
            (f"training questions almost like another: {alike}", self.alike, self.alike_pairs),
            (f"training questions held out too, or almost like one: {alike}", self.leaks, self.leak_pairs),
        ):
            if count is not None:
                lines.append(f"{count:>6,}  {what}")
                lines += [f"        {a}  {b}" + (f"  {j:.2f}" if j < 1 else "") for a, b, j in pairs]
                lines += [f"        ... and {count - len(pairs):,} more"] * (count > len(pairs))
        if self.alike is None:
            lines.append("near-duplicates were not looked for: this needs rensa, pip install 'qlora_min[care]'")
        return "\n".join(console.wrapped(line, 8) for line in lines)


def look(train: Sequence[Encoded], held: Sequence[Encoded] = ()) -> Care:
    """Report on encoded rows that have kept their texts: `run.datasets.read_data(config, encoder, report=True)`.

    Held-out rows are compared with training rows, but not with each other. A question that is held out too is a leak.
    """
    rows, apart = (Rows.join(part.rows for part in side) for side in (train, held))
    sides = {"training": rows} | ({"held out": apart} if len(apart) else {})
    choices = {k: [(c.correct, len(c.letters)) for r in part if (c := r.example.choice)] for k, part in sides.items()}
    letters = {side: dict(sorted(Counter(letter for letter, _ in found).items())) for side, found in choices.items()}
    options = {side: dict(sorted(Counter(n for _, n in found).items())) for side, found in choices.items()}

    examples = (row.example for row in rows)
    can_shuffle = sum(bool(e.choice and permute_options(e, range(len(e.choice.letters)))) for e in examples)
    pairs, drops = _compare(rows, apart)
    found = {what: len(some) for what, some in pairs.items()}
    found |= {f"{what.removesuffix('s')}_pairs": some[:SHOWN] for what, some in pairs.items()}

    tokens = [*rows.lengths.tolist(), *apart.lengths.tolist()]
    low, high = min(tokens, default=0), max(tokens, default=0)
    width = next(w for k in itertools.count() for w in (10**k, 2 * 10**k, 5 * 10**k) if high // w - low // w < BINS)
    edges = [width * i for i in range(low // width, high // width + 2)]
    lengths = {side: np.histogram(part.lengths, edges)[0].tolist() for side, part in sides.items()}
    counts = {side: len(r) for side, r in sides.items()}
    return Care(counts, lengths, edges, letters, options, can_shuffle, **found, drops=drops)


def _compare(rows: Rows, apart: Rows) -> tuple[dict[str, list[Pair]], dict[str, np.ndarray]]:
    """The pairs of each kind, and `Care.drops`. Without rensa, leaks are the questions that are held out."""
    pairs: dict[str, list[Pair]] = {"repeated": [], "conflicts": []}
    questions, (repeated, contradicting) = np.zeros(len(rows), np.uint64), np.zeros((2, len(rows)), bool)
    seen: dict[tuple, int] = {}  # (question,), (question, options), (question, options, answer) -> the first row
    for i, row in enumerate(console.bar(len(rows), "answers", "row", iterable=rows)):
        example = row.example  # parsed at each access
        key = (example.question_hash, *_options_and_answer(example))
        _, first, same = (seen.setdefault(key[:n], i) for n in (1, 2, 3))
        if same < i:
            pairs["repeated"].append((row.location, rows[same].location, 1.0))
        elif first < i:
            pairs["conflicts"].append((row.location, rows[first].location, 1.0))
        questions[i], repeated[i], contradicting[i] = key[0], same < i, first < same

    asked = {key[0]: i for key, i in seen.items() if len(key) == 1}  # question -> the first row with it
    held = {row.example.question_hash: row.location for row in reversed(apart)}
    pairs["leaks"] = [(rows[i].location, held[question], 1.0) for question, i in asked.items() if question in held]
    with suppress(ImportError):
        others = np.array([i for question, i in asked.items() if question not in held], int)
        pairs["alike"], almost = near_duplicates(rows[others], apart)
        pairs["leaks"] += almost
    place = {rows[i].location: question for question, i in asked.items()}
    alike, leaking = (
        np.isin(questions, np.array([place[first] for first, _, _ in pairs.get(kind, ())], np.uint64))
        for kind in ("alike", "leaks")
    )
    return pairs, {"repeated": repeated, "contradicting": contradicting, "alike": alike, "leaking": leaking}


def _options_and_answer(example: Example) -> tuple[frozenset[str] | None, str]:
    """(texts of the options, or None if there are none; text of the answer), without letters, case and spacing."""
    choice = example.choice
    texts = choice.options if choice else {"": example.messages[-1]["content"] or str(example.messages[-1])}
    plain = {letter: " ".join(str(text).casefold().split()) for letter, text in texts.items()}
    return choice and frozenset(plain.values()), plain[choice.correct if choice else ""]
