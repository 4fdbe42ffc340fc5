"""page.py: a run's page is one file that a browser opens without a network, and nothing from data becomes markup in it."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from typing import Any

from cluster.commit import canonical_json
from pipelines.observe.page import render
from pipelines.store.action import Action
from pipelines.store.events import Note, RunEnded, RunStarted, StageEnded
from pipelines.store.journal import JournalWriter
from pipelines.store.store import Store


def finish(store: Store, writer: JournalWriter, stage: str, kind: str, files: dict[str, str], **more: Any) -> Action:
    folder = store.new_folder()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    output = store.publish(folder, kind, more.pop("metadata", {})).digest
    action = store.record(
        Action(
            **({"inputs": {}} | more), key=f"key-{stage}", pipeline="line", stage=stage, kind=stage, run=writer.run, leaves={},
            output=output, output_kind=kind, started_ms=0, seconds=61.0, host="h", user="u", pid=1, versions={"torch": "2.13.0"},
        )
    )  # fmt: skip
    writer.write(
        StageEnded(
            stage=stage, status="done", decision="run", reason="new", key=action.key, number=action.number, output=output, seconds=61.0
        )
    )
    return action


def begin(store: Store, run: str = "r1", **fields: Any) -> JournalWriter:
    store.backend.put(f"runs/{run}/run.json", canonical_json({"run": run, "pipeline": "line", "config": {"seed": 1}, "snapshot": "c" * 64}))
    writer = JournalWriter(store, run)
    given = {"pipeline": "line", "run": run, "command": "gptline run line.toml", "user": "ada", "host": "h"}
    writer.write(RunStarted(**(given | fields)))
    return writer


class Tags(HTMLParser):
    """Collects elements that were opened but not closed, and the addresses on the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_needs_no_other_file_its_links_lead_to_itself_and_every_element_is_closed(store: Store) -> None:
    writer = begin(store)
    tokens = finish(store, writer, "tokenize", "tokens", {"train.bin": "x"})
    curve = [(step, 5.0 - step / 100, step) for step in range(0, 101, 10)]
    model = finish(
        store,
        writer,
        "pretrain",
        "model",
        {"model": "x"},
        inputs={"tokens": [tokens.output]},
        curves={"train/loss": curve, "train/lr": curve},
    )
    report = {"samples": [{"prompt": "Once", "text": "Once upon a time"}]}
    figures = {"eval/bits_per_byte": 1.75, "eval/xz_bits_per_byte": 2.58, "eval/ppmd_bits_per_byte": 1.5}
    finish(store, writer, "evaluate", "report", {"report.json": json.dumps(report)}, inputs={"model": [model.output]}, figures=figures)
    writer.write(RunEnded(status="FINISHED", exit_code=0))
    page = render(store, "r1")
    tags = Tags(page)
    assert tags.open == []
    assert {"#stages", "#lineage", "#config", "#stage-pretrain"} <= set(tags.links)
    assert {link.removeprefix("#") for link in tags.links} <= tags.ids  # every link stays on the page and leads somewhere
    assert not tags.seen & {"script", "link", "img", "iframe"}
    assert "url(" not in page
    assert "@import" not in page
    for found in (
        "1 min 01 s",
        "tokenize",
        tokens.output[:12],
        "1.750",
        "xz -9e",
        "2.580",
        "PPMd",
        "torch",
        "2.13.0",
        "ada on h",
        "c" * 64,
    ):
        assert found in page
    assert "<b>Once</b> upon a time" in page
    assert page.index("PPMd") < page.index("this model") < page.index("xz -9e")  # the shortest bar first
    assert len(re.findall("<polyline", page)) == 2


def test_markup_in_data_is_shown_as_text(store: Store) -> None:
    evil = "<script>alert(1)</script>"
    writer = begin(store, command=evil, user=evil)
    writer.write(Note(stage="evaluate", text=evil))
    report = {"samples": [{"prompt": evil, "text": f"{evil}</blockquote>"}]}
    finish(store, writer, "evaluate", "report", {"report.json": json.dumps(report)}, figures={"eval/bits_per_byte": 1.0})
    writer.write(StageEnded(stage=f"odd{evil}", status="failed", decision="run", reason=evil, error=evil))
    writer.write(RunEnded(status="FAILED", exit_code=1, text=evil))
    page = render(store, "r1")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert Tags(page).open == []


