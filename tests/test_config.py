"""Options: their defaults, where they come from, what is refused and in which words."""

import dataclasses
import gc
import itertools
import json
import runpy
import sys

import pytest
from conftest import ROOT

import qlora_min
from qlora_min.cli.main import COMMANDS, main, make_parser, run_script
from qlora_min.cli.options import Parser, add_options, config_options, demo_options, given_options
from qlora_min.config import FIELDS, Config, flag
from qlora_min.run.options import REMOVED, WORDS, config_from, nearest, read_toml

DEFAULTS = {  # the table of the reference configuration, by hand
    "model": "Qwen/Qwen2-0.5B-Instruct",
    "dataset": ("medalpaca/medical_meadow_medqa",),
    "eval_dataset": (),
    "columns": (),
    "eval_fraction": 0.1,
    "chat_template": None,
    "train_on": "all",
    "max_length": 512,
    "limit": None,
    "eval_limit": None,
    "skip_bad_rows": False,
    "shuffle_options": False,
    "mix": (),
    "epochs": 3,
    "max_steps": None,
    "batch_size": 4,
    "grad_accum": 4,
    "learning_rate": 2e-4,
    "schedule": "cosine",
    "warmup_ratio": None,  # 0.03
    "warmup_steps": None,
    "weight_decay": 0,
    "max_grad_norm": 1.0,
    "optimizer": "paged_adamw8bit",
    "seed": 42,
    "rank": 16,
    "alpha": 32,
    "dropout": 0.05,
    "targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rslora": False,
    "adapter": None,
    "quantization": "nf4",
    "precision": "auto",
    "gradient_checkpointing": "auto",
    "micro_batch_tokens": None,  # what fits
    "engine": "auto",
    "shard": False,
    "eval_every": None,  # a quarter of an epoch
    "patience": 3,
    "log_every": 10,
    "report": (),
    "tensorboard": False,
    "save_every": None,
    "save_minutes": 5.0,
    "output_dir": None,  # runs/MODEL-DATASET-TIME
}


def parse(*args: str) -> dict:
    parser = Parser(prog="train.py")
    add_options(parser)
    return given_options(parser.parse_args(args))


def test_defaults_are_the_reference_configuration():
    assert dataclasses.asdict(Config()) == DEFAULTS
    assert Config(**parse()) == Config()


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().rank = 8


# ---------------------------------------------------------------------------------------------------------------------
# Where values come from
# ---------------------------------------------------------------------------------------------------------------------

