"""How this program was started, for the commands in its messages: they run where the user is."""

import os
import shlex
import shutil
import sys
from contextlib import suppress
from pathlib import Path


def command(name: str, *arguments: object, processes: int = 1) -> str:
    """What to type for one of our commands: `python PATH/NAME.py ...` if a script was started, or `qlora-min NAME ...`.

    Args:
        processes: of torchrun, on this host.
    """
    several = ["torchrun", "--nproc-per-node", processes] if processes > 1 else []
    script = Path(sys.argv[0]).parent / f"{name}.py"
    if _is_ours(script):
        words = [*(several or [_typed(sys.executable)]), script, *arguments]
    else:
        program = _typed(sys.argv[0]) if Path(sys.argv[0]).stem == "qlora-min" else "qlora-min"
        words = [*several, *(several and ["--no-python"]), program, name, *arguments]
    return shlex.join(word.as_posix() if isinstance(word, Path) else str(word) for word in words)


def _is_ours(script: Path) -> bool:
    with suppress(OSError, ValueError):  # missing, or not text
        return "from qlora_min.cli.main import" in script.read_text(encoding="utf-8")
    return False


def _typed(program: str) -> str:
    """A program's name if a shell finds it by that, else its path."""
    name = Path(program).name.removesuffix(".exe")
    same = {os.path.normcase(path).removesuffix(".exe") for path in (shutil.which(name) or "", program)}
    return name if len(same) == 1 else Path(program).as_posix()
