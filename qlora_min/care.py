"""A look at data before training: lengths, letters, and questions that stand there more than once.

Near-duplicates are found by MinHash (Broder 1997, "On the resemblance and containment of documents"). A question,
without options and answer, is the set of its runs of 5 words, its shingles. Two questions are alike by

    J(A, B) = |A and B| / |A or B|        = P(the least hash of A's shingles is the least of B's), over random hashes

64 such hashes are kept of each question, in 16 bands of 4, by rensa (the extra `care`). Questions that agree in a whole
band are candidates, which for J = 0.7 happens with probability 1 - (1 - 0.7^4)^16 = 98.8%, and for J = 0.3 with 12%; J
itself is then computed of the 8 that share most hashes, so whatever is reported is alike by at least 0.7. In a question
of 50 words that is one word changed in the middle (J = 0.80), of 100 words two to three. Shingles that more than 5% of
the questions share ("please answer with one of the option in ...") are no sign of likeness, and are left out; so a
question that more rows almost repeat is not found.

Cost: time grows with the words, about a second for 1,000 questions of 110 words; memory with the questions, about 2 KB
each. Places are reported, never a text, which may be a patient's.
"""

import functools
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import numpy as np

from . import report
from .batches import shuffle_options
from .config import Config
from .data import ChatEncoder, Encoded, Rows, preview, read_data, table
from .reading import Example, permute_options
from .scores import between, wilson

ALIKE = 0.7  # J from which two questions are near-duplicates
WORDS = 5  # in a shingle
HASHES, BANDS, TRIED = 64, 16, 8  # of a question; of them; candidates whose J is computed
COMMON, AT_LEAST = 0.05, 10  # shingles that a larger share of the questions has are left out, if 10 have them
SHOWN = 10  # pairs that are shown of each kind; the rest is counted
BINS = 12  # of the histogram, at most

Pair = tuple[str, str, float]  # where one stands, where the other, and J


@dataclass(frozen=True)
class Care:
    """What was found. Pairs are (file:line, file:line, J), at most 10 of each kind; counts are of all."""

    rows: dict[str, int]  # side -> rows
    lengths: dict[str, list[int]]  # side -> rows in each bin of tokens
    edges: list[int]  # of the bins, one more than there are
    letters: dict[str, dict[str, int]]  # side -> right letter -> multiple-choice rows
    options: dict[str, dict[int, int]]  # side -> number of options -> multiple-choice rows
    can_shuffle: int  # training rows whose options --shuffle-options can put into another order
    repeated: int  # training rows that repeat an earlier one's question, options and answer
    repeated_pairs: Sequence[Pair]
    conflicts: int  # training rows that answer an earlier one's question, of the same options, in another way
    conflict_pairs: Sequence[Pair]
    alike: int | None = None  # training questions that are near-duplicates of an earlier one; None without rensa
    alike_pairs: Sequence[Pair] = ()
    leaks: int | None = None  # training questions that are near-duplicates of a held-out one; None without rensa
    leak_pairs: Sequence[Pair] = ()

    as_dict = asdict

    def __str__(self) -> str:
        lines = ["tokens       " + "".join(f"{side:>10}" for side in self.lengths)]
        most = max(1, *self.lengths["training"])
        for (low, high), *counts in zip(itertools.pairwise(self.edges), *self.lengths.values()):
            bar = "█" * round(40 * counts[0] / most) or "▏" * (counts[0] > 0)
            lines.append(f"{f'{low:,}-{high - 1:,}':<13}{''.join(f'{n:>10,}' for n in counts)}  {bar}".rstrip())
        lines.append("")
        for side, letters in self.letters.items():
            if total := sum(letters.values()):
                ((most_often, count),) = Counter(letters).most_common(1)
                shares = "  ".join(f"{letter} {n / total:.1%}" for letter, n in letters.items())
                lines.append(f"right letters of {total:,} {side} rows: {shares}")
                counts = ", ".join(f"{rows:,} with {n}" for n, rows in self.options[side].items())
                sure = f"{count / total:.1%} (95% interval {between(wilson(count, total))})"
                lines += [f"  by number of options: {counts}", f"  always {most_often} would be right in {sure}"]
        if total := sum(self.letters["training"].values()):
            lines.append(f"--shuffle-options can move the options of {self.can_shuffle:,} of {total:,} training rows")
        lines.append("")
        alike = f"{ALIKE} or more of their {WORDS}-word runs shared"
        for what, count, pairs in (
            ("training rows that repeat another: question, options and answer", self.repeated, self.repeated_pairs),
            ("training rows that contradict another: question and options", self.conflicts, self.conflict_pairs),
            (f"training questions almost like another: {alike}", self.alike, self.alike_pairs),
            (f"training questions almost like a held-out one: {alike}", self.leaks, self.leak_pairs),
        ):
            if count is not None:
                lines.append(f"{count:>6,}  {what}")
                lines += [f"        {a}  {b}" + (f"  {j:.2f}" if j < 1 else "") for a, b, j in pairs]
                lines += [f"        ... and {count - len(pairs):,} more"] * (count > len(pairs))
        if self.alike is None:
            lines.append("near-duplicates were not looked for: that needs rensa, pip install 'qlora_min[care]'")
        return "\n".join(lines)


