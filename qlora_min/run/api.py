"""The package from Python: `qlora_min.train`, `load`, `evaluate` and `merge`.

run = qlora_min.train(model="Qwen/Qwen2-0.5B-Instruct", dataset=rows, epochs=1)
model = qlora_min.load(run.adapter)
model.generate("Which vitamin deficiency causes scurvy?")
qlora_min.evaluate(run.adapter).loss
qlora_min.merge(run.adapter, "merged")
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapter import load_adapter
from ..base import Base, load_base
from ..data.examples import Message
from ..data.measures import Evaluation
from ..data.readers import give
from ..evaluation import evaluate_rows
from ..fused.select import for_evaluation
from ..generate import generate
from ..merging import Merged, MergeError, merge_adapter
from ..optim import TrainingError
from ..system.text import shown
from .cards import merged_card
from .checkpoint import read_metrics
from .datasets import evaluation_data
from .options import sampling
from .resume import run_config
from .trainer import Trainer

__all__ = ["MergeError", "Model", "Run", "TrainingError", "evaluate", "load", "merge", "train"]

Rows = Iterable[Mapping[str, Any]]  # dicts in one of the layouts, or a `datasets.Dataset`
Dataset = str | Path | Sequence[str | Path] | Rows


@dataclass(frozen=True)
class Run:
    """A training run that has ended.

    folder: its directory. adapter: the folder with its best adapter. history: the events of metrics.jsonl, in order.
    """

    folder: Path
    adapter: Path
    history: list[dict[str, Any]]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations on held-out rows: step, eval_loss, perplexity, token_accuracy, option_accuracy."""
        return [event for event in self.history if event["event"] == "eval"]


def train(
    model: str | Path | None = None,
    dataset: Dataset | None = None,
    *,
    resume: str | Path | None = None,
    on_event: Callable[[dict[str, Any]], object] | None = None,
    **options: Any,
) -> Run:
    """Fine-tune a model with QLoRA.

    Args:
        model: a hub id or a folder; by default, that of `adapter`, or of the reference configuration.
        dataset: hub ids or files, or the rows themselves: dicts, or a `datasets.Dataset`.
        resume: the directory of a run to continue. If its data set was rows in memory, pass the same rows again.
        on_event: called with each event of metrics.jsonl ("train", "eval", "end") as soon as it is added.
        options: any field of `Config`. adapter: a folder whose adapter is trained further. eval_dataset: as dataset.

    Raises:
        ValueError: an option, the model or the data is not usable; nothing has been written.
        TrainingError: training can't continue; the message says what is saved.
        SystemExit: SIGINT (Ctrl-C) or SIGTERM came, and the run was saved: pass its folder as `resume`.
    """
    convert = {"dataset": _names, "eval_dataset": _names, "model": str, "adapter": str, "output_dir": str}
    given = {k: v for k, v in {**options, "model": model, "dataset": dataset}.items() if v is not None}
    given = {k: convert[k](v) if k in convert else v for k, v in given.items()}
    trainer = Trainer(*run_config(None if resume is None else str(resume), given), on_event=on_event)
    trainer.train()
    return Run(trainer.folder, trainer.folder / "adapter", read_metrics(trainer.folder))


def _names(dataset: Dataset) -> tuple[str, ...]:
    """The names of data sets. Rows in memory get a name."""
    if isinstance(dataset, str | Path):
        return (str(dataset),)
    if isinstance(dataset, Mapping):
        raise ValueError(f"dataset: got a mapping of {shown(list(dataset))}; pass a list of rows, or one split of it")
    items = list(dataset)
    return tuple(map(str, items)) if all(isinstance(item, str | Path) for item in items) else (give(items),)


@dataclass(frozen=True)
class Model:
    """A model that generates: a base with an adapter, or a merged checkpoint."""

    base: Base

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[str | Sequence[Message]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> str | list[str]:
        """Answer a prompt (a text, or messages with role and content), or each prompt of a list.

        Args:
            max_new_tokens: an answer is cut at this many tokens.
            temperature: 0 takes the likeliest tokens; above, tokens are drawn, by torch's generator.
            top_p: draw only from the likeliest tokens that together have this probability.

        Raises:
            ValueError: temperature or top_p is out of range, or top_p is below 1 at temperature 0.
        """
        how = sampling(temperature, top_p)
        one = isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping))
        asked = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in ([prompt] if one else prompt)]
        prompts = [self.base.encoder.prompt(messages) for messages in asked]
        answers = generate(self.base, prompts, max_new_tokens, **how) if prompts else []
        return answers[0] if one else answers


def load(
    model: str | Path, base: str | Path | None = None, precision: str = "auto", quantization: str | None = None
) -> Model:
    """Load a model that generates: from an adapter's folder, from a merged checkpoint, or by its hub id.

    Args:
        base: the path or hub id of an adapter's base, if it is not the one in the adapter's files.
        precision: auto, fp16, bf16 or fp32.
        quantization: of the base: nf4, fp4 or none; by default what the adapter was trained on, else as it is stored.

    Raises:
        ValueError: no such adapter or model, or another base than the adapter was trained on.
    """
    if _is_adapter(model):
        return Model(load_adapter(Path(model), base and str(base), precision, quantization=quantization))
    return Model(load_base(str(model), quantization, precision))


def _is_adapter(model: str | Path) -> bool:
    return (Path(model) / "adapter_config.json").is_file()


def evaluate(
    model: str | Path,
    dataset: Dataset | None = None,
    *,
    base: str | Path | None = None,
    limit: int | None = None,
    max_length: int = 512,
    batch_size: int = 8,
    columns: Mapping[str, str] | Sequence[str] = (),
    quantization: str | None = None,
) -> Evaluation:
    """Evaluate an adapter on the rows that its run held out, or an adapter or any other model on a data set.

    Args:
        model, base, quantization: as for `load`. dataset: as for `train`.
        limit: use at most the first N rows of each data set. max_length: leave out longer rows of `dataset`, in tokens.
        batch_size: rows at a time. columns: `Config.columns`, for `dataset`.

    Raises:
        ValueError: as `load`; or the data can't be read, or have changed since the run.
    """
    names = None if dataset is None else _names(dataset)
    adapter, name = (Path(model), base and str(base)) if _is_adapter(model) else (None, str(model))
    parts = evaluation_data(adapter, name, names, limit, max_length, columns)
    loaded = load(model, base, quantization=quantization).base
    engine = for_evaluation(loaded, max(int(p.rows.lengths.max()) for p in parts), batch_size * max_length)
    return Evaluation.join([evaluate_rows(engine, part.rows, batch_size) for part in parts])


def merge(
    adapter: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    onto: str | None = None,
    base: str | Path | None = None,
    quantization: str | None = None,
) -> Merged:
    """Merge an adapter into its base. The result, an ordinary checkpoint in `output`, is read back and compared first.

    Args:
        dtype: the checkpoint's: fp16, bf16 or fp32; by default the base's own.
        onto: dequantized, to add the adapter to the weights that it was trained on (the default), or original.
        base: as for `load`. quantization: what the adapter was trained on, if its files don't say it.

    Raises:
        ValueError: as `load`; or `output` is not empty, or a weight overflows `dtype`.
        MergeError: the checkpoint does not compute what the adapter does; it is not kept.
    """
    card = merged_card(Path(adapter))
    return merge_adapter(Path(adapter), Path(output), dtype, onto, base and str(base), card, quantization)
