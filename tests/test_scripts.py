"""Each script as a process, on the demo: what a newcomer types, and what a newcomer gets wrong."""

import json
import os
import re
import resource
import runpy
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from safetensors.torch import load_file, save_file

from qlora_min.cli import bench
from qlora_min.demo import world


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """(run directory, its stdout, seconds of processor time): `train.py --demo`, once for all tests here."""
    folder = tmp_path_factory.mktemp("demo-run")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "--demo", "--output-dir", "runs/demo"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.sub(r"^step \d+/200, about .* tok/s\n", "", done.stderr, flags=re.MULTILINE)
    assert told == "", "a dependency's warning reached the user"
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return folder / "runs" / "demo", done.stdout, seconds


def test_demo_takes_less_than_a_minute(demo_run):
    """Of one core's time: the wall clock of a busy machine proves nothing."""
    assert demo_run[2] < 60


def one_line_error(done, *words: str) -> None:
    """Exit code 2 and one line on stderr that holds all words."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} is not in: {done.stderr}"


# ---- the whole way ----------------------------------------------------------------------------------------------


def test_demo_learns(demo_run):
    run, out, _ = demo_run
    end = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert end["event"] == "end"
    assert end["before"]["option_accuracy"] < 0.35
    assert end["best"]["option_accuracy"] >= 0.90
    assert end["best"]["loss"] < 0.5 * end["before"]["loss"]
    assert "option accuracy" in out and f"{ROOT}/scripts/eval.py --adapter runs/demo/adapter\n" in out
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for key, form in (
        ("loss", r"Held-out loss ([\d.]+) -> ([\d.]+)"),
        ("option_accuracy", r"accuracy ([\d.]+)% -> ([\d.]+)%"),
    ):
        said = [float(x) * (1 if key == "loss" else 0.01) for x in re.search(form, readme).groups()]
        assert [end["before"][key], end["best"][key]] == pytest.approx(said, rel=0.02, abs=5e-4), key


def test_demo_start_says_what_will_happen(demo_run):
    _, out, _ = demo_run
    trained = 4 * sum(16 * (64 + n) for n in (64, 32, 32, 64))  # 4 layers; q, k, v, o; rank 16; in 64; 2 of 4 kv heads
    assert f"trained     {trained:,} parameters" in out
    for word in ("fp32 on CPU", "200 (200 an epoch)", "forecast peak of the whole process", " GiB (program ",
                 "too long", "engine      fused", "gradient checkpointing off"):  # fmt: skip
        assert word in out, word


def test_demo_run_directory(demo_run):
    run, _, _ = demo_run
    record = json.loads((run / "config.json").read_text())
    assert record["options"]["rank"] == 16 and record["options"]["eval_every"] == 50
    assert len(record["base"]["fingerprint"]) == len(record["data"]["sha256"]) == 64
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [e for e in events if e["event"] == "train"]
    assert [e["step"] for e in train] == list(range(10, 201, 10))
    assert {"epoch", "loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gib"} <= train[0].keys()
    held = [e for e in events if e["event"] == "eval"]
    assert [e["step"] for e in held] == [0, 50, 100, 150, 200] and {"eval_loss", "perplexity"} <= held[0].keys()
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert all({"prompt", "reference", "before", "after"} <= s.keys() for s in samples)
    assert sum(s["after"] == s["reference"] for s in samples) >= len(samples) - 1
    assert not any(s["before"] == s["reference"] for s in samples)
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in (run / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "qlora_min.json", "tokenizer.json"
    }  # fmt: skip
    best = f"step-{next(e for e in events if e['event'] == 'end')['best_step']}"
    kept = {p.name for p in (run / "checkpoints").iterdir()}
    assert kept == {"step-150", "step-200", best}


def test_eval_merge_chat(demo_run, process, script, tmp_path):
    run, out, _ = demo_run
    done = process("eval.py", "--adapter", run / "adapter")
    result = json.loads(script("eval.py", "--adapter", run / "adapter", "--json").stdout)
    assert result["with_adapter"]["option_accuracy"] >= 0.90 > 0.35 > result["base"]["option_accuracy"]
    assert "option accuracy" in done.stdout and "25.0%" in done.stdout  # chance
    printed = re.search(r"loss +([\d.]+) -> ([\d.]+)", out)
    assert result["base"]["loss"] == pytest.approx(float(printed[1]), abs=1e-3)
    assert result["with_adapter"]["loss"] == pytest.approx(float(printed[2]), abs=1e-3)

    done = script("merge.py", "--adapter", run / "adapter", "--output-dir", "merged", "--dtype", "fp32")
    assert "read back" in done.stdout and (tmp_path / "merged" / "model.safetensors").is_file()
    one_line_error(
        script("merge.py", "--adapter", run / "adapter", "--output-dir", "merged", expect=2), "merged", "empty"
    )

    held = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    question = held["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    by_adapter = script("chat.py", "--adapter", run / "adapter", "--prompt", question, "--compare").stdout
    without, with_adapter = by_adapter.split("--- with the adapter\n")
    assert with_adapter.strip() == held["after"] and held["after"] not in without
    assert script("chat.py", "--model", "merged", "--prompt", question).stdout.strip() == held["after"]
    one_line = question.replace("\n", " ")
    said = script("chat.py", "--adapter", run / "adapter", "--prompt", one_line).stdout
    talk = script("chat.py", "--adapter", run / "adapter", input=f"{one_line}\n\n").stdout
    assert said.strip() and talk.strip() == said.strip()


def test_a_run_of_an_earlier_version_is_merged_chatted_with_and_reported_on(demo_run, script, tmp_path):
    """Its config.json names an option that is gone, and no engine."""
    run = tmp_path / "runs" / "old"
    shutil.copytree(demo_run[0], run)
    record = json.loads((run / "config.json").read_text())
    del record["engine"], record["options"]["engine"]
    record["options"]["packing"] = "off"
    (run / "config.json").write_text(json.dumps(record))
    adapter = ["--adapter", run / "adapter"]
    said = [script("chat.py", "--adapter", folder / "adapter", "--prompt", "Which?", "--max-new-tokens", 2).stdout
            for folder in (run, demo_run[0])]  # fmt: skip
    assert said[0] == said[1] != ""
    assert "read back" in script("merge.py", *adapter, "--output-dir", "merged", "--dtype", "fp32").stdout
    assert "wrote r.html" in script("eval.py", *adapter, "--limit", 4, "--html", "r.html").stdout


def test_compare_merges(demo_run, script):
    run, _, _ = demo_run
    out = script("merge.py", "--adapter", run / "adapter", "--compare", "--limit", 60).stdout
    loss = {name.strip(): float(x) for name, x in re.findall(r"^(.*?) {2,}loss ([\d.]+)", out, re.MULTILINE)}
    assert len(loss) == 5
    assert loss["merged onto the dequantised NF4 weights"] == pytest.approx(loss["adapter on the NF4 base"], abs=2e-4)
    assert loss["adapter on the NF4 base"] < 0.2 * loss["no adapter, NF4 base"]


def test_a_finished_run_is_never_overwritten(demo_run, script):
    run, _, _ = demo_run
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    one_line_error(script("train.py", "--demo", "--output-dir", run, expect=2), str(run), "never overwritten")
    one_line_error(script("train.py", "--resume", run, expect=2), "finished")
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


@pytest.mark.slow
def test_resume_after_a_kill(script, tmp_path, demo_data):
    """A run killed between checkpoints goes on from the last one, and its metrics have no gap and no double."""
    train, held = demo_data
    files = ["--model", world.MODEL_DIR, "--dataset", train, "--eval-dataset", held, "--limit", 320, "--eval-limit", 40]
    options = [*files, "--epochs", 1, "--grad-accum", 1, "--batch-size", 8, "--eval-every", 5, "--log-every", 1]
    whole = tmp_path / "whole"
    script("train.py", *options, "--output-dir", whole)
    command = [sys.executable, ROOT / "scripts" / "train.py", *options, "--output-dir", "runs/cut"]
    process = subprocess.Popen([str(c) for c in command], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "runs/cut/checkpoints/step-10").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    one_line_error(script("train.py", "--resume", "runs/cut", "--rank", 8, expect=2), "--rank", "16", "8")
    script("train.py", "--resume")  # finds it as the newest unfinished
    adapters = [load_file(r / "adapter" / "adapter_model.safetensors") for r in (whole, tmp_path / "runs/cut")]
    assert all(a.equal(adapters[1][n]) for n, a in adapters[0].items())

    def events(run):
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        return [
            {k: v for k, v in e.items() if k not in ("tokens_per_second", "peak_memory_gib", "seconds")} for e in lines
        ]

    assert events(whole) == events(tmp_path / "runs/cut")


def test_preview(script, demo_data):
    train, _ = demo_data
    out = script(
        "train.py", "--model", world.MODEL_DIR, "--dataset", train, "--eval-fraction", 0, "--preview", 2
    ).stdout
    rows = [json.loads(line) for line in train.read_text().splitlines()[:2]]
    for row in rows:
        assert f"<|im_start|>assistant\n⟦{row['output']}<|im_end|>⟧" in out
        assert f"{row['instruction']}\n\n{row['input']}<|im_end|>" in out


def test_config_file_and_command_line(script, tmp_path, demo_data):
    train, _ = demo_data
    (tmp_path / "run.toml").write_text(
        f'model = "{world.MODEL_DIR}"\ndataset = ["{train}"]\nmax-steps = 2\nlimit = 40\nrank = 4\n'
    )
    script("train.py", "--config", "run.toml", "--rank", 8, "--output-dir", "out")
    options = json.loads((tmp_path / "out" / "config.json").read_text())["options"]
    assert (options["rank"], options["max_steps"], options["limit"]) == (8, 2, 40)
    (tmp_path / "bad.toml").write_text("learning-rat = 1\n")
    one_line_error(script("train.py", "--config", "bad.toml", expect=2), "bad.toml", "learning-rat", "learning_rate")


# ---- bad input ----------------------------------------------------------------------------------------------------

GOOD = {"instruction": "Say.", "input": "Which?", "output": "This."}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model", "no/such-model"], ["no/such-model", "hub can't be reached", "--demo", "local"]),
        (["--model", "./nowhere"], ["./nowhere", "no such folder"]),
        (["--dataset", "no/such-data"], ["no/such-data", "hub can't be reached", "--demo", ".jsonl"]),
        (["--dataset", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--dataset", "empty.jsonl"], ["empty.jsonl", "no rows"]),
        (["--dataset", "layout.jsonl"], ["layout.jsonl:1", "unknown layout", "instruction/input/output"]),
        (["--dataset", "broken.jsonl"], ["broken.jsonl:2", "not a JSON object"]),
        (["--max-length", "3"], ["too long", "--max-length"]),
        (["--targets", "q_prj"], ["q_prj", "q_proj"]),
        (["--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["--rnak", "8"], ["--rnak", "--rank"]),
        (["--rank", "0"], ["--rank", "0", "at least 1"]),
        (["--output-dir", "full"], ["full", "not an empty directory"]),
        (["--resume", "full"], ["full", "no run"]),
        (["--resume"], ["no unfinished run"]),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) and str(v[0]).startswith("--") else "",
)
def test_bad_input_to_train(script, write_rows, tmp_path, options, words):
    write_rows([GOOD] * 4, "good.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.jsonl").write_text(json.dumps(GOOD) + "\n{'single': 'quotes'}\n")
    write_rows([{"frage": "secret text", "antwort": "b"}], "layout.jsonl")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    defaults = ["--model", world.MODEL_DIR, "--dataset", "good.jsonl", "--output-dir", "out"]
    done = script("train.py", *defaults, *options, expect=None)
    one_line_error(done, *words)
    assert "secret text" not in done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "precious.txt").read_text() == "mine"


def test_a_merged_model_among_the_runs_is_no_run(script, tmp_path):
    shutil.copytree(world.MODEL_DIR, tmp_path / "runs" / "merged")
    one_line_error(script("train.py", "--resume", expect=2), "no unfinished run")
    one_line_error(script("train.py", "--resume", "runs/merged", expect=2), "holds no run")
    one_line_error(script("train.py", "--demo", "--output-dir", "runs/merged", expect=2), "not an empty directory")


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("train.py", ["--preview", "0"], ["--preview", "at least 1"]),
        ("eval.py", ["--batch-size", "-1"], ["--batch-size", "at least 1"]),
        ("merge.py", [], ["--output-dir"]),
        ("chat.py", ["--max-new-tokens", "0"], ["--max-new-tokens", "at least 1"]),
        ("train.py", ["--output-dir", "file/below"], ["file/below"]),
        ("train.py", ["--seed", str(2**32)], ["--seed", "2**32"]),
    ],
)
def test_other_bad_numbers_and_paths(demo_run, script, tmp_path, name, options, words):
    (tmp_path / "file").write_text("a file, not a folder")
    start = ["--demo", "--max-steps", 1] if name == "train.py" else ["--adapter", demo_run[0] / "adapter"]
    one_line_error(script(name, *start, *options, expect=2), *words)


def test_held_out_rows_are_those_of_the_run(script, write_rows, tmp_path):
    """When the data have changed since, rows that were trained on could pass for held out: refused."""
    rows = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(40)]
    write_rows(rows)
    options = ["--model", world.MODEL_DIR, "--dataset", "rows.jsonl", "--max-steps", 1, "--output-dir", "out"]
    script("train.py", *options)
    assert "held out" in script("eval.py", "--adapter", "out/adapter", "--limit", 2).stdout
    write_rows(rows[1:])
    one_line_error(script("eval.py", "--adapter", "out/adapter", expect=2), "data have changed", "--dataset")


@pytest.mark.slow
def test_the_hub_out_of_reach_is_one_line_even_after_retries(process, tmp_path):
    """Without HF_HUB_OFFLINE: nothing answers, the libraries try again and again, and the user sees one line."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE")
    options = ["--model", world.MODEL_DIR, "--dataset", "no/such-data"]
    done = process("train.py", *options, expect=None, env=environment)
    one_line_error(done, "no/such-data", "hub can't be reached", "--demo")
    done = process("train.py", "--model", "no/such-model", expect=None, env=environment)
    one_line_error(done, "no/such-model", "hub can't be reached", "--demo")


