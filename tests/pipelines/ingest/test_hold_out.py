"""All stages hold out by one rule: equal texts are on the same side, wherever they come from."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.artifacts import Records
from pipelines.ingest.dialogue_settings import DialogueConfig
from pipelines.stages.conversations import conversations
from pipelines.stages.ingest import IngestConfig, ingest
from pipelines.stages.prompts import PromptsConfig, prompts

from .conftest import FakeStage

QUESTIONS = [f"def f{number}():\n" for number in range(100)]


@pytest.fixture
def made(data: Path, tmp_path: Path):
    def run(kind: Any, config: type, content: str, name: str = "rows.jsonl", **settings: Any) -> Records:
        (data / name).write_text(content)
        output = tmp_path / f"{kind.__name__}-{len(list(tmp_path.iterdir()))}"
        output.mkdir()
        settings.setdefault("source", "json")
        checked = config(files=[name], **settings)
        return kind(checked, FakeStage(output, checked.sources(data)))

    return run


def lines(**columns: Any) -> str:
    """Return JSON lines, one per question; each column is a function of the question."""
    return "".join(json.dumps({name: make(question) for name, make in columns.items()}) + "\n" for question in QUESTIONS)


def held_out(records: Records) -> set[str]:
    """The question of every held-out record."""
    found = set()
    for record in records.records("held_out"):
        text = record["text"] if "text" in record else (record.get("messages") or record["prompt"])[0]["content"]
        found.add(text[: text.index("\n") + 1])
    return found


def test_a_prompt_column_of_documents_and_the_prompt_of_dialogues_hold_out_the_same_questions(made):
    hold_out = {"share": 0.2, "by": "prompt"}
    rows = lines(prompt=str, solution=lambda question: "    return 0\n", reference=lambda question: "0")
    found = [
        held_out(made(ingest, IngestConfig, rows, text="{prompt}{solution}", hold_out=hold_out)),
        held_out(made(conversations, DialogueConfig, rows, format="plain", keys={"response": "solution"}, hold_out=hold_out)),
        held_out(made(prompts, DialogueConfig, rows, format="plain", hold_out=hold_out)),
    ]
    assert found[0] == found[1] == found[2]
    assert 10 < len(found[0]) < 35  # 100 draws at 0.2: 20 expected, a standard deviation of 4


def test_equal_texts_are_on_one_side_whatever_their_column_and_format(made):
    json_rows = lines(question=str)
    csv_rows = "question\n" + "".join(f'"{question}"\n' for question in QUESTIONS)
    nested = lines(meta=lambda question: {"question": question}, text=lambda question: question + "x")
    messages = lines(
        messages=lambda question: [
            {"role": "system", "content": "Be brief.\n"},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "x"},
        ]
    )
    by_question = {"share": 0.2, "by": "question"}
    found = [
        held_out(made(ingest, IngestConfig, json_rows, text="question", hold_out=by_question)),
        held_out(made(ingest, IngestConfig, csv_rows, "rows.csv", source="csv", text="question", hold_out=by_question)),
        held_out(made(ingest, IngestConfig, nested, hold_out={"share": 0.2, "by": "meta.question"})),
    ]
    asked = made(conversations, DialogueConfig, messages, hold_out={"share": 0.2, "by": "prompt"})
    found.append({record["messages"][1]["content"] for record in asked.records("held_out")})
    assert all(each == found[0] for each in found)
    assert found[0]


def test_a_number_is_held_out_like_its_digits(made):
    as_numbers = "".join(json.dumps({"text": f"{number}\n", "id": number}) + "\n" for number in range(100))
    as_texts = "".join(json.dumps({"text": f"{number}\n", "id": str(number)}) + "\n" for number in range(100))
    found = [held_out(made(ingest, IngestConfig, rows, hold_out={"share": 0.2, "by": "id"})) for rows in (as_numbers, as_texts)]
    assert found[0] == found[1] != set()


def test_crlf_in_a_question_does_not_change_its_side(made):
    unix, dos = lines(text=str), lines(text=lambda question: question.replace("\n", "\r\n"))
    found = [held_out(made(ingest, IngestConfig, rows, hold_out={"share": 0.2, "by": "text"})) for rows in (unix, dos)]
    assert found[0] == found[1] != set()


@pytest.mark.parametrize("by", ["prompt", "book"])
def test_text_files_have_no_column_to_hold_out_by(by):
    settings = {"source": "text", "files": ["a.txt"], "format": "plain", "hold_out": {"share": 0.1, "by": by}}
    if by == "prompt":
        assert PromptsConfig(**settings)
    else:
        with pytest.raises(ValidationError, match='source = "text" has no columns; expected "record" or "source" or "prompt"'):
            PromptsConfig(**settings)
    with pytest.raises(ValidationError, match=f'hold_out.by = {by!r}: source = "text" has no columns; expected "record" or "source"'):
        IngestConfig(source="text", files=["a.txt"], hold_out={"share": 0.1, "by": by})


def test_a_held_out_share_far_from_the_requested_one_is_recorded(ingested):
    # five books, of which one is 92 of 100 records: whichever side it falls on, the share is far from a half
    books = ["long"] * 92 + ["a", "a", "b", "b", "c", "c", "d", "d"]
    rows = "".join(json.dumps({"text": f"text {number}", "book": book}) + "\n" for number, book in enumerate(books)).encode()
    result = ingested({"a.jsonl": rows}, source="json", hold_out={"share": 0.5, "by": "book"})
    held_out = len(result.texts("held_out"))
    assert abs(held_out - 50) > 40
    assert result.metadata("hold_out") == {"asked": 0.5, "by": "book", "share": held_out / 100, "groups": 5}


def test_a_share_near_the_requested_one_is_not_mentioned(ingested):
    rows = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(1000)).encode()
    assert "hold_out" not in ingested({"a.jsonl": rows}, source="json", hold_out={"share": 0.1}).documents.metadata
