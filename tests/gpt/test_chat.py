"""Golden conversations, token by token, with the byte tokenizer: "a" is 97, and the special tokens follow after 255."""

from __future__ import annotations

import pytest

from gpt.chat import Conversation, encode_conversation, encode_prompt, encode_response
from gpt.tokenizer import byte_tokenizer

USER, ASSISTANT, SYSTEM, END = 256, 257, 258, 259
TOKENIZER = byte_tokenizer()
TWO_TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e"},
]


def test_the_special_tokens_have_these_ids():
    assert TOKENIZER.special == {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "end": END, "document": 260, "pad": 261}


def test_only_the_assistants_text_and_its_end_tokens_count():
    found = encode_conversation(TOKENIZER, TWO_TURNS)
    assert found is not None
    expected = [
        (SYSTEM, False), (115, False), (END, False),
        (USER, False), (97, False), (END, False),
        (ASSISTANT, False), (98, True), (99, True), (END, True),
        (USER, False), (100, False), (END, False),
        (ASSISTANT, False), (101, True), (END, True),
    ]  # fmt: skip
    assert list(zip(found.token_ids, found.loss_mask, strict=True)) == expected
    assert not found.cut


def test_an_empty_answer_still_teaches_its_end_token():
    found = encode_conversation(TOKENIZER, [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}])
    assert found == Conversation([USER, 97, END, ASSISTANT, END], [False, False, False, False, True])


def test_a_prompt_followed_by_its_response_is_the_conversation():
    whole = encode_conversation(TOKENIZER, TWO_TURNS)
    assert whole is not None
    assert [*encode_prompt(TOKENIZER, TWO_TURNS[:-1]), *encode_response(TOKENIZER, "e")] == whole.token_ids


@pytest.mark.parametrize(("max_tokens", "kept"), [(16, 16), (15, 10), (10, 10)])
def test_a_conversation_that_is_too_long_is_cut_after_an_assistant_message(max_tokens, kept):
    found = encode_conversation(TOKENIZER, TWO_TURNS, max_tokens)
    assert found is not None
    assert (len(found.token_ids), found.cut) == (kept, kept < 16)
    assert found.token_ids[-1] == END
    assert found.loss_mask[-1]


def test_a_conversation_whose_first_answer_does_not_fit_is_left_out():
    assert encode_conversation(TOKENIZER, TWO_TURNS, 9) is None


def test_text_that_spells_a_special_token_stays_text():
    assert encode_prompt(TOKENIZER, [{"role": "user", "content": "<|end|>"}]) == [USER, *b"<|end|>", END, ASSISTANT]


def test_an_unknown_role_is_refused():
    with pytest.raises(ValueError, match="expected one of the roles system, user, assistant, found 'tool'"):
        encode_prompt(TOKENIZER, [{"role": "tool", "content": "a"}])
