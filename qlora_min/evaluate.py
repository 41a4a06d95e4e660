"""Evaluation: loss per supervised token, perplexity, token accuracy and option accuracy, in one pass, no gradients.

    loss        sum of the supervised tokens' losses / their number      perplexity = exp(loss)
    token       share of supervised tokens that are the model's first choice, given the true tokens before them
    option      multiple choice: the letter with the highest logit at the answer's first token is the right one

Option accuracy generates nothing: one forward pass shows what the model would answer first. Chance is the mean of one
over the number of options.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import memory, report
from .data import Row, Rows, collate
from .decoder import Captured, Decoder
from .loss import supervised_states
from .model import Base, autocast, hidden_states, output_head

MEASURES = (  # what is shown of an Evaluation: label, field, format
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("token accuracy", "token_accuracy", "{:.1%}"),
    ("option accuracy", "option_accuracy", "{:.1%}"),
)


@dataclass(frozen=True)
class Evaluation:
    """Results over a set of rows. option_accuracy and chance are None without multiple-choice rows."""

    rows: int
    supervised_tokens: int
    loss: float
    token_accuracy: float
    option_rows: int = 0
    option_accuracy: float | None = None
    chance: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp overflows above 709

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


@torch.no_grad()
def evaluate(
    base: Base,
    rows: Sequence[Row],
    batch_size: int,
    progress: str | None = None,
    tokens: float = math.inf,
    decoder: Decoder | Captured | None = None,
) -> Evaluation:
    """Evaluate the model as it is (adapters included) on rows.

    Leaves no trace: training mode is restored, and no random number is drawn. Where memory runs out, the batch is
    halved and the same rows are tried again, so that every row counts once.

    Args:
        progress: the bar's label; None shows none.
        batch_size, tokens: at most so many rows, and tokens, at a time.
        decoder: of the base, where there is one: it computes, instead of the modules.

    Raises:
        MemoryError: there is too little for a single row.
    """
    model = base.model
    device = next(model.parameters()).device
    lengths = rows.lengths if isinstance(rows, Rows) else [len(r) for r in rows]
    order = sorted(range(len(rows)), key=lambda i: lengths[i])  # rows of a length together: little padding
    most = batch_size
    loss, right, count = 0.0, 0, 0
    options, options_right, chance = 0, 0, 0.0
    was_training = model.training
    model.eval()
    bar = report.bar(len(rows), progress, "row", show=progress is not None)
    try:
        start = 0
        while start < len(order):
            here = order[start : start + batch_size]
            fit = np.searchsorted(np.cumsum([lengths[i] for i in here]), tokens, side="right")
            part = [rows[i] for i in here[: max(1, int(fit))]]
            try:
                batch_loss, batch_right, batch_count, chosen = _measure(base, part, device, decoder, most)
            except (RuntimeError, MemoryError) as e:
                if not memory.is_out_of_memory(e):
                    raise
                batch_count = None
            if batch_count is None:
                memory.release()
                if len(part) == 1:
                    raise MemoryError(
                        f"evaluating one row of {len(part[0])} tokens takes more memory than there is "
                        f"({memory.taken(device)}); lower --max-length, or free the device of other programs"
                    )
                batch_size = len(part) // 2
                report.say(f"note: out of memory: evaluation goes on with batches of {batch_size}", sys.stderr)
                continue
            start += len(part)
            loss, right, count = loss + batch_loss, right + batch_right, count + batch_count
            for row, choice in zip(part, chosen):
                if row.choices:
                    letters, correct = row.choices
                    options += 1
                    options_right += choice == correct
                    chance += 1 / len(letters)
            bar.update(len(part))
    finally:
        bar.close()
        model.train(was_training)
    return Evaluation(
        rows=len(rows),
        supervised_tokens=count,
        loss=loss / max(1, count),
        token_accuracy=right / max(1, count),
        option_rows=options,
        option_accuracy=options_right / options if options else None,
        chance=chance / options if options else None,
    )


def combine(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of all rows, from those of its parts."""
    if len(parts) == 1:
        return parts[0]

    def total(weight: str, mean: str | None = None) -> float:
        return sum(getattr(e, weight) * ((getattr(e, mean) or 0.0) if mean else 1) for e in parts)

    count, options = total("supervised_tokens"), total("option_rows")
    return Evaluation(
        rows=total("rows"),
        supervised_tokens=count,
        loss=total("supervised_tokens", "loss") / max(1, count),
        token_accuracy=total("supervised_tokens", "token_accuracy") / max(1, count),
        option_rows=options,
        option_accuracy=total("option_rows", "option_accuracy") / options if options else None,
        chance=total("option_rows", "chance") / options if options else None,
    )


def _measure(
    base: Base, part: Sequence[Row], device: torch.device, decoder: Decoder | Captured | None, count: int
) -> tuple[float, int, int, list[int | None]]:
    """(loss sum, right tokens, supervised tokens, each row's chosen option) of one batch.

    A function of its own, so that its tensors are gone once an error for want of memory has been dealt with.
    """
    if decoder:
        batch = decoder.pack(part, count)
        where, targets = (t[: batch.n_supervised].to(device) for t in (batch.where, batch.targets))
        states, head = decoder.hidden_states(batch)[where], decoder.logits
    else:
        batch = collate(part).to(device)
        with autocast(device, base.dtype):
            hidden = hidden_states(base.model, batch.input_ids)  # (B, T, D)
        states, targets = supervised_states(hidden, batch.input_ids, batch.supervised)

        def head(states: torch.Tensor) -> torch.Tensor:
            with autocast(device, base.dtype):
                return output_head(base.model)(states).float()

    letters, first = {}, 0  # where a row's option is chosen, among all supervised positions
    for i, row in enumerate(part):
        if row.choices:
            letters[i] = first + int(row.supervised[1 : row.answer_start].sum())  # behind any earlier answers
        first += int(row.supervised[1:].sum())
    losses, right, chosen = [], [], {}
    for start in range(0, len(states), memory.LOGIT_ROWS):
        logits, wanted = head(states[start : start + memory.LOGIT_ROWS]), targets[start : start + memory.LOGIT_ROWS]
        losses.append(F.cross_entropy(logits, wanted, reduction="sum"))
        right.append((logits.argmax(-1) == wanted).sum())
        for i, at in letters.items():
            if start <= at < start + len(logits):
                chosen[i] = logits[at - start, list(part[i].choices[0])].argmax()

    def numbers(tensors: Iterable[torch.Tensor]) -> list:  # asks the device once
        return torch.stack([*tensors]).tolist() if tensors else []

    found = dict(zip(chosen, numbers(chosen.values())))
    return sum(numbers(losses)), sum(numbers(right)), len(targets), [found.get(i) for i in range(len(part))]


def side_by_side(before: Evaluation, after: Evaluation) -> str:
    """A table: a line a measure, base and adapter in columns."""
    lines = [("", "base", "adapter"), ("rows", f"{before.rows:,}", f"{after.rows:,}"),
             ("supervised tokens", f"{before.supervised_tokens:,}", f"{after.supervised_tokens:,}")]  # fmt: skip
    for label, key, form in (*MEASURES, ("  chance", "chance", "{:.1%}")):
        if getattr(before, key) is not None:
            lines.append((label, form.format(getattr(before, key)), form.format(getattr(after, key))))
    return "\n".join(f"{a:<20}{b:>12}{c:>12}" for a, b, c in lines)
