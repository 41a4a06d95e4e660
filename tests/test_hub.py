"""Models and data from the hub, model cards, and a push that is private, refused in one line, and never lossy.

No test reaches the hub: a server on this machine stands for it (hub.py).
"""

import contextlib
import fcntl
import json
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import peft
import pytest
import torch
from conftest import ROOT
from hub import Hub
from huggingface_hub import ModelCard
from test_hostile import TOKEN, assert_nothing_leaks, one_line_error
from test_training import make, on_the_cpu  # noqa: F401

from qlora_min.adapter import AdapterConfig, load_adapter
from qlora_min.base import load_base, load_encoder
from qlora_min.cli import push
from qlora_min.config import Config
from qlora_min.demo import world
from qlora_min.lora import LoraSpec
from qlora_min.merging import merge_adapter
from qlora_min.run import cards
from qlora_min.run.options import read_toml
from qlora_min.system import console
from qlora_min.system import hub as hub_module

SHORT = {"rows": 6, "held": 2, "batch_size": 1, "grad_accum": 1, "eval_every": 6, "epochs": 1.0}
IDS = torch.arange(5, 29).view(2, 12)
RECORD = {
    "options": Config(model="a/base", dataset=("o/data", "/home/me/private/rows.jsonl"),
                      chat_template="/home/me/private/own.jinja").as_dict(),
    "precision": "bf16",
    "files": {"o/data": "90 rows, sha256 1", "/home/me/private/rows.jsonl": "9 rows, sha256 2",
              "/home/me/private/rows.jsonl (held out)": "1 rows, sha256 3", "o/data (held out)": "9 rows, sha256 4"},
    "data": {"sha256": "0" * 64},
    "versions": {"qlora_min": "1", "torch": "2"},
}  # fmt: skip
ADAPTER = AdapterConfig(LoraSpec(8, 12.5, 0.0, ("q_proj", "v_proj")), "a/base", "abc123", "f" * 64)
RESULT = {"rows": 25, "loss": 1.5, "perplexity": 4.48, "token_accuracy": 0.5, "option_accuracy": 0.2, "chance": 0.25,
          "majority": ["A", 0.328]}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Model cards
# ---------------------------------------------------------------------------------------------------------------------


def test_an_adapters_card_says_all_that_a_stranger_needs():
    text = cards.adapter_card(ADAPTER, RECORD, RESULT, {**RESULT, "loss": 0.25, "option_accuracy": 0.9}, 40)
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": "a/base", "library_name": "peft", "tags": ["qlora", "lora"], "pipeline_tag": "text-generation",
        "datasets": ["o/data"],
    }  # fmt: skip
    for words in (
        "4-bit NF4, and to be used on those", "[a/base](https://huggingface.co/a/base)", "`abc123`", f"`{'f' * 64}`",
        "On 25 held-out rows, after 40 optimizer steps", "| loss | 1.5000 | 0.2500 |",
        "| option accuracy (chance 25.0%, always A 32.8%) | 20.0% | 90.0% |", "- o/data: 90 rows",
        "- rows.jsonl (held out): 1 rows",
        "rank = 16", "Computed in bf16", "Rank 8, alpha 12.5, on q_proj, v_proj",
        'from_pretrained("a/base", revision="abc123", dtype=torch.bfloat16, quant',
        "bnb_4bit_compute_dtype=torch.bfloat16",
    ):  # fmt: skip
        assert words in card.content, words
    assert "/home" not in text and "private" not in text


def test_cards_of_other_runs():
    local = AdapterConfig(LoraSpec(8, 16.0, 0.0, ("q_proj",)), "/home/me/models/smollm2", quantization="none")
    card = ModelCard(cards.adapter_card(local, RECORD, None, None, 0))
    assert "base_model" not in card.data.to_dict() and "/home" not in card.content
    assert "smollm2" in card.content and "unquantised" in card.content and "BitsAndBytes" not in card.content
    assert "None: no rows were held out" in card.content
    only_loss = {**RESULT, "option_accuracy": None, "chance": None}
    text = cards.adapter_card(ADAPTER, RECORD, only_loss, only_loss, 1)
    assert "| loss | 1.5000 |" in text and "option accuracy" not in text


