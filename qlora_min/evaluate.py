"""Evaluation: loss per supervised token, perplexity, token accuracy and option accuracy, in one pass, no gradients.

    loss        sum of the supervised tokens' losses / their number      perplexity = exp(loss)
    token       share of supervised tokens that are the model's first choice, given the true tokens before them
    option      multiple choice: the letter with the highest logit at the answer's first token is the right one

Option accuracy generates nothing: one forward pass shows what the model would answer first, and how sure it is: an
option's probability is the softmax over the row's options of those logits. Chance is the mean of one over the number of
options. What a model writes itself is another pass (`generated`), a forward a token, and scored in scores.py.
"""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import checkpoint, report
from .adapter import read_config
from .config import Config
from .data import Encoded, Row, Rows, data_hash, encode_all, read_data
from .engine import Captured, Engine
from .generate import generate
from .loss import LOGIT_ROWS
from .memory import unless_out_of_memory
from .model import Base, load_encoder
from .reading import BadRows, read
from .scores import Choices, TextScores, between, text_scores, wilson

MEASURES = (  # what is shown of an Evaluation: label, field, format
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("token accuracy", "token_accuracy", "{:.1%}"),
    ("option accuracy", "option_accuracy", "{:.1%}"),
)


Table = list[tuple[str, ...]]  # of strings, the head first


