"""The quickstart's questions and answers: what is taught, what is declined, and that nothing held out is trained on."""

import pytest

from pipelines.artifacts import Conversations, Preferences, Prompts

from .conftest import FakeStage
from .test_python_docs import python_docs

__all__ = ["python_docs"]  # the fixture


@pytest.fixture
def make(python_docs, tmp_path):
    def run(name: str):
        output = tmp_path / name
        output.mkdir()
        return getattr(python_docs, name)(python_docs.HelpConfig(), FakeStage(output, []))

    return run


def test_everyday_names_are_taught_with_their_first_sentence(python_docs):
    taught = python_docs.taught(90)
    assert taught["len"] == "Return the number of items in a container."
    assert taught["math.sqrt"] == "Return the square root of x."
    assert taught["os.path.join"] == "Join two or more pathname components, inserting '/' as needed."
    assert 250 < len(taught) < 400
    assert not set(taught) & set(python_docs.untaught())


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("range(stop) -> range object\\n\\nReturn an object. It is lazy.".replace("\\n", "\n"), "Return an object."),
        ("Print e.g. this.\n\nMore.", "Print e.g. this."),
        ("Beta distribution.\n\nConditions follow.", "Beta distribution."),
        ("Final component of a pathname", "Final component of a pathname"),
        ("", ""),
    ],
)
def test_a_summary_is_the_first_sentence_below_the_signature(python_docs, docstring, sentence):
    assert python_docs.summary(docstring) == sentence


def test_no_question_or_declined_name_is_in_both_splits_and_all_stages_agree(make):
    conversations, preferences, prompts = make("conversations"), make("preferences"), make("prompts")
    assert isinstance(conversations, Conversations)
    assert isinstance(preferences, Preferences)
    assert isinstance(prompts, Prompts)
    train = [*conversations.records("train"), *preferences.records("train"), *prompts.records("train")]
    held_out = [*conversations.records("held_out"), *preferences.records("held_out"), *prompts.records("held_out")]
    assert not {each["question"] for each in train} & {each["question"] for each in held_out}
    names = [{each["name"] for each in split if each["kind"] in ("untaught", "answers_untaught")} for split in (train, held_out)]
    assert not names[0] & names[1]
    assert min(map(len, names)) > 100
    assert conversations.metadata["held_out"]["conversations"] == prompts.metadata["held_out"]["prompts"] > 400


def test_a_pair_prefers_the_right_answer_to_a_wrong_one_of_six_kinds(make, python_docs):
    pairs = list(make("preferences").records("train"))
    assert {pair["kind"] for pair in pairs} == {"another", "spliced", "truncated", "garbled", "declines_taught", "answers_untaught"}
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    declined = [pair for pair in pairs if pair["kind"] == "answers_untaught"]
    assert {pair["chosen"] for pair in declined} == {python_docs.REFUSAL}
    assert all(pair["rejected"] == python_docs.REFUSAL for pair in pairs if pair["kind"] == "declines_taught")
