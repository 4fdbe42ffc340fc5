"""Where the store's objects are kept: five calls, and their implementation on a folder.

An object store (S3 and the like) is another class with the same five calls.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from cluster.commit import fsync_folder, write_file


class Backend(Protocol):
    """Names are relative POSIX paths; every call is atomic for its one object."""

    def get(self, name: str) -> bytes | None:
        """The object's bytes; None if there is no such object."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a new object. False, with nothing written, if one of this name exists."""
        ...

    def put(self, name: str, data: bytes | Path) -> None:
        """Write or replace an object; a Path is a file that the backend may move."""
        ...

    def list(self, prefix: str) -> list[str]:
        """All names that begin with `prefix`, sorted; `"actions/"` lists a folder."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; nothing happens if there is none."""
        ...


class FolderBackend:
    """Objects as files below a folder, on a local or a shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, name: str) -> bytes | None:
        try:
            return (self.root / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return write_file(self._path(name), data, if_absent=True)

    def put(self, name: str, data: bytes | Path) -> None:
        path = self._path(name)
        if isinstance(data, bytes):
            write_file(path, data)
            return
        with open(data, "rb") as file:
            os.fsync(file.fileno())
        os.replace(data, path)
        fsync_folder(path.parent)

    def list(self, prefix: str) -> list[str]:
        def failed(error: OSError) -> None:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                raise error  # os.walk would otherwise report a folder that it can't read as empty

        parent, _, beginning = prefix.rpartition("/")
        names = []
        for folder, folders, files in os.walk(self.root / parent, onerror=failed):
            if folder == str(self.root / parent):
                folders[:] = [each for each in folders if each.startswith(beginning)]
                files = [each for each in files if each.startswith(beginning)]
            names += [os.path.relpath(os.path.join(folder, file), self.root) for file in files if ".tmp-" not in file]
        return sorted(names)

    def delete(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        """The object's file; its folder is created."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
