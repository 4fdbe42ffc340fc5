"""Import a model: a `transformers` GPT-2 becomes a policy, to train further, to evaluate or to sample from.

This is what `hf:<folder>` means where an input takes a model. Left out: downloads; the folder must exist already.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from gpt.hf_folder import checkpoint_files, read_config
from pipelines.artifacts import Model, Tokenizer
from pipelines.stage import Models, Source, StageConfig, StageContext, StageFailure

MODELS = Models(makes="policy")


class ImportHfConfig(StageConfig):
    folder: str
    """A folder that transformers' `save_pretrained` wrote, relative to the pipeline's `data`."""

    def sources(self, data: Path) -> list[Source]:
        """List config.json, the weights and tokenizer.json; ValueError also for a config.json that describes another architecture."""
        folder = Path(os.path.abspath(data / Path(self.folder).expanduser()))
        names = checkpoint_files(folder)
        read_config(folder)
        return [Source(Path(self.folder, name).as_posix(), folder / name) for name in names]


def import_hf(config: ImportHfConfig, tokenizer: Tokenizer, stage: StageContext) -> Model:
    """Import a folder's model; `tokenizer` is what `import_hf_tokenizer` made of the same folder. An exported assistant stays one."""
    from gpt.chat import FORMAT
    from gpt.hf import is_assistant, read_checkpoint

    with tempfile.TemporaryDirectory(dir=stage.output) as copy:  # on the store's disk, which must have room for the model anyway
        for index, source in enumerate(stage.sources):
            stage.progress(index, len(stage.sources), "files")
            with stage.open(source) as original, open(Path(copy, source.path.name), "wb") as file:
                shutil.copyfileobj(original, file, 1 << 20)
        try:
            n_parameters = read_checkpoint(Path(copy), stage.output)
            chat = {"chat_format": FORMAT} if is_assistant(Path(copy)) else {}
        except ValueError as error:
            raise StageFailure(f"{config.folder}: {error}") from error
    if (tokenizer.path / "tokenizer.json").read_bytes() != (stage.output / "tokenizer.json").read_bytes():
        raise StageFailure(
            f"tokenizer {tokenizer.digest[:12]} is not the one of {config.folder}; use what import_hf_tokenizer makes of the same folder"
        )
    return stage.publish(Model, role="policy", tokenizer=tokenizer.digest, parameters=n_parameters, **chat)
