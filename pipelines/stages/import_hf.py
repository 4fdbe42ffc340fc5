"""Import: a GPT-2 of `transformers` becomes a model, to train further, to evaluate or to sample from.

What `hf:<folder>` stands for where a model is wanted. Left out: downloads; the folder is there already.
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
    """What transformers' `save_pretrained` wrote; relative to the pipeline's `data`."""

    def sources(self, data: Path) -> list[Source]:
        """config.json, the weights, tokenizer.json; ValueError also for a config.json that our model can't be."""
        folder = Path(os.path.abspath(data / Path(self.folder).expanduser()))
        names = checkpoint_files(folder)
        read_config(folder)
        return [Source(Path(self.folder, name).as_posix(), folder / name) for name in names]


def import_hf(config: ImportHfConfig, tokenizer: Tokenizer, stage: StageContext) -> Model:
    """`tokenizer` is what `import_hf_tokenizer` made of the same folder: the model is known to fit tokens that were made with it."""
    from gpt.hf import read_checkpoint

    with tempfile.TemporaryDirectory(dir=stage.output) as copy:  # the store's disk has room for what it is to hold
        for index, source in enumerate(stage.sources):
            stage.progress(index, len(stage.sources), "files")
            with stage.open(source) as theirs, open(Path(copy, source.path.name), "wb") as file:
                shutil.copyfileobj(theirs, file, 1 << 20)
        try:
            n_parameters = read_checkpoint(Path(copy), stage.output)
        except ValueError as error:
            raise StageFailure(f"{config.folder}: {error}") from error
    if (tokenizer.path / "tokenizer.json").read_bytes() != (stage.output / "tokenizer.json").read_bytes():
        raise StageFailure(
            f"tokenizer {tokenizer.digest[:12]} is not that of {config.folder}; take what import_hf_tokenizer makes of the same folder"
        )
    return stage.publish(Model, role="policy", tokenizer=tokenizer.digest, parameters=n_parameters)
