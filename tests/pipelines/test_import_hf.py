"""`hf:<folder>`: a GPT-2 from elsewhere as a stage's input, or instead of a stage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.plan.config import ConfigError, load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import Graph, build
from pipelines.plan.planner import Planner
from pipelines.plan.resolve import resolve
from pipelines.run.runner import Options, Run
from pipelines.store.events import Announcement, JournalEvent, StageEnded
from pipelines.store.store import Store
from tests.pipelines.run.small import NoTracker

INGEST = """
pipeline = "further"

[stages.documents]
uses = "ingest"
source = "text"
unit = "line"
files = ["a.txt"]
hold_out = { share = 0.3, by = "record" }
"""
FURTHER = """
[stages.tokenize]
inputs = { documents = ["documents"], tokenizer = ["hf:gpt2"] }

[stages.pretrain]
inputs = { tokens = ["tokenize"], model = ["hf:gpt2"] }
preset = "gpt2-nano"
n_embd = 8
steps = 2
global_batch_size = 2
lr = 1e-3
"""
FROM_NOTHING = """
[stages.tokenizer]
algorithm = "bytes"
inputs = { documents = ["documents"] }

[stages.tokenize]
inputs = { documents = ["documents"], tokenizer = ["tokenizer"] }

[stages.pretrain]
inputs = { tokens = ["tokenize"] }
preset = "gpt2-nano"
steps = 2
global_batch_size = 2
lr = 1e-3

[stages.export]
inputs = { model = ["pretrain"] }
"""


class Line:
    """A pipeline in its own folder, with a GPT-2 beside it, that runs in this process without MLflow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        (folder / "a.txt").write_text("".join(f"the cat sat on mat number {n}\n" for n in range(80)))

    def graph(self, stages: str, *overrides: str, use: dict[str, str] | None = None) -> Graph:
        (self.folder / "line.toml").write_text(INGEST + stages)
        return build(load(self.folder / "line.toml", overrides), use or {})

    def plan(self, graph: Graph) -> dict[str, tuple[str, str]]:
        return {each.stage: (each.action, each.reason) for each in Planner(graph, self.store, ROOT, given=graph.use).plan()}

    def run(self, graph: Graph) -> tuple[int, dict[str, str], dict[str, str]]:
        """Return the exit code, each stage's final status, and each stage's artifact or error."""
        events: list[JournalEvent | Announcement] = []
        code = Run(graph, self.store, Options("test", "test", use=graph.use, inline=True), events.append).execute()
        ended = [each for each in events if isinstance(each, StageEnded)]
        results = {each.stage: each.output or each.error for each in ended}
        return code, {each.stage: each.status for each in ended}, results


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_foreign: Callable[..., Any]) -> Line:
    monkeypatch.setattr("pipelines.run.runner.start_tracking", lambda *_: NoTracker())
    save_foreign(tmp_path / "gpt2")
    return Line(tmp_path)


