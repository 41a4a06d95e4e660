"""Evaluation: what is measured of rows, each data set's and all together; and the command."""

import json
import re
from dataclasses import replace

import pytest
import torch
from conftest import assert_same
from test_training import make, on_the_cpu  # noqa: F401

import qlora_min.run.answers
from qlora_min import loop
from qlora_min.base import load_base
from qlora_min.cli.scores import Choices, text_scores
from qlora_min.cli.tables import by_data_set, by_letter
from qlora_min.data.layouts import to_example
from qlora_min.demo import world
from qlora_min.engine import Engine
from qlora_min.evaluation import Choice, Evaluation, evaluate_rows
from qlora_min.fused.select import make_engine
from qlora_min.generate import generate
from qlora_min.run.answers import generated
from qlora_min.run.datasets import encode_dataset


@pytest.fixture(scope="module")
def base():
    return load_base(str(world.MODEL_DIR), "none", "fp32", torch.device("cpu"))


@pytest.fixture(scope="module")
def rows(base):
    examples = [to_example(r, f"f:{i}") for i, r in enumerate(world.rows(world.CONDITIONS, 23, seed=5))]
    examples.append(to_example({"prompt": "Which drug treats it?", "completion": "None."}, "f:23"))
    return encode_dataset("f", examples, base.encoder, 512).rows


@pytest.fixture(scope="module", params=["modules", "fused"])
def engine(request, rows) -> Engine:
    """Of a base of its own: an engine moves its weights."""
    base = load_base(str(world.MODEL_DIR), "none", "fp32", torch.device("cpu"))
    return make_engine(base, request.param, max(map(len, rows)))[0]


def option_probabilities(base, row) -> torch.Tensor:
    """The slow way: the whole row's logits, at the token before the answer."""
    with torch.no_grad():
        logits = base.model(input_ids=row.input_ids[None].long()).logits[0, row.answer_start - 1]
    return logits[list(row.choices[0])].softmax(-1)


def test_choices_are_those_of_the_whole_rows_logits(base, engine, rows):
    result = evaluate_rows(engine, rows, 4)
    wanted = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if rows[i].choices:
            p = option_probabilities(base, rows[i])
            wanted.append(("ABCD"[rows[i].choices[1]], "ABCD"[p.argmax()], p.max().item()))
    choices = Choices(result.choices)
    assert list(choices.right) == [c.right for c in result.choices] == [w[0] for w in wanted]
    assert list(choices.chosen) == [c.chosen for c in result.choices] == [w[1] for w in wanted]
    assert choices.confidence.tolist() == [c.probability for c in result.choices]
    assert choices.confidence.tolist() == pytest.approx([w[2] for w in wanted], abs=1e-5)
    assert {c.chance for c in result.choices} == {result.chance} == {0.25}
    assert result.option_rows == len(choices.hits) == 23
    assert result.option_accuracy == choices.hits.mean()
    assert 0.25 <= choices.confidence.min() < choices.confidence.max() < 1


def test_rows_of_a_batch_may_have_different_numbers_of_options(base, engine, rows):
    fewer = [replace(r, choices=(r.choices[0][: 2 + i % 3], 0, r.choices[2])) for i, r in enumerate(rows[:7])]
    mixed = [*fewer, rows[23]]
    found = evaluate_rows(engine, mixed, 8).choices
    ordered = sorted(fewer, key=len)
    expected = [option_probabilities(base, r) for r in ordered]
    assert [c.chance for c in found] == [1 / len(r.choices[0]) for r in ordered]
    assert [c.chosen for c in found] == ["ABCD"[p.argmax()] for p in expected]
    assert [c.probability for c in found] == pytest.approx([p.max().item() for p in expected], abs=1e-5)


def test_generation_leaves_cudnn_out(base, rows):
    """It plans for each length of the keys: 2.5 ms a layer and token. All other kernels of attention may be chosen."""
    enabled = torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled
    enabled = *enabled, torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled
    before, seen = [f() for f in enabled], []
    hook = base.model.register_forward_pre_hook(lambda *_: seen.append([f() for f in enabled]))
    generate(base, [rows[0].input_ids.tolist()], 2)
    hook.remove()
    assert seen and all(found == [True, True, True, False] for found in seen)
    assert [f() for f in enabled] == before


def test_parts_join_to_the_whole(engine, rows):
    whole = evaluate_rows(engine, rows, 4)
    joined = Evaluation.join([evaluate_rows(engine, part, 4) for part in (rows[:9], rows[9:23], rows[23:])])
    a, b = whole.as_dict(), joined.as_dict()
    assert a.keys() == b.keys() and a.pop("majority") == b.pop("majority") is not None
    assert all(a[k] == pytest.approx(b[k], rel=1e-5) for k in a)
    assert sorted((c.right, c.chosen) for c in joined.choices) == sorted((c.right, c.chosen) for c in whole.choices)
    alone = Evaluation.join([evaluate_rows(engine, rows[23:], 4)])
    assert alone.option_accuracy is None and alone.chance is None and alone.option_rows == 0


