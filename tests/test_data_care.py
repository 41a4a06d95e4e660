"""Options in another order, weights of data sets, and the report on what is in the data."""

import ast
import json
import random
import re
import sys
import time
from collections import Counter
from functools import cache

import numpy as np
import pytest
from conftest import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import medqa, real_tokenizer
from test_training import last_checkpoint, make, on_the_cpu, saved_adapter  # noqa: F401

from qlora_min import loop
from qlora_min.base import load_encoder
from qlora_min.chat import ChatEncoder
from qlora_min.cli.care import look
from qlora_min.cli.data import preview
from qlora_min.config import Config
from qlora_min.data import duplicates, layouts, readers
from qlora_min.data.epochs import epoch_rows, shuffle_options
from qlora_min.data.examples import Example, permute_options
from qlora_min.data.rows import Rows
from qlora_min.demo import world
from qlora_min.run import datasets
from qlora_min.run.datasets import read_data
from qlora_min.run.plan import describe
from qlora_min.run.resume import run_config
from qlora_min.run.trainer import Trainer


@cache
def encoder() -> ChatEncoder:
    return load_encoder(str(world.MODEL_DIR))


def mcq(literal: str, answer: str, stem: str = "Q:Which? \n") -> Example:
    return layouts.to_example({"prompt": f"{stem}{literal},", "completion": answer}, "f:1")


# ---------------------------------------------------------------------------------------------------------------------
# --shuffle-options
# ---------------------------------------------------------------------------------------------------------------------


def test_options_change_places_and_the_letter_follows_by_hand():
    example = mcq("""{'A': 'one', 'B': "it's", 'C':  'drei', }""", "B: it's")
    permuted = permute_options(example, [1, 2, 0])
    assert permuted.messages[0]["content"] == """Q:Which? \n{'A': "it's", 'B': 'drei', 'C':  'one', },"""
    assert permuted.messages[1]["content"] == "A: it's"
    assert permuted.location == "f:1"
    assert permute_options(mcq("{'A': 'x', 'B': 'y'}", "B"), [1, 0]).messages[1]["content"] == "A"
    assert permute_options(mcq("{'A': 'x', 'B': 'y'}", "A. x"), [1, 0]).messages[1]["content"] == "B. x"


OPTION = st.text(st.characters(codec="utf-8"), max_size=8).map(lambda s: f"<{s}>")  # begins and ends: no blank edges


@settings(deadline=None, max_examples=40)
@given(options=st.lists(OPTION, min_size=2, max_size=6, unique_by=lambda s: " ".join(s.split())), data=st.data())
def test_a_permuted_question_reads_as_one_written_so(options, data):
    letters = "ABCDEF"[: len(options)]
    order = data.draw(st.permutations(range(len(options))))
    right = data.draw(st.sampled_from(range(len(options))))
    example = mcq(str(dict(zip(letters, options))), f"{letters[right]}: {options[right]}")
    permuted = permute_options(example, order)
    if permuted is None:  # by chance an option that names others
        return
    choice = permuted.choice
    wanted = dict(zip(letters, [options[i] for i in order]))
    assert ast.literal_eval(choice.literal) == wanted
    assert wanted[choice.correct] == options[right]
    assert permuted.messages[0]["content"] == f"Q:Which? \n{wanted},"  # Python's own way to write it
    assert permuted.question == example.question
    back = [order.index(i) for i in range(len(order))]
    assert permute_options(permuted, back).messages == example.messages


@pytest.mark.parametrize(
    "options, answer",
    [
        (["x", "y", "All of the above"], "A: x"),
        (["x", "y", "A and B"], "A: x"),
        (["x", "y", "a, b"], "A: x"),
        (["x", "y", "Both"], "A: x"),
        (["x", "only b"], "A: x"),
        (["x", "y"], "A: x. B is wrong because of its form."),
        (["x", "y"], "A: y"),
    ],
)
def test_options_that_may_not_change_places(options, answer):
    assert permute_options(mcq(str(dict(zip("ABC", options))), answer), range(len(options))[::-1]) is None


def test_what_has_no_options_has_no_other_order():
    assert permute_options(mcq("none", "A"), []) is None
    assert permute_options(mcq("{'A': 'x', 'A': 'y'}", "A: y"), [0]) is None  # a letter twice
    assert permute_options(mcq("{'A': 'x', 'B': 2}", "A: x"), [1, 0]) is None


