"""Read trees of replies, ranked by people, in the form of Open-Assistant (Köpf et al. 2023, arXiv:2304.07327).

    {"prompt": {"text": "Name a tree.", "role": "prompter", "replies": [
        {"text": "Oak.", "role": "assistant", "rank": 0, "replies": []}, ...]}}

Rank 0 is the best. Of replies without ranks the first counts as the best. Replies that are marked as deleted are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from pipelines.ingest.dialogue_columns import Columns
from pipelines.ingest.messages import Message, read_message
from pipelines.ingest.templates import short

Node = dict[str, Any]


def roots(columns: Columns) -> list[Node]:
    """Return the first message of a tree: the column `prompt`, or the record itself where it is a message with replies. None if deleted."""
    root = _root(columns)
    return [] if root.get("deleted") else [root]


def _root(columns: Columns) -> Node:
    replies = columns.settings.where("replies")
    if not columns.has("prompt") and replies in columns.columns:
        return dict(columns.columns)
    root = columns.value("prompt")
    if not isinstance(root, dict) or columns.settings.where("text") not in root:
        raise ValueError(f"{columns.called('prompt')} is {short(root)}, expected a message with text, role and replies")
    return root


def conversations(columns: Columns) -> Iterator[list[Message]]:
    """Yield every path from the root that ends with an assistant's message and isn't part of a longer one."""
    paths = []
    for path in [path for root in roots(columns) for path in _paths(columns, root, [])]:
        while path and path[-1]["role"] != "assistant":
            path = path[:-1]
        paths.append(path)
    kept: list[list[Message]] = []
    for path in sorted(paths, key=len, reverse=True):
        if path and not any(longer[: len(path)] == path for longer in kept):
            kept.append(path)
    yield from sorted(kept, key=paths.index)


def prompts(columns: Columns) -> Iterator[tuple[list[Message], str | None]]:
    """Yield every path from the root to a user's message, and the best reply to it if there is one."""
    for path, node in _all_nodes(columns):
        if path[-1]["role"] == "user":
            answers = _assistants(columns, node)
            yield path, _message(columns, answers[0])["content"] if answers else None


def ranked(columns: Columns) -> Iterator[tuple[list[Message], list[str], list[float]]]:
    """Yield every path from the root to a user's message with two or more ranked replies: the texts of these, and their ranks."""
    for path, node in _all_nodes(columns, every=True):
        answers = [each for each in _assistants(columns, node) if _rank(columns, each) < math.inf]
        if path[-1]["role"] == "user" and len(answers) > 1:
            yield path, [_message(columns, each)["content"] for each in answers], [_rank(columns, each) for each in answers]


def _paths(columns: Columns, node: Node, before: list[Message]) -> Iterator[list[Message]]:
    path = [*before, _message(columns, node)]
    followed = _followed(columns, node, every=False)
    for reply in followed:
        yield from _paths(columns, reply, path)
    if not followed:
        yield path


def _all_nodes(columns: Columns, *, every: bool = False) -> list[tuple[list[Message], Node]]:
    return [found for root in roots(columns) for found in _nodes(columns, root, [], every=every)]


def _nodes(columns: Columns, node: Node, before: list[Message], *, every: bool = False) -> Iterator[tuple[list[Message], Node]]:
    path = [*before, _message(columns, node)]
    yield path, node
    for reply in _followed(columns, node, every=every):
        yield from _nodes(columns, reply, path, every=every)


def _followed(columns: Columns, node: Node, *, every: bool) -> list[Node]:
    """Return the replies that a path goes on with: all of the user's, and the assistant's best one or all of them."""
    answers = _assistants(columns, node)
    users = [each for each in _replies(columns, node) if each not in answers]
    return [*users, *(answers if every or columns.settings.replies == "all" else answers[:1])]


def _assistants(columns: Columns, node: Node) -> list[Node]:
    """Return the assistant's replies, the best one first."""
    answers = [each for each in _replies(columns, node) if _message(columns, each)["role"] == "assistant"]
    return sorted(answers, key=lambda each: _rank(columns, each))


def _replies(columns: Columns, node: Node) -> list[Node]:
    key = columns.settings.where("replies")
    replies = node.get(key) or []
    if not isinstance(replies, list) or not all(isinstance(each, dict) for each in replies):
        raise ValueError(f"{key} is {short(replies)}, expected a list of messages with text, role and replies")
    return [each for each in replies if not each.get("deleted")]


def _rank(columns: Columns, node: Node) -> float:
    rank = node.get(columns.settings.where("rank"))
    if rank is None:
        return math.inf
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise ValueError(f"a reply's rank is {short(rank)}, expected a number, of which the lowest is the best")
    return rank


def _message(columns: Columns, node: Node) -> Message:
    settings = columns.settings
    role, text = settings.where("role"), settings.where("text")
    if role not in node or text not in node:
        raise ValueError(
            f'a reply has the keys {", ".join(map(str, node))}; expected text and role, which keys = {{ text = "..." }} renames'
        )
    return read_message({settings.where("role"): node[role], settings.where("content"): node[text]}, settings)
