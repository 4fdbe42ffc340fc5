"""Describe how a source's columns become messages: its format, the names it uses, and what to do where it differs from the usual form.

Which keys and settings have an effect depends on the format and on what is read (conversations, preferences, ratings, prompts);
the others are refused, so that no setting is ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from gpt.settings import Settings
from pipelines.ingest import templates
from pipelines.ingest.settings import IngestSettings, SourceSettings, Weighted
from pipelines.stage import StageConfig

Format = Literal["alpaca", "sharegpt", "messages", "plain", "transcript", "tree"]
Role = Literal["system", "user", "assistant"]
DialogueKind = Literal["conversations", "preferences", "ratings", "prompts"]

OF_A_MESSAGE = ("role", "content", "from", "value")
OF_A_FORMAT: dict[Format, tuple[str, ...]] = {
    "messages": ("messages", "system", *OF_A_MESSAGE),
    "sharegpt": ("conversations", "system", *OF_A_MESSAGE),
    "alpaca": ("instruction", "input", "history", "system", *OF_A_MESSAGE),
    "plain": ("prompt", "system", *OF_A_MESSAGE),
    "transcript": ("text", "system"),
    "tree": ("prompt", "text", "role", "replies", "rank", "system"),
}
"""The keys that say where the messages so far are."""
NESTED = (*OF_A_MESSAGE, "replies", "rank")
"""Keys that rename a key inside a message or a reply, where no path or template can stand."""
ONE_ANSWER = ("response", "chosen", "rejected", "score", "reference")
SEVERAL_ANSWERS = ("responses", "votes", "scores", "ranks")
"""Keys that may name several columns."""
ALL_KEYS = tuple(dict.fromkeys([*(key for keys in OF_A_FORMAT.values() for key in keys), "output", *ONE_ANSWER, *SEVERAL_ANSWERS]))

KEYS_OF_A_RECORD: dict[DialogueKind, tuple[str, ...]] = {
    "conversations": ("messages",),
    "preferences": ("prompt", "chosen", "rejected"),
    "ratings": ("prompt", "response", "score"),
    "prompts": ("prompt", "reference"),
}
IGNORABLE = {
    "system": "keys.system names something else; a template such as {system} can hold both",
    "system_prompt": 'keys = { system = "system_prompt" } makes it the system message',
    "history": 'format = "alpaca" reads it as earlier turns',
    "tools": 'keys = { system = "You can call these functions:\\n{tools}" } puts it into the system message',
    "functions": 'keys = { system = "You can call these functions:\\n{functions}" } puts it into the system message',
    "choices": "{PROMPT}\\n{choices:letters}",
    "options": "{PROMPT}\\n{options:letters}",
    "context": "{context}\\n\\n{PROMPT}",
    "input": "{PROMPT}\\n\\n{input}",
    "image": "only text can be learned",
    "images": "only text can be learned",
    "videos": "only text can be learned",
    "audios": "only text can be learned",
}
"""Columns that usually change what an answer means, and a way to use each: a sentence, or a template around the prompt."""
IGNORABLE_IN_MESSAGES = ("weight", "train", "reasoning_content", "reasoning", "thinking", "refusal", "images", "audio")
"""The same for the keys of one message."""


def keys_read(format: Format, kind: DialogueKind | None) -> tuple[str, ...]:
    """Return the keys that have an effect. None as the kind stands for a function of the user's own, which may read any of them."""
    answers: dict[DialogueKind, tuple[str, ...]] = {
        "conversations": {"alpaca": ("output",), "plain": ("response",)}.get(format, ()),
        "preferences": () if format == "tree" else ("chosen", "rejected", *SEVERAL_ANSWERS),
        "ratings": ("response", "score", "responses", "scores"),
        "prompts": ("reference",) if format != "tree" else (),
    }
    kinds = answers if kind is None else (kind,)
    return tuple(dict.fromkeys([*OF_A_FORMAT[format], *(key for each in kinds for key in answers[each])]))


