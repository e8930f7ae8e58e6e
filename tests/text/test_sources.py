"""Every source that needs no network, and clear errors from those that do."""

from __future__ import annotations

import gzip
import json
import sys
import sysconfig
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants as hub
import pyarrow
import pyarrow.parquet
import pytest

from sparsellm.errors import DataError
from sparsellm.text import corpora
from sparsellm.text.sources import as_text, default_source, read_source
from sparsellm.text.texts import Text

ROWS = [" = Title = ", "", " Some text , here . ", " More . "]


def test_pycode_is_the_start_of_each_module_and_holds_modules_out() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    parts = [
        read_source("pycode", split).documents
        for split in ("calibration", "evaluation")
    ]
    assert not set(parts[0]) & set(parts[1])
    assert len(parts[0]) > 4 * len(parts[1]) > 100
    every = {*parts[0], *parts[1]}
    for name in ("json/decoder.py", "textwrap.py", "email/message.py"):
        code = (root / name).read_text("utf-8")
        start = "".join(code[:8000].rpartition("\n")[:2])
        assert start in every
    for name in ("idlelib/run.py", "encodings/cp037.py", "pydoc_data/topics.py"):
        if (root / name).is_file():
            assert (root / name).read_text("utf-8")[:60] not in {
                document[:60] for document in every
            }
    assert max(map(len, every)) <= 8000


def test_a_python_without_its_sources_has_no_pycode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "abc.py").write_text("pass\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="has 1 modules of Python's standard library"):
        read_source("pycode", "calibration")


def test_pydoc_parts_share_no_paragraph_and_repeat_none() -> None:
    calibration = "\n\n".join(read_source("pydoc", "calibration").documents).split(
        "\n\n"
    )
    evaluation = "\n\n".join(read_source("pydoc", "evaluation").documents).split("\n\n")
    assert len(set(calibration)) == len(calibration)
    assert not set(calibration) & set(evaluation)
    assert (
        0.1
        < sum(map(len, evaluation))
        / (sum(map(len, evaluation)) + sum(map(len, calibration)))
        < 0.21
    )
    assert not any(
        line.strip("*") == ""
        for paragraph in calibration
        for line in paragraph.split("\n")
        if line
    )


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_a_text_file_are_documents(tmp_path: Path, end: str) -> None:
    (tmp_path / "a.txt").write_bytes((end.join(ROWS) + end).encode())
    text = read_source(str(tmp_path / "a.txt"), "evaluation")
    assert list(text.documents) == [*ROWS, ""]
    assert text.joiner.join(text.documents) == "\n\n".join([*ROWS, ""])


def test_jsonl_and_parquet_give_their_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": row, "id": 1}) + "\n" for row in ROWS) + "\n"
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ROWS, "id": [1] * 4}), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_source(str(tmp_path / name), "calibration").documents) == ROWS
    assert (
        list(read_source(f"file:{tmp_path / 'a.jsonl'}", "calibration").documents)
        == ROWS
    )


def test_a_record_without_text_gives_its_conversation(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {"text": text, "messages": turns}
        for text, turns in ((None, chat), ("a", chat), (None, None))
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_source(str(tmp_path / name), "calibration").documents) == [
            chat,
            "a",
        ]
    assert as_text(rows, "text", "calibration") == Text([chat, "a"])


def test_a_raw_wikitext_file_gives_the_rows_of_the_hub(tmp_path: Path) -> None:
    """The data set's rows keep their line ends, and are empty where the line is blank."""
    path = tmp_path / "wiki.test.raw"
    path.write_text(" \n = Title = \n \n Text . \n")
    text = read_source(f"wikitext2:{path}", "evaluation")
    assert list(text.documents) == ["", " = Title = \n", "", " Text . \n"]
    assert text.joiner.join(text.documents) == "\n\n = Title = \n\n\n\n\n Text . \n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"txt": "x"}\n', "line 1, has no field 'text'"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', "line 2, is not valid JSON"),
        ("a.jsonl", b'{"text": [1]}', "line 1, has no field 'text'"),
        ("a.jsonl", b'{"text": "a"}\xff', "not UTF-8 text"),
        ("a.txt", b"abc\xff", "not UTF-8 text .byte 3."),
        ("a.txt", "abc".encode("utf-16"), "not UTF-8 text .byte 0."),
    ],
)
def test_what_is_wrong_with_a_file_is_said(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_source(str(tmp_path / name), "calibration")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ROWS}, "no column 'text'; its columns: body"),
        ({"text": [None, b"b"]}, "row 2, has no field 'text' that holds a string"),
        (
            {"messages": ["a", "b"]},
            "row 1, has no .* list 'messages': .'messages': 'a'",
        ),
    ],
    ids=["body", "bytes", "messages"],
)
def test_a_parquet_file_without_strings_is_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read_source(str(tmp_path / "a.parquet"), "calibration")


