"""More than one GPU: the rows of every optimizer step are divided among N processes.

    g = g_0 + ... + g_{N-1}

g_i is the gradient of the summed loss of process i's rows, divided by the number of supervised tokens in all processes.

Each step sums one flat tensor over all processes (2.2M numbers for Qwen2-0.5B, 9 MB); nothing else of that size is
communicated. All processes hold the same adapter and optimizer state and take the same step: they stay bit-identical.
torchrun starts the processes; gradients are summed by NCCL between GPUs and by gloo between CPUs. A single process
communicates nothing.

Small objects are exchanged by one collective only, `gather`. It always uses the CPU and gloo, which notices immediately
that a process has ended. A process that fails takes part in the others' next `gather`, its error in place of a value
(`together`), so an error in one process ends all of them and none waits forever. This requires that every process calls
the same collectives in the same order, and that a `gather` precedes any other collective. A process that fails between
that `gather` and the end of the other collective exits alone (see `in_step`), as does one whose layers need collectives
(sharding.py), and one whose GPU fails, since sums may be queued on it.
"""

import atexit
import os
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim import TrainingError
from ..system.device import moment, seconds, synchronize

TIMEOUT = 600.0  # seconds to wait for another process
_processes: list[tuple[str, int]] = []  # (host, process id) of each
_in_step = False


class Lost(RuntimeError):
    """Another process has ended or does not respond."""


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's index, from 0. Process 0 prints and writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def join() -> None:
    """Connect to the other processes, if torchrun started any, and select this process's GPU.

    Raises:
        ValueError: this host has fewer GPUs than processes.
        Lost: the processes could not connect.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"--nproc-per-node: got {here}, expected at most {gpus}, the number of GPUs of this host")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    with _answered():
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT))
    atexit.register(dist.destroy_process_group)
    _processes[:] = gather((socket.gethostname(), os.getpid()))


# ---------------------------------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------------------------------


def gather(value: Any) -> list[Any]:
    """The values of all processes, ordered by process. A value is a small picklable object.

    Raises:
        SystemExit: a process has failed; process 0 has printed the error.
        Lost: a process has ended or does not respond.
    """
    if world_size() == 1:
        return [value]
    found = _exchange((None, value))
    for index, (error, _) in enumerate(found):
        if error:
            code, text = error
            if process_index() == 0:
                print(f"error: process {index}: {text}", file=sys.stderr, flush=True)
            raise SystemExit(code)
    return [value for _, value in found]


def from_main(action: Callable[[], Any]) -> Any:
    """Call `action` in process 0 alone, and return its result, which may be large, in every process."""
    box = [action() if process_index() == 0 else None]
    if world_size() > 1:
        gather(None)
        with _answered():
            dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather(whole: Tensor, mine: Tensor) -> Callable[[], None]:
    """Start to fill `whole` with the `mine` of all processes, concatenated in their order; what is returned waits."""
    with _answered():
        work = dist.all_gather_into_tensor(whole, mine, async_op=True)
    return _answered()(work.wait)


class Processes:
    """The processes of a training run, as passed to `loop.train`.

    Args:
        received: returns the number of the signal that this process has received, or None. Each `gather` shares it.
        sharded: whether each process holds one shard of the base, so that all must compute in lockstep.

    Attributes:
        stopping: the signal on which all processes stop after the current step, or None.
        waited, summed: seconds spent waiting for the slowest process, and summing gradients, up to the step before.
    """

    def __init__(self, received: Callable[[], int | None] = lambda: None, sharded: bool = False):
        self.received, self.sharded = received, sharded
        self.index, self.world_size = process_index(), world_size()
        self.stopping: int | None = None
        self.waited = self.summed = 0.0
        self._moments: list[Any] = []  # before and after each sum of the last step

    def gather(self, value: Any) -> list[Any]:
        """`gather`, which also tells all processes of a signal that any of them has received."""
        values, signals = zip(*gather((value, self.received())))
        self.stopping = next((s for s in signals if s), None)
        return list(values)

    def sum_step(self, loss: Tensor, grads: Tensor) -> Tensor:
        """Sum a step's gradients over all processes, in place, and return the sum of their losses. GPUs queue it.

        The sums are bit-identical in all processes. A gradient that is not finite in one process is not finite in the
        sum, so all processes skip the same steps.
        """
        if self.world_size == 1:
            return loss
        if self._moments:
            before, between, after = self._moments
            self.waited, self.summed = self.waited + seconds(before, between), self.summed + seconds(between, after)
        in_step(True)
        loss, self._moments = loss.double(), [moment()]
        for tensor in (loss, grads):  # first a single number, whose time is that of waiting for the slowest process
            with _answered():
                dist.all_reduce(tensor)
            self._moments.append(moment())
        in_step(self.sharded)
        return loss

    def check_equal_adapters(self, weights: Tensor) -> None:
        """Raise ValueError unless these weights are bit-identical in all processes."""
        if self.world_size > 1:
            self.check_equal({"adapter": zlib.crc32(weights.detach().cpu().numpy())})

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise ValueError unless each of these facts is equal in all processes."""
        for index, theirs in enumerate(everyone := gather(facts)):
            for key, value in theirs.items():
                if value != everyone[0][key]:
                    raise ValueError(
                        f"process {index} has another {key} than process 0: {value} and {everyone[0][key]}; expected "
                        "the same files, versions and kind of GPU in all processes"
                    )


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def in_step(on: bool) -> None:
    """Declare whether collectives other than `gather` may be in progress.

    While they may be, a process that fails can't report its error through `gather`: it prints the error and exits, and
    torchrun ends the others.
    """
    global _in_step
    _in_step = on


