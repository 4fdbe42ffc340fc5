"""Talking to models that write what they are told to: the token that follows depends on the last one alone."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gpt.answers import answer
from gpt.chat import FORMAT, Message, encode_prompt
from gpt.model import GPT, load_model, save_model
from gpt.settings import PRESETS, GPTConfig
from gpt.tokenizer import byte_tokenizer
from pipelines.artifacts import Model
from pipelines.cli import app
from pipelines.serve.chat import Chat, choose, talk
from pipelines.stage import StageFailure
from pipelines.store.action import Action
from pipelines.store.store import Store

TOKENIZER = byte_tokenizer()
ASSISTANT, END = TOKENIZER.special["assistant"], TOKENIZER.special["end"]
MOON = [*"月é!".encode(), END]


def after_the_last(following: Sequence[int], seq_len: int) -> GPT:
    """After <|assistant|> its likeliest token is following[0], after that following[1] and so on; each may stand there once."""
    config = GPTConfig(**{**PRESETS["gpt2-nano"].model_dump(), "seq_len": seq_len, "tied": False}, vocab_size=TOKENIZER.vocab_size)
    model = GPT(config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.weight.fill_(1.0)
        for place, (last, token_id) in enumerate(zip([ASSISTANT, *following], following, strict=False)):
            model.token_embedding.weight[last, place] = 10.0
            model.output.weight[token_id, place] = 1.0
    return model


def random_model() -> GPT:
    config = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=TOKENIZER.vocab_size)
    return GPT(config, torch.Generator().manual_seed(1))


def publish(store: Store, model: GPT, **metadata: Any) -> Model:
    folder = store.new_folder()
    save_model(folder, model.config, dict(model.named_parameters()))
    TOKENIZER.save(folder / "tokenizer.json")
    made = store.publish(folder, "model", {"role": "policy", "tokenizer": "0", "steps": 300, "chat_format": FORMAT, **metadata})
    assert isinstance(made, Model)
    return made


@pytest.fixture
def moon(store: Store) -> Model:
    return publish(store, after_the_last(MOON, 64))


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that the model is given; it answers "ab", cut off where that is too long."""
    seen: list[list[int]] = []

    def scripted(model: GPT, prompt: list[int], *, max_tokens: int, **settings: Any) -> Iterator[int]:
        seen.append(prompt)
        yield from [*b"ab", END][:max_tokens]

    monkeypatch.setattr("gpt.sampling.sample_stream", scripted)
    return seen


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def chat_with(model: Model, **settings: Any) -> Chat:
    return Chat(model, **{"system": "", "tokens": 20, "temperature": 0.0, "seed": 0, **settings})


