"""What an adapter is evaluated on: the rows that its run held out, or data sets named."""

from collections.abc import Sequence
from pathlib import Path

from ..adapter import AdapterConfig
from ..base import load_encoder
from ..data.examples import BadRows
from ..data.readers import read
from ..data.rows import Rows
from . import checkpoint
from .datasets import Encoded, data_hash, encode_dataset, read_data
from .options import config_from


def evaluation_data(
    adapter: Path, model: str | None, datasets: Sequence[str] | None, limit: int | None, max_length: int = 512
) -> list[Encoded]:
    """What to evaluate an adapter on: the data sets named, or else the rows that its own run held out.

    Args:
        model: where the base is, if not where the adapter's files say.
        limit: the first N rows of each data set named, or the first N that the run held out.
        max_length: leave longer rows of the data sets named out.

    Raises:
        ValueError: no data set was named, and the adapter lies in no run directory, its run held out no rows, or the
            data are no longer those of the run (rows that it trained on could pass for held out).
    """
    described = AdapterConfig.read(adapter)
    encoder = load_encoder(model or described.base_model, None if model else described.revision)
    if datasets:
        bad = BadRows()
        sources = [(name, read(name, limit, bad)) for name in datasets]
        parts = [encode_dataset(name, examples, encoder, max_length, bad) for name, examples in sources]
        bad.check()
        return parts
    run = adapter.parent
    if not checkpoint.is_run(run):
        raise ValueError(f"adapter '{adapter}' lies in no run directory; say with --dataset what to evaluate on")
    record = checkpoint.read_record(run)
    options = config_from(record["options"], str(run / "config.json"))
    train, parts = read_data(options, encoder)
    rows, held = (Rows.join(part.rows for part in side) for side in (train, parts))
    if data_hash(rows, held) != record["data"].get("sha256"):
        raise ValueError(
            f"adapter '{adapter}': its data have changed since the run, so what was held out can't be told; "
            "say with --dataset what to evaluate on"
        )
    if not parts:
        raise ValueError(f"adapter '{adapter}': its run held out no rows; say with --dataset what to evaluate on")
    return [part.first(limit) for part in parts] if limit else parts
