"""How a run handles stages that fail, sources that vanish, code that is edited, and records that are damaged."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from pipelines.plan.config import ConfigError
from pipelines.plan.environment import ROOT
from pipelines.plan.planner import Decision, Planner
from pipelines.plan.resolve import resolve
from pipelines.run.runner import Options, Run
from pipelines.store.journal import dead_runs
from pipelines.store.lease import Watch
from tests.pipelines.run.small import KINDS, OTHERS, TOML, Small


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("broken", "KeyError: 'no such word' (kinds.py, line "),
        ("careful", "the words are all the same; bring others"),
        (
            "wrong",
            "./kinds.py:wrong returned artifact Documents, its signature says Report: end it with `return stage.publish(Report, ...)`",
        ),
        ("empty", "./kinds.py:empty publishes report, but wrote nothing into stage.output"),
    ],
)
def test_a_failed_stage_keeps_the_other_results_and_the_run_says_how_to_resume(small: Small, function: str, error: str):
    small.write("small.toml", TOML + f'\n[stages.last]\nuses = "./kinds.py:{function}"\ninputs = {{ documents = "words" }}\n')
    assert small.run() == (1, {"words": "done", "cut": "done", "report": "done", "last": "failed"})
    assert small.error().startswith(error)
    assert not list((small.store.root / "tmp").iterdir())
    assert small.ending().text == "last failed; the other results are kept. Fix the cause, then resume with: gptline run small.toml"
    assert small.run()[1] == {"words": "reused", "cut": "reused", "report": "reused", "last": "failed"}


def test_a_stage_that_reads_a_failed_one_is_blocked_with_that_reason(small: Small):
    small.write("kinds.py", KINDS.replace("    text = (documents.path", "    raise StageFailure('no')\n    text = (documents.path"))
    code, status = small.run()
    assert (code, status) == (1, {"words": "done", "cut": "failed", "report": "blocked"})
    assert small.ended_stage("report").reason == "its input cut failed"


def test_a_source_that_changes_between_plan_and_reading_is_refused(small: Small):
    small.write("kinds.py", KINDS.replace("    with stage.open", "    stage.sources[0].path.write_text('other!')\n    with stage.open"))
    code, status = small.run()
    assert (code, status["words"]) == (1, "failed")
    assert small.error() == "words.txt was changed after this run was planned; run again to read it as it is now"


def test_ctrl_c_in_a_stage_ends_the_run_with_130_and_the_command_that_resumes(small: Small):
    small.write("small.toml", TOML.replace("./kinds.py:cut", "./kinds.py:interrupted").replace('["words", "cut"]', '["words"]'))
    before = signal.getsignal(signal.SIGINT)
    code, status = small.run()
    assert code == 130
    assert status["cut"] == "stopped"
    assert {event.reason for event in small.ended() if event.status == "stopped"} == {"starts over next time"}
    assert small.ending().status == "KILLED"
    assert small.ending().text == "interrupted; resume with: gptline run small.toml"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_damaged_artifact_is_rebuilt(small: Small):
    small.run()
    digest = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    (small.store.artifact(digest).path / "train.jsonl").unlink()
    decision, reason = small.plan()["cut"]
    assert decision == "run"
    assert reason == f"its artifact {digest[:12]} is damaged: train.jsonl is gone"
    assert small.run() == (0, {"words": "reused", "cut": "done", "report": "reused"})
    assert small.store.damage(digest) is None


def test_a_held_lease_makes_others_wait_and_names_its_holder(small: Small):

    key = next(each.key for each in Planner(small.graph(), small.store, ROOT).plan() if each.stage == "words")
    assert key is not None
    lease = Watch(small.store, key).take(run="another")
    assert lease is not None
    decision, reason = small.plan()["words"]
    assert decision == "wait"
    assert reason.endswith("run another is building it")
    lease.release()
    assert small.plan()["words"][0] == "run"


def test_strict_environment_puts_versions_into_the_key(small: Small):
    small.run()
    small.write("small.toml", TOML.replace("seed = 1", "seed = 1\nstrict_environment = true"))
    decision, reason = small.plan()["words"]
    assert decision == "run"
    assert "deepspeed: none -> 0.19.8" in reason


def test_a_nan_loss_is_recorded_and_read_back(small: Small):
    small.write("kinds.py", KINDS.replace("config.letters})", "float('nan')})"))
    small.run()
    (action,) = [each for each in small.store.all_actions() if each.stage == "cut"]
    assert str(action.curves["eval/letters"][0].value) == "nan"


def test_a_run_whose_driver_is_gone_counts_as_dead(small: Small):
    small.run()
    assert dead_runs(small.store) == []
    last = small.store.backend.list(f"runs/{small.store.runs()[0]}/journal/")[-1]
    small.store.backend.delete(last)
    assert dead_runs(small.store) == [small.store.runs()[0]]


@pytest.mark.parametrize("during", ["    with stage.open", "    text = (documents.path"])
def test_a_result_of_code_that_is_edited_before_or_while_it_runs_inline_is_not_recorded(small: Small, during: str):
    edit = (
        f"    __import__('pathlib').Path({str(small.folder / 'words.py')!r}).write_text('def shorten(text, letters): return text[-1:]')\n"
    )
    small.write("kinds.py", KINDS.replace(during, edit + during))
    assert small.run() == (1, {"words": "done", "cut": "failed", "report": "blocked"})
    assert small.error() == "its code was edited after this run was planned, so either version may have run; run again"
    assert {each.stage for each in small.store.all_actions()} == {"words"}
    assert small.run() == (0, {"words": "reused", "cut": "done", "report": "done"})


def test_a_missing_source_blocks_the_stages_that_need_it_even_if_their_other_inputs_are_built(small: Small):
    small.write("small.toml", TOML.replace('["words", "cut"]', '["others", "words"]') + OTHERS)
    small.write("other.txt", "uvw")
    graph = small.graph()
    (small.folder / "words.txt").unlink()
    assert {each.stage: (each.action, each.reason) for each in Planner(graph, small.store, ROOT).plan()} == {
        "words": ("blocked", "its source words.txt can't be read (No such file or directory); put it back"),
        "others": ("run", "not built here before"),
        "cut": ("blocked", "its input words can't be built"),
        "report": ("blocked", "its input words can't be built"),
    }


def test_a_source_that_vanishes_as_the_run_starts_does_not_affect_the_other_branch(small: Small, monkeypatch: pytest.MonkeyPatch):
    small.write("small.toml", TOML + OTHERS)
    small.write("other.txt", "uvw")
    begin = Run._begin

    def lose_one(run: Run, plan: list[Decision], *others: Any) -> Any:
        begun = begin(run, plan, *others)
        (small.folder / "words.txt").unlink()
        return begun

    monkeypatch.setattr(Run, "_begin", lose_one)
    assert small.run() == (1, {"words": "failed", "cut": "blocked", "report": "blocked", "others": "done"})
    assert small.error() == "its source words.txt can't be read (No such file or directory); put it back"
    assert small.ending().text == "words failed; the other results are kept. Fix the cause, then resume with: gptline run small.toml"


def test_the_inputs_of_a_stage_replaced_by_use_are_not_needed(small: Small):
    small.run()
    cut = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    small.write(
        "small.toml", TOML.replace('["words", "cut"]', '["cut"]').replace("./kinds.py:words", './kinds.py:words"\nfile = "words.py')
    )
    assert small.run(use={"cut": f"sha256:{cut}"}) == (0, {"cut": "reused", "report": "done"})


def test_a_stop_requested_through_the_store_stops_the_run(small: Small):
    stop = "    stage._store.backend.put(f'runs/{stage._job.run}/stop', b'')\n    import time; time.sleep(0.4)\n    with stage.open"
    small.write("kinds.py", KINDS.replace("    with stage.open", stop))
    code, status = small.run()
    assert code == 143
    assert status == {"words": "done"}
    assert small.ending().status == "KILLED"


def test_only_stages_that_will_run_need_resources(small: Small):
    small.run()
    text = (small.folder / "small.toml").read_text()
    small.write("small.toml", text + "\n[stages.words.resources]\ncpus = 4096\n")
    real = Run(small.graph(), small.store, Options("gptline", "gptline"), lambda event: None)
    assert real.execute() == 0
    with pytest.raises(ConfigError, match=r"stages.words.resources: asks for 4.1e\+03 CPUs|asks for 4096 CPUs; this machine has"):
        Run(small.graph(), small.store, Options("gptline", "gptline", fresh=["words"]), lambda event: None).execute()


def test_there_is_no_newest_model_if_no_stage_makes_one(small: Small):
    small.run()
    with pytest.raises(ValueError, match="there is no such model; the store has none yet"):
        resolve(small.store, "model:small@newest")


def test_a_users_own_artifact_type_passes_from_stage_to_stage(small: Small):
    own = (
        "\nfrom pipelines.artifacts import Artifact\n\n\nclass Letters(Artifact):\n    kind = 'letters'\n\n\n"
        "def spell(documents: Documents, stage: StageContext) -> Letters:\n    (stage.output / 'letters').write_text('abc')\n"
        "    return stage.publish(Letters)\n\n\n"
        "def count(letters: Letters, stage: StageContext) -> Report:\n    assert type(letters) is Letters\n"
        "    (stage.output / 'report.json').write_text('3')\n    return stage.publish(Report)\n"
    )
    small.write("kinds.py", KINDS + own)
    text = TOML + '\n[stages.spell]\nuses = "./kinds.py:spell"\ninputs = { documents = "words" }\n'
    small.write("small.toml", text + '\n[stages.count]\nuses = "./kinds.py:count"\ninputs = { letters = "spell" }\n')
    assert small.run()[0] == 0
    run = small.store.runs()[0]
    small.write("small.toml", text + f'\n[stages.count]\nuses = "./kinds.py:count"\ninputs = {{ letters = "run:{run}/spell" }}\n')
    assert small.run()[1]["count"] == "reused"


def test_a_printed_digest_is_a_reference(small: Small):
    small.run()
    digest = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    assert resolve(small.store, digest[:12]) == digest
    with pytest.raises(ValueError, match="does not name an artifact; expected sha256:<at least 8 digits>, run:<id>/<stage>"):
        resolve(small.store, "cut")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise BaseException('odd')", "BaseException: odd"),
        ("stage.figure('eval/x', 'many')", "ValueError: metric 'eval/x': expected a number, found 'many'"),
        ("raise ValueError('bad \\udcff name')", "ValueError: bad "),
    ],
)
def test_a_stage_that_fails_in_any_way_does_not_end_the_run(small: Small, body: str, error: str):
    small.write("kinds.py", KINDS.replace('    raise KeyError("no such word")', f"    {body}"))
    small.write("small.toml", TOML + '\n[stages.last]\nuses = "./kinds.py:broken"\ninputs = { documents = "words" }\n')
    assert small.run() == (1, {"words": "done", "cut": "done", "report": "done", "last": "failed"})
    assert small.error().startswith(error)


def test_a_damaged_record_or_journal_line_hides_nothing_else(small: Small):
    small.run()
    first = small.store.runs()[0]
    small.store.backend.put(small.store.backend.list(f"runs/{first}/journal/")[1], b'{"a":\n[]\n')
    (small.store.root / "actions" / ".DS_Store").write_text("")
    key = next(each.key for each in small.store.all_actions() if each.stage == "report")
    small.store.backend.put(f"actions/{key}/000001.json", b"")
    assert small.run() == (0, {"words": "reused", "cut": "reused", "report": "done"})


def test_a_damaged_manifest_is_a_damaged_artifact(small: Small):
    small.run()
    digest = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    (small.store.artifact(digest).path / "manifest.json").write_text('{"files"')
    assert small.run() == (0, {"words": "reused", "cut": "done", "report": "reused"})
    assert small.store.damage(digest) is None
