"""Merge an adapter into its base: `python scripts/merge.py --help`. See qlora_min/cli/merge.py."""

from qlora_min.cli.main import run_command

if __name__ == "__main__":
    run_command("merge")