@contextmanager
def together(then: Callable[[], str] = str) -> Iterator[None]:
    """Within this context an error in one process ends the block in all of them; process 0 alone raises or prints it.

    Args:
        then: returns text to append to the message if a process is lost.

    Raises:
        TrainingError: a process is lost.
        SystemExit: another process failed. The exit code is 2 for an error that a user can cause, else 1.
    """
    try:
        yield
    except Lost as e:
        raise TrainingError(f"{e}{then()}") from None
    except Exception as e:
        if world_size() > 1:
            _tell(e)
        raise


def _tell(error: Exception) -> None:
    """Take part in the others' next `gather` with an error in place of a value."""
    code, text = 2 if isinstance(error, ValueError | OSError) else 1, str(error) or type(error).__name__
    explained = code == 2 or isinstance(error, MemoryError | TrainingError)  # otherwise the traceback matters
    if _in_step or _gpu_failed():
        atexit.unregister(dist.destroy_process_group)  # it would wait for the others
        if process_index() == 0:
            return
        if not explained:
            traceback.print_exc()
        print(f"error: process {process_index()}: {text}", file=sys.stderr, flush=True)
        os._exit(code)
    with suppress(Lost):
        _exchange(((code, text), None))
        if process_index() and explained:
            raise SystemExit(code) from None  # process 0 prints it


def _gpu_failed() -> bool:
    """Whether what this process's GPU has queued, sums with other processes' GPUs among it, ends with an error."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def _exchange(mine: tuple) -> list[tuple]:
    """(error or None, value) of each process."""
    found = [None] * world_size()
    with _answered():
        dist.all_gather_object(found, mine)
    return found


@contextmanager
def _answered() -> Iterator[None]:
    """Convert any error of a collective to `Lost`: another process has ended or does not respond."""
    try:
        yield
    except Exception as e:  # DistBackendError, or any error from unpickling an incomplete message
        atexit.unregister(dist.destroy_process_group)  # it would wait for the lost process
        time.sleep(0.3)  # until torchrun has noticed that it ended
        who = f"another process has ended, or did not answer for {TIMEOUT:.0f} s"
        if ended := [str(i) for i, (host, process) in enumerate(_processes) if _is_gone(host, process)]:
            who = f"process {' and '.join(ended)} has ended"
        reason = str(e).strip().split("\n")[0].split(". This is typically")[0]
        raise Lost(f"process {process_index()}: {who} ({reason})") from None


def _is_gone(host: str, process: int) -> bool:
    """Whether a process is known to have ended; False for processes of other hosts, and where there is no /proc."""
    if host != socket.gethostname() or not Path("/proc/self").exists():
        return False
    with suppress(OSError):
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[0] == "Z"  # a zombie: its parent has not waited for it yet
    return True
