from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.stage import StageFailure
from pipelines.store.action import Action
from pipelines.store.backend import FolderBackend
from pipelines.store.processes import boot_id, pid_namespace
from pipelines.store.store import Store


def folder(store: Store, **files: str) -> Path:
    path = store.new_folder()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def action(**changes: object) -> Action:
    fields: dict[str, object] = dict(
        key="k" * 64, pipeline="p", stage="s", kind="ingest", run="r", leaves={}, inputs={}, output="0" * 64, output_kind="documents"
    )
    return Action.model_validate(fields | dict(started_ms=1, seconds=2.0, host="h", user="u", pid=3) | changes)


def test_the_same_bytes_are_one_artifact_wherever_they_were_written(store: Store):
    one = store.publish(folder(store, a="x", b="y"), "documents", {"documents": 2})
    two = store.publish(folder(store, b="y", a="x"), "documents", {"documents": 2})
    assert one.digest == two.digest
    assert len(store.digests()) == 1
    assert (one.path / "a").read_text() == "x"


def test_different_bytes_metadata_names_or_types_are_different_artifacts(store: Store):
    made = [
        store.publish(folder(store, a="x"), "documents", {}),
        store.publish(folder(store, a="z"), "documents", {}),
        store.publish(folder(store, c="x"), "documents", {}),
        store.publish(folder(store, a="x"), "documents", {"n": 1}),
        store.publish(folder(store, a="x"), "tokens", {}),
    ]
    assert len({each.digest for each in made}) == 5


def test_a_missing_or_shortened_file_prevents_reuse_and_verify_finds_a_changed_byte(store: Store):
    made = store.publish(folder(store, a="abc"), "documents", {})
    assert store.damage(made.digest) is None
    (made.path / "a").write_text("abd")
    assert store.damage(made.digest) is None  # sizes only
    assert "sha256" in store.verify(made.digest)[0]
    (made.path / "a").write_text("ab")
    assert store.damage(made.digest) == f"its artifact {made.digest[:12]} is damaged: a has 2 bytes, expected 3"
    (made.path / "a").unlink()
    assert "a is gone" in str(store.damage(made.digest))


def test_publishing_the_same_files_again_repairs_a_damaged_artifact(store: Store):
    made = store.publish(folder(store, a="abc", b="d"), "documents", {})
    (made.path / "a").write_text("ab")
    (made.path / "b").unlink()
    store.publish(folder(store, a="abc", b="d"), "documents", {})
    assert store.verify(made.digest) == []


@pytest.mark.parametrize("name", ["manifest.json", "train.jsonl.tmp-1"])
def test_a_file_name_that_readers_skip_is_refused(store: Store, name: str):
    with pytest.raises(StageFailure, match=rf"{name} has .*; rename the file"):
        store.publish(folder(store, a="abc", **{name: "{}"}), "documents", {})
    assert store.digests() == []


def test_an_unknown_artifact_is_reported_as_not_in_the_store(store: Store):
    with pytest.raises(StageFailure, match="is not in the store"):
        store.artifact("f" * 64)


def test_exactly_one_of_64_writers_of_one_name_wins(store: Store):
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: store.backend.put_if_absent("a/b", str(n).encode()), range(64)))
    assert won.count(True) == 1
    assert store.backend.get("a/b") == str(won.index(True)).encode()


def test_actions_under_a_key_are_numbered_from_1_without_gaps(store: Store):
    with ThreadPoolExecutor(8) as pool:
        numbers = [each.number for each in pool.map(lambda n: store.record(action(pid=n)), range(20))]
    assert sorted(numbers) == list(range(1, 21))
    assert store.action_numbers("k" * 64) == list(range(1, 21))


def test_a_record_of_another_version_is_read(store: Store):
    store.backend.put(f"actions/{'k' * 64}/000001.json", action(schema=2).model_dump_json()[:-1].encode() + b',"carbon_g":3.5}')
    store.backend.put(f"actions/{'k' * 64}/000002.json", action().model_dump_json().replace('"schema":1,', "").encode())
    assert [each.schema_number for each in store.actions("k" * 64)] == [2, 1]
    assert json.loads(store.record(action()).model_dump_json())["schema"] == 1


