"""The device: which one, its precision, its memory: how much there is, what was taken, what to do where it runs out."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALONE = "takes more memory than there is, and with --shard a process can't try a smaller one by itself"


def pick_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """--precision as bf16, fp16 or fp32. auto: bf16 where the hardware has it, else fp16 on a GPU, fp32 on a CPU.

    A plain `torch.cuda.is_bf16_supported()` says True on a T4, which emulates bf16, slowly: we ask for the hardware's.

    Raises:
        ValueError: bf16 on a GPU without it.
    """
    hardware_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "fp32" if device.type == "cpu" else "bf16" if hardware_bf16 else "fp16"
    if precision == "bf16" and device.type == "cuda" and not hardware_bf16:
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, "
            "bf16 needs 8.0; use --precision fp16 or auto"
        )
    return precision


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The autocast context of a compute dtype; for fp32, one that does nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device; libraries have several words for it."""
    words = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    )


def unless_out_of_memory(compute: Callable[[], Any], base: Any, n_rows: int, several: str, one: str, fix: str) -> Any:
    """What `compute` returns; None where memory runs out, for the caller to go on with half of the rows.

    Args:
        base: the `Base` that computes. n_rows: how many rows `compute` takes.
        several, one: what it does; fix: what would need less. For messages.

    Raises:
        MemoryError: there is too little for one row, or --shard is on: a process can't try less by itself.
    """
    try:
        return compute()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        if base.sharded:
            raise MemoryError(f"{several} {ALONE}") from None
    release()
    if n_rows == 1:
        raise MemoryError(
            f"{one} takes more memory than there is ({taken(base.device)}); {fix}, or free the device of other programs"
        )
    return None


def release() -> None:
    """Give back what a failed attempt held. To be called behind its `except`: the error holds the attempt's tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize() -> None:
    """Wait until a GPU, if there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def total_bytes(device: torch.device) -> int:
    """Memory of the device in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63


def available(device: torch.device) -> float:
    """Bytes that a forecast may fill: with room for fragments, and on a CPU for everything else that runs there."""
    if device.type == "cuda":
        return 0.6 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return 0.5 * total_bytes(device)


def taken(device: torch.device) -> str:
    """Where memory stands, in words."""
    return f"peak so far {peak_gib(device):.2f} GiB of {total_bytes(device) / GIB:.2f}"


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # Linux: what is of this process alone, and can be restarted
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource  # which Windows has not

    scale = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def peak_gib(device: torch.device) -> float:
    """`peak_bytes` in GiB."""
    return peak_bytes(device) / GIB


def restart_peak(device: torch.device) -> int:
    """Forget the peak so far; returns the bytes that are taken now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # no Linux: the peak stays that of loading, and too little may be seen
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but still the process's, would hide what is added
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)
