"""Answers that a model writes to rows, to be compared with their references."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ..base import Base
from ..data.rows import Row
from ..evaluation import option_letters
from ..generate import generate
from ..system import console
from .scores import TextScores, text_scores


@dataclass(frozen=True)
class Answers:
    """What a model wrote to rows, beside what it should have. letters: each row's option letters, or none."""

    locations: list[str]
    prompts: list[str]
    references: list[str]
    answers: list[str]
    letters: list[list[str]]

    @functools.cached_property
    def scores(self) -> TextScores:
        return text_scores(self.answers, self.references, self.letters)

    @classmethod
    def join(cls, parts: Sequence["Answers"]) -> "Answers":
        """Of all parts' rows together."""
        return cls(*([x for p in parts for x in getattr(p, f.name)] for f in fields(cls)))


def generated(
    base: Base, rows: Sequence[Row], batch_size: int, max_new_tokens: int, progress: str | None = None
) -> Answers:
    """Answer rows greedily, as the model is.

    Args:
        batch_size: rows at a time, halved where memory runs out.
        max_new_tokens: an answer is cut here if it has not ended.
        progress: the bar's label; None shows none.
    """
    decode = base.encoder.tokenizer.decode
    prompts = [r.input_ids[: r.answer_start].tolist() for r in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # prompts of a length together: little padding
    answers: dict[int, str] = {}
    with console.bar(len(rows), progress, "row", show=progress is not None) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            answers.update(zip(part, generate(base, [prompts[i] for i in part], max_new_tokens)))
            bar.update(len(part))
    return Answers(
        locations=[r.location for r in rows],
        prompts=[decode(p) for p in prompts],
        references=[decode(r.input_ids[r.answer_start :].tolist(), skip_special_tokens=True) for r in rows],
        answers=[answers[i] for i in range(len(rows))],
        letters=[option_letters(base, r) for r in rows],
    )
