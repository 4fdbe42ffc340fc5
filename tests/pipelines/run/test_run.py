"""Runs of small pipelines in this process: what is reused, what runs, and why."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.plan.config import ConfigError, load
from pipelines.plan.graph import ROOT, Graph, build
from pipelines.plan.planner import Decision, Planner, resolve
from pipelines.run.execute import Job, Outcome, execute
from pipelines.run.runner import Options, Run, dead_runs
from pipelines.store.journal import Superseded, read_journal
from pipelines.store.store import FolderBackend, Store

KINDS = '''
from pipelines.artifacts import Documents, Report
from pipelines.stage import Source, StageConfig, StageContext, StageFailure
from words import shorten


class WordsConfig(StageConfig):
    file: str = "words.txt"

    def sources(self, data):
        return [Source(self.file, data / self.file)]


class CutConfig(StageConfig):
    letters: int = 3


def words(config: WordsConfig, stage: StageContext) -> Documents:
    """All words."""
    with stage.open(stage.sources[0]) as file:
        (stage.output / "train.jsonl").write_bytes(file.read())
    return published(stage)


def cut(config: CutConfig, documents: Documents, stage: StageContext) -> Documents:
    text = (documents.path / "train.jsonl").read_text()
    (stage.output / "train.jsonl").write_text(shorten(text, config.letters))
    stage.figure("eval/letters", config.letters)
    stage.log(1, {"eval/letters": config.letters})
    return published(stage)


def published(stage):
    (stage.output / "held_out.jsonl").write_bytes(b"")
    return stage.publish(Documents, train={"documents": 1, "bytes": 6}, held_out={"documents": 0, "bytes": 0})


def report(documents: list[Documents], stage: StageContext) -> Report:
    (stage.output / "report.json").write_text(str([each.digest for each in documents]))
    return stage.publish(Report)


def broken(documents: Documents, stage: StageContext) -> Report:
    raise KeyError("no such word")


def careful(documents: Documents, stage: StageContext) -> Report:
    raise StageFailure("the words are all the same; bring others")


def wrong(documents: Documents, stage: StageContext) -> Report:
    return documents


def empty(documents: Documents, stage: StageContext) -> Report:
    return stage.publish(Report)


def interrupted(documents: Documents, stage: StageContext) -> Report:
    import os, signal, time

    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
'''
WORDS = "def shorten(text, letters):\n    return text[:letters]\n"
TOML = """
pipeline = "small"
seed = 1

[stages.words]
uses = "./kinds.py:words"

[stages.cut]
uses = "./kinds.py:cut"
inputs = { documents = "words" }

[stages.report]
uses = "./kinds.py:report"
inputs = { documents = ["words", "cut"] }
"""


class Small:
    """A pipeline in a folder of its own, run in this process without MLflow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        self.write("kinds.py", KINDS)
        self.write("words.py", WORDS)
        self.write("words.txt", "abcdef")
        self.write("small.toml", TOML)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def graph(self, *overrides: str) -> Graph:
        import sys

        for name in ("gptline_user_kinds", "words"):
            sys.modules.pop(name, None)
        sys.path[:] = [each for each in sys.path if not Path(each, "kinds.py").exists()]
        return build(load(self.folder / "small.toml", overrides))

    def run(self, *overrides: str, **options: Any) -> tuple[int, dict[str, str]]:
        """Exit code, and what was done about each stage."""
        asked = Options("gptline rerun small.toml cut", "gptline run small.toml", **{"inline": True, **options})
        self.said: list[dict[str, Any]] = []
        run = Run(self.graph(*overrides), self.store, asked, self.said.append)
        code = run.execute()
        self.events = read_journal(self.store, run.run)
        return code, {event["stage"]: event["status"] for event in self.events if event["type"] == "stage_ended"}

    def plan(self, *overrides: str, **options: Any) -> dict[str, tuple[str, str]]:
        return {each.stage: (each.word, each.reason) for each in Planner(self.graph(*overrides), self.store, ROOT, **options).plan()}

    def told(self) -> str:
        """What people were told beside the rows."""
        return "\n".join(event["text"] for event in self.said if event["type"] == "said")

    def error(self) -> str:
        return next(event["error"] for event in self.events if event["type"] == "stage_ended" and event["status"] == "failed")


