"""A pipeline of three small stages in a folder of its own, which runs in this process without MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.plan.config import load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import Graph, build
from pipelines.plan.planner import Planner
from pipelines.run.runner import Options, Run
from pipelines.store.events import Announcement, JournalEvent, RunEnded, StageEnded
from pipelines.store.journal import read_journal
from pipelines.store.store import Store

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

OTHERS = '\n[stages.others]\nuses = "./kinds.py:words"\nfile = "other.txt"\n'


class Small:
    """`Small(tmp_path).run()` builds words, cut and report."""

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
        """Run the pipeline; return the exit code and each stage's status."""
        chosen = Options("gptline rerun small.toml cut", "gptline run small.toml", **{"inline": True, **options})
        self.shown: list[JournalEvent | Announcement] = []
        run = Run(self.graph(*overrides), self.store, chosen, self.shown.append)
        code = run.execute()
        self.events = read_journal(self.store, run.run)
        return code, {event.stage: event.status for event in self.ended()}

    def plan(self, *overrides: str, **options: Any) -> dict[str, tuple[str, str]]:
        return {each.stage: (each.action, each.reason) for each in Planner(self.graph(*overrides), self.store, ROOT, **options).plan()}

    def ended(self) -> list[StageEnded]:
        return [event for event in self.events if isinstance(event, StageEnded)]

    def ended_stage(self, stage: str) -> StageEnded:
        (event,) = [event for event in self.ended() if event.stage == stage]
        return event

    def announced(self) -> list[str]:
        """The announcements that were shown beside the rows."""
        return [event.text for event in self.shown if isinstance(event, Announcement)]

    def ending(self) -> RunEnded:
        """How the run ended, as it was shown."""
        (event,) = [event for event in self.shown if isinstance(event, RunEnded)]
        return event

    def error(self) -> str:
        return next(event.error for event in self.ended() if event.status == "failed")


class NoTracker:
    """A tracker that delivers nothing to MLflow."""

    def news(self) -> None: ...

    def finish(self, deadline_s: float) -> None: ...