GIVEN = {  # name -> (on the command line, in TOML, the value)
    "model": ("some/model", '"some/model"', "some/model"),
    "dataset": ("a.jsonl b.csv", '["a.jsonl", "b.csv"]', ("a.jsonl", "b.csv")),
    "eval_dataset": ("e.jsonl", '"e.jsonl"', ("e.jsonl",)),
    "columns": (
        "prompt=frage completion=antwort",
        '{prompt = "frage", completion = "antwort"}',
        ("prompt=frage", "completion=antwort"),
    ),
    "eval_fraction": ("0", "0", 0.0),
    "chat_template": ("chatml", '"chatml"', "chatml"),
    "train_on": ("last", '"last"', "last"),
    "max_length": ("64", "64", 64),
    "limit": ("7", "7", 7),
    "eval_limit": ("8", "8", 8),
    "skip_bad_rows": ("", "true", True),
    "shuffle_options": ("", "true", True),
    "mix": ("2", "[2]", (2.0,)),
    "epochs": ("0.5", "0.5", 0.5),
    "max_steps": ("9", "9", 9),
    "batch_size": ("2", "2", 2),
    "grad_accum": ("1", "1", 1),
    "learning_rate": ("1e-3", "1e-3", 1e-3),
    "schedule": ("linear", '"linear"', "linear"),
    "warmup_ratio": ("0", "0.0", 0.0),
    "warmup_steps": ("0", "0", 0),
    "weight_decay": ("0.1", "0.1", 0.1),
    "max_grad_norm": ("2", "2", 2.0),
    "optimizer": ("adamw", '"adamw"', "adamw"),
    "seed": ("0", "0", 0),
    "rank": ("8", "8", 8),
    "alpha": ("24", "24", 24.0),
    "dropout": ("0", "0", 0.0),
    "targets": ("q_proj,v_proj", '["q_proj", "v_proj"]', ("q_proj", "v_proj")),
    "rslora": ("", "true", True),
    "adapter": ("runs/one/adapter", '"runs/one/adapter"', "runs/one/adapter"),
    "quantization": ("none", '"none"', "none"),
    "precision": ("bf16", '"bf16"', "bf16"),
    "gradient_checkpointing": ("off", "false", "off"),
    "micro_batch_tokens": ("900", "900", 900),
    "engine": ("modules", '"modules"', "modules"),
    "shard": ("", "true", True),
    "eval_every": ("5", "5", 5),
    "patience": ("4", "4", 4),
    "log_every": ("1", "1", 1),
    "report": ("wandb tensorboard", '["wandb", "tensorboard"]', ("wandb", "tensorboard")),
    "tensorboard": ("", "true", True),
    "save_every": ("7", "7", 7),
    "save_minutes": ("0.5", "0.5", 0.5),
    "output_dir": ("runs/x", '"runs/x"', "runs/x"),
}


def test_every_option_is_covered_here():
    assert list(GIVEN) == list(DEFAULTS) == list(FIELDS)


@pytest.mark.parametrize("name", GIVEN)
def test_command_line_and_toml_mean_the_same(tmp_path, name):
    spoken, written, value = GIVEN[name]
    kebab = name.replace("_", "-")
    (tmp_path / "c.toml").write_text(f"{kebab} = {written}\n")
    (tmp_path / "s.toml").write_text(f"{name} = {written}\n")
    options = [parse(f"--{kebab}", *spoken.split()), read_toml(tmp_path / "c.toml"), read_toml(tmp_path / "s.toml")]
    for given in options:
        assert given == {name: value} and type(given[name]) is type(value)
        assert dataclasses.asdict(Config(**given)) == {**DEFAULTS, name: value}
    assert value != DEFAULTS[name]


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    (tmp_path / "c.toml").write_text("rank = 4\nlearning-rate = 1e-3\n")
    c = Config(**{**read_toml(tmp_path / "c.toml"), **parse("--rank", "64")})
    assert (c.rank, c.learning_rate, c.alpha) == (64, 1e-3, 32.0)


def test_train_py_puts_them_in_that_order(tmp_path, monkeypatch, capsys):
    """The script's own way: a bad value of the file is an error, and is none when the command line replaces it."""
    (tmp_path / "c.toml").write_text("rank = 0\n")
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", "c.toml", "--model", "./none", *args])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
        assert end.value.code == 2
        return capsys.readouterr().err

    assert run() == "error: --rank: got 0, expected an integer of at least 1\n"
    assert run("--rank", "8").startswith("error: model './none': no such folder")
    assert not list(tmp_path.glob("runs/*"))


def test_round_trip_through_json():
    given = {name: value for name, (_, _, value) in GIVEN.items() if name != "warmup_steps"}
    for c in (Config(), Config(**{**given, "mix": (2.0, 0.5)})):  # a weight for each of the two data sets
        values = json.loads(json.dumps(c.as_dict()))
        assert list(values) == list(FIELDS)
        assert config_from(values, "config.json") == c
        assert config_from({k.replace("_", "-"): v for k, v in values.items()}, "config.json") == c


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

