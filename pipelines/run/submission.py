"""A run as a Ray job: what is sent, and what the job's driver does with it.

    gptline submit                                          the job's driver, on the cluster's head node
    check the file, reach the cluster                       python -m pipelines.run.submission STORE RUN
    freeze code and config into the store                   reads runs/<run>/job.json and the frozen config
    runs/<run>/job.json, then one job    -- store, job -->  Run(...).execute(), as `gptline run` does

One job is one run, and both have the same id. Everything except the job's name goes through the store, so the job starts from the code and
the config as they were when it was submitted. Relative paths mean what they mean to the person who submits: the store and the data folder
become absolute, and the user's own files come from the snapshot. Secrets are not sent: a driver takes MLflow's and the cluster's from its
own environment.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cluster.jobs import Jobs
from pipelines.observe.progress import Progress
from pipelines.observe.summary import summary_of
from pipelines.plan.config import load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import Graph, build
from pipelines.plan.planner import Planner
from pipelines.plan.snapshot import freeze
from pipelines.run.exit_codes import ENDING, exit_of
from pipelines.run.frozen_config import freeze_config, not_freezable
from pipelines.run.runner import Options, Run
from pipelines.store.events import now_ms
from pipelines.store.processes import user_name
from pipelines.store.runs import JobRecord, RunFolder, new_run_id
from pipelines.store.store import Store


def submit(graph: Graph, store: Store, options: Options, use: dict[str, str], jobs: Jobs) -> str:
    """Send a run to a cluster; its id.

    ConfigError is raised before anything is written; if the job can't be sent, what was written is removed.
    `use` is the command line's --use as typed: folders that are imported are stages of the graph already.
    """
    Planner(graph, store, ROOT, given=options.use, until=options.until, fresh=options.fresh)  # raises if they are wrong
    if faults := not_freezable(graph):
        raise graph.loaded.error(faults)
    run = new_run_id(graph.loaded.file.pipeline)
    store.create()
    snapshot = freeze(graph, store)
    folder = RunFolder(store, run)
    try:
        config = freeze_config(graph, store, snapshot, folder.path("submitted"))
        record = JobRecord(
            run=run,
            address=jobs.address,
            config=config.relative_to(folder.path()).as_posix(),
            use=use,
            options=asdict(options) | {"run": run, "fresh": list(options.fresh), "use": {}},
            snapshot=snapshot.artifact.digest,
            submitted_ms=now_ms(),
            user=user_name(),
        )
        folder.write_job(record)
        jobs.submit(run, entrypoint(snapshot.path, store, run), {})
    except BaseException:
        folder.remove()
        raise
    return run


def entrypoint(code: Path, store: Store, run: str) -> str:
    """A job's shell line. It names this interpreter, since the cluster's PATH may lead to another, and -P, since its working folder may
    hold code.
    """
    environment = [f"PYTHONPATH={code}", "PYTHONDONTWRITEBYTECODE=1"]  # the snapshot is an artifact: nothing may write into it
    program = [sys.executable, "-P", "-m", "pipelines.run.submission", str(store), run]
    return f"exec {shlex.join(['env', *environment, *program])}"


def main(arguments: Sequence[str]) -> int:
    """The job's driver; its exit code is the run's."""
    root, run = Path(arguments[0]), arguments[1]
    try:
        store = Store(root)
        folder = RunFolder(store, run)
        job = folder.job()
        if job is None:
            raise OSError(f"this node does not see {root}/runs/{run}; expected the store on storage that every node has at this same path")
        graph = build(load(folder.path(job.config)), job.use)
        options = Options(**job.options | {"use": graph.use})
        with Progress(sys.stdout, summarize=partial(summary_of, store)) as progress:
            return Run(graph, store, options, progress.show).execute()
    except ENDING as error:
        code, text = exit_of(error)
        sys.stderr.write(f"{text}\n")
        return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
