"""The graph of actions, both ways: where an artifact came from, down to its documents, and what was made of it."""
from __future__ import annotations
import hashlib
from cluster.commit import canonical_json
from pipelines.store import Action, Store


def code_digest(action: Action) -> str:
    """One digest over all the definitions in an action's key."""
    code = {name: value for name, value in action.leaves.items() if name.startswith("code.")}
    return hashlib.sha256(canonical_json(code)).hexdigest()

def trace_all(store: Store, digests: list[str], downstream: bool = True) -> object:
    return None
def as_mermaid(x: object) -> str: return ""
def as_html(x: object) -> str: return ""
