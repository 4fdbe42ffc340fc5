"""A tree of ranked replies becomes a conversation per path, a pair per choice, and a prompt per question."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.ingest.dialogue_settings import DialogueSettings, PairSettings
from pipelines.ingest.dialogues import to_conversations, to_prompts
from pipelines.ingest.pairs import to_pairs


def node(text: str, rank: int | None = None, *replies: dict[str, Any], **others: Any) -> dict[str, Any]:
    role = "prompter" if text.endswith("?") else "assistant"
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), "lang": "en", **others}


TREE = node("Tree?", None, node("Cod.", 1), node("Oak.", 0, node("Why?", None, node("Leaves.")), node("More?")), node("Hm.", None))
"""Two ranked answers and one without a rank; two questions follow the better one, of which one is answered."""


def words(messages: list[dict[str, str]]) -> str:
    return " ".join(message["content"] for message in messages)


@pytest.mark.parametrize(
    ("replies", "expected"),
    [("best", ["Tree? Oak. Why? Leaves."]), ("all", ["Tree? Oak. Why? Leaves.", "Tree? Cod.", "Tree? Hm."])],
)
def test_each_path_that_ends_with_the_assistant_is_a_conversation(replies, expected):
    found = to_conversations({"prompt": TREE}, DialogueSettings(format="tree", replies=replies))
    assert [words(each["messages"]) for each in found] == expected


def test_each_user_message_is_a_prompt_with_its_best_reply_as_the_reference():
    found = to_prompts({"prompt": TREE}, DialogueSettings(format="tree"))
    assert [(words(each["prompt"]), each["reference"]) for each in found] == [
        ("Tree?", "Oak."),
        ("Tree? Oak. Why?", "Leaves."),
        ("Tree? Oak. More?", None),
    ]


def test_each_message_with_ranked_replies_is_a_pair_of_the_best_and_the_worst_or_all_pairs():
    three = {
        "prompt": node(
            "Tree?", None, node("Cod.", 2, node("Fish?", None, node("Yes.", 1), node("No.", 0))), node("Oak.", 0), node("Ash.", 1)
        )
    }
    pairs = to_pairs(three, PairSettings(format="tree"))
    assert [(words(each["prompt"]), each["chosen"], each["rejected"]) for each in pairs] == [
        ("Tree?", "Oak.", "Cod."),
        ("Tree? Cod. Fish?", "No.", "Yes."),
    ]
    pairs = to_pairs(three, PairSettings(format="tree", pairs="all"))
    assert [(each["chosen"], each["rejected"]) for each in pairs] == [("Oak.", "Ash."), ("Oak.", "Cod."), ("Ash.", "Cod."), ("No.", "Yes.")]


def test_a_tree_without_two_ranked_replies_has_no_pair_and_one_without_an_answer_no_conversation():
    assert to_pairs({"prompt": node("Tree?", None, node("Oak."), node("Cod."))}, PairSettings(format="tree")) == []
    assert to_conversations({"prompt": node("Tree?")}, DialogueSettings(format="tree")) == []


def test_a_record_may_be_the_tree_itself_and_its_keys_may_have_other_names():
    tree = {"words": "Tree?", "who": "prompter", "children": [{"words": "Oak.", "who": "assistant"}]}
    keys = {"text": "words", "role": "who", "replies": "children"}
    (found,) = to_conversations(tree, DialogueSettings(format="tree", keys=keys))
    assert words(found["messages"]) == "Tree? Oak."


def test_a_row_of_a_table_of_messages_is_no_tree():
    row = {"message_id": "1", "parent_id": None, "text": "Tree?", "role": "prompter"}
    with pytest.raises(ValueError, match=r"no column 'prompt'; .* expected a message that holds its replies, .* must be nested first"):
        to_conversations(row, DialogueSettings(format="tree"))


def test_deleted_replies_are_left_out():
    tree = node("Tree?", None, node("Oak.", 0, deleted=True), node("Ash.", 1))
    (found,) = to_conversations({"prompt": tree}, DialogueSettings(format="tree"))
    assert words(found["messages"]) == "Tree? Ash."


def test_a_tree_whose_first_message_is_deleted_is_left_out():
    tree = node("Tree?", None, node("Oak.", 0), node("Ash.", 1), deleted=True)
    assert to_conversations({"prompt": tree}, DialogueSettings(format="tree")) == []
    assert to_prompts(tree, DialogueSettings(format="tree")) == []
    assert to_pairs({"prompt": tree}, PairSettings(format="tree")) == []


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "Tree?"}, "prompt is 'Tree\\?', expected a message with text, role and replies"),
        ({"messages": []}, "no column 'prompt'; there are: messages"),
        ({"prompt": {**TREE, "replies": ["Oak."]}}, r"replies is \['Oak.'\], expected a list of messages"),
        ({"prompt": {"text": "Tree?", "replies": []}}, "a reply has the keys text, replies; expected text and role"),
        (
            {"prompt": node("Tree?", None, node("Oak.", "best"))},
            "a reply's rank is 'best', expected a number, of which the lowest is the best",
        ),
        ({"prompt": node("Tree?", None, node(" ", 0))}, r"message 2 \(the assistant's\) is empty"),
    ],
)
def test_a_record_that_is_not_a_tree_is_refused(columns, reason):
    with pytest.raises(ValueError, match=reason):
        to_conversations(columns, DialogueSettings(format="tree"))
