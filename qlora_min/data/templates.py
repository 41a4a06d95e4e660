"""Chat templates: a conversation -> its text, as a server renders it, cut where the answers begin.

A row's text is what `apply_chat_template` makes of its messages. The prompt of an answer is what it makes of the
messages before it, with `add_generation_prompt=True`. Templates trim texts, move the system message or remove think
blocks, so neither is put together here from pieces.
"""

import copy
import datetime
import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..system.console import say
from ..system.text import clipped, refusing
from .examples import Example, Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NOT_A_PROMPT = "the text that a server would give as their prompt is not how the row's text begins"
NO_END = "no end token follows them, as one follows the last answer"
# A macro that hides transformers' function of the same name gives a template the date. The line break behind it
# is removed by `trim_blocks`, so the template still begins a line.
_DATES = "{%- macro strftime_now(format) %}{{ qlora_min_dates[format] }}{% endmacro %}\n"

Segment = tuple[list[str], int | None]  # text in parts, to be tokenised apart; which message begins here


def named_template(name: str, tokenizer: Any) -> str:
    """The template that `--chat-template` names: "chatml", or a file.

    Where the tokenizer has no `<|im_end|>`, ChatML's answers end with its eos token.

    Raises:
        ValueError: no such file, or it can't be read.
    """
    if name == "chatml":
        known = {token.content for token in tokenizer.added_tokens_decoder.values()}
        return CHATML if "<|im_end|>" in known else CHATML.replace("<|im_end|>", tokenizer.eos_token or "<|im_end|>")
    with refusing(f"--chat-template {name}: can't be read", "expected a file with a Jinja template, or chatml"):
        return Path(name).read_text(encoding="utf-8-sig")


def tokenizer_to_save(encoder: Any) -> Any:
    """The tokenizer of a `ChatEncoder` as it is saved: itself, or a copy whose eos token, at which servers stop, is the
    end token that was trained. A template that writes `eos_token` elsewhere (Phi-3's, at the very end) keeps writing
    the old one."""
    tokenizer = encoder.tokenizer
    old, new = tokenizer.eos_token, tokenizer.convert_ids_to_tokens(encoder.end_id)
    if old == new:
        return tokenizer
    saved, sample = copy.deepcopy(tokenizer), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    saved.eos_token = new
    if Template(saved).render(sample) != Template(tokenizer).render(sample):
        saved.chat_template = f"{{% set eos_token = {json.dumps(old or '')} %}}{saved.get_chat_template()}"
    return saved


class SavedOnce:
    """A tokenizer for saving, whose files are made once and then kept: 11 MB of vocabulary take 0.1 s each time."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.files = tokenizer, {}

    def save_pretrained(self, folder: Path) -> None:
        """As the tokenizer's own, into a new folder."""
        if not self.files:
            self.tokenizer.save_pretrained(folder)
            self.files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


