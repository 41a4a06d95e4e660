"""Ctrl-C, SIGTERM, a closed terminal: the first signal stops at the next step boundary, a second one exits at once.

A handler can be called between any two instructions, so the first signal only sets `received`, which the loop checks
between steps. Work that can be abandoned without loss (an evaluation, samples) is done under `abandonable`; the signal
ends it at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stop(BaseException):
    """A signal was received. Not an Exception, or a library could catch it as one of its own errors."""


class Signals:
    """Handles these signals within a `with` block, and restores the former handlers after it.

    Python allows handlers in the main thread only; in any other, signals are left alone. If the block raises `Stop`,
    `advice` is printed and SystemExit raised, with the code that shells use, 128 + the signal's number.

    Args:
        index: the process's index, if there are several: only process 0 prints, and a second signal is ignored, since
            torchrun forwards signals that each process may already have received, and kills the processes in time.

    Attributes:
        received: the number of the first signal, or None.
    """

    def __init__(self, advice: str, index: int | None = None):
        self.advice, self.index = advice, index
        self.received: int | None = None
        self._may_abandon = False

    def __enter__(self) -> "Signals":
        here = threading.current_thread() is threading.main_thread()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            numbers.append(signal.SIGHUP)
        self._former = {s: signal.signal(s, self._handle) for s in numbers if here}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if kind is Stop:
            if not self.index:
                print(f"stopped by {signal.Signals(self.received).name}; {self.advice}", file=sys.stderr, flush=True)
            raise SystemExit(128 + self.received) from None

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is None:
            self.received = number
            if not self.index:
                more = "; once more to exit at once" if self.index is None else ""
                os.write(2, f"\n{name}: saving at the next step, then stopping{more}\n".encode())
            if self._may_abandon:
                raise Stop
        elif self.index is None:
            os.write(2, f"\n{name} again: exiting at once\n".encode())  # print is not safe in a handler
            os._exit(128 + number)

    @contextmanager
    def abandonable(self) -> Iterator[Callable[[], None]]:
        """Yield a function. From its call to the end of the block, signals raise `Stop`, as do earlier ones."""

        def abandon_from_here() -> None:
            self._may_abandon = True
            if self.received is not None:
                raise Stop

        try:
            yield abandon_from_here
        finally:
            self._may_abandon = False
