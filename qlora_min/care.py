"""A look at data before training: lengths, letters, and questions that stand there more than once.

Near-duplicates are found by MinHash (Broder 1997, "On the resemblance and containment of documents"). A question,
without options and answer, is the set of its runs of 5 words, its shingles. Two questions are alike by

    J(A, B) = |A and B| / |A or B|        = P(the least hash of A's shingles is the least of B's), over random hashes

64 such hashes are kept of each question, in 16 bands of 4. Questions that agree in a whole band are candidates, which
for J = 0.7 happens with probability 1 - (1 - 0.7^4)^16 = 98.8%, and for J = 0.3 with 12%; of each candidate J itself is
then computed, so whatever is reported is alike by at least 0.7. In a question of 50 words that is one word changed in
the middle (J = 0.80), of 100 words two to three. Shingles that more than 5% of the questions share ("please answer with
one of the option in ...") are no sign of likeness, and are left out; so a question that more rows almost repeat is not
found.

Cost: time grows with the words, about a second for 1,000 questions of 110 words; memory with the questions, about 1 KB
each. Places are reported, never a text, which may be a patient's.
"""

import functools
import itertools
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import report
from .batches import shuffle_options
from .config import Config
from .data import ChatEncoder, Encoded, Rows, preview, table
from .reading import Example, MultipleChoice, permute_options
from .scores import between, wilson

ALIKE = 0.7  # J from which two questions are near-duplicates
WORDS = 5  # in a shingle
BANDS, IN_A_BAND = 16, 4
COMMON = 0.05  # shingles that more questions share are left out, if these are at least
AT_LEAST = 10
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
    repeated_pairs: list[Pair] = field(default_factory=list)
    conflicts: int = 0  # training rows that answer an earlier one's question, of the same options, in another way
    conflict_pairs: list[Pair] = field(default_factory=list)
    alike: int = 0  # training questions that are near-duplicates of an earlier one
    alike_pairs: list[Pair] = field(default_factory=list)
    leaks: int = 0  # training questions that are near-duplicates of a held-out one
    leak_pairs: list[Pair] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = ["tokens       " + "".join(f"{side:>10}" for side in self.lengths)]
        most = max(1, *self.lengths["training"])
        for i, (low, high) in enumerate(itertools.pairwise(self.edges)):
            counts = [n[i] for n in self.lengths.values()]
            bar = "█" * round(40 * counts[0] / most) or "▏" * (counts[0] > 0)
            lines.append(f"{f'{low:,}-{high - 1:,}':<13}{''.join(f'{n:>10,}' for n in counts)}  {bar}".rstrip())
        lines.append("")
        for side, letters in self.letters.items():
            if total := sum(letters.values()):
                most_often, count = max(letters.items(), key=lambda item: item[1])
                shares = "  ".join(f"{letter} {n / total:.1%}" for letter, n in letters.items())
                lines.append(f"right letters of {total:,} {side} rows: {shares}")
                counts = ", ".join(f"{rows:,} with {n}" for n, rows in self.options[side].items())
                lines.append(f"  by number of options: {counts}")
                sure = between(wilson(count, total))
                lines.append(f"  always {most_often} would be right in {count / total:.1%} (95% interval {sure})")
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
            lines.append(f"{count:>6,}  {what}")
            lines += [f"        {a}  {b}" + (f"  {likeness:.2f}" if likeness < 1 else "") for a, b, likeness in pairs]
            if count > len(pairs):
                lines.append(f"        ... and {count - len(pairs):,} more")
        return "\n".join(lines)