def test_a_folder_that_cannot_be_read_is_not_listed_as_empty(store: Store, monkeypatch: pytest.MonkeyPatch):
    def scandir(path: object) -> None:
        raise PermissionError(13, "no", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        store.backend.list("leases/")


def test_half_written_objects_are_never_listed(tmp_path: Path):
    backend = FolderBackend(tmp_path)
    backend.put("a/one", b"1")
    (tmp_path / "a" / "two.tmp-4711-aa").write_bytes(b"half")
    assert backend.list("a") == ["a/one"]


KILLED = """
import os, sys
from pathlib import Path
from pipelines.store.store import Store

store, fatal = Store(Path(sys.argv[1])), int(sys.argv[2])
calls = 0

def counted(name):
    real = getattr(os, name)
    def call(*arguments, **named):
        global calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), 9)
        return real(*arguments, **named)
    return call

folder = store.new_folder()
for n in range(3):
    (folder / f"file{n}").write_text("content" * n)
for name in ("replace", "rename", "link", "fsync", "unlink"):
    setattr(os, name, counted(name))
print(store.publish(folder, "documents", {"n": 3}).digest)
"""


def test_a_publish_killed_at_any_write_leaves_the_artifact_absent_or_whole(tmp_path: Path):
    script = tmp_path / "publish.py"
    script.write_text(KILLED)
    outcomes = []
    for fatal in range(1, 40):
        root = tmp_path / f"store{fatal}"
        root.mkdir()
        child = subprocess.run([sys.executable, str(script), str(root), str(fatal)], capture_output=True, text=True)
        store = Store(root)
        for digest in store.digests():
            assert store.verify(digest) == []
        outcomes.append(len(store.digests()))
        if child.returncode == 0:
            break
        assert child.returncode == -9, child.stderr
        again = subprocess.run([sys.executable, str(script), str(root), "0"], capture_output=True, text=True, check=True)
        assert store.verify(again.stdout.strip()) == []
        store.sweep()
        assert not list((root / "tmp").iterdir())
    assert child.returncode == 0
    assert len(outcomes) > 6  # places at which it was killed
    assert outcomes[0] == 0


def test_leftovers_of_a_dead_process_are_swept_even_while_it_is_a_zombie(store: Store):
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and a zombie until it is waited for
    ours = store.new_folder()
    machine, _, _ = ours.name.rsplit("-", 2)
    (ours.parent / f"{machine}-{child.pid}-0123").mkdir()
    store.sweep()
    assert list((store.root / "tmp").iterdir()) == [ours]
    child.wait()


@pytest.mark.parametrize("machine", ["{host}-2-{boot}-{space}", "{host}-{boot}0-{space}", "{host}-{boot}-{space}0", "{host}-{space}"])
def test_leftovers_of_another_machine_or_container_are_swept_a_week_after_their_last_write(store: Store, machine: str):
    names = {"host": socket.gethostname(), "boot": boot_id(), "space": pid_namespace()}
    theirs = store.root / "tmp" / f"{machine}-{2**22 - 1}-0123".format(**names)
    theirs.mkdir(parents=True)
    (theirs / "train.bin").write_bytes(b"half")
    eight_days_ago_s = time.time() - 8 * 24 * 3600
    os.utime(theirs, (eight_days_ago_s, eight_days_ago_s))
    store.sweep()
    assert theirs.is_dir()  # a file in it was written just now
    os.utime(theirs / "train.bin", (eight_days_ago_s, eight_days_ago_s))
    store.sweep()
    assert not theirs.exists()


def test_a_source_is_read_again_only_when_its_stat_changed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import os

    import pipelines.store.store as module

    read: list[Path] = []
    real = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: read.append(path) or real(path))
    source = tmp_path / "a.txt"
    source.write_text("one")
    os.utime(source, (1, 1))
    first = store.content_sha256([source])
    assert store.content_sha256([source]) == first
    assert len(read) == 1
    time.sleep(0.02)  # before Linux 6.13 a file's times move in ticks
    source.write_text("two")  # as long as before
    os.utime(source, (1, 1))  # and as old: ctime still tells
    assert store.content_sha256([source]) != first


def test_runs_of_the_same_second_are_listed_in_the_order_in_which_they_began(store: Store):
    names = ["20261122-192002-zebra-05aaaa", "20261122-192002-apple-f0aaaa", "20261122-192003-apple-00aaaa"]
    for name in reversed(names):
        (store.root / "runs" / name).mkdir(parents=True)
    assert store.runs() == names