def test_adapter_of_another_base(demo_run, script, tmp_path):
    run, _, _ = demo_run
    other = tmp_path / "other"
    shutil.copytree(world.MODEL_DIR, other)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for name in ("eval.py", "chat.py"):
        more = ["--prompt", "x"] if name == "chat.py" else []
        done = script(name, "--adapter", run / "adapter", "--model", other, *more, expect=None)
        one_line_error(done, "another base", str(other))
    one_line_error(script("eval.py", "--adapter", tmp_path, expect=None), "no adapter_config.json")
    one_line_error(script("chat.py", expect=None), "--adapter DIR or --model NAME")


BENCH = ["--model", world.MODEL_DIR, "--device", "cpu", "--precision", "fp32", "--steps", 1, "--repeats", 1]


def test_bench_on_a_cpu(script):
    out = script("bench.py", *BENCH, "--max-length", 96).stdout.splitlines()
    assert "tokens/s" in out[0] and out[1].startswith("qlora_min, 4 x 4 ") and len(out) == 3
    lines = script("bench.py", *BENCH, "--max-length", 96, "--json").stdout.splitlines()
    figures = [json.loads(line) for line in lines]
    assert [f["gradient_checkpointing"] for f in figures] == ["off", "on"]
    # the warm-up is of one step here
    assert all(f["tokens_per_second"] > 0 and f["first_step_s"] == f["warm_up_s"] > 0 for f in figures)


