"""Data files with lines that cannot be trained on: each is named, and the job says how many may be bad."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.launcher.job import DataSection
from memlaunch.launcher.training import records, tokens
from memlaunch.launcher.training.errors import JobMismatch

GOOD = [json.dumps({"text": f"film {number}", "label": number % 2}).encode() for number in range(6)]
BAD = {
    b'{"text": "cut sh': "not a line of JSON",
    b'{"text": "caf\xe9", "label": 1}': "not a line of JSON",
    b"[1, 2]": "not a JSON object",
    b'{"label": 1}': "`text` is missing",
    b'{"text": 5, "label": 1}': "`text` is 5, not text",
    b'{"text": "no label"}': "`label` is missing",
    b'{"text": "odd", "label": -1}': "the label `label` is -1",
    b"[" * 100_000: "not a line of JSON",
}


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tokenizer_folder)


def prepare(path: Path, tokenizer: Any, bound: int) -> tokens.Tokens:
    data = DataSection(train=str(path), skip_bad_lines=bound)
    return tokens.prepare(data, "train", tokenizer, "sequence-classification", max_length=16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLAUNCH_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_ends_the_run_by_file_and_number(tmp_path: Path, tokenizer: Any, line: bytes) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join([*GOOD[:3], line, *GOOD[3:]]))
    with pytest.raises(JobMismatch, match=r"train\.jsonl:4: ") as error:
        prepare(path, tokenizer, bound=0)
    assert BAD[line] in str(error.value)
    assert error.value.key == "data.train"


def test_as_many_as_the_job_allows_are_left_out_and_told(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join([*BAD, *GOOD]))
    found = prepare(path, tokenizer, bound=len(BAD))
    assert len(found) == len(GOOD)
    for number, (told, expected) in enumerate(zip(found.skipped, BAD.values(), strict=True), start=1):
        assert told.startswith(f"{path}:{number}: ")
        assert expected in told
    with pytest.raises(JobMismatch, match=rf"train\.jsonl:{len(BAD)}: "):
        prepare(path, tokenizer, bound=len(BAD) - 1)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"".join(BAD)])
def test_a_file_without_a_record_is_refused(tmp_path: Path, tokenizer: Any, content: bytes) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(JobMismatch, match="holds no records"):
        prepare(path, tokenizer, bound=1)


def test_rows_of_csv_with_another_number_of_fields_count_too(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "train.csv"
    path.write_text("text,label\nfine,1\nbad\nworse,0,1\npoor,0\n")
    with pytest.raises(JobMismatch, match=r"train\.csv:3: not as many fields"):
        prepare(path, tokenizer, bound=0)
    assert len(prepare(path, tokenizer, bound=2)) == 2


@given(lines=st.lists(st.binary(max_size=30)))
def test_whatever_stands_in_a_file_of_lines_each_is_a_record_or_an_error_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    for number, record in records.read(str(path), "data.train"):
        assert isinstance(record, dict) or str(record).startswith(f"{path}:{number}: ")