class _NoTracker:
    def news(self) -> None: ...

    def finish(self, deadline_s: float) -> None: ...


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr(Run, "_start_tracking", lambda self: _NoTracker())
    return Small(tmp_path)


def test_a_run_says_first_how_much_there_is_to_do_and_a_first_one_what_its_file_says_of_itself(small: Small) -> None:
    small.write("small.toml", TOML.replace("seed = 1", 'about = "three letters of each word; a second"\nseed = 1'))
    small.run()
    begun = [event["text"] for event in small.said if event["type"] == "said"][:2]
    assert begun == ["small: three letters of each word; a second", "3 of 3 stages to run, duration unknown"]
    small.run("stages.cut.letters=2")
    assert small.said[0]["text"].startswith("2 of 3 stages to run, about ")
    small.run("stages.cut.letters=2")
    assert not any("to run" in event.get("text", "") for event in small.said)


def test_a_second_run_reuses_all_and_a_plan_says_by_whom(small: Small):
    assert small.run() == (0, {"words": "done", "cut": "done", "report": "done"})
    first = small.store.runs()[0]
    assert small.plan() == {name: ("reuse", f"made by run {first}") for name in ("words", "cut", "report")}
    assert small.run() == (0, {"words": "reused", "cut": "reused", "report": "reused"})


def test_a_plan_of_a_new_store_writes_nothing(small: Small):
    assert [word for word, _ in small.plan().values()] == ["run", "run", "run"]
    assert not small.store.root.exists()


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            lambda s: s.write("small.toml", TOML.replace("[stages.report]", "letters = 2\n\n[stages.report]")),
            ("", "letters: 3 -> 2", "its input cut is made anew"),
        ),
        (
            lambda s: s.write("words.py", WORDS.replace("[:letters]", "[letters:]")),
            ("", "code of words:shorten changed", "its input cut is made anew"),
        ),
        (
            lambda s: s.write("words.txt", "abcdeg"),
            ("source words.txt changed", "its input words is made anew", "its input words is made anew"),
        ),
        (lambda s: s.write("kinds.py", KINDS.replace("All words.", "Every word.  ")), ("", "", "")),
        (lambda s: s.write("words.py", "# short\n" + WORDS), ("", "", "")),
        (
            lambda s: s.write("small.toml", TOML.replace("seed = 1", "seed = 2")),
            ("seed: 1 -> 2", "its input words is made anew", "its input words is made anew"),
        ),
    ],
)
def test_what_was_changed_is_the_reason(small: Small, change: Callable[[Small], None], reasons: tuple[str, str, str]):
    small.run()
    made_by = f"made by run {small.store.runs()[0]}"
    change(small)
    assert tuple(reason for _, reason in small.plan().values()) == tuple(reason or made_by for reason in reasons)


def test_an_upstream_stage_that_comes_to_the_same_bytes_stops_the_change_there(small: Small):
    small.run()
    small.write("kinds.py", KINDS.replace("file.read()", "file.read() + b''"))
    assert small.plan()["report"] == ("run", "its input words is made anew")  # nobody can know yet
    assert small.run() == (0, {"words": "done", "cut": "reused", "report": "reused"})


def test_rerun_makes_one_stage_afresh_and_keeps_the_old_making(small: Small):
    small.run()
    assert small.run(fresh=["cut"]) == (0, {"words": "reused", "cut": "done", "report": "reused"})
    key = next(event["key"] for event in small.events if event["type"] == "stage_ended" and event["stage"] == "cut")
    assert [(each.number, each.forced) for each in small.store.actions(key)] == [(1, False), (2, True)]
    assert small.run()[1]["cut"] == "reused"


