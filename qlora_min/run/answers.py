"""A model's answers to rows, beside the references."""

from collections.abc import Sequence
from typing import NamedTuple

from ..base import Base
from ..data.rows import Row
from ..evaluation import option_letters
from ..generate import generate
from ..system import console


class Answer(NamedTuple):
    """A row that a model has answered. letters: of its options, empty if it is not multiple choice."""

    location: str
    prompt: str
    reference: str
    answer: str
    letters: Sequence[str]


def generated(
    base: Base, rows: Sequence[Row], batch_size: int, max_new_tokens: int, progress: str | None = None
) -> list[Answer]:
    """Let a model answer rows by greedy decoding. The adapter takes part unless it is disabled.

    Args:
        batch_size: rows decoded at a time; halved if memory runs out.
        max_new_tokens: an answer that has not ended is cut after as many tokens.
        progress: the label of the progress bar; None shows no bar.
    """
    decode = base.encoder.tokenizer.decode
    prompts = [r.input_ids[: r.answer_start].tolist() for r in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # similar lengths together: little padding
    answers: dict[int, str] = {}
    with console.bar(len(rows), progress, "row", show=progress is not None) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            answers.update(zip(part, generate(base, [prompts[i] for i in part], max_new_tokens)))
            bar.update(len(part))
    return [
        Answer(
            location=row.location,
            prompt=decode(prompt),
            reference=decode(row.input_ids[row.answer_start :].tolist(), skip_special_tokens=True),
            answer=answers[i],
            letters=option_letters(base, row),
        )
        for i, (row, prompt) in enumerate(zip(rows, prompts))
    ]