def test_a_card_shows_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    record = {**RECORD, "versions": {"torch": f"2+{TOKEN}"}}
    assert TOKEN not in cards.adapter_card(ADAPTER, record, None, None, 0)


@pytest.mark.parametrize(
    "name, shown",
    [("o/data", "o/data"), ("/a/b/c.jsonl", "c.jsonl"), ("b/c.jsonl", "c.jsonl"), ("C:\\a\\m", "m"), ("/a/m/", "m"),
     ("m", "m"), ("/a/b.csv (held out)", "b.csv (held out)"), ("o/d (held out)", "o/d (held out)")],
)  # fmt: skip
def test_names_without_their_place(name, shown):
    assert cards.named(name) == shown


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished short run of the demo on the unquantised base: (directory, Progress)."""
    import contextlib
    import io

    from qlora_min.run.trainer import Trainer

    folder = tmp_path_factory.mktemp("made")
    train, held = world.write_data(folder)
    config = Config(
        model=str(world.MODEL_DIR), dataset=(str(train),), eval_dataset=(str(held),), limit=32, eval_limit=16,
        max_steps=4, learning_rate=1e-2, quantization="none", precision="fp32", batch_size=8, grad_accum=1,
        output_dir=str(folder / "run"),
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        return folder / "run", Trainer(config).train()


def test_the_card_of_a_run(made, tmp_path):
    """What it says is what was measured, and its options are a file that train.py reads."""
    run, progress = made
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert f"| loss | {progress.before['loss']:.4f} | {progress.best['loss']:.4f} |" in card.content
    assert f"after {progress.best_step} optimizer steps" in card.content
    assert str(run.parent) not in card.content
    (tmp_path / "run.toml").write_text(re.search(r"```toml\n(.*?)```", card.content, re.DOTALL)[1])
    record = json.loads((run / "config.json").read_text())
    written = Config(**read_toml(str(tmp_path / "run.toml"))).as_dict()
    places = {"model": "model", "dataset": ["train.jsonl"], "eval_dataset": ["held_out.jsonl"], "output_dir": None}
    for name, value in record["options"].items():
        assert written[name] == (value if name not in places else written[name]), name
    assert not any("/" in str(written[name]) for name in places)
    assert record["data"]["sha256"] in card.content and record["versions"]["torch"] in card.content


def test_the_cards_code_loads_the_adapter(made):
    """peft, as the card says it."""
    run, _ = made
    code = re.search(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), re.DOTALL)[1]
    names: dict = {}
    exec(code.replace("BASE", str(world.MODEL_DIR)).replace("FOLDER", str(run / "adapter")), names)
    assert isinstance(names["model"], peft.PeftModel) and names["tokenizer"].chat_template
    base = load_adapter(run / "adapter")
    with torch.no_grad():
        ours = base.model(IDS).logits
        assert (ours - names["model"].eval()(IDS).logits).abs().max() <= 1e-5


def test_a_merged_checkpoints_card(made, tmp_path):
    run, progress = made
    card = cards.merged_card(run / "adapter")
    result = merge_adapter(run / "adapter", tmp_path / "merged", "fp16", card=card)
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    for words in (
        f"by {result.difference:.1e} of their norm",
        "in fp16",
        f"| {progress.best['loss']:.4f} |",
        "rank = 16",
    ):
        assert words in card.content, words
    assert str(run.parent) not in card.content and str(tmp_path) not in card.content
    names: dict = {}
    code = re.search(r"```python\n(.*?)```", card.content, re.DOTALL)[1]
    exec(code.replace("FOLDER", str(tmp_path / "merged")), names)
    assert names["model"].dtype == torch.float16


def test_an_adapter_that_lies_in_no_run_is_merged_with_a_shorter_card(made, tmp_path):
    import shutil

    shutil.copytree(made[0] / "adapter", tmp_path / "elsewhere" / "adapter")
    card = cards.merged_card(tmp_path / "elsewhere" / "adapter")
    merge_adapter(tmp_path / "elsewhere" / "adapter", tmp_path / "merged", "fp32", card=card)
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert "merged into its base" in card.content and "## Results" not in card.content


# ---------------------------------------------------------------------------------------------------------------------
# Downloading, in a process of its own: HF_ENDPOINT names the server, HF_HOME an empty folder
# ---------------------------------------------------------------------------------------------------------------------

MODEL, DATA = "models/Qwen/Qwen2-0.5B-Instruct", "datasets/medalpaca/medical_meadow_medqa"
SHORT_RUN = ["--max-steps", 1, "--eval-limit", 1]
SLOW = pytest.mark.slow


def qwen2() -> dict[str, bytes]:
    """The demo's model in the files that Qwen2-0.5B-Instruct has on the hub."""
    files = {p.name: p.read_bytes() for p in world.MODEL_DIR.iterdir()}
    tokens = json.loads(files["tokenizer.json"])["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokens["merges"]]
    files["vocab.json"] = json.dumps(tokens["vocab"]).encode()
    files["merges.txt"] = "\n".join(["#version: 0.2", *merges]).encode()
    card = b"---\nlicense: apache-2.0\nlanguage:\n- en\npipeline_tag: text-generation\n---\n# Qwen2-0.5B-Instruct\n"
    return files | {"README.md": card, ".gitattributes": b"*.safetensors filter=lfs diff=lfs\n", "LICENSE": b"Apache\n"}


def rows(count: int) -> bytes:
    """medical_meadow_medqa.json: a list of objects with input, instruction and output."""
    options = ["fever", "rest", "water", "salt", "none"]
    listed = ", ".join(f"'{letter}': '{option}'" for letter, option in zip("ABCDE", options))
    made = [{"input": f"Q:A {n}-year-old man is ill. What helps?? \n{{{listed}}},",
             "instruction": "Please answer with one of the option in the bracket",
             "output": f"{'ABCDE'[n % 5]}: {options[n % 5]}"} for n in range(count)]  # fmt: skip
    return json.dumps(made, indent=1).encode()


def medqa(count: int = 40) -> dict[str, bytes]:
    card = b"---\nlicense: cc\ntask_categories:\n- question-answering\nlanguage:\n- en\n---\n# MedQA\n"
    return {"medical_meadow_medqa.json": rows(count), "README.md": card, ".gitattributes": b"*.parquet filter=lfs\n"}


@pytest.fixture
def hub():
    """The server, with the two repositories of the reference configuration."""
    server = Hub()
    server.add(MODEL, qwen2())
    server.add(DATA, medqa())
    yield server
    server.close()


@pytest.fixture
def train(hub, tmp_path, process):
    """train(*options, **environment) -> the finished `python scripts/train.py`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    clean |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}

    def run(*options: object, expect: int = 0, script: str = "train.py", limit: int | None = None, **environment: str):
        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        more = {"preexec_fn": limited} if limit else {}
        return process(script, *options, expect=expect, env=clean | environment, **more)

    run.environment = clean
    return run


def record_of(tmp_path: Path) -> dict:
    return json.loads(max(tmp_path.glob("runs/*/config.json"), key=lambda p: p.stat().st_mtime).read_text())


def test_the_reference_configuration_downloads_records_and_goes_on_without_the_hub(hub, train, tmp_path):
    """`python scripts/train.py`, nothing else; then from the cache."""
    done = train(HF_TOKEN=TOKEN)
    record = record_of(tmp_path)
    assert "step 9: held-out loss" in done.stdout and "examples" not in done.stderr  # no terminal: no bars
    assert record["base"]["revision"] == hub.refs[MODEL]["main"]
    assert record["commits"] == {"medalpaca/medical_meadow_medqa": hub.refs[DATA]["main"]}
    assert record["files"].keys() == {f"medalpaca/medical_meadow_medqa{end}" for end in ("", " (held out)")}
    assert_nothing_leaks(done, tmp_path)
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"} and hub.large_tokens == {""}  # the token goes to the hub alone
    assert not any(name in asked for asked in hub.asked for name in ("LICENSE", ".gitattributes"))
    hub.asked.clear()
    train("--max-steps", 1, HF_HUB_OFFLINE="1")
    assert hub.asked == [] and record_of(tmp_path) | {"id": 0} != record | {"id": 0}
    for part in ("base", "commits", "files", "data"):
        assert record_of(tmp_path)[part] == record[part]


@SLOW
def test_a_hub_that_is_gone_is_not_needed_for_what_is_cached(hub, train, tmp_path):
    train("--dry-run")
    hub.close()
    assert "held-out loss" in train(*SHORT_RUN).stdout
    one_line_error(train("--model", "a/other", expect=2), "'a/other'", "hub can't be reached")


@SLOW
@pytest.mark.parametrize("branch", ["main", "v1"])
def test_a_run_keeps_the_commits_of_its_data(hub, train, tmp_path, branch):
    """Resumed and evaluated, it reads the rows it was trained on, whatever has been added on the hub."""
    first = hub.add(DATA, medqa(), branch)
    data = ["--dataset", "medalpaca/medical_meadow_medqa" + f"@{branch}" * (branch != "main")]
    train(*data, "--epochs", 1, "--output-dir", "runs/a")
    record = record_of(tmp_path)
    shutil.rmtree(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.json").write_text(json.dumps(record))
    hub.add(DATA, medqa(60), branch)
    train("--resume", "runs/a")
    train("--adapter", "runs/a/adapter", script="eval.py")
    train(*data, *SHORT_RUN)
    assert record["commits"].popitem()[1] == first != record_of(tmp_path)["commits"].popitem()[1]


@SLOW
def test_a_restricted_model_needs_its_token(hub, train, tmp_path):
    hub.gated = {MODEL: TOKEN, DATA: TOKEN}
    where = f"accept the licence at {hub.url}/Qwen/Qwen2-0.5B-Instruct, then log in"
    one_line_error(train(expect=2), "Qwen/Qwen2-0.5B-Instruct", where)
    one_line_error(train(expect=2, HF_TOKEN="hf_another"), "Qwen/Qwen2-0.5B-Instruct", where)
    one_line_error(
        train("--model", world.MODEL_DIR, expect=2), f"accept the licence at {hub.url}/datasets/medalpaca/medical"
    )
    assert_nothing_leaks(train(*SHORT_RUN, HF_TOKEN=TOKEN), tmp_path)
    assert_nothing_leaks(train(*SHORT_RUN, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1"), tmp_path)


@SLOW
def test_a_renamed_model_and_data_set_are_found_by_their_old_names(hub, train, tmp_path):
    hub.renamed = {"models/old/qwen": MODEL, "datasets/old/medqa": DATA}
    names = ["--model", "old/qwen", "--dataset", "old/medqa"]
    train(*names, *SHORT_RUN)
    record = record_of(tmp_path)
    assert record["base"]["revision"] == hub.refs[MODEL]["main"]
    assert record["commits"] == {"old/medqa": hub.refs[DATA]["main"]}
    train(*names, *SHORT_RUN, HF_HUB_OFFLINE="1")


@SLOW
def test_a_download_that_is_cut_goes_on(hub, train):
    """By huggingface_hub, from the last 10 MiB that it has written."""
    hub.add(MODEL, qwen2() | {"spare.model": bytes(24 * 2**20)})
    hub.cut = {"spare.model": 15 * 2**20, "model.safetensors": 4000, "medical_meadow_medqa.json": 4000}
    train(*SHORT_RUN)
    assert hub.cut == {} and hub.ranges == [f"bytes={10 * 2**20}-"]


@SLOW
def test_ctrl_c_ends_a_download_and_the_next_start_goes_on(hub, train, tmp_path):
    """On a terminal, with a bar of the model's bytes and one of the data's."""
    hub.slow = 0.3
    args = [sys.executable, ROOT / "scripts" / "train.py", *map(str, SHORT_RUN)]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    child = subprocess.Popen(args, env=train.environment, cwd=tmp_path, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown, sent = b"", False
    with contextlib.suppress(OSError):  # the terminal's end
        while part := os.read(ours, 2**16):
            shown += part
            if not sent and b"409k" in shown:
                child.send_signal(signal.SIGINT)
                sent = True
    assert child.wait() == 130 and shown.rstrip().endswith(b"interrupted") and b"Traceback" not in shown
    assert re.search(rb"Qwen/Qwen2-0.5B-Instruct: +0%[^\r]*0.00/409k", shown)
    assert re.search(rb"medical_meadow_medqa.json: 100%", shown)
    hub.slow = 0
    train(*SHORT_RUN)


@SLOW
def test_a_hub_that_is_gone_in_the_middle_is_one_line(hub, train):
    hub.slow, hub.cut, hub.ends = 0.1, {"model.safetensors": 200_000}, True
    done = train(*SHORT_RUN, expect=2)
    one_line_error(done, "Qwen/Qwen2-0.5B-Instruct", "hub can't be reached")


@SLOW
@pytest.mark.parametrize(
    "limit, words", [(300_000, "model 'Qwen/"), (30_000, "model 'Qwen/"), (45_000, "data set 'med")]
)
def test_a_full_disk_is_named_and_not_the_hub(hub, train, tmp_path, limit, words):
    """As a limit on the size of a file: of the weights, of the tokenizer, of the data."""
    hub.add(DATA, medqa(400))
    one_line_error(train(expect=2, limit=limit), words, f"the cache {tmp_path / 'hf'}", "File too large", "HF_HOME")


@SLOW
@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("status, headers", [(503, {}), (429, {"ratelimit": '"api";r=0;t=1'})])
def test_a_busy_hub_is_asked_again(hub, train, kind, status, headers):
    hub.refusal, hub.refusals, hub.refuses = (status, headers), 3, "Qwen" if kind == "model" else "medalpaca"
    done = train(*SHORT_RUN)
    assert hub.refusals == 0
    assert done.stderr.count(f"answers HTTP {status}; asking again in ") == (3 if kind == "model" else 0)


@SLOW
def test_configurations_splits_and_revisions_of_a_data_set(hub, train, tmp_path):
    """NAME[@REVISION][:CONFIG[:SPLIT]]; what is not there is listed, or refused, never exchanged."""
    configs = b"""---
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train.json
  - split: test
    path: main/test.json
- config_name: other
  data_files: other/train.json
---
"""
    files = {"README.md": configs, "main/test.json": rows(12), "other/train.json": rows(14)}
    first = hub.add("datasets/some/data", files | {"main/train.json": rows(20)}, "v1")
    second = hub.add("datasets/some/data", files | {"main/train.json": rows(30)})
    options = ["--dry-run", "--eval-fraction", 0, "--dataset"]

    def count(name: str, **environment: str) -> int:
        out = train(*options, name, **environment).stdout
        return int(re.search(rf"^{re.escape(name)} +(\d+)", out, re.MULTILINE)[1])

    def error(name: str, *words: str, **environment: str) -> None:
        done = train(*options, name, expect=2, **environment)
        assert done.stderr.splitlines()[-1].startswith(f"error: data set '{name}': ")
        assert all(word in done.stderr for word in words), done.stderr

    error("some/data", "name its configuration, one of main, other: for example some/data:main")
    error("some/data:mian", "name its configuration, one of main, other")
    error("some/data:main:dev", "name its split, one of train, test: for example some/data:main:train")
    assert count("some/data:main:test") == 12 and count("some/data:other") == 14
    assert count(f"some/data@{first}:main") == 20 and count("some/data@v1:main") == 20
    assert count("some/data@v1:main", HF_HUB_OFFLINE="1") == 20
    error("some/data:main", "revision main can't be had", first, HF_HUB_OFFLINE="1")  # datasets' newest is the other
    error(f"some/data@{second}:main", second, first, HF_HUB_OFFLINE="1")
    assert count("some/data:main") == 30
    error("some/data@v2:main", "revision")  # datasets 4.0 would take a cached one
    error("some/data:mian", "one of main, other", HF_HUB_OFFLINE="1")


# ---------------------------------------------------------------------------------------------------------------------
# What the hub answers, and pushing, in this process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """The server, and a huggingface_hub that believes it is the hub."""
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    huggingface_hub.close_session()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda real=huggingface_hub.HfApi: real(endpoint=server.url))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()
    huggingface_hub.close_session()


@pytest.fixture
def cache(fake, monkeypatch, tmp_path):
    """Downloads come from the server, to an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_module, "WAITS", ())
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return tmp_path / "cache"