def encoded(rows: list[dict], texts: bool = True) -> Rows:
    given = [layouts.to_example(r, f"f:{i}") for i, r in enumerate(rows)]
    return datasets.encode_dataset("f", given, encoder(), 512, texts=texts).rows


def test_rows_keep_their_text_only_when_asked():
    rows = world.rows(world.CONDITIONS, 5, seed=1)
    (kept, plain) = (encoded(rows, texts) for texts in (True, False))
    for i, row in enumerate(kept):
        assert row.example.messages == layouts.to_example(rows[i], "").messages
        assert_same(vars(row), {**vars(plain[i]), "text": row.text})
        assert plain[i].text == ""


def test_a_shuffled_row_is_the_encoding_of_its_shuffled_text():
    """And not the tokens moved: with another neighbour, a quote may make another token."""
    for row in encoded(world.rows(world.CONDITIONS, 40, seed=2)):
        shuffled = shuffle_options(row, encoder(), 512, 42, 0, 7)
        text = encoder().tokenizer.decode(shuffled.input_ids)
        user, answer = re.search(r"user\n(.*)<\|im_end\|>\n.*assistant\n(.*)<\|im_end\|>", text, re.DOTALL).groups()
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        ids, supervised = encoder().encode(messages)
        assert shuffled.input_ids.tolist() == ids and shuffled.supervised.tolist() == supervised
        options, old = map(ast.literal_eval, (re.search(r"\{.*\}", user)[0], row.example.choice.literal))
        assert sorted(options.values()) == sorted(old.values())
        assert answer[3:] == options[answer[0]] == row.example.messages[-1]["content"][3:]
        firsts, correct, _ = shuffled.choices
        assert "ABCD"[correct] == answer[0] and shuffled.input_ids[shuffled.answer_start] == firsts[correct]


def test_the_order_is_a_function_of_seed_epoch_and_visit():
    (row,) = encoded(world.rows(world.CONDITIONS, 1, seed=3))
    seen = {
        key: tuple(shuffle_options(row, encoder(), 512, *key).input_ids.tolist())
        for key in [(s, e, v) for s in (1, 2) for e in range(4) for v in (0, 1)]
    }
    assert all(tuple(shuffle_options(row, encoder(), 512, *k).input_ids.tolist()) == ids for k, ids in seen.items())
    assert len(set(seen.values())) >= 8  # of 24 orders
    letters = Counter(shuffle_options(row, encoder(), 512, 0, epoch, 0).choices[1] for epoch in range(400))
    assert sorted(letters) == [0, 1, 2, 3] and min(letters.values()) > 70  # 100 expected, sigma 9


def test_a_shuffled_row_never_needs_more_memory_than_was_planned():
    (row,) = encoded(world.rows(world.CONDITIONS, 1, seed=3))
    assert any(shuffle_options(row, encoder(), len(row), 0, e, 0) is not row for e in range(9))
    assert all(shuffle_options(row, encoder(), len(row) - 1, 0, e, 0) is row for e in range(9))


