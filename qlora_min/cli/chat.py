"""qlora-min chat"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from ..run.options import sampling
from ..system.console import typed
from .options import Emit, Parser, adapter_options, count_option, json_option, load_given, one_given, precision_option


def options(parser: Parser) -> None:
    adapter_options(parser, required=False)
    parser.add_argument("--prompt", type=typed, metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", type=typed, metavar="TEXT", help="a system prompt instead of the template's own")
    parser.add_argument("--compare", action="store_true", help="answer without and with the adapter")
    count_option(parser, "--max-new-tokens", "cut answers after N tokens", 256)
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="draw answers; 0: the likeliest [0]"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X",
                        help="of the likeliest tokens, which together have this probability [1]")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="draw the same answers again")
    precision_option(parser)
    json_option(parser)


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Chat with a model: a base with an adapter, or a merged checkpoint.

    chat --adapter runs/NAME/adapter                        a conversation; an empty line or Ctrl-D ends it
    chat --adapter runs/NAME/adapter --prompt "..."         one answer
    chat --adapter runs/NAME/adapter --compare              each answer without and with the adapter
    chat --model merged                                     without an adapter
    """
    one_given(args)
    if args.compare and not args.adapter:
        raise ValueError("--compare needs an --adapter (see --help)")
    how = sampling(args.temperature, args.top_p)

    import torch

    from ..lora import lora_disabled
    from ..system.device import pick_device, resolve_precision

    base = load_given(args, resolve_precision(args.precision, pick_device()))
    sides = [("without the adapter", lora_disabled), ("with the adapter", nullcontext)][0 if args.compare else 1 :]
    start = [{"role": "system", "content": args.system}] if args.system else []
    histories = [list(start) for _ in sides]  # each side sees its own earlier answers
    if args.seed is not None:
        torch.manual_seed(args.seed)
    for question in [args.prompt] if args.prompt else _questions():
        for (label, context), history in zip(sides, histories):
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


def _questions() -> Iterator[str]:
    """Read questions from the terminal, until an empty line or the end of input."""
    try:
        yield from iter(lambda: typed(input("you> ")).strip(), "")
    except (EOFError, KeyboardInterrupt):
        print()
