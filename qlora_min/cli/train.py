"""qlora-min train"""

import argparse
import gc
import os
import signal
from pathlib import Path

from ..config import Config
from ..system.console import colours, is_first_process
from .options import Emit, Parser, add_options, config_options, demo_options
from .push import check_repository, hub_options, push_if_asked


def options(parser: Parser) -> None:
    demo_options(parser, "train the embedded demo: no network, no GPU, a minute; with --dataset, its model on that")
    parser.add_argument("--resume", nargs="?", const="", metavar="DIR", help="continue a run [the newest unfinished]")
    parser.add_count("--preview", "print N rows as the model sees them, and exit")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, forecast memory and time, and exit")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    hub_options(parser, "adapter")
    add_options(parser)


def command(args: argparse.Namespace, emit: Emit) -> None:
    """Fine-tune a model with QLoRA.

    train                                    the reference configuration: Qwen2-0.5B-Instruct on MedQA
    train --demo                             an embedded model and data: no network, no GPU, a minute
    train --dataset FILE.jsonl --preview 3   rows of your own data, as the model sees them
    train --model DIR --dataset FILE.jsonl   your own model and data
    train --resume                           continue the newest unfinished run
    train --adapter DIR --dataset FILE       go on from an adapter on other data, with its rank, targets and base
    """
    # Until training sets its own handler. No SystemExit: raised while garbage is collected, it would be lost.
    signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    given = config_options(args)
    Config(**given)  # what is wrong with an option is said at once

    from ..run.plan import describe, estimate
    from ..run.resume import run_config
    from ..run.trainer import Trainer
    from ..scale.processes import from_main, join, together

    gc.freeze()  # what has been imported is no garbage: passing over it takes 0.2 s each time
    with together():
        join()
        config, folder = from_main(lambda: run_config(args.resume, given))
        if not args.dry_run and not args.preview:
            from_main(lambda: check_repository(args, config.model))
    if args.preview:
        _preview(config, args.preview, folder)
        return
    trainer = Trainer(config, folder, write=not args.dry_run, on_event=emit)
    if args.dry_run:
        print(describe(trainer))
        emit({"event": "plan", **estimate(trainer)})
        return
    trainer.train()
    if is_first_process():
        push_if_asked(trainer.folder / "adapter", args, emit)


def _preview(config: Config, count: int, run: Path | None) -> None:
    """Print rows as the model sees them, supervised tokens in colour. Writes nothing."""
    from ..run.checkpoint import read_record
    from ..run.datasets import encoder_of, read_data
    from .data import show_rows

    encoder = encoder_of(config)
    train, _ = read_data(config, encoder, commits=read_record(run).get("commits") if run else None)
    show_rows(config, encoder, train, count, colours())
