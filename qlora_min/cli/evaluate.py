"""qlora-min eval"""

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .options import Emit, Parser, adapter_options, count_option, json_option, precision_option


def options(parser: Parser) -> None:
    adapter_options(parser, required=True)
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="hub ids or files [the run's held-out rows]")
    count_option(parser, "--limit", "at most the first N rows of each data set")
    count_option(parser, "--max-length", "leave longer rows of --dataset out", 512)
    count_option(parser, "--batch-size", "rows at a time", 8)
    answers = "also let both write answers to the first N rows of each data set, and compare them with the references"
    count_option(parser, "--generate", answers)
    count_option(parser, "--max-new-tokens", "cut these answers here", 64)
    parser.add_argument("--html", metavar="FILE", help="write a report: curves, tables, answers side by side")
    precision_option(parser)
    json_option(parser)


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Evaluate a base and its adapter side by side on the same rows.

    eval --adapter runs/NAME/adapter                        the run's own held-out rows
    eval --adapter runs/NAME/adapter --dataset FILE.jsonl   other rows
    """
    from ..run.datasets import table
    from ..run.held_out import evaluation_data
    from ..system.device import pick_device, resolve_precision
    from ..system.files import write_text
    from . import page
    from .scores import need_libraries
    from .tables import show, values

    if args.generate:
        need_libraries()
    if args.html:
        page.check(args.html)
    adapter = Path(args.adapter)
    parts = evaluation_data(adapter, args.model, args.dataset, args.limit, args.max_length)
    print(table(parts) + "\n", flush=True)
    precision = resolve_precision(args.precision, pick_device())
    names, (results, answers) = [part.name for part in parts], _both_sides(args, parts, precision)
    show(names, results, answers)
    sides = values(names, results, answers)
    emit({"adapter": str(adapter), "rows": sides["base"]["rows"], "precision": precision, **sides})
    if args.html:
        write_text(Path(args.html), page.evaluation(adapter, names, results, answers, precision))
        print(f"\nwrote {args.html}")


def _both_sides(args: argparse.Namespace, parts: list, precision: str) -> tuple[list[list[Any]], list[list[Any]]]:
    """Evaluations and answers of each side, base and adapter: one for each data set. No answers unless asked for."""
    from ..adapter import load_adapter
    from ..evaluation import evaluate_rows
    from ..fused.select import for_evaluation
    from ..lora import lora_disabled
    from .generated import generated

    base = load_adapter(Path(args.adapter), args.model, precision)
    longest = max(int(part.rows.lengths.max()) for part in parts)
    engine = for_evaluation(base, longest, args.batch_size * args.max_length)
    results, answers = [], []
    for side, context in (("base", lora_disabled), ("adapter", nullcontext)):
        with context(base.model):
            results.append([evaluate_rows(engine, part.rows, args.batch_size, side) for part in parts])
            if args.generate:
                how = (args.batch_size, args.max_new_tokens, f"{side} answers")
                answers.append([generated(base, part.rows[: args.generate], *how) for part in parts])
    return results, answers
