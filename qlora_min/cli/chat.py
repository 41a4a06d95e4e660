"""qlora-min chat"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from ..run.options import sampling
from ..system.console import typed
from .options import Emit, Parser, load_given, one_given

QUOTES = '"""'  # around a question of several lines
SAMPLE = ("where", "prompt", "reference", "before", "after")  # of samples.jsonl
MARK = "QUESTION"  # in the place of a question, to find what a template puts around it


def options(parser: Parser) -> None:
    parser.add_adapter(required=False)
    parser.add_argument("--prompt", type=typed, metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", type=typed, metavar="TEXT", help="a system prompt instead of the template's own")
    parser.add_argument("--compare", action="store_true", help="answer without and with the adapter")
    parser.add_count("--max-new-tokens", "cut answers after N tokens", 256)
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="draw; 0: likeliest answers [0]")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X",
                        help="of the likeliest tokens, which together have this probability [1]")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same answers again")
    parser.add_precision()


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Chat with a model: a base with an adapter, or a merged checkpoint.

    chat --adapter runs/NAME/adapter                        a conversation; "exit" or Ctrl-D ends it
    chat --adapter runs/NAME/adapter --prompt "..."         one answer
    chat --adapter runs/NAME/adapter --compare              each answer without and with the adapter
    chat --model merged                                     without an adapter
    """
    one_given(args)
    if args.compare and not args.adapter:
        raise ValueError("--compare needs an --adapter (see --help)")
    how = sampling(args.temperature, args.top_p)
    if sys.stderr.isatty() and not args.json:
        print(f"loading {args.adapter or args.model} ...", file=sys.stderr)

    import torch

    from ..lora import lora_disabled

    base = load_given(args)
    sides = [("without the adapter", lora_disabled), ("with the adapter", nullcontext)][0 if args.compare else 1 :]
    start = [{"role": "system", "content": args.system}] if args.system else []
    histories = [list(start) for _ in sides]  # each side sees its own earlier answers
    if args.seed is not None:
        torch.manual_seed(args.seed)
    offered = None
    if not args.prompt and sys.stdin.isatty() and sys.stdout.isatty():
        offered = held_out(Path(args.adapter), base) if args.adapter and not args.system else ()
    for question, anew in [(args.prompt, False)] if args.prompt else _conversation(offered):
        for (label, context), history in zip(sides, histories):
            if anew:
                history[:] = start
            if args.compare:
                print(f"--- {label}")
            history.append({"role": "user", "content": question})
            with context(base.model):
                history.append({"role": "assistant", "content": _answer(base, history, args.max_new_tokens, how)})
            emit({"prompt": question, "adapter": bool(args.adapter) and context is nullcontext,
                  "answer": history[-1]["content"]})  # fmt: skip


def _answer(base: Any, messages: list[dict[str, str]], max_new_tokens: int, how: dict[str, Any]) -> str:
    """Stream the model's answer to stdout, and return it as well."""
    from transformers import TextStreamer

    from ..generate import generate

    streamer = TextStreamer(base.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return generate(base, [base.encoder.prompt(messages)], max_new_tokens, streamer=streamer, **how)[0]


def _conversation(offered: Sequence[tuple[str, str]] | None) -> Iterator[tuple[str, bool]]:
    """Read questions: (question, whether it begins a new conversation).

    Args:
        offered: (question, expected answer); Enter asks the next one, in a new conversation. None: stdin or stdout is
            no terminal; each line is a question, until an empty one.
    """
    terminal, rest, shown = offered is not None, list(offered or ()), None
    if terminal:
        with suppress(ImportError):  # missing on Windows
            import readline  # noqa: F401, with which input() edits lines and remembers earlier ones
        print('Several lines: end each but the last with \\, or begin and end with """. To leave: exit, or Ctrl-D.')
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            if rest and rest[0] is not shown:
                shown = rest[0]
                print(f"\nEnter asks this held-out question, whose answer is {shown[1]!r}:")
                print(textwrap.indent(shown[0], "  "))
            if not terminal and sys.stdin.isatty():  # and answers go to a file
                print("you> ", end="", file=sys.stderr, flush=True)
            question = _typed_lines() if terminal else typed(input()).strip()
            if (terminal and question in ("exit", "quit")) or not (question or rest):
                return
            yield (question, False) if question else (rest.pop(0)[0], True)
    print()


def _typed_lines() -> str:
    """What is typed in one line; in several, each but the last ends with a backslash, or triple quotes enclose them."""
    text = typed(input("you> ")).strip()
    if text.startswith(QUOTES):
        while len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES):
            text += "\n" + typed(input("...> ")).rstrip()
        return text[len(QUOTES) : -len(QUOTES)].strip()
    while text.endswith("\\"):
        text = text[:-1] + "\n" + typed(input("...> ")).rstrip()
    return text.strip()


def held_out(adapter: Path, base: Any) -> list[tuple[str, str]]:
    """(question, expected answer) of the held-out rows in the samples.jsonl of an adapter's run.

    Only rows that are one question to this base's template, without a system prompt or earlier turns.
    """
    decode, special = base.encoder.tokenizer.decode, base.encoder.tokenizer.all_special_tokens
    start, found, end = decode(base.encoder.prompt([{"role": "user", "content": MARK}])).partition(MARK)
    offered = []
    for _, prompt, answer, *_ in samples(adapter.parent):
        question = prompt.removeprefix(start).removesuffix(end)
        if found and prompt == start + question + end and not any(token in question for token in special):
            offered.append((question, answer))
    return offered


def samples(folder: Path) -> Iterator[list[str]]:
    """The texts of SAMPLE in each line of a run's samples.jsonl, until one is damaged; none without that file."""
    with suppress(OSError, ValueError, TypeError, RecursionError):
        for line in (folder / "samples.jsonl").read_bytes().splitlines():
            sample = dict(json.loads(line))
            yield [str(sample.get(key, "")) for key in SAMPLE]
