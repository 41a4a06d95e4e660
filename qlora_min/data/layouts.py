"""Raw rows -> examples: the layouts that data come in, and what is wrong with a row that fits none of them.

A layout says which columns are the messages, or the prompt and its answer. Columns are recognised by their names,
without regard to case and blanks, or are named (`--columns prompt=frage completion=antwort`). Whatever would change
what is learned is used, or the row is refused; the names of other columns and fields are kept in `Columns.unused`, to
be shown once for each data set.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from .examples import BadRow, Example, Message

ANSWER = ("answer", "response", "completion", "output", "solution", "reply", "target", "targets", "assistant")
# Field -> the names that its column may have. A layout fits if each of its fields but `input`, which follows the
# prompt, has a column; the first that fits is used.
LAYOUTS: tuple[dict[str, tuple[str, ...]], ...] = (
    {"messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")},
    {"prompt": ("prompt",), "completion": ("completion",)},
    {"prompt": ("instruction",), "input": ("input",), "completion": ("output",)},
    {
        "prompt": ("question", "query", "prompt", "instruction", "problem", "user", "human"),
        "input": ("context", "input"),
        "completion": ANSWER,
    },
    {"prompt": ("input", "inputs"), "input": ("context",), "completion": ANSWER},
    {"prompt": ("context",), "completion": ANSWER},
)
OPTIONAL = {"system": ("system", "system_prompt", "system_message"), "history": ("history",),
            "tools": ("tools", "functions")}  # fmt: skip
FIELDS = ("messages", "prompt", "input", "completion", *OPTIONAL)
FIELDS_OF_A_ROW = ", ".join(FIELDS)
EXPECTED = "instruction/input/output, prompt/completion, or messages"
# Columns that are hardly ever a prompt or an answer, for guessing.
ABOUT = {"id", "idx", "index", "uuid", "source", "category", "type", "topic", "split", "lang", "language", "url",
         "date", "title", "score", "license", "model"}  # fmt: skip

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool",
         "function": "tool", "observation": "tool", "function_call": "assistant"}  # fmt: skip
ROLE_NAMES = {"role", "from"}
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "weight")  # of a message, beside role and content
REFUSED = {  # fields of a message that would change what is learned -> what to write instead
    "function_call": "expected tool_calls",
    **dict.fromkeys(("thinking", "reasoning"), "expected reasoning_content"),
    **dict.fromkeys(("train", "training", "trainable", "loss", "mask"), "expected weight, 0 or 1"),
}
PARTS = ("text", "input_text", "output_text")  # the types of a content's parts that are text
OTHER_PARTS = {"image", "image_url", "input_image", "audio", "input_audio", "audio_url", "video", "video_url", "file"}
MOST = 1000  # names that are kept
NAMES = {name for layout in (*LAYOUTS, OPTIONAL) for names in layout.values() for name in names}
NAMES |= {"role", "content", "from", "value", *KEPT, *REFUSED}  # names that are no row's text


def plain(name: Any) -> str:
    """A column's name without regard to case and blanks: " System Prompt" -> system_prompt."""
    return re.sub(r"[\s-]+", "_", str(name).strip().casefold())


def listed(names: Iterable[Any]) -> str:
    """Names of columns for a message. Unknown ones are "..." if they may be text: of a table without a header."""
    names = list(map(str, names))
    words = {word for name in names for word in plain(name).split("_")}
    safe = all(map(_is_name, names)) and (bool(words & (NAMES | ABOUT)) or not any(" " in n.strip() for n in names))
    return ", ".join(repr(n) if safe or plain(n) in NAMES else "..." for n in names[:20])[:300] or "none"


def _is_name(name: Any) -> bool:
    """Whether it could be the name of a column: up to three words."""
    return bool(re.fullmatch(r"[^\W\d]\w*([ -]\w+){,2}", str(name).strip())) and len(str(name)) <= 40


def parse_columns(pairs: Iterable[str]) -> dict[str, str] | None:
    """("prompt=frage", "completion=antwort") -> field -> column; None if one is not FIELD=COLUMN, or a field is
    named twice."""
    split = [pair.partition("=") for pair in pairs]
    given = {field.strip(): column for field, _, column in split if field.strip() in FIELDS and column.strip()}
    return given if len(given) == len(split) else None