def look(train: Sequence[Encoded], held: Sequence[Encoded] = ()) -> Care:
    """What there is to see in encoded rows that have their text: `data.read_data(config, encoder, texts=True)`.

    Held-out rows are compared with training rows, not among each other.
    """
    rows, apart = (Rows.join(part.rows for part in side) for side in (train, held))
    sides = {"training": rows} | ({"held out": apart} if len(apart) else {})
    first: dict[int, dict[tuple, int]] = defaultdict(dict)  # question -> (options, answer) -> the first row of them
    letters: dict[str, Counter] = {side: Counter() for side in sides}
    options: dict[str, Counter] = {side: Counter() for side in sides}

    def count(side: str, choice: MultipleChoice) -> None:
        letters[side][choice.correct] += 1
        options[side][len(choice.letters)] += 1

    repeated, conflicts, can_shuffle = [], [], 0
    for i, example in enumerate(_examples(rows, "answers")):
        if example.choice:
            count("training", example.choice)
            can_shuffle += permute_options(example, range(len(example.choice.letters))) is not None
        known, key = first[example.question_hash], _options_and_answer(example)
        same_options = next((j for (options, _), j in known.items() if options == key[0]), None)
        if key in known:
            repeated.append((i, known[key], 1.0))
        elif same_options is not None:
            conflicts.append((i, same_options, 1.0))
        known.setdefault(key, i)
    for row in apart:
        if choice := row.example.choice:
            count("held out", choice)
    asked = np.array([min(known.values()) for known in first.values()], int)  # one row for each question
    alike, leaks = near_duplicates(rows[asked], apart)

    def places(pairs: list[tuple[int, int, float]], mine: Rows, other: Rows) -> list[Pair]:
        return [(mine[i].where, other[j].where, round(likeness, 3)) for i, j, likeness in pairs[:SHOWN]]

    lengths = np.concatenate([r.lengths for r in sides.values()])
    low, high = int(lengths.min(initial=lengths.max(initial=0))), int(lengths.max(initial=0))
    width = next(w for k in itertools.count() for w in (10**k, 2 * 10**k, 5 * 10**k) if high // w - low // w < BINS)
    edges = [width * i for i in range(low // width, high // width + 2)]
    return Care(
        rows={side: len(r) for side, r in sides.items()},
        lengths={side: np.histogram(r.lengths, edges)[0].tolist() for side, r in sides.items()},
        edges=edges,
        letters={side: dict(sorted(counts.items())) for side, counts in letters.items()},
        options={side: dict(sorted(counts.items())) for side, counts in options.items()},
        can_shuffle=can_shuffle,
        repeated=len(repeated),
        repeated_pairs=places(repeated, rows, rows),
        conflicts=len(conflicts),
        conflict_pairs=places(conflicts, rows, rows),
        alike=len(alike),
        alike_pairs=places(alike, rows[asked], rows[asked]),
        leaks=len(leaks),
        leak_pairs=places(leaks, rows[asked], apart),
    )


def _examples(rows: Rows, label: str) -> Iterator[Example]:
    with report.bar(len(rows), label, "row") as bar:
        for row in rows:
            yield row.example
            bar.update()


def _options_and_answer(example: Example) -> tuple[frozenset[str] | None, str]:
    """What an answer chooses from, and what it says, without letters, case and spacing."""

    def plain(text: object) -> str:
        return " ".join(str(text).casefold().split())

    if example.choice is None:
        return None, plain(example.messages[-1]["content"])
    options = example.choice.options
    return frozenset(map(plain, options.values())), plain(options[example.choice.correct])


# ---------------------------------------------------------------------------------------------------------------------
# Near-duplicates
# ---------------------------------------------------------------------------------------------------------------------


def near_duplicates(train: Rows, held: Rows) -> tuple[list[tuple[int, int, float]], list[tuple[int, int, float]]]:
    """Training questions that are almost like another one.

    Returns:
        (among themselves, with held-out ones): a list of (training row, the other row, J), each training row once, with
        the other that is likest it among the candidates; of two training rows, the later one counts.
    """
    n_held = len(held)

    @functools.lru_cache(maxsize=2**14)
    def shingles_of(i: int) -> np.ndarray:
        return shingles((held[i] if i < n_held else train[i - n_held]).example.question)

    total = n_held + len(train)
    counts = np.zeros(2**22, np.int32)  # of shingles, by their last 22 bits: of memory that does not grow
    for i in range(total):
        counts[shingles_of(i) % len(counts)] += 1
    common = max(AT_LEAST, COMMON * total)

    def rare(i: int) -> np.ndarray:
        mine = shingles_of(i)
        return mine[counts[mine % len(counts)] < common]

    minima = np.zeros((total, BANDS * IN_A_BAND), np.uint32)
    known = np.zeros(total, bool)
    with report.bar(total, "near-duplicates", "row") as bar:
        for i in range(total):
            mine = rare(i)
            known[i] = len(mine) > 0
            if known[i]:
                minima[i] = minhash(mine)
            bar.update()
    best: tuple[dict[int, tuple[int, float]], ...] = ({}, {})
    for i, j in candidates(minima, np.flatnonzero(known)):
        if j < n_held:
            continue  # both are held out
        a, b = rare(i), rare(j)
        both = len(np.intersect1d(a, b, assume_unique=True))
        likeness = both / (len(a) + len(b) - both)
        found = best[i < n_held]
        if likeness >= ALIKE and likeness > found.get(j, (0, 0.0))[1]:
            found[j] = i, likeness
    among, leaked = best
    return (
        [(j - n_held, i - n_held, likeness) for j, (i, likeness) in sorted(among.items())],
        [(j - n_held, i, likeness) for j, (i, likeness) in sorted(leaked.items())],
    )


@functools.lru_cache(maxsize=2**16)
def _word(word: str) -> int:
    return zlib.crc32(word.encode("utf-8", "replace"))


def _mixed(x: np.ndarray) -> np.ndarray:
    """uint64 -> uint64 whose bits all depend on all of x's (the end of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shingles(text: str) -> np.ndarray:
    """The different hashes, uint64, of a text's runs of 5 words; of all its words, if it has fewer."""
    words = np.array([_word(w) for w in re.findall(r"\w+", text)], np.uint64)
    if not len(words):
        return words
    runs = np.lib.stride_tricks.sliding_window_view(words, min(WORDS, len(words)))  # (n - 4, 5)
    powers = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, runs.shape[1] + 1, dtype=np.uint64)
    return np.unique(_mixed((runs * powers).sum(axis=1, dtype=np.uint64)))


_FACTORS = _mixed(np.arange(1, BANDS * IN_A_BAND + 1, dtype=np.uint64))[:, None] | np.uint64(1)  # (64, 1)


def minhash(mine: np.ndarray) -> np.ndarray:
    """(64,) uint32: the least of each of 64 hashes of the shingles, a product's upper bits each."""
    return ((_FACTORS * mine) >> np.uint64(32)).min(axis=1).astype(np.uint32)  # (64, n) -> (64,)


def candidates(minima: np.ndarray, rows: np.ndarray) -> list[tuple[int, int]]:
    """Pairs i < j of rows that agree in a band: each row with the first that does, and with the one before it.

    Not each with each: a thousand copies make 2,000 pairs and not half a million.
    """
    pairs = set()
    for band in np.split(minima[rows], BANDS, axis=1):  # (n, 4)
        _, group = np.unique(band, axis=0, return_inverse=True)
        order = np.argsort(group.ravel(), kind="stable")
        group = group.ravel()[order]
        starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
        head = np.repeat(starts, np.diff(np.r_[starts, len(group)])) if len(group) else starts
        for at in np.flatnonzero(head != np.arange(len(group))):
            j = int(rows[order[at]])
            pairs |= {(int(rows[order[head[at]]]), j), (int(rows[order[at - 1]]), j)}
    return sorted(pairs)


# ---------------------------------------------------------------------------------------------------------------------
# For a terminal and a notebook
# ---------------------------------------------------------------------------------------------------------------------


def look_at(config: Config, previews: int = 0, colour: bool = True) -> Care:
    """Read the data that the options name, and print what `qlora-min data` prints; writes nothing."""
    from .data import read_data
    from .model import load_encoder  # these two take seconds to import

    encoder = load_encoder(config.model)
    train, held = read_data(config, encoder, texts=True)
    print(table([*train, *held]) + "\n")
    found = look(train, held)
    print(found)
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
