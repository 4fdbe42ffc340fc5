"""Which documents enter the artifact, which are held out, and what is counted."""

import glob
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.ingest.documents import WeightedSource
from pipelines.ingest.records import Record
from pipelines.ingest.settings import HoldOut, SourceSettings
from pipelines.ingest.splits import Splits
from pipelines.stage import StageFailure
from pipelines.stages.ingest import IngestConfig

from .conftest import rejects


def jsonl(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def texts(count: int, begin: int = 0) -> bytes:
    return jsonl(*({"text": f"text {number}"} for number in range(begin, begin + count)))


def test_the_second_of_two_equal_texts_is_dropped_and_counted(ingested):
    result = ingested({"a.jsonl": jsonl({"text": "a"}, {"text": "b"}), "b.jsonl": jsonl({"text": "a"})}, source="json")
    assert result.texts() == ["a", "b"]
    assert result.metadata("records")["duplicate"] == 1


def test_equal_texts_are_kept_on_request(ingested):
    assert ingested({"a.jsonl": jsonl({"text": "a"}, {"text": "a"})}, source="json", deduplicate=False).texts() == ["a", "a"]


def test_empty_and_short_documents_and_empty_files_are_counted(ingested):
    records = jsonl({"text": ""}, {"text": " \n"}, {"text": None}, {"text": "ab"}, {"text": "abc"})
    result = ingested({"a.jsonl": records, "empty.jsonl": b""}, source="json", min_chars=3)
    assert result.texts() == ["abc"]
    assert result.metadata("records") == {"read": 5, "bad": 0, "empty": 3, "short": 1, "duplicate": 0, "left_by_weight": 0}
    assert result.metadata("empty_files") == 1


def test_an_empty_result_fails_with_the_count_of_every_filter(ingested):
    with pytest.raises(StageFailure, match=r"no train documents are left \(records: 2 read, 0 bad, 1 empty, 1 short, .*1 empty files\)"):
        ingested({"a.jsonl": jsonl({"text": ""}, {"text": "ab"}), "b.jsonl": b""}, source="json", min_chars=3)


def test_an_empty_hold_out_fails(ingested):
    with pytest.raises(StageFailure, match=r"no held_out documents are left .*larger share"):
        ingested({"a.jsonl": texts(1)}, source="json", hold_out={"share": 0.001})


def test_the_first_bad_record_stops_the_stage_and_is_kept(ingested, output):
    with pytest.raises(StageFailure, match=r'a.jsonl, line 1, column 1 .*found 1, expected an object.*on_bad_record = "skip"'):
        ingested({"a.jsonl": b"1\n2\n"}, source="json")
    assert [(reject["source"], reject["line"], reject["byte"], reject["begins"]) for reject in rejects(output)] == [("a.jsonl", 1, 0, "1")]


def test_skipped_records_are_kept_as_rejects(ingested):
    result = ingested({"a.jsonl": texts(3) + b"[1]\n"}, source="json", on_bad_record="skip", max_bad_share=0.25)
    assert result.metadata("records")["bad"] == 1
    assert result.rejects() == [
        {
            "source": "a.jsonl",
            "record": 4,
            "line": 4,
            "column": 1,
            "byte": 57,
            "reason": "found [1], expected an object of columns, or a text",
            "begins": "[1]",
        }
    ]


def test_too_many_bad_records_fail_even_when_skipped(ingested, output):
    with pytest.raises(
        StageFailure, match=r"2 of 5 records are bad, a share of 0.4; max_bad_share allows 0.25. The first: a.jsonl, line 4"
    ):
        ingested({"a.jsonl": texts(3) + b"1\n2\n"}, source="json", on_bad_record="skip", max_bad_share=0.25)
    assert len(rejects(output)) == 2


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ("title", "T"),
        (["title", "paragraphs"], "T\na\nb"),
        ("{title} by {author}:\n{paragraphs}", "T by A:\na\nb"),
        ("{{{title}}}", "{T}"),
    ],
)
def test_columns_become_a_text(ingested, mapping, text):
    record = {"title": "T", "author": "A", "paragraphs": ["a", "b"]}
    assert ingested({"a.jsonl": jsonl(record)}, source="json", text=mapping).texts() == [text]