BAD = [
    ({"dataset": ()}, "--dataset: got '', expected at least one data set"),
    *(
        (
            {"columns": columns},
            f"--columns: got {','.join(columns)!r}, expected FIELD=COLUMN, one each of messages, "
            "prompt, input, completion, system, history, tools",
        )
        for columns in (("frage",), ("frage=prompt",), ("prompt=",), ("prompt=a", "prompt=b"))
    ),
    ({"eval_fraction": 1.0}, "--eval-fraction: got 1.0, expected a number in [0, 1)"),
    ({"eval_fraction": -0.1}, "--eval-fraction: got -0.1, expected a number in [0, 1)"),
    ({"train_on": "first"}, "--train-on: got 'first', expected one of all, last"),
    ({"max_length": 0}, "--max-length: got 0, expected an integer of at least 1"),
    ({"limit": 0}, "--limit: got 0, expected an integer of at least 1"),
    ({"eval_limit": -1}, "--eval-limit: got -1, expected an integer of at least 1"),
    ({"mix": (1.0, 0.0)}, "--mix: got '1.0,0.0', expected numbers above 0"),
    ({"mix": (float("inf"),)}, "--mix: got 'inf', expected numbers above 0"),
    ({"mix": (2.0, 1.0)}, "--mix: got 2 weights, expected 1, one for each data set of --dataset"),
    ({"epochs": 0.0}, "--epochs: got 0.0, expected a number above 0"),
    ({"epochs": float("inf")}, "--epochs: got inf, expected a number above 0"),
    ({"max_steps": 0}, "--max-steps: got 0, expected an integer of at least 1"),
    ({"batch_size": 0}, "--batch-size: got 0, expected an integer of at least 1"),
    ({"grad_accum": 0}, "--grad-accum: got 0, expected an integer of at least 1"),
    ({"micro_batch_tokens": 0}, "--micro-batch-tokens: got 0, expected an integer of at least 1"),
    ({"learning_rate": 0.0}, "--learning-rate: got 0.0, expected a number above 0"),
    ({"learning_rate": float("nan")}, "--learning-rate: got nan, expected a number above 0"),
    ({"schedule": "step"}, "--schedule: got 'step', expected one of cosine, linear, constant"),
    ({"warmup_ratio": 1.0}, "--warmup-ratio: got 1.0, expected a number in [0, 1)"),
    ({"warmup_steps": -1}, "--warmup-steps: got -1, expected a number of at least 0"),
    ({"weight_decay": -1e-9}, "--weight-decay: got -1e-09, expected a number of at least 0"),
    ({"weight_decay": float("inf")}, "--weight-decay: got inf, expected a number of at least 0"),
    ({"max_grad_norm": 0.0}, "--max-grad-norm: got 0.0, expected a number above 0"),
    ({"optimizer": "sgd"}, "--optimizer: got 'sgd', expected one of paged_adamw8bit, adamw"),
    ({"rank": 0}, "--rank: got 0, expected an integer of at least 1"),
    ({"alpha": 0.0}, "--alpha: got 0.0, expected a number above 0"),
    ({"dropout": 1.0}, "--dropout: got 1.0, expected a number in [0, 1)"),
    ({"dropout": float("nan")}, "--dropout: got nan, expected a number in [0, 1)"),
    ({"targets": ()}, "--targets: got '', expected at least one name"),
    ({"quantization": "int8"}, "--quantization: got 'int8', expected one of nf4, fp4, none"),
    ({"precision": "tf32"}, "--precision: got 'tf32', expected one of auto, bf16, fp16, fp32"),
    ({"gradient_checkpointing": "yes"}, "--gradient-checkpointing: got 'yes', expected one of auto, on, off"),
    ({"engine": "packed"}, "--engine: got 'packed', expected one of auto, modules, fused"),
    ({"eval_every": 0}, "--eval-every: got 0, expected an integer of at least 1"),
    ({"patience": 0}, "--patience: got 0, expected an integer of at least 1"),
    ({"log_every": 0}, "--log-every: got 0, expected an integer of at least 1"),
    ({"report": ("wandb", "mlflow")}, "--report: got 'wandb,mlflow', expected tensorboard, wandb or both"),
    ({"save_every": 0}, "--save-every: got 0, expected an integer of at least 1"),
    ({"save_minutes": -1.0}, "--save-minutes: got -1.0, expected a number of at least 0"),
    ({"seed": -1}, "--seed: got -1, expected from 0 to 2**32 - 1"),
    ({"seed": 2**32}, "--seed: got 4294967296, expected from 0 to 2**32 - 1"),
]


