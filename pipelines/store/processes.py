"""Which process holds something, and whether it is still alive."""

from __future__ import annotations

import getpass
import json
import os
import socket
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease: `Holder(user="ada", host="node7", pid=4711, run="20261122-192002-quickstart-ab12cd", ...)`."""

    user: str
    host: str
    pid: int
    boot: str = ""
    """The boot of its machine: two clones of one machine share a host name but never a boot."""
    space: str = ""
    """Its pid namespace: containers on one machine number their processes separately."""
    born: str | None = None
    """When it started, in clock ticks since boot; a pid is used again, but not with the same start."""
    run: str = ""
    stage: str = ""
    beat: int = 0
    """How many times it has renewed its lease."""
    released: bool = False

    @classmethod
    def this_process(cls, run: str = "", stage: str = "") -> Self:
        pid = os.getpid()
        return cls(user_name(), socket.gethostname(), pid, boot_id(), pid_namespace(), start_ticks(pid), run, stage)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in json.loads(data).items() if name in known and value is not None})

    def to_json(self, *, beat: int = 0, released: bool = False) -> bytes:
        return json.dumps(asdict(replace(self, beat=beat, released=released))).encode()

    def is_visible(self) -> bool:
        """Whether this process can look it up: same host, boot and pid namespace."""
        return (self.host, self.boot, self.space) == (socket.gethostname(), boot_id(), pid_namespace())

    def is_known_dead(self) -> bool:
        return self.is_visible() and start_ticks(self.pid) != self.born

    def __str__(self) -> str:
        """`ada on node7, process 4711, run 20261122-...`"""
        return f"{self.user} on {self.host}, process {self.pid}" + (f", run {self.run}" if self.run else "")


def boot_id() -> str:
    """Identifies this machine's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> str:
    """Identifies the namespace in which this process has its pid."""
    return os.readlink("/proc/self/ns/pid").removeprefix("pid:[").removesuffix("]")


def machine_id() -> str:
    """The scope in which a pid is unique: host, boot and pid namespace."""
    return f"{socket.gethostname()}-{boot_id()}-{pid_namespace()}"


def start_ticks(pid: int) -> str | None:
    """When a process on this machine started, in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if stat[0] in ("Z", "X") else stat[19]


def user_name() -> str:
    """The user's name, or the bare number of a user without a name, as in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
