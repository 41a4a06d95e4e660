"""More than one GPU: N processes divide the rows of every optimizer step between them.

    g = g_0 + ... + g_{N-1}        the step's gradient: each process has that of its rows' losses / the tokens of all

One sum of one flat tensor a step (2.2M numbers for Qwen2-0.5B, 9 MB), and nothing else of that size: all processes hold
the same adapter and the same optimizer state, take the same step, and stay the same to the last bit. The communication
is torch's: torchrun starts the processes, NCCL sums between GPUs, gloo between CPUs. In a single process, nothing here
communicates.

Small objects go through one collective alone, `gather`, always on the CPU and so by gloo, which notices at once when
a process ends. A process that fails takes part in the next `gather` of the others, with its error in place of a value
(`together`): so an error in one process ends all of them, and none waits for ever. Two rules follow: collectives are
called alike in every process, and a `gather` precedes any other collective. Between these two, where the device may
still find an error, or where each layer is a collective (sharding.py), a process that fails ends by itself: `in_step`.
"""

import atexit
import os
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..optim import TrainingError
from ..system.device import synchronize

TIMEOUT = 600.0  # seconds after which a process that does not answer is given up
_processes: list[tuple[str, int]] = []  # (host, process id) of each
_in_step = False


class Lost(RuntimeError):
    """A process ended, or does not answer."""


def world_size() -> int:
    """The number of processes; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """This process's number, from 0. The first one prints and writes."""
    return dist.get_rank() if world_size() > 1 else 0


def join() -> None:
    """Find the other processes that torchrun has started, if it has, and take this one's GPU.

    Raises:
        ValueError: there are more processes on this host than GPUs.
        Lost: they did not find each other.
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
    """Every process's value, a small object, in order.

    Raises:
        SystemExit: a process has failed; the first has printed why.
        Lost: a process ended, or does not answer.
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
    """What `action` returns in the first process, the only one to call it, in every process."""
    value = action() if process_index() == 0 else None
    if world_size() == 1:
        return value
    gather(None)
    box = [value]
    with _answered():
        dist.broadcast_object_list(box, 0)
    return box[0]


def sum_(tensor: Tensor) -> None:
    """Replace a tensor by its sum over all processes, bit for bit the same in all."""
    if world_size() == 1:
        return
    with _answered():
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()  # what went wrong shows here, and not somewhere later


def all_gather(whole: Tensor, mine: Tensor) -> None:
    """Fill `whole` with every process's `mine`, one behind the other."""
    with _answered():
        dist.all_gather_into_tensor(whole, mine)


class Processes:
    """The processes of a run, as `loop.train` is handed them.

    Args:
        received: the number of the signal that came to this process, or None: the loop's exchanges tell all of it.
        sharded: whether each holds a part of the base, so that they must compute in step.

    Attributes:
        stopping: the signal for which all stop after this step, or None.
        waited, summed: seconds so far, waiting for the slowest process and summing gradients.
    """

    def __init__(self, received: Callable[[], int | None] = lambda: None, sharded: bool = False):
        self.received, self.sharded = received, sharded
        self.index, self.world_size = process_index(), world_size()
        self.stopping: int | None = None
        self.waited = self.summed = 0.0

    def gather(self, value: Any) -> list[Any]:
        """As `gather`; with it, all learn of a signal that came to one."""
        values, signals = zip(*gather((value, self.received())))
        self.stopping = next((s for s in signals if s), None)
        return list(values)

    def sum_step(self, loss: Tensor, grads: Tensor) -> Tensor:
        """Sum a step's gradients over all processes, in place; returns the sum of their losses.

        If a gradient is not finite in one of them, it is in the sum, so that all skip the same steps.
        """
        if self.world_size == 1:
            return loss
        in_step(True)
        synchronize()
        start, loss = time.perf_counter(), loss.double()
        sum_(loss)  # one number: this waits for the slowest
        then = time.perf_counter()
        sum_(grads)
        self.waited, self.summed = self.waited + then - start, self.summed + time.perf_counter() - then
        in_step(self.sharded)
        return loss

    def check_equal_adapters(self, weights: Tensor) -> None:
        """Raises ValueError where these are not the same bits in all processes."""
        if self.world_size > 1:
            self.check_equal({"adapter": zlib.crc32(weights.detach().cpu().numpy())})

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raises ValueError where one of these facts is not the same in all processes."""
        for index, theirs in enumerate(everyone := gather(facts)):
            for key, value in theirs.items():
                if value != everyone[0][key]:
                    raise ValueError(
                        f"process {index} has another {key} than process 0: {value} and {everyone[0][key]}; all need "
                        "the same files, versions and kind of GPU"
                    )


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def in_step(on: bool) -> None:
    """Say that other collectives than `gather` may be under way: a process that fails now can't meet the others in one.

    It ends by itself, with its message, and torchrun ends the others.
    """
    global _in_step
    _in_step = on


@contextmanager
def together(then: Callable[[], str] = str) -> Iterator[None]:
    """An error that ends this block in one process ends it in all; only the first shows it, by raising or printing.

    Args:
        then: what to add to the message where a process is lost.

    Raises:
        TrainingError: a process is lost.
        SystemExit: another process failed; the code is 2 for what a user can cause, else 1.
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
    """Take part in the others' next `gather`, with an error."""
    code = 2 if isinstance(error, ValueError | OSError) else 1
    if _in_step:
        atexit.unregister(dist.destroy_process_group)  # which would wait for the others
        if process_index() == 0:
            return
        if code == 1 and not isinstance(error, MemoryError | TrainingError):
            traceback.print_exc()
        print(f"error: process {process_index()}: {error or type(error).__name__}", file=sys.stderr, flush=True)
        os._exit(code)
    try:
        _exchange(((code, str(error) or type(error).__name__), None))
    except Lost:
        return
    if process_index() and isinstance(error, ValueError | OSError | MemoryError | TrainingError):
        raise SystemExit(code) from None  # the first shows it; of an error that nobody expects the traceback counts


def _exchange(mine: tuple) -> list[tuple]:
    """Every process's (error or None, value)."""
    found = [None] * world_size()
    with _answered():
        dist.all_gather_object(found, mine)
    return found


@contextmanager
def _answered() -> Iterator[None]:
    """A collective that fails means that a process is lost."""
    try:
        yield
    except Exception as e:  # torch's DistBackendError, and whatever half a message makes of itself
        atexit.unregister(dist.destroy_process_group)  # which would wait for the lost one
        time.sleep(0.3)  # until torchrun has taken note of its end
        who = f"another process has ended, or did not answer for {TIMEOUT:.0f} s"
        if ended := [str(i) for i, (host, process) in enumerate(_processes) if _is_gone(host, process)]:
            who = f"process {' and '.join(ended)} has ended"
        reason = str(e).strip().split("\n")[0].split(". This is typically")[0]
        raise Lost(f"process {process_index()}: {who} ({reason})") from None


def _is_gone(host: str, process: int) -> bool:
    """Whether a process of this host has ended; of other hosts' nothing is known."""
    if host != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(process, 0)
        stat = Path(f"/proc/{process}/stat").read_text(errors="replace")
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "Z"  # ended, and its parent does not know yet