@pytest.mark.real
@pytest.mark.parametrize("variable", ["QLORA_MIN_SMOLLM2", "QLORA_MIN_QWEN2_TOKENIZER"])
def test_real_shuffled_rows_are_the_chat_templates_own_tokens(variable):
    """Of the permuted text, written by Python's repr, by the tokenizer's own template."""
    real = real_tokenizer(variable)
    tokenizer = real.tokenizer
    (newline,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    rows, moved = datasets.encode_dataset("medqa", readers.read(medqa("train"), 300), real, 512, texts=True).rows, 0
    for i, row in enumerate(rows):
        shuffled = shuffle_options(row, real, 512, 42, 0, i)
        if shuffled is row:
            continue
        moved += 1
        choice = row.example.choice
        options = ast.literal_eval(choice.literal)
        order = list(range(len(options)))
        random.Random(f"42/0/{i}/options").shuffle(order)
        new = dict(zip(options, [list(options.values())[j] for j in order]))
        user = row.example.messages[0]["content"].replace(choice.literal, str(new))
        letter = next(k for k, v in new.items() if v == options[choice.correct])
        answer = row.example.messages[1]["content"]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": letter + answer[1:]}]
        assert [*shuffled.input_ids.tolist(), newline] == tokenizer.apply_chat_template(messages, return_dict=False)
    assert moved > 0.9 * len(rows)


# ---------------------------------------------------------------------------------------------------------------------
# --mix
# ---------------------------------------------------------------------------------------------------------------------


def test_a_mix_by_hand():
    assert epoch_rows([3, 2], (), 0, 0).tolist() == [0, 1, 2, 3, 4]
    assert Counter(epoch_rows([3, 2], (2.0, 1.0), 0, 0).tolist()) == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}
    halves = [set(epoch_rows([4, 1], (0.5, 1.0), 0, epoch).tolist()) for epoch in range(4)]
    assert halves[0] | halves[1] == {0, 1, 2, 3, 4} and halves[0] & halves[1] == {4}
    assert halves[:2] == halves[2:]
    assert len(epoch_rows([4, 1], (0.01, 1.0), 0, 0)) == 2  # never nothing of a data set


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0.05, 3)), min_size=1, max_size=4), st.integers(0, 9))
def test_a_mix_visits_rows_evenly_over_the_epochs(parts, seed):
    sizes, mix = zip(*parts)
    epochs = [epoch_rows(sizes, mix, seed, epoch) for epoch in range(6)]
    assert len({len(e) for e in epochs}) == 1  # so steps_per_epoch is one number
    assert_same([e.tolist() for e in epochs], [epoch_rows(sizes, mix, seed, n).tolist() for n in range(6)])
    visits = np.bincount(np.concatenate(epochs), minlength=sum(sizes))
    for size, weight, here in zip(sizes, mix, np.split(visits, np.cumsum(sizes)[:-1])):
        if size:
            assert here.max() - here.min() <= 1
            assert abs(here.sum() / 6 - weight * size) <= 0.5 + (weight * size < 0.5)


def files(write_rows, *counts: int) -> tuple[str, ...]:
    parts = [world.rows(world.CONDITIONS, n, seed=10 + i) for i, n in enumerate(counts)]
    return tuple(str(write_rows(p, f"{i}.jsonl")) for i, p in enumerate(parts))


def test_training_follows_the_mix(make, write_rows):  # noqa: F811
    trainer = make(dataset=files(write_rows, 10, 4), mix=(0.5, 3.0), epochs=2)
    assert trainer.schedule.steps_per_epoch == 5  # 5 + 12 rows, 4 a step
    assert trainer.schedule.n_tokens == sum(b.n_tokens for s in range(5) for b in trainer.feed[s][0])
    seen = Counter(r.location for s in range(5) for r in trainer.schedule[s])
    assert Counter(w.split("/")[-1][0] for w in seen) == {"0": 5, "1": 4} and set(seen.values()) == {1, 3}
    assert "17 rows: 0.5 x 0.jsonl, 3 x 1.jsonl" in describe(trainer)


def test_held_out_rows_are_neither_shuffled_nor_mixed(make, write_rows):  # noqa: F811
    one, two = files(write_rows, 30, 10)
    plain, other = (
        make(name, dataset=(one, two), eval_dataset=(), eval_fraction=0.3, **options)
        for name, options in (("plain", {}), ("other", {"shuffle_options": True, "mix": (2.0, 1.0)}))
    )
    assert datasets.data_hash(plain.schedule.rows, plain.held_out) == datasets.data_hash(
        other.schedule.rows, other.held_out
    )
    trained = [t.feed[0][0] for t in (plain, other)]
    assert not all(a.input_ids.equal(b.input_ids) for a, b in zip(*trained))


def test_a_shuffled_and_mixed_run_resumes_bit_for_bit(make, write_rows, monkeypatch):  # noqa: F811
    options = {"dataset": files(write_rows, 9, 3), "mix": (0.5, 2.0), "shuffle_options": True, "epochs": 2,
               "save_every": 5, "eval_every": 9}  # fmt: skip
    whole = make("whole", **options)
    orders = [sorted(map(str, (b.tolist() for b in all_ids(whole, epoch)))) for epoch in range(2)]
    assert orders[0] != orders[1]
    assert whole.schedule.steps_per_epoch == 3 and whole.schedule.total_steps == 6
    whole.train()
    killed = make("killed", **options)
    compute = loop.compute_gradients

    def crash(*args):
        if killed.progress.step == 5:
            raise ZeroDivisionError
        return compute(*args)

    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setattr(loop, "compute_gradients", crash)
        killed.train()
    with pytest.raises(ValueError, match=r"--mix was .* when the run began"):
        run_config(str(killed.folder), {"mix": (1.0, 1.0)})
    resumed = Trainer(*run_config(str(killed.folder), {}))
    assert resumed.progress.step == 5
    resumed.train()
    states = [last_checkpoint(r) for r in (whole.folder, killed.folder)]
    for key in ("adapter", "stepper"):
        assert_same(states[0][key], states[1][key], key)
    assert_same(saved_adapter(whole.folder), saved_adapter(killed.folder))


