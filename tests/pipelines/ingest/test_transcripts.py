"""A dialogue in one text is split at the markers before its turns."""

from __future__ import annotations

import pytest

from pipelines.ingest.dialogue_settings import DialogueSettings
from pipelines.ingest.dialogues import to_conversation, to_prompt

HASHES = {"### Human:": "user", "### Assistant:": "assistant"}
CHATML = {
    "<|im_start|>system\n": "system",
    "<|im_start|>user\n": "user",
    "<|im_start|>assistant\n": "assistant",
    "<|im_end|>": "end",
}
LLAMA = {"<s>[INST] <<SYS>>": "system", "<</SYS>>": "user", "<s>[INST]": "user", "[/INST]": "assistant", "</s>": "end"}


def settings(**others: object) -> DialogueSettings:
    return DialogueSettings.model_validate({"format": "transcript", **others})


@pytest.mark.parametrize(
    ("text", "markers", "turns"),
    [
        ("\n\nHuman: Name a tree.\n\nAssistant: Oak.", {}, ["Name a tree.", "Oak."]),
        ("Human: Name a tree.\n\nAssistant: Oak.", {}, ["Name a tree.", "Oak."]),
        ("\r\n\r\nHuman: Name a tree.\r\n\r\nAssistant: Oak.\r\nAsh.", {}, ["Name a tree.", "Oak.\nAsh."]),
        ("\n\nHuman: A\n\nAssistant: B\n\nHuman: C\n\nAssistant: D", {}, ["A", "B", "C", "D"]),
        ("\n\nHuman: Say\nHuman: x\n\nAssistant: No.", {}, ["Say\nHuman: x", "No."]),
        ("Human: A\nAssistant: B\nHuman: C\nAssistant: D", {"\nHuman:": "user", "\nAssistant:": "assistant"}, ["A", "B", "C", "D"]),
        ("### Human: Name a tree.### Assistant: Oak.", HASHES, ["Name a tree.", "Oak."]),
        ("Be brief. ### Human: A ### Assistant: B", {"": "system", **HASHES}, ["Be brief.", "A", "B"]),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
            CHATML,
            ["Be brief.", "A", "B"],
        ),
        ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nA [/INST] B </s><s>[INST] C [/INST] D </s>", LLAMA, ["Be brief.", "A", "B", "C", "D"]),
    ],
)
def test_a_text_is_cut_at_its_markers(text, markers, turns):
    messages = to_conversation({"text": text}, settings(markers=markers))["messages"]
    assert [message["content"] for message in messages] == turns
    roles = ["user", "assistant", "user", "assistant"][: len(turns) - (messages[0]["role"] == "system")]
    assert [message["role"] for message in messages] == ["system"] * (len(turns) - len(roles)) + roles


def test_a_prompt_may_end_with_the_marker_that_asks_for_a_response():
    expected = {"prompt": [{"role": "user", "content": "A"}], "reference": None}
    assert to_prompt({"text": "\n\nHuman: A\n\nAssistant:"}, settings()) == expected
    assert to_prompt({"text": "\n\nHuman: A"}, settings()) == expected
    assert to_prompt({"text": "\n\nHuman: A\n\nAssistant: B"}, settings()) == {**expected, "reference": "B"}


def test_a_template_puts_two_columns_into_one_text():
    columns = {"prompt": "\n\nHuman: A\n\nAssistant:", "response": " B"}
    messages = to_conversation(columns, settings(keys={"text": "{prompt}{response}"}))["messages"]
    assert [message["content"] for message in messages] == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "markers", "reason"),
    [
        ("Name a tree.", {}, r"text has the text 'Name a tree.' before the first marker, expected '\\n\\nHuman:' or '\\n\\nAssistant:'"),
        ("Hm. \n\nHuman: A\n\nAssistant: B", {}, "text has the text 'Hm.' before the first marker, .* say with markers"),
        ("<|im_start|>user\nA<|im_end|>B<|im_start|>assistant\nC", CHATML, "text has the text 'B' after a turn's end"),
        ("\n\nHuman: A\n\nHuman: B\n\nAssistant: C", {}, "message 2 is the user's again; join_turns"),
        ("\n\nHuman:\n\nAssistant: C", {}, r"message 1 \(the user's\) is empty"),
        ("\n\nHuman: A\n\nAssistant:", {}, "no assistant's message"),
        ("Hello", {"Human:": "user", "Assistant:": "assistant", "": "user"}, "no assistant's message, .*; expected turns that begin with"),
        (
            "Human: A\nAssistant: B",
            {},
            r"begins with 'Assistant:' inside the user's turn, .* markers = \{ .\\nHuman:. = .user., .\\nAssistant:. = .assistant. \}",
        ),
        ("Human: A\n\nAssistant: B\nHuman: C\nAssistant: D", {}, "begins with 'Human:' inside the assistant's turn, expected a blank line"),
        (" ", {}, "text is empty"),
        (None, {}, "text is None, expected a text with markers"),
    ],
)
def test_a_text_that_is_not_a_dialogue_is_refused_with_the_reason(text, markers, reason):
    with pytest.raises(ValueError, match=reason):
        to_conversation({"text": text}, settings(markers=markers))
