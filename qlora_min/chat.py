"""Chat messages -> (token ids, which of them are supervised), by the model's own chat template.

One encoder serves training, evaluation and chat. The template is rendered once for each sequence of roles, with a
placeholder where each message's text belongs, and cut at the placeholders. The template's own pieces are tokenised with
their control tokens, the texts without: `<|im_end|>` written in a question is tokenised as ordinary text. The result,
for Qwen2 and one question (supervised tokens underlined):

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\nQ: ...<|im_end|>\\n
    <|im_start|>assistant\\nE: Nitrofurantoin<|im_end|>
                           ~~~~~~~~~~~~~~~~~~~~~~~~~~~

An answer is supervised together with its end token, so the model learns to stop. Answer and prompt are tokenised apart,
so at inference the model is given exactly the prompt that it was trained on.
"""

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .data.examples import BadRow, Example, Message
from .data.rows import Row


class ChatEncoder:
    """Messages -> token ids and supervised mask, by the tokenizer's own chat template.

    Raises:
        ValueError: the tokenizer has no chat template, or one that puts no end token after an answer.
    """

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the model's tokenizer has no chat template; use an instruction-tuned model")
        self.tokenizer = tokenizer
        self.special_ids = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        special = [re.escape(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self._special = re.compile("(?=" + "|".join(special or ["$^"]) + ")")  # overlapping ones too
        self._lead, self._lead_length = "", 0
        if tokenizer.convert_ids_to_tokens(self._tokenise(["x"])[0])[0].startswith("\u2581"):  # their mark for a space
            self._lead, self._lead_length = "\n", len(self._tokenise(["\n"])[0])
        self.end_id = self._pieces(("user", "assistant"))[-1][0]

    @functools.lru_cache(maxsize=1024)  # noqa: B019 (an encoder lives as long as its run)
    def _pieces(self, roles: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """The template's own tokens around n messages: n + 1 pieces; the last is the end token of the last answer."""
        marks = [f"\ue000{i}\ue001" for i in range(len(roles))]  # private-use characters stand for the texts
        messages = [{"role": r, "content": m} for r, m in zip(roles, marks)]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as e:  # a template may refuse a sequence of roles, each in its own words
            raise ValueError(f"the chat template refuses the roles {', '.join(roles)}: {e}") from None
        if re.findall("\ue000\\d+\ue001", text) != marks:
            raise ValueError(f"the chat template does not show each message once for the roles {', '.join(roles)}")
        ids = [tuple(piece) for piece in self._tokenise(re.split("\ue000\\d+\ue001", text))]
        for i, role in enumerate(roles):
            if role == "assistant" and (not ids[i + 1] or ids[i + 1][0] not in self.special_ids):
                raise ValueError(
                    "the chat template puts no end token after an answer: the model could not learn to stop"
                )
        return (*ids[:-1], ids[-1][:1])

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """Pieces of text -> the ids of each, as they are in the middle of a text.

        SentencePiece tokenizers put a space before a text's beginning; there, tokenise behind a newline and cut it off.
        """
        texts = [self._lead + text for text in texts]
        ids = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [i[self._lead_length :] for i in ids]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Messages' texts -> ids. Text that spells a control token is cut inside, so that it stays text.

        One call of the tokenizer for all texts: a call each would cost more than the tokenising of a short one.
        """
        parts, counts = [], []
        for text in texts:
            cuts = [0, *(m.start() + 1 for m in self._special.finditer(text)), len(text)]
            parts += [text[a:b] for a, b in itertools.pairwise(cuts)]
            counts.append(len(cuts) - 1)
        tokenised = iter(self._tokenise(parts))
        ids = [list(itertools.chain.from_iterable(itertools.islice(tokenised, n))) for n in counts]
        if not all(map(self.special_ids.isdisjoint, ids)):
            raise ValueError("a text turns into a control token of the tokenizer even when cut")
        return ids

    def encode_batch(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """Conversations that end with an answer -> (ids, supervised) of each, equally long.

        Supervised are the assistant's texts and the end token after each.
        """
        around = [self._pieces(tuple(m["role"] for m in messages)) for messages in conversations]
        texts = iter(self.encode_texts([m["content"] for messages in conversations for m in messages]))
        out = []
        for messages, pieces in zip(conversations, around):
            ids, supervised = list(pieces[0]), [False] * len(pieces[0])
            for message, piece in zip(messages, pieces[1:]):
                text, learned = next(texts), message["role"] == "assistant"
                ids += [*text, *piece]
                supervised += [learned] * len(text) + [learned and i == 0 for i in range(len(piece))]
            out.append((ids, supervised))
        return out

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """As `encode_batch`, for one conversation."""
        return self.encode_batch([messages])[0]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """A conversation that waits for its answer -> ids: exactly what precedes the answer in `encode`."""
        ids, _ = self.encode([*messages, {"role": "assistant", "content": ""}])
        return ids[:-1]

    def encode_examples(self, examples: Sequence[Example]) -> list[Row | BadRow]:
        """Each example as a Row, with its options' first tokens where it is multiple choice; or why it can't be one."""
        try:
            encoded = self.encode_batch([e.messages for e in examples])
            return [self._row(e, *both) for e, both in zip(examples, encoded)]
        except ValueError as error:  # one of them: which?
            if len(examples) == 1:
                return [BadRow(f"{examples[0].location}: {error}")]
            return [row for e in examples for row in self.encode_examples([e])]

    def _row(self, example: Example, ids: list[int], supervised: list[bool]) -> Row:
        choice, choices = example.choice, None
        if choice:
            firsts = tuple(map(self._first_token, choice.letters))
            if len(set(firsts)) == len(firsts):  # else no single token tells the letters apart
                choices = (firsts, choice.letters.index(choice.correct))
        ids, supervised = np.array(ids, np.int32), np.array(supervised, bool)  # faster than torch, from a list
        return Row(torch.from_numpy(ids), torch.from_numpy(supervised), example.location, choices)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _first_token(self, letter: str) -> int:
        return self.encode_texts([f"{letter}:"])[0][0]
