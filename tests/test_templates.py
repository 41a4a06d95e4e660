"""Chat templates of twelve public forms: what is trained on is what a server renders, and answers begin where its
prompt ends. The templates are short ones of each form; the tokenizer is the demo's, with the form's control tokens."""

import copy
import datetime
import itertools
import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import assert_same
from safetensors.torch import load_file
from test_training import make  # noqa: F401

from qlora_min.adapter import WEIGHTS, load_adapter
from qlora_min.base import load_encoder
from qlora_min.chat import ChatEncoder
from qlora_min.data import templates
from qlora_min.data.examples import BadRow, Example
from qlora_min.data.templates import NOT_A_PROMPT, named_template
from qlora_min.demo import world
from qlora_min.run.datasets import data_hash, evaluation_data
from qlora_min.run.resume import run_config
from qlora_min.run.trainer import Trainer

ASK = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
LLAMA = "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
# name -> (template, its control tokens). bos and eos are those of each form.
FORMS = {
    "chatml": (CHATML, "<|im_start|> <|im_end|>"),
    "qwen2.5": (
        "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
        "{% if tools %}{{ '# Tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{% endif %}"
        "{% for m in messages %}{% if m.role in ('user', 'assistant') and not m.tool_calls %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}"
        "{% if m.content %}{{ '\n' + m.content }}{% endif %}"
        "{% for c in m.tool_calls %}{% set c = c.function %}"
        "{{ '\n<tool_call>\n{\"name\": \"' + c.name + '\", \"arguments\": ' + c.arguments | tojson + '}' }}"
        "{{ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response>"
        "<|im_end|>\n' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|> <|im_end|>",
    ),
    "qwen3": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set thought = '' %}{% set content = m.content %}"
        "{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{% if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + content }}"
        "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|> <|im_end|>",
    ),
    "r1": (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' }}{% endif %}{% endfor %}"
        + ASK + "{{ '<|Assistant|><think>\n' }}{% endif %}",
        "<s> <|User|> <|Assistant|> <|eos|>",
    ),
    "llama2": (
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for m in rest %}{% if loop.first and system %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}{% else %}{% set content = m.content %}"
        "{% endif %}{% if m.role == 'user' %}{{ '<s>[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' </s>' }}{% endif %}{% endfor %}",
        "<s> </s>",
    ),
    "llama3.1": (
        "{{ '<|begin_of_text|>' }}{% for m in messages %}" + LLAMA + "{% endfor %}"
        + ASK + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
    ),
    "mistral, old": (  # the system message before the last question
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
        "{% else %}{% set rest = messages %}{% endif %}"
        "{% set last = (rest | selectattr('role', 'eq', 'user') | list)[-1] %}"
        "{{ '<s>' }}{% for m in rest %}{% if m.role == 'user' %}{% if m == last and system is defined %}"
        "{{ '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}{% else %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% endif %}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
        "<s> </s> [INST] [/INST]",
    ),
    "mistral, new": (
        "{{ '<s>' }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}"
        "{% endfor %}",
        "<s> </s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT]",
    ),
    "gemma": (
        "{{ '<bos>' }}"
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim + '<end_of_turn>\n' }}{% endfor %}" + ASK + "{{ '<start_of_turn>model\n' }}{% endif %}",
        "<bos> <start_of_turn> <end_of_turn>",
    ),
    "phi-3": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        + ASK + "{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}",
        "<|user|> <|assistant|> <|system|> <|end|> <|endoftext|>",
    ),
    "smollm3": (
        "{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|> <|im_end|>",
    ),
    "granite": (
        "{% if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>Today is ' "
        "+ strftime_now(\"%B %d, %Y\") + '.<|end_of_text|>\n' }}{% endif %}"
        "{% for m in messages %}"
        "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}{% endfor %}"
        + ASK + "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        "<|start_of_role|> <|end_of_role|> <|end_of_text|>",
    ),
}  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
ONE = [{"role": "user", "content": " Which unit measures force?"}, {"role": "assistant", "content": "Newton"}]
TWO = [*ONE, {"role": "user", "content": "And <|im_end|> or </s>?"}, {"role": "assistant", "content": "Joule\n"}]
END = {"llama2": " </s>", "llama3.1": "<|eot_id|>", "mistral, old": "</s>", "mistral, new": "</s>", "phi-3": "<|end|>",
       "gemma": "<end_of_turn>", "granite": "<|end_of_text|>", "r1": "<|eos|>"}  # fmt: skip
