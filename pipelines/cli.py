"""The verbs of `gptline`: parse, call, print; nothing else."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import (
    Config,
    Fresh,
    Inline,
    Root,
    RunId,
    Set,
    Until,
    Uri,
    Use,
    port_number,
    sampling_temperature,
    token_count,
    utf8_text,
    whole_number,
)
from pipelines.plan.config import load
from pipelines.plan.faults import did_you_mean
from pipelines.plan.graph import Graph, build
from pipelines.run.exit_codes import ENDING, UNREACHABLE, exit_of
from pipelines.stage import StageFailure
from pipelines.store.store import Store
from pipelines.terminal import EXIT_CODES, fail, nobody_reads, prepare_streams, print_lines, restore_cursor_and_quit, write


def _show_version(asked: bool) -> None:
    if asked:
        from pipelines.observe.doctor import gptline_version

        print_lines(f"gptline {gptline_version()}")
        raise typer.Exit


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback(epilog=EXIT_CODES)
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)] = False,
) -> None:
    """Train an assistant from raw text, as one pipeline: it reuses what is built already, explains why the rest runs, and traces every
    artifact to its documents.
    """
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
    """Build what is missing and reuse what exists."""
    _run(config, set_, use, until=until, fresh=fresh or [], inline=inline)


@app.command()
def rerun(config: Config, stage: Annotated[str, typer.Argument(metavar="STAGE")], set_: Set = None) -> None:
    """Rebuild one stage, and what depends on it as needed. Earlier results are kept."""
    if stage not in (known := _graph(config, set_).stages):
        raise StageFailure(f"there is no stage {stage!r}{did_you_mean(stage, known) or '; the stages are ' + ', '.join(known)}")
    _run(config, set_, None, until=None, fresh=[stage], inline=False)


@app.command()
def plan(
    config: Config,
    set_: Set = None,
    use: Use = None,
    until: Until = None,
    fresh: Fresh = None,
    inline: Inline = False,
    resolved: Annotated[
        bool, typer.Option("--config", help="Print the resolved pipeline instead: TOML with every default, which `run` accepts.")
    ] = False,
) -> None:
    """Show what would run, why, and for how long. Changes nothing."""
    from pipelines.observe.plan_rows import plan_lines
    from pipelines.plan.environment import ROOT
    from pipelines.plan.planner import Planner

    graph = _graph(config, set_, use)
    if resolved:
        _print_resolved(graph)
        return
    planner = Planner(graph, _store_of(graph), ROOT, given=graph.use, until=until, fresh=fresh or [], inline=inline)
    print_lines(*plan_lines(planner.plan(), graph.loaded.file.about_itself()))


@app.command()
def describe(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help="A stage kind, ./file.py:function, or a table such as store.", show_default=False)
    ] = None,
) -> None:
    """Show what a stage kind takes and makes. Without KIND, list all kinds."""
    from pipelines.plan.describe import describe as describe_one
    from pipelines.plan.describe import describe_all

    print_lines(*(describe_all() if kind is None else describe_one(kind, Path.cwd())))


@app.command()
def overlap(config: Config, set_: Set = None) -> None:
    """Show held-out records that are trained on. Reads the artifacts that exist, and runs nothing."""
    from pipelines.observe.overlap_report import overlap_lines

    graph = _graph(config, set_)
    print_lines(*overlap_lines(graph, _store_of(graph)))


@app.command()
def submit(
    config: Config,
    address: Annotated[str, typer.Option("--address", metavar="URL", help="The cluster's dashboard, such as http://127.0.0.1:8265.")],
    set_: Set = None,
    use: Use = None,
    until: Until = None,
    fresh: Fresh = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow sending to another machine without a token.")] = False,
) -> None:
    """Run as a job on a Ray cluster that shares the store. Returns at once."""
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
    print_lines(f"submitted to {jobs.address}: {run}")
    print_lines(*(f"  gptline {verb} {run}{more}{there}" for verb, more in (("status", ""), ("logs", " -f"), ("stop", ""))))


@app.command()
def status(run: RunId = None, store: Root = Path(".gptline")) -> None:
    """Show where runs stand, local or submitted. Without RUN, the newest ten."""
    from pipelines.run.follow import connect, known
    from pipelines.run.follow import status as lines

    opened = _store(store)
    print_lines(*lines(opened, run and known(opened, run), connect))


@app.command()
def logs(
    run: RunId = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Keep following until the run ends.")] = False,
    store: Root = Path(".gptline"),
) -> None:
    """Print a run's output so far. Without RUN, that of the newest run that has not ended, or else of the newest."""
    from pipelines.run.follow import connect, show_log

    opened = _store(store)
    chosen = _chosen(opened, run)
    try:
        show_log(opened, chosen, sys.stdout, connect, follow=follow)
    except KeyboardInterrupt:
        sys.stderr.write(f"the run continues; `gptline stop {chosen}` ends it\n")
        raise typer.Exit(130) from None