def look(train: Sequence[Encoded], held: Sequence[Encoded] = ()) -> Care:
    """What there is to see in encoded rows that have their text: `data.read_data(config, encoder, texts=True)`.

    Held-out rows are compared with training rows, not among each other.
    """
    rows, apart = (Rows.join(part.rows for part in side) for side in (train, held))
    sides = {"training": rows} | ({"held out": apart} if len(apart) else {})
    choices = {k: [(c.correct, len(c.letters)) for r in part if (c := r.example.choice)] for k, part in sides.items()}
    letters = {side: dict(sorted(Counter(letter for letter, _ in found).items())) for side, found in choices.items()}
    options = {side: dict(sorted(Counter(n for _, n in found).items())) for side, found in choices.items()}

    pairs, can_shuffle = {"repeated": [], "conflicts": []}, 0
    seen: dict[tuple, int] = {}  # a question, and with its options, and with its answer -> its first training row
    for i, row in enumerate(report.bar(len(rows), "answers", "row", iterable=rows)):
        example = row.example
        can_shuffle += bool(example.choice and permute_options(example, range(len(example.choice.letters))))
        key = (example.question_hash, *_options_and_answer(example))
        if key in seen:
            pairs["repeated"].append((row.where, rows[seen[key]].where, 1.0))
        elif key[:2] in seen:
            pairs["conflicts"].append((row.where, rows[seen[key[:2]]].where, 1.0))
        for n in (1, 2, 3):
            seen.setdefault(key[:n], i)
    with suppress(ImportError):
        asked = np.array([i for key, i in seen.items() if len(key) == 1], int)  # one row for each question
        pairs["alike"], pairs["leaks"] = near_duplicates(rows[asked], apart)
    found = {what: len(some) for what, some in pairs.items()}
    found |= {f"{what.removesuffix('s')}_pairs": some[:SHOWN] for what, some in pairs.items()}

    tokens = [*rows.lengths.tolist(), *apart.lengths.tolist()] or [0]
    low, high = min(tokens), max(tokens)
    width = next(w for k in itertools.count() for w in (10**k, 2 * 10**k, 5 * 10**k) if high // w - low // w < BINS)
    edges = [width * i for i in range(low // width, high // width + 2)]
    lengths = {side: np.histogram(part.lengths, edges)[0].tolist() for side, part in sides.items()}
    return Care({side: len(r) for side, r in sides.items()}, lengths, edges, letters, options, can_shuffle, **found)


def _options_and_answer(example: Example) -> tuple[frozenset[str] | None, str]:
    """What an answer chooses from, and what it says, without letters, case and spacing."""
    choice = example.choice
    texts = choice.options if choice else {"": example.messages[-1]["content"]}
    plain = {letter: " ".join(str(text).casefold().split()) for letter, text in texts.items()}
    return choice and frozenset(plain.values()), plain[choice.correct if choice else ""]


# ---------------------------------------------------------------------------------------------------------------------
# Near-duplicates
# ---------------------------------------------------------------------------------------------------------------------


def near_duplicates(train: Rows, held: Rows) -> tuple[list[Pair], list[Pair]]:
    """Training questions that are almost like another one.

    Returns:
        (like an earlier one, like a held-out one): (where the training row stands, where the other, J), each training
        row once, with the other that is likest it among the candidates.

    Raises:
        ImportError: rensa is missing.
    """
    from rensa import RMinHash, RMinHashLSH  # an extra

    both = Rows.join([held, train])
    counts = np.zeros(2**22, np.int32)  # of shingles, by their first 22 bits: of memory that does not grow
    for row in both:
        counts[shingles(row.example.question) >> 10] += 1

    @functools.lru_cache(maxsize=2**14)
    def rare(i: int) -> np.ndarray:
        mine = shingles(both[i].example.question)
        return mine[counts[mine >> 10] < max(AT_LEAST, COMMON * len(both))]

    indices, found, sketches = [RMinHashLSH(ALIKE, HASHES, BANDS) for _ in range(2)], ([], []), {}
    for i in report.bar(len(both), "near-duplicates", "row", iterable=range(len(both))):
        if not len(rare(i)):
            continue
        mine = sketches[i] = RMinHash(HASHES, 0)
        mine.update(map(str, rare(i).tolist()))
        for index, pairs in zip(indices, found) if i >= len(held) else ():
            nearest = sorted((-mine.jaccard(sketches[j]), j) for j in index.query(mine))[:TRIED]
            likeness, j = max(((jaccard(rare(i), rare(j)), -j) for _, j in nearest), default=(0, 0))
            if likeness >= ALIKE:
                pairs.append((both[i].where, both[-j].where, round(likeness, 3)))
        indices[i < len(held)].insert(i, mine)
    return found


def jaccard(one: np.ndarray, two: np.ndarray) -> float:
    return len(np.intersect1d(one, two)) / len(np.union1d(one, two))


def shingles(text: str) -> np.ndarray:
    """The different hashes, uint32, of a text's runs of 5 words; of all its words, if it has fewer."""
    words = re.findall(r"\w+", text)
    runs = {" ".join(words[i : i + WORDS]) for i in range(max(0, len(words) - WORDS) + 1)} - {""}
    return np.unique(np.array([zlib.crc32(run.encode()) for run in runs], np.uint32))


# ---------------------------------------------------------------------------------------------------------------------
# For a terminal and a notebook
# ---------------------------------------------------------------------------------------------------------------------


def look_at(config: Config, previews: int = 0, colour: bool = True) -> Care:
    """Read the data that the options name, and print what `qlora-min data` prints; writes nothing."""
    from .model import load_encoder  # takes seconds to import

    encoder = load_encoder(config.model)
    train, held = read_data(config, encoder, texts=True)
    print(table([*train, *held]) + "\n")
    print(found := look(train, held))
    show_rows(config, encoder, train, previews, colour)
    return found


def show_rows(config: Config, encoder: ChatEncoder, train: Sequence[Encoded], count: int, colour: bool = True) -> None:
    """Print the first training rows as the model sees them in the first epoch, the tokens it learns from in colour."""
    rows = Rows.join(part.rows for part in train)
    for i, row in enumerate(rows[:count]):
        if config.shuffle_options:
            row = shuffle_options(row, encoder, int(rows.lengths.max()), config.seed, 0, i)
        print(f"--- {row.where}: {len(row)} tokens, {int(row.supervised.sum())} supervised")
        print(preview(row, encoder.tokenizer, colour))
