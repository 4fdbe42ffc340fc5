"""The options that several verbs of `gptline` share, and the checks of their values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from pipelines.plan.config import TrackingConfig
from pipelines.plan.faults import validate
from pipelines.stage import StageFailure


def _mlflow_address(uri: str | None) -> str | None:
    """Check an address as a pipeline file's is checked."""
    if uri is None:
        return None
    checked, faults = validate(TrackingConfig, {"uri": uri}, "")
    for fault in faults:
        raise StageFailure(f"--tracking: {fault.what}")
    return checked.uri if checked else uri


def whole_number(text: str | int) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"expected a whole number, found {text!r}") from None


def port_number(text: str | int) -> int:
    port = whole_number(text)
    if not 0 < port < 2**16:
        raise typer.BadParameter(f"expected a port from 1 to 65535, found {port}")
    return port


def token_count(text: str | int) -> int:
    count = whole_number(text)
    if count < 1:
        raise typer.BadParameter(f"expected at least 1, found {count}")
    return count


def sampling_temperature(text: str | float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise typer.BadParameter(f"expected a number that is at least 0, found {text}")
    return value


def utf8_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"expected UTF-8, found {text!a}") from error
    return text


Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A pipeline file, such as configs/quickstart.toml.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="K=V", help="Override one setting: stages.pretrain.lr=3e-4. May be repeated.")
]
Use = Annotated[
    list[str] | None, typer.Option("--use", metavar="STAGE=REF", help="Use this artifact as a stage's output. May be repeated.")
]
Until = Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Run only this stage and what it needs.")]
Fresh = Annotated[
    list[str] | None, typer.Option("--fresh", metavar="STAGE", help="Rebuild this stage, even if its output exists. May be repeated.")
]
Inline = Annotated[bool, typer.Option("--inline", help="Run in this process, with one rank and plain torch: for a debugger.")]
RunId = Annotated[str | None, typer.Argument(metavar="RUN", help="A run's id.", show_default=False)]
Root = Annotated[Path, typer.Option("--store", metavar="DIR", help="The store's folder.")]
Uri = Annotated[
    str | None,
    typer.Option("--tracking", metavar="URI", callback=_mlflow_address, help="Use this MLflow instead of each run's own: sqlite or a URL."),
]