def test_questions_are_shown_beside_what_each_model_answered(store: Store) -> None:
    writer = begin(store)
    answers = {"prompt": "What does len do?", "reference": "Counts.", "answer": "Counts.", "baseline": "Cou<nts"}
    finish(store, writer, "evaluate", "report", {"report.json": json.dumps({"samples": [answers]})}, figures={"eval/exactly_right": 1.0})
    page = render(store, "r1")
    assert "<th>asked</th><th>right</th><th>this model, most likely</th><th>baseline, most likely</th>" in page
    assert "<td>What does len do?</td><td>Counts.</td><td>Counts.</td><td>Cou&lt;nts</td>" in page
    assert Tags(page).open == []


def test_the_forecast_is_shown_beside_the_duration_if_there_was_one(store: Store) -> None:
    begin(store, forecast_s=754.0).flush()
    begin(store, "r2", forecast_s=None).flush()
    assert "<dt>Forecast</dt><dd>12 min 34 s</dd>" in render(store, "r1")
    assert "Forecast" not in render(store, "r2")


def row(page: str, figure: str) -> list[str]:
    """The cells after a figure's name."""
    [found] = re.findall(rf'<th scope="row" class="metric">{figure}</th>(.*?)</tr>', page)
    return re.findall(r"<td[^>]*>(.*?)</td>", found)


def test_a_figure_is_shown_beside_the_baselines_with_its_meaning_and_not_again_if_it_has_a_bar(store: Store) -> None:
    writer = begin(store)
    figures = {
        "eval/bits_per_byte": 1.75, "eval/xz_bits_per_byte": 2.5, "eval/truncated_share": 0.02, "eval/my_own": 7.0,
        "eval/exactly_right": 0.5, "eval/best_of_exactly_right": 0.75, "eval/baseline_exactly_right": 0.25,
        "eval/kl_nats_per_response": 4.5,
    }  # fmt: skip
    finish(store, writer, "evaluate", "report", {"report.json": "{}"}, figures=figures)
    page = render(store, "r1")
    head = re.findall(r"<th>Figure</th>(.*?)</tr>", page)
    assert [re.sub("<[^>]*>", " ", each).split("  ") for each in head] == [
        [" this model", "baseline", "best of several samples", "What it means "]
    ]
    right = row(page, "eval/exactly_right")
    assert right[:3] == ["0.5", "0.25", "0.75"]
    assert right[3].startswith("Share of held-out questions whose most likely answer equals the right one to the letter")
    assert row(page, "eval/kl_nats_per_response")[:3] == ["4.5", "", ""]
    assert row(page, "eval/my_own") == ["7", "", "", ""]
    names = re.findall(r'class="metric">(.*?)</th>', page)
    assert names == ["eval/exactly_right", "eval/truncated_share", "eval/kl_nats_per_response", "eval/my_own"]
    assert "1.750" in page  # at its bar


def test_the_accuracy_of_a_pair_kind_is_shown_below_that_of_all_pairs(store: Store) -> None:
    writer = begin(store)
    figures = {"eval/rating_auc": 0.8, "eval/pair_accuracy_refusal": 0.9, "eval/pair_accuracy": 0.7}
    finish(store, writer, "reward_model", "model", {"model": "x"}, figures=figures, metadata={"role": "reward"})
    page = render(store, "r1")
    assert re.findall(r'class="metric">(.*?)</th>', page) == ["eval/pair_accuracy", "eval/pair_accuracy_refusal", "eval/rating_auc"]
    assert row(page, "eval/pair_accuracy_refusal") == ["0.9", "The same for pairs of kind refusal only."]
    assert "<span>reward model</span>" in page


def test_infinite_bits_per_byte_are_in_the_table_since_they_can_have_no_bar(store: Store) -> None:
    writer = begin(store)
    figures = {"eval/bits_per_byte": math.inf, "eval/xz_bits_per_byte": 2.5}
    finish(store, writer, "evaluate", "report", {"report.json": "{}"}, figures=figures)
    page = render(store, "r1")
    assert row(page, "eval/bits_per_byte")[0] == "infinite"
    assert row(page, "eval/xz_bits_per_byte")[0] == "2.5"
    assert 'class="bar' not in page


