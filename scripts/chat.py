"""Chat with a model: `python scripts/chat.py --help`. See qlora_min/cli/chat.py."""

from qlora_min.cli.main import run_command

if __name__ == "__main__":
    run_command("chat")
