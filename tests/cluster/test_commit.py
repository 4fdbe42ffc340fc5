"""The write protocol: a reader never sees a partial file or folder, wherever the writer is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import commit

REPOSITORY = Path(__file__).parents[2]


def committed(folder: Path, files: dict[str, bytes]) -> list[commit.FileEntry]:
    temporary = commit.temporary_for(folder)
    for name, data in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(data)
    entries = commit.describe(temporary)
    commit.commit_folder(temporary, folder, {"files": [entry.path for entry in entries]})
    return entries


def test_the_second_of_two_if_absent_writers_returns_false_and_changes_nothing(tmp_path: Path) -> None:
    assert commit.write_file(tmp_path / "lease", b"first", if_absent=True)
    assert not commit.write_file(tmp_path / "lease", b"second", if_absent=True)
    assert (tmp_path / "lease").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_a_link_that_nfs_first_makes_and_then_reports_as_existing_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link_twice(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", link_twice)
    assert commit.write_file(tmp_path / "lease", b"first", if_absent=True)
    monkeypatch.undo()
    assert not commit.write_file(tmp_path / "lease", b"second", if_absent=True)
    assert (tmp_path / "lease").read_bytes() == b"first"


def test_a_description_lists_files_in_order_with_their_sha256(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"abc")
    first, second = commit.describe(tmp_path)
    assert (first.path, first.bytes, first.sha256[:8]) == ("a", 3, "ba7816bf")
    assert (second.path, second.bytes, second.sha256[:8]) == ("b/two", 0, "e3b0c442")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_is_refused(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "outside"
    target.mkdir() if kind == "folder" else target.write_text("secret")
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link").symlink_to(target)
    with pytest.raises(ValueError, match="link"):
        commit.describe(tmp_path / "inside")


def test_every_kind_of_damage_is_named(tmp_path: Path) -> None:
    entries = committed(tmp_path / "x", {"cut": b"12345", "flipped": b"12345", "gone": b"1", "whole": b"1"})
    assert commit.check(tmp_path / "x", entries) == []
    (tmp_path / "x" / "cut").write_bytes(b"123")
    (tmp_path / "x" / "flipped").write_bytes(b"12344")
    (tmp_path / "x" / "gone").unlink()
    (tmp_path / "x" / "extra").write_bytes(b"")
    problems = commit.check(tmp_path / "x", entries)
    assert problems[0] == "cut has 3 bytes, expected 5"
    assert problems[1].startswith("flipped has sha256 ")
    assert problems[2:] == ["gone is missing", "extra is not in the manifest"]


def test_committing_a_folder_that_exists_changes_nothing(tmp_path: Path) -> None:
    committed(tmp_path / "x", {"file": b"first"})
    committed(tmp_path / "x", {"file": b"second"})
    assert (tmp_path / "x" / "file").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_folder_without_a_manifest_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "half").write_bytes(b"written")
    committed(tmp_path / "x", {"file": b"whole"})
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["file", "manifest.json"]


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from cluster import commit

calls = 0
def counted(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for name in ("fsync", "replace", "rename", "link", "unlink", "open"):
    setattr(os, name, counted(getattr(os, name)))
root = Path(sys.argv[1])
commit.write_file(root / "file", b"x" * 100_000)
temporary = root / "folder.tmp-1"
(temporary / "inner").mkdir(parents=True)
(temporary / "inner" / "a").write_bytes(b"a" * 1000)
(temporary / "b").write_bytes(b"b")
entries = [vars(entry) for entry in commit.describe(temporary)]
commit.commit_folder(temporary, root / "folder", {"files": entries})
"""


def test_a_writer_killed_at_any_system_call_leaves_everything_or_nothing(tmp_path: Path) -> None:
    outcomes = []
    for call in range(1, 100):
        root = tmp_path / str(call)
        root.mkdir()
        child = subprocess.run([sys.executable, "-c", KILLED_AT, str(root), str(call)], cwd=REPOSITORY)
        if (root / "file").exists():
            assert (root / "file").read_bytes() == b"x" * 100_000
        manifest = commit.read_manifest(root / "folder")
        if manifest is None:
            assert not (root / "folder").exists()
        else:
            assert commit.check(root / "folder", [commit.FileEntry(**entry) for entry in manifest["files"]]) == []
        for leftover in commit.leftovers(root):
            commit.remove(leftover)
        assert {path.name for path in root.iterdir()} <= {"file", "folder"}
        outcomes.append(manifest is not None)
        if child.returncode == 0:
            break
    else:
        pytest.fail("the writer never finished")
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes)
