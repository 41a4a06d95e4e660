"""Whether two models compute the same: their logits, and the loss of the answers, on a few conversations."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# Answers of different lengths, so that many positions are compared.
PROMPTS = (
    ("Which vitamin deficiency causes scurvy?", "Vitamin C, also called ascorbic acid."),
    ("Q: A drug slows conduction in the AV node. Which?\n{'A': 'Verapamil', 'B': 'Insulin'},", "A: Verapamil"),
    ("Name three primary colours and say why they are called so.", "Red, yellow and blue; no mixture gives them."),
    ("def add(a, b):", "    return a + b"),
)


class Probe:
    """The rows of PROMPTS, as a `ChatEncoder` makes them. Where an answer has to begin otherwise than ours do (with a
    thought, in some templates), all tokens count as the answer's."""

    def __init__(self, encoder: Any):
        rows = []
        for question, answer in PROMPTS:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            try:
                ids, supervised = encoder.encode(messages)
            except ValueError:
                ids = encoder.prompt([*messages, messages[0]])
                supervised = [False] + [True] * (len(ids) - 1)
            rows.append((torch.tensor(ids), torch.tensor(supervised)))
        self.rows = [ids for ids, _ in rows]  # (T,) each
        self.targets = torch.cat(self.rows)[1:]
        self.supervised = torch.cat([s for _, s in rows])[1:]  # no row begins with an answer

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        """(tokens of all rows, V) in fp32."""
        return torch.cat([model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in self.rows])

    def loss(self, logits: Tensor) -> float:
        """The mean loss of the answers' tokens."""
        return F.cross_entropy(logits[:-1][self.supervised], self.targets[self.supervised]).item()


def distance(a: Tensor, b: Tensor) -> float:
    """norm(a - b) / norm(b)"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def agreement(a: Tensor, b: Tensor) -> float:
    """The fraction of rows of logits (N, V) with the same first choice."""
    return (a.argmax(-1) == b.argmax(-1)).float().mean().item()
