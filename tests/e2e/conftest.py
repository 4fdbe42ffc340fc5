"""Run the program as people do: `gptline` in a process of its own, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.store.action import Action
from pipelines.store.events import JournalEvent, Note, StageEnded
from pipelines.store.journal import read_journal
from pipelines.store.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("gptline")
LONGEST_S = 900
"""The limit for one command: several times what it needs on an idle machine of two cores."""


class Program:
    """`gptline` in a folder that has a store: `program.run("run", "small.toml")`."""

    def __init__(self, folder: Path, code: Path | None = None) -> None:
        """`code` is a copy of the packages to run instead of the installed ones."""
        self.folder = folder
        self.store = Store(folder / ".gptline")
        self._code = code
        self._started: list[subprocess.Popen[str]] = []

    def run(self, *words: str, code: int = 0, typed: str | None = None) -> str:
        """Return what it printed to stdout and stderr; it must exit with `code`. `typed` is piped to stdin."""
        return self.finish(self.start(*words, piped=typed is not None), code, typed)

    def start(self, *words: str, piped: bool = False) -> subprocess.Popen[str]:
        """Start it in a session of its own, so that a signal to its process group reaches only what it started."""
        command = [str(PROGRAM), *words] if self._code is None else [sys.executable, "-c", _MAIN, *words]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def finish(self, process: subprocess.Popen[str], code: int = 0, typed: str | None = None) -> str:
        output, _ = process.communicate(typed, timeout=LONGEST_S)
        assert process.returncode == code, f"expected exit code {code}, found {process.returncode}:\n{output}"
        return output

    def last_run(self) -> str:
        return self.store.runs()[-1]

    def events(self, run: str | None = None) -> list[JournalEvent]:
        return read_journal(self.store, run or self.last_run())

    def ended(self, run: str | None = None) -> dict[str, StageEnded]:
        """How each stage ended in `run`, by default the newest run."""
        return {event.stage: event for event in self.events(run) if isinstance(event, StageEnded)}

    def status(self, run: str | None = None) -> dict[str, str]:
        return {stage: event.status for stage, event in self.ended(run).items()}

    def notes(self, run: str | None = None) -> list[str]:
        return [event.text for event in self.events(run) if isinstance(event, Note)]

    def waits_for(self, run: str) -> bool:
        """Whether the newest run has reported that it is waiting for `run`."""
        return any(note.startswith("waiting for") and run in note for note in self.notes())

    def outputs(self, run: str | None = None) -> dict[str, str]:
        return {stage: event.output for stage, event in self.ended(run).items() if event.output}

    def action(self, stage: str, run: str | None = None) -> Action:
        """The action that made, or whose output was reused as, the output of a stage."""
        event = self.ended(run)[stage]
        assert event.number is not None
        return self.store.action(event.key, event.number)

    def plan(self, *words: str) -> dict[str, tuple[str, str]]:
        """Each stage's decision and reason; notes are added to the reason."""
        output = self.run("plan", *words).partition("\n\n")[0]
        plan: dict[str, tuple[str, str]] = {}
        for line in output.splitlines():
            if line.startswith(" "):
                stage = list(plan)[-1]
                plan[stage] = (plan[stage][0], f"{plan[stage][1]}; {line.strip()}")
            else:
                stage, decision, reason = line.split(maxsplit=2)
                plan[stage] = (decision, reason)
        return plan

    def end_all(self) -> None:
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()  # without reading the rest: a process that left the group may hold the pipe open

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("GPTLINE_", "MLFLOW_"))}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
        if self._code is not None:
            environment["PYTHONPATH"] = str(self._code)
        return environment


_MAIN = "import pipelines.cli as c, os, sys; assert c.__file__.startswith(os.environ['PYTHONPATH']); sys.argv[0] = 'gptline'; c.main()"


