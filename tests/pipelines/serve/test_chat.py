"""Conversations with models that write what a test scripts."""

from __future__ import annotations

import io
import json
import os
import pty
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gpt.answers import answer
from gpt.chat import FORMAT, Message, encode_prompt
from gpt.model import GPT, load_model
from pipelines.artifacts import Model
from pipelines.cli import app
from pipelines.serve.chat import Chat, talk
from pipelines.stage import StageFailure
from pipelines.store.store import Store

from .conftest import END, MOON, TOKENIZER, after_the_last, publish, random_model


@pytest.fixture
def moon(store: Store) -> Model:
    return publish(store, after_the_last(MOON, 64))


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Record the prompts that the model is given; it answers "ab", truncated if that is too long."""
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
    """Talk on a terminal: each line is typed, or is Ctrl-C (KeyboardInterrupt); Ctrl-D follows the last one."""
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


def test_piped_lines_are_questions_and_only_the_answers_go_to_stdout(store: Store, moon: Model):
    found = ask(store, "len?\n\n  \nand?", f"sha256:{moon.digest}")
    assert found.exit_code == 0
    assert found.stdout == "月é!\n月é!\n"
    assert found.stderr == f"model {moon.digest[:12]}, 300 steps\n"


def test_a_character_is_shown_when_its_last_token_arrives(moon: Model):
    assert list(chat_with(moon).answer("?")) == ["", "", "月", "", "é", "!"]


def test_an_answer_equals_the_one_that_evaluate_counts(store: Store):
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


def test_control_characters_are_shown_as_pictures_and_the_conversation_keeps_them(store: Store):
    chat = chat_with(publish(store, after_the_last([27, *b"[2J\x07", END], 64)))
    assert "".join(chat.answer("?")) == "\N{SYMBOL FOR ESCAPE}[2J\N{SYMBOL FOR BELL}"
    assert chat.turns == [user("?"), assistant("\x1b[2J\x07")]


def test_an_answer_without_an_end_is_reported_as_cut_off_with_the_reason(store: Store):
    model = publish(store, after_the_last([*b"abab"], 16))
    found = ask(store, "0123456\n", f"sha256:{model.digest}", "--tokens", "4")
    assert found.stdout == "abab\n"
    assert found.stderr.endswith("(cut off after 4 tokens; raise --tokens for more)\n")
    found = ask(store, "0123456789\n", f"sha256:{model.digest}", "--tokens", "4")  # with its three special tokens 13 of 16
    assert found.stdout == "aba\n"
    assert found.stderr.endswith("(cut off after 3 tokens: with the conversation, this model's context of 16 tokens is full)\n")


# ---- the conversation ----


def test_the_model_reads_the_conversation_so_far(moon: Model, prompts: list[list[int]]):
    chat = chat_with(moon, system="s")
    for question in ("1", "2"):
        assert "".join(chat.answer(question)) == "ab"
    assert prompts == [
        encode_prompt(TOKENIZER, [system("s"), user("1")]),
        encode_prompt(TOKENIZER, [system("s"), user("1"), assistant("ab"), user("2")]),
    ]


def test_in_a_conversation_longer_than_the_context_the_oldest_turns_are_left_out_and_the_system_message_stays(
    store: Store, prompts: list[list[int]]
):
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
def test_a_question_that_is_too_long_is_refused_and_the_conversation_is_kept(moon: Model, length: int, fits: bool):
    chat = chat_with(moon)
    list(chat.answer("a"))
    before = list(chat.turns)
    if fits:  # 60 and its three special tokens leave room for 1 of 64
        assert "".join(chat.answer("q" * length)) == ""
    else:
        with pytest.raises(ValueError, match="found 64 tokens, and this model's context is 64 tokens including the answer"):
            chat.answer("q" * length)
        assert chat.turns == before


def test_an_unanswered_line_shows_in_the_exit_code_and_the_next_lines_are_answered(store: Store, moon: Model):
    found = ask(store, "q" * 100 + "\n/sytem Be brief.\nq\n", f"sha256:{moon.digest}")
    assert found.exit_code == 2
    assert found.stdout == "月é!\n"
    assert "(the question is too long: found 103 tokens, and this model's context is 64 tokens" in found.stderr
    assert "(unknown command /sytem; /help lists them (begin the line with a space to send it to the model))" in found.stderr


# ---- commands ----


def test_reset_forgets_the_conversation_and_system_holds_from_then_on(store: Store, moon: Model, prompts: list[list[int]]):
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


def test_ctrl_c_stops_an_answer_and_keeps_the_part_that_was_written(moon: Model, monkeypatch: pytest.MonkeyPatch):
    chat = chat_with(moon)
    interrupted_after(2, monkeypatch)
    answered, stdout, stderr = type_in(chat, monkeypatch, "1")
    assert answered
    assert stdout == "ab\n\n"  # the second line is Ctrl-D's
    assert stderr.endswith("(stopped; the part that was written stays in the conversation)\n")
    assert chat.turns == [user("1"), assistant("ab")]


def test_an_answer_stopped_before_its_first_token_leaves_nothing(moon: Model, monkeypatch: pytest.MonkeyPatch):
    chat = chat_with(moon)
    interrupted_after(0, monkeypatch)
    type_in(chat, monkeypatch, "1")
    assert chat.turns == []


def test_ctrl_c_while_typing_drops_the_line_and_ctrl_d_ends(moon: Model, monkeypatch: pytest.MonkeyPatch):
    answered, stdout, stderr = type_in(chat_with(moon), monkeypatch, KeyboardInterrupt, "1", KeyboardInterrupt)
    assert answered
    assert stdout == "\n月é!\n\n\n"
    assert stderr == "(/help lists the commands, Ctrl-D ends the conversation)\n"


def test_an_unknown_command_that_was_typed_is_reported_and_is_not_a_failure(moon: Model, monkeypatch: pytest.MonkeyPatch):
    answered, stdout, stderr = type_in(chat_with(moon), monkeypatch, "/rest", "1")
    assert answered
    assert stdout == "月é!\n\n"
    assert "(unknown command /rest; " in stderr


def test_ctrl_c_ends_the_program_when_lines_are_piped_in(store: Store, moon: Model, monkeypatch: pytest.MonkeyPatch):
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

    def until(expected: str) -> None:
        nonlocal shown
        while expected.encode() not in shown:
            shown += os.read(terminal, 1024)
        shown = shown.split(expected.encode(), 1)[1]

    until("(/help lists the commands, Ctrl-D ends the conversation)")
    until("> ")
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.01)  # a Ctrl-C between the prompt and the wait for a line takes effect at the next line only
    os.write(terminal, b"half a li\x03")
    until("> ")
    os.write(terminal, "?月\n".encode())
    until("月é!\r\n")
    until("> ")
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


@pytest.mark.parametrize(("verb", "option"), [("chat", "--system"), ("sample", "--prompt")])
def test_an_option_that_is_not_utf8_is_refused(store: Store, moon: Model, verb: str, option: str):
    found = CliRunner().invoke(app, [verb, moon.digest, "--store", str(store.root), option, "a\udcff"])
    assert found.exit_code == 2
    assert f"Invalid value for '{option}': expected UTF-8, found 'a\\udcff'" in found.stderr


def test_a_piped_line_that_is_not_utf8_is_refused_with_its_number(moon: Model):
    stdin = io.TextIOWrapper(io.BytesIO(b"a\n\xff\n"))
    stdout = io.StringIO()
    with pytest.raises(ValueError, match=r"line 2 of the piped input: expected UTF-8, found .* byte 0xff in position 0"):
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
    with pytest.raises(StageFailure, match="expected chat format gptline-1, found gptline-2"):
        export(publish(store, random_model(), chat_format="gptline-2"), stage)