def test_a_record_carries_its_source_license_and_fields(ingested):
    result = ingested({"books/a.jsonl": jsonl({"text": "a", "book": "emma"})}, source="json", license="CC0-1.0", fields=["book"])
    assert (result.documents.path / "train.jsonl").read_text() == (
        '{"text": "a", "source": "books/a.jsonl", "license": "CC0-1.0", "book": "emma"}\n'
    )
    assert result.metadata("licenses") == {"CC0-1.0": {"documents": 1, "bytes": 1}}


def test_a_mixture_counts_documents_and_bytes_of_every_source(ingested):
    mixture = [{"source": "json", "files": ["a.jsonl"], "license": "MIT"}, {"source": "text", "files": ["b.txt"], "license": "CC0-1.0"}]
    result = ingested({"a.jsonl": jsonl({"text": "唐"}, {"text": "b"}), "b.txt": b"four"}, mixture=mixture)
    assert result.texts() == ["唐", "b", "four"]
    assert result.metadata("licenses") == {"CC0-1.0": {"documents": 1, "bytes": 4}, "MIT": {"documents": 2, "bytes": 4}}
    assert [source["train"]["bytes"] for source in result.metadata("sources")] == [4, 4]


def test_a_source_of_weight_two_is_repeated_whole(ingested):
    mixture = [{"source": "json", "files": ["a.jsonl"], "weight": 2.0}, {"source": "json", "files": ["b.jsonl"]}]
    result = ingested({"a.jsonl": jsonl({"text": "a"}, {"text": "b"}), "b.jsonl": jsonl({"text": "c"})}, mixture=mixture)
    assert result.texts() == ["a", "b", "a", "b", "c"]


def test_half_a_weight_takes_about_half_and_new_records_do_not_change_the_choice(ingested):
    # 1,000 draws at 1/2 have a standard deviation of 16, so 400 to 600 is more than six of them either way
    mixture = [{"source": "json", "files": ["a.jsonl"], "weight": 0.5}]
    half = ingested({"a.jsonl": texts(1000)}, mixture=mixture)
    taken = half.texts()
    assert 400 < len(taken) < 600
    assert half.metadata("records")["left_by_weight"] == 1000 - len(taken)
    assert ingested({"a.jsonl": texts(1500)}, mixture=mixture).texts()[: len(taken)] == taken


def test_weights_do_not_change_the_held_out_documents(ingested):
    def held_out(weight: float) -> list[str]:
        mixture = [{"source": "json", "files": ["a.jsonl"], "weight": weight}]
        return ingested({"a.jsonl": texts(100)}, mixture=mixture, hold_out={"share": 0.2}).texts("held_out")

    assert held_out(1.0) == held_out(0.5) == held_out(2.5)


def test_a_hold_out_by_record_takes_about_its_share(ingested):
    # 2,000 draws at 0.1: 200 expected, a standard deviation of 13
    result = ingested({"a.jsonl": texts(2000)}, source="json", hold_out={"share": 0.1})
    assert 120 < len(result.texts("held_out")) < 280
    assert not set(result.texts()) & set(result.texts("held_out"))


def test_another_seed_draws_another_hold_out(ingested):
    draws = [ingested({"a.jsonl": texts(200)}, source="json", hold_out={"share": 0.3}, seed=seed).texts("held_out") for seed in (1, 2)]
    assert draws[0] != draws[1]


@settings(max_examples=40)
@given(st.sets(st.text(min_size=1), min_size=1, max_size=20), st.sets(st.text(min_size=1), max_size=20))
def test_new_records_move_no_record_to_the_other_side(tmp_path_factory, some, more):
    def held_out(contents: set[str]) -> set[str]:
        folder = tmp_path_factory.mktemp("splits")
        with Splits(folder, HoldOut(share=0.5), seed=1, unit="documents") as splits, splits.source(WeightedSource()):
            for text in sorted(contents):
                splits.add(
                    Record(
                        text.encode("utf-8", "replace"), {"text": text}, json.dumps({"text": text}).encode() + b"\n", repr(text).encode()
                    )
                )
        return {json.loads(line)["text"] for line in (folder / "held_out.jsonl").open()}

    assert held_out(some) == held_out(some | more) & some


