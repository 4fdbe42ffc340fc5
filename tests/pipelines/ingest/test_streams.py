"""What comes before the format: compression, archives, encodings, and files that aren't what their name says."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pyarrow
import pytest

from pipelines.ingest.streams import likely_encoding
from pipelines.stage import StageFailure

MIB = 2**20


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, "zstd", asbytes=True)


def zipped(**members: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


# ---- compression ----


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz"), (zstd, "zst")])
def test_compressed_files_read_like_plain_ones_even_in_several_frames(ingested, compress, suffix):
    assert ingested({f"a.jsonl.{suffix}": compress(b'{"text": "a"}')}, source="json").texts() == ["a"]
    assert ingested({f"A.TXT.{suffix.upper()}": compress(b"one\n") + compress(b"two")}, source="text").texts() == ["one\ntwo"]


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz"), (zstd, "zst")])
def test_a_truncated_file_is_named(ingested, compress, suffix):
    with pytest.raises(StageFailure, match=rf"a.txt.{suffix}: can't be decompressed after byte [0-9,]+ of its content: "):
        ingested({f"a.txt.{suffix}": compress(bytes(range(32, 120)) * 1000)[:-9]}, source="text")


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst", "zip"])
def test_an_empty_file_has_no_records_whatever_its_extension(ingested, suffix):
    result = ingested({f"a.txt.{suffix}": b"", "b.txt": b"b"}, source="text")
    assert (result.texts(), result.metadata("empty_files")) == (["b"], 1)


@pytest.mark.parametrize(("compress", "suffix"), [(gzip.compress, "gz"), (zstd, "zst"), (lambda data: zipped(**{"b.txt": data}), "zip")])
def test_a_compressed_file_that_grows_beyond_the_ceiling_is_refused_with_both_numbers(ingested, compress, suffix):
    # 20 MiB of one letter: far more than 100 times its size, and more than the 16 MiB that are always allowed
    data = compress(b"x" * 20 * MIB)
    with pytest.raises(StageFailure, match=rf"a.{suffix}: {len(data):,} compressed bytes grow to more than 16,777,216: .*max_growth"):
        ingested({f"a.{suffix}": data}, source="text", max_record_bytes=32 * MIB)
    assert len(ingested({}, files=[f"a.{suffix}"], source="text", max_record_bytes=32 * MIB, max_growth=100_000).texts()[0]) == 20 * MIB


def test_the_members_of_an_archive_share_one_ceiling(ingested):
    members = {f"{number}.txt": b"x" * 6 * MIB for number in range(3)}
    with pytest.raises(StageFailure, match=r"a.zip: .* grow to more than 16,777,216"):
        ingested({"a.zip": zipped(**members)}, source="text")


def test_a_zip_archives_members_are_read_in_the_order_of_their_names(ingested):
    members = {"d/10.jsonl": b'{"text": "ten"}', "d/2.jsonl": b'{"text": "two"}', "e.jsonl.gz": gzip.compress(b'{"text": "e"}')}
    members |= {"__MACOSX/d/2.jsonl": b"noise", "d/.hidden": b"noise"}
    result = ingested({"a.zip": zipped(**members)}, source="json")
    assert [(record["text"], record["source"]) for record in result.documents.records("train")] == [
        ("two", "a.zip/d/2.jsonl"),
        ("ten", "a.zip/d/10.jsonl"),
        ("e", "a.zip/e.jsonl.gz"),
    ]


def test_a_fault_inside_an_archive_names_the_member(ingested):
    with pytest.raises(StageFailure, match=r"a.zip/b.jsonl, line 2, column 1"):
        ingested({"a.zip": zipped(**{"b.jsonl": b'{"text": "a"}\noops\n'})}, source="json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\3\4 no more", "a.zip: not readable as zip"),
        (b"plain text", "a.zip: not readable as zip"),
        (zipped(), "a.zip: not readable as zip|the archive has no files"),
        (zipped(**{"b.zip": zipped(**{"c": b"c"})}), "a.zip/b.zip: an archive inside an archive"),
    ],
)
def test_an_archive_that_cannot_be_read_is_named(ingested, content, message):
    with pytest.raises(StageFailure, match=message):
        ingested({"a.zip": content}, source="text")


# ---- files that aren't what their name says ----


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"{}", mtime=0), r"is gzip data: rename it so that it ends with \.gz"),
        (zstd(b"{}"), r"is zstd data: rename it so that it ends with \.zst"),
        (lzma.compress(b"{}"), r"is xz data: rename it so that it ends with \.xz"),
        (bz2.compress(b"{}"), r"is bzip2 data: rename it so that it ends with \.bz2"),
        (b"\x04\x22\x4d\x18\x64\x40", "is lz4 data: decompress it first"),
        (b"a.txt" + b"\0" * 252 + b"ustar\x0000", "is a tar archive: unpack it first"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "is an XML document, perhaps an error page"),
        (zipped(a=b"{}"), r"is a zip archive: rename it so that it ends with \.zip"),
        (b"PAR1\x15\x04", 'is a Parquet file: set source = "parquet"'),
        (b"%PDF-1.7", "is a PDF: extract its text first"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "is a Git LFS pointer .* `git lfs pull`"),
        (b"\n<!DOCTYPE html>\n<html>", "is an HTML page, .*download the file again"),
        (b"<html><head>", "is an HTML page"),
    ],
)
@pytest.mark.parametrize("source", ["json", "csv"])
def test_a_file_of_another_kind_is_refused_by_what_it_is(ingested, source, content, message):
    with pytest.raises(StageFailure, match=f"a.data: {message}"):
        ingested({"a.data": content}, source=source)
    with pytest.raises(StageFailure, match=f"a.gz: {message}"):
        ingested({"a.gz": gzip.compress(content)}, source=source)


def test_an_html_page_may_be_read_as_text_but_a_git_lfs_pointer_may_not(ingested):
    assert ingested({"a.html": b"<html>x</html>"}, source="text").texts() == ["<html>x</html>"]
    with pytest.raises(StageFailure, match="a Git LFS pointer"):
        ingested({"a.txt": b"version https://git-lfs.github.com/spec/v1\n"}, source="text")


# ---- encodings ----


@pytest.mark.parametrize("encoding", ["gbk", "big5", "utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_another_encoding_is_read_as_its_characters(ingested, encoding):
    text = "唐詩\n宋詞\n"
    if encoding == "gbk":
        text = "唐诗\n宋词\n"
    assert ingested({"a.txt": text.encode(encoding)}, source="text", unit="line", encoding=encoding).texts() == text.split()
    table = json.dumps({"text": text}, ensure_ascii=False).encode(encoding)
    assert ingested({"a.jsonl": table}, source="json", encoding=encoding).texts() == [text]


def test_a_character_across_two_pieces_is_decoded(ingested):
    # 1 MiB is a piece: with 3 bytes before it, a character of 2 bytes lies across its end
    text = "abc" + "唐" * MIB
    assert ingested({"a.txt": text.encode("gbk")}, source="text", encoding="gbk").texts() == [text]


def test_bytes_that_are_invalid_in_the_encoding_are_reported_or_replaced(ingested):
    content = "好\n".encode("gbk") + b"a\xff\n"
    with pytest.raises(StageFailure, match=r"a.txt, line 2, column 2 .*: invalid gbk: 0xff\. Fix"):
        ingested({"a.txt": content}, source="text", unit="line", encoding="gbk")
    result = ingested({"a.txt": content}, source="text", unit="line", encoding="gbk", encoding_errors="replace")
    assert (result.texts(), result.metadata("replaced_characters")) == (["好", "a\ufffd"], 1)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("中文测试\n第二行", "gbk"),
        ("café\nnaïve", "latin-1"),
        ("Größe und Maß", "latin-1"),
        ("naïve naïve", "latin-1"),
        ("“quoted” – so", "cp1252"),
        ("hello 世界", "utf-16"),
        ("hello, world", "utf-16-le"),
        ("hello, world", "utf-16-be"),
    ],
)
def test_the_likely_encoding_of_bytes_that_are_not_utf8_is_guessed(text, encoding):
    assert likely_encoding(text.encode(encoding)) == encoding


@pytest.mark.parametrize("content", ["こんにちは世界".encode("shift-jis"), b"\x93NUMPY\x01\0\xff", bytes(range(256))])
def test_no_encoding_is_guessed_for_what_is_neither_western_nor_chinese(ingested, content):
    assert likely_encoding(content) == ""
    with pytest.raises(StageFailure, match=r"invalid UTF-8: 0x..; if this is text, set encoding to what it is in\. Fix"):
        ingested({"a.txt": content}, source="text")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "gbk"])
def test_an_encoding_that_would_make_other_characters_of_utf8_is_refused(ingested, encoding):
    with pytest.raises(StageFailure, match=f'a.txt: is UTF-8 already, and encoding = "{encoding}" would make other characters of it'):
        ingested({"a.txt": "Größe und Maß, déjà vu, naïve façade, œuvre, señor, über".encode()}, source="text", encoding=encoding)


@pytest.mark.parametrize(
    ("text", "encoding"), [("Größe und Maß, déjà vu, naïve façade, señor, über", "latin-1"), ("联通" * 20, "gbk"), ("唐" * 20, "utf-16")]
)
def test_a_text_in_the_encoding_that_is_set_is_no_utf8_by_chance(ingested, text, encoding):
    assert ingested({"a.txt": text.encode(encoding)}, source="text", encoding=encoding).texts() == [text]


def test_a_short_text_is_read_in_the_encoding_that_is_set(ingested):
    assert ingested({"a.txt": "Ã©".encode("latin-1")}, source="text", encoding="latin-1").texts() == ["Ã©"]  # which UTF-8 has too


@pytest.mark.parametrize(("text", "encoding"), [("中文测试", "gbk"), ("café", "latin-1"), ("café", "utf-16")])
@pytest.mark.parametrize("source", ["text", "csv", "json"])
def test_invalid_utf8_hints_at_the_encoding(ingested, source, text, encoding):
    content = {"text": text, "csv": f"text\n{text}", "json": json.dumps({"text": text}, ensure_ascii=False)}[source].encode(encoding)
    with pytest.raises(StageFailure, match=rf'invalid UTF-8: 0x..; it looks like {encoding}: set encoding = "{encoding}"'):
        ingested({"a": content}, source=source)


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_a_lone_cr_ends_a_line_if_a_file_has_no_other_line_ends(ingested, unit):
    unix = b"one\ntwo\n\nthree\n"
    result = ingested({"a.txt": unix, "b.txt": unix.replace(b"\n", b"\r")}, source="text", unit=unit, deduplicate=False)
    texts = result.texts()
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]


def test_a_lone_cr_is_a_character_if_a_file_has_other_line_ends(ingested):
    assert ingested({"a.txt": b"10 %\r20 %\ndone"}, source="text", unit="line").texts() == ["10 %\r20 %", "done"]
