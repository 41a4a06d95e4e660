"""Ctrl-C, SIGTERM, a terminal that closes: the first asks to stop where nothing is lost, a second one exits at once.

A handler runs between any two instructions, so the first signal only leaves a mark, which the loop looks at between two
steps. What can be given up without a loss (an evaluation, samples) runs under `abandonable` and ends at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stop(BaseException):
    """Given up because a signal came; no Exception, lest a library takes it for an error of its own."""


class Signals:
    """Takes these signals over for a `with` block (in the main thread: others can't), and gives them back.

    A block that ends with `Stop` becomes SystemExit with 128 + the signal's number, as shells do; `advice` is printed.

    Args:
        among: this process's number, where it is one of several: the first alone prints, and a further signal changes
            nothing, since torchrun forwards to all what may have come to each already, and ends them itself in time.

    Attributes:
        received: the number of the signal that came, or None.
    """

    def __init__(self, advice: str, among: int | None = None):
        self.advice, self.among = advice, among
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
            if not self.among:
                print(f"stopped by {signal.Signals(self.received).name}; {self.advice}", file=sys.stderr, flush=True)
            raise SystemExit(128 + self.received) from None

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None and self.among is not None:
            return
        if self.received is not None:
            os.write(2, f"\n{name} again: exiting at once\n".encode())  # print is not safe in a handler
            os._exit(128 + number)
        self.received = number
        if not self.among:
            more = "; once more to exit at once" if self.among is None else ""
            os.write(2, f"\n{name}: saving at the next step, then stopping{more}\n".encode())
        if self._may_abandon:
            raise Stop

    @contextmanager
    def abandonable(self, at_once: bool = True) -> Iterator[None]:
        """A signal ends what runs in this block with `Stop`: from its beginning, or from a call of `abandon_from_here`;
        also one that came before."""
        try:
            if at_once:
                self.abandon_from_here()
            yield
        finally:
            self._may_abandon = False

    def abandon_from_here(self) -> None:
        """See `abandonable`."""
        self._may_abandon = True
        if self.received is not None:
            raise Stop
