"""What `gptline doctor` finds on this machine, and how it reports a fault."""

from __future__ import annotations

import os
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from pipelines.observe.doctor import Finding, _python_path, _ray_folder, _shared_memory, examine
from pipelines.store.store import Store


@pytest.mark.slow
def test_the_doctor_finds_this_installation_sound(store: Store):
    findings = examine(store)
    assert [str(each) for each in findings if each.wrong] == []
    assert {"python", "packages", "gpu", "deepspeed", "ray", "mlflow", "disk"} <= {each.about for each in findings}


def test_a_fault_is_reported_with_what_to_do():
    assert str(Finding("disk", "1 GiB free", "make room")) == "!!  disk        1 GiB free\n                make room"


@pytest.mark.parametrize(("length", "spare"), [(39, 0), (40, -1), (95, -56)])
def test_a_temporary_folder_too_deep_for_rays_sockets_is_a_fault(length: int, spare: int):
    # below it Ray makes /ray/session_2026-01-31_12-00-00_000000_4194304/sockets/plasma_store, 68 characters of a socket's 107
    finding = _ray_folder("/" + "t" * (length - 1))
    assert finding.wrong == (spare < 0)
    assert f"of up to {length + 68} characters" in finding.what
    assert spare == 0 or f"{-spare} characters shorter" in finding.advice


def test_shared_memory_that_cannot_be_written_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))  # root may write everywhere
    assert _shared_memory(tmp_path).advice.startswith("Ray needs to write there")


def test_missing_shared_memory_is_a_fault(tmp_path: Path):
    assert str(_shared_memory(tmp_path / "shm")).startswith(f"!!  {tmp_path}/shm")


def test_a_ray_found_only_through_pythonpath_is_a_fault_since_workers_do_not_get_it(tmp_path: Path):
    ray = ModuleSpec("ray", None, origin=str(tmp_path / "ray" / "__init__.py"))
    assert _python_path(str(tmp_path), ray).advice == f"ray is imported from {tmp_path}: install it into this Python"
    assert not _python_path(str(tmp_path / "other"), ray).wrong


def test_a_virtual_environment_inside_a_folder_of_the_python_path_is_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.prefix", str(tmp_path / ".venv"))
    ray = ModuleSpec("ray", None, origin=str(tmp_path / ".venv" / "lib" / "ray" / "__init__.py"))
    assert not _python_path(str(tmp_path), ray).wrong
