"""Report on data before training: `python scripts/data.py --help`. See qlora_min/cli/data.py."""

from qlora_min.cli.main import run_command

if __name__ == "__main__":
    run_command("data")
