"""The embedded demo: a tiny Qwen2 and an invented pharmacy, which show QLoRA at work without a download.

The world. 128 invented conditions and 32 invented drugs; each condition has one drug that treats it, each drug treats
four conditions. The names come from a seeded rule, so they occur in no other data.

What the base already knows. `scripts/pretrain_demo.py` made the Qwen2 of 0.2 M parameters in `demo_model/`. It states
the facts in sentences, answers open questions in chat form with the name of the drug, and solves multiple choice in
plain text, with digits as labels.

What it has never seen. Letters or option lists inside a chat. Asked a question of MedQA's layout in the chat template,
it chooses between the letters no better than chance. So QLoRA does not teach it facts, but to use them in a new form.
The evaluation file asks about 32 conditions that the training file leaves out: a right answer there combines a fact
from pretraining with the form learnt from other conditions.

Cost: 58 tokens per row, 200 steps of 32 rows; about a minute on two CPU cores, start and evaluations included.
"""

import json
import os
import random
import stat
import tempfile
from pathlib import Path

MODEL_DIR = Path(__file__).parent / "demo_model"
LETTERS = "ABCD"
INSTRUCTION = "Please answer with one of the option in the bracket"  # medical_meadow_medqa's own words
QUESTIONS = ("Which drug treats {}?", "What is {} treated with?", "A patient has {}. Which drug should be given?")
TRAIN_ROWS, EVAL_ROWS, HELD_OUT = 6400, 500, 32
# Values of Config that differ from its defaults, which are meant for a 0.5 B model: for this model, and for these data.
OPTIONS: dict[str, object] = {
    "batch_size": 32,
    "grad_accum": 1,
    "learning_rate": 4e-3,
    "warmup_ratio": 0.05,
    "gradient_checkpointing": "off",
}
DATA_OPTIONS: dict[str, object] = {"max_length": 64, "epochs": 1, "eval_limit": 250}


def invent(count: int, endings: tuple[str, ...], seed: int) -> list[str]:
    """Make `count` different pronounceable names: two syllables and an ending, e.g. Tavorosis."""
    rng = random.Random(seed)
    names: dict[str, None] = {}  # a dict, since a set would not keep the order of insertion
    while len(names) < count:
        syllables = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        names[(syllables + rng.choice(endings)).capitalize()] = None
    return list(names)


CONDITIONS = invent(128, ("rosis", "litis", "nemia", "ralgia"), seed=1)
DRUGS = invent(32, ("xol", "mycin", "pril", "zine"), seed=2)
TREATMENT = dict(zip(random.Random(3).sample(CONDITIONS, len(CONDITIONS)), DRUGS * 4, strict=True))


def row(condition: str, rng: random.Random, labels: str = LETTERS) -> dict[str, str]:
    """Make a multiple-choice question about `condition`, in the layout of medical_meadow_medqa."""
    drug = TREATMENT[condition]
    choices = rng.sample([d for d in DRUGS if d != drug], 3)
    answer = rng.randrange(4)
    choices.insert(answer, drug)
    question = rng.choice(QUESTIONS).format(condition)
    return {
        "instruction": INSTRUCTION,
        "input": f"Q:{question}? \n{dict(zip(labels, choices, strict=True))},",  # a dict's repr, as in MedQA
        "output": f"{labels[answer]}: {drug}",
    }


def rows(conditions: list[str], count: int, seed: int) -> list[dict[str, str]]:
    """Make `count` different questions, about each condition in turn."""
    rng = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    for n in range(count * 2):
        new = row(conditions[n % len(conditions)], rng)
        found.setdefault(new["input"], new)
    return list(found.values())[:count]


def cache_folder() -> Path:
    """The folder that keeps the demo's data between commands: ~/.cache/qlora_min/demo, or under $XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora_min" / "demo"


def temporary_folder() -> Path:
    """A folder in its place if that can't be written, in the system's folder for temporary files: always the same one,
    of this user alone.

    Raises:
        ValueError: the folder is another user's.
    """
    user = os.getuid() if hasattr(os, "getuid") else ""  # elsewhere that folder is a user's own
    folder = Path(tempfile.gettempdir()) / f"qlora_min-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or (user != "" and (found.st_uid != user or found.st_mode & 0o022)):
        raise ValueError(f"--demo: '{folder}' is not this user's alone; set XDG_CACHE_HOME to a folder for its data")
    return folder / "demo"


def write_data(folder: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl` into `folder`, the same bytes each time, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out, trained = CONDITIONS[:HELD_OUT], CONDITIONS[HELD_OUT:]
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, some in zip(paths, (rows(trained, TRAIN_ROWS, 4), rows(held_out, EVAL_ROWS, 5)), strict=True):
        text = "".join(json.dumps(r) + "\n" for r in some)
        if path.is_file() and path.read_text(encoding="utf-8") == text:  # the folder may be read-only by now
            continue
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.write_text(text, encoding="utf-8")
        new.replace(path)  # another demo may be reading it
    return paths


def config_options(own_data: bool = False) -> dict[str, object]:
    """Values for Config: the model and OPTIONS; unless the user has data of their own, also the demo's (which are
    written to the user's cache) and DATA_OPTIONS."""
    if own_data:
        return {"model": str(MODEL_DIR), **OPTIONS}
    try:
        train, held = write_data(cache_folder())
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        train, held = write_data(temporary_folder())
    return {"model": str(MODEL_DIR), "dataset": (str(train),), "eval_dataset": (str(held),), **OPTIONS, **DATA_OPTIONS}
