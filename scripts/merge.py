"""Merge an adapter into its base: an ordinary checkpoint, read back and compared before it is kept.

python scripts/merge.py --adapter runs/NAME/adapter --output-dir merged
python scripts/merge.py --adapter runs/NAME/adapter --compare    held-out loss of each way to merge; writes nothing
"""

import shlex
import sys
from pathlib import Path

from qlora_min.config import Parser, positive, run_script


def main() -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, metavar="DIR", help="an adapter saved by train.py or PEFT")
    parser.add_argument("--output-dir", metavar="DIR", help="where to write the checkpoint")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the file [fp16]")
    parser.add_argument(
        "--base", choices=("dequantized", "original"), default="dequantized",
        help="add the update to the weights it was trained on, or to the original ones [dequantized]",
    )  # fmt: skip
    parser.add_argument("--model", metavar="DIR", help="where the base is, if not where the adapter says")
    parser.add_argument("--compare", action="store_true", help="evaluate each way to merge instead, and write nothing")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="for --compare [the run's held-out rows]")
    parser.add_argument("--limit", type=positive, metavar="N", help="for --compare: at most the first N rows")
    args = parser.parse_args()
    if args.compare:
        return compare(args)
    if not args.output_dir:
        parser.error("--output-dir DIR is needed")

    from qlora_min.merge import MergeError, merge

    try:
        result = merge(Path(args.adapter), Path(args.output_dir), args.dtype, args.base, args.model)
    except MergeError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"wrote {args.output_dir} ({args.dtype}, {args.base} base)")
    print(f"read back: logits differ by {result.difference:.1e} of their norm (bound {result.bound:.1e}), "
          f"top-1 agrees on {result.agreement:.1%}")  # fmt: skip
    if args.base == "original":
        print(f"from the adapter as trained, on the 4-bit base: {result.from_trained:.1e}")
    print(f"next: python scripts/chat.py --model {shlex.quote(args.output_dir)}")
    return 0


def compare(args) -> int:
    """Print the held-out loss of the adapter on its base and of each way to merge it."""
    from qlora_min.data import table
    from qlora_min.merge import compare_merges
    from qlora_min.model import pick_device, resolve_precision
    from qlora_min.train import evaluation_data

    adapter = Path(args.adapter)
    parts = evaluation_data(adapter, args.model, args.dataset, args.limit)
    print(table(parts), flush=True)
    rows = [r for part in parts for r in part.rows]
    results = compare_merges(adapter, rows, args.model, resolve_precision("auto", pick_device()), batch_size=8)
    for name, r in results.items():
        options = "" if r.option_accuracy is None else f"   option accuracy {r.option_accuracy:.1%}"
        print(f"{name:<42} loss {r.loss:.4f}{options}")
    return 0


if __name__ == "__main__":
    run_script(main)