def test_a_model_is_downloaded_its_weights_last(fake, cache, monkeypatch, capsys):
    monkeypatch.setattr(console, "TOLD_SECONDS", 0)
    commit = fake.add("models/some/model", world.MODEL_DIR)
    load_encoder("some/model")
    assert not any("safetensors" in asked for asked in fake.asked)
    base = load_base("some/model", device=torch.device("cpu"))
    assert base.fingerprint == load_base(str(world.MODEL_DIR), device=torch.device("cpu")).fingerprint
    assert f"GET /large/{commit}/model.safetensors" in fake.asked
    told = re.findall(r"^some/model: (\d+)%$", capsys.readouterr().err, re.MULTILINE)
    assert told and told[-1] == "100"


@pytest.mark.parametrize(
    "name, other", [("me/m-AWQ", " (perhaps me/m)"), ("me/m-bnb-8bit", " (perhaps me/m)"), ("me/big", ", or")]
)
def test_another_quantisation_is_refused_before_any_weight_is_downloaded(fake, cache, tmp_path, script, name, other):
    shutil.copytree(world.MODEL_DIR, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    method = {"load_in_8bit": True} if "8bit" in name else {"quant_method": "awq"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    fake.add(f"models/{name}", tmp_path / "model")
    done = script("train.py", "--demo", "--model", name, expect=2)
    one_line_error(done, name, "quantised by " + ("bitsandbytes int8" if "8bit" in name else "awq"), f"model{other}")
    assert not any("safetensors" in asked for asked in fake.asked)


GATED, MISSING, REVISION = ({"X_Error_Code": code} for code in ("GatedRepo", "RepoNotFound", "RevisionNotFound"))
ANSWERS = {
    "gated": (403, GATED, "accept the licence at URL/some/one, then log in (`hf auth login` or HF_TOKEN)"),
    "gated, logged out": (401, GATED, "accept the licence at URL/some/one, then log in"),
    "missing": (404, MISSING, "not on the Hugging Face hub, and no local"),
    "no such revision": (404, REVISION, "no such revision"),
    "wrong token": (
        401,
        {"X_Error_Message": "Invalid credentials in Authorization header"},
        "wants a valid token (HTTP 401)",
    ),
    "forbidden": (403, {}, "the token may not read it (HTTP 403)"),
    "too many": (429, {"Retry_After": "17"}, "too many requests to the Hugging Face hub (HTTP 429); try again in 17 s"),
    "down": (503, {}, "the Hugging Face hub is not available (HTTP 503); try again later"),
}


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_the_hub_answers_is_one_line_with_a_way_out(fake, cache, script, monkeypatch, answer, kind):
    *fake.refusal, words = ANSWERS[answer]
    if kind == "dataset" and answer == "no such revision":
        return  # of a model
    address = f"{fake.url}/datasets" if kind == "dataset" else fake.url
    lost = datasets.exceptions.DatasetNotFoundError("the cause is dropped by the library")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=lost))
    done = script("train.py", "--demo", f"--{kind}", "some/one", expect=2)
    one_line_error(done, "'some/one'", words.replace("URL", address))
    assert "can't be reached" not in done.stderr


