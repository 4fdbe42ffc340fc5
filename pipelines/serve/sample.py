"""A prompt continued by a trained model, piece by piece, for `gptline sample`; and what `gptline chat` shares with it."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.artifacts import Model
from pipelines.stage import StageFailure
from pipelines.store.store import Store

SHOWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
"""What a model writes is data: a terminal must not obey its control characters, so their pictures are shown."""


def sound_policy(store: Store, digest: str) -> Model:
    """Every byte is verified first: damaged weights write text as well, and nobody could tell."""
    model = store.artifact(digest)
    if not isinstance(model, Model):
        raise StageFailure(f"artifact {digest[:12]} is {model.kind}, wanted a model")
    if model.metadata.get("role") != "policy":
        raise StageFailure(f"model {digest[:12]} has the role {model.metadata.get('role')}; wanted a policy: only those write")
    if problems := store.verify(digest):
        raise StageFailure(
            f"model {digest[:12]} is damaged: {'; '.join(problems)}. Delete {model.path} and run its pipeline again: what is gone is made"
        )
    return model


def continue_prompt(store: Store, digest: str, prompt: str, *, tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """The prompt, then what follows, in whole characters; it ends where the model ends the document."""
    model = sound_policy(store, digest)
    from gpt.model import load_model
    from gpt.random_streams import stream_seed
    from gpt.sampling import sample_stream
    from gpt.tokenizer import Tokenizer

    encoder = Tokenizer.load(model.path / "tokenizer.json")
    end = encoder.special["document"]
    text = encoder.stream()
    drawn = sample_stream(
        load_model(model.path).eval(),
        [end, *encoder.encode(prompt)],
        stream=stream_seed(seed, "sample"),
        max_tokens=tokens,
        temperature=temperature,
        stop_ids=(end,),
    )
    yield prompt
    for token in drawn:
        if token != end:
            yield text.feed(token).translate(SHOWN)
