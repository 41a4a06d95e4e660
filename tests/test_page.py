"""The HTML report: whole, self-contained, and no place where a row's text becomes anything but text."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from qlora_min.cli import page
from qlora_min.cli.options import new_file
from qlora_min.cli.scores import Answer, Choices, between
from qlora_min.cli.tables import Comparison
from qlora_min.evaluation import Choice, Evaluation
from qlora_min.run import checkpoint
from qlora_min.system.files import write_text

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></div><h1>owned</h1>",
    "\"' onmouseover='alert(1)'",
    "<|im_start|><b>&lt;script&gt;<|im_end|>",
    "<style>*{display:none}</style>",
    "<!--",
    "]]><svg onload=alert(1)>",
    "\x00\x1b[31m\u202e \ud800",
]
VOID = {"meta"}
KNOWN = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "small", "b", "span", "div", "table", "tr",
         "th", "td", "i", "figure", "svg", "defs", "use", "path", "text", "g", "pre"}  # fmt: skip


class Reader(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.attributes, self.text, self.pre = [], set(), [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag == "pre":
            self.pre.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "pre" in self.open:
            self.pre[-1] += data

    def handle_comment(self, data):
        raise AssertionError(data)


def check(text: str) -> Reader:
    """Well-formed, of known elements alone, without anything that runs or is fetched."""
    read = Reader(text)
    assert read.open == [] and read.seen <= KNOWN, read.seen - KNOWN
    for name, value in read.attributes:
        assert not name.startswith("on") and name not in ("src", "href", "action", "srcdoc"), name
        assert "url(" not in (value or "") and "javascript:" not in (value or "")
    assert not re.search(r"@import|url\(|https?://", text.split("</style>")[0])
    assert any(name == "content" and "default-src 'none'" in value for name, value in read.attributes)
    return read


def result(loss: float, hits: int, letters: str | list[str] = "ABCD") -> Evaluation:
    said = [i % 4 if i < hits else (i + 1) % 4 for i in range(20)]
    choices = (Choice(letters[i % 4], letters[c], 0.3 + 0.05 * (i % 13), 0.25) for i, c in enumerate(said))
    return Evaluation(20, 90, 90 * loss, 45, tuple(choices))


@pytest.fixture
def adapter(tmp_path):
    """An adapter's folder in a run directory, whose names are attacks too."""
    run = tmp_path / "run <b>bold"
    folder = run / "adapter"
    folder.mkdir(parents=True)
    described = {"peft_type": "LORA", "base_model_name_or_path": "/home/alice/<i>base", "r": 4, "lora_alpha": 8.0,
                 "target_modules": ["q_proj"], "lora_dropout": 0.0}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(described))
    record = {part: {} for part in checkpoint.RECORDED}
    (run / "config.json").write_text(json.dumps(record))
    events = [{"event": "train", "step": s, "loss": 3 / s, "lr": 1e-4 * s, "grad_norm": 1.0} for s in range(1, 9)]
    events += [{"event": "eval", "step": s, "eval_loss": v} for s, v in ((0, 3.1), (4, 0.8), (8, None))]
    events += [{"event": "train", "step": "<script>", "loss": "<script>", "lr": None}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    samples = [{"where": a, "prompt": a, "reference": a, "before": a, "after": a} for a in ATTACKS[:-1]]
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return folder


def texts(kind: str) -> list[Answer]:
    return [Answer(a, a, a, kind + a, ["A"]) for a in ATTACKS]


@pytest.mark.parametrize(
    "answers", [[[texts(""), texts("")], [texts("A: ")] * 2], []], ids=["generated", "the run's samples"]
)
def test_no_text_becomes_anything_else(adapter, answers, tmp_path):
    names = ["<script>x.jsonl", "plain.jsonl"]
    results = [[result(3.0, 5), result(2.0, 6, ["A", "B", "C", "<b>"])], [result(0.5, 15), result(0.4, 14)]]
    made = page.evaluation(adapter, Comparison(names, results, answers), "fp32")
    write_text(tmp_path / "r.html", made)
    text = (tmp_path / "r.html").read_text("utf-8")
    read = check(text)
    for attack in ATTACKS[:-1]:
        assert read.pre.count(attack) >= 2, attack  # all of it, as text
    assert list(tmp_path.glob(".r.html*")) == []
    everything = "".join(read.text)
    for part in ("<script>x.jsonl", "run <b>bold", "<i>base", "Calibration", "How training went"):
        assert part in everything, part
    assert "lowest held-out loss: 0.8000 at step 4" in everything
    assert ("✓" in everything) and (("valid format" in everything) == bool(answers))


def test_figures_of_the_page_are_those_of_the_evaluation(adapter):
    made = page.evaluation(adapter, Comparison(["one"], [[result(3.0, 5)], [result(0.5, 15)]], []), "fp32")
    text = " ".join("".join(check(made).text).split())
    assert "3.0000 → 0.5000" in text and "25.0% → 75.0%" in text
    assert between(Choices(result(0.5, 15).choices).interval) in text
    assert "Each data set" not in text
    assert made.count('<td class="heat of-adapter"') == 16
    points = re.findall(r'<path d="M (\S+) (\S+) \nL (\S+) (\S+) \n" style="fill: none; stroke: #ff7f0e', made)[0]
    assert float(points[1]) < float(points[3])  # a lower loss is lower in the picture


@pytest.mark.parametrize("damaged", ["{", "3\n", "[1]\n"])
def test_damaged_samples_cost_nothing_but_themselves(adapter, damaged):
    (adapter.parent / "samples.jsonl").write_text(damaged)
    made = page.evaluation(adapter, Comparison(["one"], [[result(3.0, 5)], [result(0.5, 15)]], []), "fp32")
    assert "Side by side" not in made and "Calibration" in made


def test_rows_without_options_and_no_run(tmp_path, adapter):
    plain = Evaluation(3, 8, 4.0, 6)
    for name in ("config.json", "metrics.jsonl"):
        (adapter.parent / name).unlink()
    made = page.evaluation(adapter, Comparison(["one"], [[plain], [plain]], []), "bf16")
    text = "".join(check(made).text)
    assert not any(word in text for word in ("Calibration", "Option accuracy", "How training went", "Side by side"))


def test_no_place_of_this_machine_is_told_and_nothing_is_fetched(adapter):
    (adapter.parent / "samples.jsonl").write_text('{"where": "/home/alice/x.jsonl:7", "prompt": "Which?"}\n')
    names = ["OWNER/NAME", "/home/alice/held.jsonl (held out)"]
    made = page.evaluation(adapter, Comparison(names, [[result(3.0, 5)] * 2, [result(0.5, 15)] * 2], []), "fp32")
    text = "".join(check(made).text)
    assert not re.search(r"alice|://", made) and str(adapter.parent.parent) not in made
    for part in ("OWNER/NAME", "held.jsonl (held out)", "x.jsonl:7", "run <b>bold/adapter"):
        assert part in text, part


def test_numbers_in_the_heat_are_readable_and_more_is_stronger(adapter):
    """In light and dark: the ink's contrast is at least WCAG's 4.5, and grows the heat's distance from the card."""
    made = page.evaluation(adapter, Comparison(["one"], [[result(3.0, 5)], [result(0.5, 15)]], []), "fp32")
    assert "Darker" not in made

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: list[float], b: list[float]) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for palette in re.findall(r":root \{(.*?)\}", made, re.DOTALL):
        found = dict(re.findall(r"--(\w+): #([0-9a-f]{3,6})", palette))
        colours = {k: [int(c, 16) / 255 for c in re.findall("..", v if len(v) == 6 else "".join(c * 2 for c in v))]
                   for k, v in found.items()}  # fmt: skip
        for heat in (colours["grey"], colours["orange"]):
            mixed = [[f * h + (1 - f) * c for h, c in zip(heat, colours["card"])] for f in (0, 0.25, 0.5, 0.75, 1)]
            assert all(contrast(colours["ink"], m) >= 4.5 for m in mixed)
            apart = [contrast(m, colours["card"]) for m in mixed]
            assert apart == sorted(apart) and apart[-1] > 2


