"""Evaluation: loss per supervised token, perplexity, token accuracy and option accuracy, in one pass, no gradients.

    loss        sum of the supervised tokens' losses / their number      perplexity = exp(loss)
    token       fraction of supervised tokens that are the model's first choice, given the true tokens before them
    option      multiple choice: the letter with the highest logit at the answer's first token is the right one

Option accuracy generates nothing: one forward pass shows what the model would answer first. An option's probability is
the softmax of those logits over the row's options.
"""

import functools
import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from .base import Base
from .data.measures import Choice, Evaluation
from .data.rows import Row, Rows
from .engine import Engine
from .loss import LOGIT_ROWS
from .system import console
from .system.device import unless_out_of_memory


@torch.no_grad()
def evaluate_rows(
    engine: Engine,
    rows: Sequence[Row],
    batch_size: int,
    label: str | None = None,
    n_tokens: float = math.inf,
    before_each: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluate the model as it is (adapters included) on rows.

    Nothing of the model changes. Where memory runs out, the same rows are tried again in batches half as large.

    Args:
        batch_size, n_tokens: at most so many rows, and tokens, at a time.
        label: of the bar; None shows none.
        before_each: called before each batch; what it raises ends the evaluation.

    Raises:
        MemoryError: there is too little for a single row.
    """
    lengths = rows.lengths if isinstance(rows, Rows) else [len(r) for r in rows]
    order = sorted(range(len(rows)), key=lambda i: lengths[i])  # rows of a length together: batches of few shapes
    start, n_rows, parts = 0, batch_size, []
    with console.bar(len(rows), label, "row", show=label is not None) as bar:
        while start < len(order):
            if before_each:
                before_each()
            here = order[start : start + batch_size]
            fit = np.searchsorted(np.cumsum([lengths[i] for i in here]), n_tokens, side="right")
            part = [rows[i] for i in here[: max(1, int(fit))]]
            measured = unless_out_of_memory(
                functools.partial(_measure, engine, part, n_rows), engine.base, len(part),
                f"evaluating {len(part)} rows", f"evaluating one row of {len(part[0])} tokens", "lower --max-length",
            )  # fmt: skip
            if measured is None:
                batch_size = len(part) // 2
                console.say(f"note: out of memory: evaluation goes on with batches of {batch_size}", sys.stderr)
                continue
            parts.append(measured)
            start += len(part)
            bar.update(len(part))
    return Evaluation.join(parts)


def option_letters(base: Base, row: Row) -> list[str]:
    """The letters of a row's options, none if it is not multiple choice."""
    return [base.encoder.tokenizer.decode([first]).strip() for first in (row.choices[0] if row.choices else ())]


def _measure(engine: Engine, rows: Sequence[Row], n_rows: int) -> Evaluation:
    """Evaluate one batch. A function of its own, so that its tensors are gone when memory has run out in it."""
    batch = engine.pack(rows, n_rows=n_rows)
    positions, targets = (t[: batch.n_supervised].to(engine.device) for t in (batch.loss_positions, batch.targets))
    states = engine.hidden_states(batch)[positions]
    answer_at, offset = {}, 0  # row -> the supervised position at which its option is chosen
    for i, row in enumerate(rows):
        if row.choices:  # after any earlier supervised tokens
            answer_at[i] = offset + int(np.count_nonzero(row.supervised.numpy()[1 : row.choices[2]]))
        offset += row.n_supervised
    losses, right, of_options = [], [], []
    for start in range(0, len(states), LOGIT_ROWS):
        logits, wanted = engine.logits(states[start : start + LOGIT_ROWS]), targets[start : start + LOGIT_ROWS]
        losses.append(F.cross_entropy(logits, wanted, reduction="sum"))
        right.append((logits.argmax(-1) == wanted).sum())
        asked = [(at - start, rows[i].choices[0]) for i, at in answer_at.items() if 0 <= at - start < len(logits)]
        if asked:  # of all rows at once, since every index waits for the device
            of_options.append(logits[tuple(zip(*((at, first) for at, firsts in asked for first in firsts)))])

    choices, counts = [], [len(rows[i].choices[0]) for i in answer_at]
    for i, scores in zip(answer_at, torch.cat(of_options).cpu().split(counts) if counts else ()):
        names = option_letters(engine.base, rows[i])
        right_one, chosen = names[rows[i].choices[1]], names[int(scores.argmax())]
        choices.append(Choice(right_one, chosen, float(scores.softmax(-1).max()), 1 / len(names)))
    return Evaluation(len(rows), len(targets), sum(map(float, losses)), sum(map(int, right)), tuple(choices))
