"""The package from Python: from rows in memory to a merged checkpoint, and every public name after all modules."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT

import qlora_min
import qlora_min.merging
from qlora_min.data import readers
from qlora_min.demo import world
from qlora_min.run import checkpoint

MODEL = str(world.MODEL_DIR)
OPTIONS = {"max_length": 64, "max_steps": 3, "batch_size": 4, "grad_accum": 1, "learning_rate": 4e-3, "eval_every": 2,
           "log_every": 1, "seed": 1}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return world.rows(world.CONDITIONS, 40, seed=1)


@pytest.fixture(scope="module")
def run(rows, tmp_path_factory):
    seen = []
    folder = tmp_path_factory.mktemp("api") / "run"
    made = qlora_min.train(model=MODEL, dataset=rows, output_dir=folder, on_event=seen.append, **OPTIONS)
    assert made.history == json.loads(json.dumps(seen))
    return made


def test_from_rows_in_memory_to_a_merged_checkpoint(run, rows, tmp_path):
    assert [e["step"] for e in run.evaluations] == [0, 2, 3] and run.history[-1]["event"] == "end"
    assert run.adapter == run.folder / "adapter" and checkpoint.is_finished(run.folder)
    question = rows[0]["instruction"] + "\n\n" + rows[0]["input"]
    model = qlora_min.load(run.adapter)
    answer = model.generate(question, max_new_tokens=8)
    messages = [{"role": "user", "content": question}]
    assert answer == model.generate(messages, 8) == model.generate([question, messages], 8)[1]
    assert model.generate([], 8) == []
    found = qlora_min.evaluate(run.adapter)
    assert found.loss == pytest.approx(min(e["eval_loss"] for e in run.evaluations), rel=1e-6)
    merged = qlora_min.merge(run.adapter, tmp_path / "merged", dtype="fp32")
    assert merged.difference < 1e-5
    assert qlora_min.load(tmp_path / "merged").generate(question, max_new_tokens=8) == answer
    assert "read back" in (tmp_path / "merged" / "README.md").read_text()


def test_a_model_without_an_adapter_is_evaluated_too(run, rows, tmp_path):
    merged = tmp_path / "merged"
    qlora_min.merge(run.adapter, merged, dtype="fp32")
    alone, adapter = (qlora_min.evaluate(model, rows[:9], max_length=64) for model in (merged, run.adapter))
    assert alone.loss == pytest.approx(adapter.loss, rel=1e-4) and alone.rows == 9
    assert qlora_min.evaluate(MODEL, rows[:9]).loss > alone.loss
    with pytest.raises(ValueError, match="no run held out rows for it; name the data to evaluate on with --dataset"):
        qlora_min.evaluate(merged)


def test_answers_can_be_drawn():
    """Of all tokens at a high temperature, of the likeliest one alone with a small top_p."""
    model = qlora_min.load(MODEL)
    torch.manual_seed(0)
    assert len(set(model.generate(["Hello"] * 300, 1, temperature=100.0))) > 100
    assert model.generate("Hello", 8, temperature=1.0, top_p=1e-6) == model.generate("Hello", 8)
    with pytest.raises(ValueError, match=r"^--temperature: got -1\.0, expected 0"):
        model.generate("Hello", temperature=-1.0)


def test_a_data_set_is_the_same_however_it_is_given(run, rows, tmp_path):
    """Dicts, a datasets.Dataset, and a file: the same bits."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name, given in (("hf", datasets.Dataset.from_list(rows)), ("path", file), ("paths", [str(file)])):
        other = qlora_min.train(model=Path(MODEL), dataset=given, output_dir=tmp_path / name, **OPTIONS)
        assert [e["eval_loss"] for e in other.evaluations] == [e["eval_loss"] for e in run.evaluations]


def test_rows_in_memory_are_recorded_by_their_hash_and_given_again_to_resume(rows, tmp_path):
    whole = qlora_min.train(model=MODEL, dataset=rows, output_dir=tmp_path / "whole", **OPTIONS)
    folder = tmp_path / "run"

    def stop(event):
        if event.get("step") == 2 and event["event"] == "train":
            raise RuntimeError("a crash")

    with pytest.raises(RuntimeError, match="a crash"):
        qlora_min.train(model=MODEL, dataset=rows, output_dir=folder, on_event=stop, save_every=1, **OPTIONS)
    record = json.loads((folder / "config.json").read_text())
    (name,) = record["options"]["dataset"]
    assert name.startswith("rows-") and rows[0]["input"] not in json.dumps(record)
    readers.GIVEN.clear()  # as in another process
    with pytest.raises(ValueError, match=f"data set '{name}': rows that were given from Python; give the same"):
        qlora_min.train(resume=folder)
    with pytest.raises(ValueError, match=f"--resume {folder}: unknown option 'patiense', did you mean patience"):
        qlora_min.train(resume=folder, patiense=1)
    with pytest.raises(ValueError, match="--dataset was"):
        qlora_min.train(resume=folder, dataset=rows[1:])
    again = qlora_min.train(resume=folder, dataset=rows)
    assert [e["eval_loss"] for e in again.evaluations] == [e["eval_loss"] for e in whole.evaluations]


