"""Leaving home: model cards that the hub can read, and a push that is private, refused in one line, and never lossy.

No test pushes anywhere: a server on this machine stands for the hub, and records what huggingface_hub sends to it.
"""

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import datasets
import huggingface_hub
import peft
import pytest
import torch
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
# A server that stands for the hub
# ---------------------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """What a push asks for: who am I, a repository's state, making one, and a commit. Records what it is sent."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.role, self.fails = "write", ""
        self.repos: dict[str, bool] = {}  # name -> private
        self.files: dict[str, dict[str, bytes]] = {}  # name -> path -> content
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.models: dict[str, Path] = {}  # name -> folder to download
        self.refusal: tuple[int, dict[str, str]] | None = None  # status and headers of every answer
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, value: dict, status: int = 200, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.handle_one()

    def do_POST(self):
        self.handle_one()

    def do_HEAD(self):
        self.handle_one()

    def model(self, name: str, rest: str) -> None:
        """What snapshot_download asks for: the commit, its files, and the head and content of each."""
        files = {p.name: p.read_bytes() for p in self.server.models[name].iterdir()}
        if rest.startswith("tree/"):
            listed = [{"type": "file", "path": f, "size": len(b), "oid": "1" * 40} for f, b in files.items()]
            return self.answer(listed)
        if not rest.startswith("resolve/"):
            return self.answer({"id": name, "sha": "0" * 40, "siblings": []})
        body = files[rest.rpartition("/")[2]]
        self.send_response(200)
        for key, value in {"ETag": f'"{len(body)}"', "X-Repo-Commit": "0" * 40, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def handle_one(self):
        server, path = self.server, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.asked.append(f"{self.command} {path}")
        server.tokens.add(self.headers.get("Authorization", ""))
        if server.refusal:
            status, headers = server.refusal
            return self.answer({"error": "no"}, status, **headers)
        owner, _, rest = path.removeprefix("/api/models").strip("/").partition("/")
        if (name := f"{owner}/{rest.partition('/')[0]}") in server.models:
            return self.model(name, rest.partition("/")[2])
        if server.fails and server.fails in path:
            return self.answer({"error": "Forbidden: over quota"}, 403)
        if path == "/api/whoami-v2":
            return self.answer(
                {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": server.role}}}
            )
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            if name in server.repos:
                return self.answer({"url": f"{server.url}/{name}", "error": "exists"}, 409)
            server.repos[name], server.files[name] = (
                "private" in (asked.get("visibility"), asked.get("private") and "private"),
                {},
            )
            return self.answer({"url": f"{server.url}/{name}"})
        if path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            return self.answer({"errors": [], "warnings": []})
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        name = f"{owner}/{name}"
        if name not in server.repos:
            return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        if rest[:1] == ["preupload"]:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    server.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{server.url}/{name}/commit/1", "commitOid": "1", "success": True})
        siblings = [{"rfilename": f} for f in [".gitattributes", *server.files[name]]]
        return self.answer({"id": name, "private": server.repos[name], "siblings": siblings, "sha": "0" * 40})


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
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def cache(fake, monkeypatch, tmp_path):
    """Downloads come from the server, to an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return tmp_path / "cache"


def test_a_model_is_downloaded_its_weights_last(fake, cache):
    fake.models["some/model"] = world.MODEL_DIR
    load_encoder("some/model")
    assert not any("safetensors" in asked for asked in fake.asked)
    base = load_base("some/model", device=torch.device("cpu"))
    assert base.fingerprint == load_base(str(world.MODEL_DIR), device=torch.device("cpu")).fingerprint
    assert "GET /some/model/resolve/" + "0" * 40 + "/model.safetensors" in fake.asked


@pytest.mark.parametrize(
    "name, other", [("me/m-AWQ", " (perhaps me/m)"), ("me/m-bnb-8bit", " (perhaps me/m)"), ("me/big", ", or")]
)
def test_another_quantisation_is_refused_before_any_weight_is_downloaded(fake, cache, tmp_path, script, name, other):
    shutil.copytree(world.MODEL_DIR, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    method = {"load_in_8bit": True} if "8bit" in name else {"quant_method": "awq"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    fake.models[name] = tmp_path / "model"
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
