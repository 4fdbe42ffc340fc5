"""Held-out records of one stage are looked for in the training records of other stages."""

import json

import pytest

from pipelines.artifacts import Conversations, Documents, Preferences, Prompts, Records
from pipelines.ingest.overlap import Overlap, overlap

PROBLEMS = [f"Write a function f{number} that returns the {number} times table of its argument as a list." for number in range(20)]


@pytest.fixture
def artifact(tmp_path):
    def make(kind: type[Records], name: str, train: list[dict], held_out: list[dict] = ()) -> Records:
        folder = tmp_path / name
        folder.mkdir()
        for split, records in (("train", train), ("held_out", held_out)):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return kind(folder, "0" * 64)

    return make


def asked(question: str, **more) -> dict:
    return {"prompt": [{"role": "user", "content": question}], **more}


def test_a_document_that_contains_a_held_out_question_and_its_solution_is_found(artifact):
    prompts = artifact(Prompts, "prompts", [], [asked(problem) for problem in PROBLEMS[:10]])
    documents = artifact(Documents, "documents", [{"text": f"# {problem}\n\ndef f(): pass"} for problem in PROBLEMS[7:]])
    assert overlap(prompts, [documents]) == [Overlap(held_out=10, equal=0, contained=3, examples=[text[:60] for text in PROBLEMS[7:10]])]


def test_a_question_is_found_as_a_message_of_any_turn_and_in_a_pair(artifact):
    prompts = artifact(Prompts, "prompts", [], [asked("Hello?"), asked("Who?"), asked("Why?"), asked("And?")])
    later = [("user", "Other?"), ("assistant", "a"), ("user", "Who?"), ("assistant", "b")]
    conversations = artifact(
        Conversations, "conversations", [{"messages": [{"role": role, "content": content} for role, content in later]}]
    )
    pairs = artifact(Preferences, "pairs", [asked("Hello?", chosen="a", rejected="b"), asked("Why?", chosen="a", rejected="b")])
    found = overlap(prompts, [conversations, pairs])
    assert [(each.held_out, each.equal, each.contained, each.examples) for each in found] == [
        (4, 1, 0, ["Who?"]),
        (4, 2, 0, ["Hello?", "Why?"]),
    ]
    assert [each.share for each in found] == [0.25, 0.5]


def test_white_space_is_ignored_and_a_short_text_inside_another_does_not_count(artifact):
    held_out = artifact(Documents, "held_out", [], [{"text": "one two\n three"}, {"text": "a b c"}])
    train = artifact(Documents, "train", [{"text": "one  two three\n"}, {"text": "x a b c y"}])
    assert overlap(held_out, [train]) == [Overlap(held_out=2, equal=1, contained=0, examples=["one two\n three"])]


def test_chinese_text_without_spaces_is_found_inside_another(artifact):
    held_out = artifact(Documents, "held_out", [], [{"text": "床前明月光疑是地上霜"}])
    train = artifact(Documents, "train", [{"text": "静夜思\n李白\n床前明月光\n疑是地上霜\n举头望明月"}])
    assert overlap(held_out, [train])[0].contained == 1


def test_without_held_out_records_there_is_no_overlap(artifact):
    empty = artifact(Documents, "empty", [])
    assert overlap(empty, [empty]) == [Overlap(held_out=0)]
    assert Overlap(held_out=0).share == 0.0