def test_a_hold_out_by_field_keeps_one_value_on_one_side(ingested):
    records = [{"text": f"{book} {chapter}", "book": book} for book in range(40) for chapter in range(5)]
    result = ingested({"a.jsonl": jsonl(*records)}, source="json", hold_out={"share": 0.3, "by": "book"})
    train, held_out = ({text.split()[0] for text in result.texts(split)} for split in ("train", "held_out"))
    assert train
    assert held_out
    assert not train & held_out


def test_a_hold_out_by_source_keeps_a_file_on_one_side(ingested):
    files = {f"{name}.txt": b"one %d\ntwo %d\n" % (name, name) for name in range(20)}
    result = ingested(files, source="text", unit="line", hold_out={"share": 0.3, "by": "source"})
    assert 0 < len(result.texts("held_out")) < 40
    assert len(result.texts("held_out")) % 2 == 0


def test_a_hold_out_by_a_field_that_is_missing_names_the_columns(ingested):
    with pytest.raises(StageFailure, match=r"line 1, .*no column 'book'; there are: text"):
        ingested({"a.jsonl": texts(1)}, source="json", hold_out={"share": 0.5, "by": "book"})


def test_the_last_tenth_of_a_text_file_is_held_out_to_the_byte(ingested):
    result = ingested({"a.txt": b"0123456789" * 10}, source="text", hold_out={"last": 0.1})
    assert result.texts() == ["0123456789" * 9]
    assert result.texts("held_out") == ["0123456789"]


def test_the_cut_never_splits_a_character(ingested):
    # 3 characters of 3 bytes: half of 9 bytes is inside the second, which goes to the held-out side as a whole
    result = ingested({"a.txt": "唐诗宋".encode()}, source="text", hold_out={"last": 0.5})
    assert (result.texts(), result.texts("held_out")) == (["唐"], ["诗宋"])


def test_the_last_share_of_records_is_whole_records(ingested):
    # 10 records of 6 bytes: the cut after 45 of 60 bytes is inside the eighth, which stays in training
    result = ingested({"a.jsonl": texts(10)}, source="json", hold_out={"last": 0.25})
    assert result.texts("held_out") == ["text 8", "text 9"]


def test_every_source_of_a_mixture_gives_its_last_share(ingested):
    mixture = [{"source": "text", "files": ["a.txt"], "weight": 2.0}, {"source": "text", "files": ["b.txt"]}]
    result = ingested({"a.txt": b"aaab", "b.txt": b"cccd"}, mixture=mixture, hold_out={"last": 0.25})
    assert (result.texts(), result.texts("held_out")) == (["aaa", "aaa", "ccc"], ["b", "d"])


def test_files_are_read_in_natural_order(data):
    for number in (10, 9, 1):
        (data / f"part-{number}.txt").write_text("text")
    config = IngestConfig(source="text", files=["part-9.txt", "*.txt"])
    assert [source.name for source in config.sources(data)] == ["part-9.txt", "part-1.txt", "part-10.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("book/*.jsonl", r"nothing matches 'book/\*.jsonl' .* has .*books"),
        ("books/b.jsonl", r"nothing matches 'books/b.jsonl' .*books has a.jsonl"),
        ("books", r"'books' is a folder, expected files, for instance 'books/\*'"),
        ("dead", "'dead' is a link to nowhere.txt, which doesn't exist"),
        ("a[1].txt", r"'a\[1\].txt' is a pattern, because of its brackets or stars; 'a\[\[\]1\].txt' is the file of that very name"),
        ("pipe", "'pipe' is no regular file"),
        ("*.tar.gz", "c.tar.gz: an archive of files, which isn't read; unpack it first"),
    ],
)
def test_a_missing_or_unreadable_file_is_reported_with_the_nearest_names(data, pattern, message):
    (data / "books").mkdir()
    (data / "dead").symlink_to("nowhere.txt")
    os.mkfifo(data / "pipe")
    for name in ("books/a.jsonl", "a[1].txt", "c.tar.gz"):
        (data / name).write_text("")
    with pytest.raises(ValueError, match=message):
        IngestConfig(source="json", files=[pattern]).sources(data)


def test_a_file_whose_name_is_not_utf8_is_refused_before_it_is_read(data):
    name = os.fsdecode(b"b\xff.txt")
    (data / name).write_text("text")
    with pytest.raises(ValueError, match="its name is not UTF-8, and no record could hold it; rename it"):
        IngestConfig(source="text", files=["*.txt"]).sources(data)


def test_links_that_form_a_cycle_yield_each_file_once_under_its_own_name(data):
    (data / "books").mkdir()
    for name in ("b.txt", "books/a.txt", "books/c.txt"):
        (data / name).write_text(name)
    for link, to in (("again", "."), ("books/2up", ".."), ("books/3up", ".."), ("1books", "books")):
        (data / link).symlink_to(to)
    for pattern in ("**/*.txt", "**", "**/**/*.txt"):
        assert SourceSettings(files=(pattern,)).expand(data) == ["b.txt", "books/a.txt", "books/c.txt"]
    assert SourceSettings(files=("books/**/*.txt",)).expand(data) == ["books/2up/b.txt", "books/a.txt", "books/c.txt"]
    assert SourceSettings(files=("b*/c.txt", "1books/*.txt")).expand(data) == ["books/c.txt", "1books/a.txt"]


@pytest.fixture
def elsewhere(data, tmp_path):
    """A folder beside the data folder, to which two links in the data folder lead."""
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for name in ("one.txt", "deep/two.txt"):
        (tmp_path / "elsewhere" / name).write_text(name)
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "three.txt").symlink_to(tmp_path / "elsewhere" / "one.txt")
    return tmp_path / "elsewhere"


