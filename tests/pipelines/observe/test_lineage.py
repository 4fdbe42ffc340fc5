"""lineage.py and lineage_text.py: from an artifact to the files it comes from and back, with makers, code and licences."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pipelines.observe.lineage import code_digest, trace, trace_all
from pipelines.observe.lineage_text import as_html, as_mermaid, as_text
from pipelines.store.action import Action
from pipelines.store.store import Store


def made(store: Store, stage: str, kind: str, inputs: dict[str, list[str]], run: str = "r1", started_ms: int = 0, **more: Any) -> Action:
    folder = store.new_folder()
    (folder / "file").write_text(stage)
    given: dict[str, Any] = dict(
        leaves={"config.steps": 800, "code.gpt.model:GPT": "a", "code.gpt.model:MLP": "b"}, metadata={}, versions={"torch": "2.13.0"}
    )
    given |= more
    output = store.publish(folder, kind, given.pop("metadata")).digest
    return store.record(
        Action(
            **given, key=f"key-{stage}", pipeline="line", stage=stage, kind=stage, run=run, inputs=inputs, output=output, output_kind=kind,
            started_ms=started_ms, seconds=2.5, host="h", user="u", pid=1,
        )
    )  # fmt: skip


@pytest.fixture
def line(store: Store) -> dict[str, Action]:
    """documents -> tokenizer; both -> tokens -> model -> report."""
    documents = made(
        store, "documents", "documents", {}, leaves={"source.books/emma.jsonl": "e" * 64, "config.source": "json"},
        metadata={"documents": 1812, "bytes": 20_000_000, "licenses": {"CC0-1.0": {}}},
    )  # fmt: skip
    tokenizer = made(store, "tokenizer", "tokenizer", {"documents": [documents.output]})
    tokens = made(store, "tokenize", "tokens", {"documents": [documents.output], "tokenizer": [tokenizer.output]})
    model = made(store, "pretrain", "model", {"tokens": [tokens.output]}, metadata={"role": "policy"})
    report = made(store, "evaluate", "report", {"model": [model.output]})
    return {each.stage: each for each in (documents, tokenizer, tokens, model, report)}


@pytest.fixture
def whole_line(store: Store, line: dict[str, Action]) -> dict[str, Action]:
    """The line and, after it: sft from conversations, a reward model from pairs and ratings, rl with prompts."""

    def ingested(kind: str, unit: str, source: str) -> Action:
        return made(store, kind, kind, {}, leaves={f"source.{source}": "d" * 64}, metadata={unit: 1200, "licenses": {"CC-BY-4.0": {}}})

    read = [
        ingested("conversations", "conversations", "chats/chats.jsonl"),
        ingested("preferences", "pairs", "pairs/pairs.jsonl"),
        ingested("ratings", "ratings", "rated/rated.jsonl"),
        ingested("prompts", "prompts", "asked/asked.jsonl"),
    ]
    line |= {each.stage: each for each in read}
    policy = {"role": "policy", "parameters": 1_074_304, "chat_format": "gptline-1"}
    line["sft"] = made(
        store, "sft", "model", {"policy": [line["pretrain"].output], "conversations": [line["conversations"].output]}, metadata=policy
    )
    line["reward_model"] = made(
        store, "reward_model", "model",
        {"policy": [line["sft"].output], "preferences": [line["preferences"].output], "ratings": [line["ratings"].output]},
        metadata={"role": "reward", "parameters": 1_074_432, "score_mean": 0.25, "score_std": 1.5},
    )  # fmt: skip
    line["rl"] = made(
        store, "rl", "model",
        {"policy": [line["sft"].output], "prompts": [line["prompts"].output], "reward_model": [line["reward_model"].output]},
        metadata=policy,
    )  # fmt: skip
    return line


def test_an_assistant_is_traced_down_to_its_documents_conversations_preferences_and_prompts(
    store: Store, whole_line: dict[str, Action]
) -> None:
    text = as_text(trace(store, whole_line["rl"].output))
    short = {stage: each.output[:12] for stage, each in whole_line.items()}
    assert text.startswith(f"policy model {short['rl']}  rl\n")
    assert f"policy: policy model {short['sft']}  sft\n" in text
    assert f"policy: policy model {short['pretrain']}  pretrain\n" in text
    assert f"reward_model: reward model {short['reward_model']}  reward_model\n" in text
    assert f"policy: policy model {short['sft']}  sft  (shown above)\n" in text  # the reward model started from it too
    for kind, unit in (("conversations", "conversations"), ("preferences", "pairs"), ("ratings", "ratings"), ("prompts", "prompts")):
        assert f"{kind}: {kind} {short[kind]}  {kind}\n" in text
        assert f"1,200 {unit}\n" in text
    assert text.count("licence CC-BY-4.0") == 4
    for source in ("books/emma", "chats/chats", "pairs/pairs", "rated/rated", "asked/asked"):
        assert text.count(f"source {source}.jsonl  sha256 ") == 1
    assert text.count("1,074,304 parameters, chat format gptline-1\n") == 2  # sft's and rl's; the title says that they are policies


def test_what_was_made_from_a_conversation_is_listed_with_each_models_role(store: Store, whole_line: dict[str, Action]) -> None:
    below = as_text(trace(store, whole_line["conversations"].output)).split("  conversations:\n")[1].splitlines()
    short = {stage: whole_line[stage].output[:12] for stage in ("sft", "reward_model", "rl")}
    assert [re.sub(r"  \d{4}-.* s", "", row) for row in below if row] == [
        f"└─ policy model {short['sft']}  sft",
        f"   ├─ reward model {short['reward_model']}  reward_model",
        f"   │  └─ policy model {short['rl']}  rl",
        f"   └─ policy model {short['rl']}  rl  (shown above)",
    ]


def test_the_chart_of_an_assistant_names_roles_parameters_and_every_source_once(store: Store, whole_line: dict[str, Action]) -> None:
    lineage = trace(store, whole_line["rl"].output)
    rows = as_mermaid(lineage).splitlines()
    nodes = {row.split('"')[1].split("<br/>")[0]: row for row in rows if "<br/>" in row}
    names = {stage: row.split()[0].split("[")[0].split("(")[0] for stage, row in nodes.items()}
    assert nodes["reward_model"].split("<br/>")[1] == f"reward model {whole_line['reward_model'].output[:12]}"
    assert nodes["sft"].split("<br/>")[1] == f"policy model {whole_line['sft'].output[:12]}"
    assert f'    {names["conversations"]} -->|"conversations"| {names["sft"]}' in rows
    assert f'    {names["preferences"]} -->|"preferences"| {names["reward_model"]}' in rows
    assert f'    {names["sft"]} -->|"policy"| {names["reward_model"]}' in rows
    assert f'    {names["reward_model"]} -->|"reward_model"| {names["rl"]}' in rows
    assert sum(row.startswith("    s") for row in rows) == 5  # documents, conversations, preferences, ratings, prompts
    page = as_html(lineage)
    assert f"<h1>Lineage of policy model {whole_line['rl'].output[:12]}  rl</h1>" in page
    assert page.count(f"reward model {whole_line['reward_model'].output[:12]}") >= 2  # in the tree and in the chart


def test_a_model_is_traced_down_to_its_documents_their_files_and_their_licence(store: Store, line: dict[str, Action]) -> None:
    text = as_text(trace(store, line["pretrain"].output))
    assert text.startswith(f"policy model {line['pretrain'].output[:12]}  pretrain\n")
    assert f"tokens: tokens {line['tokenize'].output[:12]}  tokenize" in text
    assert "1,812 documents, 20,000,000 bytes" in text
    assert "licence CC0-1.0" in text
    assert f"source books/emma.jsonl  sha256 {'e' * 12}" in text
    assert "config steps = 800" in text
    assert f"code {code_digest(line['pretrain'])[:12]} (2 definitions), torch 2.13.0" in text


def test_settings_are_written_as_in_a_pipeline_file_and_no_count_twice(store: Store) -> None:
    config = {"config.delimiter": ",", "config.deduplicate": True, "config.lr": 0.001}
    plain = {"engine": "torch", "zero_stage": 1, "ranks": 1}
    report = made(
        store, "evaluate", "report", {}, metadata={"documents": 21, "tokens": 290, "bytes": 1015}, leaves=config, operational=plain
    )
    facts = as_text(trace(store, report.output)).splitlines()[1:]
    assert facts[0].strip() == "21 documents, 290 tokens, 1,015 bytes"
    assert facts[1].endswith("2.5 s, engine torch")
    assert facts[2].strip() == 'config deduplicate = true, delimiter = ",", lr = 0.001'


def test_the_other_direction_shows_what_was_built_from_it(store: Store, line: dict[str, Action]) -> None:
    text = as_text(trace(store, line["documents"].output))
    below = text.split(f"made from documents {line['documents'].output[:12]}  documents:\n")[1]
    indents = {stage: row.index("─ ") for row in below.splitlines() for stage in ("pretrain", "evaluate") if f"  {stage}  " in row}
    assert indents["evaluate"] == indents["pretrain"] + 3
    assert below.count("  tokenizer  ") == 1


def test_an_artifact_that_is_reached_twice_is_described_once(store: Store, line: dict[str, Action]) -> None:
    text = as_text(trace(store, line["pretrain"].output))
    assert text.count("1,812 documents") == 1
    assert text.count("(shown above)") == 1


def test_without_downstream_the_lineage_has_only_inputs(store: Store, line: dict[str, Action]) -> None:
    lineage = trace_all(store, [line["pretrain"].output], downstream=False)
    assert {node.stage for node in lineage.nodes.values()} == {"documents", "tokenizer", "tokenize", "pretrain"}


def test_two_makers_of_one_artifact_are_both_shown_the_newest_first(store: Store, line: dict[str, Action]) -> None:
    tokens = line["tokenize"].output
    made(
        store,
        "pretrain",
        "model",
        {"tokens": [tokens]},
        run="r2",
        started_ms=5000,
        leaves={"config.steps": 900},
        metadata={"role": "policy"},
    )
    text = as_text(trace(store, line["pretrain"].output))
    assert text.index("by run r2") < text.index("by run r1")
    assert "with steps = 800, other code in 2 definitions" in text


def test_a_mermaid_label_cannot_break_out_of_its_quotes(store: Store) -> None:
    odd = made(store, 'a"]; click b', "documents", {}, leaves={"source.<b>|x.txt": "f" * 64})
    chart = as_mermaid(trace(store, odd.output))
    assert chart.splitlines()[0] == "flowchart TD"
    assert "a#34;#93;#59; click b" in chart
    assert "#60;b#62;#124;x.txt" in chart
    assert "<b>" not in as_html(trace(store, odd.output))


def test_an_arrow_goes_from_what_was_read_to_what_was_made_from_it(store: Store, line: dict[str, Action]) -> None:
    chart = as_mermaid(trace_all(store, [line["tokenizer"].output], downstream=False))
    named = {row.split("<br/>")[0].split('"')[1]: row.split()[0][:2] for row in chart.splitlines() if "<br/>" in row}
    assert f'    {named["documents"]} -->|"documents"| {named["tokenizer"]}' in chart.splitlines()
    assert chart.count("-->") == 2  # that, and the source into the documents


def test_an_artifact_without_a_record_says_so(store: Store) -> None:
    folder = store.new_folder()
    (folder / "file").write_text("x")
    digest = store.publish(folder, "documents", {}).digest
    assert "this store has no record of how it was made" in as_text(trace(store, digest))


def test_deleted_files_leave_their_record(store: Store, line: dict[str, Action]) -> None:
    store.backend.delete(f"artifacts/{line['tokenize'].output}/manifest.json")
    assert f"tokens {line['tokenize'].output[:12]}  tokenize  (files deleted)" in as_text(trace(store, line["pretrain"].output))


def test_counts_of_records_are_in_the_tree(store: Store) -> None:
    metadata = {
        "pairs": 760, "bytes": 81_000, "train": {"pairs": 687}, "held_out": {"pairs": 73}, "records": {"read": 999, "bad": 163},
    }  # fmt: skip
    pairs = made(store, "pairs", "preferences", {}, metadata=metadata)
    assert "760 pairs (73 held out; 163 bad), 81,000 bytes\n" in as_text(trace(store, pairs.output))


def test_the_page_has_the_picture_and_the_tree(store: Store, line: dict[str, Action]) -> None:
    page = as_html(trace(store, line["pretrain"].output))
    assert page.count("<rect") == 5
    assert "source books/emma.jsonl" in page
    both = as_html(trace_all(store, [line["pretrain"].output, line["tokenizer"].output]))
    assert "<h1>Lineage of 2 artifacts</h1>" in both
