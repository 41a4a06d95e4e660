"""Models of known shapes with random weights, to measure speed and memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads")  # fmt: skip
SHAPES = {  # name -> (family, SIZES, differences from Qwen2-0.5B)
    "0.5b": ("qwen2", (151936, 896, 4864, 24, 14, 2), {}),
    "1.5b": ("qwen2", (151936, 1536, 8960, 28, 12, 2), {}),
    "3b": ("qwen2", (151936, 2048, 11008, 36, 16, 2), {}),
    "7b": ("qwen2", (152064, 3584, 18944, 28, 28, 4), {"tie_word_embeddings": False}),
    "32b": ("qwen2", (152064, 5120, 27648, 64, 40, 8), {"tie_word_embeddings": False}),
    "qwen3-0.6b": ("qwen3", (151936, 1024, 3072, 28, 16, 8), {"head_dim": 128}),
    "llama3.2-1b": ("llama", (128256, 2048, 8192, 16, 32, 8), {"head_dim": 64}),
    "gemma3-270m": ("gemma3_text", (262144, 640, 2048, 18, 4, 1),
                    {"head_dim": 256, "sliding_window": 512, "query_pre_attn_scalar": 256}),
}  # fmt: skip
LARGE = ("1.5b", "3b", "7b", "32b")  # whose weights are not written to disk


def random_base(folder: str, shape: str) -> str:
    """Save a model of a shape, and the demo's tokenizer, in a folder; returns the folder. Its weights are random, fp16;
    a LARGE model is saved without them, to be loaded within `random_weights`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ..demo import world
    from ..system.device import release

    torch.manual_seed(0)
    family, sizes, more = SHAPES[shape]
    same = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "max_position_embeddings": 32768}
    config = AutoConfig.for_model(family, **dict(zip(SIZES, sizes)) | same | more)
    config.save_pretrained(folder)
    if shape not in LARGE:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world.MODEL_DIR).save_pretrained(folder)
    release()
    return folder


@contextmanager
def random_weights() -> Iterator[None]:
    """Within this context models have weights that are not on disk: random, in fp16, each made when it is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..system import weights

    few = 0.02 * torch.randn(997, generator=torch.Generator().manual_seed(0))  # the same in all processes

    def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}

    def read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes(folder).items():
            values = (torch.ones(1) if "norm" in name else few).half()
            yield name, values.repeat(-(-math.prod(shape) // len(values)))[: math.prod(shape)].view(shape)

    with patch.multiple(weights, read_weights=read, weight_shapes=shapes):
        yield