def test_links_to_files_and_folders_elsewhere_are_followed_on_request(data, tmp_path, elsewhere):
    def expand(*patterns: str, root=data) -> list[str]:
        return SourceSettings(files=patterns, follow_links=True).expand(root)

    assert expand("linked/**/*.txt") == ["linked/deep/two.txt", "linked/one.txt"]
    assert expand("**/two.txt", "*.txt") == ["linked/deep/two.txt", "three.txt"]
    assert expand(f"{data}/**/*.txt", root=tmp_path) == [f"{data}/linked/deep/two.txt", f"{data}/linked/one.txt"]


@pytest.mark.parametrize("pattern", ["three.txt", "*.txt", "linked/one.txt", "**/*.txt", "{data}/*.txt", "{data}/linked/deep/*"])
def test_a_link_out_of_the_data_folder_is_refused(data, elsewhere, pattern):
    with pytest.raises(ValueError, match=r"a link that leads out of .*/data, to .*/elsewhere/.*; set follow_links = true"):
        SourceSettings(files=(pattern.format(data=data),)).expand(data)


def test_files_elsewhere_can_be_named_and_links_inside_the_data_folder_are_followed(data, elsewhere):
    assert SourceSettings(files=(f"{elsewhere}/*.txt",)).expand(data) == [f"{elsewhere}/one.txt"]
    assert SourceSettings(files=("../elsewhere/*.txt",)).expand(data) == ["../elsewhere/one.txt"]
    (data / "own.txt").write_text("own")
    (data / "alias.txt").symlink_to("own.txt")
    assert SourceSettings(files=("alias.txt",)).expand(data) == ["alias.txt"]


def test_a_data_folder_that_is_itself_a_link_is_accepted(data, tmp_path):
    (data / "a.txt").write_text("a")
    (tmp_path / "again").symlink_to(data)
    assert SourceSettings(files=("*.txt",)).expand(tmp_path / "again") == ["a.txt"]


def test_a_tilde_means_the_home_folder(data, monkeypatch):
    (data / "a.txt").write_text("a")
    monkeypatch.setenv("HOME", str(data))
    assert SourceSettings(files=("~/*.txt",)).expand(data / "elsewhere") == [f"{data}/a.txt"]


def test_two_stars_match_folders_as_in_glob(data):
    (data / ".hidden").mkdir()
    (data / "a" / "b").mkdir(parents=True)
    for name in (".hidden/1.txt", "2.txt", "a/3.txt", "a/b/4.txt", "a/b/.5.txt"):
        (data / name).write_text(name)
    for pattern in ("**", "**/*.txt", "a/**", "a/**/b/*.txt", "*/**/*.txt", "**/b/**", "a**/3.txt", "./**/*.txt", "a//**/*.txt"):
        expected = {os.path.normpath(name) for name in glob.glob(pattern, root_dir=data, recursive=True) if (data / name).is_file()}
        assert {os.path.normpath(name) for name in SourceSettings(files=(pattern,)).expand(data)} == expected


