"""A run as a Ray job: what is sent, and what the job's driver does with it.

    gptline submit                                          the job's driver, on the cluster's head node
    check the file, knock at the cluster                    python -m pipelines.run.submission STORE RUN
    freeze code and config into the store                   reads runs/<run>/job.json and the frozen config
    runs/<run>/job.json, then one job    -- store, job -->  Run(...).execute(), as `gptline run` does

One job is one run, and the job is called as the run is. Everything but the job's name goes through the store, so the job starts from
the code and the config of that moment. Relative paths mean what they mean to who submits: the store and the data folder are made
absolute, and the user's own files are taken from the snapshot. Secrets stay behind: a driver takes MLflow's and the cluster's from its
own environment.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.jobs import Jobs
from pipelines.observe.progress import Progress
from pipelines.plan.config import ConfigError, Fault, load
from pipelines.plan.graph import ROOT, Graph, build
from pipelines.plan.planner import Planner
from pipelines.plan.snapshot import Snapshot, freeze
from pipelines.run.runner import Options, Run, new_run
from pipelines.stage import StageFailure
from pipelines.store.journal import Superseded
from pipelines.store.lease import user_name
from pipelines.store.store import Store


def submit(graph: Graph, store: Store, options: Options, use: dict[str, str], jobs: Jobs) -> str:
    """Send a run to a cluster; its id. ConfigError comes before anything is written, and what was written goes if the job can't be sent.

    `use` is the command line's --use as it was typed: folders that are imported are stages of the graph already.
    """
    Planner(graph, store, ROOT, given=options.use, until=options.until, fresh=options.fresh)  # tells what is wrong with them
    if faults := _not_to_be_frozen(graph):
        raise ConfigError(graph.loaded.path, faults)
    run = new_run(graph.loaded.file.pipeline)
    store.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    snapshot = freeze(graph, store)
    folder = store.root / "runs" / run
    try:
        config = freeze_config(graph, store, snapshot, folder / "submitted")
        record = {
            "run": run,
            "address": jobs.address,
            "config": config.relative_to(folder).as_posix(),
            "use": use,
            "options": asdict(options) | {"run": run, "fresh": list(options.fresh), "use": {}},
            "snapshot": snapshot.artifact.digest,
            "submitted_ms": time.time_ns() // 1_000_000,
            "user": user_name(),
        }
        store.backend.put(f"runs/{run}/job.json", json.dumps(record, ensure_ascii=False).encode())
        jobs.submit(run, entrypoint(snapshot.path, store, run), {})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return run


def entrypoint(code: Path, store: Store, run: str) -> str:
    """A job's shell line. This interpreter, since the cluster's PATH may lead to another; -P, since its working folder may hold code."""
    environment = [f"PYTHONPATH={code}", "PYTHONDONTWRITEBYTECODE=1"]  # the snapshot is an artifact: nobody writes into it
    program = [sys.executable, "-P", "-m", "pipelines.run.submission", str(store.root), run]
    return f"exec {shlex.join(['env', *environment, *program])}"


def submitted(store: Store, run: str) -> dict[str, Any] | None:
    """What `submit` wrote down of a run; None for one that was not submitted."""
    data = store.backend.get(f"runs/{run}/job.json")
    return None if data is None else json.loads(data)


def _not_to_be_frozen(graph: Graph) -> list[Fault]:
    return [
        Fault(
            f"stages.{stage.name}.{each.setting}",
            f"{each.reference!r} is an absolute path, which a job would read as it is by then; "
            f"name it relative to the folder of {graph.loaded.path.name}",
        )
        for stage in graph.stages.values()
        for each in stage.user_code
        if os.path.isabs(each.reference)
    ]


def freeze_config(graph: Graph, store: Store, snapshot: Snapshot, folder: Path) -> Path:
    """Write the config with its overrides, and beside it the user's files as they lie beside the original, so that what names them, which
    is part of the key, stays as it is. Below `folder` comes as much of the original's own path as a name that begins with ../ goes up.
    """
    places = {  # files of two folders may be named alike, by a pipeline file and one that it extends
        (os.path.normpath(os.path.dirname(each.reference.rpartition(":")[0])), frozen)
        for name, frozen in snapshot.user_folders().items()
        for each in graph.stages[name].user_code
    }
    up = max((place.split(os.sep).count(os.pardir) for place, _ in places), default=0)
    above = ["_"] * up + list(graph.user_folder().parts[1:])
    home = folder.joinpath(*above[len(above) - up :])
    home.mkdir(parents=True)
    for place, frozen in sorted(places):
        shutil.copytree(frozen, home / place, dirs_exist_ok=True)
    file = graph.loaded.file.model_dump(mode="json")
    file["store"]["root"] = str(store.root)
    file["data"] = str(graph.loaded.data())
    file["cluster"]["address"] = "auto"
    file["tracking"]["uri"] = _absolute(file["tracking"]["uri"])
    config = home / graph.loaded.path.name
    config.write_text("".join(f"{as_toml(key)} = {as_toml(value)}\n" for key, value in file.items()), encoding="utf-8")
    return config


def _absolute(uri: str) -> str:
    """A database file's address, wherever it is opened from."""
    path = uri.removeprefix("sqlite:///")
    return uri if path == uri else f"sqlite:///{Path(path).absolute()}"


def as_toml(value: Any) -> str:
    """A value of a pipeline file, in one line of TOML."""
    if isinstance(value, dict):
        pairs = (f"{as_toml(str(name))} = {as_toml(each)}" for name, each in value.items() if each is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(each) for each in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)  # TOML writes inf and nan as Python does
    return json.dumps(value)


def main(words: Sequence[str]) -> int:
    """The job's driver; its exit code is the run's."""
    root, run = Path(words[0]), words[1]
    store = Store(root)
    record = submitted(store, run)
    if record is None:
        sys.stderr.write(f"this node does not see {root}/runs/{run}: wanted a store on storage that every node has at this same path\n")
        return 2
    try:
        graph = build(load(root / "runs" / run / record["config"]), record["use"])
        options = Options(**record["options"] | {"use": graph.use})
        with Progress(sys.stdout) as progress:
            return Run(graph, store, options, progress.show).execute()
    except (ConfigError, StageFailure, ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except Superseded as error:
        sys.stderr.write(f"{error}; it goes on there\n")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