def all_ids(trainer: Trainer, epoch: int) -> list:
    n = trainer.schedule.steps_per_epoch
    return [b.input_ids for s in range(epoch * n, (epoch + 1) * n) for b in trainer.feed[s][0]]


def test_rows_given_without_their_text_are_refused(make, write_rows):  # noqa: F811
    (file,) = files(write_rows, 4)
    rows = datasets.encode_dataset("f", readers.read(file), encoder(), 512)
    config = Config(model=str(world.MODEL_DIR), shuffle_options=True, output_dir="unused")
    with pytest.raises(ValueError, match=r"--shuffle-options: the rows given have no text"):
        Trainer(config, data=([rows], []), write=False)


def test_preview_shows_the_first_epochs_order(script, write_rows):
    (file,) = files(write_rows, 6)
    options = ["--model", world.MODEL_DIR, "--dataset", file, "--eval-fraction", 0, "--preview", 6]
    plain, shuffled = script("train.py", *options).stdout, script("train.py", *options, "--shuffle-options").stdout
    config = Config(model=str(world.MODEL_DIR), dataset=(file,), eval_fraction=0.0, shuffle_options=True)
    (part,), _ = read_data(config, encoder())
    for i, row in enumerate(part.rows):
        new = shuffle_options(row, encoder(), int(part.rows.lengths.max()), config.seed, 0, i)
        assert preview(new, encoder().tokenizer, colour=False) in shuffled
    assert plain != shuffled


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in "aeiou"]


def vignette(seed: int, words: int = 80) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def question(words: list[str], options: str = "ABCD", right: str = "B", **texts: str) -> dict:
    literal = str({letter: texts.get(letter, f"text {letter.lower()}") for letter in options})
    return {"instruction": world.INSTRUCTION, "input": f"Q:{' '.join(words)}? \n{literal},",
            "output": f"{right}: {texts.get(right, f'text {right.lower()}')}"}  # fmt: skip


def parts(train: list[dict], held: list[dict] = ()) -> tuple[list, list]:
    return tuple(
        [
            datasets.encode_dataset(
                n, [layouts.to_example(r, f"{n}:{i}") for i, r in enumerate(rows)], encoder(), 4096, texts=True
            )
        ]
        if rows
        else []
        for n, rows in (("train", train), ("held", held))
    )


def jaccard(one: list[str], two: list[str]) -> float:
    """Of the questions' own words: the instruction's runs are shared by all rows."""
    a, b = (set(zip(*(["q", *words][i:] for i in range(5)))) for words in (one, two))
    return len(a & b) / len(a | b)


def changed(words: list[str], *places: int) -> list[str]:
    """The same with another word at each of these places."""
    return [f"other{i}" if i in places else word for i, word in enumerate(words)]


def test_near_duplicates_are_found_and_only_they():
    """Of 77 runs of five words, each changed word replaces five."""
    train, places = [vignette(seed) for seed in range(120)], [(40,), (30, 60), (20, 40, 60), (10, 30, 50, 70)]
    for i, at in enumerate(places):
        train[100 + i] = changed(train[i], *at)
    likeness = [jaccard(train[i], train[100 + i]) for i in range(4)]
    assert likeness == pytest.approx([72 / 82, 67 / 87, 62 / 92, 57 / 97])  # 0.88 0.77 0.67 0.59
    found = look(*parts([question(words) for words in train]))
    assert [(a, b) for a, b, _ in found.alike_pairs] == [("train:100", "train:0"), ("train:101", "train:1")]
    assert [j for _, _, j in found.alike_pairs] == pytest.approx(likeness[:2], abs=0.02)  # "Q:" in front is a word more
    assert found.alike == 2 and found.leaks == found.repeated == found.conflicts == 0