DEMO = ["--demo", "--max-steps", 1, "--limit", 16, "--eval-limit", 4, "--output-dir", "out"]


def test_train_pushes_the_adapter_privately(fake, script, tmp_path):
    done = script("train.py", *DEMO, "--push-to-hub", "me/mine")
    assert fake.repos == {"me/mine": True} and done.stdout.splitlines()[-1] == f"pushed to {fake.url}/me/mine (private)"
    assert fake.files["me/mine"] == {p.name: p.read_bytes() for p in (tmp_path / "out" / "adapter").iterdir()}
    assert "README.md" in fake.files["me/mine"] and fake.tokens - {""} == {f"Bearer {TOKEN}"}
    assert not any(b"push" in p.read_bytes() for p in tmp_path.glob("out/*.json*"))  # of the run, not of its record
    assert_nothing_leaks(done, tmp_path)
    assert done.stdout.startswith(f"note: the adapter will name its base as '{world.MODEL_DIR}'")
    assert fake.asked.index("GET /api/whoami-v2") < fake.asked.index("POST /api/repos/create")


def test_merge_pushes_the_checkpoint(fake, script, made, tmp_path):
    merging = ["merge.py", "--adapter", made[0] / "adapter", "--output-dir"]
    done = script(*merging, "merged", "--push-to-hub", "lab/ours", "--public", "--json")
    assert fake.repos == {"lab/ours": False}
    assert json.loads(done.stdout.splitlines()[-1]) == {"event": "push", "url": f"{fake.url}/lab/ours", "public": True}
    assert fake.files["lab/ours"] == {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    out = script(*merging, "again", "--push-to-hub", "lab/ours", "--public").stdout
    assert f"lab/ours holds {len(fake.files['lab/ours'])} files: this push is a new commit on top" in out


@pytest.mark.parametrize(
    "options, words",
    [
        (["mine"], ["'mine'", "OWNER/NAME"]),
        (["a/b/c"], ["'a/b/c'", "OWNER/NAME"]),
        (["me/bad name"], ["'me/bad name'", "OWNER/NAME"]),
        (["you/mine"], ["you/mine", "me, lab"]),
        (["me/known"], ["me/known", "public", "--public"]),
    ],
)
def test_what_can_not_be_pushed_is_refused_before_any_work(fake, script, tmp_path, options, words):
    fake.repos["me/known"], fake.files["me/known"] = False, {}  # not private
    one_line_error(script("train.py", *DEMO, "--push-to-hub", *options, expect=2), "--push-to-hub", *words)
    assert not (tmp_path / "out").exists() and not any(a.startswith("POST") for a in fake.asked)


def test_other_refusals_before_any_work(fake, script, tmp_path, monkeypatch):
    one_line_error(script("train.py", *DEMO, "--public", expect=2), "--public", "--push-to-hub")
    fake.role = "read"
    one_line_error(script("train.py", *DEMO, "--push-to-hub", "me/mine", expect=2), "may only read")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.hf_api, "get_token", lambda: None)
    one_line_error(
        script("train.py", *DEMO, "--push-to-hub", "me/mine", expect=2), "no token", "hf auth login", "HF_TOKEN"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails", ["create", "preupload", "commit"])
def test_a_push_that_fails_keeps_what_is_here_and_says_how_to_push_later(fake, script, tmp_path, fails):
    fake.fails = fails
    done = script("train.py", *DEMO, "--push-to-hub", "me/mine", expect=2)
    one_line_error(done, "me/mine", "over quota", "is whole", "hf upload me/mine out/adapter . --private")
    assert (tmp_path / "out" / "adapter" / "README.md").is_file()
    assert_nothing_leaks(done, tmp_path)


def test_a_repository_made_public_meanwhile_is_refused(fake, script, made, tmp_path):
    """create_repo(private=True) leaves one that exists as it is."""
    fake.repos["me/mine"], fake.files["me/mine"] = False, {}
    with pytest.raises(ValueError, match="--push-to-hub me/mine: that repository is public; add --public"):
        push.push(made[0] / "adapter", "me/mine", public=False)
    assert fake.files["me/mine"] == {}


@pytest.mark.parametrize("offline", ["1", ""], ids=["offline", "unreachable"])
def test_a_hub_out_of_reach_is_one_line_before_any_work(script, tmp_path, monkeypatch, offline):
    if not offline:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda real=huggingface_hub.HfApi: real("http://127.0.0.1:9"))
        huggingface_hub.close_session()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = script("train.py", *DEMO, "--push-to-hub", "me/mine", expect=2)
    one_line_error(done, "me/mine", "can't be reached", "nothing has been done yet")
    assert_nothing_leaks(done, tmp_path)
    assert not (tmp_path / "out").exists()
    huggingface_hub.close_session()


def test_a_dry_run_does_not_ask_the_hub(script, fake):
    script("train.py", *DEMO, "--push-to-hub", "me/mine", "--dry-run")
    assert fake.asked == []
