"""Model cards: what a stranger needs to use what was saved.

Which base, at which revision and in how many bits, which data, which options, what was measured, how to load it. Of
local models and data a card gives the names, not the folders.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..adapter import AdapterConfig
from ..data.readers import FILE_KINDS
from ..merging import Merged
from ..system.text import redacted
from .checkpoint import is_run, read_metrics, read_record

CARD = "README.md"
MEASURES = (  # what is shown of an Evaluation: label, field, format
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("token accuracy", "token_accuracy", "{:.1%}"),
    ("option accuracy", "option_accuracy", "{:.1%}"),
)
Record = Mapping[str, Any]  # a run's config.json
LOAD_ADAPTER = """\
With peft, on the base as it was trained on ({stands}`FOLDER` is this folder or repository):

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer{more}

base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype=torch.{dtype}{quantized})
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

With qlora_min: `qlora-min chat --adapter FOLDER`, and `--model NAME` where the base lies elsewhere;
`qlora-min merge --adapter FOLDER --output-dir merged` makes an ordinary checkpoint of it.
"""
LOAD_MERGED = """\
With transformers (`FOLDER` is this folder or repository):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
"""


def adapter_card(config: AdapterConfig, record: Record, before: dict | None, best: dict | None, best_step: int) -> str:
    """The card of an adapter: what its run was, and the held-out results without and with it, if there are any."""
    four, lora = config.quantization != "none", config.lora
    weights = f"weights in 4-bit {config.quantization.upper()}, doubly quantised" if four else "unquantised weights"
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[record["precision"]]
    load = LOAD_ADAPTER.format(
        dtype=dtype, more=", BitsAndBytesConfig" if four else "",
        base=config.base_model if is_hub_id(config.base_model) else "BASE",
        stands="" if is_hub_id(config.base_model) else "`BASE` is the base, ",
        revision=f', revision="{config.revision}"' if config.revision else "",
        quantized=", quantization_config=BitsAndBytesConfig(\n    load_in_4bit=True, "
        f'bnb_4bit_quant_type="{config.quantization}", bnb_4bit_use_double_quant=True, '
        f"bnb_4bit_compute_dtype=torch.{dtype})" if four else "",
    )  # fmt: skip
    return _card(
        config, record, {"library_name": "peft", "tags": ["qlora", "lora"]},
        f"A LoRA adapter for {named(config.base_model)}",
        f"Rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}; trained with qlora_min {__version__} "
        f"on the base's {weights}, and to be used on those.",
        [_results(before, best, best_step), *_training(record), f"## Loading\n\n{load}"],
    )  # fmt: skip


def merged_card(adapter: Path, onto: str, dtype: str) -> Callable[[Merged], str]:
    """What writes the card of a merged checkpoint, from what the check of the merge measured."""
    config, record, sections = AdapterConfig.read(adapter), {}, []
    if is_run(adapter.parent):
        record = read_record(adapter.parent)
        end = next((e for e in reversed(read_metrics(adapter.parent)) if e["event"] == "end"), {})
        sections = [_results(end.get("before"), end.get("best"), end.get("best_step", 0)), *_training(record)]
    lora = config.lora

    def card(merged: Merged) -> str:
        how = (
            f"onto its {'dequantised' if onto == 'dequantized' else 'original'} weights, in {dtype}; read back, its "
            f"logits differ from the adapter's on that base by {merged.difference:.1e} of their norm"
        )
        return _card(
            config, record, {"library_name": "transformers", "tags": ["qlora"]},
            f"{named(config.base_model)}, fine-tuned",
            f"A LoRA adapter (rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}), merged into its "
            f"base by qlora_min {__version__}: {how}.",
            [*sections, f"## Loading\n\n{LOAD_MERGED}"],
        )  # fmt: skip

    return card


def _card(config: AdapterConfig, record: Record, front: dict, title: str, text: str, sections: list[str]) -> str:
    base = config.base_model if is_hub_id(config.base_model) else None
    options = record.get("options", {})
    data = [n for n in [*options.get("dataset", []), *options.get("eval_dataset", [])] if is_hub_id(n)]
    front = {"base_model": base, **front, "pipeline_tag": "text-generation", "datasets": list(dict.fromkeys(data))}
    lines = [f"{k}: {json.dumps(v, ensure_ascii=False)}" for k, v in front.items() if v]  # JSON is YAML
    about = f"Base: {f'[{base}](https://huggingface.co/{base})' if base else named(config.base_model)}"
    about += f", revision `{config.revision}`" if config.revision else ""
    about += f", fingerprint `{config.fingerprint}`" if config.fingerprint else ""
    parts = ["\n".join(["---", *lines, "---"]), f"# {title}", text, about + ".", *sections]
    return redacted("\n\n".join(parts).rstrip() + "\n")


def _results(before: dict | None, best: dict | None, step: int) -> str:
    if not before or not best:
        return "## Results\n\nNone: no rows were held out."
    rows = [f"## Results\n\nOn {best['rows']:,} held-out rows, after {step:,} optimizer steps:\n",
            "| | base | with the adapter |", "|---|---|---|"]  # fmt: skip
    for label, key, form in MEASURES:
        if best.get(key) is not None:
            known = f" ({beside(best)})" if key == "option_accuracy" else ""
            rows.append(f"| {label}{known} | {form.format(before[key])} | {form.format(best[key])} |")
    return "\n".join(rows)


def _training(record: Record) -> list[str]:
    """The sections on data and options: the latter as a file for `qlora-min train --config`."""
    data = [f"- {named(name)}: {what}" for name, what in record["files"].items()]
    options = {k: [named(n) for n in v] if k in ("dataset", "eval_dataset") else named(v) if k == "model" else v
               for k, v in record["options"].items() if k != "output_dir" and v is not None and v != []}  # fmt: skip
    toml = "\n".join(f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in options.items())
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return [
        "## Data\n\n" + "\n".join(data) + f"\n\nThe sha256 of all rows as tokens: `{record['data']['sha256']}`.",
        f"## Options\n\n```toml\n{toml}\n```\n\nComputed in {record['precision']}; {versions}.",
    ]


def is_hub_id(name: str) -> bool:
    """OWNER/NAME, and no file: such names are the hub's, since those of local models are absolute in an adapter."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and Path(name).suffix not in FILE_KINDS


def named(name: str) -> str:
    """A hub id as it is, a local file or folder without where it lies; what stands behind, " (held out)", stays."""
    where, held_out, _ = name.partition(" (held out)")
    return (where if is_hub_id(where) else re.split(r"[/\\]", where.rstrip("/\\"))[-1]) + held_out


def beside(result: dict[str, Any]) -> str:
    """What an option accuracy is to be read beside, of an `Evaluation.as_dict`: "chance 25.0%, always A 32.8%"."""
    majority = result.get("majority")  # those kept by older checkpoints have none
    return f"chance {result['chance']:.1%}" + (", always {} {:.1%}".format(*majority) if majority else "")
