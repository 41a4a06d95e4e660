"""Evaluate a base and its adapter side by side: `python scripts/eval.py --help`. See qlora_min/cli/evaluate.py."""

from qlora_min.cli.main import run_command

if __name__ == "__main__":
    run_command("eval")
