"""Evaluate a base and its adapter side by side on the same rows.

python scripts/eval.py --adapter runs/NAME/adapter                        the run's own held-out rows
python scripts/eval.py --adapter runs/NAME/adapter --dataset FILE.jsonl   other rows
"""

from pathlib import Path

from qlora_min.config import Parser, positive, run_script


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, metavar="DIR", help="an adapter saved by train.py or PEFT")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="hub ids or files [the run's held-out rows]")
    parser.add_argument("--limit", type=positive, metavar="N", help="at most the first N rows of each data set")
    parser.add_argument(
        "--max-length", type=positive, default=512, metavar="N", help="leave longer rows of --dataset out [512]"
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N", help="rows at a time [8]")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="[auto]")
    parser.add_argument("--model", metavar="DIR", help="where the base is, if not where the adapter says")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON too")
    args = parser.parse_args()

    from qlora_min import checkpoint
    from qlora_min.adapter import load_adapter
    from qlora_min.data import Rows, table
    from qlora_min.evaluate import evaluate
    from qlora_min.lora import lora_disabled
    from qlora_min.model import pick_device, resolve_precision
    from qlora_min.train import evaluation_data

    adapter = Path(args.adapter)
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: its folder does not exist")
    parts = evaluation_data(adapter, args.model, args.dataset, args.limit, args.max_length)
    rows = Rows.join(part.rows for part in parts)
    print(table(parts), flush=True)

    precision = resolve_precision(args.precision, pick_device())
    base = load_adapter(adapter, args.model, precision)
    with lora_disabled(base.model):
        before = evaluate(base, rows, args.batch_size, "base")
    after = evaluate(base, rows, args.batch_size, "adapter")
    print(side_by_side(before, after))
    if args.json:
        result = {"adapter": str(adapter), "rows": len(rows), "precision": precision,
                  "base": before.as_dict(), "with_adapter": after.as_dict()}  # fmt: skip
        checkpoint.write_json(Path(args.json), result)


def side_by_side(before, after) -> str:
    """A table: a line a measure, base and adapter in columns."""
    from qlora_min.evaluate import MEASURES

    lines = [("", "base", "adapter"), ("rows", f"{before.rows:,}", f"{after.rows:,}"),
             ("supervised tokens", f"{before.supervised_tokens:,}", f"{after.supervised_tokens:,}")]  # fmt: skip
    for label, key, form in (*MEASURES, ("  chance", "chance", "{:.1%}")):
        if getattr(before, key) is not None:
            lines.append((label, form.format(getattr(before, key)), form.format(getattr(after, key))))
    return "\n".join(f"{a:<20}{b:>12}{c:>12}" for a, b, c in lines)


if __name__ == "__main__":
    run_script(main)
