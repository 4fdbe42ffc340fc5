"""What is here and what is wrong, for `gptline doctor`: each finding one line, each fault with what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.plan.environment import ROOT
from pipelines.store.store import Store

MIN_FREE_GIB = 5
MIN_SHARED_MEMORY_GIB = 0.5


@dataclass(frozen=True)
class Finding:
    """`Finding("disk", "80 GiB free in .gptline")`; `advice` makes a fault of it."""

    about: str
    what: str
    advice: str = ""

    @property
    def wrong(self) -> bool:
        return bool(self.advice)

    def __str__(self) -> str:
        return f"{'!!' if self.wrong else 'ok'}  {self.about:<12}{self.what}" + (f"\n    {'':<12}{self.advice}" if self.wrong else "")


def examine(store: Store) -> list[Finding]:
    """Look at everything; takes some seconds, since it really imports torch, ray, deepspeed and mlflow."""
    return [*_python(), *_packages(), *_machine(), *_torch(), *_imports(), *_ray(), *_mlflow(store), *_disk(store)]


def _python() -> Iterator[Finding]:
    yield Finding("gptline", importlib.metadata.version("gptline"))
    advice = "" if sys.version_info >= (3, 11) else "gptline needs Python 3.11 or newer"
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}", advice)


def _packages() -> Iterator[Finding]:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    wrong = []
    for name in ("torch", "ray", "deepspeed", "mlflow", "tokenizers", "transformers", "datasets", "pydantic", "numpy"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found.split("+")[0] != pins.get(name):
            wrong.append(f"{name} {found} instead of {pins.get(name)}")
    yield Finding("packages", ", ".join(wrong) or "as constraints.txt pins them", "run `make install`" if wrong else "")


def _machine() -> Iterator[Finding]:
    cpus = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("machine", f"{cpus} CPUs, {memory_gib:.0f} GiB of memory")
    shared_gib = shutil.disk_usage("/dev/shm").total / 2**30
    low = shared_gib < MIN_SHARED_MEMORY_GIB
    advice = f"Ray wants at least {MIN_SHARED_MEMORY_GIB} GiB; in a container start it with --shm-size=2g" if low else ""
    yield Finding("/dev/shm", f"{shared_gib:.1f} GiB", advice)


def _torch() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("gpu", f"none that torch {torch.__version__} can use; training runs on the CPU")
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
        yield Finding("ray address", f"RAY_ADDRESS = {address}", "it can override the address that a config names; unset it")
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    yield Finding("ray auth", f"RAY_AUTH_MODE is {mode}; a local run listens on 127.0.0.1 with a secret of its own")


def _mlflow(store: Store) -> Iterator[Finding]:
    database = store.machine_file("mlflow.db")
    yield Finding(
        "mlflow",
        f"{database}, {database.stat().st_size / 2**20:.1f} MiB" if database.exists() else "no database yet; the first run makes it",
    )
    from pipelines.store.journal import dead_runs

    dead = dead_runs(store)
    advice = "`gptline sync` ends them" if dead else ""
    yield Finding("runs", f"{len(store.runs())} in {store}" + (f", {len(dead)} whose driver is gone" if dead else ""), advice)


def _disk(store: Store) -> Iterator[Finding]:
    place = next(each for each in (store.root.resolve(), *store.root.resolve().parents) if each.exists())
    free_gib = shutil.disk_usage(place).free / 2**30
    yield Finding("disk", f"{free_gib:.0f} GiB free in {place}", "make room: checkpoints need some" if free_gib < MIN_FREE_GIB else "")
    if not os.access(place, os.W_OK):
        yield Finding("store", f"{place} can't be written", "choose another with store.root")