def test_a_missing_data_folder_is_reported_as_such(data):
    with pytest.raises(ValueError, match=r"the data folder .*/elsewhere doesn't exist; set `data` to the folder that has 'a.txt'"):
        IngestConfig(source="text", files=["a.txt"]).sources(data / "elsewhere")


def test_all_missing_files_are_named_at_once(data):
    with pytest.raises(ValueError, match=r"'a.txt'.*'b.txt'"):
        IngestConfig(source="text", files=["a.txt", "b.txt"]).sources(data)


def test_a_file_in_two_sources_of_a_mixture_is_refused(data):
    (data / "a.txt").write_text("")
    config = IngestConfig(mixture=[{"source": "text", "files": ["*.txt"]}, {"source": "text", "files": ["a.txt"]}])
    with pytest.raises(ValueError, match=r"a\.txt is in two sources of the mixture"):
        config.sources(data)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "expected source"),
        ({"source": "text"}, "expected source .* and files"),
        ({"source": "text", "files": ["a"], "fields": ["book"]}, r"fields = \('book',\) has no effect with source = \"text\""),
        ({"source": "json", "files": ["a"], "unit": "line"}, "unit = 'line' has no effect"),
        ({"source": "csv", "files": ["a"], "delimiter": "::"}, "delimiter\n.*is '::', expected one character"),
        ({"source": "csv", "files": ["a"], "delimiter": ""}, "is '', expected one character"),
        ({"source": "csv", "files": ["a"], "delimiter": '"'}, "is '\"', expected one character that is neither a quote"),
        ({"source": "csv", "files": ["a"], "delimiter": "\n"}, r"is '\\n', expected one character that is neither a quote nor a line end"),
        (
            {"source": "json", "files": ["a"], "text": "{title:upper}"},
            "text: template '{title:upper}': found the conversion 'upper', expected one of letters, letter, index, from_1",
        ),
        ({"source": "json", "files": ["a"], "text": []}, r"text = \(\) is empty, expected a column, several columns, or a template"),
        ({"source": "json", "files": ["a"], "text": ["title", "{}"]}, "text: template '{}': expected a column or path between braces"),
        ({"source": "json", "files": ["a"], "text": "{title"}, "text: template '{title': '{' is never closed"),
        ({"source": "json", "files": ["a"], "fields": ["source"]}, "'source' is a key of every record already"),
        ({"source": "json", "files": ["a"], "hold_out": {}}, "either share or last"),
        ({"source": "json", "files": ["a"], "hold_out": {"last": 0.1, "by": "book"}}, "has no effect with last"),
        ({"source": "json", "mixture": [{"source": "json", "files": ["a"]}]}, "source stands beside mixture"),
        ({"source": "json", "files": ["a"], "dedup": True}, "dedup"),
    ],
)
def test_invalid_settings_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        IngestConfig(**keys)


def test_a_resolved_config_reads_back_as_itself():
    config = IngestConfig(source="text", files=["a.txt"], hold_out={"last": 0.1})
    assert IngestConfig(**json.loads(config.model_dump_json())) == config


def test_progress_ends_at_the_sources_size(ingested):
    result = ingested({"a.txt": b"text", "b.txt": b"other"}, source="text")
    assert result.stage.reported[-1] == (9, 9, "bytes")


def test_only_the_three_files_are_left_in_the_output(ingested):
    result = ingested({"a.txt": b"text"}, mixture=[{"source": "text", "files": ["a.txt"], "weight": 3}])
    assert sorted(path.name for path in result.stage.output.iterdir()) == ["held_out.jsonl", "rejects.jsonl", "train.jsonl"]


def test_each_part_of_a_mixture_reads_what_its_own_glob_found(tmp_path):
    """A glob leaves out hidden files, so "*" in the first part does not match the second part's file."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.txt").write_text("one")
    (tmp_path / "m" / ".h.txt").write_text("two")
    parts = [{"source": "text", "files": ["m/*"], "license": "A"}, {"source": "text", "files": ["m/.h.txt"], "license": "B"}]
    config = IngestConfig.model_validate({"mixture": parts})
    assert [(source.name, source.part) for source in config.sources(tmp_path)] == [("m/a.txt", 0), ("m/.h.txt", 1)]
