"""Measure how time and memory of qlora_min grow with row length, batch size and rank, and draw a picture.

python scripts/bench_sweep.py costs.png        each point with and without gradient checkpointing
"""

import argparse
from dataclasses import replace
from itertools import product
from typing import Any

from matplotlib.figure import Figure

from qlora_min.cli.bench import measure, prepared, shared_options, show
from qlora_min.cli.main import run_parsed
from qlora_min.cli.options import Emit, Parser

AXES = {  # option -> (values, title)
    "max_length": ((128, 256, 512, 1024, 2048, 4096), "tokens in a row (4 rows)"),
    "batch_size": ((1, 4, 16, 32), "rows of 512 tokens at a time"),
    "rank": ((8, 16, 32, 64, 128), "rank (4 x 512)"),
}
CURVES = (("tokens_per_second", 0, "o-"), ("peak_gib", 1, "o-"), ("forecast_gib", 1, ":"))  # figure, row, style


def main(args: argparse.Namespace, emit: Emit) -> None:
    """Measure along each axis, with one micro-batch per step; draw a picture and print a table."""
    results = []
    with prepared(args, grad_accum=1) as args:
        for axis, (values, _) in AXES.items():
            for value, checkpointing in product(values, ("off", "on")):
                point = {"max_length": 512, "batch_size": 4, "rank": args.config.rank, axis: value}
                args.lengths = [(point["max_length"], 10)]
                args.config = replace(args.config, micro_batch_tokens=point["batch_size"] * point["max_length"])
                found = measure(args, "qlora_min", **point, gradient_checkpointing=checkpointing)
                results.append({"axis": axis, **point, **found})
    draw(results, args.picture)
    show(results, emit)


def draw(results: list[dict[str, Any]], path: str) -> None:
    """Draw a column for each axis: speed above memory."""
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    grid = figure.subplots(2, len(AXES), sharex="col", sharey="row")
    for (axis, (values, title)), column in zip(AXES.items(), grid.T):
        for (key, row, style), (checkpointing, color) in product(CURVES, (("off", "C0"), ("on", "C1"))):
            points = [r for r in results if (r["axis"], r["gradient_checkpointing"]) == (axis, checkpointing)]
            if key in points[0]:  # no peak on a CPU
                label = f"{key.split('_')[0]}, checkpointing {checkpointing}"
                column[row].plot(values, [r[key] for r in points], color + style, label=label)
        column[1].set(xlabel=title, xscale="log", yscale="log", xticks=values, xticklabels=values)
        column[1].minorticks_off()
    for axes, label in zip(grid[:, 0], ("tokens/s", "memory, GiB")):
        axes.set_ylabel(label)
        axes.legend()
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    grid[0][0].set_ylim(0)
    grid[1][0].yaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", metavar="FILE.png", help="the picture to write")
    shared_options(parser)
    parser.set_defaults(steps=5, repeats=1, warm_up=3)
    run_parsed(parser.parse_args(), main)