@dataclass(frozen=True)
class Evaluation:
    """Results over a set of rows. option_accuracy and chance are None without multiple-choice rows.

    choices: what was chosen in each of these, by length of the rows; not part of `as_dict`.
    """

    rows: int
    supervised_tokens: int
    loss: float
    token_accuracy: float
    option_rows: int = 0
    option_accuracy: float | None = None
    chance: float | None = None
    choices: Choices = field(default_factory=Choices.of, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp overflows above 709

    def as_dict(self) -> dict[str, Any]:
        values = {k: v for k, v in asdict(self).items() if k != "choices"}
        majority = list(self.choices.majority) if self.option_rows else None
        return {**values, "majority": majority, "perplexity": self.perplexity}

    @classmethod
    def join(cls, parts: Sequence["Evaluation"]) -> "Evaluation":
        """Of all parts' rows together."""
        if len(parts) == 1:
            return parts[0]
        tokens, options = sum(p.supervised_tokens for p in parts), sum(p.option_rows for p in parts)

        def mean(name: str, weight: str, total: int) -> float | None:
            return sum((getattr(p, name) or 0.0) * getattr(p, weight) for p in parts) / total if total else None

        return cls(
            rows=sum(p.rows for p in parts),
            supervised_tokens=tokens,
            loss=mean("loss", "supervised_tokens", tokens) or 0.0,
            token_accuracy=mean("token_accuracy", "supervised_tokens", tokens) or 0.0,
            option_rows=options,
            option_accuracy=mean("option_accuracy", "option_rows", options),
            chance=mean("chance", "option_rows", options),
            choices=Choices.join([p.choices for p in parts]),
        )


def evaluation_data(
    adapter: Path, model: str | None, datasets: Sequence[str] | None, limit: int | None, max_length: int = 512
) -> list[Encoded]:
    """What to evaluate an adapter on: the data sets named, or else the rows that its own run held out.

    Args:
        model: where the base is, if not where the adapter's files say.
        limit: the first N rows of each data set named, or the first N that the run held out.
        max_length: leave longer rows of the data sets named out.

    Raises:
        ValueError: no data set was named, and the adapter lies in no run directory, its run held out no rows, or the
            data are no longer those of the run (rows that it trained on could pass for held out).
    """
    described = read_config(adapter)
    encoder = load_encoder(model or described.base, None if model else described.revision)
    if datasets:
        bad = BadRows()
        sources = [(name, read(name, limit, bad)) for name in datasets]
        parts = [encode_all(name, examples, encoder, max_length, bad) for name, examples in sources]
        bad.check()
        return parts
    run = adapter.parent
    if not checkpoint.is_run(run):
        raise ValueError(f"adapter '{adapter}' lies in no run directory; say with --dataset what to evaluate on")
    record = checkpoint.read_record(run)
    options = Config.from_dict(record["options"], str(run / "config.json"))
    train, parts = read_data(options, encoder)
    rows, held = (Rows.join(part.rows for part in side) for side in (train, parts))
    if data_hash(rows, held) != record["data"].get("sha256"):
        raise ValueError(
            f"adapter '{adapter}': its data have changed since the run, so what was held out can't be told; "
            "say with --dataset what to evaluate on"
        )
    if not parts:
        raise ValueError(f"adapter '{adapter}': its run held out no rows; say with --dataset what to evaluate on")
    return [part.first(limit) for part in parts] if limit else parts


@torch.no_grad()
def evaluate(
    engine: Engine | Captured,
    rows: Sequence[Row],
    batch_size: int,
    progress: str | None = None,
    tokens: float = math.inf,
    before_each: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluate the model as it is (adapters included) on rows.

    Leaves no trace: no random number is drawn. Where memory runs out, the batch is
    halved and the same rows are tried again, so that every row counts once.

    Args:
        progress: the bar's label; None shows none.
        batch_size, tokens: at most so many rows, and tokens, at a time.
        before_each: called before each batch; what it raises ends the evaluation.

    Raises:
        MemoryError: there is too little for a single row.
    """
    base = engine.base
    lengths = rows.lengths if isinstance(rows, Rows) else [len(r) for r in rows]
    order = sorted(range(len(rows)), key=lambda i: lengths[i])  # rows of a length together: little padding
    start, most = 0, batch_size
    loss, right, count, options_right, chance = 0.0, 0, 0, 0, 0.0
    choices: list[tuple[str, str, float]] = []
    with report.bar(len(rows), progress, "row", show=progress is not None) as bar:
        while start < len(order):
            if before_each:
                before_each()
            here = order[start : start + batch_size]
            fit = np.searchsorted(np.cumsum([lengths[i] for i in here]), tokens, side="right")
            part = [rows[i] for i in here[: max(1, int(fit))]]
            measured = unless_out_of_memory(
                functools.partial(_measure, engine, part, most), base, len(part), f"evaluating {len(part)} rows",
                f"evaluating one row of {len(part[0])} tokens", "lower --max-length",
            )  # fmt: skip
            if measured is None:
                batch_size = len(part) // 2
                report.say(f"note: out of memory: evaluation goes on with batches of {batch_size}", sys.stderr)
                continue
            batch_loss, batch_right, batch_count, chosen = measured
            loss, right, count = loss + batch_loss, right + batch_right, count + batch_count
            for i, (at, probability) in chosen.items():
                letters, correct = option_letters(base, part[i]), part[i].choices[1]
                options_right += at == correct
                chance += 1 / len(letters)
                choices.append((letters[correct], letters[int(at)], probability))
            start += len(part)
            bar.update(len(part))
    options = len(choices)
    return Evaluation(
        rows=len(rows),
        supervised_tokens=count,
        loss=loss / max(1, count),
        token_accuracy=right / max(1, count),
        option_rows=options,
        option_accuracy=options_right / options if options else None,
        chance=chance / options if options else None,
        choices=Choices.of(choices),
    )


def option_letters(base: Base, row: Row) -> list[str]:
    """The letters of a row's options, none if it is not multiple choice."""
    return [base.encoder.tokenizer.decode([first]).strip() for first in (row.choices[0] if row.choices else ())]


def _measure(engine: Engine | Captured, part: Sequence[Row], count: int) -> tuple[float, int, int, dict[int, list]]:
    """(loss sum, right tokens, supervised tokens, row -> [chosen option, its probability]) of one batch.

    A function of its own, so that its tensors are gone once an error for want of memory has been dealt with.
    """
    batch = engine.pack(part, count=count)
    positions, targets = (t[: batch.n_supervised].to(engine.device) for t in (batch.loss_positions, batch.targets))
    states = engine.hidden_states(batch)[positions]
    letters, first = {}, 0  # where a row's option is chosen, among all supervised positions
    for i, row in enumerate(part):
        if row.choices:
            letters[i] = first + int(row.supervised[1 : row.answer_start].sum())  # behind any earlier answers
        first += row.n_supervised
    losses, right, chosen = [], [], {}
    for start in range(0, len(states), LOGIT_ROWS):
        logits, wanted = engine.logits(states[start : start + LOGIT_ROWS]), targets[start : start + LOGIT_ROWS]
        losses.append(F.cross_entropy(logits, wanted, reduction="sum"))
        right.append((logits.argmax(-1) == wanted).sum())
        for i, at in letters.items():
            if start <= at < start + len(logits):
                of_options = logits[at - start, list(part[i].choices[0])]
                chosen[i] = torch.stack([of_options.argmax().to(logits.dtype), of_options.softmax(-1).max()])

    def numbers(tensors: Iterable[torch.Tensor]) -> list:  # asks the device once
        return torch.stack([*tensors]).tolist() if tensors else []

    return sum(numbers(losses)), sum(numbers(right)), len(targets), dict(zip(chosen, numbers(chosen.values())))


# ---------------------------------------------------------------------------------------------------------------------
# Generated answers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What a model wrote to rows, beside what it should have. letters: each row's option letters, or none."""

    where: list[str]
    prompts: list[str]
    references: list[str]
    answers: list[str]
    letters: list[list[str]]

    @property
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
    prompts = [r.ids[: r.answer_start].tolist() for r in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # prompts of a length together: little padding
    answers: dict[int, str] = {}
    with report.bar(len(rows), progress, "row", show=progress is not None) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            answers.update(zip(part, generate(base, [prompts[i] for i in part], max_new_tokens)))
            bar.update(len(part))
    return Answers(
        where=[r.where for r in rows],
        prompts=[decode(p) for p in prompts],
        references=[decode(r.ids[r.answer_start :].tolist(), skip_special_tokens=True) for r in rows],
        answers=[answers[i] for i in range(len(rows))],
        letters=[option_letters(base, r) for r in rows],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

GENERATED = (  # what is shown of TextScores
    ("exact match", "exact_match", "{:.1%}"),
    ("valid format", "valid_format", "{:.1%}"),
    ("ROUGE-L", "rouge_l", "{:.1f}"),
    ("BLEU", "bleu", "{:.1f}"),
)


def beside(result: dict[str, Any]) -> str:
    """What an option accuracy is to be read beside, of an `Evaluation.as_dict`: "chance 25.0%, always A 32.8%"."""
    majority = result.get("majority")  # those kept by older checkpoints have none
    return f"chance {result['chance']:.1%}" + (", always {} {:.1%}".format(*majority) if majority else "")


def measures(result: Evaluation, texts: TextScores | None = None) -> list[tuple[str, str]]:
    """What there is to show of a side, in words: (label, value)."""
    lines = [("rows", f"{result.rows:,}"), ("supervised tokens", f"{result.supervised_tokens:,}")]
    lines += _known(result, MEASURES)
    if result.option_accuracy is not None:
        if result.option_rows < result.rows:
            lines.append(("  rows with options", f"{result.option_rows:,}"))
        lines += [
            ("  95% interval", between(result.choices.interval)),
            ("  chance", f"{result.chance:.1%}"),
            (f"  always {result.choices.majority[0]}", f"{result.choices.majority[1]:.1%}"),
            ("  mean confidence", f"{result.choices.confidence.mean():.1%}"),
            ("  calibration error", f"{result.choices.calibration_error:.1%}"),
        ]
    if texts:
        lines.append(("answers generated", f"{texts.rows:,}"))
        lines += [(f"  {label}", value) for label, value in _known(texts, GENERATED)]
    return lines


def _known(side: Evaluation | TextScores, shown: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """(label, value) of those of MEASURES or GENERATED that there are."""
    return [(label, form.format(getattr(side, key))) for label, key, form in shown if getattr(side, key) is not None]


def _change(pair: Sequence[Evaluation | TextScores], key: str, form: str) -> str:
    """base -> adapter."""
    values = [getattr(side, key) for side in pair]
    return "-" if None in values else " → ".join(map(form.format, values))


def side_by_side(before: Evaluation, after: Evaluation, texts: Sequence[TextScores | None] = (None, None)) -> str:
    """A table as text: a line a measure, base and adapter in columns."""
    both = zip(measures(before, texts[0]), measures(after, texts[1]))
    lines = [("", "base", "adapter"), *((label, b, a) for (label, b), (_, a) in both)]
    return "\n".join(f"{label:<20}{b:>14}{a:>14}" for label, b, a in lines)


def by_data_set(names: Sequence[str], before: Sequence[Evaluation], after: Sequence[Evaluation]) -> Table:
    """A line a data set, for each measure base -> adapter.

    majority: what always saying the letter that is right most often would reach.
    """
    lines = [("data", "rows", "loss", "token accuracy", "option accuracy", "95% interval", "chance", "majority")]
    for name, b, a in zip(names, before, after):
        changes = [_change((b, a), key, form) for _, key, form in MEASURES if key != "perplexity"]
        majority = "{} {:.1%}".format(*a.choices.majority)
        known = ["-"] * 3 if a.chance is None else [between(a.choices.interval), f"{a.chance:.1%}", majority]
        lines.append((name, f"{a.rows:,}", *changes, *known))
    return lines


def texts_by_data_set(names: Sequence[str], before: Sequence[TextScores], after: Sequence[TextScores]) -> Table:
    """As `by_data_set`, of generated answers."""
    lines = [("data", "answers", *(label for label, _, _ in GENERATED))]
    for name, *pair in zip(names, before, after):
        lines.append((name, f"{pair[1].rows:,}", *(_change(pair, key, form) for _, key, form in GENERATED)))
    return lines


def by_letter(choices: Choices) -> Table:
    """A line a right letter, the letters chosen in columns, the accuracy last."""
    letters, confusion = choices.letters, choices.confusion
    lines = [("right letter", *(f"said {letter}" for letter in letters), "rows", "accuracy", "95% interval")]
    for i, letter in enumerate(letters):
        n, right = int(confusion[i].sum()), int(confusion[i, i])
        end = (f"{right / n:.1%}", between(wilson(right, n))) if n else ("-", "-")
        lines.append((letter, *(f"{c:,}" for c in confusion[i]), f"{n:,}", *end))
    return lines
