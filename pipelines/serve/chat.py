"""Talk to a model that was trained here, for `gptline chat`.

On a terminal, lines are typed and edited. Piped input is one question per line, and only the answers go to stdout. Left out: a history of
typed lines that outlives the program, questions of several lines, several answers to choose from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import BinaryIO, TextIO

from gpt.chat import Message, encode_prompt
from pipelines.artifacts import Model
from pipelines.serve.sample import CONTROL_PICTURES

HELP = """\
/reset         forget the conversation so far
/system TEXT   begin the conversation with the system message TEXT from now on; without TEXT, with none
/quit          end, as Ctrl-D does
Ctrl-C stops an answer; the part that was written stays in the conversation. A line that begins with a space is never a command.
"""


class Chat:
    """`"".join(Chat(model, system="", tokens=200, temperature=0.0, seed=0).answer("What does len do?"))`."""

    def __init__(self, model: Model, *, system: str, tokens: int, temperature: float, seed: int) -> None:
        from gpt.model import load_model
        from gpt.tokenizer import Tokenizer

        self._model = load_model(model.path)
        self._tokenizer = Tokenizer.load(model.path / "tokenizer.json")
        self._tokens = tokens
        self._temperature = temperature
        self._seed = seed
        self.system = system
        self.turns: list[Message] = []
        """The user's messages and the answers to them, alternating."""
        self.left_out = 0
        """How many of the oldest `turns` the model did not see for the last answer."""
        self.cut_off: str | None = None
        """Why the last answer stops where it does; None if the model ended it."""

    def answer(self, question: str) -> Generator[str, None, None]:
        """The answer in whole characters that are safe to show. If the caller stops early, the part written so far stays in `turns`.

        A question that is too long raises ValueError and changes nothing.
        """
        prompt, self.left_out = self._prompt(question)
        return self._write(question, prompt)

    def _prompt(self, question: str) -> tuple[list[int], int]:
        """As much of the conversation as leaves room for the answer: `tokens`, but at most half of the model's context."""
        seq_len = self._model.config.seq_len
        opening = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": question}
        for left_out in range(0, len(self.turns) + 1, 2):
            prompt = encode_prompt(self._tokenizer, [*opening, *self.turns[left_out:], asked])
            if len(prompt) + min(self._tokens, seq_len // 2) <= seq_len:
                break
        if len(prompt) >= seq_len:
            found = f"{len(prompt)} tokens{' with the system message' if opening else ''}"
            raise ValueError(
                f"the question is too long: found {found}, and this model's context is {seq_len} tokens including the answer; "
                "ask in fewer words (the conversation so far is kept)"
            )
        return prompt, left_out

    def _write(self, question: str, prompt: list[int]) -> Generator[str, None, None]:
        from gpt.random_streams import stream_seed
        from gpt.sampling import sample_stream

        seq_len = self._model.config.seq_len
        room = seq_len - len(prompt)
        end = self._tokenizer.special["end"]
        token_ids = sample_stream(
            self._model,
            prompt,
            stream=stream_seed(self._seed, "chat", len(self.turns)),
            max_tokens=min(self._tokens, room),
            temperature=self._temperature,
            stop_ids=(end,),
        )
        text = self._tokenizer.stream()
        answer = ""
        self.cut_off = "stopped; the part that was written stays in the conversation"
        try:
            for token_id in token_ids:
                if token_id == end:
                    self.cut_off = None
                    return
                piece = text.feed(token_id)
                answer += piece
                yield piece.translate(CONTROL_PICTURES)
            if self._tokens <= room:
                self.cut_off = f"cut off after {self._tokens} tokens; raise --tokens for more"
            else:
                self.cut_off = f"cut off after {room} tokens: with the conversation, this model's context of {seq_len} tokens is full"
        finally:
            if answer or self.cut_off is None:
                self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def talk(chat: Chat, stdin: TextIO, stdout: TextIO, stderr: TextIO) -> bool:
    """Answer lines until they end. False if a piped line was not answered. KeyboardInterrupt passes only for piped input."""

    def note(text: str) -> None:
        stderr.write(f"({text})\n")
        stderr.flush()

    typing = stdin.isatty() and stdout.isatty()
    all_answered, reported = True, False
    if typing:
        note("/help lists the commands, Ctrl-D ends the conversation")
    for line in _typed(stdout, stderr) if typing else _piped(stdin.buffer):
        if line.startswith("/"):
            command, _, text = line.strip().partition(" ")
            match command:
                case "/quit":
                    break
                case "/reset":
                    chat.turns, reported = [], False
                    note("the conversation so far is forgotten")
                case "/system":
                    chat.system = text.strip()
                    note("the conversation begins with this system message" if chat.system else "the conversation has no system message")
                case "/help":
                    stderr.write(HELP)
                case _:
                    note(f"unknown command {command}; /help lists them (begin the line with a space to send it to the model)")
                    all_answered = False
        elif question := line.strip():
            try:
                answer = chat.answer(question)
            except ValueError as error:
                note(str(error))
                all_answered = False
                continue
            if chat.left_out and not reported:
                note("the conversation is longer than this model's context: the oldest turns are left out from here on")
                reported = True
            _show(answer, stdout, interruptible=typing)
            if chat.cut_off:
                note(chat.cut_off)
    return typing or all_answered


def _show(answer: Generator[str, None, None], stdout: TextIO, *, interruptible: bool) -> None:
    # Closed here, whatever ended it: closing puts the part that was written into the conversation.
    with contextlib.closing(answer):
        try:
            for piece in answer:
                stdout.write(piece)
                stdout.flush()
        except KeyboardInterrupt:
            if not interruptible:
                raise
        finally:
            stdout.write("\n")
            stdout.flush()


def _typed(stdout: TextIO, stderr: TextIO) -> Iterator[str]:
    """Lines typed on a terminal, until Ctrl-D. Ctrl-C drops the line, as in a shell."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - with it, input() edits lines
    while True:
        try:
            line = input("> ")
            line.encode()
        except EOFError:
            stdout.write("\n")
            return
        except KeyboardInterrupt:
            stdout.write("\n")
        except UnicodeError:
            stderr.write("(expected UTF-8; that line was not sent)\n")
        else:
            yield line


def _piped(stdin: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stdin, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of the piped input: expected UTF-8, found {error}; convert it") from error
        yield text
