"""What is known of a data file without reading all of it: its columns, and the first record."""

import contextlib
import csv
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memlaunch.launcher.keys import closest
from memlaunch.launcher.paths import BadPath, beside, kind

_HUB_SPLIT = re.compile(r"[\w.-]+(/[\w.-]+)?:[\w.+-]+(\[[^\]]*\])?")

Record = dict[str, Any]


def locate(path: str, base: Path = Path()) -> Path | None:
    """The file or folder that ``path`` of a job file names, or None for a split on the Hugging Face hub.

    Raises:
        BadPath: there is no such file, or none that can be read.
    """
    file = beside(path, base)
    found = kind(file)
    if file.suffix.lower() in _READERS:
        if found == "file":
            return file
        if found == "folder":
            raise BadPath(f"`{path}` is a folder", "give a file, or a folder saved by `datasets`")
        raise BadPath(f"there is no file `{path}`", _files_near(path, file))
    if found == "folder":
        return file
    if found == "file":
        hint = "a file ends in `.jsonl`, `.csv` or `.parquet`"
        if file.suffix == ".json":
            hint = "write one object a line and call it `.jsonl`"
        raise BadPath(f"`{path}` is a kind of file that is not known", hint)
    if _HUB_SPLIT.fullmatch(path) and not path.startswith("."):
        return None
    hint = (
        "give a `.jsonl`, `.csv` or `.parquet` file, a folder saved by `datasets`, or `NAME:SPLIT` of the hub"
    )
    raise BadPath(f"there is no file or folder `{path}`", hint)


def first_record(file: Path) -> Record:
    """The first record of ``file``: column -> value.

    Of a folder saved by ``datasets`` a value is only of the column's type, such as ``""`` for any text;
    None where the type is none that training uses.

    Raises:
        BadPath: the file is empty, or not what its name says.
    """
    reader = _saved_folder if file.is_dir() else _READERS[file.suffix.lower()]
    try:
        return reader(file)
    except OSError as error:
        raise BadPath(f"cannot be read: {error.strerror or error}", "look at the permissions") from None


def records(file: Path, most: int) -> list[Record]:
    """The first records of ``file``, at most so many, less the lines that are none; else as for
    :func:`first_record`.
    """
    first = first_record(file)
    found = []
    if file.suffix.lower() == ".jsonl":
        with file.open("rb") as lines:
            for line in itertools.islice(lines, most):
                with contextlib.suppress(ValueError, RecursionError):
                    found.append(json.loads(line))
    elif file.suffix.lower() == ".csv":
        with file.open(encoding="utf-8-sig", newline="", errors="replace") as stream:
            found = list(itertools.islice(csv.DictReader(stream), most))
    elif file.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        found = next(pq.ParquetFile(file).iter_batches(batch_size=most)).to_pylist()
    whole = [record for record in found if isinstance(record, dict) and record.keys() == first.keys()]
    return whole or [first]


def _json_lines(file: Path) -> Record:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                hint = "each line is one object, `{...}`"
                if line.strip() in (b"[", b"{"):
                    hint = "write each record in one line, without a list around them"
                raise BadPath(f"is not JSON in line {number}", hint) from None
            if not isinstance(record, dict):
                raise BadPath(f"has no object in line {number}", 'each line is an object, `{"text": ...}`')
            return record
    raise BadPath("is empty", "give a file with at least one record")


def _csv(file: Path) -> Record:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            record = next(reader, None)
            if not reader.fieldnames:
                raise BadPath("is empty", "begin with a line of column names")
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadPath(f"is not CSV in UTF-8: {error}", "save it as UTF-8") from None
    if record is None:
        raise BadPath("has column names but no records", "give a file with at least one record")
    return {str(name): value for name, value in record.items() if name is not None}


def _parquet(file: Path) -> Record:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batch = next(pq.ParquetFile(file).iter_batches(batch_size=1), None)
    except (pa.ArrowException, ValueError):
        raise BadPath("is not a parquet file", "write it again") from None
    if batch is None or not batch.num_rows:
        raise BadPath("is empty", "give a file with at least one record")
    record: Record = batch.to_pylist()[0]
    return record


def _saved_folder(folder: Path) -> Record:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
        names = ", ".join(f"`{name}`" for name in splits)
        raise BadPath(f"holds several splits: {names}", "name the folder of one of them")
    try:
        features = json.loads((folder / "dataset_info.json").read_bytes())["features"]
        state = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        hint = "use `save_to_disk` of `datasets`, or name one file"
        raise BadPath("is not a folder saved by `datasets`", hint) from None
    if not features or not state.get("_data_files"):
        raise BadPath("is empty", "save a data set with at least one record")
    return {name: _example(feature) for name, feature in features.items()}


def _example(feature: Any) -> Any:
    """A value of the type that ``dataset_info.json`` gives for a column."""
    if isinstance(feature, list):
        return [_example(each) for each in feature]
    if isinstance(feature, dict) and feature.get("_type") in ("List", "LargeList", "Sequence"):
        return [_example(feature.get("feature"))]
    kind = feature.get("dtype", "") if isinstance(feature, dict) else ""
    if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
        return 0
    if kind in ("string", "large_string"):
        return ""
    if kind.startswith(("int", "uint")):
        return 0
    return {"bool": False, "float32": 0.0, "float64": 0.0}.get(kind)


def _files_near(path: str, file: Path) -> str:
    if not file.parent.is_dir():
        return f"there is no folder `{file.parent.name}` either; paths are relative to the job file"
    names = sorted(other.name for other in file.parent.iterdir() if other.suffix.lower() in _READERS)
    if close := closest(file.name, names):
        return f"did you mean `{Path(path).with_name(close)}`?"
    return "paths are relative to the job file"


_READERS: dict[str, Callable[[Path], Record]] = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}

#: How the names of the files end that can be read.
SUFFIXES = frozenset(_READERS)