class Columns:
    """Which column of a data set holds which field: as given, else by its name.

    Attributes:
        given: field -> column.
        unused: the columns, and the fields of messages, that are not used, in the order in which they came.
    """

    def __init__(self, given: Mapping[str, str] | None = None):
        self.given = dict(given or {})
        self.unused: dict[str, None] = {}
        self._met: dict[str, None] = {}
        self._found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def find(self, names: Iterable[Any], location: str) -> dict[str, Any]:
        """Field -> the name of its column.

        Raises:
            BadRow: the columns form no layout, or two could be the same field.
        """
        key = tuple(names)
        if key in self._found:
            return self._found[key]
        columns: dict[str, list[Any]] = {}
        for name in key:
            columns.setdefault(plain(name), []).append(name)
        self._met |= dict.fromkeys(key) if len(self._met) < MOST else {}
        known = {**OPTIONAL, **{field: (plain(name),) for field, name in self.given.items()}}
        for layout in LAYOUTS:
            found = {f: [c for n in names for c in columns.get(n, ())] for f, names in {**layout, **known}.items()}
            possible = self.given.keys() <= layout.keys() | OPTIONAL.keys()
            if possible and all(found[field] for field in layout if field != "input"):
                break
        else:
            raise BadRow(location + self._no_layout(key, columns))
        for field, several in found.items():
            if len(several) > 1:
                raise BadRow(
                    f"{location}: columns {listed(several)} could each be the {field} (all columns: {listed(key)}); "
                    f"say which with --columns {field}=NAME"
                )
        used = {field: some[0] for field, some in found.items() if some}
        self.ignore(name for name in key if name not in used.values())
        if len(self._found) < MOST:
            self._found[key] = used
        return used

    def fits(self, names: Iterable[Any]) -> bool:
        """Whether `find` finds a layout."""
        with suppress(BadRow):
            return bool(Columns(self.given).find(names, ""))
        return False

    def ignore(self, names: Iterable[Any], within: str = "") -> None:
        """Remember names that are not used."""
        for name in names:
            if len(self.unused) < MOST:
                self.unused.setdefault(within + (str(name).strip() if _is_name(name) else "..."))

    def check(self, source: str) -> None:
        """At the end of a data set: raise a ValueError if no row had a column that was given."""
        for field, name in self.given.items():
            if plain(name) not in map(plain, self._met) and len(self._met) < MOST:
                raise ValueError(f"{source}: --columns {field}={name}: no such column; it has {listed(self._met)}")

    def _no_layout(self, names: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> str:
        """What is wrong with columns that form no layout, and the option that would map them."""
        for field, name in self.given.items():
            if plain(name) not in columns and field not in ("input", *OPTIONAL):
                return f": --columns {field}={name}: no such column; it has {listed(names)}"
        known = {f: [plain(self.given[f])] if f in self.given else LAYOUTS[3][f] for f in ("prompt", "completion")}
        have = {f: next((c for n in some for c in columns.get(n, ())), None) for f, some in known.items()}
        rest = [c for n in columns if n not in ABOUT | NAMES for c in columns[n] if c not in have.values()]
        if {"chosen", "rejected"} <= columns.keys():
            way = f"prompt={have['prompt']} completion=chosen" if have["prompt"] else "messages=chosen"
            return (": preference data (chosen, rejected), which is not supported; to learn the chosen answers alone: "
                    f"--columns {way}")  # fmt: skip
        if list(map(plain, rest)) == ["text"]:
            return (": plain text (continued pre-training) is not supported, only questions and answers; expected "
                    f"{EXPECTED}")  # fmt: skip
        if not rest:
            for layout in LAYOUTS:
                lacking = {f for f, known in layout.items() if not columns.keys() & set(known)} - {"input"}
                if lacking and len(lacking) < len(layout.keys() - {"input"}):
                    has = f"; this one has {listed(names)}" if columns.keys() & ABOUT else ""
                    return f":{layout[lacking.pop()][0]}: missing, expected text; a row has {EXPECTED}{has}"
        guess = {f: c or (rest.pop(0) if rest else "NAME") for f, c in have.items()}
        if guess["completion"] == "NAME" and not have["prompt"] and guess["prompt"] != "NAME":
            guess = {"messages": guess["prompt"]}
        if "..." in listed(names):
            guess = {"prompt": "NAME", "completion": "NAME"}
        option = " ".join(shlex.quote(f"{field}={str(name).strip()}") for field, name in guess.items())
        hint = f", or name them: --columns {option}" if names else ""
        return f": unknown layout with columns {listed(names)}; expected {EXPECTED}{hint}"


def to_example(row: Any, location: str, columns: Columns | None = None) -> Example:
    """Convert a row of any layout to messages.

    Raises:
        BadRow: unknown or missing columns, a field that is not text, or no answer; the message begins with `location`.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"{location}: {_kind(row)}, expected an object with columns {EXPECTED}")
    columns = columns or Columns()
    names = columns.find(row, location)
    if "messages" in names:
        messages = _messages(row[names["messages"]], f"{location}:{names['messages']}", columns)
    else:
        messages = _asked(row, names, location, columns) + _answered(row, names, location, columns)
    messages = _history(row, names, location, columns) + messages
    if system := _optional_text(row, names.get("system"), location):
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        elif messages[0]["content"] != system:
            raise BadRow(f"{location}:{names['system']}: the messages begin with another system prompt; leave one out")
    tools = _objects(row.get(names.get("tools")), f"{location}:{names.get('tools')}")
    _check_answers(messages, f"{location}:{names.get('messages') or names['completion']}")
    unlearned = [i for i, m in enumerate(messages) if m.pop("weight", 1) == 0 and m["role"] == "assistant"]
    return Example(tuple(messages), location, tuple(map(_function, tools)), tuple(unlearned))


def _asked(row: dict, names: Mapping[str, Any], location: str, columns: Columns) -> list[Message]:
    """The messages of a prompt: a text and what follows it, or TRL's list of messages, whose answers carry no loss."""
    prompt, given = names["prompt"], _optional_text(row, names.get("input"), location)
    if _is_conversation(row[prompt]) and not given:
        messages = _messages(row[prompt], f"{location}:{prompt}", columns)
        return [m | {"weight": 0} if m["role"] == "assistant" else m for m in messages]
    asked = _text(row, prompt, location, may_be_empty=bool(given))
    return [{"role": "user", "content": "\n\n".join(part for part in (asked, given) if part.strip())}]


def _answered(row: dict, names: Mapping[str, Any], location: str, columns: Columns) -> list[Message]:
    """The messages of a completion: a text, or TRL's list of messages."""
    answer = names["completion"]
    if _is_conversation(row[answer]):
        return _messages(row[answer], f"{location}:{answer}", columns)
    return [{"role": "assistant", "content": _text(row, answer, location)}]


def _history(row: dict, names: Mapping[str, Any], location: str, columns: Columns) -> list[Message]:
    """The turns before a prompt: a list of [question, answer], or of messages."""
    place, turns = f"{location}:{names.get('history')}", _parsed(row.get(names.get("history")))
    if not turns:
        return []
    if not isinstance(turns, list | tuple):
        raise BadRow(f"{place}: {_kind(turns)}, expected a list of [question, answer]")
    if isinstance(turns[0], dict):
        return _messages(turns, place, columns)
    messages = []
    for i, pair in enumerate(turns):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"{place}[{i}]: expected a list of [question, answer]")
        turn = dict(zip(("user", "assistant"), pair))
        messages += [{"role": role, "content": _text(turn, role, f"{place}[{i}]")} for role in turn]
    return messages


