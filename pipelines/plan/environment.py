"""What a run happens in: versions of the interpreter and of the libraries that decide results, and the state of the git clone."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from typing import Any

from pipelines.plan.graph import ROOT

TRACKED = ("torch", "deepspeed", "ray", "mlflow", "tokenizers", "safetensors", "numpy", "datasets")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the interpreter and of the libraries that decide results."""
    found = {"python": platform.python_version()}
    for name in TRACKED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def git_state() -> dict[str, Any] | None:
    """Commit, branch and whether the tree has changes; None outside a clone."""
    try:
        answers = [
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=5, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["rev-parse", "--abbrev-ref", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": answers[0], "branch": answers[1], "dirty": bool(answers[2])}
