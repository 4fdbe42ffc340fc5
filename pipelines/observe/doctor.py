"""Check this machine, for `gptline doctor`: one line per finding, and for each fault what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

from pipelines.plan.environment import ROOT
from pipelines.store.store import Store

MIN_FREE_GIB = 5
MIN_SHARED_MEMORY_GIB = 0.5
SHARED_MEMORY = Path("/dev/shm")
MAX_SOCKET_PATH = 107
"""The longest path of a Unix socket, in bytes."""
RAY_SOCKET = "ray/session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store"
"""The longest path that Ray makes below its temporary folder, with the largest process id of Linux."""


@dataclass(frozen=True)
class Finding:
    """`Finding("disk", "80 GiB free in .gptline")`; a finding with `advice` is a fault."""

    about: str
    what: str
    advice: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.advice)

    def __str__(self) -> str:
        return f"{'!!' if self.wrong else 'ok'}  {self.about:<12}{self.what}" + (f"\n    {'':<12}{self.advice}" if self.wrong else "")


def examine(store: Store) -> list[Finding]:
    """Check everything. It takes some seconds, since it imports torch, ray, deepspeed and mlflow."""
    return [*_python(), *_packages(), *_machine(), *_torch(), *_imports(), *_ray(), *_mlflow(store), *_disk(store)]


def gptline_version() -> str:
    """The installed version, or the clone's where it runs from a folder on PYTHONPATH."""
    try:
        return importlib.metadata.version("gptline")
    except importlib.metadata.PackageNotFoundError:
        return str(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])


def _python() -> Iterator[Finding]:
    yield Finding("gptline", gptline_version())
    advice = "" if sys.version_info >= (3, 11) else "gptline needs Python 3.11 or newer"
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}", advice)


def _packages() -> Iterator[Finding]:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wrong = []
    for name in ("torch", "ray", "deepspeed", "mlflow", "tokenizers", "transformers", "pyarrow", "pydantic", "numpy"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found.split("+")[0] != pins.get(name):
            wrong.append(f"{name}: expected {pins.get(name)}, found {found}")
    yield Finding("packages", ", ".join(wrong) or "as constraints.txt pins them", "run `make install`" if wrong else "")


def _machine() -> Iterator[Finding]:
    cpus = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("machine", f"{cpus} CPUs, {memory_gib:.0f} GiB of memory")
    yield _shared_memory(SHARED_MEMORY)


def _shared_memory(folder: Path) -> Finding:
    """Ray keeps objects there; without it no run can start."""
    if not folder.is_dir():
        return Finding(str(folder), "missing", "Ray needs it: mount a tmpfs there")
    if not os.access(folder, os.W_OK):
        return Finding(str(folder), "can't be written", "Ray needs to write there: mount it read-write, with mode 1777")
    shared_gib = shutil.disk_usage(folder).total / 2**30
    low = shared_gib < MIN_SHARED_MEMORY_GIB
    advice = f"Ray needs at least {MIN_SHARED_MEMORY_GIB} GiB; start a container with --shm-size=2g" if low else ""
    return Finding(str(folder), f"{shared_gib:.1f} GiB", advice)


def _torch() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", f"torch {torch.__version__} finds none; training runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding("gpu", f"{index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")


def _imports() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("deepspeed", "ray", "mlflow"):
        try:
            importlib.import_module(name)
        except Exception as error:
            yield Finding(name, f"can't be imported: {type(error).__name__}: {error}", "run `make install` again")
        else:
            yield Finding(name, importlib.metadata.version(name))


def _ray() -> Iterator[Finding]:
    address = os.environ.get("RAY_ADDRESS")
    if address:
        yield Finding("ray address", f"RAY_ADDRESS = {address}", "it can override the address in a pipeline file; unset it")
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    yield Finding("ray auth", f"RAY_AUTH_MODE is {mode}; a local run listens on 127.0.0.1 with its own secret")
    yield _ray_folder(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if path := os.environ.get("PYTHONPATH"):
        yield _python_path(path, importlib.util.find_spec("ray"))


def _ray_folder(folder: str) -> Finding:
    """Ray puts its sockets below the temporary folder, and a socket's path is short."""
    length = len(os.fsencode(os.path.join(folder, RAY_SOCKET)))
    found = f"Ray's sockets below {folder} have paths of up to {length} characters; a socket takes {MAX_SOCKET_PATH}"
    spare = MAX_SOCKET_PATH - length
    advice = f"set TMPDIR to a folder whose path is {-spare} characters shorter, such as /tmp" if spare < 0 else ""
    return Finding("ray folder", found, advice)


def _python_path(path: str, ray: ModuleSpec | None) -> Finding:
    """Workers get a PYTHONPATH of their own, the run's code: what is found only through this one is not found there."""
    origin = Path(ray.origin or "") if ray else None
    own = origin is not None and origin.is_relative_to(sys.prefix)  # a virtual environment may lie in a folder of the path
    through = [each for each in path.split(os.pathsep) if each and origin and not own and origin.is_relative_to(Path(each).resolve())]
    found = f"PYTHONPATH = {path}; workers get the run's code in its place"
    return Finding("python path", found, f"ray is imported from {through[0]}: install it into this Python" if through else "")


def _mlflow(store: Store) -> Iterator[Finding]:
    database = store.machine_file("mlflow.db")
    yield Finding(
        "mlflow",
        f"{database}, {database.stat().st_size / 2**20:.1f} MiB" if database.exists() else "no database yet; the first run creates it",
    )
    from pipelines.store.journal import dead_runs

    dead = dead_runs(store)
    advice = "`gptline sync` ends them" if dead else ""
    yield Finding("runs", f"{len(store.runs())} in {store}" + (f", {len(dead)} whose driver is gone" if dead else ""), advice)


def _disk(store: Store) -> Iterator[Finding]:
    folder = next(each for each in (store.root.resolve(), *store.root.resolve().parents) if each.exists())
    free_gib = shutil.disk_usage(folder).free / 2**30
    advice = f"free some: checkpoints need space, {MIN_FREE_GIB} GiB are little" if free_gib < MIN_FREE_GIB else ""
    yield Finding("disk", f"{free_gib:.0f} GiB free in {folder}", advice)
    if not os.access(folder, os.W_OK):
        yield Finding("store", f"{folder} can't be written", "choose another folder with store.root")