class Template:
    """A tokenizer's chat template.

    Args:
        date: what the template is told if it asks for today's date, as YYYY-MM-DD; today if not given.

    Attributes:
        date: that date; None if the template does not ask for it.
        notes: what the template did to answers -> their number.
    """

    def __init__(self, tokenizer: Any, date: str | None = None):
        self.tokenizer, self.notes, self.date = tokenizer, Counter(), None
        tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        names = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "$^"
        self.control = re.compile(names)
        self._spelled = re.compile(f"(?={names})(.)", re.DOTALL)  # the first character of each, overlapping ones too
        self._dates: dict[str, str] = {}
        asked = re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", str(tokenizer.chat_template).replace("\\'", "'"))
        if asked:
            day = datetime.date.fromisoformat(date) if date else datetime.date.today()
            self.date, self._dates = day.isoformat(), {form: day.strftime(form) for _, form in asked}

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer by itself puts a bos token before a text."""
        return self.tokenizer.bos_token_id in self.tokenizer("")["input_ids"]

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), ask: bool = False) -> str:
        """The text of a conversation. ask: with the beginning of the next answer (`add_generation_prompt`).

        Raises:
            ValueError: the template refuses the conversation.
        """
        template = self.tokenizer.get_chat_template(None, list(tools) or None)
        given = {"chat_template": _DATES + template, "qlora_min_dates": self._dates} if self._dates else {}
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, add_generation_prompt=ask, tokenize=False, **given
            )
        except Exception:  # in the template's own words, or Jinja's, which may hold the row's text
            roles = tuple(str(m["role"]) for m in messages)
        if tools or any("tool_calls" in m for m in messages):
            raise ValueError("the chat template renders no tools, or refuses these tool calls")
        raise ValueError(f"the chat template refuses the roles {', '.join(roles)}: {self._why_refused(roles)}")

    @lru_cache(maxsize=64)  # noqa: B019 (a template lives as long as its run)
    def _why_refused(self, roles: tuple[str, ...]) -> str:
        """The template's own message, from messages without the row's text."""
        try:
            self.tokenizer.apply_chat_template([{"role": r, "content": "x"} for r in roles], tokenize=False)
        except Exception as e:
            return clipped(e)
        return "it can't render one of these messages"

    def segments(self, example: Example, ask: bool = False) -> list[Segment]:
        """A conversation's text, cut at the beginning of each answer whose prompt is a prefix of the text.

        A segment is split into parts inside every control token that a message spells, so that the token stays text.

        Args:
            ask: the conversation waits for its answer, the text is its prompt.

        Raises:
            ValueError: the template refuses the conversation, or leaves its tools or tool calls out.
        """
        messages, tools, mark = self._prepared(example)
        try:
            text = self.render(messages, tools, ask)
        except ValueError:  # a template may expect the arguments of calls as the JSON text that they were
            messages, tools, mark = self._prepared(example, objects=False)
            text = self.render(messages, tools, ask)
        if not ask:
            self._check_tools(text, messages, tools)
        self._count_thoughts(text, messages)
        cuts: list[tuple[int, int | None]] = [(0, None)]
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and i:
                with suppress(ValueError):  # a server can't ask for it: the template refuses the messages before it
                    prompt = self.render(messages[:i], tools, ask=True)
                    if text.startswith(prompt) and len(prompt) >= cuts[-1][0]:
                        cuts.append((len(prompt), i))
        ends = [start for start, _ in cuts[1:]] + [len(text)]
        return [(text[start:end].split(mark), i) for (start, i), end in zip(cuts, ends)]

    def _prepared(self, example: Example, objects: bool = True) -> tuple[list[Message], list[dict[str, Any]], str]:
        """(messages, tools, mark) for the template: without nulls, with the arguments of calls as objects, and with a
        mark, which no text contains, behind the first character of each control token that a text spells."""
        messages = [{k: v for k, v in m.items() if v is not None} for m in example.messages]
        for message in messages:
            if objects and "tool_calls" in message:
                message["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        tools, whole = list(example.tools), json.dumps([messages, example.tools], ensure_ascii=False)
        mark = next(c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in whole)  # private-use characters
        if self.control.search(whole):
            messages, tools = self._marked(messages, mark), self._marked(tools, mark)
        return messages, tools, mark

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._spelled.sub(rf"\1{mark}", value)
        if isinstance(value, list):
            return [self._marked(v, mark) for v in value]
        return {k: self._marked(v, mark) for k, v in value.items()} if isinstance(value, dict) else value

    def say_notes(self, name: str) -> None:
        """Print the notes on a data set, and forget them."""
        for what, n in self.notes.items():
            say(f"note: {name}: {n:,} {what}")
        self.notes.clear()

    def _check_tools(self, text: str, messages: list[Message], tools: list[dict[str, Any]]) -> None:
        if tools and self.render(messages, ()) == text:
            raise ValueError("tools: the chat template renders none")
        without = [{"content": "", **{k: v for k, v in m.items() if k != "tool_calls"}} for m in messages]
        if any("tool_calls" in m for m in messages) and self.render(without, tools) == text:
            raise ValueError("messages: the chat template renders no tool calls")

    def _count_thoughts(self, text: str, messages: list[Message]) -> None:
        """Count the think blocks that the template removes."""
        for m in messages:
            block = re.search(r"<think>(.*?)</think>", m.get("content") or "", re.DOTALL)
            thought = (m.get("reasoning_content") or (block[1] if block else "")).strip()
            if m["role"] == "assistant" and thought not in text:
                self.notes["think blocks are left out: the chat template removes them"] += 1


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as an object, which templates expect; OpenAI's form has them as JSON text."""
    function = call.get("function", call)
    with suppress(KeyError, TypeError, ValueError):
        function = {**function, "arguments": json.loads(function["arguments"])}
        return {**call, "function": function} if "function" in call else function
    return call
