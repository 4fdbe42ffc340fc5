"""The grammar of references, in a pipeline file and on the command line."""

from __future__ import annotations

import pytest

from pipelines.plan.references import Digest, HfFolder, ModelAlias, Reference, RunStage, StageName, parse, parse_artifact

FORMS: list[tuple[str, Reference]] = [
    ("sha256:1f0c93ab", Digest("1f0c93ab")),
    ("run:20261122-192002-gsm-0a1f/sft-2", RunStage("20261122-192002-gsm-0a1f", "sft-2")),
    ("model:gsm@newest", ModelAlias("gsm", "newest")),
    ("hf:~/models/my model:2", HfFolder("~/models/my model:2")),
]


@pytest.mark.parametrize(("text", "reference"), FORMS)
def test_each_form_is_read_in_a_file_and_on_the_command_line(text: str, reference: Reference):
    assert parse(text) == reference
    assert parse_artifact(text) == reference


def test_a_single_word_is_a_stage_in_a_file_and_a_digest_on_the_command_line():
    assert parse("1f0c93ab27d4") == StageName("1f0c93ab27d4")
    assert parse_artifact("1f0c93ab27d4") == Digest("1f0c93ab27d4")


@pytest.mark.parametrize("text", ["sha256:1f0c93a", "sha256:1F0C93AB", "run:r", "run:/sft", "model:gsm", "hf:", "sha:12"])
def test_other_forms_are_refused(text: str):
    with pytest.raises(ValueError, match="is not a reference; expected a stage's name, sha256:<at least 8 digits>"):
        parse(text)


@pytest.mark.parametrize("text", ["tokenize", "1f0c93ab27d", "sha256:12"])
def test_the_command_line_accepts_no_stage_and_no_short_digest(text: str):
    with pytest.raises(ValueError, match="does not name an artifact; expected sha256:<at least 8 digits>, run:<id>/<stage>"):
        parse_artifact(text)
