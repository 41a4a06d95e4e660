"""More than one GPU: N processes (ranks) share out the rows of every optimizer step.

    g = g_0 + ... + g_{N-1}        the step's gradient, each rank's being that of its rows' losses / the tokens of all

One sum of one flat tensor a step (2.2M numbers for Qwen2-0.5B, 9 MB), and nothing else of that size: all ranks hold the
same adapter and the same optimizer state, take the same step, and stay the same to the last bit. The engine is torch's:
torchrun starts the processes, NCCL sums between GPUs, gloo between CPUs. With one process all of this is nothing.

What is small goes through one collective alone, `gather`, always on the CPU and so by gloo, which notices at once when
a process ends. A rank that fails, wherever it is, takes part in whichever `gather` the others come to next, with its
error in place of a value (`together`): so an error on one rank ends all of them, and none waits for ever. Two rules
follow: collectives are called alike on every rank, and a `gather` precedes any other. Where the device may still find
an error behind it, or each layer is a collective (sharding.py), a rank that fails ends by itself: see `in_step`.
"""

import atexit
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .optim import TrainingError

TIMEOUT = 600.0  # seconds after which a rank that does not answer is given up
_processes: list[tuple[str, int]] = []  # (host, process id) of every rank
_in_step = False


class Lost(RuntimeError):
    """A rank's process ended, or does not answer."""


def size() -> int:
    """The number of ranks; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0. Rank 0 prints and writes."""
    return dist.get_rank() if size() > 1 else 0


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


def in_step(on: bool) -> None:
    """Say that other collectives than `gather` may be under way: a rank that fails now can't meet the others in one.

    It ends by itself, with its message, and torchrun ends the others.
    """
    global _in_step
    _in_step = on


def sum_(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, bit for bit the same on all; fp32, and in one go."""
    if size() == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    with _answered():
        dist.all_reduce(flat)
        if flat.is_cuda:
            torch.cuda.synchronize()  # what went wrong shows here, and not somewhere later
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view_as(t))


def all_gather(whole: torch.Tensor, mine: torch.Tensor) -> None:
    """Fill `whole` with every rank's `mine`, one behind the other."""
    with _answered():
        dist.all_gather_into_tensor(whole, mine)


def gather(value: Any) -> list[Any]:
    """Every rank's value, a small object, in order of rank.

    Raises:
        SystemExit: a rank has failed; rank 0 has printed why.
        Lost: a rank's process ended, or does not answer.
    """
    if size() == 1:
        return [value]
    found = _exchange((None, value))
    for r, (error, _) in enumerate(found):
        if error:
            code, text = error
            if rank() == 0:
                print(f"error: rank {r}: {text}", file=sys.stderr, flush=True)
            raise SystemExit(code)
    return [value for _, value in found]


def from_main(action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, where alone it is called, on every rank: what reads or writes the run."""
    value = action() if rank() == 0 else None
    if size() == 1:
        return value
    gather(None)
    box = [value]
    with _answered():
        dist.broadcast_object_list(box, 0)
    return box[0]


@contextmanager
def together(then: Callable[[], str] = str) -> Iterator[None]:
    """An error that ends this block on one rank ends it on all; rank 0 alone has it to show, by raising or printing.

    Args:
        then: what to add to the message where a rank is lost.

    Raises:
        TrainingError: a rank is lost.
        SystemExit: another rank failed; the code is 2 for what a user can cause, else 1.
    """
    try:
        yield
    except Lost as e:
        raise TrainingError(f"{e}{then()}") from None
    except Exception as e:
        if size() > 1:
            _tell(e)
        raise


def _tell(error: Exception) -> None:
    """Take part in the others' next `gather`, with an error."""
    code = 2 if isinstance(error, ValueError | OSError) else 1
    if _in_step:
        atexit.unregister(dist.destroy_process_group)  # which would wait for the others
        if rank() == 0:
            return
        if code == 1 and not isinstance(error, MemoryError | TrainingError):
            traceback.print_exc()
        print(f"error: rank {rank()}: {error or type(error).__name__}", file=sys.stderr, flush=True)
        os._exit(code)
    try:
        _exchange(((code, str(error) or type(error).__name__), None))
    except Lost:
        return
    if rank() and isinstance(error, ValueError | OSError | MemoryError | TrainingError):
        raise SystemExit(code) from None  # rank 0 shows it; of an error that nobody expects the traceback counts


def _exchange(mine: tuple) -> list[tuple]:
    """Every rank's (error or None, value)."""
    found = [None] * size()
    with _answered():
        dist.all_gather_object(found, mine)
    return found


@contextmanager
def _answered() -> Iterator[None]:
    """A collective that fails is a rank that is lost."""
    try:
        yield
    except Exception as e:  # torch's DistBackendError, and whatever half a message makes of itself
        atexit.unregister(dist.destroy_process_group)  # which would wait for the lost one
        time.sleep(0.3)  # until torchrun has taken note of its end
        who = f"another process has ended, or did not answer for {TIMEOUT:.0f} s"
        if ended := [str(r) for r, (host, process) in enumerate(_processes) if _is_gone(host, process)]:
            who = f"the process of rank {' and '.join(ended)} has ended"
        reason = str(e).strip().split("\n")[0].split(". This is typically")[0]
        raise Lost(f"rank {rank()}: {who} ({reason})") from None


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
