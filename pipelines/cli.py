"""The verbs of `gptline`: parse, call, print; nothing else."""

from __future__ import annotations

import difflib
import functools
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.plan.config import ConfigError, TrackingConfig, load, validate
from pipelines.plan.graph import Graph, build
from pipelines.stage import StageFailure
from pipelines.store.journal import Superseded
from pipelines.store.store import Store


def _mlflow(uri: str | None) -> str | None:
    """An address that a pipeline file could have, too."""
    for fault in validate(TrackingConfig, {"uri": uri}, "")[1] if uri is not None else []:
        raise StageFailure(f"--tracking {fault.what}")
    return uri


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A pipeline file, such as configs/quickstart.toml.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Override one setting: stages.pretrain.lr=3e-4. May be repeated.")
]
Use = Annotated[list[str] | None, typer.Option("--use", metavar="STAGE=REF", help="Take this artifact as a stage's output.")]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Make this stage and what it needs, no more.")]
Fresh = Annotated[list[str] | None, typer.Option("--fresh", metavar="STAGE", help="Make this stage anew. May be repeated.")]
Inline = Annotated[bool, typer.Option("--inline", help="In this process, one rank, plain torch: for a debugger.")]
RunId = Annotated[str | None, typer.Argument(metavar="RUN", help="A run's id.", show_default=False)]
Root = Annotated[Path, typer.Option("--store", metavar="DIR", help="The store's folder.")]
Uri = Annotated[
    str | None, typer.Option("--tracking", metavar="URI", callback=_mlflow, help="Another MLflow than each run's own: sqlite, http://...")
]


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """From raw text to a trained model, as one line of stages: reused exactly, explained in words, traced to its documents."""
    if debug:
        os.environ["GPTLINE_DEBUG"] = "1"


@app.command()
def run(
    config: Config,
    set_: Set = None,
    use: Use = None,
    until: Until = None,
    fresh: Fresh = None,
    inline: Inline = False,
) -> None:
    """Make what is missing, reuse what is there."""
    _run(config, set_, use, until=until, fresh=fresh or [], inline=inline)


@app.command()
def rerun(config: Config, stage: Annotated[str, typer.Argument(metavar="STAGE")], set_: Set = None) -> None:
    """Make one stage afresh, and what follows from it as needed. The earlier making is kept."""
    if stage not in (known := _graph(config, set_).stages):
        near = difflib.get_close_matches(stage, known, n=1)
        raise StageFailure(f"there is no stage {stage!r}; " + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"))
    _run(config, set_, None, until=None, fresh=[stage], inline=False)


@app.command()
def plan(config: Config, set_: Set = None, use: Use = None, until: Until = None, fresh: Fresh = None, inline: Inline = False) -> None:
    """What would run, why, and about how long. Changes nothing."""
    from pipelines.observe.plan_rows import plan_lines
    from pipelines.plan.environment import ROOT
    from pipelines.plan.planner import Planner

    graph = _graph(config, set_, use)
    planner = Planner(graph, _store_of(graph), ROOT, given=graph.use, until=until, fresh=fresh or [], inline=inline)
    _print(*plan_lines(planner.plan(), graph.loaded.file.about_itself()))


@app.command()
def submit(
    config: Config,
    address: Annotated[str, typer.Option("--address", metavar="URL", help="The cluster's dashboard: http://127.0.0.1:8265.")],
    set_: Set = None,
    use: Use = None,
    until: Until = None,
    fresh: Fresh = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="To another machine without a token, too.")] = False,
) -> None:
    """Like run, as a job on a Ray cluster that shares the store. Returns at once."""
    from cluster.jobs import Jobs
    from pipelines.run.runner import Options
    from pipelines.run.submission import submit as send

    graph = _graph(config, set_, use)
    go_on = _again("submit", config, set_, use, until, ["--address", address, *(["--insecure"] if insecure else [])])
    options = Options(_typed(), go_on, fresh or [], graph.use, until)
    jobs = Jobs(address, insecure=insecure)
    run = send(graph, _store_of(graph), options, _pairs(use), jobs)
    root = graph.loaded.file.store.root
    there = "" if root == ".gptline" else f" --store {shlex.quote(root)}"
    _print(f"submitted to {jobs.address}: {run}")
    _print(*(f"  gptline {verb} {run}{more}{there}" for verb, more in (("status", ""), ("logs", " -f"), ("stop", ""))))


