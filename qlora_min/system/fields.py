"""Dataclass fields that are also options: a default, a check and a help text each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


def option(default: Any, help: str, *, check: Callable[[Any], bool] | None = None, expected: str = "", **meta: Any):
    """A dataclass field that is also an option: `check(value)` must hold, `expected` says so in words.

    Args:
        meta: `group`, the heading in --help of this option and those that follow; `choices`; `separator`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "expected": expected, **meta})


def choice(default: str, choices: Sequence[str], help: str, **meta: Any):
    expected = f"one of {', '.join(choices)}"
    return option(default, help, check=lambda v: v in choices, expected=expected, choices=choices, **meta)


def positive(default: int | None, help: str, **meta: Any):
    return option(default, help, check=lambda v: v >= 1, expected="an integer of at least 1", **meta)


ABOVE_0 = {"check": lambda v: v > 0, "expected": "a number above 0"}
AT_LEAST_0 = {"check": lambda v: v >= 0, "expected": "a number of at least 0"}
FRACTION = {"check": lambda v: 0 <= v < 1, "expected": "a number in [0, 1)"}
IN_32_BITS = {"check": lambda v: 0 <= v < 2**32, "expected": "from 0 to 2**32 - 1"}
WEIGHTS = {"check": lambda v: all(0 < w < float("inf") for w in v), "expected": "numbers above 0"}
BOARDS = {"check": lambda v: set(v) <= {"tensorboard", "wandb"}, "expected": "tensorboard, wandb or both"}
