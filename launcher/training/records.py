"""The records of a data file, one after the other, each with where it stands."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memlaunch.launcher.training.errors import JobMismatch

Record = dict[str, Any]
Numbered = Iterator[tuple[int, Record | JobMismatch]]


def read(source: str, key: str) -> Numbered:
    """(line or row from 1, record) of a ``.jsonl``, ``.csv`` or ``.parquet`` file, a folder saved by
    ``datasets``, or a hub id ``NAME:SPLIT``.

    A line that cannot be read, while those behind it may be, comes as the error that it is. ``key`` is the
    key of the job file that names the source.

    Raises:
        JobMismatch: nothing behind can be read either.
    """
    path = Path(source)
    reader = {".jsonl": _json_lines, ".csv": _csv_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if reader is not None:
        return reader(path, key)
    return enumerate(_dataset(source), start=1)


def bad_line(source: str, line: int, key: str, message: str, hint: str) -> JobMismatch:
    """An error in line ``line`` of the data."""
    return JobMismatch(key, f"{source}:{line}: {message}", hint)


def _json_lines(path: Path, key: str) -> Numbered:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _json_line(line, str(path), number, key)


def _json_line(line: bytes, source: str, number: int, key: str) -> Record | JobMismatch:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        return bad_line(source, number, key, f"not a line of JSON: {error}", "mend or remove the line")
    if not isinstance(record, dict):
        return bad_line(source, number, key, "not a JSON object", 'each line is an object, `{"text": ...}`')
    return record


def _csv_rows(path: Path, key: str) -> Numbered:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                whole = None not in record and None not in record.values()
                yield (
                    reader.line_num,
                    record
                    if whole
                    else bad_line(
                        str(path),
                        reader.line_num,
                        key,
                        "not as many fields as the header",
                        "mend the row, or quote its commas",
                    ),
                )
        except (csv.Error, UnicodeDecodeError) as error:
            raise bad_line(
                str(path), reader.line_num, key, f"not a row of CSV: {error}", "mend or remove the row"
            ) from error


def _parquet_rows(path: Path, key: str) -> Numbered:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        row = 0
        for batch in pq.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                row += 1
                yield row, record
    except (pa.ArrowException, OSError) as error:
        raise JobMismatch(key, f"{path}: not a parquet file: {error}", "write the file again") from error


def _dataset(source: str) -> Iterator[Record]:
    import datasets

    if Path(source).is_dir():
        loaded = datasets.load_from_disk(source)
        if isinstance(loaded, datasets.DatasetDict):
            raise JobMismatch(
                "data", f"{source} holds the splits {', '.join(loaded)}", "name the folder of one split"
            )
        return iter(loaded)
    name, _, split = source.rpartition(":")
    return iter(datasets.load_dataset(name, split=split))
