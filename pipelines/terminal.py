"""The terminal that `gptline` writes to, and the exit codes it ends with."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

EXIT_CODES = """\b
Exit codes:
  0    done
  1    a stage failed, a gate is closed, or `doctor` found a fault
  2    wrong use, a fault in the pipeline file, or a reference to something that does not exist
  3    the store, the cluster, MLflow or a file could not be reached, read or written
  130  interrupted by Ctrl-C; 143: by SIGTERM; 141: the reader of the output stopped reading
"""
NOT_READ = 141
_BRANCHES = "│├└─"
"""What trees are drawn with; a terminal without these characters gets others."""
SHOW_CURSOR = "\x1b[?25h"


def prepare_streams() -> None:
    """Let standard output and standard error be written to, whatever they are.

    One that was closed from the start leads nowhere: otherwise the next file that is opened would get its number. One without UTF-8 shows
    what it can.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers: the lowest free one is taken
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_lines(*lines: str) -> None:
    write("".join(f"{line}\n" for line in lines))


def write(text: str) -> None:
    try:
        _BRANCHES.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = text.translate(str.maketrans(_BRANCHES, "|+`-"))
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads()


def nobody_reads() -> NoReturn:
    """End quietly, since the reader of the output, such as `head`, stopped. Python would report what is still buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise typer.Exit(NOT_READ) from None


def fail(error: Exception, code: int, text: str) -> NoReturn:
    if os.environ.get("GPTLINE_DEBUG"):
        raise error
    with contextlib.suppress(OSError):  # the exit code is what is left to say
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    sys.exit(code)


def restore_cursor_and_quit(number: int, frame: FrameType | None) -> None:
    """Let Ctrl-\\ end the program as usual, but first show the terminal's cursor again, which live progress hides."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), SHOW_CURSOR.encode())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