@app.command()
def status(run: RunId = None, store: Root = Path(".gptline")) -> None:
    """Where a run stands, one here or one that was submitted; without RUN, the newest ten."""
    from pipelines.run.follow import connect, known
    from pipelines.run.follow import status as lines

    opened = _store(store)
    _print(*lines(opened, run and known(opened, run), connect))


@app.command()
def logs(
    run: RunId = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until the run ends.")] = False,
    store: Root = Path(".gptline"),
) -> None:
    """What a run said so far. Without RUN, the newest that has not ended, or else the newest."""
    from pipelines.run.follow import connect, show_log

    opened = _store(store)
    chosen = _chosen(opened, run)
    try:
        show_log(opened, chosen, sys.stdout, connect, follow=follow)
    except KeyboardInterrupt:
        sys.stderr.write(f"the run goes on; `gptline stop {chosen}` would end it\n")
        raise typer.Exit(130) from None


@app.command()
def stop(run: RunId = None, store: Root = Path(".gptline")) -> None:
    """Have a run finish its step, save and end. Without RUN, the newest that has not ended."""
    from pipelines.run.follow import connect
    from pipelines.run.follow import stop as end

    opened = _store(store)
    chosen = _chosen(opened, run)
    try:
        raise typer.Exit(not end(opened, chosen, _print, connect))
    except KeyboardInterrupt:
        sys.stderr.write(f"{chosen} goes on stopping; `gptline status {chosen}` tells when it has ended\n")
        raise typer.Exit(130) from None


@app.command()
def sync(store: Root = Path(".gptline"), tracking: Uri = None) -> None:
    """Deliver what MLflow missed, and set right the status of runs whose driver is gone."""
    from pipelines.observe.delivery import sync as deliver
    from pipelines.store.journal import dead_runs

    opened = _store(store)
    _print(*deliver(opened, tracking, dead_runs(opened)))


@app.command()
def ui(
    store: Root = Path(".gptline"),
    tracking: Uri = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
) -> None:
    """The MLflow UI on this store."""
    from pipelines.observe.mlflow_ui import serve_ui
    from pipelines.store.journal import dead_runs

    opened = _store(store)
    raise typer.Exit(serve_ui(opened, tracking, port, _print, dead_runs(opened)))


@app.command()
def lineage(
    ref: Annotated[str, typer.Argument(metavar="REF", help="sha256:<digest>, run:<id>/<stage>, model:<pipeline>@newest or hf:<folder>")],
    store: Root = Path(".gptline"),
    mermaid: Annotated[bool, typer.Option("--mermaid", help="As a Mermaid flowchart.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write a page.")] = None,
) -> None:
    """Where an artifact came from, down to the documents, and what was made of it."""
    from pipelines.observe.lineage import trace
    from pipelines.observe.lineage_text import as_html, as_mermaid, as_text
    from pipelines.plan.resolve import resolve

    opened = _store(store)
    traced = trace(opened, resolve(opened, ref))
    if html:
        html.write_text(as_html(traced), encoding="utf-8")
    _print(as_mermaid(traced) if mermaid else as_text(traced))


@app.command()
def sample(
    ref: Annotated[str, typer.Argument(metavar="REF", help="model:<pipeline>@newest, run:<id>/<stage>, sha256:<digest> or hf:<folder>")],
    prompt: Annotated[str, typer.Option(help="The text to continue.", callback=_utf8)] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
    store: Root = Path(".gptline"),
) -> None:
    """Continue a prompt with a trained model."""
    from pipelines.plan.resolve import resolve
    from pipelines.serve.sample import continue_prompt

    opened = _store(store)
    for text in continue_prompt(opened, resolve(opened, ref), prompt, tokens=tokens, temperature=temperature, seed=seed):
        sys.stdout.write(text)
        sys.stdout.flush()
    _print("")


