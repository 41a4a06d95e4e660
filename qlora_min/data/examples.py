"""Examples, the errors of rows that can't become one, and multiple choice."""

import ast
import functools
import hashlib
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]  # role, content and, of an assistant, tool_calls: as `apply_chat_template` takes them
SHOWN = 20  # bad rows shown in an error; the others are counted


@dataclass(frozen=True)
class Example:
    """One conversation that ends with an answer.

    location: the file and line, for errors: "train.jsonl:12". tools: that the assistant may call, as JSON schemas.
    unlearned: the indices of answers that carry no loss.
    """

    messages: tuple[Message, ...]
    location: str
    tools: tuple[dict[str, Any], ...] = ()
    unlearned: tuple[int, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """The example as a row that `layouts.to_example` reads as the same again."""
        messages = [m | {"weight": 0} if i in self.unlearned else m for i, m in enumerate(self.messages)]
        return {"messages": messages} | ({"tools": self.tools} if self.tools else {})

    @functools.cached_property
    def choice(self) -> "MultipleChoice | None":
        """The options of a question written as in MedQA (text with {'A': '...'}, answer "B: ..."), or None."""
        asked, answer = ([{"content": ""}, *self.messages][-i]["content"] or "" for i in (2, 1))
        answer = re.match(r"([A-Z])\b", answer)
        literal = re.search(r"\{\s*'[A-Z]'\s*:.*\}", asked, re.DOTALL)
        if not answer or not literal:
            return None
        with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            options = ast.literal_eval(_parsed(literal[0]))
            if isinstance(options, dict) and answer[1] in options and all(isinstance(k, str) for k in options):
                return MultipleChoice(tuple(options), answer[1], literal[0])
        return None

    @property
    def question(self) -> str:
        """All text before the last answer, without its options, in lower case and with single spaces.

        Two rows with the same value ask the same question. Without any text before the answer, it is the answer itself.
        """
        text = "\n".join(m["content"] or "" for m in self.messages[:-1])
        text = text[: text.rindex(self.choice.literal)] if self.choice else text
        return " ".join((text.strip() or self.messages[-1]["content"] or "").casefold().split())

    @property
    def question_hash(self) -> int:
        """64 bits of the question's hash: a million questions collide with a probability of 3 in 10^8."""
        return int.from_bytes(hashlib.blake2b(self.question.encode("utf-8", "replace"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class MultipleChoice:
    """The options of a question.

    Attributes:
        letters: of the options, in order.
        correct: the letter of the right option.
        literal: the part of the question's text that lists the options, a Python dictionary.
    """

    letters: tuple[str, ...]
    correct: str
    literal: str

    @property
    def options(self) -> dict[str, Any]:
        """Letter -> the option's text."""
        return ast.literal_eval(_parsed(self.literal))


class BadRow(ValueError):
    """A row that can't be used. The message is one line with the row's location, the error, and what was expected; it
    never contains text of the row."""


class BadData(ValueError):
    """The bad rows of all data sets. lines: the lines of the message, printed by `cli.main.run_script`."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


class BadRows:
    """Counts the bad rows of one or more data sets and keeps the first messages.

    Args:
        skip: leave bad rows out. Otherwise `check`, called after all data has been read, raises an error that lists
            them together.
    """

    def __init__(self, skip: bool = False):
        self.skip, self.count, self.messages = skip, 0, []
        self.reasons: set[str] = set()  # of a data set's rows, at most two: whether all have one

    def add(self, row: BadRow, location: str) -> None:
        """Count a row. location: that with which the row's message begins."""
        self.count += 1
        if len(self.reasons) < 2:
            self.reasons.add(str(row).removeprefix(location))
        if len(self.messages) < SHOWN:
            self.messages.append(" ".join(str(row).split()))

    def check_all(self, name: str, count: int) -> None:
        """Where all rows of a data set are bad: raise ValueError if they have one reason, or are skipped."""
        reason, *others = self.reasons
        if self.skip or (count > 1 and not others):
            why = "; leave out --skip-bad-rows to see why" if others else f": {reason.lstrip(': ')}"
            raise ValueError(f"{name}: all {count:,} rows are bad{why}")

    @property
    def fatal(self) -> bool:
        return self.count > 0 and not self.skip

    def check(self, instead: str = "") -> None:
        """Raise BadData if there are bad rows and they are not skipped. instead: an alternative to correcting them."""
        if not self.fatal:
            return
        if self.count == 1:
            raise BadData([f"{self.messages[0]}; correct it{instead}"])
        more = self.count - len(self.messages)
        total = f"... and {more:,} more bad rows" if more else f"{self.count} bad rows"
        raise BadData([*self.messages, f"{total}; correct them{instead}"])


def _parsed(text: str) -> Any:
    """Parse a Python expression. Python's warning of an invalid escape, which would show the text, is suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text, mode="eval").body


# Options that refer to other options or to the order have another meaning in another order.
_REFERS = re.compile(
    r"(?i)\b(above|below|foregoing|preceding|following|both|neither)\b"
    r"|\b(only|options?|choices?|statements?) [a-z]\b|\b[a-z] ?(,|&|\+|and|or|nor) ?[a-z]\b"
)


def permute_options(example: Example, order: Sequence[int]) -> Example | None:
    """Put the options of a question into another order; the text around them and its spacing are kept.

    Args:
        order: a permutation; letter i gets the option of letter order[i]. The letter of the answer is adapted.

    Returns:
        The new example; None if it is not multiple choice, or its meaning could change: an option refers to others
        ("A and C", "all of the above"), or the answer has more than a letter and its option, such as an explanation.
    """
    choice = example.choice
    if choice is None:
        return None
    *before, user, assistant = example.messages
    nodes, texts, right = _parsed(choice.literal).values, list(choice.options.values()), choice.options[choice.correct]
    if len(nodes) > len(texts) or not all(isinstance(text, str) and not _REFERS.search(text) for text in texts):
        return None  # also a letter that is used twice
    answer = assistant["content"]
    if " ".join(re.sub(r"^[\s:.)]*", "", answer[1:]).split()) not in ("", " ".join(right.split())):
        return None
    source = choice.literal.encode("utf-8")  # ast gives positions in bytes, from the beginning of the line
    lines = [0, *(m.end() for m in re.finditer(rb"\r\n?|\n", source))]
    spans = [slice(lines[n.lineno - 1] + n.col_offset, lines[n.end_lineno - 1] + n.end_col_offset) for n in nodes]
    new = source
    for span, i in reversed(list(zip(spans, order))):  # from the end, so that the earlier positions stay valid
        new = new[: span.start] + source[spans[i]] + new[span.stop :]
    content = new.decode("utf-8").join(user["content"].rsplit(choice.literal, 1))
    answer = choice.letters[list(order).index(choice.letters.index(choice.correct))] + answer[1:]
    messages = (*before, {**user, "content": content}, {**assistant, "content": answer})
    return replace(example, messages=messages)