class DialogueSettings(Settings):
    """Say how a source's columns become messages: `DialogueSettings(format="plain", keys={"prompt": "question", "response": "answer"})`."""

    format: Format = "messages"
    """Where the messages are. "messages": `{"messages": [{"role", "content"}, ...]}`. "sharegpt": `{"conversations": [{"from", "value"},
    ...]}`. "alpaca": `{"instruction", "input", "output"}`, with `system` and `history` if there are any. "plain": `{"prompt", "response"}`.
    "transcript": `{"text"}`, a dialogue in one text with `markers`. "tree": `{"prompt": {"text", "role", "replies": [...]}}`."""
    keys: dict[str, str | tuple[str, ...]] = Field(default_factory=dict)
    """Where the source keeps what the format calls by its own names: a column, a path such as "meta.turns.0.text", or a template such as
    "{question}\\n{choices:letters}". A name that ends with ? may be missing. Within messages and replies (role, content, from, value,
    replies, rank) only a name: keys = { messages = "utterances", role = "speaker", content = "text" }."""
    roles: dict[str, Role] = Field(default_factory=dict)
    """The source's names for the three roles, beside the usual ones."""
    system: str | None = Field(default=None, min_length=1)
    """The text of a system message for every dialogue that has none of its own."""
    join_turns: bool = False
    """True: successive messages of one role become one, joined by a newline. False: such a record is bad."""
    markers: dict[str, Literal["system", "user", "assistant", "end"]] = Field(default_factory=dict)
    """format = "transcript": the texts that begin a turn, and whose; "end" is for one that ends a turn. The marker "" stands for the text
    before the first marker. Default: { "\\n\\nHuman:" = "user", "\\n\\nAssistant:" = "assistant" }."""
    replies: Literal["best", "all"] = "best"
    """format = "tree": follow only the assistant's best-ranked reply at each turn, or every one. Users' replies are all followed."""
    ignore: tuple[str, ...] = ()
    """Columns, or keys of a message, that are left out on purpose: "tools", "choices", "reasoning_content" and others that usually change
    what an answer means make a record bad where nothing reads them."""

    @field_validator("keys")
    @classmethod
    def _keys_are_columns_paths_or_templates(cls, keys: dict[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
        for name, where in keys.items():
            if name not in ALL_KEYS:
                near = difflib.get_close_matches(name, ALL_KEYS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(ALL_KEYS)}"
                raise ValueError(f"renames {name!r}, which no format has; {hint}")
            if isinstance(where, tuple) and (name not in SEVERAL_ANSWERS or not where):
                raise ValueError(f"{name} = {list(where)!r}: expected one column, path or template")
            for expression in templates.expressions(where):
                templates.check(expression)
                if name in NESTED and (templates.is_template(expression) or expression.endswith("?")):
                    raise ValueError(f"{name} = {expression!r}: found a template, expected the name of a key inside each message")
        return keys

    @field_validator("ignore")
    @classmethod
    def _ignored_names_would_be_refused(cls, ignore: tuple[str, ...]) -> tuple[str, ...]:
        known = (*IGNORABLE, *IGNORABLE_IN_MESSAGES)
        for name in ignore:
            if name not in known:
                raise ValueError(f"{name!r} has no effect: only {', '.join(dict.fromkeys(known))} are refused where nothing reads them")
        return ignore

    @model_validator(mode="after")
    def _dialogue_settings_have_an_effect(self) -> DialogueSettings:
        self.check_keys(None)
        if self.markers and self.format != "transcript":
            raise ValueError(f'markers has no effect with format = "{self.format}"; remove it, or set format = "transcript"')
        if "system" in self.ignore and self.system is not None:
            raise ValueError('system has no effect beside ignore = ["system"]; remove one of the two')
        for name, where in self.keys.items():
            read = templates.columns_of(templates.expressions(where)) or []
            for ignored in {name, *(path.split(".")[0].removesuffix("?") for path in read)} & set(self.ignore):
                raise ValueError(f"ignore = {list(self.ignore)}: {ignored!r} is read by keys.{name} = {where!r}; remove one of the two")
        if self.format == "tree" and (unread := [name for name in self.ignore if name not in IGNORABLE]):
            raise ValueError(f'ignore = {list(self.ignore)}: {unread[0]!r} has no effect with format = "tree"; remove it')
        if self.replies != "best" and self.format != "tree":
            raise ValueError(f'replies = "{self.replies}" has no effect with format = "{self.format}"; remove it')
        if self.roles and self.format == "transcript":
            raise ValueError('roles has no effect with format = "transcript", whose markers name the roles; remove it')
        if self.markers and "assistant" not in self.markers.values():
            raise ValueError(f"markers = {self.markers!r}: none of them is the assistant's, so there is nothing to learn from")
        return self

    def check_keys(self, kind: DialogueKind | None) -> None:
        """Raise ValueError where a key has no effect on this kind of artifact."""
        known = keys_read(self.format, kind)
        for name in self.keys:
            if name not in known:
                what = f" for {kind}" if kind else ""
                raise ValueError(
                    f'keys: {name!r} has no effect with format = "{self.format}"{what}, which reads {", ".join(known)}; '
                    "rename one of these, or set the format that has it"
                )

    def where(self, name: str) -> str:
        """Return the expression for a key that names one column."""
        found = self.keys.get(name, name)
        return found if isinstance(found, str) else found[0]

    def left_out(self) -> set[str]:
        """Return the columns that may hold a value that no message has."""
        return set(self.ignore)


class DialogueSource(SourceSettings, DialogueSettings):
    """Name files of dialogues, and say how their columns become messages."""

    @model_validator(mode="after")
    def _has_columns(self) -> DialogueSource:
        if self.source == "text" and self.format not in ("plain", "transcript"):
            raise ValueError(
                f'source = "text" has no columns to find {self.format} in; expected source = "json", "csv" or "parquet", '
                'or format = "transcript" (dialogues), or format = "plain" (prompts)'
            )
        if self.source == "csv" and self.format == "tree":
            raise ValueError('source = "csv" holds texts, and no tree; expected source = "json" or "parquet"')
        if self.text != "text":
            raise ValueError(f"text = {self.text!r} has no effect on dialogues; say where messages are with format and keys")
        return self

    @model_validator(mode="after")
    def _settings_of_messages_meet_messages(self) -> DialogueSource:
        if self.source not in ("text", "csv") or self.format in ("messages", "sharegpt"):
            return self
        found = [f"keys.{name}" for name in self.keys if name in NESTED]
        found += [f"ignore = {name!r}" for name in self.ignore if self.source == "text" or name not in IGNORABLE]
        found += ["roles"] if self.roles else []
        found += ["join_turns"] if self.join_turns and self.format != "transcript" else []
        if found:
            raise ValueError(
                f'{found[0]} has no effect with source = "{self.source}" and format = "{self.format}", '
                "where every message is a text; remove it"
            )
        return self

    def left_out(self) -> set[str]:
        return {*self.ignore, *self.fields}


class WeightedDialogueSource(DialogueSource, Weighted):
    """Describe one source of a mixture of dialogues."""


class DialogueConfig(IngestSettings, StageConfig, DialogueSource):
    """Configure one source, with its settings inline, or a mixture of several, each with the same settings and a `weight`."""

    kind: ClassVar[DialogueKind | None] = None
    """What is read. None: a function of the user's own decides."""
    drawn_by: ClassVar[tuple[str, ...]] = ("prompt",)
    mixture: tuple[WeightedDialogueSource, ...] = ()
    """Several sources instead of the inline one."""

    @model_validator(mode="after")
    def _keys_have_an_effect_on_the_kind(self) -> DialogueConfig:
        for part in self.parts():
            part.check_keys(self.kind)
            taken = {"messages"} | (set(KEYS_OF_A_RECORD[self.kind]) if self.kind else set())
            if found := sorted(taken & set(part.fields)):
                raise ValueError(f"fields = {list(part.fields)}: {found[0]!r} is a key of the record itself; remove it")
            if part.source == "text" and part.format == "plain" and self.kind == "conversations":
                raise ValueError('source = "text" holds one text a record, which makes no conversations; set format = "transcript"')
            if part.source == "text" and self.kind in ("preferences", "ratings"):
                raise ValueError(
                    f'source = "text" holds one text a record, which makes no {self.kind}; expected source = "json", "csv" or "parquet"'
                )
            if part.format == "tree" and self.kind == "ratings":
                raise ValueError('format = "tree" has ranks and no scores; read it as preferences')
            if self.kind == "ratings":
                _check_rated(part.keys)
            if part.replies != "best" and self.kind == "preferences":
                raise ValueError("replies has no effect on preferences, which compare all replies; remove it")
        return self

    def columns_read(self, part: DialogueSettings) -> list[str] | None:
        """Return the columns and paths that the kind's records are made of in one source; None where only a record knows."""
        if self.kind is None:
            return None
        names = keys_read(part.format, self.kind)
        if part.format == "tree":
            names = (*names, "deleted")  # the record itself may be a message
        else:
            names = tuple(name for name in names if name not in NESTED)
        if part.format == "plain" and "prompt" not in part.keys:
            names = (*names, "text")  # prompts as the only column
        named = [each for name in names if name not in part.ignore for each in templates.expressions(part.keys.get(name, name))]
        return templates.columns_of([*named, *(name for name in IGNORABLE if name not in part.left_out())])


def _check_rated(keys: Collection[str]) -> None:
    if ("responses" in keys) != ("scores" in keys):
        raise ValueError("keys: responses and scores go together; response and score name one of each")
    if "responses" in keys and (named := [name for name in ("response", "score") if name in keys]):
        raise ValueError(f"keys.{named[0]} has no effect beside keys.responses; remove one of the two")


class PairSettings(DialogueSettings):
    """Say how pairs are found where a source doesn't name the chosen and the rejected response."""

    labels: dict[str, int] = Field(default_factory=dict)
    """For keys.votes: which response each value of a vote stands for, counted from 1, with 0 for a tie:
    { model_a = 1, model_b = 2, tie = 0 }, or { "1" = 1, "0" = 2 }."""
    pairs: Literal["best_and_worst", "all"] = "best_and_worst"
    """Where several responses are scored or ranked: one pair of the best and the worst, or all pairs. Equal ones are never a pair."""

    @model_validator(mode="after")
    def _responses_are_compared_by_one_thing(self) -> PairSettings:
        given: list[str] = [name for name in ("votes", "scores", "ranks") if name in self.keys]
        if "responses" not in self.keys:
            if given or self.labels:
                raise ValueError(f'{(given or ["labels"])[0]} has no effect without keys = {{ responses = ["response_a", "response_b"] }}')
            if self.pairs != "best_and_worst" and self.format != "tree":
                raise ValueError(f'pairs = "{self.pairs}" has no effect on chosen and rejected responses; remove it')
            return self
        if len(given) != 1:
            raise ValueError(
                f"keys.responses: found {' and '.join(given) or 'nothing'} to compare them by, expected votes, scores or ranks"
            )
        if named := [name for name in ("chosen", "rejected") if name in self.keys]:
            raise ValueError(f"keys.{named[0]} has no effect beside keys.responses; remove one of the two")
        if bool(self.labels) != (given == ["votes"]):
            raise ValueError(
                "labels and keys.votes go together: labels says which response each vote stands for, { a = 1, b = 2, tie = 0 }"
            )
        if self.pairs != "best_and_worst" and self.labels:
            raise ValueError(f'pairs = "{self.pairs}" has no effect on votes, which name one winner; remove it')
        return self


class PairSource(DialogueSource, PairSettings):
    """Name files of responses that were compared, and say how."""


class WeightedPairSource(WeightedDialogueSource, PairSettings):
    """Describe one source of a mixture of pairs."""
