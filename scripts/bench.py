"""Measure speed and memory: `python scripts/bench.py --help`. See qlora_min/cli/bench.py."""

from qlora_min.cli.main import run_command

if __name__ == "__main__":
    run_command("bench")
