"""The command line: what `qlora-min train|data|eval|merge|chat|bench` and the scripts of the same names do.

A command is two functions here: one that adds its options to a parser, one that runs it. Imports that take seconds
(torch) come late, so that --help and errors in options come at once. `--json` turns stdout into one JSON object a line,
for programs; text and bars are then left out.
"""

import argparse
import inspect
import json
import os
import shlex
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from .config import FIELDS, REMOVED, Config, flag, is_first_process, kinds_of, nearest, positive, read_toml, redacted

Emit = Callable[[dict[str, Any]], None]

# The order of --help: every field of Config is in one group.
GROUPS = {
    "model and data": ("model", "dataset", "eval_dataset", "eval_fraction", "max_length", "limit", "eval_limit",
                       "skip_bad_rows", "shuffle_options", "mix"),
    "steps": ("epochs", "max_steps", "batch_size", "grad_accum", "learning_rate", "warmup_ratio", "weight_decay",
              "max_grad_norm", "optimizer", "seed"),
    "LoRA and its base": ("rank", "alpha", "dropout", "targets", "quantization"),
    "speed and memory": ("precision", "gradient_checkpointing", "micro_batch_tokens", "engine", "shard"),
    "evaluating, saving, stopping": ("eval_every", "patience", "log_every", "tensorboard", "save_every",
                                     "save_minutes", "output_dir"),
}  # fmt: skip
METAVARS = {int: "N", float: "X", str: "NAME"}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line on stderr, with the nearest known option, and exit code 2."""

    removed: Mapping[str, str] = REMOVED  # options of earlier versions -> what there is instead

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [s for a in self._actions for s in a.option_strings]
            name = unknown[0].split("=")[0]
            if instead := self.removed.get(name.removeprefix("--")):
                self.error(f"{name}: removed: {instead}")
            self.error(f"unknown option '{name}'{nearest(name, known) if name.startswith('-') else ''}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {redacted(message)} (see --help)\n" if is_first_process() else None)


def add_options(parser: argparse.ArgumentParser, only: Sequence[str] = tuple(FIELDS)) -> None:
    """Add the fields of Config as options, or some. Options that are not given stay out of the namespace."""
    titled = {}
    for title, names in GROUPS.items():
        if names := [name for name in names if name in only]:
            titled |= dict.fromkeys(names, parser.add_argument_group(title))
    for f in (FIELDS[name] for name in titled):
        meta, kinds = f.metadata, kinds_of(f)
        if "separator" in meta:
            kwargs = {"type": lambda s: tuple(p.strip() for p in s.split(",") if p.strip()), "metavar": "A,B,..."}
        elif "choices" in meta:
            kwargs = {"choices": meta["choices"]}
        elif bool in kinds:
            kwargs = {"action": argparse.BooleanOptionalAction}
        else:
            kind, metavar = next((k, m) for k, m in METAVARS.items() if k in kinds)
            kwargs = {"type": kind, "metavar": metavar} | ({"nargs": "+"} if Ellipsis in kinds else {})
        default = f.default if not isinstance(f.default, tuple) else ",".join(f.default)
        kwargs["help"] = (meta["help"] + (f" [{default}]" if default not in (None, "") else "")).replace("%", "%%")
        titled[f.name].add_argument(flag(f.name), dest=f.name, default=argparse.SUPPRESS, **kwargs)


def given_options(namespace: argparse.Namespace) -> dict[str, Any]:
    """The Config fields that the command line gave."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(namespace).items() if k in FIELDS}


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's main: a ValueError (what a user can cause) or OSError is one line on stderr and exit code 2.

    A ValueError may have several lines to show, in its attribute `lines`. Of several processes that torchrun started,
    the first shows it.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # nothing forks after it
    try:
        sys.exit(main() or 0)
    except MemoryError as e:
        print(f"error: {e or 'out of memory'}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `... | head`
        sys.stderr.close()
        sys.exit(141)
    except (ValueError, OSError) as e:  # OSError: a file or folder that can't be read or written
        for line in getattr(e, "lines", [str(e)]) if is_first_process() else ():
            print("error: " + " ".join(redacted(line).split()), file=sys.stderr)
        sys.exit(2)


# ---------------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------------


def train_options(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file; the command line wins")
    parser.add_argument("--demo", action="store_true", help="train the embedded demo: no network, no GPU, a minute")
    parser.add_argument("--resume", nargs="?", const="", metavar="DIR", help="continue a run (the newest unfinished)")
    _count_option(parser, "--preview", "print N rows as the model sees them, and exit")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, forecast memory and time, and exit")
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    _json_option(parser)
    _hub_options(parser, "adapter")
    add_options(parser)


def train(args: argparse.Namespace, emit: Emit) -> int:
    """Fine-tune a model with QLoRA.

    train                                    the reference configuration: Qwen2-0.5B-Instruct on MedQA
    train --demo                             an embedded model and data: no network, no GPU, a minute
    train --model DIR --dataset FILE.jsonl   your own
    train --resume                           continue the newest unfinished run
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # while loading; training has its own
    options = _options(args)
    config = Config(**options)

    from .distributed import from_main, join, together
    from .optim import TrainingError
    from .train import Trainer, resume_config

    try:
        run, repo = None, None
        with together():
            join()
            if args.resume is not None:
                config, run = from_main(lambda: resume_config(args.resume, options))
            if not args.dry_run and not args.preview:
                repo = from_main(lambda: _checked_repo(args, config.model))
        if args.preview:
            _preview(config, args.preview)
            return 0
        trainer = Trainer(config, run, write=not args.dry_run)
        if args.dry_run:
            print(trainer.describe())
            emit({"event": "plan", **trainer.estimate()})
            return 0
        trainer.metrics.echo = emit
        trainer.train()
    except TrainingError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if is_first_process():
        _push(trainer.run / "adapter", repo, args, emit)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Config's options: the command line's, over the file's, over the demo's (whose data go to the user's cache)."""
    options = {**(read_toml(args.config) if args.config else {}), **given_options(args)}
    if not args.demo:
        return options

    from . import demo

    train, held = demo.write_data(demo.cache_folder())
    files = {"model": str(demo.MODEL_DIR), "dataset": (str(train),), "eval_dataset": (str(held),)}
    return {**files, **demo.OPTIONS, **options}


def _preview(config: Config, count: int) -> None:
    """Print rows as the model sees them, supervised tokens in colour."""
    from .care import show_rows
    from .data import read_data
    from .model import load_encoder

    encoder = load_encoder(config.model)
    train, _ = read_data(config, encoder)
    show_rows(config, encoder, train, count, colour=sys.stdout.isatty())


# ---------------------------------------------------------------------------------------------------------------------
# data
# ---------------------------------------------------------------------------------------------------------------------


def data_options(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE.toml", help="options from a file; the command line wins")
    parser.add_argument("--demo", action="store_true", help="look at the embedded demo's data")
    _count_option(parser, "--preview", "and print N rows as the model sees them")
    _json_option(parser)
    add_options(parser, [*GROUPS["model and data"], "seed"])


def data(args: argparse.Namespace, emit: Emit) -> None:
    """Look at data before training: lengths, letters, repeated, contradicting and leaking questions.

    data --dataset FILE.jsonl --eval-dataset OTHER.jsonl   takes the options of train that name data
    data --demo --preview 3                                and rows as the model sees them
    """
    config = Config(**_options(args))

    from .care import look_at

    emit(look_at(config, args.preview or 0, colour=sys.stdout.isatty()).as_dict())


# ---------------------------------------------------------------------------------------------------------------------
# eval
# ---------------------------------------------------------------------------------------------------------------------


def eval_options(parser: Parser) -> None:
    _adapter_options(parser, required=True)
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="hub ids or files [the run's held-out rows]")
    _count_option(parser, "--limit", "at most the first N rows of each data set")
    _count_option(parser, "--max-length", "leave longer rows of --dataset out", 512)
    _count_option(parser, "--batch-size", "rows at a time", 8)
    answers = "also let both write answers to the first N rows of each data set, and compare them with the references"
    _count_option(parser, "--generate", answers)
    _count_option(parser, "--max-new-tokens", "cut these answers here", 64)
    parser.add_argument("--html", metavar="FILE", help="write a report: curves, tables, answers side by side")
    _precision_option(parser)
    _json_option(parser)


def evaluate(args: argparse.Namespace, emit: Emit) -> None:
    """Evaluate a base and its adapter side by side on the same rows.

    eval --adapter runs/NAME/adapter                        the run's own held-out rows
    eval --adapter runs/NAME/adapter --dataset FILE.jsonl   other rows
    """
    from . import evaluate, page
    from .adapter import load_adapter
    from .data import table
    from .engine import for_evaluation
    from .files import write_text
    from .lora import lora_disabled
    from .model import pick_device, resolve_precision
    from .report import aligned
    from .scores import TextScores, need_libraries

    if args.generate:
        need_libraries()
    if args.html:
        page.check(args.html)
    adapter = Path(args.adapter)
    parts = evaluate.evaluation_data(adapter, args.model, args.dataset, args.limit, args.max_length)
    names = [part.name for part in parts]
    print(table(parts) + "\n", flush=True)

    precision = resolve_precision(args.precision, pick_device())
    base = load_adapter(adapter, args.model, precision)
    longest = max(int(part.rows.lengths.max()) for part in parts)
    engine = for_evaluation(base, longest, args.batch_size * args.max_length)
    results, answers = [], []  # of each side, base and adapter: one for each data set
    for side, context in (("base", lora_disabled), ("adapter", nullcontext)):
        with context(base.model):
            results.append([evaluate.evaluate(engine, part.rows, args.batch_size, side) for part in parts])
            if args.generate:
                how = (args.batch_size, args.max_new_tokens, f"{side} answers")
                answers.append([evaluate.generated(base, part.rows[: args.generate], *how) for part in parts])
    before, after = (evaluate.Evaluation.join(side) for side in results)
    texts = tuple(evaluate.Answers.join(side).scores for side in answers) or (None, None)
    each = [[a.scores for a in side] for side in answers]
    print(evaluate.side_by_side(before, after, texts))
    if len(parts) > 1:
        print("\nEach data set, base → adapter (95% interval of the adapter's option accuracy;")
        print("majority: what always saying the letter that is right most often would reach):")
        print(aligned(evaluate.by_data_set(names, *results)))
        if answers:
            print(aligned(evaluate.texts_by_data_set(names, *each)))
    if after.option_rows:
        print("\nThe adapter's answers by right letter:\n" + aligned(evaluate.by_letter(after.choices)))

    def values(result: evaluate.Evaluation, scores: TextScores | None) -> dict[str, Any]:
        options = {"options": result.choices.as_dict()} if result.option_rows else {}
        return {**result.as_dict(), **options, **({"generated": scores.as_dict()} if scores else {})}

    sides = {}
    for key, whole, score, evaluations, scores in zip(
        ("base", "with_adapter"), (before, after), texts, results, each or [[None] * len(parts)] * 2
    ):
        sides[key] = values(whole, score) | {"datasets": {n: values(*p) for n, *p in zip(names, evaluations, scores)}}
    emit({"adapter": str(adapter), "rows": after.rows, "precision": precision, **sides})
    if args.html:
        write_text(Path(args.html), page.evaluation(adapter, names, results, answers, precision))
        print(f"\nwrote {args.html}")


# ---------------------------------------------------------------------------------------------------------------------
# merge
# ---------------------------------------------------------------------------------------------------------------------


def merge_options(parser: Parser) -> None:
    _adapter_options(parser, required=True)
    parser.add_argument("--output-dir", metavar="DIR", help="where to write the checkpoint")
    parser.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the file [fp16]")
    base = "add the update to the weights it was trained on, or to the original ones [dequantized]"
    parser.add_argument("--base", choices=("dequantized", "original"), default="dequantized", help=base)
    parser.add_argument("--compare", action="store_true", help="evaluate each way to merge instead, and write nothing")
    parser.add_argument("--dataset", nargs="+", metavar="NAME", help="for --compare [the run's held-out rows]")
    _count_option(parser, "--limit", "for --compare: at most the first N rows")
    _hub_options(parser, "merged checkpoint")
    _json_option(parser)


def merge(args: argparse.Namespace, emit: Emit) -> int:
    """Merge an adapter into its base: an ordinary checkpoint, read back and compared before it is kept.

    merge --adapter runs/NAME/adapter --output-dir merged
    merge --adapter runs/NAME/adapter --compare             held-out loss of each way to merge; writes nothing
    """
    if args.compare:
        return _compare_merges(args, emit)
    if not args.output_dir:
        raise ValueError("--output-dir DIR is needed (see --help)")

    from .merge import MergeError, merge

    repo = _checked_repo(args)
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
    emit({"output_dir": args.output_dir, "dtype": args.dtype, "base": args.base, **vars(result)})
    _push(Path(args.output_dir), repo, args, emit)
    return 0


def _compare_merges(args: argparse.Namespace, emit: Emit) -> int:
    """Print the held-out loss of the adapter on its base and of each way to merge it."""
    from .data import Rows, table
    from .evaluate import evaluation_data
    from .merge import compare_merges
    from .model import pick_device, resolve_precision

    adapter = Path(args.adapter)
    parts = evaluation_data(adapter, args.model, args.dataset, args.limit)
    print(table(parts), flush=True)
    rows = Rows.join(part.rows for part in parts)
    results = compare_merges(adapter, rows, args.model, resolve_precision("auto", pick_device()), batch_size=8)
    for name, r in results.items():
        options = "" if r.option_accuracy is None else f"   option accuracy {r.option_accuracy:.1%}"
        print(f"{name:<42} loss {r.loss:.4f}{options}")
    emit({name: r.as_dict() for name, r in results.items()})
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# chat
# ---------------------------------------------------------------------------------------------------------------------


def chat_options(parser: Parser) -> None:
    _adapter_options(parser, required=False)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and exit")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt instead of the template's own")
    parser.add_argument("--compare", action="store_true", help="answer without and with the adapter")
    _count_option(parser, "--max-new-tokens", "cut answers here", 256)
    _precision_option(parser)
    _json_option(parser)


def chat(args: argparse.Namespace, emit: Emit) -> None:
    """Talk to a model: a base with an adapter, or a merged checkpoint.

    chat --adapter runs/NAME/adapter                        a conversation; an empty line or Ctrl-D ends it
    chat --adapter runs/NAME/adapter --prompt "..."         one answer
    chat --adapter runs/NAME/adapter --compare              each answer without and with the adapter
    chat --model merged
    """
    if not args.adapter and not args.model:
        raise ValueError("--adapter DIR or --model NAME is needed (see --help)")
    if args.compare and not args.adapter:
        raise ValueError("--compare needs an --adapter (see --help)")

    from .adapter import load_adapter
    from .lora import lora_disabled
    from .model import load_base, pick_device, resolve_precision

    precision = resolve_precision(args.precision, pick_device())
    if args.adapter:
        base = load_adapter(Path(args.adapter), args.model, precision)
    else:
        base = load_base(args.model, "none", precision)
    sides = [("without the adapter", lora_disabled), ("with the adapter", nullcontext)][0 if args.compare else 1 :]
    start = [{"role": "system", "content": args.system}] if args.system else []
    histories = [list(start) for _ in sides]  # each side remembers its own answers
    for question in [args.prompt] if args.prompt else _questions():
        for (label, context), history in zip(sides, histories):
            if args.compare:
                print(f"--- {label}")
            history.append({"role": "user", "content": question})
            with context(base.model):
                history.append({"role": "assistant", "content": _answer(base, history, args.max_new_tokens)})
            emit({"prompt": question, "adapter": bool(args.adapter) and context is nullcontext,
                  "answer": history[-1]["content"]})  # fmt: skip


def _answer(base: Any, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """Stream the model's answer to stdout, and return it."""
    from transformers import TextStreamer

    from .generate import generate

    streamer = TextStreamer(base.encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return generate(base, [base.encoder.prompt(messages)], max_new_tokens, streamer)[0]


def _questions() -> Iterator[str]:
    """Questions from the terminal, until an empty one or the end of input."""
    try:
        yield from iter(lambda: input("you> ").strip(), "")
    except (EOFError, KeyboardInterrupt):
        print()


# ---------------------------------------------------------------------------------------------------------------------
# Options that commands share
# ---------------------------------------------------------------------------------------------------------------------


def _adapter_options(parser: Parser, required: bool) -> None:
    parser.add_argument("--adapter", required=required, metavar="DIR", help="an adapter saved by train.py or PEFT")
    alone = "" if required else "a model; with --adapter, "
    parser.add_argument("--model", metavar="NAME", help=f"{alone}where the base is, if not where the adapter says")


def _count_option(parser: Parser, name: str, what: str, default: int | None = None) -> None:
    shown = f" [{default}]" if default else ""
    parser.add_argument(name, type=positive, default=default, metavar="N", help=what + shown)


def _precision_option(parser: Parser) -> None:
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="[auto]")


def _json_option(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object a line, and no text")


def _hub_options(parser: Parser, what: str) -> None:
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help=f"push the {what} to this private repository, too")
    parser.add_argument("--public", action="store_true", help="for --push-to-hub: the repository may be public")


def _checked_repo(args: argparse.Namespace, base: str | None = None) -> str | None:
    """Where to push, if anywhere: asked before any work, so that a missing token costs no training."""
    if args.public and not args.push_to_hub:
        raise ValueError("--public needs --push-to-hub OWNER/NAME (see --help)")
    if args.push_to_hub:
        from .hub import check_push

        check_push(args.push_to_hub, args.public, base)
    return args.push_to_hub


def _push(folder: Path, repo: str | None, args: argparse.Namespace, emit: Emit) -> None:
    if repo:
        from .hub import push

        url = push(folder, repo, args.public)
        print(f"pushed to {url} ({'public' if args.public else 'private'})")
        emit({"event": "push", "url": url, "public": args.public})


def bench_options(parser: Parser) -> None:
    """What every benchmark is asked, those of scripts/ too."""
    from .bench import add_arguments

    add_arguments(parser)
    add_options(parser, ("max_length", "batch_size", "grad_accum", "rank", "precision", "engine", "shard"))
    _json_option(parser)


def _bench_options(parser: Parser) -> None:
    bench_options(parser)
    parser.add_argument("--families", action="store_true", help="four families' shapes by each engine, instead")
    parser.removed = {"peers": "python scripts/bench_peers.py", "sweep": "python scripts/bench_sweep.py"}


def _bench(args: argparse.Namespace, emit: Emit) -> None:
    """Measure how fast qlora_min trains, and in how much memory.

    bench                                             Qwen2-0.5B's shape in fp16, random weights, MedQA's real lengths
    bench --families                                  other families' shapes, by each engine
    python scripts/bench_peers.py trl unsloth         the same work by peft + trl and by unsloth
    python scripts/bench_sweep.py costs.png           how time and memory grow with row length, rows and rank
    """
    from .bench import bench

    bench(args, emit)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------

# name: (what adds its options, what runs it: the docstring says what it does, and gives examples)
COMMANDS: dict[str, tuple[Callable[[Parser], None], Callable[[argparse.Namespace, Emit], int | None]]] = {
    "train": (train_options, train),
    "data": (data_options, data),
    "eval": (eval_options, evaluate),
    "merge": (merge_options, merge),
    "chat": (chat_options, chat),
    "bench": (_bench_options, _bench),
}


def described(name: str) -> tuple[str, str]:
    """(what a command does, its examples)."""
    what, _, examples = inspect.getdoc(COMMANDS[name][1]).partition("\n\n")
    return what, textwrap.indent(examples, "  ")


def make_parser(name: str, prog: str | None = None) -> Parser:
    """The parser of a command."""
    what, examples = described(name)
    parser = Parser(prog=prog, usage="%(prog)s [options]", description=what, epilog=f"examples:\n{examples}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    COMMANDS[name][0](parser)
    return parser


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> NoReturn:
    """Run a command to the process's end; `argv` is the process's own if not given."""
    run_parsed(make_parser(name, prog).parse_args(argv), COMMANDS[name][1])


def run_parsed(args: argparse.Namespace, function: Callable[[argparse.Namespace, Emit], int | None]) -> NoReturn:
    """Run what a command does, with its options, to the process's end."""

    def main() -> int | None:
        with _output(args) as emit:
            return function(args, emit)

    run_script(main)


@contextmanager
def _output(args: argparse.Namespace) -> Iterator[Emit]:
    """What --json and --quiet do to stdout and to the bars; yields what prints an object where --json asks for it.

    Of several processes that torchrun started, the first prints.
    """
    out, as_json = sys.stdout, getattr(args, "json", False)

    def emit(value: dict[str, Any]) -> None:
        if as_json and is_first_process():
            print(json.dumps(value), file=out, flush=True)

    if not as_json and not getattr(args, "quiet", False) and is_first_process():
        yield emit
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), patch.dict(os.environ, TQDM_DISABLE="1"):
        yield emit


def main() -> NoReturn:
    """The console command `qlora-min`."""
    commands = [f"  {name:<8}{described(name)[0]}" for name in COMMANDS]
    usage = "\n".join(["usage: qlora-min COMMAND [options]\n", *commands,
                       "\nqlora-min COMMAND --help tells more; qlora-min completion bash|zsh|tcsh prints a script "
                       "that completes all this"])  # fmt: skip
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage)
        sys.exit(0)
    if name == "completion":
        run_script(lambda: _completion(rest[0] if rest else "bash"))
    if name not in COMMANDS:
        known = [*COMMANDS, "completion"]
        print(f"error: unknown command '{name}'{nearest(name, known)} (see --help)", file=sys.stderr)
        sys.exit(2)
    run_command(name, rest, f"qlora-min {name}")


def _completion(shell: str) -> None:
    """Print the completion script of a shell, by shtab."""
    try:
        import shtab
    except ImportError:
        raise ValueError("completion needs shtab: pip install -e '.[completion]'") from None
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"completion: got {shell!r}, expected one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    parser = argparse.ArgumentParser(prog="qlora-min")
    commands = parser.add_subparsers()
    for name, (add, _) in COMMANDS.items():
        what, _ = described(name)
        add(commands.add_parser(name, description=what, help=what))
    print(shtab.complete(parser, shell))


if __name__ == "__main__":
    main()
