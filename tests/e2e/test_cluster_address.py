"""A run that joins an existing cluster, which stands in for one on other machines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.slow

TOML = """
pipeline = "elsewhere"
[cluster]
address = "127.0.0.1:{port}"

[stages.documents]
uses = "ingest"
source = "text"
unit = "line"
files = ["*.txt"]
hold_out = {{ share = 0.2, by = "record" }}

[stages.tokenizer]
algorithm = "bytes"
inputs = {{ documents = "documents" }}

[stages.tokenize]
inputs = {{ documents = "documents", tokenizer = "tokenizer" }}

[stages.pretrain]
inputs = {{ tokens = "tokenize" }}
preset = "gpt2-nano"
engine = "torch"
steps = 4
global_batch_size = 4
lr = 1e-3
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, ray_head: Callable[..., Any], free_ports: Callable[[int], list[int]]) -> Iterator[int]:
    """The port of a head node that requires no token."""
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("head") / "log"
    with ray_head(log, {"RAY_AUTH_MODE": "disabled"}, f"--port={port}", "--include-dashboard=false"):
        yield port


@pytest.fixture
def program(new_program: Callable[..., Any], head: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    made = new_program()
    (made.folder / "a.txt").write_text("".join(f"line {n} of a text that repeats itself\n" for n in range(200)))
    (made.folder / "there.toml").write_text(TOML.format(port=head))
    return made


def test_an_address_in_the_config_runs_the_pipeline_on_that_cluster(program: Any):
    output = program.run("run", "there.toml")
    assert "joining the Ray cluster 127.0.0.1:" in output
    assert "4 made" in output


def test_a_stage_that_the_cluster_can_never_hold_is_refused_at_once(program: Any):
    output = program.run("run", "there.toml", "--set", "stages.pretrain.resources.ranks=4", code=2)
    assert "stages.pretrain.resources: pretrain asks for 4 ranks" in output
    assert "room for only 2 of them" in output
    assert not program.store.runs()


def test_an_address_where_nothing_listens_is_a_fault_of_the_config(program: Any):
    output = program.run("run", "there.toml", "--set", "cluster.address=127.0.0.1:1", code=3)
    assert "--set cluster.address=127.0.0.1:1: '127.0.0.1:1' can't be joined" in output


def test_an_unknown_host_is_a_fault_of_the_config(program: Any):
    output = program.run("run", "there.toml", "--set", "cluster.address=no-such-host.invalid:6379", code=3)
    assert "'no-such-host.invalid:6379' can't be joined: [Errno -" in output
