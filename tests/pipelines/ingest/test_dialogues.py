"""Every published form of a dialogue becomes a conversation, a rating or a prompt, or an error says why not and what to do."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest

from pipelines.ingest.dialogue_settings import DialogueSettings
from pipelines.ingest.dialogues import to_conversation, to_prompt, to_prompts, to_rating, to_ratings

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
BRIEF = {"role": "system", "content": "Be brief."}


def settings(format: str = "messages", **others: object) -> DialogueSettings:
    return DialogueSettings.model_validate({"format": format, **others})


def contents(conversation: dict[str, Any]) -> list[str]:
    return [message["content"] for message in conversation["messages"]]


# ---- conversations ----


@pytest.mark.parametrize(
    ("columns", "how"),
    [
        ({"messages": HELLO}, settings()),
        ({"messages": json.dumps(HELLO)}, settings()),
        ({"conversations": SHAREGPT}, settings("sharegpt")),
        ({"instruction": "Hello", "input": "", "output": "Hi."}, settings("alpaca")),
        ({"instruction": "Hello", "output": "Hi."}, settings("alpaca")),
        ({"prompt": "Hello", "response": "Hi."}, settings("plain")),
        ({"prompt": [HELLO[0]], "response": [HELLO[1]]}, settings("plain")),
        ({"prompt": "Hello", "response": HELLO}, settings("plain")),
        ({"question": "Hello", "answer": "Hi."}, settings("plain", keys={"prompt": "question", "response": "answer"})),
        ({"data": {"q": ["Hello", "Hi."]}}, settings("plain", keys={"prompt": "data.q.0", "response": "data.q.1"})),
        ({"name": "Hello", "end": "."}, settings("plain", keys={"prompt": "{name}", "response": "Hi{end}"})),
        (
            {"utterances": [{"speaker": "CUSTOMER", "text": "Hello"}, {"speaker": "agent", "text": "Hi."}]},
            settings(keys={"messages": "utterances", "role": "speaker", "content": "text"}, roles={"CUSTOMER": "user"}),
        ),
        ({"messages": [*HELLO, {"role": "user", "content": "And you?"}]}, settings()),
    ],
)
def test_each_format_reads_one_greeting(columns, how):
    assert to_conversation(columns, how) == {"messages": HELLO}


def test_alpacas_input_follows_its_instruction_and_its_history_comes_before():
    columns = {"instruction": "Translate.", "input": "chat", "output": "cat", "history": [["Hello", "Hi."]], "system": "Be brief."}
    messages = to_conversation(columns, settings("alpaca"))["messages"]
    assert messages == [BRIEF, *HELLO, {"role": "user", "content": "Translate.\n\nchat"}, {"role": "assistant", "content": "cat"}]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"prompt": "\n\nHuman: Hello\n\nAssistant:", "response": "Hi."}, "prompt"),
        ({"prompt": "Hello", "response": "Human: Hello\n\nAssistant: Hi."}, "response"),
    ],
)
def test_a_whole_dialogue_where_one_message_is_expected_is_refused_with_the_format_that_reads_it(columns, name):
    with pytest.raises(ValueError, match=rf'{name} is a whole dialogue, .* format = "transcript" reads it with keys = .* text = "{name}"'):
        to_conversation(columns, settings("plain"))


@pytest.mark.parametrize("format", ["messages", "plain"])
def test_an_empty_system_message_says_nothing_and_is_left_out(format):
    messages = [{"role": "system", "content": None}, *HELLO]
    columns = {"messages": messages, "prompt": messages[:2], "response": messages}
    assert to_conversation(columns, settings(format)) == {"messages": HELLO}
    assert to_conversation(columns, settings(format, system="Be brief.")) == {"messages": [BRIEF, *HELLO]}


def test_alpacas_history_in_a_table_is_a_list_as_json():
    columns = {"instruction": "Translate.", "output": "cat", "history": '[["Hello", "Hi."]]'}
    assert contents(to_conversation(columns, settings("alpaca"))) == ["Hello", "Hi.", "Translate.", "cat"]
    assert contents(to_conversation({**columns, "history": "[]"}, settings("alpaca"))) == ["Translate.", "cat"]


def test_what_is_ignored_is_left_out_of_a_format_that_reads_it_otherwise():
    columns = {"instruction": "Translate.", "input": "chat", "output": "cat", "history": [["Hello", "Hi."]]}
    assert contents(to_conversation(columns, settings("alpaca", ignore=["history"]))) == ["Translate.\n\nchat", "cat"]
    assert contents(to_conversation(columns, settings("alpaca", ignore=["history", "input"]))) == ["Translate.", "cat"]


@pytest.mark.parametrize("nothing", ["", "[]", "{}", "null", [], None])
def test_a_column_of_an_empty_list_as_json_holds_nothing(nothing):
    assert to_prompt({"prompt": "Hello", "tools": nothing}, settings("plain"))["prompt"] == HELLO[:1]


@pytest.mark.parametrize("history", [[["Hello"]], ["Hello", "Hi."], [["Hello", None]], "Hello", "7", '{"a": 1}'])
def test_each_turn_of_alpacas_history_is_two_texts(history):
    with pytest.raises(ValueError, match=r"history has .*, expected turns such as \['Hello', 'Hi\.'\]"):
        to_conversation({"instruction": "Translate.", "output": "cat", "history": history}, settings("alpaca"))


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ({"messages": HELLO}, "messages"),
        ({"conversations": SHAREGPT}, "sharegpt"),
        ({"instruction": "Hello", "output": "Hi."}, "alpaca"),
        ({"prompt": "Hello", "response": "Hi."}, "plain"),
        ({"text": "\n\nHuman: Hello\n\nAssistant: Hi."}, "transcript"),
    ],
)
def test_a_system_column_or_the_systems_setting_is_the_first_message_in_every_format(columns, format):
    with_system = {"messages": [BRIEF, *HELLO]}
    assert to_conversation({**columns, "system": "Be brief."}, settings(format)) == with_system
    assert to_conversation({**columns, "sys": "Be brief."}, settings(format, keys={"system": "sys"})) == with_system
    assert to_conversation({**columns, "how": "brief"}, settings(format, keys={"system": "Be {how}."})) == with_system
    assert to_conversation(columns, settings(format, system="Be brief.")) == with_system
    assert to_conversation({**columns, "system": "Be brief."}, settings(format, system="Be long.")) == with_system
    assert to_conversation({**columns, "system": "Be brief."}, settings(format, ignore=["system"])) == {"messages": HELLO}
    assert to_conversation({**columns, "system": ""}, settings(format)) == {"messages": HELLO}


def test_two_system_messages_are_joined_only_on_request():
    columns = {"messages": [BRIEF, *HELLO], "system": "Be kind."}
    with pytest.raises(ValueError, match="message 2 is the system's again; join_turns = true"):
        to_conversation(columns, settings())
    assert contents(to_conversation(columns, settings(join_turns=True)))[0] == "Be kind.\nBe brief."
    assert contents(to_conversation({**columns, "system": "Be brief."}, settings())) == ["Be brief.", "Hello", "Hi."]
    both = settings(keys={"system": "{messages.0.content} {system}"})
    assert contents(to_conversation(columns, both)) == ["Be brief. Be kind.", "Hello", "Hi."]
    assert contents(to_conversation({"messages": [BRIEF, *HELLO]}, settings(system="Be kind."))) == ["Be brief.", "Hello", "Hi."]


def test_an_assistants_welcome_stays_where_it_is():
    messages = [{"role": "assistant", "content": "Welcome!"}, *HELLO]
    assert to_conversation({"messages": messages}, settings()) == {"messages": messages}


@pytest.mark.parametrize(
    ("columns", "how", "reason"),
    [
        ({"text": "a"}, settings(), r"no column 'messages'; there are: text; keys = \{ messages = .* names"),
        ({"dialog": HELLO}, settings(), r"no column 'messages'; there are: dialog; keys = \{ messages = \"dialog\" \}"),
        ({"conversations": SHAREGPT}, settings(), "no column 'messages'; .*; set format = \"sharegpt\""),
        ({"instruction": "a", "output": "b"}, settings(), "no column 'messages'; .*; set format = \"alpaca\""),
        ({"prompt": "a", "completion": "b"}, settings("plain"), r"no column 'response'; .*; keys = \{ response = \"completion\" \}"),
        ({"dialogue": "Human: Hello\n\nAssistant: Hi."}, settings("plain"), "no column 'prompt'; .*; format = \"transcript\" reads"),
        ({"prompt": {"text": "a", "replies": []}, "response": "b"}, settings("plain"), 'prompt is a tree of replies, .*"tree"'),
        ({"prompt": "a", "response": 4}, settings("plain"), r"response is 4, expected a text .*; keys = \{ response = \"\{response\}\" \}"),
        ({"prompt": 4, "response": "a"}, settings("plain"), r"prompt is 4.* keys = \{ prompt = \"\{prompt\}\" \}"),
        ({"instruction": 4, "output": "a"}, settings("alpaca"), r"instruction is 4, expected a text; keys = \{ instruction = "),
        ({"prompt": "a", "response": ["b", "c"]}, settings("plain"), r"response is a list of 2, .* keys = \{ response = \"response.0\" \}"),
        ({"prompt": "a", "response": " "}, settings("plain"), "response is empty"),
        ({"prompt": "a", "response": [HELLO[0]]}, settings("plain"), "response ends with the user's message, expected an assistant's"),
        ({"prompt": "a", "response": HELLO}, settings("plain"), "response begins with 'Hello', the prompt is 'a'; expected one prompt"),
        ({"prompt": "a", "answer": {"b": 1}}, settings("plain", keys={"response": "answer.c"}), "no 'c' in 'answer', which is an object"),
        ({"prompt": HELLO, "response": "b"}, settings("plain"), "message 3 is the assistant's again"),
        ({"messages": "[1"}, settings(), "messages is '\\[1', expected a list as JSON"),
        ({"prompt": {}}, settings("tree"), "makes several of one record"),
    ],
)
def test_a_record_of_another_form_is_refused_with_the_setting_that_reads_it(columns, how, reason):
    with pytest.raises(ValueError, match=reason):
        to_conversation(columns, how)


# ---- columns that nothing reads ----


@pytest.mark.parametrize(
    ("column", "value", "advice"),
    [
        ("tools", '[{"name": "add"}]', r'keys = \{ system = "You can call these functions:\\n\{tools\}" \}'),
        ("functions", [{"name": "add"}], r'keys = \{ system = "You can call these functions:\\n\{functions\}" \}'),
        ("choices", ["3", "4"], r'keys = \{ prompt = "\{question\}\\n\{choices:letters\}" \}'),
        ("options", {"A": "3"}, r'keys = \{ prompt = "\{question\}\\n\{options:letters\}" \}'),
        ("context", "A text.", r'keys = \{ prompt = "\{context\}\\n\\n\{question\}" \}'),
        ("input", "A text.", r'keys = \{ prompt = "\{question\}\\n\\n\{input\}" \}'),
        ("history", [["Hello", "Hi."]], 'format = "alpaca"'),
        ("system_prompt", "Be brief.", r'keys = \{ system = "system_prompt" \}'),
        ("images", ["a.png"], "only text can be learned"),
    ],
)
@pytest.mark.parametrize("read", [to_conversation, to_prompt])
def test_a_column_that_changes_what_an_answer_means_is_read_or_refused_or_ignored_on_purpose(column, value, advice, read):
    keys = {"prompt": "question"}
    columns = {"question": "2 + 2?", "response": "4"}
    with pytest.raises(ValueError, match=f"column '{column}' holds .*{advice}.*; or set ignore = ..{column}"):
        read({**columns, column: value}, settings("plain", keys=keys))
    expected = read(columns, settings("plain", keys=keys))
    assert read({**columns, column: value}, settings("plain", keys=keys, ignore=[column])) == expected
    for nothing in (None, "", [], {}, [[]]):
        assert read({**columns, column: nothing}, settings("plain", keys=keys)) == expected


@pytest.mark.parametrize(
    ("format", "columns", "keys", "use"),
    [
        ("messages", {"messages": HELLO, "context": "A text."}, {}, 'keys = { system = "{context}" }'),
        ("sharegpt", {"conversations": SHAREGPT, "choices": ["3"]}, {}, 'keys = { system = "{choices:letters}" }'),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "context": "A text."},
            {},
            'keys = { instruction = "{context}\\n\\n{instruction}" }',
        ),
        (
            "plain",
            {"q": "a", "response": "b", "options": ["3"]},
            {"prompt": "Q: {q}"},
            'keys = { prompt = "Q: {q}\\n{options:letters}" }',
        ),
    ],
)
def test_the_advice_for_a_column_is_a_setting_that_reads_it(format, columns, keys, use):
    with pytest.raises(ValueError, match="which no message would have") as raised:
        to_conversation(columns, settings(format, keys=keys))
    assert use in str(raised.value)
    advised = tomllib.loads(re.search(r"keys = \{.*?\" \}", str(raised.value))[0])["keys"]
    assert to_conversation(columns, settings(format, keys={**keys, **advised}))


def test_tools_become_the_system_message_where_a_record_has_any():
    how = settings("sharegpt", keys={"system": "Functions: {tools?}"})
    assert contents(to_conversation({"conversations": SHAREGPT, "tools": [{"name": "add"}]}, how))[0] == 'Functions: [{"name": "add"}]'
    assert contents(to_conversation({"conversations": SHAREGPT, "tools": "[]"}, how))[0] == "Functions: []"
    for without in ({}, {"tools": None}, {"tools": ""}):
        assert contents(to_conversation({"conversations": SHAREGPT, **without}, how)) == ["Hello", "Hi."]


def test_a_missing_required_key_is_refused_with_how_to_make_it_optional():
    with pytest.raises(ValueError, match=r"no column 'sys'; there are: messages; .* keys = \{ system = \"sys\?\" \}"):
        to_conversation({"messages": HELLO}, settings(keys={"system": "sys"}))
    assert to_conversation({"messages": HELLO}, settings(keys={"system": "sys?"})) == {"messages": HELLO}


# ---- ratings ----


def test_a_score_of_one_to_five_becomes_zero_to_one():
    columns = {"prompt": "Hello", "response": "Hi.", "score": 4}
    assert to_rating(columns, settings("plain"), (1, 5)) == {"prompt": [HELLO[0]], "response": "Hi.", "score": 0.75}


@pytest.mark.parametrize(
    ("score", "expected"),
    [(1, 0.0), (5, 1.0), ("4", 0.75), (" 4.0 ", 0.75), ("1e0", 0.0), (True, 1.0), (False, 0.0), ("true", 1.0), ("False", 0.0)],
)
def test_a_score_is_a_number_or_a_verdict_even_if_a_table_has_it_as_text(score, expected):
    rating = to_rating({"prompt": "Hello", "response": "Hi.", "score": score}, settings("plain"), (1, 5))
    assert rating["score"] == expected
    assert isinstance(rating["score"], float)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (6, r"score is 6, out of score_range = \[1, 5\]"),
        (float("nan"), r"score is nan, out of score_range"),
        ("good", "score is 'good', expected a number, true or false"),
        ("nan", "score is 'nan', expected a number"),
        ("1_0", "score is '1_0', expected a number"),
        ("", "score is '', expected a number"),
        (None, "score is None, expected a number"),
        ([4], r"score is \[4\], expected a number"),
    ],
)
def test_a_value_that_is_not_a_score_is_refused(score, reason):
    with pytest.raises(ValueError, match=reason):
        to_rating({"prompt": "Hello", "response": "Hi.", "score": score}, settings("plain"), (1, 5))


@pytest.mark.parametrize(
    ("columns", "how"),
    [
        ({"messages": HELLO, "label": True}, settings(keys={"score": "label"})),
        ({"messages": HELLO, "label": True}, settings(keys={"score": "label", "response": "messages"})),
        ({"conversations": SHAREGPT, "score": 1}, settings("sharegpt")),
        ({"prompt": "Hello", "completion": "Hi.", "label": True}, settings("plain", keys={"response": "completion", "score": "label"})),
        ({"prompt": HELLO, "score": 1}, settings("plain")),
        ({"instruction": "Hello", "output": "Hi.", "score": 1}, settings("alpaca", keys={"response": "output"})),
        ({"text": "Human: Hello\n\nAssistant: Hi.", "score": 1}, settings("transcript")),
        ({"messages": [HELLO[0]], "response": "Hi.", "scores": {"help": 1}}, settings(keys={"score": "scores.help"})),
    ],
)
def test_a_rating_is_for_a_response_or_for_a_conversations_last_message(columns, how):
    assert to_rating(columns, how, (0, 1)) == {"prompt": [HELLO[0]], "response": "Hi.", "score": 1.0}


def test_a_rating_without_a_response_names_the_column_that_is_missing():
    with pytest.raises(ValueError, match=r"no column 'response'; .*; keys = \{ response = \"completion\" \}"):
        to_rating({"prompt": "Hello", "completion": "Hi.", "score": 1}, settings("plain"), (0, 1))
    with pytest.raises(ValueError, match="the conversation ends with the user's message, expected the response that was rated; keys = "):
        to_rating({"messages": HELLO[:1], "score": 1}, settings(), (0, 1))


def test_several_responses_with_their_scores_are_several_ratings():
    how = settings("alpaca", keys={"responses": "completions.*.response", "scores": "completions.*.overall"})
    completions = [{"response": "Hi.", "overall": 4}, {"response": "No.", "overall": 1.5}]
    ratings = to_ratings({"instruction": "Hello", "completions": completions}, how, (0, 5))
    assert [(each["prompt"], each["response"], each["score"]) for each in ratings] == [
        ([HELLO[0]], "Hi.", 0.8),
        ([HELLO[0]], "No.", 0.3),
    ]


# ---- prompts ----


def test_a_prompt_has_a_reference_or_none():
    assert to_prompt({"prompt": "Hello"}, settings("plain")) == {"prompt": [HELLO[0]], "reference": None}
    assert to_prompt({"messages": HELLO}, settings()) == {"prompt": [HELLO[0]], "reference": "Hi."}


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (4.0, "4.0"),
        (4, "4"),
        ("four", "four"),
        (["four"], "four"),
        (["four", "four"], "four"),
        ([4], "4"),
        (None, None),
        ("", None),
        ([], None),
        ([HELLO[1]], "Hi."),
    ],
)
def test_a_reference_is_one_text(reference, expected):
    assert to_prompt({"prompt": "2 + 2?", "reference": reference}, settings("plain"))["reference"] == expected


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (["4", "four"], r"reference has 2 alternatives, \['4', 'four'\], expected one right answer; .*reference = \"reference.0\""),
        (float("nan"), "reference is nan, expected a text or a finite number"),
        (float("inf"), "reference is inf, expected"),
        (True, r"reference is True, expected .*; keys = \{ reference = \"\{reference\}\" \}"),
        ([True], "reference is True, expected"),
        (
            {"text": "4"},
            r"reference is an object with text, expected .*; a path names it, such as keys = \{ reference = \"reference.text\" \}",
        ),
    ],
)
def test_an_ambiguous_reference_or_one_that_is_not_text_is_refused(reference, reason):
    with pytest.raises(ValueError, match=reason):
        to_prompt({"prompt": "2 + 2?", "reference": reference}, settings("plain"))


def test_a_template_writes_a_verdict_as_text_and_a_path_takes_one_of_several_answers():
    how = settings("plain", keys={"reference": "{answer}"})
    assert to_prompt({"prompt": "Is it?", "answer": True}, how)["reference"] == "true"
    how = settings("plain", keys={"reference": "answers.text.0"})
    assert to_prompt({"prompt": "2 + 2?", "answers": {"text": ["4", "four"]}}, how)["reference"] == "4"


def test_multiple_choice_has_its_options_in_the_prompt_and_a_letter_or_a_text_as_the_reference():
    columns = {"question": "2 + 2?", "choices": ["3", "4", "5"], "answer": 1}
    keys = {"prompt": "{question}\n{choices:letters}", "reference": "{answer:letter}"}
    prompt = to_prompt(columns, settings("plain", keys=keys))
    assert prompt == {"prompt": [{"role": "user", "content": "2 + 2?\nA. 3\nB. 4\nC. 5"}], "reference": "B"}
    keys["reference"] = "{choices.{answer}}"
    assert to_prompt(columns, settings("plain", keys=keys))["reference"] == "4"


def test_lines_of_text_are_prompts_and_blank_ones_are_left_out():
    assert to_prompts({"text": "Hello"}, settings("plain")) == [{"prompt": [HELLO[0]], "reference": None}]
    assert to_prompts({"text": " "}, settings("plain")) == []
    with pytest.raises(ValueError, match="no column 'prompt'"):
        to_prompts({"text": "Hello", "other": 1}, settings("plain"))


def test_a_prompt_without_a_user_message_is_refused():
    with pytest.raises(ValueError, match="the prompt ends with the system's message, expected a user's message that can be answered"):
        to_prompt({"messages": [BRIEF]}, settings())
