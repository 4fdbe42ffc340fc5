"""Which model a reference means, and whether it can be used: a sound policy for `sample`, one with a chat format for `chat`."""

from __future__ import annotations

from gpt.chat import FORMAT
from pipelines.artifacts import Model
from pipelines.plan.resolve import resolve
from pipelines.stage import StageFailure
from pipelines.store.action import Action
from pipelines.store.store import Store


def find_policy(store: Store, reference: str) -> Model:
    """The policy that a reference names. Every byte is verified first: damaged weights would also write text, and no one would notice."""
    return sound_policy(store, resolve(store, reference))


def find_chat_policy(store: Store, reference: str | None) -> tuple[Model, str]:
    """A model that was trained to answer in turns, and one line about it. Without a reference: the newest that an alias points to.

    "Newest" goes by when it was built, over every `model:<pipeline>@<alias>` of the store.
    """
    made = {action.output: action for action in sorted(store.all_actions(), key=lambda action: action.started_ms)}
    digest = _newest(store, made) if reference is None else resolve(store, reference)
    model = sound_policy(store, digest)
    found = model.metadata.get("chat_format")
    if found is None:
        raise StageFailure(
            f"model {digest[:12]} continues text and has no chat format: no sft or rl stage trained it; "
            f"`gptline sample {reference or f'sha256:{digest[:12]}'}` continues a text with it"
        )
    if found != FORMAT:
        raise StageFailure(
            f"model {digest[:12]}: expected the chat format {FORMAT}, found {found}; use the version of gptline that trained it"
        )
    stage = f"{made[digest].pipeline}, {made[digest].stage}: " if digest in made else ""
    return model, f"{stage}model {digest[:12]}, {model.metadata.get('steps', 'unknown')} steps"


def sound_policy(store: Store, digest: str) -> Model:
    """The artifact as a policy; StageFailure if it is something else or damaged."""
    model = store.artifact(digest)
    if not isinstance(model, Model):
        raise StageFailure(f"artifact {digest[:12]}: expected a model, found {model.kind}")
    if (role := model.metadata.get("role")) != "policy":
        raise StageFailure(f"model {digest[:12]}: expected a policy, which writes text, found a model with the role {role}")
    if problems := store.verify(digest):
        raise StageFailure(f"model {digest[:12]} is damaged: {'; '.join(problems)}. Delete {model.path} and run its pipeline again")
    return model


def _newest(store: Store, made: dict[str, Action]) -> str:
    chatty = []
    for name, alias in store.aliases():
        digest = store.alias(name, alias)
        if digest is not None and _can_chat(store, digest):
            chatty.append((made[digest].started_ms if digest in made else 0, digest))
    if chatty:
        return max(chatty)[1]
    for digest, action in reversed(made.items()):
        if _can_chat(store, digest):
            raise StageFailure(
                f"no pipeline's newest model in the store {store} was trained to answer in turns; "
                f"`gptline chat sha256:{digest[:12]}` talks to the last one that was ({action.pipeline}, {action.stage})"
            )
    raise StageFailure(
        f"no model in the store {store} was trained to answer in turns, as sft and rl stages do; run a pipeline with such a stage, "
        "name another store with --store, or continue a text with `gptline sample`"
    )


def _can_chat(store: Store, digest: str) -> bool:
    manifest = store.manifest(digest)
    return manifest is not None and manifest["metadata"].get("role") == "policy" and bool(manifest["metadata"].get("chat_format"))
