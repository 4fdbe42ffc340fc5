"""The four kinds of dialogue, from a file to their artifact, through the same sieve as documents."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.artifacts import Conversations, Preferences, Prompts, Ratings, Records
from pipelines.ingest.dialogues import DialogueConfig
from pipelines.stage import StageFailure
from pipelines.stages.conversations import conversations
from pipelines.stages.preferences import preferences
from pipelines.stages.prompts import prompts
from pipelines.stages.ratings import RatingsConfig, ratings

from .conftest import FakeStage, rejects

QUESTIONS = [f"question {number}" for number in range(40)]


@pytest.fixture
def made(data: Path, tmp_path: Path):
    """Write rows as JSON lines and run a kind over them."""

    def run(kind: Any, rows: list[dict[str, Any]], config: type[DialogueConfig] = DialogueConfig, **settings: Any) -> Records:
        (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        output = tmp_path / kind.__name__
        output.mkdir()
        checked = config(source="json", files=["rows.jsonl"], **settings)
        return kind(checked, FakeStage(output, checked.sources(data)))

    return run


def test_what_one_kind_holds_out_no_other_teaches(made):
    rows = [{"prompt": question, "response": "r", "chosen": "c", "rejected": "r", "score": 1, "reference": "c"} for question in QUESTIONS]
    settings = {"format": "plain", "hold_out": {"share": 0.3, "by": "prompt"}}
    found = [
        made(conversations, rows, **settings),
        made(preferences, rows, **settings),
        made(ratings, rows, RatingsConfig, **settings),
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


def test_a_record_keeps_where_it_is_from_and_the_columns_that_were_asked_for(made):
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
def test_an_assistant_who_answers_nobody_is_a_bad_record_however_records_are_held_out(made, tmp_path, by):
    rows = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}]} for question in QUESTIONS]
    rows[2] = {"messages": rows[2]["messages"][1:]}
    hold_out = {"share": 0.3, "by": by}
    with pytest.raises(StageFailure, match=r"rows.jsonl, line 3, column 1 .*: no user's message .*, who answers nobody\. Mend the record"):
        made(conversations, rows, hold_out=hold_out)
    (tmp_path / "conversations").rename(tmp_path / "failed")
    kept = made(conversations, rows, hold_out=hold_out, on_bad_record="skip", max_bad_share=0.03)
    assert (kept.metadata["conversations"], kept.metadata["records"]["bad"]) == (39, 1)
    assert [each["line"] for each in rejects(tmp_path / "conversations")] == [3]


def test_equal_dialogues_stand_once(made):
    row = {"prompt": "a", "response": "b"}
    kept = made(conversations, [row, row, {"prompt": "a", "response": "c"}], format="plain")
    assert kept.metadata["train"]["conversations"] == 2
    assert kept.metadata["records"] == {"read": 3, "bad": 0, "empty": 0, "short": 0, "duplicate": 1, "left_by_weight": 0}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"source": "text", "files": ["a.txt"]}, 'source = "text" has no columns to find messages in'),
        ({"source": "json", "files": ["a"], "text": "body"}, "text = 'body' has no effect on dialogues"),
        ({"source": "json", "files": ["a"], "mixture": [{"source": "json", "files": ["b"]}]}, "source stands beside mixture"),
        ({"source": "json"}, "want source .* and files, found source = json"),
    ],
)
def test_settings_without_sense_are_refused(settings, complaint):
    with pytest.raises(ValidationError, match=complaint):
        DialogueConfig(**settings)


def test_a_range_of_scores_has_an_inside():
    with pytest.raises(ValidationError, match=r"score_range = \[5.0, 1.0\]: wanted the lowest score, then the highest"):
        RatingsConfig(source="json", files=["a"], score_range=(5, 1))