def test_leaks_are_found_whatever_else_is_alike():
    """Three training questions like a held-out one, and each other; and a second held-out one like all of them."""
    train = [vignette(seed) for seed in range(60)]
    held = [vignette(99), changed(train[7], 40), changed(train[7], 10)]
    train[50], train[51] = changed(train[7], 42), [*train[7][:-1], f"{train[7][-1]};"]  # the same words
    found = look(*parts([question(w) for w in train], [question(w) for w in held]))
    pairs = [[(a, b) for a, b, _ in pairs] for pairs in (found.leak_pairs, found.alike_pairs)]
    leaks = [("train:7", "held:1"), ("train:50", "held:1"), ("train:51", "held:1")]
    assert pairs == [leaks, [("train:50", "train:7"), ("train:51", "train:7")]]
    assert (found.leaks, found.alike) == (3, 2)


def test_an_instruction_that_all_rows_share_makes_no_likeness():
    short = [question([f"drug{i}"]) for i in range(30)]  # 10 words of instruction, one of its own
    assert look(*parts(short)).alike == 0


def test_many_copies_cost_no_square(monkeypatch):
    words = vignette(1, 200)
    rows = [question([*words[:i], "other", *words[i + 1 :]]) for i in range(45)]
    (part,), _ = parts([*rows, *(question(vignette(seed)) for seed in range(2, 1000))])
    seen = []
    monkeypatch.setattr(
        duplicates, "jaccard", lambda *args, real=duplicates.jaccard: seen.append(real(*args)) or seen[-1]
    )
    assert look([part]).alike == 44
    assert len(seen) <= 8 * 44 < 44 * 45 / 2


def test_repeated_and_contradicting_rows():
    one, two = vignette(1), vignette(2)
    rows = [
        question(one),
        question(one, right="C"),  # contradicts row 0
        question([w.upper() for w in one]),  # repeats row 0
        question(one, A="text b", B="text a", right="A"),  # row 0's answer under another letter: repeats it
        question(one, B="another", right="B"),  # other options: neither
        {"prompt": " ".join(two), "completion": "Yes"},
        {"prompt": " ".join(two), "completion": "yes "},  # repeats
        {"prompt": " ".join(two), "completion": "No"},  # contradicts
    ]
    found = look(*parts(rows))
    assert [p[:2] for p in found.repeated_pairs] == [
        ("train:2", "train:0"),
        ("train:3", "train:0"),
        ("train:6", "train:5"),
    ]
    assert [p[:2] for p in found.conflict_pairs] == [("train:1", "train:0"), ("train:7", "train:5")]
    assert (found.repeated, found.conflicts, found.alike) == (3, 2, 0)


def test_letters_and_lengths():
    rows = [question(vignette(i), right="ABCD"[i % 8 % 4 if i % 2 else 1]) for i in range(40)]
    found = look(*parts(rows, [question(vignette(77), right="D")]))
    assert found.letters == {"training": {"B": 30, "D": 10}, "held out": {"D": 1}}
    assert found.can_shuffle == 40
    assert sum(found.lengths["training"]) == 40 and sum(found.lengths["held out"]) == 1
    (part,), _ = parts(rows)
    for low, high, n in zip(found.edges, found.edges[1:], found.lengths["training"]):
        assert n == ((low <= part.rows.lengths) & (part.rows.lengths < high)).sum()
    text = str(found)
    assert "right letters of 40 training rows: B 75.0%  D 25.0%" in text
    assert "always B would be right in 75.0% (95% interval 59.8-85.8%)" in text
    assert found.options == {"training": {4: 40}, "held out": {4: 1}} and "number of options: 40 with 4\n" in text
    assert "can move the options of 40 of 40 training rows" in text


def test_rows_without_options_have_no_letters():
    found = look(*parts([{"prompt": "Why?", "completion": "So."}]))
    assert "letters" not in str(found) and "shuffle" not in str(found) and found.rows == {"training": 1}


def test_the_data_command(script, write_rows):
    words = vignette(33)
    train = write_rows([question(vignette(i)) for i in range(20)] + [question(words)], "train.jsonl")
    held = write_rows([question([*words[:40], "secretword", *words[41:]])], "held.jsonl")
    options = ["--model", world.MODEL_DIR, "--dataset", train, "--eval-dataset", held]
    done = script("data.py", *options, "--preview", 1, "--max-length", 4096)
    line = rf"     1  training questions held out too, or almost like one: .*\n +{train}:21  {held}:1  0\.8\d"
    assert re.search(line, done.stdout)
    assert f"--- {train}:1: " in done.stdout and "⟦B: text b<|im_end|>⟧" in done.stdout
    result = script("data.py", *options, "--json", "--max-length", 4096)
    assert json.loads(result.stdout)["leaks"] == 1 and result.stdout.count("\n") == 1
    for text in ("secretword", words[0] + " " + words[1]):  # places, never a text
        assert text not in result.stdout + script("data.py", *options, "--max-length", 4096).stdout
    assert "unknown option '--rank'" in script("data.py", *options, "--rank", 3, expect=2).stderr


