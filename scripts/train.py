"""Fine-tune a model with QLoRA: `python scripts/train.py --help`. See qlora_min/cli/train.py."""

from qlora_min.cli.main import run_command

if __name__ == "__main__":
    run_command("train")
