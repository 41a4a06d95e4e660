"""Model cards: what a stranger needs to use what was saved.

A card (the Jinja2 template card.md) names the base with its revision and bits, the data, the options and the
measurements, and shows how to load the model. Local models and data appear by name, without their folders.
"""

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..adapter import AdapterConfig
from ..data.readers import HUB_NAME, kind_of
from ..merging import Merged
from ..system.device import DTYPES
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


def adapter_card(config: AdapterConfig, record: Record, before: dict | None, best: dict | None, best_step: int) -> str:
    """The card of an adapter: the run that trained it, and the results on held-out rows without and with it."""
    end = {"before": before, "best": best, "best_step": best_step}
    return _card(config, record, end, torch_dtype=DTYPES[record["precision"]], merged=None)


def merged_card(adapter: Path) -> Callable[[Merged], str]:
    """A function that makes the card of a merged checkpoint from the measurements of its check."""
    config, record, end = AdapterConfig.read(adapter), {}, {}
    if is_run(adapter.parent):
        record = read_record(adapter.parent)
        end = next((e for e in reversed(read_metrics(adapter.parent)) if e["event"] == "end"), {})
    return lambda merged: _card(config, record, end, merged=merged)


def _card(config: AdapterConfig, record: Record, end: dict[str, Any], **values: Any) -> str:
    from jinja2 import Environment, StrictUndefined

    options = {k: v for k, v in record.get("options", {}).items() if k != "output_dir" and v is not None and v != []}
    data = dict.fromkeys([*options.get("dataset", []), *options.get("eval_dataset", [])])
    on_hub = list(dict.fromkeys(HUB_NAME.fullmatch(name)["name"] for name in filter(is_hub_id, data)))
    hub_id = config.base_model if is_hub_id(config.base_model) else None
    for key in {"model", "adapter", "chat_template", "dataset", "eval_dataset"} & options.keys():
        options[key] = [named(name) for name in options[key]] if "dataset" in key else named(options[key])

    jinja = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    # JSON is also valid YAML, and for these values TOML.
    jinja.filters.update(json=functools.partial(json.dumps, ensure_ascii=False), named=named)
    template = jinja.from_string(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    text = template.render(
        config=config, record=record, end=end, options=options, hub_id=hub_id, on_hub=on_hub, version=__version__,
        four_bit=config.quantization in ("nf4", "fp4"), measures=MEASURES, beside=beside, **values,
    )  # fmt: skip
    return redacted(text)


def is_hub_id(name: str) -> bool:
    """Whether a name is OWNER/NAME, or that of a data set on the hub, and no file. Local models are not taken for one,
    since an adapter has their absolute path."""
    return bool(HUB_NAME.fullmatch(name)) and kind_of(name) is None and not Path(name).exists()


def named(name: str) -> str:
    """A hub id as it is, a local file or folder without its parent folders; a final " (held out)" is kept."""
    path, held_out, _ = name.partition(" (held out)")
    return (path if is_hub_id(path) else re.split(r"[/\\]", path.rstrip("/\\"))[-1]) + held_out


def beside(result: dict[str, Any]) -> str:
    """What to compare an option accuracy with, from an `Evaluation.as_dict`: "chance 25.0%, always A 32.8%"."""
    majority = result.get("majority")  # earlier versions' checkpoints have none
    return f"chance {result['chance']:.1%}" + (", always {} {:.1%}".format(*majority) if majority else "")
