"""bitsandbytes, imported in a fraction of the time.

On import it hands four functions to `torch.compile`, which loads the whole compiler, 3 to 7 seconds, for operations
that its CPU and CUDA kernels replace. It uses the functions as they are where `torch.compile` fails: so we let it fail.
"""

from unittest.mock import patch

import torch

with patch.object(torch, "compile", side_effect=RuntimeError("not while bitsandbytes is imported")):
    import bitsandbytes as bnb

__all__ = ["bnb"]
