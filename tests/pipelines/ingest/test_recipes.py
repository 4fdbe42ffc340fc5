"""Every shipped pipeline file is one that the graph accepts, once its data is there."""

import tomllib
from pathlib import Path

import pytest

from pipelines import config, graph

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted(CONFIGS.glob("*.toml"))


@pytest.fixture
def built(data):
    def build(path: Path) -> graph.Graph:
        documents = tomllib.loads(path.read_text(encoding="utf-8"))["stages"]["documents"]
        for source in [documents, *documents.get("mixture", ())]:
            for pattern in source.get("files", ()):
                file = data / pattern.replace("*", "any")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
        return graph.build(config.load(path, [f'data="{data}"']))

    return build


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_the_line_from_documents_to_export(built, path):
    assert list(built(path).stages) == ["documents", "tokenizer", "tokenize", "pretrain", "evaluate", "export"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_named_after_its_file_and_listed_in_the_readme(path):
    assert config.load(path).file.pipeline == path.stem
    assert f"`{path.name}`" in (CONFIGS / "README.md").read_text(encoding="utf-8")


def test_shakespeare_is_nanogpts_setting_for_a_cpu(built):
    pretrain = built(CONFIGS / "shakespeare.toml").stages["pretrain"].config
    shape = pretrain.shape()
    assert (shape.n_layer, shape.n_head, shape.n_embd, shape.seq_len, shape.dropout, shape.bias) == (4, 4, 128, 64, 0.0, False)
    assert (pretrain.global_batch_size, pretrain.steps, pretrain.lr, pretrain.warmup_steps, pretrain.beta2) == (12, 2000, 1e-3, 100, 0.99)