def test_training_keeps_its_figures(engine, rows):
    """What goes into metrics.jsonl and checkpoints is as it was."""
    assert evaluate_rows(engine, rows, 4).as_dict().keys() == {
        "rows", "supervised_tokens", "loss", "token_accuracy", "option_rows", "option_accuracy", "chance", "majority",
        "perplexity",
    }  # fmt: skip
    json.dumps(evaluate_rows(engine, rows, 4).as_dict())


def test_answers_come_in_the_rows_order(base, rows):
    answers = generated(base, rows, 4, 6)
    assert [a.location for a in answers] == [r.location for r in rows]
    assert [a.letters for a in answers] == [list("ABCD")] * 23 + [[]]
    for i in (0, 7, 23):
        prompt = rows[i].input_ids[: rows[i].answer_start].tolist()
        assert answers[i].answer == generate(base, [prompt], 6)[0]
        assert answers[i].prompt == base.encoder.tokenizer.decode(prompt)
    assert answers[23].reference == "None." and re.fullmatch(r"[A-D]: \w+", answers[0].reference)
    assert [a for part in (rows[:7], rows[7:]) for a in generated(base, part, 4, 6)] == answers
    assert text_scores(answers).rows == 24 and text_scores(answers).valid_format is not None


def test_tables_by_hand():
    choices = tuple(Choice(*one, 0.5) for one in (("A", "A", 0.9), ("A", "B", 0.6), ("B", "B", 0.7)))
    assert [line[:5] for line in by_letter(Choices(choices))] == [
        ("right letter", "chose A", "chose B", "rows", "accuracy"),
        ("A", "1", "1", "2", "50.0%"),
        ("B", "0", "1", "1", "100.0%"),
    ]
    one = Evaluation(3, 8, 4.0, 6, choices)
    plain = Evaluation(2, 4, 1.0, 2)
    assert by_data_set(["x", "y"], [one, plain], [one, plain])[1:] == [
        ("x", "3", "0.5000 → 0.5000", "75.0% → 75.0%", "66.7% → 66.7%", "20.8-93.9%", "50.0%", "A 66.7%"),
        ("y", "2", "0.2500 → 0.2500", "50.0% → 50.0%", "-", "-", "-", "-"),
    ]


@pytest.fixture
def adapter(make):  # noqa: F811
    trainer = make("run", held=6, max_steps=3, eval_every=3)
    trainer.train()
    return trainer.folder / "adapter"


def test_the_command(adapter, script, write_rows, tmp_path):
    files = [write_rows(world.rows(world.CONDITIONS, n, seed=n), f"set{n}.jsonl") for n in (12, 5)]
    options = ["--adapter", adapter, "--dataset", *files, "--generate", 2, "--max-new-tokens", 4]
    out = script("eval.py", *options, "--html", "report.html").stdout
    for label in ("95% interval", "chance", "always [A-D]", "mean confidence", "calibration error", "exact match",
                  "valid format", "ROUGE-L", "BLEU"):  # fmt: skip
        assert re.search(rf"^ +{label} +\S+ +\S+$", out, re.MULTILINE), label
    assert re.search(r"answers generated +4 +4\n", out)
    assert re.search(rf"^{files[0]} +12 +[\d.]+ → [\d.]+ ", out, re.MULTILINE)
    assert len(re.findall(r"^[A-D]( +\d+){4,5} ", out, re.MULTILINE)) == 4
    assert re.search(rf"^{files[1]} +2( +[\d.]+%? → [\d.]+%?){{4}}$", out, re.MULTILINE)
    assert "wrote report.html" in out and (tmp_path / "report.html").read_text().startswith("<!doctype html>")

    result = json.loads(script("eval.py", *options, "--json").stdout)
    for side in ("base", "with_adapter"):
        found = result[side]
        assert found["datasets"].keys() == set(map(str, files)) and found["rows"] == 17 == result["rows"]
        assert sum(map(sum, found["options"]["confusion"])) == 17
        low, high = found["options"]["interval"]
        assert low < found["option_accuracy"] < high
        assert found["generated"]["rows"] == 4
        assert [found["datasets"][str(f)]["generated"]["rows"] for f in files] == [2, 2]
    each = [result["base"]["datasets"][str(f)] for f in files]
    assert result["base"]["loss"] == pytest.approx(
        sum(e["loss"] * e["supervised_tokens"] for e in each) / sum(e["supervised_tokens"] for e in each)
    )


