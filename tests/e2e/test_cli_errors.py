"""Wrong use of the program: it reports all faults at once, each with its line, exits with 2, and writes nothing."""

from __future__ import annotations

import re

import pytest

BAD = """
pipeline = "bad"
sed = 1

[stages.documents]
uses = "ingest"
source = "text"
files = ["missing.txt"]

[stages.tokenizer]
inputs = { documents = ["tokenize"] }
algorithm = "bytes"

[stages.tokenize]
inputs = { documents = ["documents"], tokenizer = ["tokenizer"] }

[stages.pretrain]
inputs = { tokens = ["tokenizer"] }
preset = "gpt2-nano"
steps = 10
global_batch_size = 8
micro_batch_size = 3
lr = 1e-3
learning_rate = 1e-3

[stages.pretrain.resources]
ranks = 2
"""


@pytest.fixture
def bad(new_program):
    program = new_program()
    (program.folder / "bad.toml").write_text(BAD)
    return program


@pytest.mark.parametrize("verb", ["plan", "run"])
def test_all_faults_are_reported_at_once_with_their_lines_and_nothing_is_written(bad, verb):
    output = bad.run(verb, "bad.toml", code=2)
    first, *faults = output.splitlines()
    assert f"bad.toml: {len(faults)} faults; " in first
    for fault in (
        r"  bad\.toml, line 3: sed: unknown key; did you mean 'seed'\?",
        r"  bad\.toml, line 8: stages\.documents\.files: .*missing\.txt",
        r"  bad\.toml, line 24: stages\.pretrain\.learning_rate: unknown key",
        r"  bad\.toml, line 11: stages\.tokenizer\.inputs\.documents: 'tokenize' makes tokens, expected documents",
    ):
        assert any(re.match(fault, line) for line in faults), f"{fault} is not in:\n{output}"
    assert "Traceback" not in output
    assert [path.name for path in bad.folder.iterdir()] == ["bad.toml"]


def test_batch_arithmetic_a_cycle_and_a_wrong_artifact_type_are_reported_at_once(bad):
    (bad.folder / "missing.txt").write_text("here\n")
    text = BAD.replace("sed = 1", "seed = 1").replace("learning_rate = 1e-3\n", "")
    (bad.folder / "bad.toml").write_text(text)
    output = bad.run("run", "bad.toml", code=2)
    for fault in (
        "stages.pretrain: global_batch_size = 8 is not a multiple of micro_batch_size * ranks = 3 * 2 = 6; the nearest that fit are 6",
        "line 11: stages.tokenizer.inputs: tokenizer reads tokenize reads tokenizer: a cycle",
        "stages.pretrain.inputs.tokens: 'tokenizer' makes tokenizer, expected tokens",
    ):
        assert fault in output
    assert not bad.store.root.exists()


def test_debug_shows_the_traceback_and_plain_errors_do_not(bad):
    assert "Traceback" in bad.run("--debug", "plan", "bad.toml", code=1)
    assert "Traceback" not in bad.run("plan", "bad.toml", code=2)


def test_a_missing_file_names_the_nearest_one(bad):
    assert "there is no such file; did you mean 'bad.toml'?" in bad.run("run", "bed.toml", code=2)


def test_an_unknown_stage_or_malformed_option_exits_with_2(bad):
    (bad.folder / "bad.toml").write_text('pipeline = "ok"\n[stages.documents]\nuses = "ingest"\nsource = "text"\nfiles = ["bad.toml"]\n')
    assert "there is no stage 'documnts'; did you mean 'documents'?" in bad.run("plan", "bad.toml", "--set", "stages.documnts.x=1", code=2)
    assert "no such stage; the stages are documents" in bad.run("run", "bad.toml", "--until", "tokens", code=2)
    assert "there is no stage 'tokens'; the stages are documents" in bad.run("rerun", "bad.toml", "tokens", code=2)
    assert "expected STAGE=REF" in bad.run("run", "bad.toml", "--use", "documents", code=2)
    assert not bad.store.root.exists()


def test_help_lists_the_verbs(bad):
    output = bad.run("--help")
    for verb in ("run", "plan", "describe", "overlap", "rerun", "sync", "lineage", "ui", "doctor", "sample"):
        assert re.search(rf"^\s+{verb}\s", output, re.MULTILINE), f"{verb} is not in:\n{output}"