def test_accuracy_is_shown_beside_the_majority(adapter):
    made = page.evaluation(adapter, Comparison(["one"], [[result(3.0, 5)], [result(0.5, 15)]], []), "fp32")
    assert "always A" in "".join(check(made).text)
    assert made.count('<i class=majority style="left:25.00%">') == 2


@pytest.mark.parametrize(
    "line",
    ['{"event": "train", "step": 1%s, "loss": 1, "lr": 1}' % ("0" * 400), '{"event": []}', '{"event": "eval"}'],
    ids=["too large", "no name", "no values"],
)  # fmt: skip
def test_events_that_cannot_be_drawn_are_left_out(adapter, line):
    results = [[result(3.0, 5)], [result(0.5, 15)]]
    whole = page.evaluation(adapter, Comparison(["one"], results, []), "fp32")
    with (adapter.parent / "metrics.jsonl").open("a") as f:
        f.write(line + "\n")
    assert page.evaluation(adapter, Comparison(["one"], results, []), "fp32") == whole


def test_a_missing_matplotlib_is_said_before_any_work(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = script("eval.py", "--adapter", "nowhere", "--html", "r.html", expect=2)
    assert done.stderr == ("error: --html needs matplotlib (import of matplotlib halted; None in sys.modules): "
                           "pip install 'qlora_min[plot]'\n")  # fmt: skip
    assert done.stdout == ""


def test_a_place_that_cannot_be_written(tmp_path):
    new_file("--html", str(tmp_path / "r.html"))
    (tmp_path / "r.html").write_text("saved")
    for bad, why in ((tmp_path / "nowhere" / "r.html", "can't be written; expected"), (tmp_path, "exists"),
                     (tmp_path / "r.html", "exists, and is never overwritten")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^--html {re.escape(str(bad))}: {why}"):
            new_file("--html", str(bad))