def test_a_model_alone(adapter, script, write_rows, tmp_path):
    """A merged model: the adapter's numbers, as the one side of all tables."""
    files = [write_rows(world.rows(world.CONDITIONS, n, seed=n), f"set{n}.jsonl") for n in (12, 5)]
    data = ["--dataset", *files, "--generate", 2, "--max-new-tokens", 4]
    script("merge.py", "--adapter", adapter, "--output-dir", "merged", "--dtype", "fp32")
    out = script("eval.py", "--model", "merged", *data, "--html", "report.html").stdout
    assert re.search(r"\n +model\nrows +17\n", out) and "base" not in out
    assert re.search(r"^answers generated +4$", out, re.MULTILINE) and "Each data set, model (95%" in out
    assert re.search(rf"^{files[0]} +12( +[\d.]+%?){{3}} ", out, re.MULTILINE) and "The model's answers by" in out
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Model</h1>" in page and 'class="heat of-model"' in page and "base" not in page.partition("<body>")[2]
    assert page.count("<span class=model>") == 4 and page.count("<small class=model>") == 4
    alone = json.loads(script("eval.py", "--model", "merged", *data, "--json").stdout)
    both = json.loads(script("eval.py", "--adapter", adapter, *data, "--json").stdout)
    assert alone["adapter"] is None and alone.keys() == {"adapter", "rows", "precision", "model"}
    assert alone["model"]["loss"] == pytest.approx(both["with_adapter"]["loss"], rel=1e-4)
    assert alone["model"].keys() == both["with_adapter"].keys()
    for options, message in (
        (["--model", "merged"], "error: model 'merged': no run held out rows for it; name the data to evaluate on"),
        ([], "error: --adapter DIR or --model NAME is needed"),
    ):
        assert script("eval.py", *options, expect=2).stderr.startswith(message)


def test_the_cheap_path_generates_nothing(adapter, script, monkeypatch):
    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr(qlora_min.run.answers, "generate", refuse)
    out = script("eval.py", "--adapter", adapter).stdout
    assert "exact match" not in out and "loss" in out
    with pytest.raises(AssertionError):
        script("eval.py", "--adapter", adapter, "--generate", 1)


@pytest.mark.parametrize("file", ["nowhere/report.html", "."])
def test_a_report_that_cannot_be_written_is_refused_before_any_work(script, file):
    done = script("eval.py", "--adapter", "nowhere", "--html", file, expect=2)
    assert done.stderr.startswith(f"error: --html {file}: ") and done.stderr.count("\n") == 1 and done.stdout == ""


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_evaluation_is_the_same_by_both_engines_and_leaves_no_trace(make, quantization):  # noqa: F811
    """However many rows, or tokens, are packed together; dropout stays off, and nothing is drawn."""
    found, sizes = {}, []
    for name in ("modules", "fused"):
        trainer = make(name, held=6, engine=name, quantization=quantization)
        with torch.no_grad():
            trainer.engine.adapter.weights.add_(0.05)  # an update that has an effect
        loop.compute_gradients(trainer.feed, trainer.stepper, 0, trainer.progress, trainer.writer)
        before = torch.get_rng_state(), trainer.engine.adapter.grads.clone(), trainer.engine.adapter.weights.clone()
        computing, held, n_tokens = trainer.feed.engine, trainer.held_out, trainer.feed.n_tokens
        found[name] = [evaluate_rows(computing, held, loop.EVALUATED, n_tokens=n_tokens)]
        for count, n_tokens in ((1, float("inf")), (4, float("inf")), (6, 200)):
            found[name].append(evaluate_rows(computing, held, count, None, n_tokens, lambda: sizes.append(None)))
        after = torch.get_rng_state(), trainer.engine.adapter.grads, trainer.engine.adapter.weights
        assert all(map(torch.equal, before, after)) and before[1].any() and not trainer.base.model.training
    parts, room = 0, 0  # rows in order of length, as many as 200 tokens hold
    for n in sorted(map(len, trainer.held_out)):
        parts, room = (parts, room - n) if n <= room else (parts + 1, 200 - n)
    assert len(sizes) == 2 * (6 + 2 + parts)
    first = found["modules"][0]
    for other in found["modules"] + found["fused"]:
        assert_same([c.right for c in other.choices], [c.right for c in first.choices])
        confidence = [c.probability for c in first.choices]
        assert [c.probability for c in other.choices] == pytest.approx(confidence, abs=1e-4)
        assert other.loss == pytest.approx(first.loss, rel=1e-5) and other.token_accuracy == first.token_accuracy