def test_a_damaged_parquet_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS * 50}), path)
    data = path.read_bytes()
    for stop in range(0, len(data), 37):
        path.write_bytes(data[:stop])
        with pytest.raises(DataError, match="not a readable Parquet file"):
            read_source(str(path), "calibration")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wikitxt2", "did you mean 'wikitext2'"),
        ("pydoc:", "pydoc takes nothing after its name"),
        ("pycode:json", "pycode takes nothing after its name"),
        ("wikitext2:nowhere.raw", "nowhere.raw' does not exist"),
        ("file:", "is a directory"),
        (f"file:{__file__}", "not a kind of file"),
        ("hub:a/b:c:d:e", "names no data set"),
    ],
)
def test_unusable_sources_are_refused(source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_source(source, "evaluation")


@pytest.mark.parametrize(
    ("source", "split", "asked", "joiner", "per_document"),
    [
        (
            "wikitext2",
            "calibration",
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"),
            "\n\n",
            False,
        ),
        (
            "wikitext2",
            "evaluation",
            ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
            "\n\n",
            False,
        ),
        ("ptb", "calibration", ("ptb-text-only/ptb_text_only", "train"), " ", False),
        ("ptb", "evaluation", ("ptb-text-only/ptb_text_only", "test"), " ", False),
        (
            "c4",
            "calibration",
            ("allenai/c4", "train", "en/c4-train.00000-of-01024.json.gz"),
            " ",
            True,
        ),
        (
            "c4",
            "evaluation",
            ("allenai/c4", "validation", "en/c4-validation.00000-of-00008.json.gz"),
            " ",
            False,
        ),
        ("hub:a/b", "calibration", ("a/b", None, "train"), "\n\n", False),
        ("hub:a/b:c", "evaluation", ("a/b", "c", "test"), "\n\n", False),
        ("hub:a/b:c:d", "calibration", ("a/b", "c", "d"), "\n\n", False),
    ],
)
def test_sets_of_the_hub_are_read_as_the_papers_read_them(
    source: str,
    split: Any,
    asked: Any,
    joiner: str,
    per_document: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    def load_dataset(*names: Any, split: str, data_files: Any = None, **_: Any) -> Any:
        calls.append((*names, split, *(data_files or {}).values()))
        return datasets.Dataset.from_dict(
            {"sentence" if source == "ptb" else "text": ROWS}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = read_source(source, split)
    assert calls == [asked]
    assert (list(text.documents), text.joiner, text.per_document) == (
        ROWS,
        joiner,
        per_document,
    )


@pytest.mark.parametrize("source", ["wikitext2", "ptb", "c4", "hub:owner/name"])
def test_without_datasets_the_error_says_what_to_do(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(DataError, match=rf"{source}.*pip install datasets.*\.txt"):
        read_source(source, "calibration")


SHARD = gzip.compress(
    "".join(
        json.dumps({"text": f"page {number}"}) + "\n" for number in range(8)
    ).encode()
)


class StandIn(BaseHTTPRequestHandler):
    """A stand-in of the hub, which has the file of the C4 sample only."""

    asked: list[str] = []  # noqa: RUF012

    def answer(self) -> None:
        name, file, revision = corpora._C4_SAMPLE
        there = self.path == f"/datasets/{name}/resolve/{revision}/{file}"
        self.asked.append(f"{self.command} {self.path}")
        self.send_response(200 if there or self.path == "/" else 404)
        for header, value in {
            "X-Repo-Commit": revision,
            "ETag": '"1"',
            "Content-Length": str(len(SHARD)),
        }.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(SHARD)

    do_HEAD = do_GET = answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The requests that a stand-in of the hub gets, the only hub that the client knows."""
    server = HTTPServer(("127.0.0.1", 0), StandIn)
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(hub, "ENDPOINT", place)
    monkeypatch.setattr(
        hub,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        place + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(StandIn, "asked", [])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield StandIn.asked
    server.shutdown()
    server.server_close()


def test_the_default_text_is_fetched_from_the_hub_once(
    stand_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "_SAMPLED", 5)
    assert default_source(demo=True) == ("pydoc", [])
    assert stand_in == []
    assert default_source(demo=False) == ("c4-sample", [])
    asked = list(stand_in)
    assert asked
    assert list(read_source("c4-sample", "calibration").documents) == [
        f"page {number}" for number in range(5)
    ]
    assert default_source(demo=False) == ("c4-sample", [])
    assert stand_in == asked
    monkeypatch.setattr(corpora, "_C4_DOCUMENTS", 3)
    assert list(read_source("c4-sample", "evaluation").documents) == [
        "page 5",
        "page 6",
        "page 7",
    ]


def test_a_damaged_sample_is_one_line(stand_in: list[str], tmp_path: Path) -> None:
    default_source(demo=False)
    (file,) = (path for path in (tmp_path / "hub").rglob("*.json.gz"))
    with pytest.raises(DataError, match=r"not the sample of C4|not valid JSON"):
        read_source("c4-sample", "calibration")  # it ends after eight documents
    file.resolve().write_bytes(SHARD[:30])
    with pytest.raises(DataError, match="not the sample of C4"):
        read_source("c4-sample", "calibration")


def test_without_the_hub_the_default_text_is_named() -> None:
    source, (warning,) = default_source(demo=False)
    assert source == "pydoc"
    assert (
        "Python's documentation (pydoc), since no text was named and C4 cannot be fetched"
        in warning
    )
    assert "--calibration" in warning
