"""Fine-tune a model with QLoRA.

python scripts/train.py                                  the reference configuration: Qwen2-0.5B-Instruct on MedQA
python scripts/train.py --demo                           an embedded model and data: no network, no GPU, a minute
python scripts/train.py --model DIR --dataset FILE.jsonl your own
python scripts/train.py --resume                         continue the newest unfinished run
torchrun --nproc-per-node N scripts/train.py ...         any of these on N GPUs
"""

import signal
import sys

from qlora_min.config import Config, Parser, add_options, given_options, positive, read_toml, run_script


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # while loading; training has its own
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file; the command line wins")
    parser.add_argument("--demo", action="store_true", help="train the embedded demo: no network, no GPU, a minute")
    parser.add_argument("--resume", nargs="?", const="", metavar="DIR", help="continue a run (the newest unfinished)")
    parser.add_argument("--preview", type=positive, metavar="N", help="print N rows as the model sees them, and exit")
    add_options(parser)
    args = parser.parse_args()

    options = {**(read_toml(args.config) if args.config else {}), **given_options(args)}
    if args.demo:
        options = demo_options(options)
    config = Config(**options)

    from qlora_min.distributed import from_main, join, together  # late, so that --help and errors in options come soon
    from qlora_min.optim import TrainingError
    from qlora_min.train import Trainer, resume_config

    try:
        run = None
        if args.resume is not None:
            with together():
                join()
                config, run = from_main(lambda: resume_config(args.resume, options))
        if args.preview:
            preview(config, args.preview)
            return 0
        Trainer(config, run).train()
    except TrainingError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def demo_options(options: dict) -> dict:
    """The demo's model, data and options, under those given; its data are written to the user's cache."""
    from qlora_min import demo

    train, held = demo.write_data(demo.cache_folder())
    files = {"model": str(demo.MODEL_DIR), "dataset": (str(train),), "eval_dataset": (str(held),)}
    return {**files, **demo.OPTIONS, **options}


def preview(config: Config, count: int) -> None:
    """Print rows as the model sees them, supervised tokens in colour."""
    from qlora_min.data import Rows, preview
    from qlora_min.model import load_encoder
    from qlora_min.train import read_data

    encoder = load_encoder(config.model)
    train, _ = read_data(config, encoder)
    for row in Rows.join(part.rows for part in train)[:count]:
        print(f"--- {row.where}: {len(row)} tokens, {int(row.supervised.sum())} supervised")
        print(preview(row, encoder.tokenizer, colour=sys.stdout.isatty()))


if __name__ == "__main__":
    run_script(main)