TRIMS, SPACE, NO_THOUGHT = ("llama2", "llama3.1", "gemma"), ("llama2", "mistral, old"), "<think>\n\n</think>\n\n"
ANSWERED = [name for name in FORMS if name != "r1"]


@cache
def encoder(name: str, date: str | None = None, train_on: str = "all") -> ChatEncoder:
    template, control = FORMS[name]
    tokenizer = copy.deepcopy(load_encoder(str(world.MODEL_DIR)).tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": control.split()})
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer, train_on, date)


def learned(found: ChatEncoder, messages: list[dict]) -> list[str]:
    """The supervised texts, in order."""
    ids, supervised = found.encode(messages)
    groups = itertools.groupby(zip(ids, supervised), key=lambda pair: pair[1])
    return [found.tokenizer.decode([i for i, _ in group]) for learns, group in groups if learns]


def answers(name: str, *texts: str) -> list[str]:
    end = END.get(name, "<|im_end|>")
    return [f"{' ' * (name in SPACE)}{t.strip() if name in TRIMS else t}{end}" for t in texts]


@pytest.mark.parametrize("name", ANSWERED)
@pytest.mark.parametrize("messages", [ONE, TWO, [SYSTEM, *ONE], [SYSTEM, *TWO]], ids=["one", "two", "system", "both"])
def test_a_row_is_the_templates_text_and_its_prompt_the_servers(name, messages):
    found = encoder(name)
    if name == "gemma" and messages[0] == SYSTEM:
        with pytest.raises(ValueError, match=r"refuses the roles system, user, assistant.*: System role not supported"):
            found.encode(messages)
        return
    ids, _ = found.encode(messages)
    whole = found.tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(text := found.tokenizer.decode(ids))
    assert whole[len(text) :].strip() in ("", "<|endoftext|>")
    prompt = found.prompt(messages[:-1])
    assert found.tokenizer.decode(prompt) == found.tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert ids[: len(prompt)] == prompt

    expected = [m["content"] for m in messages if m["role"] == "assistant"]
    if name == "qwen3":  # the last answer's block is the template's, and behind the server's prompt
        expected[-1] = NO_THOUGHT + expected[-1]
    if name == "mistral, old" and messages == [
        SYSTEM,
        *TWO,
    ]:  # asked the first question, a server gives the system first
        expected = expected[1:]
    assert learned(found, messages) == answers(name, *expected)


@pytest.mark.parametrize("name", FORMS)
def test_the_ids_are_the_templates_own(name):
    """Where no text spells a control token, and nothing merges where an answer begins."""
    found, messages = (
        encoder(name),
        [*ONE, {"role": "user", "content": "Energy?"}, {"role": "assistant", "content": "J"}],
    )
    prompt = found.tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True, return_dict=False)
    assert found.prompt(messages[:3]) == prompt
    if name != "r1":
        ids, _ = found.encode(messages)
        assert ids == found.tokenizer.apply_chat_template(messages, return_dict=False)[: len(ids)]


def test_a_template_that_asks_with_a_think_block_and_shows_none():
    """R1's: no answer of a row begins where a server's prompt ends."""
    (row,) = encoder("r1").encode_examples([Example(tuple(ONE), "f:1")])
    assert isinstance(row, BadRow)
    assert str(row) == f"f:1: no answer carries a loss: {NOT_A_PROMPT}"


def test_answers_without_a_loss_are_counted():
    found = encoder("mistral, old")
    found.template.notes.clear()
    found.encode([SYSTEM, *TWO])
    assert found.template.notes == {f"answers carry no loss: {NOT_A_PROMPT}": 1}