def test_score_and_kl_come_before_the_loss_and_the_other_curves_are_folded_by_area(store: Store) -> None:
    writer = begin(store)
    folded = ["train/lr", "train/entropy", "rollout/response_tokens", "time/step_s", "rollout/truncated_share", "reward/score_std"]
    shown = ["rollout/kl_k3_nats_per_token", "train/loss", "rollout/kl_k1_nats_per_response", "reward/score_mean"]
    curves = {name: [(0, 1.0, 0), (1, 2.0, 1)] for name in folded + shown}
    finish(store, writer, "rl", "model", {"model": "x"}, curves=curves)
    page = render(store, "r1")
    section = page.split("<h2>rl: curves over steps</h2>")[1].split("</section>")[0]
    opened, *details = section.split("<details>")
    assert re.findall(r'aria-label="(.*?) over steps"', opened) == [
        "reward/score_mean", "rollout/kl_k1_nats_per_response", "rollout/kl_k3_nats_per_token", "train/loss",
    ]  # fmt: skip
    assert [re.findall("<summary>(.*?)</summary>", each)[0] for each in details] == [
        "reward: 1 curve", "rollout: 2 curves", "time: 1 curve", "train: 2 curves",
    ]  # fmt: skip
    assert sorted(re.findall(r'aria-label="(.*?) over steps"', "".join(details))) == sorted(folded)


def test_a_stage_that_logs_neither_loss_nor_score_shows_its_curves_unfolded(store: Store) -> None:
    writer = begin(store)
    finish(store, writer, "count", "report", {"report.json": "{}"}, curves={"data/words": [(0, 1.0, 0), (1, 2.0, 1)]})
    assert "<details open><summary>data: 1 curve</summary>" in render(store, "r1")


def test_a_box_without_inputs_is_drawn_right_above_its_first_reader_and_links_to_its_stage(store: Store) -> None:
    writer = begin(store)
    documents = finish(store, writer, "documents", "documents", {"train.jsonl": "x"}, metadata={"bytes": 9, "documents": 4})
    pretrain = finish(
        store, writer, "pretrain", "model", {"model": "x"}, inputs={"documents": [documents.output]}, metadata={"role": "policy"}
    )
    talks = finish(store, writer, "talks", "conversations", {"train.jsonl": "y"})
    finish(store, writer, "sft", "model", {"model": "y"}, inputs={"policy": [pretrain.output], "conversations": [talks.output]})
    page = render(store, "r1")
    drawing = re.findall('<svg class="graph".*?</svg>', page)[0]
    at = {name: (int(x), int(y)) for x, y, name in re.findall(r'<text class="name" x="(\d+)" y="(\d+)">(\w+)</text>', drawing)}
    assert at["documents"][1] < at["pretrain"][1] == at["talks"][1] < at["sft"][1]
    assert at["pretrain"][0] != at["talks"][0]
    assert f">policy model {pretrain.output[:8]}<" in drawing
    assert ">4 documents<" in drawing
    assert sorted(re.findall('<a href="(.*?)">', drawing)) == ["#stage-documents", "#stage-pretrain", "#stage-sft", "#stage-talks"]
    assert len(re.findall("<path", drawing)) == 3


def test_a_reused_stage_shows_the_curve_of_the_action_it_reuses(store: Store) -> None:
    first = begin(store)
    made = finish(store, first, "pretrain", "model", {"model": "x"}, curves={"train/loss": [(0, 5.0, 0), (10, 4.0, 1)]})
    second = begin(store, "r2")
    second.write(
        StageEnded(
            stage="pretrain", status="reused", decision="reuse", reason="nothing changed", key=made.key, number=1, output=made.output,
            seconds=0.0,
        )
    )  # fmt: skip
    page = render(store, "r2")
    assert "pretrain: loss over steps" in page
    assert "made by run r1" in page
    assert "running" in page


def test_a_run_that_died_before_its_first_stage_has_a_page_too(store: Store) -> None:
    begin(store)
    assert Tags(render(store, "r1")).open == []


def test_counts_of_an_output_are_shown_with_its_digest(store: Store) -> None:
    writer = begin(store)
    metadata = {
        "pairs": 760, "train": {"pairs": 687, "bytes": 9}, "held_out": {"pairs": 73, "bytes": 1},
        "records": {"read": 999, "bad": 163, "duplicate": 76},
    }  # fmt: skip
    pairs = finish(store, writer, "pairs", "preferences", {"train.jsonl": "x"}, metadata=metadata)
    page = render(store, "r1")
    assert f"{pairs.output[:12]}</code>" in page
    assert '<div class="counts">760 pairs (73 held out; 163 bad, 76 duplicates)</div>' in page
    assert ">760 pairs<" in page  # in its box


def test_a_run_whose_clocks_disagree_has_no_duration(store: Store) -> None:
    writer = begin(store, time_ms=7_200_000)
    writer.write(RunEnded(time_ms=0, status="KILLED"))
    assert "<dt>Took</dt>" not in render(store, "r1")