@pytest.mark.parametrize("values, message", BAD, ids=[f"{k}={v}" for values, _ in BAD for k, v in values.items()])
def test_a_bad_value_is_one_line_with_option_value_and_expectation(values, message):
    with pytest.raises(ValueError) as error:
        Config(**values)
    assert str(error.value) == message


def test_a_warm_up_is_a_fraction_or_steps():
    """Even where the fraction is the default; but the demo's own gives way."""
    with pytest.raises(ValueError, match=r"^--warmup-ratio and --warmup-steps: got both, expected one of them$"):
        Config(warmup_ratio=0.03, warmup_steps=5)
    parser = Parser(prog="train.py")
    demo_options(parser, "")
    add_options(parser)
    for words, ratio, steps in ((["--warmup-steps", "5"], None, 5), (["--warmup-ratio", "0.1"], 0.1, None)):
        config = Config(**config_options(parser.parse_args(["--demo", *words])))
        assert (config.warmup_ratio, config.warmup_steps) == (ratio, steps)


def test_every_option_with_a_check_has_a_bad_value_here():
    checked = {name for name, f in FIELDS.items() if f.metadata["check"]}
    assert checked == {name for values, _ in BAD for name in values}
    assert all(FIELDS[name].metadata["expected"] for name in checked)


@pytest.mark.parametrize(
    "written, message",
    [
        ("rank = true", "option 'rank': got True, expected int"),
        ("seed = true", "option 'seed': got True, expected int"),
        ("rank = 1.5", "option 'rank': got 1.5, expected int"),
        ('rank = "16"', "option 'rank': got '16', expected int"),
        ("rank = nan", "option 'rank': got nan, expected int"),
        ("rank = inf", "option 'rank': got inf, expected int"),
        ("max-steps = [1]", r"option 'max-steps': got \[1\], expected .*int"),
        ("epochs = false", "option 'epochs': got False, expected float"),
        ('learning-rate = "2e-4"', "option 'learning-rate': got '2e-4', expected float"),
        ("model = 3", "option 'model': got 3, expected str"),
        ("output-dir = true", "option 'output-dir': got True, expected .*str"),
        ('mix = ["2", 1]', r"option 'mix': got \['2', 1\], expected list of numbers"),
        ("mix = [true]", r"option 'mix': got \[True\], expected list of numbers"),
        ("targets = [1, 2]", r"option 'targets': got \[1, 2\], expected list"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, written, message):
    path = tmp_path / "c.toml"
    path.write_text(written)
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        read_toml(path)


def test_conversions_that_lose_nothing(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('rank = 8.0\nalpha = 16\ngradient-checkpointing = true\ntargets = "q_proj, k_proj,"\n')
    assert read_toml(path) == {
        "rank": 8, "alpha": 16.0, "gradient_checkpointing": "on", "targets": ("q_proj", "k_proj")
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong, meant",
    [
        ("learning-rat", "learning_rate"),
        ("learning_rates", "learning_rate"),
        ("batchsize", "batch_size"),
        ("ranks", "rank"),
        ("data-set", "dataset"),
        ("lr", "learning_rate"),
        ("lrate", "learning_rate"),
        ("lora-alpha", "alpha"),
        ("r", "rank"),
        ("num_train_epochs", "epochs"),
        ("per_device_train_batch_size", "batch_size"),
        ("gradient-accumulation-steps", "grad_accum"),
        ("max_seq_length", "max_length"),
        ("target_modules", "targets"),
        ("optim", "optimizer"),
        ("gradient_clipping", "max_grad_norm"),
        ("deepspeed", "shard"),
        ("train_file", "dataset"),
        ("model_name_or_path", "model"),
    ],
)
def test_an_unknown_name_suggests_what_means_the_same_or_the_nearest(tmp_path, capsys, wrong, meant):
    path = tmp_path / "c.toml"
    path.write_text(f"{wrong} = 1")
    with pytest.raises(ValueError, match=f"^{path}: unknown option '{wrong}', did you mean {meant}\\?$"):
        read_toml(path)
    for given in ([f"--{wrong}", "1"], [f"--{wrong}=1"]):
        with pytest.raises(SystemExit) as end:
            parse(*given)
        assert end.value.code == 2
        assert capsys.readouterr().err == (
            f"error: unknown option '--{wrong}', did you mean {flag(meant)}? (see --help)\n"
        )
    with pytest.raises(ValueError, match=f"^train: unknown option '{wrong}', did you mean {meant}\\?$"):
        qlora_min.train(**{wrong: 1})


def test_a_word_may_mean_an_option_with_a_value(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("load_in_4bit = true")
    with pytest.raises(ValueError, match=r"did you mean quantization = \"nf4\"\?$"):
        read_toml(tmp_path / "c.toml")
    with pytest.raises(SystemExit):
        parse("--bf16")
    assert "'--bf16', did you mean --precision bf16?" in capsys.readouterr().err


SIMILAR = {  # words that their spelling leads from
    "max_steps": "max_train_steps",
    "batch_size": "train_batch_size micro_batch_size",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "warmup_steps": "num_warmup_steps",
    "optimizer": "optim",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules lora_target",
    "rslora": "use_rslora",
    "gradient_checkpointing": "use_gradient_checkpointing",
    "report": "report_to",
    "max_new_tokens": "max_tokens",
}


def test_the_words_of_others_are_not_our_own_and_lead_to_options():
    options = {name: {s for a in make_parser(name)._actions for s in a.option_strings} for name in COMMANDS}
    for word, some in itertools.product(WORDS[""].split(), options.values()):
        assert nearest(flag(word), sorted(some)) == "", word
    for meant, words in ({k: words for k, words in WORDS.items() if k} | SIMILAR).items():
        option, _, value = meant.partition(" ")
        having = [some for some in options.values() if flag(option) in some]
        assert having, meant
        for word, some in itertools.product(words.split(), having):
            if flag(word) not in some:
                assert nearest(word, sorted(some)) == f", did you mean {flag(option)} {value}".rstrip() + "?"
        assert not {*words.split()} & {*FIELDS} - {"max_length"}
    assert nearest("--max_tokens", sorted(options["chat"])) == ", did you mean --max-new-tokens?"
    assert nearest("--temprature", sorted(options["chat"])) == ", did you mean --temperature?"


@pytest.mark.parametrize("value", ["off", "auto", "on"])
def test_a_removed_option_is_answered_with_what_there_is_instead(tmp_path, capsys, value):
    (tmp_path / "c.toml").write_text(f'packing = "{value}"\n')
    with pytest.raises(SystemExit) as end:
        run_script(lambda: read_toml(tmp_path / "c.toml"))
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'c.toml'}: option 'packing' was removed: --engine modules|fused\n"
    )
    for given in (["--packing", value], [f"--packing={value}"], ["--rank", "8", "--packing"]):
        with pytest.raises(SystemExit) as end:
            parse(*given)
        assert end.value.code == 2
        assert capsys.readouterr().err == "error: --packing: removed: --engine modules|fused (see --help)\n"
    with pytest.raises(TypeError, match="packing"):
        Config(packing=value)


def test_removed_options_of_an_earlier_versions_record_are_dropped():
    """So that its runs are still evaluated, merged, chatted with and reported on."""
    assert not set(REMOVED) & set(FIELDS)
    old = {**Config(rank=8).as_dict(), **dict.fromkeys(REMOVED, "off")}
    del old["engine"]
    assert config_from(old, "config.json") == Config(rank=8)
    with pytest.raises(ValueError, match="unknown option 'pakcing'"):
        config_from({"pakcing": "off"}, "config.json")


def test_a_name_like_no_other_gets_no_suggestion(tmp_path, capsys):
    path = tmp_path / "c.toml"
    path.write_text("zzzzzz = 1")
    with pytest.raises(ValueError, match=r"unknown option 'zzzzzz'$"):
        read_toml(path)
    with pytest.raises(SystemExit):
        parse("--zzzzzz", "1")
    assert capsys.readouterr().err == "error: unknown option '--zzzzzz' (see --help)\n"


@pytest.mark.parametrize(
    "args, parts",
    [
        (["--rank", "eight"], ["--rank", "'eight'", "int"]),
        (["--rank", "1.5"], ["--rank", "'1.5'", "int"]),
        (["--learning-rate", "fast"], ["--learning-rate", "'fast'", "float"]),
        (["--rank"], ["--rank", "expected one argument"]),
        (["--dataset"], ["--dataset", "expected at least one argument"]),
        (["--precision", "fp8"], ["--precision", "'fp8'", "fp16"]),
        (["stray"], ["unknown option 'stray'"]),
        (["--rank=8", "--learn", "1"], ["unknown option '--learn'"]),  # no abbreviations: `--l` could be anything
    ],
)
def test_what_argparse_refuses_is_one_line_too(capsys, args, parts):
    with pytest.raises(SystemExit) as end:
        parse(*args)
    out = capsys.readouterr()
    assert end.value.code == 2 and out.out == ""
    assert out.err.startswith("error: ") and out.err.count("\n") == 1
    assert all(part in out.err for part in parts), out.err


def test_toml_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"--config .*none.toml: can't be read \(No such file or directory\)"):
        read_toml(str(tmp_path / "none.toml"))
    for content in (b"rank = ", b"rank 8", b"\xff\xfe"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ValueError, match=r"--config .*bad.toml: not valid TOML"):
            read_toml(str(tmp_path / "bad.toml"))
    (tmp_path / "mark.toml").write_bytes(b"\xef\xbb\xbfrank = 8\n")  # as Windows' editor saves it
    assert read_toml(str(tmp_path / "mark.toml")) == {"rank": 8}
    (tmp_path / "table.toml").write_text("[lora]\nrank = 8\n")
    with pytest.raises(ValueError, match="unknown option 'lora'"):
        read_toml(str(tmp_path / "table.toml"))


def test_help_shows_every_option_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for name, default in DEFAULTS.items():
        assert f"--{name.replace('_', '-')} " in text
        if default not in (None, ()):
            assert f"[{','.join(default) if isinstance(default, tuple) else FIELDS[name].default}]" in text


def test_run_script_turns_a_users_error_into_one_line(capsys):
    def main():
        raise ValueError("--rank: got 0,\n  expected more")

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --rank: got 0, expected more\n"
    with pytest.raises(SystemExit) as end:
        run_script(lambda: None)
    assert end.value.code == 0
    with pytest.raises(ZeroDivisionError):  # our own mistakes keep their traceback
        run_script(lambda: 1 / 0)


def test_what_is_imported_is_not_searched_for_garbage(monkeypatch, capsys):
    """While rows are read, each such pass would take 0.2 s."""
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append("torch" in sys.modules))
    monkeypatch.setattr(sys, "argv", ["qlora-min", "train", "--demo", "--preview", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0 and frozen == [True]


def test_a_whole_number_from_python_is_the_float_that_the_command_line_gives():
    assert repr(Config(epochs=1).as_dict()) == repr(Config(epochs=1.0).as_dict())
