"""The device: its choice, its precision, its memory, and what to do when the memory runs out."""

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

GIB = 2**30
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALONE = "takes more memory than there is, and with --shard a process can't try a smaller one by itself"


def pick_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve --precision to bf16, fp16 or fp32. auto: on a GPU bf16, or fp16 without hardware support; on a CPU fp32.

    A plain `torch.cuda.is_bf16_supported()` is True even on a T4, which emulates bf16 slowly, so emulation is excluded.

    Raises:
        ValueError: `precision` is unknown, or is bf16 on a GPU whose hardware does not support it.
    """
    if precision not in ("auto", *DTYPES):
        raise ValueError(f"precision: got {precision!r}, expected auto, {', '.join(DTYPES)}")
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
    """The autocast context for a compute dtype; disabled for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device ran out of memory; libraries report this in several ways."""
    words = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    says_so = isinstance(error, RuntimeError) and any(w in str(error) for w in words)
    return says_so or isinstance(error, torch.OutOfMemoryError | MemoryError)


def unless_out_of_memory(compute: Callable[[], Any], base: Any, n_rows: int, several: str, one: str, fix: str) -> Any:
    """Return `compute()`, or None if it runs out of memory and the caller should retry with half of the rows.

    Args:
        base: the `Base` that computes. n_rows: the number of rows that `compute` processes.
        several, one: for messages, what is computed, for all rows and for a single row.
        fix: for messages, what would need less memory.

    Raises:
        MemoryError: memory is too small for a single row, or the base is sharded: one process alone can't retry.
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
    """Free the memory of a failed attempt. Call it after the `except` block: the error keeps the tensors alive."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a GPU


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished all queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def moment() -> Any:
    """The time at which the GPU, if there is one, reaches this place in its queue; for `seconds`."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start: Any, end: Any) -> float:
    """The time between two moments. Waits for the second."""
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def to_host(value: torch.Tensor) -> Callable[[], float]:
    """Start to copy a number to the CPU; what is returned waits for it, and not for what is queued after it."""
    if value.device.type != "cuda":
        return value.item
    copy, copied = torch.empty((), dtype=value.dtype, pin_memory=True), torch.cuda.Event()
    copy.copy_(value, non_blocking=True)
    copied.record()

    def wait() -> float:
        copied.synchronize()
        return copy.item()

    return wait


def total_bytes(device: torch.device) -> int:
    """The total memory of the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**63


def available(device: torch.device) -> float:
    """The bytes that a plan may use: leaves room for fragmentation, and on a CPU for other programs."""
    if device.type == "cuda":
        return 0.6 * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    return 0.5 * total_bytes(device)


def taken(device: torch.device) -> str:
    """The peak and the total memory, for messages."""
    return f"peak so far {peak_gib(device):.2f} GiB of {total_bytes(device) / GIB:.2f}"


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far, in bytes: allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError, StopIteration):  # Linux: of this process alone, and can be reset
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    import resource  # missing on Windows

    # In bytes on a Mac, in KiB elsewhere.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_gib(device: torch.device) -> float:
    """`peak_bytes` in GiB."""
    return peak_bytes(device) / GIB


def restart_peak(device: torch.device) -> int:
    """Reset the peak, and return the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # not on Linux: the peak of loading remains, and may hide a smaller one
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide new allocations
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_bytes(device)
