"""Rows of data -> examples: the three layouts, errors of rows that fit none of them, and multiple choice."""

import ast
import functools
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Message = dict[str, Any]  # role, content and, of an assistant, tool_calls: as `apply_chat_template` takes them
LAYOUTS = "instruction/input/output, prompt/completion, or messages"
NEEDED = ({"messages"}, {"prompt", "completion"}, {"instruction", "output"})  # the required columns of each layout
COLUMNS = {"messages", "role", "content", "prompt", "completion", "instruction", "input", "output"}
ROLES = ("system", "user", "assistant")
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

    def as_json(self) -> str:
        """The example as JSON, without its location."""
        return json.dumps([self.messages, self.tools, self.unlearned])

    @classmethod
    def from_json(cls, text: str, location: str) -> "Example":
        messages, tools, unlearned = map(tuple, json.loads(text))
        return cls(messages, location, tools, unlearned)

    @functools.cached_property
    def choice(self) -> "MultipleChoice | None":
        return multiple_choice(self.messages)

    @property
    def question(self) -> str:
        """All text before the last answer, without its options, in lower case and with single spaces.

        Two rows with the same value ask the same question. Without any text before the answer, it is the answer itself.
        """
        text = "\n".join(m["content"] for m in self.messages[:-1])
        text = text[: text.rindex(self.choice.literal)] if self.choice else text
        return " ".join((text.strip() or self.messages[-1]["content"]).casefold().split())

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

    def add(self, row: BadRow) -> None:
        self.count += 1
        if len(self.messages) < SHOWN:
            self.messages.append(" ".join(str(row).split()))

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


def check_columns(columns: Iterable[Any], location: str, may_show: Callable[[str], bool] = str.isidentifier) -> None:
    """Check that columns form one of the layouts.

    Args:
        may_show: whether a name may be part of the error; a name could be a row's text.

    Raises:
        BadRow: they form none.
    """
    if not any(layout <= set(columns) for layout in NEEDED):
        shown = ", ".join(repr(c) if may_show(str(c)) else "..." for c in itertools.islice(columns, 20)) or "none"
        raise BadRow(f"{location}: unknown layout with columns {shown[:200]}; expected {LAYOUTS}")


def to_example(row: Any, location: str) -> Example:
    """Convert a row of any of the three layouts, recognised by its columns, to messages.

    Raises:
        BadRow: unknown or missing columns, a field that is not text, or no answer; the message begins with `location`.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"{location}: {_kind(row)}, expected an object with columns {LAYOUTS}")
    if "messages" in row:
        return Example(_checked_messages(row["messages"], f"{location}:messages"), location)
    missing = [layout - row.keys() for layout in NEEDED if layout & row.keys()]
    if missing and all(missing):
        raise BadRow(f"{location}:{min(missing[0])}: missing, expected text; a row has {LAYOUTS}")
    check_columns(row, location)
    short = {"prompt", "completion"} <= row.keys()
    question, more, answer = ("prompt", None, "completion") if short else ("instruction", "input", "output")
    given = _text(row, more, location, may_be_empty=True) if row.get(more) is not None else ""
    asked = _text(row, question, location, may_be_empty=bool(given.strip()))
    user = "\n\n".join(part for part in (asked, given) if part.strip())
    assistant = _text(row, answer, location)
    return Example(({"role": "user", "content": user}, {"role": "assistant", "content": assistant}), location)


def _kind(value: Any) -> str:
    """The name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _text(row: dict, field: str, location: str, may_be_empty: bool = False) -> str:
    """A field of a row or of a message. Raises BadRow if it is missing, not text, or empty where it may not be."""
    value = row.get(field, ...)
    location += ("." if location.endswith("]") else ":") + field
    if not isinstance(value, str):
        raise BadRow(f"{location}: {'missing' if value is ... else _kind(value)}, expected text")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"{location}: {'nothing but whitespace' if value else 'empty'}, expected text")
    if re.search(r"[\ud800-\udfff]", value):
        raise BadRow(f"{location}: half a surrogate pair, expected text in Unicode")
    return value


def _checked_messages(messages: Any, location: str) -> tuple[Message, ...]:
    """The column `messages`. Raises BadRow if it is not a conversation whose last message is the assistant's."""
    if not isinstance(messages, list) or not messages:
        what = "empty" if messages == [] else _kind(messages)
        raise BadRow(f"{location}: {what}, expected a list of objects with role and content")
    for i, m in enumerate(messages):
        if not isinstance(m, dict):
            raise BadRow(f"{location}[{i}]: {_kind(m)}, expected an object with role and content")
        if m.get("role") not in ROLES:
            what = "unknown role" if "role" in m else "missing"
            raise BadRow(f"{location}[{i}].role: {what}, expected {', '.join(ROLES[:-1])} or {ROLES[-1]}")
        _text(m, "content", f"{location}[{i}]", may_be_empty=m["role"] == "system")
    roles = [m["role"] for m in messages]
    if "assistant" not in roles:
        raise BadRow(f"{location}: no answer; expected the assistant's as the last message")
    if roles[-1] != "assistant":
        raise BadRow(f"{location}: the assistant's answer is not the last message")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _parsed(text: str) -> Any:
    """Parse a Python expression. Python's warning of an invalid escape, which would show the text, is suppressed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text, mode="eval").body


def multiple_choice(messages: Sequence[Message]) -> MultipleChoice | None:
    """The options of a question written as in MedQA (text with {'A': '...'}, answer "B: ..."), or None."""
    answer = re.match(r"([A-Z])\b", messages[-1]["content"])
    literal = re.search(r"\{\s*'[A-Z]'\s*:.*\}", messages[-2]["content"], re.DOTALL) if len(messages) > 1 else None
    if not answer or not literal:
        return None
    try:
        options = ast.literal_eval(_parsed(literal[0]))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if not isinstance(options, dict) or answer[1] not in options or not all(isinstance(k, str) for k in options):
        return None
    return MultipleChoice(tuple(options), answer[1], literal[0])


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
        None where the meaning could change: an option refers to others ("A and C", "all of the above"), or the answer
        contains more than a letter and its option, such as an explanation that names letters.
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
