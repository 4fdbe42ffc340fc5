"""The command line: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import importlib.metadata
import io
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines import cli
from pipelines.cli import app
from pipelines.plan.config import load
from pipelines.plan.faults import ConfigError
from pipelines.plan.graph import ROOT
from pipelines.stage import StageFailure
from pipelines.store.events import RunEnded, RunStarted
from pipelines.store.journal import JournalWriter
from pipelines.store.store import Store
from pipelines.terminal import write

PIPELINE = 'pipeline = "p"\n[stages.documents]\nuses = "ingest"\nsource = "text"\nfiles = ["a.txt"]\n'


def gptline(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def program(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """`python -m pipelines.cli` in a process of its own."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments], cwd=folder, env=variables, capture_output=True)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("To be, or not to be.\n")
    path = tmp_path / "p.toml"
    path.write_text(PIPELINE)
    return path


def faults(path: Path) -> str:
    found = gptline("plan", str(path))
    assert found.exit_code == 1  # `main` turns the exception into exit code 2
    return str(found.exception)


def test_version_prints_the_installed_version():
    assert gptline("--version").stdout == f"gptline {importlib.metadata.version('gptline')}\n"


def test_the_module_runs_like_the_program_and_a_fault_exits_with_2(tmp_path: Path):
    found = program("plan", "no.toml", folder=tmp_path)
    assert found.returncode == 2
    assert found.stderr.decode() == "no.toml: one fault; no stage was started.\n  file: there is no such file\n"
    assert program("--help", folder=tmp_path).stdout.startswith(b"Usage: gptline ")


def test_help_lists_the_exit_codes():
    for code in ("0    done", "1    a stage failed", "2    wrong use", "3    the store", "130  interrupted"):
        assert code in gptline("--help").stdout


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999"])
def test_a_port_out_of_range_is_refused_by_name(port: str):
    found = gptline("ui", "--port", port)
    assert found.exit_code == 2
    assert f"Invalid value for '--port': expected a port from 1 to 65535, found {port}" in found.stderr


@pytest.mark.parametrize("address", ["10.0.0.5:0", "10.0.0.5:99999"])
def test_a_port_of_a_cluster_out_of_range_is_refused(pipeline: Path, address: str):
    pipeline.write_text(f'{PIPELINE}\n[cluster]\naddress = "{address}"\n')
    assert "p.toml, line 8: cluster.address: expected a port from 1 to 65535, found" in faults(pipeline)


@pytest.mark.parametrize("address", ["me:hush@10.0.0.5:6379", "10.0.0.5:6379?token=abc"])
def test_a_secret_in_a_clusters_address_is_refused_and_not_repeated(pipeline: Path, address: str):
    pipeline.write_text(f'{PIPELINE}\n[cluster]\naddress = "{address}"\n')
    found = faults(pipeline)
    assert "p.toml, line 8: cluster.address: expected HOST:PORT, found a user or a query" in found
    assert "hush" not in found
    assert "abc" not in found


@pytest.mark.parametrize("stages", ["", "[stages]\n", "stages = {}\n"])
def test_a_file_without_stages_says_what_is_expected(pipeline: Path, stages: str):
    pipeline.write_text(f'pipeline = "p"\n{stages}')
    assert "stages: expected at least one table, such as [stages.documents], found none" in faults(pipeline)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "file: is a Git LFS pointer, not the file itself; run `git lfs pull`",
        ),
        ("\n<!DOCTYPE html>\n<html>", "file: is an HTML page, not TOML; download the file itself"),
        (
            'pipeline = "p"\nseed = = 1\n',
            "p.toml, line 2: TOML: can't be parsed: Invalid value (column 8); "
            'expected "text" in quotes, a number, true, false, a list or a table',
        ),
        (
            'pipeline = "p"\npipeline = "q"\n',
            "p.toml, line 2: TOML: can't be parsed: Cannot overwrite a value (column 15); "
            "this key is set a second time, keep one of the two",
        ),
        (
            "[store]\n[store]\n",
            "p.toml, line 2: TOML: can't be parsed: Cannot declare ('store',) twice (column 7); "
            "this table is begun a second time, keep one of the two",
        ),
        (
            'pipeline = "p"\rseed = 1\r',
            "p.toml, line 1: TOML: can't be parsed: Expected newline or end of document after a statement (column 15); "
            "its lines end with CR only, save it with LF or CR LF",
        ),
        (f"a = {'[' * 3000}{']' * 3000}\n", "p.toml: file: is nested too deeply to be read"),
    ],
)
def test_a_file_that_is_not_toml_says_what_it_is(pipeline: Path, content: str, fault: str):
    pipeline.write_bytes(content.encode())
    assert faults(pipeline).splitlines()[1:] == [f"  {fault}"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('pipeline = "p"\nabout = "\u00e9"\n'.encode("latin-1"), "p.toml, line 2: file: expected UTF-8, found the byte 0xe9"),
        (PIPELINE.encode("utf-16"), "p.toml, line 1: file: expected UTF-8, found UTF-16"),
    ],
)
def test_a_file_in_another_encoding_is_refused_by_its_line(pipeline: Path, content: bytes, fault: str):
    pipeline.write_bytes(content)
    assert faults(pipeline).splitlines()[1:] == [f"  {fault}; save the file as UTF-8"]


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + PIPELINE.encode(), PIPELINE.replace("\n", "\r\n").encode()])
def test_a_byte_order_mark_and_windows_line_ends_are_read(pipeline: Path, content: bytes):
    pipeline.write_bytes(content)
    assert gptline("plan", str(pipeline)).exit_code == 0