@pytest.mark.parametrize(("end", "status"), [("raise KeyboardInterrupt", "stopped"), ("raise StageFailure('no')", "failed")])
def test_a_rerun_that_did_not_come_to_its_end_is_not_forgotten(small: Small, end: str, status: str):
    mark = small.folder / "mark"
    fault = f"    if __import__('os').path.exists({str(mark)!r}):\n        {end}\n"
    small.write("kinds.py", KINDS.replace("    text = (documents.path", f"{fault}    text = (documents.path"))
    small.run()
    mark.touch()
    assert small.run(fresh=["cut", "report"])[1]["cut"] == status
    assert small.events[-1]["text"].endswith("go on with: gptline run small.toml --fresh report")  # which was not begun
    assert small.plan()["cut"] == ("run", "an asked-for rerun did not come to its end")
    mark.unlink()
    assert small.run(fresh=["report"]) == (0, {"words": "reused", "cut": "done", "report": "done"})
    assert {each.stage: each.number for each in small.store.all_actions() if each.forced} == {"cut": 2, "report": 2}
    assert set(small.run()[1].values()) == {"reused"}


def test_until_makes_a_stage_and_what_it_needs_and_no_more(small: Small):
    assert small.run(until="cut") == (0, {"words": "done", "cut": "done"})
    with pytest.raises(ConfigError, match="--until cutt: there is no such stage; there are words, cut, report"):
        small.run(until="cutt")


def test_use_takes_an_artifact_as_a_stages_output(small: Small):
    small.run()
    cut = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    small.write("words.txt", "uvwxyz")
    assert small.run(use={"cut": f"sha256:{cut[:12]}"}) == (0, {"words": "done", "cut": "reused", "report": "done"})
    with pytest.raises(ConfigError, match=r"--use cut=.* is report, wanted documents"):
        small.run(use={"cut": f"run:{small.store.runs()[0]}/report"})


def test_an_artifact_of_another_run_is_an_input(small: Small):
    small.run()
    run = small.store.runs()[0]
    small.write("small.toml", TOML.replace('inputs = { documents = "words" }', f'inputs = {{ documents = "run:{run}/words" }}'))
    assert small.run() == (0, {"words": "reused", "cut": "reused", "report": "reused"})
    small.write("small.toml", TOML.replace('inputs = { documents = "words" }', f'inputs = {{ documents = "run:{run}/report" }}'))
    with pytest.raises(ConfigError, match="is report, wanted documents"):
        small.run()
    small.write("small.toml", TOML.replace('inputs = { documents = "words" }', 'inputs = { documents = "run:20200101-gone/words" }'))
    with pytest.raises(ConfigError, match="there is no run '20200101-gone'; the newest are"):
        small.run()


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
def test_a_failed_stage_leaves_the_others_results_and_says_how_to_go_on(small: Small, function: str, error: str):
    small.write("small.toml", TOML + f'\n[stages.last]\nuses = "./kinds.py:{function}"\ninputs = {{ documents = "words" }}\n')
    assert small.run() == (1, {"words": "done", "cut": "done", "report": "done", "last": "failed"})
    assert small.error().startswith(error)
    assert not list((small.store.root / "tmp").iterdir())
    assert small.events[-1]["text"] == "last failed; the other results are kept. Mend it, then go on with: gptline run small.toml"
    assert small.run()[1] == {"words": "reused", "cut": "reused", "report": "reused", "last": "failed"}


def test_what_reads_a_failed_stage_is_blocked_and_says_so(small: Small):
    small.write("kinds.py", KINDS.replace("    text = (documents.path", "    raise StageFailure('no')\n    text = (documents.path"))
    code, status = small.run()
    assert (code, status) == (1, {"words": "done", "cut": "failed", "report": "blocked"})
    assert next(event["reason"] for event in small.events if event.get("status") == "blocked") == "its input cut failed"


