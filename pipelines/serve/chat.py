"""A conversation with a model that was trained here, for `gptline chat`.

On a terminal lines are typed and edited; what is piped in is one question a line, and then the answers alone go to stdout. Left out:
a history of typed lines that outlives the program, questions of several lines, several answers to choose from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import BinaryIO, TextIO

from gpt.chat import FORMAT, Message, encode_prompt
from pipelines.artifacts import Model
from pipelines.plan.resolve import resolve
from pipelines.serve.sample import SHOWN, sound_policy
from pipelines.stage import StageFailure
from pipelines.store.store import Action, Store

HELP = """\
/reset         forget what was said so far
/system TEXT   tell it TEXT before all else from now on; without TEXT nothing
/quit          end, as Ctrl-D does
Ctrl-C ends an answer; what was said of it stays in the conversation. A line that begins with a space is never a command.
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
        """A user's message and the answer to it, by turns."""
        self.left_out = 0
        """Messages of `turns`, the oldest, that the last answer was given without."""
        self.cut_off: str | None = None
        """Why the last answer ends where it does, unless the model ended it."""

    def answer(self, question: str) -> Generator[str, None, None]:
        """The answer in whole characters, which a terminal can be given. Left alone before its end, it is kept as far as it came.

        ValueError, and nothing is changed, where the question is too long to be answered.
        """
        prompt, self.left_out = self._prompt(question)
        return self._drawn(question, prompt)

    def _prompt(self, question: str) -> tuple[list[int], int]:
        """As much of the conversation as leaves the answer room: half of what the model reads, if it may be so long."""
        seq_len = self._model.config.seq_len
        opening = [{"role": "system", "content": self.system}] if self.system else []
        asked = {"role": "user", "content": question}
        for left_out in range(0, len(self.turns) + 1, 2):
            prompt = encode_prompt(self._tokenizer, [*opening, *self.turns[left_out:], asked])
            if len(prompt) + min(self._tokens, seq_len // 2) <= seq_len:
                break
        if len(prompt) >= seq_len:
            with_system = "with the system's message that" if opening else "that"
            raise ValueError(
                f"{with_system} is {len(prompt)} tokens, and this model reads {seq_len} at once, its answer included; "
                "ask in fewer words (the conversation so far is kept)"
            )
        return prompt, left_out

    def _drawn(self, question: str, prompt: list[int]) -> Generator[str, None, None]:
        from gpt.random_streams import stream_seed
        from gpt.sampling import sample_stream

        seq_len = self._model.config.seq_len
        room = seq_len - len(prompt)
        end = self._tokenizer.special["end"]
        drawn = sample_stream(
            self._model,
            prompt,
            stream=stream_seed(self._seed, "chat", len(self.turns)),
            max_tokens=min(self._tokens, room),
            temperature=self._temperature,
            stop_ids=(end,),
        )
        text = self._tokenizer.stream()
        said = ""
        self.cut_off = "stopped; what was said so far stays in the conversation"
        try:
            for token in drawn:
                if token == end:
                    self.cut_off = None
                    return
                piece = text.feed(token)
                said += piece
                yield piece.translate(SHOWN)
            if self._tokens <= room:
                self.cut_off = f"cut off after {self._tokens} tokens; --tokens allows more"
            else:
                self.cut_off = f"cut off after {room} tokens: this model reads {seq_len} at once, the conversation included"
        finally:
            if said or self.cut_off is None:
                self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]


def choose(store: Store, reference: str | None) -> tuple[Model, str]:
    """The model that is meant, sound and able to speak in turns, and what it is, in words. Without a reference: the newest such.

    The newest is the one made last, of those that some `model:<pipeline>@<alias>` points to.
    """
    made = {action.output: action for action in sorted(store.all_actions(), key=lambda action: action.started_ms)}
    digest = _newest(store, made) if reference is None else resolve(store, reference)
    model = sound_policy(store, digest)
    found = model.metadata.get("chat_format")
    if found is None:
        raise StageFailure(
            f"model {digest[:12]} continues text, it does not speak in turns: no sft or rl stage made it; "
            f"`gptline sample {reference or f'sha256:{digest[:12]}'}` lets it write"
        )
    if found != FORMAT:
        raise StageFailure(f"model {digest[:12]} speaks {found}, this gptline {FORMAT}; talk to it with the gptline that made it")
    maker = f"{made[digest].pipeline}, {made[digest].stage}: " if digest in made else ""
    return model, f"{maker}model {digest[:12]}, {model.metadata.get('steps', 'unknown')} steps"


def _newest(store: Store, made: dict[str, Action]) -> str:
    speaking = []
    for name, alias in store.aliases():
        digest = store.alias(name, alias)
        if digest is not None and _speaks(store, digest):
            speaking.append((made[digest].started_ms if digest in made else 0, digest))
    if speaking:
        return max(speaking)[1]
    for digest, action in reversed(made.items()):
        if _speaks(store, digest):
            raise StageFailure(
                f"no pipeline's newest model in the store {store} speaks in turns; "
                f"`gptline chat sha256:{digest[:12]}` talks to the last one made that does ({action.pipeline}, {action.stage})"
            )
    raise StageFailure(
        f"no model in the store {store} speaks in turns: that is what sft and rl stages teach; run a pipeline that has one, "
        "name another store with --store, or see with `gptline sample` what a model writes"
    )


def _speaks(store: Store, digest: str) -> bool:
    manifest = store.manifest(digest)
    return manifest is not None and manifest["metadata"].get("role") == "policy" and bool(manifest["metadata"].get("chat_format"))


def talk(chat: Chat, stdin: TextIO, stdout: TextIO, stderr: TextIO) -> bool:
    """Until the lines end; False where one that was piped in was not answered. KeyboardInterrupt only where lines are piped in."""

    def note(text: str) -> None:
        stderr.write(f"({text})\n")
        stderr.flush()

    typing = stdin.isatty() and stdout.isatty()
    all_answered, told = True, False
    if typing:
        note("/help lists the commands, Ctrl-D ends")
    for line in _typed(stdout, stderr) if typing else _piped(stdin.buffer):
        if line.startswith("/"):
            command, _, text = line.strip().partition(" ")
            match command:
                case "/quit":
                    break
                case "/reset":
                    chat.turns, told = [], False
                    note("forgotten")
                case "/system":
                    chat.system = text.strip()
                    note("said before all else from now on" if chat.system else "nothing is said before all else from now on")
                case "/help":
                    stderr.write(HELP)
                case _:
                    note(f"there is no command {command}; /help lists them, and a line that begins with a space is none")
                    all_answered = False
        elif question := line.strip():
            try:
                answer = chat.answer(question)
            except ValueError as error:
                note(str(error))
                all_answered = False
                continue
            if chat.left_out and not told:
                note("the conversation is longer than what this model reads at once: the oldest turns are left out from here on")
                told = True
            _show(answer, stdout, interruptible=typing)
            if chat.cut_off:
                note(chat.cut_off)
    return typing or all_answered


def _show(answer: Generator[str, None, None], stdout: TextIO, *, interruptible: bool) -> None:
    # Closed here, whatever ended it: the conversation then holds what was said of it.
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
    """Lines of a terminal, until Ctrl-D. Ctrl-C drops the line, as in a shell."""
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
            stderr.write("(that line was no UTF-8)\n")
        else:
            yield line


def _piped(stdin: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stdin, 1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of what was piped in is no UTF-8: {error}; convert it") from error
        yield text
