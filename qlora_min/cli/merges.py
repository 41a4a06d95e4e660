"""What each way to merge costs: the evaluations behind `qlora-min merge --compare`."""

from collections.abc import Sequence
from pathlib import Path

from ..adapter import AdapterConfig, load_adapter
from ..data.rows import Row
from ..evaluation import Evaluation, evaluate_rows
from ..fused.select import make_engine
from ..lora import lora_disabled
from ..merging import decoder_linears, fold
from ..system.bits import quantize_linear
from ..system.device import pick_device


def compare_merges(
    adapter: Path, rows: Sequence[Row], model: str | None, precision: str, batch_size: int
) -> dict[str, Evaluation]:
    """Evaluate an adapter in each way it can be used: on its base, and merged in the three ways there are."""
    device = pick_device()
    quantization = AdapterConfig.read(adapter).quantization
    if quantization == "none":
        raise ValueError(f"adapter '{adapter}' was trained on an unquantised base: there is one way to merge it")
    bits = quantization.upper()
    loaded = load_adapter(adapter, model, precision, device)
    longest, results = max(len(row) for row in rows), {}

    def measure(name: str) -> None:
        engine, _, _ = make_engine(loaded, "modules", longest)
        results[name] = evaluate_rows(engine, rows, batch_size, name)

    with lora_disabled(loaded.model):
        measure(f"no adapter, {bits} base")
    measure(f"adapter on the {bits} base")
    fold(loaded.model)
    measure(f"merged onto the dequantised {bits} weights")
    for name, linear in decoder_linears(loaded.model):
        loaded.model.set_submodule(name, quantize_linear(linear, quantization, loaded.dtype))
    measure(f"merged, then quantised to {bits} again")
    loaded = load_adapter(adapter, model, precision, device, quantization="none")
    fold(loaded.model)
    measure("merged onto the original weights")
    return results