def test_a_source_that_changes_between_plan_and_reading_is_refused(small: Small):
    small.write("kinds.py", KINDS.replace("    with stage.open", "    stage.sources[0].path.write_text('other!')\n    with stage.open"))
    code, status = small.run()
    assert (code, status["words"]) == (1, "failed")
    assert small.error() == "words.txt was changed after this run was planned; run again to read it as it is now"


def test_ctrl_c_in_a_stage_ends_the_run_with_130_and_the_command_that_goes_on(small: Small):
    small.write("small.toml", TOML.replace("./kinds.py:cut", "./kinds.py:interrupted").replace('["words", "cut"]', '["words"]'))
    before = signal.getsignal(signal.SIGINT)
    code, status = small.run()
    assert code == 130
    assert status["cut"] == "stopped"
    assert {event["reason"] for event in small.events if event.get("status") == "stopped"} == {"begins again next time"}
    assert small.events[-1]["status"] == "KILLED"
    assert small.events[-1]["text"] == "interrupted; go on with: gptline run small.toml"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_damaged_artifact_is_made_again(small: Small):
    small.run()
    digest = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    (small.store.artifact(digest).path / "train.jsonl").unlink()
    word, reason = small.plan()["cut"]
    assert word == "run"
    assert reason == f"its artifact {digest[:12]} is damaged: train.jsonl is gone"
    assert small.run() == (0, {"words": "reused", "cut": "done", "report": "reused"})
    assert small.store.intact(digest) is None


def test_a_held_lease_makes_others_wait_and_says_for_whom(small: Small):
    from pipelines.store.lease import Watch

    key = next(each.key for each in Planner(small.graph(), small.store, ROOT).plan() if each.stage == "words")
    assert key is not None
    lease = Watch(small.store, key).take(run="another")
    assert lease is not None
    word, reason = small.plan()["words"]
    assert word == "wait"
    assert reason.endswith("run another is making it")
    lease.release()
    assert small.plan()["words"][0] == "run"


def test_strict_environment_puts_versions_into_the_key(small: Small):
    small.run()
    small.write("small.toml", TOML.replace("seed = 1", "seed = 1\nstrict_environment = true"))
    word, reason = small.plan()["words"]
    assert word == "run"
    assert "deepspeed: none -> 0.19.8" in reason


def test_a_loss_that_is_no_number_is_recorded_and_read_again(small: Small):
    small.write("kinds.py", KINDS.replace("config.letters})", "float('nan')})"))
    small.run()
    (action,) = [each for each in small.store.all_actions() if each.stage == "cut"]
    assert str(action.curves["eval/letters"][0][1]) == "nan"


def test_a_run_whose_driver_is_gone_is_known_as_dead(small: Small):
    small.run()
    assert dead_runs(small.store) == []
    last = small.store.backend.list(f"runs/{small.store.runs()[0]}/journal")[-1]
    small.store.backend.delete(last)
    assert dead_runs(small.store) == [small.store.runs()[0]]


@pytest.mark.parametrize("during", ["    with stage.open", "    text = (documents.path"])
def test_code_that_is_edited_before_or_while_it_runs_in_this_process_is_not_recorded(small: Small, during: str):
    edit = (
        f"    __import__('pathlib').Path({str(small.folder / 'words.py')!r}).write_text('def shorten(text, letters): return text[-1:]')\n"
    )
    small.write("kinds.py", KINDS.replace(during, edit + during))
    assert small.run() == (1, {"words": "done", "cut": "failed", "report": "blocked"})
    assert small.error() == "its code was changed since this run was planned, so what ran may be either; run again"
    assert {each.stage for each in small.store.all_actions()} == {"words"}
    assert small.run() == (0, {"words": "reused", "cut": "done", "report": "done"})


OTHERS = '\n[stages.others]\nuses = "./kinds.py:words"\nfile = "other.txt"\n'


