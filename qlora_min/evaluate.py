"""Evaluation: loss per supervised token, perplexity, token accuracy and option accuracy, in one pass, no gradients.

    loss        sum of the supervised tokens' losses / their number      perplexity = exp(loss)
    token       share of supervised tokens that are the model's first choice, given the true tokens before them
    option      multiple choice: the letter with the highest logit at the answer's first token is the right one

Option accuracy generates nothing: one forward pass shows what the model would answer first. Chance is the mean of one
over the number of options.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .data import Row, collate
from .loss import supervised_logits
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
def evaluate(base: Base, rows: Sequence[Row], batch_size: int, progress: str | None = None) -> Evaluation:
    """Evaluate the model as it is (adapters included) on rows.

    Leaves no trace: training mode is restored, and no random number is drawn.

    Args:
        progress: the bar's label; None shows none.
    """
    model = base.model
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # rows of a length together: little padding
    loss, right, count = 0.0, 0, 0
    options, options_right, chance = 0, 0, 0.0
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(rows), desc=progress, unit="row", leave=False, disable=None if progress else True)
    try:
        for start in range(0, len(order), batch_size):
            part = [rows[i] for i in order[start : start + batch_size]]
            batch = collate(part).to(device)
            with autocast(device, base.dtype):
                hidden = hidden_states(model, batch.input_ids)  # (B, T, D)
                logits, targets = supervised_logits(hidden, output_head(model), batch.input_ids, batch.supervised)
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            right += (logits.argmax(-1) == targets).sum().item()
            count += len(targets)
            first = 0  # the row's first supervised token within the batch's
            for row in part:
                if row.choices:
                    letters, correct = row.choices
                    options += 1
                    at = first + int(row.supervised[1 : row.answer_start].sum())  # behind any earlier answers
                    options_right += logits[at, list(letters)].argmax().item() == correct
                    chance += 1 / len(letters)
                first += int(row.supervised[1:].sum())
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