def test_a_link_that_leads_nowhere_says_where_to(tmp_path: Path):
    (tmp_path / "p.toml").symlink_to("gone.toml")
    assert "file: there is no such file; it is a link to gone.toml, which does not exist" in faults(tmp_path / "p.toml")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('pipeline = "p"\n[stagse.documents]\nuses = "ingest"\n', "p.toml, line 2: stagse: unknown key; did you mean 'stages'?"),
        (
            f"{PIPELINE}[stages.documents.resource]\ncpus = 1\n",
            "p.toml, line 6: stages.documents.resource: unknown key; did you mean 'resources'?",
        ),
        (PIPELINE.replace("a.txt", "b.txt"), "p.toml, line 5: stages.documents.files: nothing matches 'b.txt' in "),
        (f'{PIPELINE}[store]\nroot = ""\n', "p.toml, line 7: store.root: expected a folder, on this machine or on storage that"),
        (f'{PIPELINE}[store]\nroot = "FILE"\n', "p.toml, line 7: store.root: expected a folder, or a name for a new one, found the file"),
        (
            f'{PIPELINE}[stages.tokenizer]\nalgorithm = "bytes"\ninputs = ["documents"]\n',
            "p.toml, line 8: stages.tokenizer.inputs: expected a table, such as inputs = { tokens = ['tokenize'] }, found ['documents']",
        ),
        (
            f'{PIPELINE}[stages.tokenizer]\nalgorithm = "bytes"\ninputs = {{ documents = 3 }}\n',
            "p.toml, line 8: stages.tokenizer.inputs.documents: expected a reference or a list of references, found 3",
        ),
        (
            f'{PIPELINE}[stages.export]\ninputs = {{ model = "pretrain" }}\n\n[stages.pretrain]\npreset = "gpt2-nano"\nsteps = 1\n'
            'global_batch_size = 1\nlr = 1e-3\ninputs = { tokens = "sha256:00000000", model = "pretrain" }\n',
            "p.toml, line 14: stages.pretrain.inputs: pretrain reads pretrain: a cycle; one of these inputs must come from elsewhere",
        ),
    ],
)
def test_a_fault_says_on_which_line_it_is(pipeline: Path, content: str, fault: str):
    pipeline.write_text(content.replace("FILE", str(pipeline)))
    assert faults(pipeline).splitlines()[1].startswith(f"  {fault}")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--set", "a.b.c=1"], "--set a.b.c=1: a: unknown key; known here: about, "),
        (["--set", "se\ned=1"], "--set se\\ned=1: unknown key; did you mean 'seed'?"),
        (
            ["--set", "stages.documnts=false"],
            "--set stages.documnts=false: there is no stage 'documnts' to drop; did you mean 'documents'?",
        ),
        (["--fresh", "documnts"], "--fresh documnts: there is no such stage; did you mean 'documents'?"),
        (["--until", "x"], "--until x: there is no such stage; the stages are documents"),
    ],
)
def test_a_fault_of_an_option_names_it_as_it_was_typed(pipeline: Path, options: list[str], fault: str):
    found = gptline("plan", str(pipeline), *options)
    (line,) = str(found.exception).splitlines()[1:]
    assert line.startswith(f"  {fault}")