def test_without_rensa_all_the_rest_is_looked_at(script, write_rows, monkeypatch):
    train = write_rows([question(vignette(i)) for i in (1, 1, 2)] + [question(vignette(2), right="C")])
    options = ["data.py", "--model", world.MODEL_DIR, "--dataset", train, "--eval-fraction", 0, "--max-length", 4096]
    whole, found = script(*options).stdout, json.loads(script(*options, "--json").stdout)
    assert "'qlora_min[care]'" not in whole and found["alike"] == found["leaks"] == 0
    monkeypatch.setitem(sys.modules, "rensa", None)
    rest = script(*options).stdout
    *same, last = rest.splitlines()
    assert last.startswith("near-duplicates were not looked for") and last.endswith("pip install 'qlora_min[care]'")
    assert same == [line for line in whole.splitlines() if "almost like another" not in line]
    assert json.loads(script(*options, "--json").stdout) == {**found, "alike": None}
    assert found["repeated"] == found["conflicts"] == 1


def test_a_question_that_is_held_out_too_is_a_leak_and_stops_nothing(script, write_rows, monkeypatch):
    """However short it is, and without rensa; training still refuses it."""
    train = write_rows([{"prompt": p, "completion": "So."} for p in ("Why?", "how", "Why?", "When?")], "train.jsonl")
    held = write_rows([{"prompt": " WHY? ", "completion": "No."}], "held.jsonl")
    options = ["--model", world.MODEL_DIR, "--dataset", train, "--eval-dataset", held]
    for missing in (False, True):
        if missing:
            monkeypatch.setitem(sys.modules, "rensa", None)
        found = json.loads(script("data.py", *options, "--json").stdout)
        assert (found["leaks"], found["leak_pairs"]) == (1, [[f"{train}:1", f"{held}:1", 1.0]])
        assert found["rows"] == {"training": 4, "held out": 1} and found["repeated"] == 1
    assert f"{train}:1: the same question is in {held}:1" in script("train.py", *options, expect=2).stderr


# ---------------------------------------------------------------------------------------------------------------------
# data.py --output --drop
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_are_cleaned_and_the_report_then_finds_none(script, write_rows, tmp_path):
    one, two, three = vignette(1), vignette(2), vignette(3)
    rows = [
        question(one),
        question(one, right="C"),  # contradicts row 1
        question(one, right="C"),  # repeats row 2, and contradicts row 1
        question(one),  # repeats row 1
        question(changed(one, 30)),  # alike
        question(changed(one, 30), A="another"),  # the same question as row 5
        question(changed(two, 30)),  # leaks
        question(changed(two, 30), A="another"),  # the same question
        question(two, right="D"),  # is held out
        question(three),
        question(vignette(4, 2000)),  # too long
    ]
    train, held = write_rows(rows, "train.jsonl"), write_rows([question(two)], "held.jsonl")
    data = ["--model", world.MODEL_DIR, "--max-length", 1024, "--eval-dataset", held]
    kept = {
        "repeated": [1, 2, 5, 6, 7, 8, 9, 10],
        "contradicting": [1, 4, 5, 6, 7, 8, 9, 10],
        "alike": [1, 2, 3, 4, 7, 8, 9, 10],
        "leaking": [1, 2, 3, 4, 5, 6, 10],
        "repeated,contradicting,alike,leaking": [1, 10],
    }
    for n, (drop, left) in enumerate(kept.items()):
        done = script("data.py", *data, "--dataset", train, "--output", f"{n}.jsonl", "--drop", drop)
        written = [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()]
        whole = [list(layouts.to_example(rows[i - 1], "").messages) for i in left]
        assert written == [{"messages": messages} for messages in whole]
    assert done.stdout.splitlines()[-1] == (
        "4.jsonl: 2 rows; left out: 2 repeated, 1 contradicting, 2 alike, 3 leaking, 1 too long"
    )
    found = json.loads(script("data.py", *data, "--dataset", "4.jsonl", "--json").stdout)
    assert [found[kind] for kind in ("repeated", "conflicts", "alike", "leaks")] == [0] * 4
    script("train.py", *data, "--dataset", "4.jsonl", "--preview", 1)  # takes the rows: none is held out too


