"""qlora_min: QLoRA fine-tuning from scratch in raw PyTorch."""

import logging
import os
import warnings

__version__ = "0.1.0"

# On import it warns that a CPU kernel can't be downloaded, which we switch off in any case (see model.py).
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# It reports each retry where the hub can't be reached; we say so once, in a line that names the way out.
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # the library reads this when it is imported
# datasets imports tqdm's bars for notebooks, which warn where ipywidgets is missing; ours are text.
warnings.filterwarnings("ignore", message="IProgress not found")
