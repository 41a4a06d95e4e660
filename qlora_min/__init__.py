"""qlora_min: QLoRA fine-tuning from scratch in raw PyTorch.

`train`, `load`, `evaluate` and `merge` are what most need; `Config` has every option; `LoRALinear`, `LoraSpec` and
`inject_lora` are for other loops. Names are imported when they are first used, so that `--help` comes at once.
"""

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

from .system import moved  # noqa: F401 (names of earlier versions)

if TYPE_CHECKING:
    from .config import Config
    from .lora import LoRALinear, LoraSpec, inject_lora
    from .run.api import MergeError, Model, Run, TrainingError, evaluate, load, merge, train

__version__ = "0.1.0"
__all__ = ["Config", "LoRALinear", "LoraSpec", "MergeError", "Model", "Run", "TrainingError", "evaluate", "inject_lora",
           "load", "merge", "train"]  # fmt: skip

# bitsandbytes warns on import that a CPU kernel can't be downloaded, which we switch off anyway (system/bits.py).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# huggingface_hub logs each retry when the hub can't be reached; we say so once, in a line that names the way out.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # read when it is imported
# datasets imports tqdm's bars for notebooks, which warn where ipywidgets is missing; ours are text.
warnings.filterwarnings("ignore", message="IProgress not found")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qlora_min' has no attribute {name!r}")
    if name == "Config":
        from . import config as module
    elif name in ("LoRALinear", "LoraSpec", "inject_lora"):
        from . import lora as module
    else:
        from .run import api as module
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
