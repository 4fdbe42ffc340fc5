"""Continue a prompt with a trained model, piece by piece, for `gptline sample`."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.artifacts import Model

CONTROL_PICTURES = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)
"""For `str.translate`. What a model writes is data: a terminal must show its control characters and not obey them."""


def continue_prompt(model: Model, prompt: str, *, tokens: int, temperature: float, seed: int) -> Iterator[str]:
    """The prompt, then what follows it in whole characters, until the model ends the document."""
    from gpt.model import load_model
    from gpt.random_streams import stream_seed
    from gpt.sampling import sample_stream
    from gpt.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(model.path / "tokenizer.json")
    end = tokenizer.special["document"]
    text = tokenizer.stream()
    token_ids = sample_stream(
        load_model(model.path).eval(),
        [end, *tokenizer.encode(prompt)],
        stream=stream_seed(seed, "sample"),
        max_tokens=tokens,
        temperature=temperature,
        stop_ids=(end,),
    )
    yield prompt
    for token_id in token_ids:
        if token_id != end:
            yield text.feed(token_id).translate(CONTROL_PICTURES)