def test_a_source_that_is_gone_blocks_what_needs_it_whatever_else_is_made_for_that(small: Small):
    small.write("small.toml", TOML.replace('["words", "cut"]', '["others", "words"]') + OTHERS)
    small.write("other.txt", "uvw")
    graph = small.graph()
    (small.folder / "words.txt").unlink()
    assert {each.stage: (each.word, each.reason) for each in Planner(graph, small.store, ROOT).plan()} == {
        "words": ("blocked", "its source words.txt can't be read (No such file or directory); put it back"),
        "others": ("run", "never made here"),
        "cut": ("blocked", "its input words can't be made"),
        "report": ("blocked", "its input words can't be made"),
    }


def test_a_source_that_goes_while_the_run_begins_leaves_the_other_branch_whole(small: Small, monkeypatch: pytest.MonkeyPatch):
    small.write("small.toml", TOML + OTHERS)
    small.write("other.txt", "uvw")
    begin = Run._begin

    def lose_one(run: Run, plan: list[Decision]) -> None:
        begin(run, plan)
        (small.folder / "words.txt").unlink()

    monkeypatch.setattr(Run, "_begin", lose_one)
    assert small.run() == (1, {"words": "failed", "cut": "blocked", "report": "blocked", "others": "done"})
    assert small.error() == "its source words.txt can't be read (No such file or directory); put it back"
    assert small.events[-1]["text"] == "words failed; the other results are kept. Mend it, then go on with: gptline run small.toml"


def test_what_a_given_stage_reads_is_not_needed(small: Small):
    small.run()
    cut = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    small.write(
        "small.toml", TOML.replace('["words", "cut"]', '["cut"]').replace("./kinds.py:words", './kinds.py:words"\nfile = "words.py')
    )
    assert small.run(use={"cut": f"sha256:{cut}"}) == (0, {"cut": "reused", "report": "done"})


def test_a_stop_that_is_asked_for_through_the_store_stops_the_run(small: Small):
    stop = "    stage._store.backend.put(f'runs/{stage._job.run}/stop', b'')\n    import time; time.sleep(0.4)\n    with stage.open"
    small.write("kinds.py", KINDS.replace("    with stage.open", stop))
    code, status = small.run()
    assert code == 143
    assert status == {"words": "done"}
    assert small.events[-1]["status"] == "KILLED"


def test_only_stages_that_will_run_need_room(small: Small):
    small.run()
    text = (small.folder / "small.toml").read_text()
    small.write("small.toml", text + "\n[stages.words.resources]\ncpus = 4096\n")
    real = Run(small.graph(), small.store, Options("gptline", "gptline"), lambda event: None)
    assert real.execute() == 0
    with pytest.raises(ConfigError, match=r"stages.words.resources: asks for 4.1e\+03 CPUs|asks for 4096 CPUs; this machine has"):
        Run(small.graph(), small.store, Options("gptline", "gptline", fresh=["words"]), lambda event: None).execute()


def test_the_newest_model_is_none_where_no_stage_makes_one(small: Small):
    small.run()
    with pytest.raises(ValueError, match="no model is called so; there are none yet"):
        resolve(small.store, "model:small@newest")


def test_a_users_own_kind_of_artifact_goes_from_stage_to_stage(small: Small):
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


def test_a_bare_digest_as_it_is_printed_is_a_reference(small: Small):
    small.run()
    digest = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    assert resolve(small.store, digest[:12]) == digest
    with pytest.raises(ValueError, match="names no artifact; wanted sha256:<at least 8 digits>, run:<id>/<stage>"):
        resolve(small.store, "cut")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise BaseException('odd')", "BaseException: odd"),
        ("stage.figure('eval/x', 'many')", "ValueError: metric 'eval/x' is 'many', wanted a number"),
        ("raise ValueError('bad \\udcff name')", "ValueError: bad "),
    ],
)
def test_no_way_to_fail_takes_the_run_along(small: Small, body: str, error: str):
    small.write("kinds.py", KINDS.replace('    raise KeyError("no such word")', f"    {body}"))
    small.write("small.toml", TOML + '\n[stages.last]\nuses = "./kinds.py:broken"\ninputs = { documents = "words" }\n')
    assert small.run() == (1, {"words": "done", "cut": "done", "report": "done", "last": "failed"})
    assert small.error().startswith(error)


