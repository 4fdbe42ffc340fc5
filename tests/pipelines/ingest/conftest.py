"""The part of StageContext that ingest uses, and a fixture that runs ingest."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import pytest

from pipelines.artifacts import Documents
from pipelines.stage import Source
from pipelines.stages.ingest import IngestConfig, ingest


@dataclass
class FakeStage:
    output: Path
    sources: list[Source]
    seed: int = 1
    reported: list[tuple[int, int, str]] = field(default_factory=list)

    def open(self, source: Source) -> BinaryIO:
        return source.path.open("rb")

    def progress(self, done: int, total: int, unit: str) -> None:
        self.reported.append((done, total, unit))

    def publish(self, kind: type[Documents], **metadata: Any) -> Documents:
        return kind(self.output, "0" * 64, json.loads(json.dumps(metadata)))


@dataclass
class Ingested:
    documents: Documents
    stage: FakeStage

    def texts(self, split: str = "train") -> list[str]:
        return list(self.documents.texts(split))

    def metadata(self, key: str) -> Any:
        return self.documents.metadata[key]

    def rejects(self) -> list[dict[str, Any]]:
        return rejects(self.stage.output)


def rejects(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]


def write_damaged_parquet(path: Path, columns: Any, damaged: str) -> None:
    """Write a table with a column whose pages are overwritten; the footer and the other columns are sound."""
    table = pyarrow.table(columns)
    table = table.append_column(damaged, pyarrow.array(["x" * 50] * len(table)))
    pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(0)
    begin = next(
        group.column(index).data_page_offset for index in range(group.num_columns) if group.column(index).path_in_schema == damaged
    )
    content[begin : begin + 20] = b"\xff" * 20
    path.write_bytes(content)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


@pytest.fixture
def ingested(data: Path, output: Path) -> Callable[..., Ingested]:
    """Write files into the data folder and run ingest over them."""

    def run(contents: dict[str, bytes], /, *, seed: int = 1, **settings: Any) -> Ingested:
        for name, content in contents.items():
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_bytes(content)
        if "mixture" not in settings:
            settings.setdefault("files", list(contents))
        config = IngestConfig(**settings)
        stage = FakeStage(output, config.sources(data), seed)
        return Ingested(ingest(config, stage), stage)

    return run