@app.command()
def stop(run: RunId = None, store: Root = Path(".gptline")) -> None:
    """Ask a run to finish its step, save a checkpoint and end. Without RUN, the newest that has not ended."""
    from pipelines.run.follow import connect
    from pipelines.run.follow import stop as end

    opened = _store(store)
    chosen = _chosen(opened, run)
    try:
        raise typer.Exit(not end(opened, chosen, print_lines, connect))
    except KeyboardInterrupt:
        sys.stderr.write(f"{chosen} is still stopping; `gptline status {chosen}` shows when it has ended\n")
        raise typer.Exit(130) from None


@app.command()
def sync(store: Root = Path(".gptline"), tracking: Uri = None) -> None:
    """Send MLflow what it lacks, and end runs whose driver is gone."""
    from pipelines.observe.delivery import sync as deliver
    from pipelines.observe.delivery import undelivered
    from pipelines.store.journal import dead_runs

    opened = _store(store)
    print_lines(*deliver(opened, tracking, dead_runs(opened)))
    raise typer.Exit(UNREACHABLE if undelivered(opened, tracking) else 0)


@app.command()
def ui(
    store: Root = Path(".gptline"),
    tracking: Uri = None,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.", metavar="PORT", parser=port_number)] = 5000,
) -> None:
    """Open the MLflow UI on this store."""
    from pipelines.observe.mlflow_ui import serve_ui
    from pipelines.store.journal import dead_runs

    opened = _store(store)
    raise typer.Exit(serve_ui(opened, tracking, port, print_lines, dead_runs(opened)))


@app.command()
def lineage(
    ref: Annotated[str, typer.Argument(metavar="REF", help="sha256:<digest>, run:<id>/<stage>, model:<pipeline>@newest or hf:<folder>")],
    store: Root = Path(".gptline"),
    mermaid: Annotated[bool, typer.Option("--mermaid", help="Print a Mermaid flowchart.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write an HTML page.")] = None,
) -> None:
    """Show where an artifact came from. Goes down to the documents, and shows what was built from it too."""
    from pipelines.observe.lineage import trace
    from pipelines.observe.lineage_text import as_html, as_mermaid, as_text
    from pipelines.plan.resolve import resolve

    opened = _store(store)
    traced = trace(opened, resolve(opened, ref))
    if html:
        html.write_text(as_html(traced), encoding="utf-8")
    print_lines(as_mermaid(traced) if mermaid else as_text(traced))


