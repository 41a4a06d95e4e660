"""Near-duplicate questions, found by MinHash (Broder 1997, "On the resemblance and containment of documents").

A question, without options and answer, is represented by the set of its runs of 5 words (shingles). The similarity of
two questions is the Jaccard index of their sets,

    J(A, B) = |A and B| / |A or B|        = P(the smallest hash of A is that of B), over random hash functions

rensa (the extra `care`) keeps 64 such hashes of each question, in 16 bands of 4. Questions that agree in a whole band
are candidates: for J = 0.7 with probability 1 - (1 - 0.7^4)^16 = 98.8%, for J = 0.3 with 12%. J itself is then computed
for the 8 candidates with the most equal hashes, so all reported pairs have J >= 0.7. In a question of 50 words that is
one changed word in the middle (J = 0.80), in 100 words two to three. Shingles of more than 5% of the questions ("please
answer with one of the option in ...") are ignored; therefore a question that more than 5% of the rows almost repeat is
not found.

Time is proportional to the number of words, about a second for 1,000 questions of 110 words; memory is about 2 KB a
question. Reports contain locations and no text, which may be confidential.
"""

import functools
import re
import zlib

import numpy as np

from ..system import console
from .rows import Rows

ALIKE = 0.7  # the smallest J of near-duplicates
WORDS = 5  # of a shingle
HASHES, BANDS, TRIED = 64, 16, 8  # hashes of a question; bands of hashes; candidates whose J is computed
COMMON, AT_LEAST = 0.05, 10  # shingles in at least this fraction of the questions, and in 10 or more, are ignored
Pair = tuple[str, str, float]  # the locations of two rows, and J


def near_duplicates(train: Rows, held: Rows) -> tuple[list[Pair], list[Pair]]:
    """Find training questions that almost repeat another question.

    Returns:
        (pairs with an earlier training row, pairs with a held-out row). The first location is that of the training row,
        which is in at most one pair of each list, with its most similar candidate.

    Raises:
        ImportError: rensa is not installed.
    """
    from rensa import RMinHash, RMinHashLSH  # an extra

    both = Rows.join([held, train])
    counts = np.zeros(2**22, np.int32)  # of shingles, by their first 22 bits: constant memory
    for row in both:
        counts[shingles(row.example.question) >> 10] += 1

    @functools.lru_cache(maxsize=2**14)
    def rare(i: int) -> np.ndarray:
        mine = shingles(both[i].example.question)
        return mine[counts[mine >> 10] < max(AT_LEAST, COMMON * len(both))]

    indices, found, sketches = [RMinHashLSH(ALIKE, HASHES, BANDS) for _ in range(2)], ([], []), {}  # training, held out
    for i in console.bar(len(both), "near-duplicates", "row", iterable=range(len(both))):
        if not len(rare(i)):
            continue
        mine = sketches[i] = RMinHash(HASHES, 0)
        mine.update(map(str, rare(i).tolist()))
        for index, pairs in zip(indices, found) if i >= len(held) else ():
            nearest = sorted((-mine.jaccard(sketches[j]), j) for j in index.query(mine))[:TRIED]
            likeness, j = max(((jaccard(rare(i), rare(j)), -j) for _, j in nearest), default=(0, 0))
            if likeness >= ALIKE:
                pairs.append((both[i].location, both[-j].location, round(likeness, 3)))
        indices[i < len(held)].insert(i, mine)
    return found


def jaccard(one: np.ndarray, two: np.ndarray) -> float:
    """The similarity of two sets of shingles."""
    return len(np.intersect1d(one, two)) / len(np.union1d(one, two))


def shingles(text: str) -> np.ndarray:
    """The distinct hashes (uint32) of the runs of 5 words of a text; of the whole text if it has fewer words."""
    words = re.findall(r"\w+", text)
    runs = {" ".join(words[i : i + WORDS]) for i in range(max(0, len(words) - WORDS) + 1)} - {""}
    return np.unique(np.array([zlib.crc32(run.encode()) for run in runs], np.uint32))