def test_one_damaged_record_or_journal_line_hides_nothing_else(small: Small):
    small.run()
    first = small.store.runs()[0]
    small.store.backend.put(small.store.backend.list(f"runs/{first}/journal")[1], b'{"a":\n[]\n')
    (small.store.root / "actions" / ".DS_Store").write_text("")
    key = next(each.key for each in small.store.all_actions() if each.stage == "report")
    small.store.backend.put(f"actions/{key}/000001.json", b"")
    assert small.run() == (0, {"words": "reused", "cut": "reused", "report": "done"})


def test_a_damaged_manifest_is_a_damaged_artifact(small: Small):
    small.run()
    digest = resolve(small.store, f"run:{small.store.runs()[0]}/cut")
    (small.store.artifact(digest).path / "manifest.json").write_text('{"files"')
    assert small.run() == (0, {"words": "reused", "cut": "done", "report": "reused"})
    assert small.store.intact(digest) is None


DRILL = """

from gpt.settings import PretrainSettings


class DrillConfig(StageConfig, PretrainSettings):
    pass


def practise(rank, config):
    import os, signal, torch

    model = torch.nn.Linear(1, 1)
    rank.engine("policy", model, [{"params": list(model.parameters())}], config)
    if rank.restore() == 0:
        rank.save(3)
        os.kill(os.getpid(), signal.SIGINT)
    return None if rank.should_stop() else {"steps": 10}


def drill(config: DrillConfig, documents: Documents, stage: StageContext) -> Report:
    (stage.output / "report.json").write_text(str(stage.gang(practise, config)))
    return stage.publish(Report)
"""
DRILL_TOML = """
[stages.drill]
uses = "./kinds.py:drill"
inputs = { documents = "words" }
preset = "gpt2-nano"
steps = 10
global_batch_size = 4
lr = 1e-3
"""


@pytest.fixture
def drilled(small: Small) -> Small:
    """A line whose training was stopped by Ctrl-C, in a run of one process, when it had saved step 3 of 10."""
    small.write("kinds.py", KINDS + DRILL)
    small.write("small.toml", TOML + DRILL_TOML)
    code, status = small.run(until="drill")
    assert (code, status) == (130, {"words": "done", "drill": "stopped"})
    return small


def test_a_training_that_was_stopped_says_at_which_step_it_was_saved(drilled: Small):
    (last,) = [event for event in drilled.events if event["type"] == "stage_ended" and event["stage"] == "drill"]
    assert (last["reason"], "error" in last) == ("saved at step 3", False)
    assert drilled.run(until="drill") == (0, {"words": "reused", "drill": "done"})


def test_a_stop_through_the_store_reaches_a_training_of_one_process_and_is_the_runs_end_though_nothing_else_was_to_do(small: Small):
    runs = str(small.store.root / "runs")
    stop = f"import pathlib, time; [(run / 'stop').touch() for run in pathlib.Path({runs!r}).iterdir()]; time.sleep(0.4)"
    small.write("kinds.py", KINDS + DRILL.replace("os.kill(os.getpid(), signal.SIGINT)", stop))
    small.write("small.toml", TOML + DRILL_TOML)
    assert small.run(until="drill") == (143, {"words": "done", "drill": "stopped"})
    (last,) = [event for event in small.events if event["type"] == "stage_ended" and event["stage"] == "drill"]
    assert last["reason"] == "saved at step 3"
    assert small.events[-1]["status"] == "KILLED"


