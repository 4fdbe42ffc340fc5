"""Read a dialogue that is written as one text, with a marker before each turn.

"\\n\\nHuman: Name a tree.\\n\\nAssistant: Oak."   is the form of Anthropic's hh-rlhf (Bai et al. 2022), and the default
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.ingest.dialogue_settings import DialogueSettings
from pipelines.ingest.messages import Message
from pipelines.ingest.templates import short

MARKERS = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}


def begins_with_marker(value: Any, settings: DialogueSettings) -> bool:
    """Return whether a text is a transcript, rather than the words of one turn."""
    return isinstance(value, str) and any(marker and value.lstrip().startswith(marker.strip()) for marker in settings.markers or MARKERS)


def is_transcript(text: str) -> bool:
    """Return whether a text is a dialogue with the usual markers, where one message is expected."""
    return re.match(r"\s*Human:", text) is not None and "\n\nAssistant:" in text


def read_transcript(value: Any, settings: DialogueSettings, what: str = "text") -> list[Message]:
    """Return the messages of a transcript, unchecked.

    Turns are stripped of the white space around them. An assistant's marker at the very end, which asks for a response, is no message.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {short(value)}, expected a text with markers")
    markers = settings.markers or MARKERS
    text = value.replace("\r\n", "\n")
    pattern = "|".join(re.escape(marker) for marker in sorted(filter(None, markers), key=len, reverse=True))
    leading = next((marker for marker in markers if marker and text.lstrip().startswith(marker.strip())), "")
    if leading and not re.match(pattern, text):
        text = leading + text.lstrip()[len(leading.strip()) :]  # white space around the first marker is often lost
    pieces = re.split(f"({pattern})", text)
    turns = [
        (markers.get("", "end"), pieces[0]),
        *((markers[marker], turn) for marker, turn in zip(pieces[1::2], pieces[2::2], strict=True)),
    ]
    messages = []
    _refuse_other_speakers(turns, markers, what)
    for number, (role, turn) in enumerate(turns):
        if role != "end":
            messages += [{"role": role, "content": turn.strip()}] if number or turn.strip() else []
        elif turn.strip():
            expected = " or ".join(repr(marker) for marker in markers if marker)
            where = "before the first marker" if number == 0 else "after a turn's end"
            raise ValueError(
                f"{what} has the text {short(turn.strip())} {where}, expected {expected}; say with markers how turns begin, "
                'where "" = "system" stands for the text before the first'
            )
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    if not messages:
        raise ValueError(f"{what} is empty, expected a text with markers")
    return messages


def _refuse_other_speakers(turns: Iterable[tuple[str, str]], markers: Mapping[str, str], what: str) -> None:
    """Raise ValueError where a line of a turn begins with another role's marker, but without the blank line that is part of it."""
    loose = {marker.strip(): role for marker, role in markers.items() if marker.startswith("\n") and marker.strip()}
    if not loose:
        return
    pattern = re.compile(rf"\n[ \t]*({'|'.join(map(re.escape, loose))})")
    for role, turn in turns:
        for match in pattern.finditer(turn):
            if loose[match[1]] != role != "end":
                pairs = ", ".join(f'"\\n{marker}" = "{role}"' for marker, role in loose.items())
                raise ValueError(
                    f"{what} has a line that begins with {match[1]!r} inside the {role}'s turn, expected a blank line before it; "
                    f"markers = {{ {pairs} }} begins a turn at each such line"
                )
