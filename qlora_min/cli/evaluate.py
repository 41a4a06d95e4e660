"""qlora-min eval"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .options import Emit, Parser, load_given, needed, new_file, one_given


def options(parser: Parser) -> None:
    parser.add_adapter(required=False)
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="hub ids or files [the run's held-out rows]")
    parser.add_columns()
    parser.add_count("--limit", "at most the first N rows of each data set")
    parser.add_count("--max-length", "skip longer rows of --dataset", 512)
    parser.add_count("--batch-size", "rows at a time", 8)
    answers = "also generate answers to the first N rows of each data set, to compare with the references"
    parser.add_count("--generate", answers)
    parser.add_count("--max-new-tokens", "cut these answers after N tokens", 64)
    parser.add_argument("--html", metavar="FILE", help="write a report: curves, tables, answers; never overwritten")
    parser.add_precision()


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Evaluate a base model and its adapter side by side on the same rows, or a plain or merged model.

    eval --adapter runs/NAME/adapter                        the run's own held-out rows
    eval --adapter runs/NAME/adapter --dataset FILE.jsonl   other rows
    eval --model merged --dataset FILE.jsonl                a model without an adapter
    """
    one_given(args)
    from ..run.datasets import evaluation_data, table
    from ..system.device import pick_device, resolve_precision
    from ..system.files import write_text
    from . import page

    if args.generate:
        with needed("--generate", "eval"):
            import rouge_score.rouge_scorer  # noqa: F401
            import sacrebleu  # noqa: F401
    if args.html:
        new_file("--html", args.html)
        with needed("--html", "plot"):
            import matplotlib  # noqa: F401
    adapter = args.adapter and Path(args.adapter)
    parts = evaluation_data(adapter, args.model, args.dataset, args.limit, args.max_length, args.columns)
    print(table(parts) + "\n", flush=True)
    found, precision = _evaluated(args, parts), resolve_precision(args.precision, pick_device())
    print(found)
    emit({"adapter": args.adapter, "rows": sum(len(p.rows) for p in parts), "precision": precision, **found.as_dict()})
    if args.html:
        write_text(Path(args.html), page.evaluation(adapter or args.model, found, precision))
        print(f"\nwrote {args.html}")


def _evaluated(args: argparse.Namespace, parts: Sequence[Any]) -> Any:
    """Evaluate data sets, a list of `Encoded`, without and with the adapter if there is one; returns a `Comparison`."""
    from ..evaluation import evaluate_rows
    from ..fused.select import for_evaluation
    from ..lora import lora_disabled
    from ..run.answers import generated
    from .tables import ALONE, SIDES, Comparison

    base = load_given(args)
    longest = max(int(part.rows.lengths.max()) for part in parts)
    engine = for_evaluation(base, longest, args.batch_size * args.max_length)
    results, answers = [], []
    for side in SIDES if args.adapter else ALONE:
        with lora_disabled(base.model) if side == "base" else nullcontext():
            results.append([evaluate_rows(engine, part.rows, args.batch_size, side) for part in parts])
            if args.generate:
                how = (args.batch_size, args.max_new_tokens, f"{side} answers")
                answers.append([generated(base, part.rows[: args.generate], *how) for part in parts])
    return Comparison([part.name for part in parts], results, answers)