def faults(line: Line, *arguments: Any, **use: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        line.graph(*arguments, **use)
    return str(raised.value)


def test_a_folder_becomes_two_stages_for_a_model_and_one_for_a_tokenizer(line: Line):
    graph = line.graph(FURTHER)
    assert graph.stages["pretrain"].inputs == {"tokens": ["tokenize"], "model": ["hf-gpt2"]}
    assert graph.stages["tokenize"].inputs == {"documents": ["documents"], "tokenizer": ["hf-gpt2-tokenizer"]}
    assert graph.stages["hf-gpt2"].inputs == {"tokenizer": ["hf-gpt2-tokenizer"]}
    assert [each.name for each in graph.stages["hf-gpt2"].sources] == ["gpt2/config.json", "gpt2/model.safetensors", "gpt2/tokenizer.json"]
    assert list(graph.stages) == ["documents", "hf-gpt2-tokenizer", "tokenize", "hf-gpt2", "pretrain"]
    alone = line.graph(FURTHER.split("[stages.pretrain]")[0])
    assert "hf-gpt2" not in alone.stages
    assert "hf-gpt2-tokenizer" in alone.stages


def test_two_spellings_of_a_folder_are_one_stage_and_two_folders_of_the_same_name_are_two(line: Line, save_foreign: Callable[..., Any]):
    spelled = FURTHER.replace('model = ["hf:gpt2"]', f'model = ["hf:{line.folder}/x/../gpt2"]')
    assert [name for name in line.graph(spelled).stages if name.startswith("hf-")] == ["hf-gpt2-tokenizer", "hf-gpt2"]
    save_foreign(line.folder / "other" / "gpt2")
    other = FURTHER.replace('model = ["hf:gpt2"]', 'model = ["hf:other/gpt2"]')
    assert line.graph(other).stages["pretrain"].inputs["model"] == ["hf-gpt2-2"]


def test_an_imports_stage_name_is_free_and_valid(line: Line, save_foreign: Callable[..., Any]):
    own = FURTHER + '[stages.hf-gpt2]\nuses = "export"\ninputs = { model = ["pretrain"] }\n'
    assert line.graph(own).stages["pretrain"].inputs["model"] == ["hf-gpt2-2"]
    save_foreign(line.folder / "my model (2)")
    assert line.graph(FURTHER.replace("hf:gpt2", "hf:my model (2)")).stages["pretrain"].inputs["model"] == ["hf-my-model-2-"]


def test_a_plan_of_an_import_needs_no_torch(line: Line):
    line.graph(FURTHER)
    script = (
        "import sys; from pathlib import Path; from pipelines.plan.config import load; from pipelines.plan.environment import ROOT;"
        "from pipelines.plan.graph import build;"
        "from pipelines.plan.planner import Planner; from pipelines.store.store import Store;"
        f"plan = Planner(build(load(Path({str(line.folder)!r}, 'line.toml'))), Store(Path('nowhere')), ROOT).plan();"
        "heavy = [name for name in ('torch', 'transformers', 'tokenizers', 'safetensors') if name in sys.modules];"
        "print([each.stage for each in plan if each.action == 'run'], heavy)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "['documents', 'hf-gpt2-tokenizer', 'tokenize', 'hf-gpt2', 'pretrain'] []"


def test_a_foreign_gpt2_is_trained_further_on_tokens_of_its_own_tokenizer(line: Line):
    code, status, made = line.run(line.graph(FURTHER))
    assert (code, set(status.values())) == (0, {"done"}), made
    imported, trained = (line.store.artifact(made[name]) for name in ("hf-gpt2", "pretrain"))
    assert imported.metadata == {"role": "policy", "tokenizer": made["hf-gpt2-tokenizer"], "parameters": 275 * 8 + 32 * 8 + 2 * 872 + 16}
    assert trained.metadata["tokenizer"] == made["hf-gpt2-tokenizer"]
    assert line.store.artifact(made["tokenize"]).metadata["vocab_size"] == 275  # its 270 tokens, and 5 of our special ones
    assert {word for word, _ in line.plan(line.graph(FURTHER)).values()} == {"reuse"}


def test_a_changed_byte_in_the_folder_reruns_the_stages_that_read_it(line: Line):
    line.run(line.graph(FURTHER))
    weights = line.folder / "gpt2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert line.plan(line.graph(FURTHER)) | {"documents": ("reuse", "")} == {
        "documents": ("reuse", ""),
        "hf-gpt2-tokenizer": line.plan(line.graph(FURTHER))["hf-gpt2-tokenizer"],
        "tokenize": line.plan(line.graph(FURTHER))["tokenize"],
        "hf-gpt2": ("run", "source gpt2/model.safetensors changed"),
        "pretrain": ("run", "its input hf-gpt2 will be rebuilt"),
    }


def test_an_exported_model_comes_back_with_the_same_tokenizer(line: Line):
    _, _, made = line.run(line.graph(FROM_NOTHING))
    exported = line.store.artifact(made["export"]).path
    back = FROM_NOTHING.replace('tokens = ["tokenize"]', f'tokens = ["tokenize"], model = ["hf:{exported}"]')
    code, _, again = line.run(line.graph(back))
    assert code == 0
    assert again[f"hf-{made['export'][:40]}-tokenizer"] == made["tokenizer"]


def test_use_replaces_a_stage_by_a_folder_and_the_stages_before_it_do_not_run(line: Line):
    graph = line.graph(FROM_NOTHING, use={"pretrain": "hf:gpt2", "documents": "sha256:01234567"})
    assert graph.stages["pretrain"].kind.uses == "import_hf"
    assert graph.use == {"documents": "sha256:01234567"}
    assert graph.last() == ["export"]
    code, status, made = line.run(line.graph(FROM_NOTHING, use={"pretrain": "hf:gpt2"}))
    assert (code, status) == (0, {"hf-gpt2-tokenizer": "done", "pretrain": "done", "export": "done"})
    assert json.loads((line.store.artifact(made["export"]).path / "config.json").read_text())["vocab_size"] == 275


def test_use_replaces_a_tokenizer_stage_too(line: Line):
    graph = line.graph(FROM_NOTHING, use={"tokenizer": "hf:gpt2"})
    assert graph.stages["tokenizer"].kind.uses == "import_hf_tokenizer"
    assert graph.stages["tokenize"].inputs["tokenizer"] == ["tokenizer"]


def test_a_folder_instead_of_anything_else_is_refused(line: Line):
    wrong = FURTHER.replace('documents = ["documents"]', 'documents = ["hf:gpt2"]')
    assert "stages.tokenize.inputs.documents: 'hf:gpt2' is a model or a tokenizer, expected documents" in faults(line, wrong)
    found = faults(line, FROM_NOTHING, use={"tokenize": "hf:gpt2"})
    assert "--use tokenize=hf:gpt2: is a model or a tokenizer, but tokenize makes tokens" in found


def test_a_problem_with_a_folder_is_reported_once_and_where_the_folder_is_named(line: Line):
    gone = faults(line, FURTHER.replace('model = ["hf:gpt2"]', 'model = ["hf:gone"]'))
    assert gone.count(str(line.folder / "gone")) == 1
    assert f"stages.pretrain.inputs.model: {line.folder}/gone is not a folder" in gone
    (line.folder / "gpt2" / "model.safetensors").rename(line.folder / "gpt2" / "pytorch_model.bin")
    used = faults(line, FROM_NOTHING, use={"pretrain": "hf:gpt2"})
    assert "--use pretrain=hf:gpt2: the weights in" in used
    assert "are pickled (pytorch_model.bin)" in used
    config = line.folder / "gpt2" / "config.json"
    config.write_text(config.read_text().replace("gelu_new", "relu"))
    (line.folder / "gpt2" / "pytorch_model.bin").rename(line.folder / "gpt2" / "model.safetensors")
    assert 'expected activation_function = "gelu_new" or "gelu_pytorch_tanh", found "relu"' in faults(line, FURTHER)


def test_an_unsupported_tokenizer_fails_its_stage_with_the_reason(line: Line):
    path = line.folder / "gpt2" / "tokenizer.json"
    path.write_text(path.read_text().replace('"normalizer": null', '"normalizer": {"type": "NFC"}'))
    code, status, made = line.run(line.graph(FURTHER))
    assert (code, status["hf-gpt2-tokenizer"], status["hf-gpt2"]) == (1, "failed", "blocked")
    assert made["hf-gpt2-tokenizer"].startswith("gpt2: this tokenizer.json cannot be imported: expected no normalizer, found NFC")


def test_weights_that_do_not_fit_fail_the_stage_with_the_reason(line: Line):
    path = line.folder / "gpt2" / "config.json"
    path.write_text(path.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    code, status, made = line.run(line.graph(FURTHER))
    assert (code, status["hf-gpt2"]) == (1, "failed")
    assert made["hf-gpt2"].startswith("gpt2: the weights do not match the GPT-2 that config.json describes: transformer.h.2.")


def test_a_model_with_another_folders_tokenizer_is_refused(line: Line):
    wrong = """
[stages.bytes]
uses = "tokenizer"
algorithm = "bytes"
inputs = { documents = ["documents"] }

[stages.import_hf]
folder = "gpt2"
inputs = { tokenizer = ["bytes"] }
"""
    code, status, made = line.run(line.graph(wrong))
    assert (code, status["import_hf"]) == (1, "failed")
    assert "is not the one of gpt2; use what import_hf_tokenizer makes of the same folder" in made["import_hf"]


def test_an_imported_folder_can_be_used_as_a_reference(line: Line):
    folder = line.folder / "gpt2"
    with pytest.raises(
        ValueError, match=r"has not been imported into the store .* in its present state; name it in a pipeline's inputs or with --use"
    ):
        resolve(line.store, f"hf:{folder}")
    _, _, made = line.run(line.graph(FURTHER))
    assert resolve(line.store, f"hf:{folder}") == made["hf-gpt2"]
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"has not been imported into the store .* in its present state"):
        resolve(line.store, f"hf:{folder}")


def test_the_newest_model_of_a_pipeline_is_never_an_import(line: Line):
    beside = FROM_NOTHING + '[stages.theirs]\nuses = "export"\ninputs = { model = ["hf:gpt2"] }\n'
    _, _, made = line.run(line.graph(beside))
    assert list(line.graph(beside).stages)[-2:] == ["hf-gpt2", "theirs"]
    assert resolve(line.store, "model:further@newest") == made["pretrain"]


def test_an_exported_assistant_comes_back_with_its_tokenizer_and_its_chat_format(line: Line):
    from gpt.hf import write_checkpoint

    _, _, first = line.run(line.graph(FROM_NOTHING))
    write_checkpoint(line.store.artifact(first["pretrain"]).path, line.folder / "assistant", chat=True)
    back = FROM_NOTHING.replace('tokens = ["tokenize"]', 'tokens = ["tokenize"], model = ["hf:assistant"]')
    back += '[stages.again]\nuses = "export"\ninputs = { model = ["hf:assistant"] }\n'
    back += '[stages.plain]\nuses = "export"\ninputs = { model = ["hf:gpt2"] }\n'
    code, _, second = line.run(line.graph(back))
    assert code == 0
    assert second["hf-assistant-tokenizer"] == first["tokenizer"]
    assert line.store.artifact(second["hf-assistant"]).metadata["chat_format"] == "gptline-1"
    again = line.store.artifact(second["again"]).path
    assert {path.name: path.read_bytes() for path in again.iterdir() if path.name != "manifest.json"} == {
        path.name: path.read_bytes() for path in (line.folder / "assistant").iterdir()
    }
    assert "chat_format" not in line.store.artifact(second["hf-gpt2"]).metadata
    assert not (line.store.artifact(second["plain"]).path / "chat_template.jinja").exists()