@pytest.fixture(scope="session")
def new_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Program]]:
    """Make a program in a new folder; whatever it leaves running is killed after the tests."""
    made: list[Program] = []

    def make(code: Path | None = None, like: Program | None = None) -> Program:
        """`like` is a program whose folder is copied."""
        folder = tmp_path_factory.mktemp("program")
        if like is not None:
            # the process that delivers a run to MLflow may still be removing its log, long after the run ended
            shutil.copytree(like.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("tracking-*.log", "*.tmp-*"))
        program = Program(folder, code)
        made.append(program)
        return program

    yield make
    for program in made:
        program.end_all()


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of full data sets if GPTLINE_DATA names one, else of a few lines of each."""
    given = os.environ.get("GPTLINE_DATA")
    return Path(given) if given else REPOSITORY / "tests" / "fixtures" / "data"


@pytest.fixture(scope="session")
def configs() -> Path:
    return REPOSITORY / "configs"


@pytest.fixture(scope="module")
def copied_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages that a test may edit."""
    folder = tmp_path_factory.mktemp("code")
    for package in ("pipelines", "gpt", "cluster"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., None]:
    def wait(condition: Callable[[], object], what: str, process: subprocess.Popen[str] | None = None) -> None:
        """Wait until `condition()` holds; fail if `process` ends first."""
        until_s = time.monotonic() + LONGEST_S
        while not condition():
            if process is not None and process.poll() is not None:
                pytest.fail(f"exited with {process.returncode} before {what}:\n{process.communicate()[0]}")
            if time.monotonic() > until_s:
                pytest.fail(f"waited {LONGEST_S} s for {what}")
            time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def gone() -> Callable[[int], bool]:
    def is_gone(pid: int) -> bool:
        """Whether the process no longer exists, or is a zombie."""
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
        except OSError:
            return True

    return is_gone


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], list[int]]:
    """Find ports outside the kernel's ephemeral range, which nothing else takes in the seconds before Ray does."""

    def find(count: int) -> list[int]:
        ports: set[int] = set()
        while len(ports) < count:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
                ports.add(probe.getsockname()[1])
        return list(ports)

    return find


@pytest.fixture(scope="session")
def ray_head(wait_for: Callable[..., None]) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with ray_head(log, environment, "--port=6379"):` a head node with two CPUs, on the loopback interface."""

    @contextlib.contextmanager
    def head(log: Path, environment: dict[str, str], *words: str) -> Iterator[None]:
        command = [str(PROGRAM.with_name("ray")), "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--num-cpus=2", *words]
        environment = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", **environment}
        for _ in range(2):  # Ray gives up if its processes take more than 30 s to start
            with open(log, "w") as output:
                process = subprocess.Popen(command, env=os.environ | environment, stdout=output, stderr=output, start_new_session=True)
            wait_for(lambda started=process: started.poll() is not None or "block forever" in log.read_text(), "the head is up")
            if process.poll() is None:
                break
        assert process.poll() is None, log.read_text()
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)

    return head


SMALL = """
pipeline = "small"
seed = 3

[tracking]
uri = "http://127.0.0.1:1"

[stages.documents]
uses = "ingest"
source = "text"
unit = "line"
files = ["lines.txt"]
hold_out = { share = 0.2, by = "record" }

[stages.tokenizer]
inputs = { documents = "documents" }
algorithm = "bytes"

[stages.tokenize]
inputs = { documents = "documents", tokenizer = "tokenizer" }

[stages.pretrain]
uses = "./faulty.py:pretrain"
inputs = { tokens = "tokenize" }
preset = "gpt2-nano"
dropout = 0.1
steps = 30
global_batch_size = 4
lr = 1e-3
warmup_steps = 5
log_every = 1
eval_every = 10
checkpoint_every = 5
"""


@pytest.fixture(scope="session")
def small(new_program: Callable[..., Program]) -> Program:
    """A tiny pipeline, `small.toml`, run up to its tokens; its `pretrain` fails on demand (`faulty.py`).

    Its tracking address has no server: importing MLflow takes longer than a stage, and a database can't be copied while it is
    being created.
    """
    program = new_program()
    (program.folder / "small.toml").write_text(SMALL)
    shutil.copyfile(Path(__file__).with_name("faulty.py"), program.folder / "faulty.py")
    lines = [f"{number} times {number} is {number * number}, and {number} more is {number * (number + 1)}" for number in range(300)]
    (program.folder / "lines.txt").write_text("\n".join(lines) + "\n")
    program.run("run", "small.toml", "--inline", "--until", "tokenize")
    return program


@pytest.fixture(scope="session")
def one_rank_undisturbed(small: Program, new_program: Callable[..., Program]) -> Program:
    """The pipeline `small.toml` run without faults: one rank under DeepSpeed."""
    program = new_program(like=small)
    program.run("run", "small.toml")
    return program


@pytest.fixture(scope="session")
def read_json() -> Callable[[Path], Any]:
    return lambda path: json.loads(path.read_text(encoding="utf-8"))
