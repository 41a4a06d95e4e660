"""Where else a run is shown: TensorBoard and Weights & Biases, made from metrics.jsonl and from nothing else.

A board shows the lines that are safely on disk, as scalars `train/NAME` and `eval/NAME` over optimizer steps. It first
shows all of them again whenever it is opened: after a resume, which cuts the last lines, and after a disk failed and
came back. A board that fails does not end the run.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from ..system.console import say
from ..system.text import clipped, refusing
from .checkpoint import events_in, is_finished, read_record

NO_SCALARS = ("step", "seconds")


class Board:
    """A board of a run. A subclass has `opener()`, which imports a package and returns a function to open the board;
    `show(scalars, step, time)`, with the time in seconds since 1970: the run's start plus the seconds of training, so
    that pauses do not show; and `end()`, called when training has ended in any way.

    Raises:
        ValueError: its package is not installed.
    """

    title: ClassVar[str]

    def __init__(self, run_dir: Path, name: str):
        self.run_dir, self.writer, self.failed = run_dir.resolve(), None, False
        try:
            self.open = self.opener()
        except ImportError:
            hint = f"pip install 'qlora_min[{name}]'"
            raise ValueError(f"--report {name}: {self.title} is not installed ({hint})") from None

    def begin(self) -> None:
        """Begin to show the run, from its first line on."""
        self.writer, self.read, self.seconds = self.open(), 0, 0.0

    def update(self) -> None:
        """Show the new lines of metrics.jsonl. If that fails, warn once; the next update begins again."""
        try:
            began, path = (self.run_dir / "config.json").stat().st_mtime, self.run_dir / "metrics.jsonl"
            if self.writer is None:
                self.begin()
            lines = path.read_bytes()[self.read :] if path.exists() else b""
            for line in events_in(lines):
                self.seconds = line.get("seconds", self.seconds)
                if line["event"] in ("train", "eval") and type(line.get("step")) is int:
                    numbers = {k: v for k, v in line.items() if type(v) in (int, float) and k not in NO_SCALARS}
                    scalars = {f"{line['event']}/{k.removeprefix('eval_')}": v for k, v in numbers.items()}
                    self.show(scalars, line["step"], began + self.seconds)
            self.read, self.failed = self.read + len(lines), False
        except Exception as e:  # by the disk; TensorFlow, if installed, raises it as another type than OSError
            if not self.failed:
                say(f"warning: no {self.title} for now ({clipped(e)}); metrics.jsonl has it all")
            self.writer, self.failed = None, True

    def start(self) -> None:
        """Called before training."""


class TensorBoard(Board):
    """RUN/tensorboard: an event file for each process. `purge_step=0` makes TensorBoard discard the earlier ones."""

    title = "TensorBoard"

    def opener(self) -> Callable[[], Any]:
        from torch.utils.tensorboard import SummaryWriter

        return lambda: SummaryWriter(self.run_dir / "tensorboard", purge_step=0)

    def show(self, scalars: dict[str, float], step: int, time: float) -> None:
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, step, time)
        self.writer.flush()

    def end(self) -> None:
        self.writer.close()


class WeightsAndBiases(Board):
    """A run in the project qlora_min or $WANDB_PROJECT, which a resumed run continues, by the id in config.json."""

    title = "Weights & Biases"

    def opener(self) -> Callable[[], Any]:
        from wandb import init

        def begin() -> Any:
            self.row: tuple[int, dict[str, float]] = (0, {})  # what is known of the last step
            record = read_record(self.run_dir)
            return init(project=os.environ.get("WANDB_PROJECT", "qlora_min"), name=self.run_dir.name,
                        dir=str(self.run_dir), config=record["options"], id=record["id"], resume="allow")  # fmt: skip

        return begin

    def start(self) -> None:
        """Log in before training.

        Raises:
            ValueError: there is no account, or no network.
        """
        fix = "log in with `wandb login`, or set WANDB_MODE=offline"
        with refusing(f"--report wandb: {self.title} can't begin", fix):  # errors are of wandb's own types
            self.begin()

    def show(self, scalars: dict[str, float], step: int, time: float) -> None:
        """Keep scalars until their step is complete. W&B refuses scalars of earlier steps than its last, so a resumed
        run could not add what the stopped run did not know yet of its last step (the evaluation)."""
        if step != self.row[0]:
            self._log_row()
        self.row = step, self.row[1] | scalars

    def _log_row(self) -> None:
        step, scalars = self.row
        if scalars and step >= getattr(self.writer, "step", 0):  # the earlier ones it has
            self.writer.log(scalars, step=step)
        self.row = step, {}

    def end(self) -> None:
        if is_finished(self.run_dir):
            self._log_row()
        self.writer.finish()


BOARDS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


@contextmanager
def shown_on(boards: Sequence[Board]) -> Iterator[None]:
    """Start boards, and end them however the block ends."""
    try:
        for board in boards:
            board.start()
        yield
    finally:
        for board in boards:
            with suppress(Exception):  # if it has failed, that was said
                board.end()
