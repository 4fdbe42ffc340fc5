"""Every setting of the four stage kinds for dialogues changes what is read, or is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.ingest.dialogue_settings import (
    ALL_KEYS,
    OF_A_FORMAT,
    OF_A_MESSAGE,
    DialogueConfig,
    DialogueSettings,
    PairSettings,
    keys_read,
)
from pipelines.ingest.dialogues import to_conversations, to_prompts, to_ratings
from pipelines.ingest.pairs import to_pairs
from pipelines.ingest.settings import IngestSettings, SourceSettings
from pipelines.stage import StageConfig
from pipelines.stages.conversations import ConversationsConfig
from pipelines.stages.preferences import PreferencesConfig
from pipelines.stages.prompts import PromptsConfig
from pipelines.stages.ratings import RatingsConfig

KINDS: dict[str, type[DialogueConfig]] = {
    "conversations": ConversationsConfig,
    "preferences": PreferencesConfig,
    "ratings": RatingsConfig,
    "prompts": PromptsConfig,
}
USER, ASSISTANT, NO = ({"role": role, "content": text} for role, text in (("user", "Hello"), ("assistant", "Hi."), ("assistant", "No.")))
OLD = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}, {"from": "gpt", "value": "No."}]
TREE = {"text": "Hello", "role": "user", "replies": [{"text": "No.", "role": "gpt", "rank": 1}, {"text": "Hi.", "role": "gpt", "rank": 0}]}
PLAIN = {"prompt": "Hello", "response": "Hi.", "score": 1, "chosen": "Hi.", "rejected": "No.", "reference": "Hey."}


def config(kind: str, **settings: Any) -> DialogueConfig:
    return KINDS[kind](**{"source": "json", "files": ["a.jsonl"], **settings})


def read(kind: str, columns: dict[str, Any], settings: Any) -> list[dict[str, Any]]:
    match kind:
        case "conversations":
            return to_conversations(columns, settings)
        case "preferences":
            return to_pairs(columns, settings)
        case "ratings":
            return to_ratings(columns, settings, settings.score_range)
    return to_prompts(columns, settings)


def record_with(kind: str, format: str, key: str) -> dict[str, Any]:
    """Return a record with a value for every key of a format. If `key` is one inside messages, the answers are messages."""
    user, good, bad = OLD if key in ("from", "value") else [USER, ASSISTANT, NO]
    turns = [user, good] if kind == "conversations" else [user]
    if key not in OF_A_MESSAGE or format == "tree":
        good, bad = "Hi.", "No."
    columns: dict[str, dict[str, Any]] = {
        "messages": {"messages": turns},
        "sharegpt": {"conversations": turns},
        "alpaca": {"instruction": "Hello", "input": "there", "history": [["a", "b"]], "output": good},
        "plain": {"prompt": "Hello", "response": good},
        "transcript": {"text": "Human: Hello" + "\n\nAssistant: Hi." * (kind == "conversations")},
        "tree": {"prompt": TREE},
    }
    answers = {"response": good, "score": 1, "chosen": good, "rejected": bad, "reference": good, "system": "Be brief."}
    compared = {"responses": [good, bad], "votes": ["a"], "scores": [1, 0], "ranks": [0, 1]}
    return answers | compared | columns[format]


def beside(kind: str, key: str) -> dict[str, Any]:
    """Return the other settings that a key needs to be accepted."""
    if key not in ("responses", "votes", "scores", "ranks") or kind not in ("preferences", "ratings"):
        return {"keys": {}}
    comparison = "scores" if key == "responses" or kind == "ratings" else key
    labels = {"labels": {"a": 1}} if comparison == "votes" else {}
    return {"keys": {"responses": "responses", comparison: comparison}, **labels}


def outcome(kind: str, columns: dict[str, Any], settings: DialogueConfig) -> Any:
    try:
        return read(kind, columns, settings)
    except ValueError as error:
        return str(error)


def renamed(value: Any, old: str, new: str) -> Any:
    """Return the value with a key renamed at every depth."""
    if isinstance(value, dict):
        return {new if key == old else key: renamed(each, old, new) for key, each in value.items()}
    return [renamed(each, old, new) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("kind", "format", "key"), list(itertools.product(KINDS, OF_A_FORMAT, ALL_KEYS)))
def test_a_key_determines_what_is_read_or_is_refused(kind, format, key):
    others, columns = beside(kind, key), record_with(kind, format, key)
    with_key = {"format": format, **others, "keys": {**others["keys"], key: "other_name"}}
    if key not in keys_read(format, kind) or (kind, format) == ("ratings", "tree"):
        with pytest.raises(ValidationError, match=r"has no effect|Extra inputs|has ranks and no scores"):
            config(kind, **with_key)
        return
    expected = read(kind, columns, config(kind, format=format, **others))
    assert expected
    assert read(kind, renamed(columns, key, "other_name"), config(kind, **with_key)) == expected
    assert outcome(kind, columns, config(kind, **with_key)) != expected


SPOKEN = {"text": "Q: Human: a A: Human: b", "score": 1, "chosen": "Q: a A: b", "rejected": "Q: a A: c"}
CHANGES: dict[str, list[tuple[str, dict[str, Any], dict[str, Any], Any]]] = {
    "format": [("conversations", {"messages": [USER, ASSISTANT], "conversations": [USER, NO]}, {}, "sharegpt")],
    "keys": [("conversations", {"messages": [USER, ASSISTANT], "other": [USER, NO]}, {}, {"messages": "other"})],
    "roles": [("conversations", {"messages": [USER, ASSISTANT, USER, {"role": "gpt", "content": "x"}]}, {}, {"gpt": "user"})],
    "system": [(kind, {**PLAIN, "system": ""}, {"format": "plain"}, "Be brief.") for kind in KINDS],
    "join_turns": [("conversations", {"messages": [USER, USER, ASSISTANT]}, {}, True)],
    "markers": [(kind, SPOKEN, {"format": "transcript"}, {"Q:": "user", "A:": "assistant"}) for kind in KINDS],
    "replies": [("conversations", {"prompt": TREE}, {"format": "tree"}, "all")],
    "ignore": [(kind, {**PLAIN, "tools": "[]", "context": "x"}, {"format": "plain"}, ("tools", "context")) for kind in KINDS],
    "labels": [
        (
            "preferences",
            {"prompt": "Hello", "responses": ["Hi.", "No."], "votes": ["a"]},
            {"format": "plain", "keys": {"responses": "responses", "votes": "votes"}, "labels": {"a": 2}},
            {"a": 1},
        )
    ],
    "pairs": [
        (
            "preferences",
            {"prompt": "Hello", "responses": ["a", "b", "c"], "scores": [1, 2, 3]},
            {"format": "plain", "keys": {"responses": "responses", "scores": "scores"}},
            "all",
        )
    ],
    "score_range": [("ratings", PLAIN, {"format": "plain"}, (0, 5))],
}
"""For each setting: a stage kind, a record, the other settings, and a value that changes how the record is read."""


def test_every_setting_of_dialogues_is_tried():
    shared = {*SourceSettings.model_fields, *IngestSettings.model_fields, *StageConfig.model_fields}
    assert {name for kind in KINDS.values() for name in kind.model_fields} - shared == set(CHANGES)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CHANGES.items() for case in cases])
def test_a_setting_changes_the_key_and_what_is_read(name, case):
    kind, columns, others, value = case
    before, after = config(kind, **others), config(kind, **{**others, name: value})
    assert before.model_dump(mode="json")[name] != after.model_dump(mode="json")[name]
    assert outcome(kind, columns, before) != outcome(kind, columns, after)


@pytest.mark.parametrize(
    ("kind", "settings", "complaint"),
    [
        ("conversations", {"keys": {"promt": "question"}}, "renames 'promt', which no format has; did you mean 'prompt'?"),
        (
            "conversations",
            {"keys": {"prompt": "question"}},
            "keys: 'prompt' has no effect with format = \"messages\"",
        ),
        ("conversations", {"keys": {"reference": "a"}}, "keys: 'reference' has no effect with format = \"messages\" for conversations"),
        ("prompts", {"format": "plain", "keys": {"response": "a"}}, "keys: 'response' has no effect with format = \"plain\" for prompts"),
        ("prompts", {"format": "plain", "keys": {"prompt": ["a", "b"]}}, "prompt = ['a', 'b']: expected one column, path or template"),
        ("prompts", {"format": "plain", "keys": {"prompt": "{a"}}, "'{' is never closed"),
        ("conversations", {"keys": {"role": "{a}"}}, "role = '{a}': found a template, expected the name of a key inside each message"),
        ("conversations", {"markers": {"a": "assistant"}}, 'markers has no effect with format = "messages"; remove it, or set format'),
        ("conversations", {"format": "transcript", "markers": {"a": "user"}}, "none of them is the assistant's"),
        ("conversations", {"format": "transcript", "roles": {"a": "user"}}, 'roles has no effect with format = "transcript"'),
        ("conversations", {"replies": "all"}, 'replies = "all" has no effect with format = "messages"'),
        ("preferences", {"format": "tree", "replies": "all"}, "replies has no effect on preferences, which compare all replies"),
        ("conversations", {"ignore": ["title"]}, "'title' has no effect: only system, system_prompt, history"),
        ("conversations", {"ignore": ["system"], "system": "Be brief."}, "system has no effect"),
        ("conversations", {"ignore": ["system"], "keys": {"system": "a"}}, "ignore = ['system']: 'system' is read by keys.system = 'a'"),
        (
            "prompts",
            {"format": "plain", "ignore": ["context"], "keys": {"prompt": "{context?}{question}"}},
            "ignore = ['context']: 'context' is read by keys.prompt = '{context?}{question}'; remove one of the two",
        ),
        ("conversations", {"fields": ["messages"]}, "fields = ['messages']: 'messages' is a key of the record itself; remove it"),
        ("preferences", {"format": "plain", "fields": ["id", "prompt"]}, "'prompt' is a key of the record itself"),
        ("prompts", {"format": "plain", "fields": ["reference"]}, "'reference' is a key of the record itself"),
        ("ratings", {"format": "plain", "fields": ["messages"]}, "'messages' is a key of the record itself"),
        ("conversations", {"format": "tree", "ignore": ["weight"]}, "ignore = ['weight']: 'weight' has no effect with format = \"tree\""),
        ("conversations", {"format": "tree", "source": "csv"}, 'source = "csv" holds texts, and no tree'),
        ("prompts", {"format": "plain", "source": "csv", "roles": {"a": "user"}}, 'roles has no effect with source = "csv" and'),
        ("prompts", {"format": "plain", "source": "csv", "join_turns": True}, 'join_turns has no effect with source = "csv"'),
        ("prompts", {"format": "alpaca", "source": "csv", "keys": {"role": "a"}}, 'keys.role has no effect with source = "csv"'),
        ("prompts", {"format": "alpaca", "source": "csv", "ignore": ["weight"]}, "ignore = 'weight' has no effect with source = \"csv\""),
        ("prompts", {"format": "plain", "source": "text", "ignore": ["tools"]}, "ignore = 'tools' has no effect with source = \"text\""),
        (
            "ratings",
            {"format": "transcript", "source": "text"},
            'holds one text a record, which makes no ratings; expected source = "json"',
        ),
        ("ratings", {"format": "tree"}, 'format = "tree" has ranks and no scores; read it as preferences'),
        ("ratings", {"format": "plain", "keys": {"responses": "a"}}, "responses and scores go together"),
        ("ratings", {"format": "plain", "keys": {"responses": "a", "scores": "b", "response": "c"}}, "keys.response has no effect beside"),
        ("conversations", {"format": "plain", "source": "text"}, "holds one text a record, which makes no conversations"),
        ("preferences", {"format": "plain", "source": "text"}, "holds one text a record, which makes no preferences"),
        ("conversations", {"labels": {"a": 1}}, "Extra inputs are not permitted"),
        ("conversations", {"text": "body"}, "text = 'body' has no effect on dialogues"),
    ],
)
def test_a_setting_without_an_effect_is_refused(kind, settings, complaint):
    with pytest.raises(ValidationError) as raised:
        config(kind, **settings)
    assert complaint in str(raised.value)


def test_a_users_function_may_read_the_keys_of_any_kind():
    for key in ("response", "chosen", "score", "reference"):
        DialogueConfig(source="json", files=("a.jsonl",), format="plain", keys={key: "a"})


def test_a_source_of_a_mixture_is_checked_like_a_single_source(tmp_path: Path):
    sources = [{"source": "json", "files": ["a.jsonl"], "format": "plain", "keys": {"reference": "a"}}]
    with pytest.raises(ValidationError, match="'reference' has no effect with format = \"plain\" for conversations"):
        ConversationsConfig(mixture=sources)
    assert PromptsConfig(mixture=sources)


def test_settings_for_a_users_function_are_created_in_one_line():
    assert DialogueSettings(format="plain").format == PairSettings(format="plain").format == "plain"