def test_bench_of_a_shape_whose_weights_are_not_on_disk(script, monkeypatch):
    tiny = ("qwen2", (1024, 64, 192, 2, 4, 2), {"tie_word_embeddings": False})
    monkeypatch.setitem(bench.SHAPES, "7b", tiny)
    (first, *_) = script("bench.py", *BENCH[2:], "--shape", "7b", "--max-length", 96, "--json").stdout.splitlines()
    assert json.loads(first)["tokens_per_second"] > 0


def test_what_the_bench_no_longer_does_has_a_script(script):
    for option, name in (("--peers", "bench_peers.py"), ("--sweep", "bench_sweep.py")):
        one_line_error(script("bench.py", option, "x", expect=2), option, f"python scripts/{name}")
    assert "'axolotl' (choose from" in script("bench_peers.py", "axolotl", expect=2).stderr


@pytest.mark.slow
def test_peers_are_lines_beside_ours(script):
    """Two a trainer, each measured or with a note that says why not."""
    done = script("bench_peers.py", "trl", *BENCH, "--max-length", 96, "--json")
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["name"] for f in figures[:2]] == ["qlora_min, 4 x 4", "qlora_min, 4 x 4, gradient checkpointing on"]
    assert figures[0]["ours_faster_by"] == 1 and all(f["tokens_per_second"] > 0 for f in figures)
    assert len(figures) + done.stderr.count("note: trl, ") == 4


