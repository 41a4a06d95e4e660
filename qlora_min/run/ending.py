"""The end of a run: restores the best adapter, writes samples and curves, and prints results and what to do next."""

from typing import Any

from ..adapter import put_weights
from ..lora import lora_disabled
from ..scale.processes import from_main, gather
from ..system.console import say, wrapped
from ..system.device import peak_gib
from ..system.files import write_jsonl
from ..system.started import command
from . import checkpoint, curves
from .answers import Answer, generated
from .cards import MEASURES

SAMPLES = 4  # held-out prompts answered without and with the adapter
SAMPLE_TOKENS = 48


def finish(trainer: Any) -> None:
    """Finish a run (a `Trainer`) after its loop has ended."""
    put_weights(trainer.base.model, trainer.writer.best)
    peak = max(gather(peak_gib(trainer.device)))
    # A sharded base generates only in all processes together, otherwise process 0 does.
    answers = sample_answers(trainer) if trainer.processes.sharded and trainer.held_out else None
    from_main(lambda: _write_end(trainer, peak, answers))


def _write_end(trainer: Any, peak: float, answers: list[list[Answer]] | None) -> None:
    p, skipped, note = trainer.progress, trainer.stepper.skipped, None
    with trainer.signals.abandonable() as abandon_from_here:
        if trainer.processes.world_size == 1:  # several processes could not agree to stop here
            abandon_from_here()
        try:
            write_samples(trainer, answers)
            note = curves.draw_curves({"": checkpoint.read_metrics(trainer.folder)}, trainer.folder / "curves.png")
        except OSError as e:  # the adapter is saved already, so a warning is enough
            note = f"warning: no samples or curves ({e})"
    speed = p.tokens / p.seconds if p.seconds else 0.0
    lines = [f"done: {p.step:,} steps in {p.seconds:.0f} s of training, {speed:,.0f} tokens/s"]
    lines[0] += f", {skipped} steps skipped" if skipped else ""
    if p.stopped_early and p.step < trainer.schedule.total_steps:
        lines[0] += f"; stopped early after {p.bad_evaluations} evaluations without improvement"
    if p.best:
        lines.append(f"best step {p.best_step}, on {p.best['rows']} held-out rows:")
        lines += [
            f"  {label:<16}{form.format(p.before[key]):>10} -> {form.format(p.best[key])}"
            for label, key, form in MEASURES
            if p.best[key] is not None
        ]
    if p.best and not p.best_step:
        kept = "step 0's, the one that it began with" if trainer.start else "step 0's, which changes nothing"
        lines.append(f"note: no evaluation was better than that of step 0, so the adapter kept is {kept}")
    lines += [
        f"adapter, metrics{', samples' if trainer.held_out else ''} and curves: {trainer.folder}",
        *([note] if note else []),
        "next: " + "\n      ".join(_next(trainer)),
    ]
    trainer.writer.metrics.write(
        "end", step=p.step, best_step=p.best_step, before=p.before, best=p.best, skipped=skipped, tokens=p.tokens,
        seconds=round(p.seconds, 2), tokens_per_second=round(speed, 1),
        peak_memory_gib=round(max(peak, peak_gib(trainer.device)), 3), **trainer.communication(),
    )  # fmt: skip
    trainer.writer.write(trainer.writer.metrics.flush, insist=True)
    say("\n".join(lines))


def _next(trainer: Any) -> list[str]:
    """What to do with the adapter."""
    adapter = trainer.folder / "adapter"
    if trainer.in_memory:
        return [f"qlora_min.evaluate({str(adapter)!r})", f'qlora_min.load({str(adapter)!r}).generate("...")']
    data = () if trainer.held_out else ("--dataset", "FILE")
    return [command("eval", "--adapter", adapter, *data), command("chat", "--adapter", adapter, "--compare")]


def sample_answers(trainer: Any) -> list[list[Answer]]:
    """[without, with the adapter]: the model's answers to the first held-out prompts."""
    base, rows = trainer.base, trainer.held_out[:SAMPLES]
    with lora_disabled(base.model):
        before = generated(base, rows, SAMPLES, SAMPLE_TOKENS)
    return [before, generated(base, rows, SAMPLES, SAMPLE_TOKENS)]


def write_samples(trainer: Any, answers: list[list[Answer]] | None) -> None:
    """Write samples.jsonl, if there are held-out rows, and print the first. answers: None to generate them here."""
    if not trainer.held_out:
        return
    samples = [
        {"where": a.location, "prompt": a.prompt, "reference": a.reference, "before": b.answer, "after": a.answer}
        for b, a in zip(*(answers or sample_answers(trainer)))
    ]
    write_jsonl(trainer.folder / "samples.jsonl", samples)
    lines = "sample: expected {reference!r}", "  without the adapter {before!r}", "  with it {after!r}"
    say("\n".join(wrapped(line.format(**samples[0]), 4) for line in lines))
