"""Chat messages -> (token ids, which of them are supervised), by the model's own chat template.

One encoder serves training, evaluation and chat. A row's text is what the template makes of its messages, cut where
the answers begin (data/templates.py). For Qwen2 and one question (supervised tokens underlined):

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\nQ: ...<|im_end|>\\n
    <|im_start|>assistant\\nE: Nitrofurantoin<|im_end|>
                           ~~~~~~~~~~~~~~~~~~~~~~~~~~~

An answer is supervised together with its end token, so the model learns to stop; a row ends after the last one. Prompt
and answer are tokenised separately, so the prompt's ids are those that a server gives the model. A text never becomes a
control token: `<|im_end|>` written in a question is tokenised as ordinary text.
"""

import functools
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .data.examples import BadRow, Example, Message
from .data.rows import Choices, Row
from .data.templates import NO_END, NOT_A_PROMPT, Segment, Template

ANSWER = "\ue000"
PROBE = ({"role": "user", "content": "x"}, {"role": "assistant", "content": ANSWER})


class ChatEncoder:
    """Messages -> token ids and supervised mask, by the tokenizer's own chat template.

    Args:
        train_on: which answers are supervised: "all", or the "last" of each row.
        date: of a template that shows the day's (`Template`).
        vocab_size: of the model's embedding, which may be smaller than the tokenizer's.

    Raises:
        ValueError: the tokenizer has no chat template, or one that puts no end token after an answer.
    """

    def __init__(self, tokenizer: Any, train_on: str = "all", date: str | None = None, vocab_size: int | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template; use an instruction-tuned model, or --chat-template")
        self.tokenizer, self.train_on, self.vocab_size = tokenizer, train_on, vocab_size or len(tokenizer)
        self.template = Template(tokenizer, date)
        self.special_ids = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        marks_spaces = tokenizer.convert_ids_to_tokens(self._tokenise(["x"])[0])[0].startswith("\u2581")
        self._middle = "\n" if marks_spaces else ""  # SentencePiece puts a space before a text; not behind a newline
        _, shown, behind = self.template.render(PROBE).rpartition(ANSWER)
        ends = [i for i in self._tokenise([behind])[0] if i in self.special_ids]
        if not shown or not ends:
            raise ValueError("the chat template puts no end token after an answer: the model could not learn to stop")
        self.end_id = ends[0]
        self._checked([*self.prompt(PROBE[:1]), self.end_id])

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """One call of the tokenizer for all texts: a call each would cost more than tokenising a short one."""
        given = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **given)["input_ids"] if texts else []

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (an encoder lives as long as its run)
    def _tokenise_one(self, text: str) -> list[int]:
        return self._tokenise([text])[0] if text else []

    def _tokenise_behind(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """(preceding text, text) -> the ids of the text, tokenised together with the preceding text, or by itself if a
        token would span both."""
        out = []
        for (before, text), ids in zip(pairs, self._tokenise([before + text for before, text in pairs])):
            head = self._tokenise_one(before)
            for instead in (self._middle, ""):
                if ids[: len(head)] == head:
                    break
                head, ids = self._tokenise_one(instead), self._tokenise_one(instead + text)
            out.append(ids[len(head) :])
        return out

    def _pairs(self, segments: Sequence[Segment]) -> Iterator[tuple[str, str]]:
        """(preceding text, part) of each part. What precedes a segment is the `_tail` of the one before it."""
        before = ""
        for parts, _ in segments:
            yield before, parts[0]
            yield from ((self._middle, part) for part in parts[1:])
            before = self._tail(parts[-1])

    def _tail(self, text: str) -> str:
        return text[max((m.start() for m in self.template.control.finditer(text)), default=0) :]

    def _encode_segments(self, rows: Sequence[Sequence[Segment]]) -> list[list[list[int]]]:
        """The ids of each segment of each row."""
        ids = iter(self._tokenise_behind([pair for segments in rows for pair in self._pairs(segments)]))
        return [
            [list(itertools.chain.from_iterable(itertools.islice(ids, len(parts)))) for parts, _ in segments]
            for segments in rows
        ]

    def encode_examples(self, examples: Sequence[Example]) -> list[Row | BadRow]:
        """Conversations that end with an answer -> a Row of each, or a BadRow that says why it can't be one.

        An answer is supervised, its end token included, unless `train_on` or `Example.unlearned` excludes it, it has no
        end token, or the row's text does not begin with its prompt as a server would render it.
        """

        def tried(compute: Callable[..., Any], example: Example, *given: Any) -> Any:
            try:
                return compute(example, *given)
            except ValueError as error:
                return BadRow(f"{example.location}: {error}")

        found = [tried(self.template.segments, example) for example in examples]
        encoded = iter(self._encode_segments([part for part in found if not isinstance(part, BadRow)]))
        return [
            part if isinstance(part, BadRow) else tried(self._row, example, part, next(encoded))
            for example, part in zip(examples, found)
        ]

    def _row(self, example: Example, segments: Sequence[Segment], encoded: Sequence[list[int]]) -> Row:
        answers = [i for i, m in enumerate(example.messages) if m["role"] == "assistant"]
        wanted = {*(answers if self.train_on == "all" else answers[-1:])} - {*example.unlearned}
        ids, supervised = [], bytearray()
        for (_, i), segment in zip(segments, encoded):
            learned = segment.index(self.end_id) + 1 if i in wanted and self.end_id in segment else 0
            ids += segment
            supervised += b"\1" * learned + bytes(len(segment) - learned)
            wanted -= {i} if learned else set()
        control = sum(len(self.template.control.findall(part)) for parts, _ in segments for part in parts)
        if sum(map(self.special_ids.__contains__, ids)) != control:
            raise ValueError("a text turns into a control token of the tokenizer even when cut")
        if 1 not in supervised:
            raise ValueError("no answer carries a loss" + (f": {NOT_A_PROMPT}" if wanted else ""))
        begun = {i for _, i in segments}
        for i in wanted:
            self.template.notes[f"answers carry no loss: {NO_END if i in begun else NOT_A_PROMPT}"] += 1
        choices = self._choices(example, segments, ids, len(ids) - len(encoded[-1])) if learned else None
        end = supervised.rindex(1) + 1  # nothing is learned from what follows
        ids = torch.frombuffer(array("i", self._checked(ids[:end])), dtype=torch.int32)
        return Row(ids, torch.frombuffer(supervised, dtype=torch.bool, count=end), example.location, choices)

    def _choices(self, example: Example, segments: Sequence[Segment], ids: list[int], start: int) -> Choices | None:
        """`Row.choices` of a row whose last segment, from `start` on, is its last answer."""
        choice, text = example.choice, segments[-1][0][0]
        at = text.find(example.messages[-1]["content"].strip()) if choice else -1
        if at < 0:
            return None
        tail = self._tail(segments[-2][0][-1])
        encoded = self._with_letters(tail + text[:at], choice.letters, text[at + 1 : at + 3])  # with ": ", say
        first = next(i for i, tokens in enumerate(zip(*encoded)) if len({*tokens}) > 1)
        firsts, right = tuple(e[first] for e in encoded), choice.letters.index(choice.correct)
        position = start + first - len(self._tokenise_one(tail))
        if len({*firsts}) < len(firsts) or ids[position : position + 1] != [firsts[right]]:
            return None  # no single token tells the letters apart
        return firsts, right, position

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _with_letters(self, before: str, letters: tuple[str, ...], behind: str) -> list[list[int]]:
        return self._tokenise([before + letter + behind for letter in letters])

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The (ids, supervised) of one conversation, equally long; raises why it can't be a row."""
        (row,) = self.encode_examples([Example(tuple(messages), "messages")])
        if isinstance(row, BadRow):
            raise row
        return row.input_ids.tolist(), row.supervised.tolist()

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation that awaits its answer -> the ids that precede the answer in `encode`. A server makes the same
        ids, unless one of its tokens spans the beginning of an earlier answer."""
        segments = self.template.segments(Example(tuple(messages), "messages"), ask=True)
        return self._checked(list(itertools.chain.from_iterable(self._encode_segments([segments])[0])))

    def _checked(self, ids: list[int]) -> list[int]:
        """The ids; raises ValueError if the model's embedding has no row for one."""
        if max(ids) >= self.vocab_size:
            raise ValueError(
                f"token id {max(ids)} is beyond the model's embedding of {self.vocab_size} tokens (vocab_size in "
                "config.json): resize and save it, or use the model's own tokenizer"
            )
        return ids
