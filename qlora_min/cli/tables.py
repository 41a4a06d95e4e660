"""Tables of evaluations."""

from collections.abc import Sequence
from typing import Any

from ..evaluation import Evaluation
from ..run.cards import MEASURES
from ..system.console import aligned
from .generated import Answers
from .scores import Choices, TextScores, between, wilson

Table = list[tuple[str, ...]]  # of strings, the head first
GENERATED = (  # what is shown of TextScores
    ("exact match", "exact_match", "{:.1%}"),
    ("valid format", "valid_format", "{:.1%}"),
    ("ROUGE-L", "rouge_l", "{:.1f}"),
    ("BLEU", "bleu", "{:.1f}"),
)


def measures(result: Evaluation, texts: TextScores | None = None) -> list[tuple[str, str]]:
    """What there is to show of a side, in words: (label, value)."""
    lines = [("rows", f"{result.rows:,}"), ("supervised tokens", f"{result.supervised_tokens:,}")]
    lines += _known(result, MEASURES)
    if result.option_rows:
        choices = Choices.of(result.choices)
        if result.option_rows < result.rows:
            lines.append(("  rows with options", f"{result.option_rows:,}"))
        lines += [
            ("  95% interval", between(choices.interval)),
            ("  chance", f"{result.chance:.1%}"),
            (f"  always {result.majority[0]}", f"{result.majority[1]:.1%}"),
            ("  mean confidence", f"{choices.confidence.mean():.1%}"),
            ("  calibration error", f"{choices.calibration_error:.1%}"),
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
        known = ["-"] * 3
        if a.option_rows:
            interval = between(Choices.of(a.choices).interval)
            known = [interval, f"{a.chance:.1%}", "{} {:.1%}".format(*a.majority)]
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


def show(names: Sequence[str], results: Sequence[Sequence[Evaluation]], answers: Sequence[Sequence[Answers]]) -> None:
    """Print the tables of an evaluation.

    Args:
        names: of the data sets. results: (base's, adapter's), each with one for each data set. answers: the same, or
            nothing.
    """
    before, after = map(Evaluation.join, results)
    print(side_by_side(before, after, [Answers.join(side).scores for side in answers] or (None, None)))
    if len(names) > 1:
        print("\nEach data set, base → adapter (95% interval of the adapter's option accuracy;")
        print("majority: what always saying the letter that is right most often would reach):")
        print(aligned(by_data_set(names, *results)))
        if answers:
            print(aligned(texts_by_data_set(names, *([a.scores for a in side] for side in answers))))
    if after.option_rows:
        print("\nThe adapter's answers by right letter:\n" + aligned(by_letter(Choices.of(after.choices))))


def values(
    names: Sequence[str], results: Sequence[Sequence[Evaluation]], answers: Sequence[Sequence[Answers]]
) -> dict[str, Any]:
    """An evaluation for --json: what there is of each side, in all and of each data set."""

    def of(result: Evaluation, texts: Answers | None) -> dict[str, Any]:
        options = {"options": Choices.of(result.choices).as_dict()} if result.option_rows else {}
        return {**result.as_dict(), **options, **({"generated": texts.scores.as_dict()} if texts else {})}

    sides = {}
    for key, each, texts in zip(("base", "with_adapter"), results, answers or [[], []]):
        whole = of(Evaluation.join(each), Answers.join(texts) if texts else None)
        sides[key] = whole | {"datasets": {n: of(*pair) for n, *pair in zip(names, each, texts or [None] * len(names))}}
    return sides