def test_cleaned_rows_are_encoded_as_before(script, write_rows, tmp_path):
    """Of every layout, with systems and answers that carry no loss; unicode, line breaks, options."""
    turns = [("user", "Hi\u2028\n"), ("assistant", "a"), ("user", "q"), ("assistant", "<|im_end|>é b")]
    chat = [{"role": role, "content": text} for role, text in turns]
    rows = [
        {"instruction": "Say.", "input": " x ", "output": "y\n", "system": "Be kind.", "id": 3},
        {"prompt": "p", "completion": "c", "history": [["a", "b"]]},
        {"messages": [chat[0], chat[1] | {"weight": 0}, *chat[2:]]},
        {"messages": [*chat[:2], {"role": "user", "content": "q2", "weight": 0}, chat[3]]},
        {"prompt": chat[:3], "completion": chat[3:]},
        {"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": [{"text": "ja"}]}]},
        question(vignette(5)),
    ]
    script("data.py", "--model", world.MODEL_DIR, "--dataset", write_rows(rows), "--output", "clean.jsonl",
           "--max-length", 4096)  # fmt: skip
    before, after = (list(readers.read(str(tmp_path / name))) for name in ("rows.jsonl", "clean.jsonl"))
    assert len(before) == len(after) == len(rows)
    assert [e.as_row() for e in before] == [e.as_row() for e in after]
    for a, b in zip(*(encoder().encode_examples(examples) for examples in (before, after))):
        assert a.input_ids.tolist() == b.input_ids.tolist() and a.supervised.tolist() == b.supervised.tolist()


def test_tools_and_calls_are_written_as_they_are_read():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [None, 2.5]}}}
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "1+2?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
        {"role": "tool", "content": "3", "name": "add", "tool_call_id": "7"},
        {"role": "assistant", "content": "3", "reasoning_content": "1+2"},
    ]
    example = layouts.to_example({"messages": messages, "tools": json.dumps([call])}, "f:1")
    assert example.as_row() == {"messages": messages, "tools": (call,)}
    assert layouts.to_example(json.loads(json.dumps(example.as_row())), "f:1") == example


def test_what_cannot_be_cleaned_is_said_before_anything_is_read(script, write_rows, tmp_path, monkeypatch):
    rows = write_rows([{"prompt": "p", "completion": "c"}])
    (tmp_path / "there.jsonl").write_text("mine")
    options = ["data.py", "--model", world.MODEL_DIR, "--dataset", rows]
    for words, said in (
        (["--output", "there.jsonl"], "--output there.jsonl: exists, and is never overwritten"),
        (["--output", "no/such.jsonl"], "no/such.jsonl: can't be written; expected a file in a folder that exists"),
        (["--output", "clean.csv"], "expected FILE.jsonl"),
        (["--drop", "alike"], "--drop: it changes no file; name a new one with --output FILE.jsonl"),
        (["--output", "c.jsonl", "--drop", "dupes"], "expected some of repeated,contradicting,alike,leaking"),
        (["--output", "c.jsonl", "--drop", "leaking"], "name the data that rows may leak from with --eval-dataset"),
        (["--output", "c.jsonl", "--drop", "leaking", "--eval-dataset", rows], "no row is left; nothing is written"),
    ):
        done = script(*options, *words, expect=2)
        assert said in done.stderr and done.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "rensa", None)
    done = script(*options, "--output", "c.jsonl", "--drop", "alike", expect=2)
    assert "needs rensa" in done.stderr and "qlora_min[care]" in done.stderr
    assert (tmp_path / "there.jsonl").read_text() == "mine" and not list(tmp_path.glob("*c.jsonl*"))


@pytest.mark.real
def test_real_medqa_leaks_two_questions():
    real = real_tokenizer("QLORA_MIN_SMOLLM2")
    train, held = (
        datasets.encode_dataset(n, readers.read(medqa(n)), real, 512, texts=True) for n in ("train", "validation")
    )
    start = time.perf_counter()
    found = look([train], [held])
    assert time.perf_counter() - start < 30  # 5 s of one core
    assert [(a.split(":")[-1], b.split(":")[-1]) for a, b, _ in found.leak_pairs] == [("1337", "84"), ("2464", "78")]
    assert (found.repeated, found.conflicts, found.alike, found.can_shuffle) == (0, 0, 1, 3374)