def ask(store: Store, lines: str | bytes, *options: str) -> Any:
    return CliRunner().invoke(app, ["chat", "--store", str(store.root), *options], input=lines)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def type_in(chat: Chat, monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> tuple[bool, str, str]:
    """Talk on a terminal, where each line is typed or Ctrl-C is pressed (KeyboardInterrupt); it ends with Ctrl-D."""
    waiting = iter(lines)

    def typed(prompt: str) -> str:
        line = next(waiting, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    stdout, stderr = Terminal(), io.StringIO()
    answered = talk(chat, Terminal(), stdout, stderr)
    return answered, stdout.getvalue(), stderr.getvalue()


# ---- answers ----


def test_piped_lines_are_questions_and_the_answers_alone_go_to_stdout(store: Store, moon: Model):
    found = ask(store, "len?\n\n  \nand?", f"sha256:{moon.digest}")
    assert found.exit_code == 0
    assert found.stdout == "月é!\n月é!\n"
    assert found.stderr == f"model {moon.digest[:12]}, 300 steps\n"


def test_a_character_comes_out_once_its_last_token_is_there(moon: Model):
    assert list(chat_with(moon).answer("?")) == ["", "", "月", "", "é", "!"]


def test_an_answer_is_the_one_that_evaluate_counts(store: Store):
    model = publish(store, random_model())
    chat = chat_with(model, tokens=8)
    [counted] = answer(load_model(model.path), TOKENIZER, [[user("a")]], seed=0, name="eval", max_tokens=8, temperature=0.0)
    assert counted.text
    assert "".join(chat.answer("a")) == counted.text


def test_above_temperature_0_a_seed_gives_the_same_conversation_and_another_seed_another(store: Store):
    model = publish(store, random_model())

    def conversation(seed: int) -> list[Message]:
        chat = chat_with(model, temperature=1.0, seed=seed, tokens=4)
        for question in ("a", "b"):
            list(chat.answer(question))
        return chat.turns

    assert conversation(1) == conversation(1)
    assert conversation(1) != conversation(2)


def test_control_characters_are_shown_and_the_conversation_keeps_them_as_they_are(store: Store):
    chat = chat_with(publish(store, after_the_last([27, *b"[2J\x07", END], 64)))
    assert "".join(chat.answer("?")) == "\N{SYMBOL FOR ESCAPE}[2J\N{SYMBOL FOR BELL}"
    assert chat.turns == [user("?"), assistant("\x1b[2J\x07")]


def test_an_answer_without_an_end_is_said_to_be_cut_off_and_why(store: Store):
    model = publish(store, after_the_last([*b"abab"], 16))
    found = ask(store, "0123456\n", f"sha256:{model.digest}", "--tokens", "4")
    assert found.stdout == "abab\n"
    assert found.stderr.endswith("(cut off after 4 tokens; --tokens allows more)\n")
    found = ask(store, "0123456789\n", f"sha256:{model.digest}", "--tokens", "4")  # with its three special tokens 13 of 16
    assert found.stdout == "aba\n"
    assert found.stderr.endswith("(cut off after 3 tokens: this model reads 16 at once, the conversation included)\n")


# ---- the conversation ----


def test_the_model_reads_what_was_said_before(moon: Model, prompts: list[list[int]]):
    chat = chat_with(moon, system="s")
    for question in ("1", "2"):
        assert "".join(chat.answer(question)) == "ab"
    assert prompts == [
        encode_prompt(TOKENIZER, [system("s"), user("1")]),
        encode_prompt(TOKENIZER, [system("s"), user("1"), assistant("ab"), user("2")]),
    ]


def test_where_it_outgrows_the_model_the_oldest_turns_are_left_out_and_the_system_stays(store: Store, prompts: list[list[int]]):
    # system 3, question 3, answer 4, <|assistant|> 1, room for an answer 4: the third question makes 3 + 7 + 7 + 3 + 1 + 4 = 25
    model = publish(store, after_the_last(MOON, 24))
    found = ask(store, "1\n2\n3\n4\n", f"sha256:{model.digest}", "--system", "s", "--tokens", "4")
    assert found.exit_code == 0
    assert found.stdout == "ab\n" * 4
    assert prompts[1:] == [
        encode_prompt(TOKENIZER, [system("s"), user("1"), assistant("ab"), user("2")]),
        encode_prompt(TOKENIZER, [system("s"), user("2"), assistant("ab"), user("3")]),
        encode_prompt(TOKENIZER, [system("s"), user("3"), assistant("ab"), user("4")]),
    ]
    assert found.stderr.count("the oldest turns are left out from here on") == 1


@pytest.mark.parametrize(("length", "fits"), [(60, True), (61, False)])
def test_a_question_that_is_too_long_is_refused_and_nothing_is_lost(moon: Model, length: int, fits: bool):
    chat = chat_with(moon)
    list(chat.answer("a"))
    before = list(chat.turns)
    if fits:  # 60 and its three special tokens leave room for 1 of 64
        assert "".join(chat.answer("q" * length)) == ""
    else:
        with pytest.raises(ValueError, match="that is 64 tokens, and this model reads 64 at once, its answer included; ask in fewer words"):
            chat.answer("q" * length)
        assert chat.turns == before


def test_a_line_that_was_not_answered_shows_in_the_exit_code_and_the_next_ones_are_answered(store: Store, moon: Model):
    found = ask(store, "q" * 100 + "\n/sytem Be brief.\nq\n", f"sha256:{moon.digest}")
    assert found.exit_code == 2
    assert found.stdout == "月é!\n"
    assert "(that is 103 tokens, and this model reads 64 at once" in found.stderr
    assert "(there is no command /sytem; /help lists them, and a line that begins with a space is none)" in found.stderr


# ---- commands ----


def test_reset_forgets_and_system_holds_from_then_on(store: Store, moon: Model, prompts: list[list[int]]):
    found = ask(store, "1\n/reset\n2\n/system  Be brief. \n3\n/system\n /quit\n/quit\n4\n", f"sha256:{moon.digest}")
    assert found.exit_code == 0
    assert prompts == [
        encode_prompt(TOKENIZER, [user("1")]),
        encode_prompt(TOKENIZER, [user("2")]),
        encode_prompt(TOKENIZER, [system("Be brief."), user("2"), assistant("ab"), user("3")]),
        encode_prompt(TOKENIZER, [user("2"), assistant("ab"), user("3"), assistant("ab"), user("/quit")]),
    ]


def test_help_names_every_command(store: Store, moon: Model):
    found = ask(store, "/help\n", f"sha256:{moon.digest}")
    assert found.exit_code == 0
    assert found.stdout == ""
    for command in ("/reset", "/system TEXT", "/quit", "Ctrl-D", "Ctrl-C"):
        assert command in found.stderr


# ---- Ctrl-C and Ctrl-D ----


def interrupted_after(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def scripted(*arguments: Any, **settings: Any) -> Iterator[int]:
        yield from b"abcdef"[:n_tokens]
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt.sampling.sample_stream", scripted)


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(moon: Model, monkeypatch: pytest.MonkeyPatch):
    chat = chat_with(moon)
    interrupted_after(2, monkeypatch)
    answered, stdout, stderr = type_in(chat, monkeypatch, "1")
    assert answered
    assert stdout == "ab\n\n"  # the second line is Ctrl-D's
    assert stderr.endswith("(stopped; what was said so far stays in the conversation)\n")
    assert chat.turns == [user("1"), assistant("ab")]


def test_of_an_answer_that_was_stopped_before_its_first_token_nothing_stays(moon: Model, monkeypatch: pytest.MonkeyPatch):
    chat = chat_with(moon)
    interrupted_after(0, monkeypatch)
    type_in(chat, monkeypatch, "1")
    assert chat.turns == []


def test_ctrl_c_while_typing_drops_the_line_and_ctrl_d_ends(moon: Model, monkeypatch: pytest.MonkeyPatch):
    answered, stdout, stderr = type_in(chat_with(moon), monkeypatch, KeyboardInterrupt, "1", KeyboardInterrupt)
    assert answered
    assert stdout == "\n月é!\n\n\n"
    assert stderr == "(/help lists the commands, Ctrl-D ends)\n"


def test_who_types_a_wrong_command_is_told_and_has_not_failed(moon: Model, monkeypatch: pytest.MonkeyPatch):
    answered, stdout, stderr = type_in(chat_with(moon), monkeypatch, "/rest", "1")
    assert answered
    assert stdout == "月é!\n\n"
    assert "(there is no command /rest; " in stderr


def test_ctrl_c_ends_the_program_where_lines_are_piped_in(store: Store, moon: Model, monkeypatch: pytest.MonkeyPatch):
    interrupted_after(2, monkeypatch)
    found = ask(store, "1\n2\n", f"sha256:{moon.digest}")
    assert found.exit_code == 130
    assert found.stdout == "ab\n"


@pytest.mark.slow
def test_on_a_real_terminal_lines_are_typed_after_a_prompt(store: Store, moon: Model, tmp_path: Path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(
            sys.executable,
            [sys.executable, "-c", "from pipelines.cli import main; main()", "chat", moon.digest, "--store", str(store.root)],
        )
    shown = b""

    def until(wanted: str) -> None:
        nonlocal shown
        while wanted.encode() not in shown:
            shown += os.read(terminal, 1024)
        shown = shown.split(wanted.encode(), 1)[1]

    until("(/help lists the commands, Ctrl-D ends)")
    until("> ")
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.01)  # a Ctrl-C between the prompt and the wait for a line is heard at the next line only
    os.write(terminal, b"half a li\x03")
    until("> ")
    os.write(terminal, "?月\n".encode())
    until("月é!\r\n")
    until("> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


# ---- which model ----


def record(store: Store, model: Model, pipeline: str, stage: str, started_ms: int) -> None:
    here = {"run": "r", "started_ms": started_ms, "seconds": 1.0, "host": "h", "user": "u", "pid": 1}
    what = {"key": f"{pipeline}-{stage}", "pipeline": pipeline, "stage": stage, "kind": stage, "leaves": {}, "inputs": {}}
    store.record(Action(**what, **here, output=model.digest, output_kind="model"))


def test_without_a_reference_it_is_the_newest_named_model_that_speaks_in_turns(store: Store):
    older, newer, newest_of_all = (publish(store, after_the_last(MOON, seq_len)) for seq_len in (8, 9, 10))
    base = publish(store, random_model(), chat_format=None)
    record(store, newer, "second", "sft", 2_000)
    record(store, older, "first", "rl", 1_000)
    record(store, newest_of_all, "third", "sft", 4_000)  # nothing points to it
    record(store, base, "fourth", "pretrain", 3_000)
    for pipeline, model in (("first", older), ("second", newer), ("fourth", base)):
        store.set_alias(pipeline, "newest", model.digest)
    chosen, name = choose(store, None)
    assert chosen == newer
    assert name == f"second, sft: model {newer.digest[:12]}, 300 steps"
    assert choose(store, "model:first@newest")[1] == f"first, rl: model {older.digest[:12]}, 300 steps"


def test_where_no_model_speaks_in_turns_it_says_which_stages_teach_that(store: Store):
    store.set_alias("line", "newest", publish(store, random_model(), chat_format=None).digest)
    with pytest.raises(StageFailure, match=r"no model in the store .* speaks in turns: that is what sft and rl stages teach"):
        choose(store, None)


def test_where_no_pipelines_newest_speaks_in_turns_it_names_the_last_model_that_does(store: Store):
    base = publish(store, random_model(), chat_format=None)
    for seq_len, started_ms in ((8, 1_000), (9, 2_000)):
        last = publish(store, after_the_last(MOON, seq_len))
        record(store, last, "line", "sft", started_ms)
    record(store, base, "line", "pretrain", 3_000)
    record(store, publish(store, random_model(), role="reward"), "line", "reward_model", 4_000)
    store.set_alias("line", "newest", base.digest)
    named = rf"no pipeline's newest model .* speaks in turns; `gptline chat sha256:{last.digest[:12]}` talks to .* \(line, sft\)"
    with pytest.raises(StageFailure, match=named):
        choose(store, None)


def flip_a_byte(model: Model) -> None:
    weights = bytearray((model.path / "model.safetensors").read_bytes())
    weights[-7] ^= 0x40
    (model.path / "model.safetensors").write_bytes(weights)


@pytest.mark.parametrize(
    ("metadata", "harm", "fault"),
    [
        ({"chat_format": None}, None, "continues text, it does not speak in turns: .* `gptline sample sha256:{digest}` lets it write"),
        ({"chat_format": "gptline-2"}, None, "speaks gptline-2, this gptline gptline-1"),
        ({"role": "reward"}, None, "has the role reward; wanted a policy"),
        ({}, flip_a_byte, "is damaged: model.safetensors has sha256 "),
    ],
)
def test_a_model_that_cannot_be_talked_to_is_refused(
    store: Store, metadata: dict[str, Any], harm: Callable[[Model], None] | None, fault: str
):
    model = publish(store, random_model(), **metadata)
    if harm:
        harm(model)
    with pytest.raises(StageFailure, match=f"model {model.digest[:12]} " + fault.format(digest=model.digest[:12])):
        choose(store, f"sha256:{model.digest[:12]}")


@pytest.mark.parametrize(("verb", "option"), [("chat", "--system"), ("sample", "--prompt")])
def test_an_option_that_is_no_utf8_is_refused(store: Store, moon: Model, verb: str, option: str):
    found = CliRunner().invoke(app, [verb, moon.digest, "--store", str(store.root), option, "a\udcff"])
    assert found.exit_code == 2
    assert f"Invalid value for '{option}': 'a\\udcff' is no UTF-8" in found.stderr


def test_a_piped_line_that_is_no_utf8_is_refused_with_its_number(moon: Model):
    stdin = io.TextIOWrapper(io.BytesIO(b"a\n\xff\n"))
    stdout = io.StringIO()
    with pytest.raises(ValueError, match=r"line 2 of what was piped in is no UTF-8: .* byte 0xff in position 0"):
        talk(chat_with(moon), stdin, stdout, io.StringIO())
    assert stdout.getvalue() == "月é!\n"


# ---- what is exported ----


@pytest.mark.parametrize(("chat_format", "has_template"), [(FORMAT, True), (None, False)])
def test_the_export_of_an_assistant_has_a_chat_template_and_of_other_models_none(
    store: Store, tmp_path: Path, chat_format: str | None, has_template: bool
):
    from types import SimpleNamespace

    from pipelines.stages.export import export

    model = publish(store, random_model(), chat_format=chat_format)
    published: list[dict[str, Any]] = []
    stage: Any = SimpleNamespace(output=tmp_path / "out", publish=lambda kind, **metadata: published.append(metadata))
    export(model, stage)
    assert (tmp_path / "out" / "chat_template.jinja").exists() == has_template
    special = TOKENIZER.special
    ends = [special["end"], special["document"]] if has_template else special["document"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == ends
    assert published == [{"model": model.digest, "tokenizer": "0"}]


def test_an_assistant_of_another_format_is_not_exported(store: Store):
    from pipelines.stages.export import export

    stage: Any = None
    with pytest.raises(StageFailure, match="speaks gptline-2, this gptline gptline-1"):
        export(publish(store, random_model(), chat_format="gptline-2"), stage)
