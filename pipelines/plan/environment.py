"""What the code runs in: the folder of our packages, the versions that decide results, the git state."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The folder that holds our packages."""

TRACKED = ("torch", "deepspeed", "ray", "mlflow", "tokenizers", "safetensors", "numpy", "pyarrow")
"""The libraries whose versions are recorded, and are in every key when strict_environment = true."""


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the interpreter and of the libraries that decide results."""
    found = {"python": platform.python_version()}
    for name in TRACKED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def git_state() -> dict[str, Any] | None:
    """The clone's commit and branch, and whether its tree has changes; None outside a clone."""
    try:
        commit, branch, changes = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["rev-parse", "--abbrev-ref", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "branch": branch, "dirty": bool(changes)}