def test_the_rows_own_think_block_is_the_only_one():
    messages = [ONE[0], {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nNewton"}]
    assert learned(encoder("qwen3"), messages) == ["<think>\nEasy.\n</think>\n\nNewton<|im_end|>"]


def test_think_blocks_that_the_template_removes_are_named():
    found = encoder("qwen3")
    found.template.notes.clear()
    thoughtful = {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nNewton"}
    assert learned(found, [ONE[0], thoughtful, *TWO[2:]]) == ["Newton<|im_end|>", NO_THOUGHT + "Joule\n<|im_end|>"]
    assert found.template.notes == {"think blocks are left out: the chat template removes them": 1}


def test_no_form_lets_a_text_become_a_control_token():
    for name in ANSWERED:
        found = encoder(name)
        spelled = "".join(FORMS[name][1].split()) + "</s" + "<|im_end|>"
        clean = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        hostile = [{"role": "user", "content": spelled}, {"role": "assistant", "content": f"y{spelled}y"}]
        counts = [sum(i in found.special_ids for i in found.encode(messages)[0]) for messages in (clean, hostile)]
        assert counts[0] == counts[1], name
        assert spelled in found.tokenizer.decode(found.prompt(hostile[:1])), name


def test_train_on_last():
    assert learned(encoder("chatml", train_on="last"), TWO) == ["Joule\n<|im_end|>"]


def test_answers_of_weight_0_carry_no_loss():
    found = encoder("chatml")
    (row,) = found.encode_examples([Example(tuple(TWO), "f:1", unlearned=(1,))])
    assert found.tokenizer.decode(row.input_ids[row.supervised]) == "Joule\n<|im_end|>"
    (row,) = found.encode_examples([Example(tuple(TWO), "f:1", unlearned=(1, 3))])
    assert str(row) == "f:1: no answer carries a loss"


# ---------------------------------------------------------------------------------------------------------------------
# The date
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, shown", [("smollm3", "05 March 2026"), ("granite", "March 05, 2026")])
def test_the_date_that_a_run_saw_is_kept(name, shown):
    then = encoder(name, "2026-03-05")
    assert then.template.date == "2026-03-05"
    assert shown in then.tokenizer.decode(then.encode(ONE)[0])
    today = encoder(name)
    assert today.template.date == datetime.date.today().isoformat()
    now = today.tokenizer.apply_chat_template(ONE[:1], add_generation_prompt=True, return_dict=False)
    assert today.prompt(ONE[:1]) == now != then.prompt(ONE[:1])
    assert encoder("chatml", "2026-03-05").template.date is None


def test_the_date_changes_nothing_else_of_a_template():
    """Line breaks and blanks at its beginning, which the macro for the date stands before."""
    for begins in ("", "\n", "\n\n", "  ", "  {% if true %}\n", "{#- x -#}\n"):
        body = begins + "{{ strftime_now('%Y') }}" + CHATML + ("{% endif %}" if "{% if" in begins else "")
        tokenizer = copy.deepcopy(encoder("chatml").tokenizer)
        tokenizer.chat_template = body
        ours = ChatEncoder(tokenizer).template.render(ONE)
        assert ours == tokenizer.apply_chat_template(ONE, tokenize=False), repr(begins)


class Friday(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return cls(2026, 3, 6)


@pytest.fixture
def dated(tmp_path, monkeypatch) -> Path:
    """The demo's model with a template that shows the day's date; it is Thursday, the 5th of March 2026."""
    folder = Path(shutil.copytree(world.MODEL_DIR, tmp_path / "dated"))
    template = "{{ '<|im_start|>system\nToday is ' + strftime_now('%A') + '<|im_end|>\n' }}" + CHATML
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    thursday = type("Thursday", (Friday,), {"today": lambda: Friday(2026, 3, 5)})
    monkeypatch.setattr(templates, "datetime", SimpleNamespace(date=thursday))
    return folder


def test_a_run_keeps_its_date(dated, make, monkeypatch, capsys):  # noqa: F811
    trainer = make("run", 6, 4, model=str(dated), epochs=4, save_every=1, eval_every=1)
    copied = trainer.folder.with_name("copied")

    def copy_at_step_2(event: dict) -> None:
        if event["event"] == "eval" and event["step"] == 2:
            shutil.copytree(trainer.folder, copied)

    trainer.writer.metrics.echo = copy_at_step_2
    assert "Today is Thursday" in trainer.base.encoder.tokenizer.decode(trainer.held_out[0].input_ids)
    trainer.train()
    assert json.loads((trainer.folder / "config.json").read_text())["date"] == "2026-03-05"
    assert json.loads((trainer.folder / "adapter" / "qlora_min.json").read_text())["date"] == "2026-03-05"
    assert "in training that was 2026-03-05" in (trainer.folder / "adapter" / "README.md").read_text()

    monkeypatch.setattr(templates, "datetime", SimpleNamespace(date=Friday))
    (held,) = evaluation_data(trainer.folder / "adapter", None, None, None)
    assert data_hash(held.rows) == data_hash(trainer.held_out)
    resumed = Trainer(*run_config(str(copied), {}))
    resumed.train()
    assert "Today is Thursday" in (copied / "samples.jsonl").read_text()
    assert_same(load_file(copied / "adapter" / WEIGHTS), load_file(trainer.folder / "adapter" / WEIGHTS))
    asked = load_adapter(copied / "adapter").encoder
    assert "Today is Friday" in asked.tokenizer.decode(asked.prompt(ONE[:1]))  # in a chat, as a server does


# ---------------------------------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "force"}'}}
CALLED = (
    ONE[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "a unit"},
    ONE[1],
)


def test_tool_calls_are_learned_as_the_template_renders_them():
    found = encoder("qwen2.5")
    (row,) = found.encode_examples([Example(CALLED, "f:1", (TOOL,))])
    groups = itertools.groupby(zip(row.input_ids.tolist(), row.supervised.tolist()), key=lambda pair: pair[1])
    texts = [found.tokenizer.decode([i for i, _ in group]) for learns, group in groups if learns]
    # The generation prompt ends in a line break, with which this template lets a call begin.
    call = '<tool_call>\n{"name": "look_up", "arguments": {"word": "force"}}\n</tool_call><|im_end|>'
    assert texts == [call, "Newton<|im_end|>"]


@pytest.mark.parametrize(
    "messages, tools", [(CALLED, (TOOL,)), (ONE, (TOOL,)), ((ONE[0], {**CALLED[1], "content": "x"}), ())]
)
def test_a_template_that_renders_no_tools(messages, tools):
    (row,) = encoder("chatml").encode_examples([Example(tuple(messages), "f:1", tools)])
    assert isinstance(row, BadRow) and "f:1: " in str(row) and "tool" in str(row)


# ---------------------------------------------------------------------------------------------------------------------
# Templates by name
# ---------------------------------------------------------------------------------------------------------------------


def test_chatml_by_name(tmp_path):
    plain = encoder("chatml").tokenizer
    assert plain.apply_chat_template(TWO, chat_template=named_template("chatml", plain), tokenize=False) == (
        plain.apply_chat_template(TWO, tokenize=False)
    )
    (tmp_path / "own.jinja").write_text("\ufeff" + CHATML, encoding="utf-8")
    assert named_template(str(tmp_path / "own.jinja"), plain) == CHATML
    with pytest.raises(ValueError, match=r"--chat-template alpaca: can't be read .No such file.*expected.*or chatml"):
        named_template("alpaca", plain)


def test_a_base_without_a_template(tmp_path, make, script):  # noqa: F811
    base = Path(shutil.copytree(world.MODEL_DIR, tmp_path / "base", ignore=lambda *_: ["chat_template.jinja"]))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    with pytest.raises(ValueError, match=r"no chat template; use an instruction-tuned model, or --chat-template"):
        make("none", model=str(base))
    trainer = make("run", 6, 4, model=str(base), chat_template="chatml", max_steps=1)
    trainer.train()
    assert trainer.folder.joinpath("adapter", "chat_template.jinja").read_text() == templates.CHATML
    script("merge.py", "--adapter", trainer.folder / "adapter", "--output-dir", tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == templates.CHATML