def test_the_sweep_is_drawn(tmp_path):
    sweep = runpy.run_path(str(ROOT / "scripts" / "bench_sweep.py"))
    figures = {"tokens_per_second": 1.0, "peak_gib": 2.0, "forecast_gib": 2.5}
    axes = [(axis, c) for axis, (values, _) in sweep["AXES"].items() for _ in values for c in ("off", "on")]
    for left_out in ("", "peak_gib"):  # as on a CPU
        some = {k: v for k, v in figures.items() if k != left_out}
        sweep["draw"]([{"axis": a, "gradient_checkpointing": c, **some} for a, c in axes], tmp_path / "costs.png")
        assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


# ---- consoles and homes as people have them -----------------------------------------------------------------------

EVERY_COMMAND = """
import sys
import qlora_min
from qlora_min.cli.main import main

model, data, held = sys.argv[1:]
rows = [{"prompt": f"→ {i}?", "completion": "中文 █"} for i in range(12)]
qlora_min.train(model=model, dataset=rows, max_steps=1, output_dir="runs/b", batch_size=2, grad_accum=1)
assert sys.stdout.errors == "strict"
for name, *options in (
    ("train", "--model", model, "--dataset", data, "--max-steps", "2", "--output-dir", "runs/a"),
    ("train", "--model", model, "--dataset", data, "--preview", "1"),
    ("train", "--model", model, "--dataset", data, "--preview", "1", "--quiet"),
    ("data", "--model", model, "--dataset", data, "--preview", "1"),
    ("eval", "--adapter", "runs/a/adapter", "--generate", "1", "--html", "r.html", "--dataset", data, held),
    ("chat", "--adapter", "runs/a/adapter", "--compare", "--max-new-tokens", "3", "--prompt", "été → 中?"),
    ("chat", "--model", model, "--max-new-tokens", "3", "--json"),
    ("compare", "runs/a", "runs/b"),
    ("merge", "--adapter", "runs/a/adapter", "--output-dir", "merged"),
    ("eval", "--model", "merged", "--dataset", data, "--json"),
):
    sys.argv[:] = ["qlora-min", name, *options]
    sys.stdout.reconfigure(errors="strict")
    print("=====", name, flush=True)
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, (name, options, end.code)
"""


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_no_output_fails_for_its_characters(process, write_rows, tmp_path, encoding):
    """Every command, on a console that lacks most of the rows' characters, in a locale that lacks them too."""
    text = "Qué → ⟦%d⟧ \u2028 中文 😀 \x81?"
    rows = [{"prompt": text % i, "completion": "réponse █ 中文 😀"} for i in range(20)]
    files = [write_rows(rows, "données.jsonl"), write_rows(rows[:3], "中文.jsonl")]
    (tmp_path / "all.py").write_text(EVERY_COMMAND, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    command = [sys.executable, *map(str, (tmp_path / "all.py", world.MODEL_DIR, *files))]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, input="été → 中?\n\n".encode(), capture_output=True, timeout=600
    )
    out, errors = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert done.returncode == 0 and errors == "", out + errors
    parts = [part.partition("\n") for part in out.split("===== ")]
    assert [name for name, _, _ in parts[1:]] == [
        "train", "train", "train", "data", "eval", "chat", "chat", "compare", "merge", "eval"
    ]  # fmt: skip
    said = [text for _, _, text in parts]
    answer = {"cp1252": "réponse # ?? ?", "ascii": "r?ponse # ?? ?"}[encoding]
    assert f"[[{answer}<|im_end|>]]" in said[2] and f"[[{answer}<|im_end|>]]" in said[4] and "##########" in said[4]
    assert said[3] == "" and " -> " in said[5] and "wrote r.html" in said[5]
    assert json.loads(said[7])["prompt"] == "été → 中?" or encoding == "cp1252"  # stdin is read as what it says it is
    assert json.loads(said[10])["model"]["rows"] == 20
    events = (tmp_path / "runs/a/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(events[-1])["event"] == "end"
    samples = (tmp_path / "runs/a/samples.jsonl").read_text(encoding="utf-8").split("\n")  # U+2028 ends no line
    assert json.loads(samples[0])["reference"] == rows[0]["completion"]
    assert rows[0]["completion"] in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_the_help_needs_no_characters():
    from qlora_min.cli import main

    assert all(main.make_parser(name).format_help().isascii() for name in main.COMMANDS)


def test_no_color(monkeypatch):
    from qlora_min.system import console

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert console.colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not console.colours()


def test_a_home_that_cannot_be_written(script, monkeypatch, tmp_path):
    """The demo's data go to this user's folder among the temporary files, and are found there again."""
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    script("train.py", *SHORT, "--output-dir", "out")
    folder = tmp_path / "tmp" / f"qlora_min-{os.getuid()}"
    (data,) = json.loads((tmp_path / "out/config.json").read_text())["options"]["dataset"]
    assert data == str(folder / "demo" / "train.jsonl") and folder.stat().st_mode & 0o777 == 0o700
    written = (folder / "demo" / "train.jsonl").stat().st_mtime_ns
    assert script("eval.py", "--adapter", "out/adapter", "--limit", 2).stdout
    assert world.config_options()["dataset"] == (data,)
    assert (folder / "demo" / "train.jsonl").stat().st_mtime_ns == written
    folder.chmod(0o777)
    one_line_error(
        script("train.py", *SHORT, expect=2), "--demo", str(folder), "not this user's alone", "XDG_CACHE_HOME"
    )
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="not this user's alone"):
        world.config_options()