def _is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages."""
    messages = value if isinstance(value, list | tuple) else ()
    return bool(messages) and all(isinstance(m, dict) and ROLE_NAMES & m.keys() for m in messages)


def _kind(value: Any) -> str:
    """The name of a value's type in JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


def _parsed(value: Any) -> Any:
    """A value; a text that is a JSON list or object (a table's cell, say) is decoded, and a blank one is None."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            found = json.loads(value) if value.strip() else None
            return found if isinstance(found, list | dict | None) else value
    return value


_HALF = re.compile(r"[\ud800-\udfff]")


def _text(row: dict, field: Any, location: str, may_be_empty: bool = False) -> str:
    """A field of a row or of a message: a text, or a list of parts that are text.

    Raises:
        BadRow: it is missing, not text, or empty where it may not be.
    """
    value = row.get(field, ...)
    location += f"{'.' if location.endswith(']') else ':'}{field}"
    if isinstance(value, list | tuple) and value and all(isinstance(part, dict) for part in value):
        value = "".join(_part(part, f"{location}[{i}]") for i, part in enumerate(value))
    if not isinstance(value, str):
        raise BadRow(f"{location}: {'missing' if value is ... else _kind(value)}, expected text")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"{location}: {'nothing but whitespace' if value else 'empty'}, expected text")
    if _HALF.search(value):
        raise BadRow(f"{location}: half a surrogate pair, expected text in Unicode")
    return value


def _part(part: dict, location: str) -> str:
    """The text of a content's part, {"type": "text", "text": ...}."""
    kind = part.get("type", "text")
    if kind in PARTS and isinstance(part.get("text"), str):
        return part["text"]
    what = f"type {kind}" if isinstance(kind, str) and kind in {*PARTS, *OTHER_PARTS} else "another type"
    raise BadRow(f"{location}: a part of {what}, expected text: {{'type': 'text', 'text': ...}}")


