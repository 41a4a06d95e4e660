"""Run a script on a newer GPU as if that were a T4, as far as software decides: python tests/t4.py SCRIPT.py ARGS

What is emulated: compute capability 7.5 wherever torch is asked, no bf16 in hardware, 14.7 GiB, Triton's code generated
for sm_75 (its PTX is then assembled for the card that is there). What is not: the T4's speed, and cuBLAS's and
PyTorch's own kernels for sm_75. With NO_TRITON=1 there is no Triton.
"""

import os
import runpy
import sys

import torch

GIB = 2**30
capability, properties = torch.cuda.get_device_capability(), torch.cuda.get_device_properties


class Properties:
    """Those of the card, but for the T4's."""

    own = {"major": 7, "minor": 5, "total_memory": int(14.74 * GIB), "name": "Tesla T4 (emulated)"}  # noqa: RUF012

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return self.own[name] if name in self.own else getattr(self.real, name)


def only_for_sm_75():
    """Triton compiles for a T4, and assembles what it made for the card that is there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend

    assemble, compiled = CUDABackend.make_cubin, []

    def make_cubin(self, source, metadata, options, _):
        compiled.append(next((line for line in str(source).splitlines() if line.startswith(".target")), ""))
        return assemble(self, source, metadata, options, 10 * capability[0] + capability[1])

    triton.runtime.driver.active.get_current_target = lambda: GPUTarget("cuda", 75, 32)
    CUDABackend.make_cubin = make_cubin
    return compiled


torch.cuda.get_device_capability = lambda device=None: (7, 5)
torch.cuda.get_device_name = lambda device=None: Properties.own["name"]
torch.cuda.get_device_properties = lambda device=None: Properties(properties(device))
torch.cuda.is_bf16_supported = lambda including_emulation=True: bool(including_emulation)
torch.cuda.set_per_process_memory_fraction(14.74 / (properties(0).total_memory / GIB))
torch.cuda.mem_get_info = lambda device=None: (int(14.5 * GIB) - torch.cuda.memory_reserved(), int(14.74 * GIB))
if os.environ.get("NO_TRITON"):
    sys.modules["triton"] = None
else:
    only_for_sm_75()
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
