"""The four stage kinds for dialogues apply the same filters as ingest does to documents."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.artifacts import Conversations, Preferences, Prompts, Ratings, Records
from pipelines.ingest.dialogue_settings import DialogueConfig
from pipelines.stage import StageFailure
from pipelines.stages.conversations import ConversationsConfig, conversations
from pipelines.stages.preferences import PreferencesConfig, preferences
from pipelines.stages.prompts import PromptsConfig, prompts
from pipelines.stages.ratings import RatingsConfig, ratings

from .conftest import FakeStage, rejects

QUESTIONS = [f"question {number}" for number in range(40)]
CONFIGS: dict[Any, type[DialogueConfig]] = {
    conversations: ConversationsConfig,
    preferences: PreferencesConfig,
    ratings: RatingsConfig,
    prompts: PromptsConfig,
}


@pytest.fixture
def made(data: Path, tmp_path: Path):
    """Write rows as JSON lines, or a text as it is, and run a kind over them."""

    def run(kind: Any, rows: list[dict[str, Any]] | str, **settings: Any) -> Records:
        (data / "rows.jsonl").write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        output = tmp_path / kind.__name__
        output.mkdir()
        checked = CONFIGS[kind](**{"source": "json", "files": ["rows.jsonl"], **settings})
        return kind(checked, FakeStage(output, checked.sources(data)))

    return run


def test_no_kind_trains_on_what_another_one_holds_out(made):
    rows = [{"prompt": question, "response": "r", "chosen": "c", "rejected": "r", "score": 1, "reference": "c"} for question in QUESTIONS]
    settings = {"format": "plain", "hold_out": {"share": 0.3, "by": "prompt"}}
    found = [
        made(conversations, rows, **settings),
        made(preferences, rows, **settings),
        made(ratings, rows, **settings),
        made(prompts, rows, **settings),
    ]
    assert [type(each) for each in found] == [Conversations, Preferences, Ratings, Prompts]

    def asked(records: Records, split: str) -> list[str]:
        return [(record.get("messages") or record["prompt"])[0]["content"] for record in records.records(split)]

    held_out = [asked(each, "held_out") for each in found]
    assert held_out[0] == held_out[1] == held_out[2] == held_out[3]
    assert 5 < len(held_out[0]) < 20
    assert sorted(held_out[0] + asked(found[0], "train")) == sorted(QUESTIONS)
    counts = [each.metadata["held_out"] for each in found]
    assert [next(iter(count)) for count in counts] == ["conversations", "pairs", "ratings", "prompts"]
    assert {next(iter(count.values())) for count in counts} == {len(held_out[0])}


def test_a_record_keeps_its_source_and_the_columns_in_fields(made):
    row = {"instruction": "Hello\r\nthere", "output": "Hi.", "topic": "greetings"}
    (record,) = made(conversations, [row], format="alpaca", fields=["topic"], license="MIT").records("train")
    assert record == {
        "messages": [{"role": "user", "content": "Hello\nthere"}, {"role": "assistant", "content": "Hi."}],
        "source": "rows.jsonl",
        "license": "MIT",
        "topic": "greetings",
    }


def test_a_bad_record_is_named_by_its_line_or_kept_among_the_rejects(made, tmp_path):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    with pytest.raises(StageFailure, match=r"rows.jsonl, line 2, column 1 \(byte 48\): chosen and rejected are equal, .*on_bad_record"):
        made(preferences, rows, format="plain")
    (tmp_path / "preferences").rename(tmp_path / "failed")
    made(preferences, rows, format="plain", on_bad_record="skip", max_bad_share=0.5)
    assert [each["line"] for each in rejects(tmp_path / "preferences")] == [2]


@pytest.mark.parametrize("by", ["prompt", "record"])
def test_a_conversation_without_a_user_is_a_bad_record_however_records_are_held_out(made, tmp_path, by):
    rows = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]} for question in QUESTIONS]
    rows[2] = {"messages": rows[2]["messages"][1:]}
    hold_out = {"share": 0.3, "by": by}
    with pytest.raises(StageFailure, match=r"rows.jsonl, line 3, column 1 .*: no user's message .*, expected one .*on_bad_record"):
        made(conversations, rows, hold_out=hold_out)
    (tmp_path / "conversations").rename(tmp_path / "failed")
    kept = made(conversations, rows, hold_out=hold_out, on_bad_record="skip", max_bad_share=0.03)
    assert (kept.metadata["conversations"], kept.metadata["records"]["bad"]) == (39, 1)
    assert [each["line"] for each in rejects(tmp_path / "conversations")] == [3]


def test_equal_dialogues_are_kept_once(made):
    row = {"prompt": "a", "response": "b"}
    kept = made(conversations, [row, row, {"prompt": "a", "response": "c"}], format="plain")
    assert kept.metadata["train"]["conversations"] == 2
    assert kept.metadata["records"] == {"read": 3, "bad": 0, "empty": 0, "short": 0, "duplicate": 1, "left_by_weight": 0}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"source": "text", "files": ["a.txt"]}, 'source = "text" has no columns to find messages in; expected source = "json"'),
        ({"source": "json", "files": ["a"], "text": "body"}, "text = 'body' has no effect on dialogues"),
        ({"source": "json", "files": ["a"], "mixture": [{"source": "json", "files": ["b"]}]}, "mixture"),
        ({"source": "json"}, "source .* and files"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, complaint):
    with pytest.raises(ValidationError, match=complaint):
        DialogueConfig(**settings)


def test_a_range_of_scores_has_a_finite_width():
    with pytest.raises(ValidationError, match=r"score_range = \[5.0, 1.0\]: expected the lowest score, then the highest"):
        RatingsConfig(source="json", files=["a"], score_range=(5, 1))
    with pytest.raises(ValidationError, match="expected the lowest score, then the highest"):
        RatingsConfig(source="json", files=["a"], score_range=(-1e308, 1e308))


def test_lines_of_text_are_prompts(made):
    kept = made(prompts, "Name a tree.\n\nName a fish.\n", source="text", unit="line", format="plain")
    assert [record["prompt"][0]["content"] for record in kept.records("train")] == ["Name a tree.", "Name a fish."]
    assert kept.metadata["records"]["left_out"] == 1


def test_paragraphs_of_text_are_transcripts(made):
    text = "Human: A\nAssistant: B\n\nHuman: C\nAssistant: D\n"
    markers = {"\nHuman:": "user", "\nAssistant:": "assistant"}
    kept = made(conversations, text, source="text", unit="paragraph", format="transcript", markers=markers)
    assert [[message["content"] for message in record["messages"]] for record in kept.records("train")] == [["A", "B"], ["C", "D"]]


def test_all_records_of_a_tree_are_on_one_side_of_the_hold_out(made):
    answers = [{"text": text, "role": "assistant", "rank": rank} for rank, text in enumerate(["a", "b", "c"])]
    rows = [{"prompt": {"text": question, "role": "prompter", "replies": answers}} for question in QUESTIONS]
    kept = made(preferences, rows, format="tree", pairs="all", hold_out={"share": 0.3, "by": "prompt"})
    assert kept.metadata["pairs"] == 3 * len(QUESTIONS)
    held_out, train = ({record["prompt"][0]["content"] for record in kept.records(split)} for split in ("held_out", "train"))
    assert held_out
    assert held_out.isdisjoint(train)


def test_ties_are_counted_and_left_out(made):
    rows = [{"prompt": question, "a": "x", "b": "y", "winner": winner} for question, winner in zip("pqr", "aab", strict=True)]
    rows.append({"prompt": "s", "a": "x", "b": "y", "winner": "tie"})
    keys, labels = {"responses": ["a", "b"], "votes": "winner"}, {"a": 1, "b": 2, "tie": 0}
    kept = made(preferences, rows, format="plain", keys=keys, labels=labels)
    assert [(pair["chosen"], pair["rejected"]) for pair in kept.records("train")] == [("x", "y"), ("x", "y"), ("y", "x")]
    assert kept.metadata["records"] == {"read": 4, "bad": 0, "empty": 0, "short": 0, "duplicate": 0, "left_by_weight": 0, "left_out": 1}


def test_each_source_in_a_mixture_of_pairs_is_read_by_its_own_settings(made, data):
    (data / "votes.jsonl").write_text(json.dumps({"prompt": "p", "a": "x", "b": "y", "winner": "b"}) + "\n")
    (data / "named.jsonl").write_text(json.dumps({"prompt": "q", "chosen": "x", "rejected": "y"}) + "\n")
    voted = {"keys": {"responses": ["a", "b"], "votes": "winner"}, "labels": {"a": 1, "b": 2}, "weight": 2.0}
    mixture = [{"source": "json", "files": [f"{name}.jsonl"], "format": "plain", **how} for name, how in (("votes", voted), ("named", {}))]
    kept = made(preferences, "", source=None, files=(), mixture=mixture)
    assert [pair["chosen"] for pair in kept.records("train")] == ["y", "y", "x"]
