"""Import a tokenizer: the tokenizer.json of a `transformers` GPT-2 in our format, with our special tokens added.

This is what `hf:<folder>` means where an input takes a tokenizer, and the tokenizer of an imported model.
"""

from __future__ import annotations

import os
from pathlib import Path

from gpt.hf_folder import tokenizer_files
from pipelines.artifacts import Tokenizer
from pipelines.stage import Source, StageConfig, StageContext, StageFailure


class ImportHfTokenizerConfig(StageConfig):
    folder: str
    """A folder that transformers' `save_pretrained` wrote, relative to the pipeline's `data`."""

    def sources(self, data: Path) -> list[Source]:
        folder = Path(os.path.abspath(data / Path(self.folder).expanduser()))
        return [Source(Path(self.folder, name).as_posix(), folder / name) for name in tokenizer_files(folder)]


def import_hf_tokenizer(config: ImportHfTokenizerConfig, stage: StageContext) -> Tokenizer:
    """The manifest is like that of a tokenizer trained here, so an exported tokenizer comes back as the same artifact."""
    from gpt.hf import read_tokenizer

    with stage.open(stage.sources[0]) as file:
        definition = file.read()
    try:
        tokenizer, _ = read_tokenizer(definition.decode())
    except ValueError as error:
        raise StageFailure(f"{config.folder}: {error}") from error
    tokenizer.save(stage.output / "tokenizer.json")
    return stage.publish(Tokenizer, algorithm="bytes" if tokenizer.ids_are_bytes else "bpe", vocab_size=tokenizer.vocab_size)
