"""Change one option at a time: train and evaluate the variants of a configuration, and print a Markdown table.

examples:
  experiments.py --demo --only rank quantization
  experiments.py --model DIR --dataset train.jsonl --eval-dataset validation.jsonl medmcqa.jsonl
  experiments.py --only base --bases A B --dataset train.jsonl --eval-dataset validation.jsonl

The options of train.py set the common configuration. Each variant is an ordinary run, in a folder of --output-dir named
after the options that it changes. Finished runs are not repeated: a script that was stopped continues where it was.
Each data set of --eval-dataset has a column: option accuracy of the best adapter, with its 95% interval, to be read
beside chance and the accuracy of always choosing one letter.
"""

import argparse
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_min.cli.main import run_parsed
from qlora_min.cli.options import Emit, Parser, add_options, config_options, demo_options
from qlora_min.cli.scores import between
from qlora_min.config import Config
from qlora_min.system.started import command

EXPERIMENTS: dict[str, list[dict[str, Any]]] = {
    "rank": [{"rank": r, "alpha": 2.0 * r} for r in (4, 8, 16, 32, 64)],
    "learning rate": [{"learning_rate": lr} for lr in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)],
    "quantization": [{"quantization": q} for q in ("nf4", "fp4", "none")],
    "epochs": [{"epochs": float(n)} for n in (1, 2, 3, 4, 5)],
    "linear layers": [{"targets": Config.targets}, {"targets": (*Config.targets, "gate_proj", "up_proj", "down_proj")}],
    "shuffled options": [{"shuffle_options": False}, {"shuffle_options": True}],
    "base": [],  # filled from --bases
}
TOKENS = 8192  # in a batch of the evaluation


def main(args: argparse.Namespace, emit: Emit) -> None:
    common = Config(**{"output_dir": "runs/experiments"} | config_options(args))
    if not common.eval_dataset:
        raise ValueError("--eval-dataset NAME ... is needed (see --help)")
    experiments = EXPERIMENTS | {"base": [{"model": name} for name in args.bases]}
    chosen = [(name, change) for name in args.only or experiments for change in experiments[name]]
    if not chosen:
        raise ValueError("--only base: needs --bases NAME ...")
    results = []
    for name, change in chosen:
        results.append((f"{name} {_short(next(iter(change.values())))}", run(common, change)))
        emit({"experiment": results[-1][0], **results[-1][1]})
    print("\n" + markdown(results))


def run(common: Config, change: dict[str, Any]) -> dict[str, Any]:
    """Train with one change and evaluate on each data set, unless that is done already; returns the figures."""
    from qlora_min.adapter import load_adapter
    from qlora_min.cli.scores import Choices
    from qlora_min.evaluation import evaluate_rows
    from qlora_min.fused.select import for_evaluation
    from qlora_min.lora import lora_parameters
    from qlora_min.run import checkpoint
    from qlora_min.run.datasets import evaluation_data
    from qlora_min.run.resume import run_config
    from qlora_min.run.trainer import Trainer
    from qlora_min.system.files import write_json

    changed = replace(common, **change)
    if changed == common:
        change = {}  # the common configuration itself is trained once for all experiments
    folder = Path(common.output_dir) / ("-".join(f"{k}={_short(v)}" for k, v in change.items()) or "common")
    results, adapter = folder / "results.json", folder / "adapter"
    if results.exists():
        return json.loads(results.read_text(encoding="utf-8"))
    if not checkpoint.is_run(folder):
        Trainer(replace(changed, output_dir=str(folder))).train()
    elif not checkpoint.is_finished(folder):
        Trainer(*run_config(str(folder), {})).train()
    gc.collect()
    parts = evaluation_data(adapter, changed.model, changed.eval_dataset, changed.eval_limit, changed.max_length)
    base = load_adapter(adapter, changed.model, changed.precision)
    engine = for_evaluation(base, max(int(p.rows.lengths.max()) for p in parts), TOKENS)
    found = {"trained": sum(p.numel() for p in lora_parameters(base.model).values()), "data": {}}
    for part in parts:
        e = evaluate_rows(engine, part.rows, 64, part.name, TOKENS)
        found["data"][part.name] = e.as_dict() | (Choices(e.choices).as_dict() if e.option_rows else {})
    write_json(results, found)
    return found


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{len(value)}" if isinstance(value, tuple) else Path(value).name if isinstance(value, str) else f"{value:g}"


def markdown(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Chance and majority of each data set, and a table: a line for each run. The loss is of the first data set."""
    from qlora_min.run.cards import beside

    sets = results[0][1]["data"]
    known = [f"{Path(s).stem}: {beside(r)}" for s, r in sets.items() if r["option_rows"]]
    lines = [["", "trained", "held-out loss", *(f"accuracy on {Path(s).stem}" for s in sets)]]
    lines.append(["---"] * len(lines[0]))
    for label, r in results:
        data = r["data"].values()
        accuracy = [f"{d['option_accuracy']:.1%} ({between(d['interval'])})" if d["option_rows"] else "-" for d in data]
        lines.append([label, f"{r['trained']:,}", f"{next(iter(data))['loss']:.4f}", *accuracy])
    return "; ".join(known) + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    what, _, more = __doc__.replace("experiments.py", command("experiments")).partition("\n\n")
    parser = Parser(usage="%(prog)s [options]", description=what, epilog=more)
    demo_options(parser, "the demo's model, data and settings: half a minute a run")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME",
                        help=f"some of these experiments: {', '.join(EXPERIMENTS)} [all]")  # fmt: skip
    parser.add_argument("--bases", nargs="+", default=(), metavar="NAME", help="models for the experiment 'base'")
    add_options(parser)
    run_parsed(parser.parse_args(), main)