def test_a_stage_that_reads_a_dropped_one_is_told_who_dropped_it(pipeline: Path):
    pipeline.write_text(f'{PIPELINE}[stages.tokenizer]\nalgorithm = "bytes"\ninputs = {{ documents = "documents" }}\n')
    (pipeline.parent / "v.toml").write_text('extends = "p.toml"\n[stages]\ndocuments = false\n')
    gone = "p.toml, line 8: stages.tokenizer.inputs.documents: there is no stage 'documents' any more, {} drops it"
    assert gone.format("v.toml, line 3") in faults(pipeline.parent / "v.toml")
    overridden = gptline("plan", str(pipeline), "--set", "stages.documents=false")
    assert gone.format("--set stages.documents=false") in str(overridden.exception)


@pytest.mark.parametrize(("name", "near"), [("Store", "store"), ("resource", "resources"), ("ingset", "ingest")])
def test_describe_suggests_kinds_and_tables(name: str, near: str):
    assert str(gptline("describe", name).exception) == f"there is no stage kind and no table {name!r}; did you mean {near!r}?"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["ui", "--port", "x"], "'--port': expected a whole number, found 'x'"),
        (["chat", "--tokens", "0"], "'--tokens': expected at least 1, found 0"),
        (["sample", "x", "--temperature", "nan"], "'--temperature': expected a number that is at least 0, found nan"),
        (["sample", "x", "--temperature", "-1"], "'--temperature': expected a number that is at least 0, found -1"),
        (["sample", "x", "--seed", "1.5"], "'--seed': expected a whole number, found '1.5'"),
    ],
)
def test_a_number_that_an_option_can_not_take_is_refused(arguments: list[str], fault: str):
    found = gptline(*arguments)
    assert (found.exit_code, fault in found.stderr) == (2, True)


def test_a_line_break_in_an_override_is_part_of_the_value(pipeline: Path):
    assert load(pipeline, ["about=one\ntwo = 2"]).file.about == "one\ntwo = 2"
    (fault,) = load(pipeline, ["seed=1\nabout = 2"]).faults or ["none"]
    assert str(fault) == "seed: expected a whole number, found '1\\nabout = 2'"
    assert load(pipeline, ["stages.documents.files=[\n'a.txt',\n]"]).file.stages["documents"]["files"] == ["a.txt"]


def test_the_home_folder_may_be_written_as_a_tilde(pipeline: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(pipeline.parent))
    loaded = load(pipeline, ["data=~/texts", "tracking.uri=sqlite:///~/mlflow.db"])
    assert loaded.data() == pipeline.parent / "texts"
    assert loaded.file.tracking.uri == f"sqlite:///{pipeline.parent}/mlflow.db"
    (pipeline.parent / "kept").mkdir()
    assert gptline("status", "--store", "~/kept").stdout == f"the store {pipeline.parent}/kept has no runs yet\n"


@pytest.mark.parametrize(
    "address", ["http://host/?token=abc", "https://host/path?a=1&api_key=abc", "http://me:hush@host", "http://host?access_token=abc"]
)
def test_a_secret_in_an_address_is_refused_since_configs_are_recorded(pipeline: Path, address: str):
    pipeline.write_text(f'{PIPELINE}\n[tracking]\nuri = "{address}"\n')
    assert "p.toml, line 8: tracking.uri: holds a password or a token in an address" in faults(pipeline)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StageFailure("there is no store"), 2, "there is no store"),
        (ConfigError("p.toml", []), 2, "p.toml: 0 faults; no stage was started."),
        (caused(ConfigError("p.toml", []), ConnectionRefusedError()), 3, "p.toml: 0 faults; no stage was started."),
        (OSError(28, "No space left on device", "/store/x"), 3, "can't continue: [Errno 28] No space left on device: '/store/x'"),
        (ConnectionError("nothing listens at http://127.0.0.1:1"), 3, "can't continue: nothing listens at http://127.0.0.1:1"),
        (KeyboardInterrupt(), 130, "interrupted before any stage was started"),
    ],
)
def test_the_exit_code_says_what_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
):
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert (exited.value.code, capsys.readouterr().err) == (code, f"{message}\n")