def test_the_demo_with_own_data_is_its_model_alone(script, tmp_path, write_rows):
    """No question about its drugs is evaluated on, a fraction is held out, and rows may be long."""
    rows = [{"prompt": f"{i} " + "far away " * 30, "completion": str(i)} for i in range(20)]
    options = ["--demo", "--dataset", write_rows(rows, "mine.jsonl"), "--eval-fraction", 0.25]
    done = script("train.py", *options, "--output-dir", "out")
    assert re.search(r"mine.jsonl +15 +15 +0 +0 .*\n.*mine.jsonl \(held out\) +5 +5 +0 +0 ", done.stdout)
    written = json.loads((tmp_path / "out/config.json").read_text())["options"]
    assert (written["eval_dataset"], written["max_length"], written["eval_limit"]) == ([], 512, None)
    assert written["model"] == str(world.MODEL_DIR) and written["learning_rate"] == world.OPTIONS["learning_rate"]
    note = "note        15 rows, 3 epochs and 32 rows a step make 3 steps (1 of warm-up), too few to learn much"
    assert note + ": more rows, more --epochs, or a smaller --batch-size or --grad-accum" in done.stdout
    assert note in script("train.py", *options, "--dry-run", "--max-steps", 2).stdout
    for enough in (["--epochs", 50], ["--batch-size", 1, "--epochs", 4]):
        assert "too few" not in script("train.py", *options, "--dry-run", *enough).stdout
    held = script("data.py", *options).stdout
    assert "mine.jsonl (held out)" in held and "train.jsonl" not in held