def test_a_plan_is_made_for_the_run_that_is_asked_for(drilled: Small):
    def plan(*words: str) -> str:
        drilled.graph()  # as in a process of its own
        asked = ["plan", str(drilled.folder / "small.toml"), "--set", f"store.root={drilled.store.root}", *words]
        return CliRunner().invoke(app, asked, catch_exceptions=False).output

    assert "drill   resume  goes on at step 3 of 10" in plan("--inline")
    assert (
        "drill   blocked  the checkpoint at step 3 was made with engine = torch and this run asks for engine = deepspeed, zero_stage = 1: "
        "its state can't be loaded so; ask for engine = torch to go on, or make the stage afresh to begin at step 0 (--fresh drill). "
        "Or go on with --inline\n"
    ) in plan()
    assert "drill   run    asked for afresh" in plan("--fresh", "drill")
    assert "drill" not in plan("--inline", "--until", "report")


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_page_that_cannot_be_made_takes_nothing_along(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.observe.page.render", full)
    assert small.run() == (1, {"words": "done", "cut": "done", "report": "done"})
    assert small.events[-1]["status"] == "FINISHED"
    assert small.told().splitlines()[1:] == ["could not make the run's page: OSError: [Errno 28] No space left on device"]


def test_what_a_full_disk_cannot_record_has_failed_and_the_run_says_how_to_go_on(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Store, "record", full)
    assert small.run() == (1, {"words": "failed", "cut": "blocked", "report": "blocked"})
    assert small.error() == "what came of it can't be recorded: [Errno 28] No space left on device"
    assert small.events[-1]["text"].endswith("Mend it, then go on with: gptline run small.toml")


def test_a_full_disk_does_not_hide_why_a_stage_failed(small: Small, monkeypatch: pytest.MonkeyPatch):
    put = FolderBackend.put
    monkeypatch.setattr(FolderBackend, "put", lambda self, name, data: full() if "traceback" in name else put(self, name, data))
    small.write("small.toml", TOML.replace("./kinds.py:cut", "./kinds.py:broken").replace('["words", "cut"]', '["words"]'))
    assert small.run() == (1, {"words": "done", "cut": "failed", "report": "done"})
    assert small.error().startswith("KeyError: 'no such word'")


def test_a_disk_that_is_full_in_the_middle_ends_the_run_with_its_last_words(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Run, "_heard", lambda *_: monkeypatch.setattr(FolderBackend, "put_if_absent", full))
    code, status = small.run()
    assert (code, status) == (1, {"words": "done"})  # then `cut` had something to tell, and the disk was full
    assert small.told().splitlines()[1] == "can't go on: [Errno 28] No space left on device"
    (last,) = [event for event in small.said if event["type"] == "run_ended"]  # on the screen, where the journal can't have it
    assert (last["status"], last["exit_code"]) == ("FAILED", 1)
    assert last["text"] == "cut failed; the other results are kept. Mend it, then go on with: gptline run small.toml"


def test_a_store_that_is_deleted_while_a_run_uses_it_fails_the_run_and_nothing_worse(small: Small):
    small.write(
        "kinds.py",
        KINDS.replace("    text = (documents.path", "    import shutil; shutil.rmtree(stage._store.root)\n    text = (documents.path"),
    )
    code, _ = small.run()
    assert code == 1
    (last,) = [event for event in small.said if event["type"] == "run_ended"]
    assert last["text"].startswith("cut failed; ")


def test_whatever_fails_in_the_driver_the_run_has_its_last_word(small: Small, monkeypatch: pytest.MonkeyPatch):
    def unheard(*_: object) -> None:
        raise TypeError("Object of type int64 is not JSON serializable")

    monkeypatch.setattr(Run, "_attend", unheard)
    assert small.run() == (1, {"words": "stopped"})
    said = "TypeError: Object of type int64 is not JSON serializable"
    assert small.told().splitlines()[1] == f"can't go on: {said}"
    (last,) = [event for event in small.events if event["type"] == "run_ended"]
    assert (last["status"], last["exit_code"]) == ("FAILED", 1)
    assert last["text"] == f"the driver failed ({said}); what the store has is kept. Mend it, then go on with: gptline run small.toml"


class Cluster:
    """A session that is none: what is submitted runs in this process, at the third look. A node of two CPUs, one of them in use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray

        self.joined = self.cancelled = 0
        monkeypatch.setattr(Run, "_session", self._session)
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0, "memory": 2.0**31}}])
        monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0, "memory": 2.0**30})
        monkeypatch.setattr("pipelines.run.runner.WAITING_TOLD_S", 0.0)
        monkeypatch.setattr("cluster.ray_session.submit", lambda function, job, **asked: LateTask(job, self))

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        self.joined += 1
        yield


class LateTask:
    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.started = self.done = False
        self._cluster = cluster
        self._job = job
        self._looks = 0

    def poll(self) -> list[dict[str, Any]]:
        self._looks += 1
        if self._looks == 3:
            self._outcome = execute(self._job, lambda event: None, lambda: False)
            self.started = self.done = True
        return []

    def result(self) -> Outcome:
        return self._outcome

    def cancel(self) -> None:
        self._cluster.cancelled += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_a_stage_that_the_session_can_never_hold_is_refused_before_the_run_begins(small: Small, cluster: Cluster):
    small.write("small.toml", TOML + "\n[stages.words.resources]\nlabels = { tier = 'a100' }\n")
    with pytest.raises(ConfigError, match=r"stages.words.resources: words asks for 1 rank of 1 CPU and labels .* room for 0 of them"):
        small.run(inline=False)
    assert small.store.runs() == []


def test_a_stage_that_waits_for_room_says_once_for_what(small: Small, cluster: Cluster):
    small.write("small.toml", TOML + "\n[stages.words.resources]\ncpus = 2\nmemory_gib = 2\n")
    assert small.run(inline=False) == (0, {"words": "done", "cut": "done", "report": "done"})
    notes = [event["text"] for event in small.events if event["type"] == "note" and event["stage"] == "words"]
    assert notes == ["waits for room for 1 rank of 2 CPUs and 2 GiB; free now: 1 CPUs, 0 GPUs and 1.0 GiB"]


def test_a_session_is_opened_when_what_was_to_be_reused_is_gone(small: Small, cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    small.run()
    assert small.run(inline=False)[0] == 0
    assert cluster.joined == 0
    begin = Run._begin

    def lose_one(run: Run, plan: list[Decision]) -> None:
        begin(run, plan)
        digest = next(each.output for each in plan if each.stage == "cut")
        assert digest is not None
        (small.store.artifact(digest).path / "train.jsonl").unlink()

    monkeypatch.setattr(Run, "_begin", lose_one)
    before = signal.getsignal(signal.SIGTERM)
    assert small.run(inline=False) == (0, {"words": "reused", "cut": "done", "report": "reused"})
    assert cluster.joined == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_lost_lease_records_nothing_and_says_what_to_do(small: Small):
    lose = "    [stage._store.backend.delete(each) for each in stage._store.backend.list(f'leases/{stage._job.key}')]\n    with stage.open"
    small.write("kinds.py", KINDS.replace("    with stage.open", lose))
    assert small.run() == (1, {"words": "failed", "cut": "blocked", "report": "blocked"})
    assert small.error().startswith("its lease is another run's by now, or was deleted, so its result was not recorded; run again: ")
    assert list(small.store.all_actions()) == []


def test_a_driver_whose_journal_was_taken_over_gives_its_stages_back_and_says_nothing_more(small: Small, cluster: Cluster):
    end = (
        "    from pipelines.store.journal import JournalWriter\n"
        "    JournalWriter(stage._store, stage._job.run).write('run_ended', status='KILLED')\n"
    )
    small.write("kinds.py", KINDS.replace("    with stage.open", f"{end}    with stage.open"))
    small.write("small.toml", TOML + OTHERS)  # runs meanwhile
    small.write("other.txt", "uvw")
    with pytest.raises(Superseded):
        small.run(inline=False)
    assert cluster.cancelled == 1
    (run,) = small.store.runs()
    assert read_journal(small.store, run)[-1]["status"] == "KILLED"
    for lease in small.store.backend.list("leases"):
        assert b'"released": true' in (small.store.backend.get(lease) or b"")