def test_a_sync_that_cannot_deliver_exits_with_3(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.backend.put("runs/r1/run.json", b'{"run": "r1", "tracking": {"uri": "http://127.0.0.1:1"}}')
    journal = JournalWriter(store, "r1")
    journal.write(RunStarted(run="r1", pipeline="p"))
    journal.write(RunEnded(status="FINISHED", exit_code=0))
    monkeypatch.setattr("pipelines.observe.delivery.unreachable", lambda uri: "connection refused")
    found = gptline("sync", "--store", str(store.root))
    assert "MLflow http://127.0.0.1:1" in found.stdout
    assert found.exit_code == 3


def test_a_closed_pipe_ends_the_program_quietly(tmp_path: Path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "pipelines.cli", "describe"]
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("words", "streams", "code"),
    [
        ("plan p.toml", ">&-", 0),
        ("plan p.toml", "<&- >&- 2>&-", 0),
        ("plan no.toml", ">&-", 2),
        ("plan no.toml", "2>&-", 2),
        ("plan no.toml", "2>/dev/full", 2),
        ("describe", ">/dev/full", 3),
        ("--version", ">&-", 0),
    ],
)
def test_a_stream_that_is_closed_or_full_changes_no_exit_code_that_says_more(pipeline: Path, words: str, streams: str, code: int):
    found = subprocess.run(
        f"exec {sys.executable} -m pipelines.cli {words} {streams}",
        shell=True,
        cwd=pipeline.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert (found.returncode, b"Traceback" in found.stderr) == (code, False)


@pytest.mark.parametrize("environment", [{"LANG": "C", "LC_ALL": "C"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_a_plan_is_plain_text_whatever_the_terminal_can(pipeline: Path, environment: dict[str, str]):
    found = program("plan", "p.toml", folder=pipeline.parent, **environment)
    assert (found.returncode, found.stderr) == (0, b"")
    assert found.stdout == b"documents  run  not built here before\n\n1 of 1 stages to run, duration unknown\n"


def test_a_terminal_without_utf8_shows_what_it_can(pipeline: Path):
    pipeline.write_text(PIPELINE.replace('pipeline = "p"', 'pipeline = "p"\nabout = "月"'))
    found = program("plan", "p.toml", "--config", folder=pipeline.parent, PYTHONIOENCODING="ascii")
    assert found.returncode == 0
    assert b'about = "\\u6708"\n' in found.stdout


def test_a_terminal_without_lines_draws_trees_in_ascii(monkeypatch: pytest.MonkeyPatch):
    for encoding, expected in (("ascii", "|  +- a\n`- b\n"), ("utf-8", "│  ├─ a\n└─ b\n")):
        out = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", out)
        write("│  ├─ a\n└─ b\n")
        assert out.buffer.getvalue().decode(encoding) == expected  # type: ignore[attr-defined]


def test_ctrl_backslash_ends_the_program_with_the_cursor_shown(tmp_path: Path):
    script = "import sys, pipelines.cli as c\nc.app = lambda **_: (print('ready', flush=True), sys.stdin.read())\nc.main()\n"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", script])
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1024)
    os.write(terminal, b"\x1c")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGQUIT
    shown += os.read(terminal, 1024)
    os.close(terminal)
    assert shown.endswith(b"\x1b[?25h")


def test_the_resolved_pipeline_says_where_to_save_it_if_that_is_not_here(pipeline: Path, monkeypatch: pytest.MonkeyPatch):
    assert gptline("plan", str(pipeline), "--config").stderr == (
        f"save it in {pipeline.parent}: its `data` and its functions are relative to that folder\n"
    )
    monkeypatch.chdir(pipeline.parent)
    assert gptline("plan", "p.toml", "--config").stderr == ""


def test_the_printed_resolved_pipeline_has_the_same_plan(pipeline: Path):
    printed = gptline("plan", str(pipeline), "--config", "--set", "seed=5")
    (pipeline.parent / "printed.toml").write_text(printed.stdout)
    again = load(pipeline.parent / "printed.toml")
    assert again.file.seed == 5
    assert again.file.stages["documents"]["min_chars"] == 1
    assert gptline("plan", str(pipeline.parent / "printed.toml")).exit_code == 0