# ---- ways to print ------------------------------------------------------------------------------------------------

SHORT = ["--demo", "--limit", 256, "--max-steps", 4, "--eval-limit", 8, "--log-every", 2]


def test_json_is_one_event_a_line(script, tmp_path):
    """The same events as in metrics.jsonl, and nothing else."""
    done = script("train.py", *SHORT, "--output-dir", "out", "--json")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert done.stderr == ""
    answer = json.loads(script("chat.py", "--model", world.MODEL_DIR, "--prompt", "Hello", "--json").stdout)
    assert answer["prompt"] == "Hello" and answer["adapter"] is False and answer["answer"]


def test_chat_draws_answers(script):
    def said(*options: object) -> str:
        options = ("--model", world.MODEL_DIR, "--prompt", "Hello", "--max-new-tokens", 8, *options)
        return script("chat.py", *options).stdout

    drawn = [said("--temperature", 2, "--seed", seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert said("--temperature", 2, "--top-p", 1e-6) == said() != drawn[0]
    for wrong, words in (
        (["--temperature", -1], ["--temperature", "-1.0", "from 0.01 to 100"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--temperature", 1, "--top-p", 0], ["--top-p", "0.0", "above 0 and at most 1"]),
        (["--temperature", 1, "--top-p", 1.5], ["--top-p", "1.5"]),
        (["--top-p", 0.5], ["--top-p", "--temperature 0"]),
    ):
        one_line_error(script("chat.py", "--model", "nowhere", "--prompt", "x", *wrong, expect=2), *words)


def test_quiet(script, tmp_path):
    done = script("train.py", *SHORT, "--output-dir", "out", "--quiet")
    assert done.stdout == done.stderr == "" and (tmp_path / "out" / "adapter").is_dir()


def test_dry_run_writes_nothing(script, tmp_path):
    out = script("train.py", *SHORT, "--output-dir", "out", "--dry-run").stdout
    assert not (tmp_path / "out").exists()
    for words in ("4 (8 an epoch)", "forecast peak", "time        about", "for 3 evaluations"):
        assert words in out, words
    plan = json.loads(script("train.py", *SHORT, "--dry-run", "--json").stdout)
    assert (plan["steps"], plan["rows"], plan["held_out"]) == (4, 256, 8)
    assert plan["tokens"] == pytest.approx(4 * 32 * 58.7, rel=0.01) and plan["seconds"] > 0 < plan["memory_gib"]


def test_every_option_is_in_one_group_of_the_help(script):
    from qlora_min.cli.options import groups
    from qlora_min.config import FIELDS

    assert sorted(name for names in groups().values() for name in names) == sorted(FIELDS)
    out = script("train.py", "--help").stdout
    assert all(out.count(f"\n{title}:\n") == 1 for title in groups())


def test_the_console_command(monkeypatch, capsys):
    from qlora_min.cli import main

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-min", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        return end.value.code, *capsys.readouterr()

    assert run()[0] == 0 and all(f"\n  {name} " in run("--help")[1] for name in main.COMMANDS)
    assert run("evl") == (2, "", "error: unknown command 'evl', did you mean eval? (see --help)\n")
    assert run("train", "--rnak", "3")[::2] == (
        2,
        "error: unknown option '--rnak', did you mean --rank? (see --help)\n",
    )
    assert "usage: qlora-min merge" in run("merge", "--help")[1]
    for shell in ("bash", "zsh"):
        assert "--gradient-checkpointing" in run("completion", shell)[1]
    assert "expected one of" in run("completion", "sh")[2]


def test_experiments_has_the_manners_of_a_command(script):
    out = script("experiments.py", "--help").stdout
    assert out.startswith("usage: experiments.py [options]\n\nChange one option at a time") and "--demo" in out
    one_line_error(script("experiments.py", "--rnak", 3, expect=2), "unknown option '--rnak', did you mean --rank?")
    one_line_error(script("experiments.py", expect=2), "--eval-dataset NAME ... is needed")
    one_line_error(script("experiments.py", "--demo", "--only", "base", expect=2), "--only base: needs --bases")


@pytest.mark.slow
def test_experiments(script, tmp_path):
    """Each change is a run of its own; what is done is not done again, and the common run serves all experiments."""
    train, held = world.write_data(tmp_path / "data")
    options = ["--model", world.MODEL_DIR, "--dataset", train, "--eval-dataset", held, "--eval-limit", 20,
               "--max-length", 64, "--max-steps", 2, "--output-dir", "runs/x"]  # fmt: skip
    options += ["--only", "rank", "quantization"]
    out = script("experiments.py", *options).stdout
    runs = {p.name for p in (tmp_path / "runs/x").iterdir()}
    assert runs == {f"rank={r}-alpha={2 * r}" for r in (4, 8, 32, 64)} | {
        "common",
        "quantization=fp4",
        "quantization=none",
    }
    assert re.search(r"^eval: chance 25\.0%, always [A-D] \d\d\.\d%$", out, re.MULTILINE)
    for rank in (4, 8, 16, 32, 64):
        assert f"| rank {rank} | {4 * rank * (4 * 64 + 2 * 32 + 2 * 64):,} |" in out
    lines = script("experiments.py", *options, "--json").stdout.splitlines()
    assert [json.loads(line)["experiment"] for line in lines][:2] == ["rank 4", "rank 8"] and len(lines) == 8
    demo = ["--demo", "--max-steps", 2, "--eval-limit", 20, "--only", "shuffled options"]
    assert "| shuffled options on |" in script("experiments.py", *demo).stdout
    assert {p.name for p in (tmp_path / "runs/experiments").iterdir()} == {"common", "shuffle_options=on"}
    again = script("experiments.py", *options).stdout
    assert again.count("| rank 16 |") == 1 and "step 0" not in again
    assert [line for line in again.splitlines() if line.startswith("|")] == [
        line for line in out.splitlines() if line.startswith("|")
    ]
