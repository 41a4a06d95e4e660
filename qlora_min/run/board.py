"""TensorBoard's view of a run."""

from pathlib import Path

from ..system.console import say


class Board:
    """RUN/tensorboard, which follows metrics.jsonl: each line that is safe on disk becomes scalars, and nothing else.

    A process begins with a file of its own and all lines there are; `purge_step=0` tells TensorBoard to forget those
    before it. So a resumed run, whose last lines were cut, and a disk that failed and came back are one case.
    Scalars are `train/NAME` and `eval/NAME` over optimizer steps; the wall time is the run's start plus its training
    time, so that pauses do not show.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, run: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            hint = "pip install 'qlora_min[tensorboard]'"
            raise ValueError(f"--tensorboard: TensorBoard is not installed ({hint})") from None
        self.begin = lambda: SummaryWriter(run / "tensorboard", purge_step=0)
        self.run, self.writer, self.failed = run, None, False

    def update(self) -> None:
        """Add what is new in metrics.jsonl. A disk that fails is a warning, once; the next update begins anew."""
        from .checkpoint import events_in

        try:
            began, path = (self.run / "config.json").stat().st_mtime, self.run / "metrics.jsonl"
            if self.writer is None:
                self.writer, self.read, self.seconds = self.begin(), 0, 0.0
            lines = path.read_bytes()[self.read :] if path.exists() else b""
            for line in events_in(lines):
                self.seconds = line.get("seconds", self.seconds)
                for key, value in line.items() if line["event"] in ("train", "eval") else ():
                    if type(value) in (int, float) and key not in ("step", "seconds"):
                        tag = f"{line['event']}/{key.removeprefix('eval_')}"
                        self.writer.add_scalar(tag, value, line.get("step"), began + self.seconds)
            self.writer.flush()
            self.read, self.failed = self.read + len(lines), False
        except Exception as e:  # of the disk; as tensorflow has it, where that is installed, it is no OSError
            if not self.failed:
                say(f"warning: no TensorBoard for now ({e}); metrics.jsonl has it all")
            self.writer, self.failed = None, True