def _optional_text(row: dict, column: Any, location: str) -> str:
    """A column's text, or "" if there is none."""
    if column is None or row.get(column) is None:
        return ""
    text = _text(row, column, location, may_be_empty=True)
    return text if text.strip() else ""


def _objects(value: Any, location: str) -> list[dict[str, Any]]:
    """A list of objects (tools, calls), also as JSON text; nothing is an empty list."""
    value = _parsed(value)
    if not value and not isinstance(value, bool | int | float):
        return []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list | tuple) or not all(isinstance(v, dict) and v for v in value):
        raise BadRow(f"{location}: {_kind(value)}, expected a list of objects")
    try:
        half = _HALF.search(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        raise BadRow(f"{location}: a value that is not JSON, expected a list of objects") from None
    if half:
        raise BadRow(f"{location}: half a surrogate pair, expected text in Unicode")
    return list(value)


def _messages(messages: Any, location: str, columns: Columns) -> list[Message]:
    """A conversation: a list of messages, or of turns that are each a row. Raises BadRow if it is none."""
    messages = _parsed(messages)
    if not isinstance(messages, list | tuple) or not messages:
        what = "empty" if isinstance(messages, list | tuple) else _kind(messages)
        raise BadRow(f"{location}: {what}, expected a list of objects with role and content")
    if all(isinstance(m, dict) and not ROLE_NAMES & m.keys() and Columns().fits(m) for m in messages):
        inner = Columns()
        turns = [to_example(m, f"{location}[{i}]", inner) for i, m in enumerate(messages)]  # [{"input", "output"}, ...]
        columns.ignore(inner.unused, "messages[].")
        return [dict(message) for turn in turns for message in turn.messages]
    return [_message(m, f"{location}[{i}]", columns) for i, m in enumerate(messages)]


def _message(m: Any, location: str, columns: Columns) -> Message:
    """One message: role and content, and those of KEPT that it has."""
    if not isinstance(m, dict):
        raise BadRow(f"{location}: {_kind(m)}, expected an object with role and content")
    said, text = ("from" if m.get("role") is None and "from" in m else "role",
                  "value" if m.get("content") is None and "value" in m else "content")  # fmt: skip
    role = ROLES.get(m[said].casefold()) if isinstance(m.get(said), str) else None
    if role is None:
        what = "unknown role" if said in m else "missing"
        raise BadRow(f"{location}.{said}: {what}, expected system, user, assistant or tool")
    given = {k: v for k, v in m.items() if v is not None and k not in (said, text)}
    for field in REFUSED.keys() & given.keys():
        raise BadRow(f"{location}.{field}: unsupported, {REFUSED[field]}")
    field = text if m[said].casefold() == "function_call" else "tool_calls"
    calls = _objects(m.get(field), f"{location}.{field}")
    message = {"role": role, "content": None} | {k: given[k] for k in KEPT if k in given and k != "tool_calls"}
    if calls:
        message["tool_calls"] = [_call(c, location, role) for c in calls]
    if not calls or (field != text and m.get(text) is not None):
        message["content"] = _text(m, text, location, may_be_empty=role in ("system", "tool") or bool(calls))
    if given.get("weight", 1) not in (0, 1):
        raise BadRow(f"{location}.weight: expected 0 (carries no loss) or 1")
    columns.ignore(given.keys() - {*KEPT}, "messages[].")
    return message


def _function(value: dict[str, Any]) -> dict[str, Any]:
    """A tool or a call as templates expect it, {"type": "function", "function": ...}. ShareGPT's is what stands inside;
    that of OpenAI's newer interface has the type among the rest."""
    if "name" not in value or "function" in value or value.get("type", "function") not in ("function", "function_call"):
        return value
    return {"type": "function", "function": {k: v for k, v in value.items() if k != "type"}}


def _call(call: dict, location: str, role: str) -> dict[str, Any]:
    """One of an assistant's tool calls, {"type": "function", "function": {"name": ..., "arguments": ...}}."""
    wrapped = _function(call)
    function = wrapped.get("function")
    if role != "assistant" or not isinstance(function, dict) or "name" not in function:
        raise BadRow(f"{location}.tool_calls: expected an assistant's calls of functions with name and arguments")
    return wrapped


def _check_answers(messages: Sequence[Message], location: str) -> None:
    """Raises BadRow if a conversation does not end with an answer, or none of its answers carries loss."""
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise BadRow(f"{location}: no answer; expected the assistant's as the last message")
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"{location}: the assistant's answer is not the last message")
    if all(m.get("weight") == 0 for m in answers):
        raise BadRow(f"{location}: each answer has weight 0; expected one that is learned")
