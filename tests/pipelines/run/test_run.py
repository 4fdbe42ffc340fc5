"""Runs of small pipelines in this process: what is reused, what runs, and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipelines.plan.config import ConfigError
from pipelines.plan.resolve import resolve
from tests.pipelines.run.small import KINDS, TOML, WORDS, Small


def test_a_run_begins_with_how_much_it_will_do_and_the_first_run_with_its_files_about(small: Small) -> None:
    small.write("small.toml", TOML.replace("seed = 1", 'about = "three letters of each word; a second"\nseed = 1'))
    small.run()
    begun = small.announced()[:2]
    assert begun == ["small: three letters of each word; a second", "3 of 3 stages to run, duration unknown"]
    small.run("stages.cut.letters=2")
    assert small.announced()[0].startswith("2 of 3 stages to run, about ")
    small.run("stages.cut.letters=2")
    assert not any("to run" in text for text in small.announced())


def test_a_second_run_reuses_everything_and_the_plan_names_the_run_that_made_it(small: Small):
    assert small.run() == (0, {"words": "done", "cut": "done", "report": "done"})
    first = small.store.runs()[0]
    assert small.plan() == {name: ("reuse", f"made by run {first}") for name in ("words", "cut", "report")}
    assert small.run() == (0, {"words": "reused", "cut": "reused", "report": "reused"})


def test_a_plan_of_a_new_store_writes_nothing(small: Small):
    assert [decision for decision, _ in small.plan().values()] == ["run", "run", "run"]
    assert not small.store.root.exists()


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            lambda s: s.write("small.toml", TOML.replace("[stages.report]", "letters = 2\n\n[stages.report]")),
            ("", "letters: 3 -> 2", "its input cut will be rebuilt"),
        ),
        (
            lambda s: s.write("words.py", WORDS.replace("[:letters]", "[letters:]")),
            ("", "code of words:shorten changed", "its input cut will be rebuilt"),
        ),
        (
            lambda s: s.write("words.txt", "abcdeg"),
            ("source words.txt changed", "its input words will be rebuilt", "its input words will be rebuilt"),
        ),
        (lambda s: s.write("kinds.py", KINDS.replace("All words.", "Every word.  ")), ("", "", "")),
        (lambda s: s.write("words.py", "# short\n" + WORDS), ("", "", "")),
        (
            lambda s: s.write("small.toml", TOML.replace("seed = 1", "seed = 2")),
            ("seed: 1 -> 2", "its input words will be rebuilt", "its input words will be rebuilt"),
        ),
    ],
)
def test_the_reason_names_what_changed(small: Small, change: Callable[[Small], None], reasons: tuple[str, str, str]):
    small.run()
    made_by = f"made by run {small.store.runs()[0]}"
    change(small)
    assert tuple(reason for _, reason in small.plan().values()) == tuple(reason or made_by for reason in reasons)


def test_an_upstream_stage_with_an_unchanged_output_reruns_nothing_behind_it(small: Small):
    small.run()
    small.write("kinds.py", KINDS.replace("file.read()", "file.read() + b''"))
    assert small.plan()["report"] == ("run", "its input words will be rebuilt")  # although its new output may be equal
    assert small.run() == (0, {"words": "done", "cut": "reused", "report": "reused"})


def test_rerun_executes_one_stage_again_and_keeps_the_earlier_action(small: Small):
    small.run()
    assert small.run(fresh=["cut"]) == (0, {"words": "reused", "cut": "done", "report": "reused"})
    key = small.ended_stage("cut").key
    assert [(each.number, each.forced) for each in small.store.actions(key)] == [(1, False), (2, True)]
    assert small.run()[1]["cut"] == "reused"


@pytest.mark.parametrize(("end", "status"), [("raise KeyboardInterrupt", "stopped"), ("raise StageFailure('no')", "failed")])
def test_an_unfinished_rerun_is_not_forgotten(small: Small, end: str, status: str):
    mark = small.folder / "mark"
    fault = f"    if __import__('os').path.exists({str(mark)!r}):\n        {end}\n"
    small.write("kinds.py", KINDS.replace("    text = (documents.path", f"{fault}    text = (documents.path"))
    small.run()
    mark.touch()
    assert small.run(fresh=["cut", "report"])[1]["cut"] == status
    assert small.ending().text.endswith("resume with: gptline run small.toml --fresh report")  # which had not started
    assert small.plan()["cut"] == ("run", "a requested rerun was interrupted")
    mark.unlink()
    assert small.run(fresh=["report"]) == (0, {"words": "reused", "cut": "done", "report": "done"})
    assert {each.stage: each.number for each in small.store.all_actions() if each.forced} == {"cut": 2, "report": 2}
    assert set(small.run()[1].values()) == {"reused"}


def test_until_builds_only_a_stage_and_what_it_needs(small: Small):
    assert small.run(until="cut") == (0, {"words": "done", "cut": "done"})
    with pytest.raises(ConfigError, match="--until cutt: there is no such stage; did you mean 'cut'"):
        small.run(until="cutt")


def test_use_substitutes_an_artifact_for_a_stages_output(small: Small):
    small.run()
    cut = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    small.write("words.txt", "uvwxyz")
    assert small.run(use={"cut": f"sha256:{cut[:12]}"}) == (0, {"words": "done", "cut": "reused", "report": "done"})
    with pytest.raises(ConfigError, match=r"--use cut=.* is report, expected documents"):
        small.run(use={"cut": f"run:{small.store.runs()[0]}/report"})


def test_an_artifact_of_another_run_can_be_an_input(small: Small):
    small.run()
    run = small.store.runs()[0]
    small.write("small.toml", TOML.replace('inputs = { documents = "words" }', f'inputs = {{ documents = "run:{run}/words" }}'))
    assert small.run() == (0, {"words": "reused", "cut": "reused", "report": "reused"})
    small.write("small.toml", TOML.replace('inputs = { documents = "words" }', f'inputs = {{ documents = "run:{run}/report" }}'))
    with pytest.raises(ConfigError, match="is report, expected documents"):
        small.run()
    small.write("small.toml", TOML.replace('inputs = { documents = "words" }', 'inputs = { documents = "run:20200101-gone/words" }'))
    with pytest.raises(ConfigError, match=r"there is no run '20200101-gone'; the store .* has 2"):
        small.run()