def test_bad_rows_in_memory_are_named_by_their_place(rows, tmp_path):
    with pytest.raises(ValueError, match=r"rows-\w+:row 2:output: missing, expected text") as error:
        qlora_min.train(model=MODEL, dataset=[rows[0], {"instruction": "secret"}], output_dir=tmp_path / "x", **OPTIONS)
    assert "secret" not in str(error.value) and not (tmp_path / "x").exists()


@pytest.mark.parametrize(("options", "words"), [
    ({"rnak": 3}, "train: unknown option 'rnak', did you mean rank"),
    ({"epochs": "1"}, "train: option 'epochs': got '1', expected float"),
    ({"dataset": datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])})},
     r"dataset: got a mapping of \['train'\]; pass a list of rows, or one split of it"),
])  # fmt: skip
def test_what_train_cannot_use_is_said(rows, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        qlora_min.train(**{"model": MODEL, "dataset": rows, "output_dir": tmp_path / "x", **options})
    assert not (tmp_path / "x").exists()


def test_what_merge_and_load_cannot_use_is_said_before_any_work(tmp_path):
    for wrong in ({"onto": "orignal"}, {"dtype": "fp8"}):
        with pytest.raises(ValueError, match="expected fp16, bf16 or fp32, and dequantized or original"):
            qlora_min.merging.merge_adapter(tmp_path / "no adapter", tmp_path / "merged", **wrong)
    with pytest.raises(ValueError, match="precision: got 'fp8', expected auto, fp32, fp16, bf16"):
        qlora_min.load(MODEL, precision="fp8")


def test_one_name_is_a_data_set():
    assert qlora_min.Config(dataset="rows.jsonl").dataset == ("rows.jsonl",)


def test_every_public_name_after_importing_every_module():
    """A module of the name of a function would hide it."""
    for path in (ROOT / "qlora_min").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if module not in ("qlora_min.ops.kernels", "qlora_min.ops.flash"):  # needs Triton
            importlib.import_module(module)
    assert set(dir(qlora_min)) >= set(qlora_min.__all__)
    for name in qlora_min.__all__:
        thing = getattr(qlora_min, name)
        assert callable(thing) and inspect.getdoc(thing), name
        assert thing.__module__.startswith("qlora_min"), name
        if isinstance(thing, type) and issubclass(thing, Exception):
            continue
        hints = inspect.signature(thing).parameters
        assert all(p.annotation is not p.empty for p in hints.values() if p.name != "self"), name
    assert (ROOT / "qlora_min" / "py.typed").exists()


def test_the_lower_floor():
    layer = qlora_min.LoRALinear(torch.nn.Linear(8, 4), qlora_min.LoraSpec(2, 4.0))
    assert layer(torch.ones(1, 8)).shape == (1, 4)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    assert qlora_min.inject_lora(model, qlora_min.LoraSpec(2, 4.0, targets=("0",))) == ["0"]


def python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_help_imports_no_torch():
    code = "import qlora_min, sys; from qlora_min.cli.main import make_parser, COMMANDS\n" \
           "[make_parser(n).format_help() for n in COMMANDS]; print('torch' in sys.modules)"  # fmt: skip
    done = python(code, ROOT)
    assert done.stdout == "False\n", done.stderr


def test_an_install_works_from_the_clones_parent_folder(tmp_path):
    """There the clone's folder looks like a package without a file, which must not hide the installed one."""
    (tmp_path / "qlora_min").symlink_to(ROOT)
    done = python("import qlora_min; print(qlora_min.__version__, qlora_min.Config)", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "now"), [
    ("train", "qlora_min.run.trainer.Trainer"), ("care", "qlora_min.cli.data.look_at"), ("report", "qlora-min compare"),
])  # fmt: skip
def test_what_has_moved_says_where_it_is(name, now):
    with pytest.raises(ModuleNotFoundError, match=f"^qlora_min.{name} has moved: it is now .*{now}"):
        importlib.import_module(f"qlora_min.{name}")
    done = subprocess.run([sys.executable, "-m", f"qlora_min.{name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and now in done.stderr and done.stderr.count("\n") == 1