@app.command()
def sample(
    ref: Annotated[str, typer.Argument(metavar="REF", help="model:<pipeline>@newest, run:<id>/<stage>, sha256:<digest> or hf:<folder>")],
    prompt: Annotated[str, typer.Option(help="The text to continue.", callback=utf8_text)] = "",
    tokens: Annotated[int, typer.Option(metavar="N", parser=token_count, help="Write at most this many tokens.")] = 200,
    temperature: Annotated[float, typer.Option(metavar="T", parser=sampling_temperature, help="0 always takes the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(metavar="N", parser=whole_number, help="The same seed gives the same text.")] = 0,
    store: Root = Path(".gptline"),
) -> None:
    """Continue a prompt with a trained model."""
    from pipelines.serve.policy import find_policy
    from pipelines.serve.sample import continue_prompt

    model = find_policy(_store(store), ref)
    for text in continue_prompt(model, prompt, tokens=tokens, temperature=temperature, seed=seed):
        write(text)
    print_lines("")


@app.command()
def chat(
    ref: Annotated[
        str | None,
        typer.Argument(metavar="REF", help="As for sample; without it, the newest model with a chat format.", show_default=False),
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="A system message, which begins the conversation.", callback=utf8_text)] = "",
    tokens: Annotated[int, typer.Option(metavar="N", parser=token_count, help="At most this many tokens per answer.")] = 200,
    temperature: Annotated[float, typer.Option(metavar="T", parser=sampling_temperature, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[
        int, typer.Option(metavar="N", parser=whole_number, help="Above temperature 0, the same seed gives the same answers.")
    ] = 0,
    store: Root = Path(".gptline"),
) -> None:
    """Talk to a model. Piped input is one question per line; only the answers go to stdout."""
    from pipelines.serve.chat import Chat, talk
    from pipelines.serve.policy import find_chat_policy

    try:
        model, name = find_chat_policy(_store(store), ref)
        sys.stderr.write(f"{name}\n")
        answered = talk(Chat(model, system=system, tokens=tokens, temperature=temperature, seed=seed), sys.stdin, sys.stdout, sys.stderr)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        nobody_reads()
    raise typer.Exit(0 if answered else 2)


@app.command()
def doctor(store: Root = Path(".gptline")) -> None:
    """Check this machine. Looks at versions, Ray, MLflow, GPUs, authentication, memory and disk."""
    from pipelines.observe.doctor import examine

    findings = examine(Store(store.expanduser()))
    print_lines(*(str(each) for each in findings))
    if any(each.wrong for each in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the program; `gptline --help` lists its exit codes."""
    prepare_streams()
    signal.signal(signal.SIGQUIT, restore_cursor_and_quit)
    try:
        app(prog_name="gptline")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before any stage was started\n")
        sys.exit(130)
    except ENDING as error:
        fail(error, *exit_of(error))


def _print_resolved(graph: Graph) -> None:
    from pipelines.plan.resolved import home, saved_in
    from pipelines.plan.toml_writer import write_toml

    folder = home(graph)
    write(write_toml(saved_in(folder, graph)))
    if folder != Path.cwd():
        sys.stderr.write(f"save it in {folder}: its `data` and its functions are relative to that folder\n")


def _run(config: Path, set_: list[str] | None, use: list[str] | None, *, until: str | None, fresh: list[str], inline: bool) -> None:
    from pipelines.observe.progress import Progress
    from pipelines.observe.summary import summary_of
    from pipelines.run.runner import Options, Run

    graph = _graph(config, set_, use)
    resume = _again("run", config, set_, use, until, ["--inline"] if inline else [])
    options = Options(_typed(), resume, fresh, graph.use, until, inline)
    store = _store_of(graph)
    with Progress(sys.stdout, summarize=functools.partial(summary_of, store)) as progress:
        code = Run(graph, store, options, progress.show).execute()
    raise typer.Exit(code)


def _typed() -> str:
    return shlex.join(["gptline", *sys.argv[1:]])


def _again(verb: str, config: Path, set_: list[str] | None, use: list[str] | None, until: str | None, more: list[str]) -> str:
    """The command that resumes after an interruption: the same without --fresh."""
    repeated = [part for each in set_ or [] for part in ("--set", each)] + [part for each in use or [] for part in ("--use", each)]
    return shlex.join(["gptline", verb, str(config), *repeated, *(["--until", until] if until else []), *more])


def _chosen(store: Store, run: str | None) -> str:
    """The run that was named, or the newest, which is then printed."""
    from pipelines.run.follow import known, newest

    if run is not None:
        return known(store, run)
    chosen = newest(store)
    print_lines(f"run {chosen}")
    return chosen


def _graph(config: Path, set_: list[str] | None, use: list[str] | None = None) -> Graph:
    return build(load(config, set_ or []), _pairs(use))


def _store_of(graph: Graph) -> Store:
    return Store(Path(graph.loaded.file.store.root).expanduser())


def _store(root: Path) -> Store:
    root = root.expanduser()
    if not root.is_dir():
        raise StageFailure(f"there is no store in {root}; run a pipeline first, or name its folder with --store")
    return Store(root)


def _pairs(items: list[str] | None) -> dict[str, str]:
    pairs = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals:
            raise StageFailure(f"--use {item}: expected STAGE=REF, for example --use pretrain=sha256:1f0c...")
        pairs[name] = value
    return pairs


if __name__ == "__main__":
    main()
