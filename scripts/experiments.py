"""Experiments: one option at a time away from one configuration, each trained and evaluated; a table in Markdown.

python scripts/experiments.py --model DIR --dataset train.jsonl --eval-dataset validation.jsonl medmcqa.jsonl \
    --output-dir runs/experiments

Any option of train.py is the common configuration's. Each run is an ordinary one, in a folder of --output-dir named
after what it changes; what is finished there is not run again, so a stopped script goes on where it was. Every data set
of --eval-dataset has its own column: option accuracy of the best adapter, with a 95% interval, to be read beside chance
and what always saying one letter would reach.
"""

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_min.cli.main import run_script
from qlora_min.cli.options import Parser, add_options, given_options
from qlora_min.cli.scores import between
from qlora_min.config import Config

EXPERIMENTS: dict[str, list[dict[str, Any]]] = {
    "rank": [{"rank": r, "alpha": 2.0 * r} for r in (4, 8, 16, 32, 64)],
    "learning rate": [{"learning_rate": lr} for lr in (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)],
    "quantization": [{"quantization": q} for q in ("nf4", "fp4", "none")],
    "epochs": [{"epochs": float(n)} for n in (1, 2, 3, 4, 5)],
    "linear layers": [
        {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
        {"targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")},
    ],
    "shuffled options": [{"shuffle_options": False}, {"shuffle_options": True}],
    "base": [],  # --bases
}


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, help="these experiments [all]")
    parser.add_argument("--bases", nargs="+", default=(), metavar="NAME", help="models for the experiment 'base'")
    add_options(parser)
    args = parser.parse_args()
    common = Config(**given_options(args))
    if not common.output_dir or not common.eval_dataset:
        raise ValueError("--output-dir DIR and --eval-dataset NAME ... are needed (see --help)")
    experiments = EXPERIMENTS | {"base": [{"model": name} for name in args.bases]}
    results = [
        (f"{name} {_short(next(iter(change.values())))}", run(common, change))
        for name in args.only or experiments
        for change in experiments[name]
    ]
    if not results:
        raise ValueError("--only base: needs --bases NAME ...")
    print("\n" + markdown(results))


def run(common: Config, change: dict[str, Any]) -> dict[str, Any]:
    """Train with one change, if that is not done yet, and evaluate on each data set; returns the figures."""
    from qlora_min.adapter import load_adapter
    from qlora_min.cli.scores import Choices
    from qlora_min.evaluation import evaluate_rows
    from qlora_min.fused.select import for_evaluation
    from qlora_min.lora import lora_parameters
    from qlora_min.run import checkpoint
    from qlora_min.run.held_out import evaluation_data
    from qlora_min.run.resume import resume_config
    from qlora_min.run.trainer import Trainer
    from qlora_min.system.device import pick_device, resolve_precision
    from qlora_min.system.files import write_json

    changed = replace(common, **change)
    if changed == replace(changed, **{k: getattr(common, k) for k in change}):
        change = {}  # the common configuration itself: run once for all experiments
    folder = Path(common.output_dir) / ("-".join(f"{k}={_short(v)}" for k, v in change.items()) or "common")
    if not (folder / "results.json").exists():
        if not checkpoint.is_run(folder):
            Trainer(replace(changed, output_dir=str(folder))).train()
        elif not checkpoint.is_finished(folder):
            Trainer(*resume_config(str(folder), {})).train()
        gc.collect()
        adapter = folder / "adapter"
        parts = evaluation_data(adapter, changed.model, changed.eval_dataset, changed.eval_limit, changed.max_length)
        base = load_adapter(adapter, changed.model, resolve_precision(changed.precision, pick_device()))
        tokens = 8192
        engine = for_evaluation(base, max(int(p.rows.lengths.max()) for p in parts), tokens)
        evaluations = {p.name: evaluate_rows(engine, p.rows, 64, p.name, tokens) for p in parts}
        found = {
            "trained": sum(p.numel() for p in lora_parameters(base.model).values()),
            "data": {
                n: e.as_dict() | (Choices.of(e.choices).as_dict() if e.option_rows else {})
                for n, e in evaluations.items()
            },
        }
        write_json(folder / "results.json", found)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{len(value)}" if isinstance(value, tuple) else Path(value).name if isinstance(value, str) else f"{value:g}"


def markdown(results: list[tuple[str, dict[str, Any]]]) -> str:
    """What the accuracies are to be read beside, and a table: a line a run. The loss is that of the first data set."""
    from qlora_min.run.cards import beside

    sets = results[0][1]["data"]
    known = [f"{Path(s).stem}: {beside(r)}" for s, r in sets.items() if r["option_rows"]]
    lines = [["", "trained", "held-out loss", *(f"accuracy on {Path(s).stem}" for s in sets)]]
    lines.append(["---"] * len(lines[0]))
    for label, r in results:
        found = list(r["data"].values())
        accuracy = [
            f"{d['option_accuracy']:.1%} ({between(d['interval'])})" if d["option_rows"] else "-" for d in found
        ]
        lines.append([label, f"{r['trained']:,}", f"{found[0]['loss']:.4f}", *accuracy])
    return "; ".join(known) + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    run_script(main)