@app.command()
def chat(
    ref: Annotated[
        str | None,
        typer.Argument(metavar="[REF]", help="As for sample; without it, the newest model that speaks in turns.", show_default=False),
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="Said to it before all else.", callback=_utf8)] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Above temperature 0, the same seed gives the same answers.")] = 0,
    store: Root = Path(".gptline"),
) -> None:
    """Talk to a model. What is piped in is a question a line; the answers alone go to stdout."""
    from pipelines.serve.chat import Chat, choose, talk

    try:
        model, name = choose(_store(store), ref)
        sys.stderr.write(f"{name}\n")
        answered = talk(Chat(model, system=system, tokens=tokens, temperature=temperature, seed=seed), sys.stdin, sys.stdout, sys.stderr)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    raise typer.Exit(0 if answered else 2)


@app.command()
def doctor(store: Root = Path(".gptline")) -> None:
    """What is here, and what is wrong: versions, Ray, MLflow, GPUs, authentication, disk."""
    from pipelines.observe.doctor import examine

    findings = examine(Store(store))
    _print(*(str(each) for each in findings))
    if any(each.wrong for each in findings):
        raise typer.Exit(1)


def main() -> None:
    """The program: exit codes are 0 done, 1 a stage failed, 2 wrong use or config, 130 and 143 interrupted."""
    try:
        app()
    except (ConfigError, StageFailure, ValueError) as error:
        if os.environ.get("GPTLINE_DEBUG"):
            raise
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before any stage was started\n")
        sys.exit(130)
    except OSError as error:
        if os.environ.get("GPTLINE_DEBUG"):
            raise
        sys.stderr.write(f"can't go on: {error}\n")
        sys.exit(2)
    except Superseded as error:
        sys.stderr.write(f"{error}, or `gptline sync` took it for dead and ended it; `gptline status` tells which\n")
        sys.exit(1)


def _run(config: Path, set_: list[str] | None, use: list[str] | None, *, until: str | None, fresh: list[str], inline: bool) -> None:
    from pipelines.observe.progress import Progress
    from pipelines.observe.summary import summary_of
    from pipelines.run.runner import Options, Run

    graph = _graph(config, set_, use)
    go_on = _again("run", config, set_, use, until, ["--inline"] if inline else [])
    options = Options(_typed(), go_on, fresh, graph.use, until, inline)
    store = _store_of(graph)
    with Progress(sys.stdout, summarize=functools.partial(summary_of, store)) as progress:
        code = Run(graph, store, options, progress.show).execute()
    raise typer.Exit(code)


def _typed() -> str:
    return shlex.join(["gptline", *sys.argv[1:]])


def _again(verb: str, config: Path, set_: list[str] | None, use: list[str] | None, until: str | None, more: list[str]) -> str:
    """The command that goes on after an interruption: the same without what asks for a stage afresh."""
    words = [word for each in set_ or [] for word in ("--set", each)] + [word for each in use or [] for word in ("--use", each)]
    return shlex.join(["gptline", verb, str(config), *words, *(["--until", until] if until else []), *more])


def _chosen(store: Store, run: str | None) -> str:
    """The run that was named, or the one that is meant where none was: that one is told."""
    from pipelines.run.follow import known, newest

    if run is not None:
        return known(store, run)
    chosen = newest(store)
    _print(f"run {chosen}")
    return chosen


def _graph(config: Path, set_: list[str] | None, use: list[str] | None = None) -> Graph:
    return build(load(config, set_ or []), _pairs(use))


def _store_of(graph: Graph) -> Store:
    return Store(Path(graph.loaded.file.store.root).expanduser())


def _store(root: Path) -> Store:
    if not root.is_dir():
        raise StageFailure(f"there is no store in {root}; run a pipeline first, or name its folder with --store")
    return Store(root)


def _pairs(items: list[str] | None) -> dict[str, str]:
    pairs = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise StageFailure(f"--use {item}: wanted STAGE=REF, for example --use pretrain=sha256:1f0c...")
        pairs[name] = value
    return pairs


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"{text!a} is no UTF-8; give it in that encoding") from error
    return text


def _print(*lines: str) -> None:
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
