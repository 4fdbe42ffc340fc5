"""Write a row's JSON file, with what every row records besides its numbers: hardware, versions and date."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
FIELDS = ("row", "peer", "ratio", "goal", "unit", "ours", "theirs", "hardware", "versions", "date")


def hardware(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"cpu": _cpu_model(), "cores": os.cpu_count()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("deepspeed", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def result(row: str, *, unit: str, device: torch.device, **values: Any) -> dict[str, Any]:
    """Return a row with all of `FIELDS`. A `ratio` over 1 is better for us; without a peer or a goal these fields are None."""
    fixed = {"row": row, "unit": unit, "hardware": hardware(device), "versions": versions(), "date": datetime.now(UTC).date().isoformat()}
    return dict.fromkeys(FIELDS) | values | fixed


def write(folder: Path, row: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row['row']}.json"
    path.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    return path


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
