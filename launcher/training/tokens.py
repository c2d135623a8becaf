"""Tokenised data: made once on a machine, kept as an Arrow file, memory-mapped by every rank."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from memlaunch.launcher.training import records
from memlaunch.launcher.training.errors import JobMismatch
from memlaunch.launcher.training.tasks import CLASSIFIES, IGNORED
from memlaunch.strategies.bucketing import Packing, length_order, pack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memlaunch.launcher.job import DataSection

Ids = np.ndarray[Any, np.dtype[np.int32]]

#: Samples a record batch of the Arrow file; row i is row i % CHUNK of batch i // CHUNK.
CHUNK = 4096
#: Part of every cache key: raise it when the layout or the tokenisation changes.
LAYOUT = 5
#: The column of labels that are tokens, or stand at tokens.
LABELS = "labels"


@dataclass(frozen=True)
class Labels:
    """The distinct labels of a data file, in order of appearance, and the line each first stands in."""

    values: tuple[int | str, ...]
    lines: tuple[int, ...]


class Tokens:
    """The tokenised samples of one data file.

    Attributes:
        source: where they come from.
        lengths: tokens of each sample, those of its target included, int32, memory-mapped.
        longest: the most tokens of a text, and of a target.
        codes: index into ``labels.values`` of each sample's label, int32, memory-mapped; None where samples
            have no label as a whole.
        order: sample indices by descending length, memory-mapped, so that ranks share one copy.
        truncated: how many samples lost tokens to ``max_length``.
        skipped: what was wrong with each line that was left out.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        self.source: str = about["source"]
        self.truncated: int = about["truncated"]
        self.longest: tuple[int, int] = (about["longest"][0], about["longest"][1])
        self.skipped: list[str] = about["skipped"]
        self.labels = Labels(tuple(about["labels"]), tuple(about["label_lines"]))
        self.lengths: np.ndarray[Any, np.dtype[np.int32]] = np.load(folder / "lengths.npy", mmap_mode="r")
        self.order = np.load(folder / "order.npy", mmap_mode="r")
        codes = folder / "codes.npy"
        self.codes = np.load(codes, mmap_mode="r") if codes.exists() else None
        table = pa.ipc.open_file(pa.memory_map(str(folder / "tokens.arrow"))).read_all()
        self._chunks = [
            {name: _views(chunk.column(name)) for name in table.schema.names} for chunk in table.to_batches()
        ]
        self.fields: list[str] = [name for name in table.schema.names if name != LABELS]

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> dict[str, np.ndarray[Any, Any]]:
        """Field name -> token values of one sample, each of shape (tokens,)."""
        return {name: self._values(name, index) for name in self.fields}

    def labels_of(self, index: int) -> np.ndarray[Any, Any]:
        """The tokens of a sample's target; or for each of its tokens a label code, or ``IGNORED``."""
        return self._values(LABELS, index)

    def _values(self, name: str, index: int) -> np.ndarray[Any, Any]:
        starts, values = self._chunks[index // CHUNK][name]
        return values[starts[index % CHUNK] : starts[index % CHUNK + 1]]

    def packing(self, max_length: int, seed: int, epoch: int) -> Packing:
        """Whole samples in blocks of ``max_length`` tokens for one epoch."""
        return packing_of(self._folder, self.lengths, max_length, seed, epoch)


def prepare(
    data: "DataSection", split: str, tokenizer: "PreTrainedTokenizerBase", task: str, max_length: int
) -> Tokens:
    """The tokens of ``data.train`` or ``data.eval``, from the cache or made now.

    All ranks of a machine call it at once; the first makes the cache and the others wait at a lock, not in
    a collective, which would time out on large data.

    Raises:
        JobMismatch: a record cannot be read, lacks a column, or there is none.
    """
    source: str = getattr(data, split)
    folder = _cache_root() / _key(data, source, tokenizer, task, max_length)
    _once(folder, lambda staging: _write(staging, data, split, source, tokenizer, task, max_length))
    return Tokens(folder)


def packing_of(
    folder: Path, lengths: np.ndarray[Any, Any], max_length: int, seed: int, epoch: int
) -> Packing:
    """:func:`memlaunch.strategies.bucketing.pack`, made once on a machine below ``folder``, memory-mapped."""

    def write(staging: Path) -> None:
        for name, values in pack(lengths, max_length, seed=seed, epoch=epoch)._asdict().items():
            np.save(staging / f"{name}.npy", values)

    made = folder / f"packing-{max_length}-{seed}-{epoch}"
    _once(made, write)
    return Packing(*(np.load(made / f"{name}.npy", mmap_mode="r") for name in Packing._fields))


def _once(folder: Path, write: Callable[[Path], None]) -> None:
    """Make ``folder`` by ``write``, whole or not at all, unless it is there; others wait meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            write(staging)
            staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _cache_root() -> Path:
    if root := os.environ.get("MEMLAUNCH_CACHE"):
        return Path(root) / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memlaunch" / "tokens"


def _key(
    data: "DataSection", source: str, tokenizer: "PreTrainedTokenizerBase", task: str, max_length: int
) -> str:
    """A name that changes with anything the tokens depend on."""
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    about = {
        "layout": LAYOUT,
        "source": source,
        "files": [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        "columns": [data.text, label_column(data), target_column(data)],
        "task": task,
        "max_length": max_length,
        "skip_bad_lines": data.skip_bad_lines,
        "tokenizer": _fingerprint(tokenizer),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]


def _fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        whole = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:  # less what changes with its use
        state = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        whole = json.dumps(state, sort_keys=True)
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{type(tokenizer).__name__}{whole}{special}".encode()).hexdigest()


def _write(
    folder: Path,
    data: "DataSection",
    split: str,
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    task: str,
    max_length: int,
) -> None:
    lengths: list[np.ndarray[Any, Any]] = []
    codes: list[np.ndarray[Any, Any]] = []
    seen: dict[int | str, int] = {}
    lines: list[int] = []
    skipped: list[str] = []
    truncated = 0
    longest = [0, 0]
    sink: Any = None

    def code(label: int | str, line: int) -> int:
        if label not in seen:
            lines.append(line)
        return seen.setdefault(label, len(seen))

    with pa.OSFile(str(folder / "tokens.arrow"), "wb") as file:
        for batch in _batches(_good(source, data, split, task, skipped), CHUNK):
            fields, cut = _tokenise([record for _, record in batch], data, tokenizer, task, max_length)
            truncated += cut
            sizes = np.array([[len(ids) for ids in fields["input_ids"]], [0] * len(batch)], dtype=np.int32)
            if task == "sequence-classification":
                found = [code(_labels(source, n, r, data, split)[0], n) for n, r in batch]
                codes.append(np.array(found, dtype=np.int32))
            elif task == "token-classification":
                begun: list[list[Any]] = fields[LABELS]
                for row, (line, record) in zip(begun, batch, strict=True):
                    known = [code(label, line) for label in _labels(source, line, record, data, split)]
                    row[:] = [IGNORED if word is None else known[word] for word in row]
            elif task == "seq2seq-lm":
                sizes[1] = [len(ids) for ids in fields[LABELS]]
            longest = [max(most, int(row.max())) for most, row in zip(longest, sizes, strict=True)]
            lengths.append(sizes.sum(axis=0, dtype=np.int32))
            arrays = {name: _column(values) for name, values in fields.items()}
            table = pa.record_batch(arrays)
            sink = sink or pa.ipc.new_file(file, table.schema)
            sink.write_batch(table)
        if sink is None:
            raise JobMismatch(f"data.{split}", f"{source} holds no records", "give a file with at least one")
        sink.close()
    all_lengths = np.concatenate(lengths)
    np.save(folder / "lengths.npy", all_lengths)
    np.save(folder / "order.npy", length_order(all_lengths))
    if codes:
        np.save(folder / "codes.npy", np.concatenate(codes))
    about = {
        "source": source,
        "truncated": truncated,
        "longest": longest,
        "skipped": skipped,
        "labels": list(seen),
        "label_lines": lines,
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def _column(rows: Sequence[Sequence[int]]) -> pa.Array:
    """``rows`` as a column. ``pa.array`` would import pandas, which takes half a second and 40 MiB."""
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.fromiter(chain.from_iterable(rows), dtype=np.int32, count=starts[-1])
    inner = pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
    buffers = [None, pa.py_buffer(starts)]
    return pa.Array.from_buffers(pa.list_(pa.int32()), len(rows), buffers, children=[inner])


def _views(column: pa.Array) -> tuple[Ids, Ids]:
    """(where each row of ``column`` starts, the values of all), in its own memory; no pandas here, too."""
    assert column.offset == 0
    _, starts, _, values = column.buffers()
    return np.frombuffer(starts, np.int32), np.frombuffer(values or b"", np.int32)


def _good(
    source: str, data: "DataSection", split: str, task: str, skipped: list[str]
) -> Iterator[tuple[int, records.Record]]:
    """The numbered records that can be trained on; what is wrong with the others is added to ``skipped``.

    Raises:
        JobMismatch: there are more of those than the job allows.
    """
    for line, record in records.read(source, f"data.{split}"):
        try:
            if isinstance(record, JobMismatch):
                raise record
            _check_columns(source, line, record, data, split, task)
            if task in CLASSIFIES:
                _labels(source, line, record, data, split)
        except JobMismatch as error:
            if len(skipped) == data.skip_bad_lines:
                raise
            skipped.append(str(error))
        else:
            yield line, record


def _batches(
    numbered: Iterator[tuple[int, records.Record]], size: int
) -> Iterator[list[tuple[int, records.Record]]]:
    batch: list[tuple[int, records.Record]] = []
    for item in numbered:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_columns(
    source: str, line: int, record: records.Record, data: "DataSection", split: str, task: str
) -> None:
    words = task == "token-classification"
    wrong = None
    for column in text_columns(data):
        wrong = wrong or _wrong_text(column, record.get(column), words)
    if task in CLASSIFIES and record.get(label_column(data)) is None:
        wrong = f"`{label_column(data)}` is missing"
    if task == "seq2seq-lm":
        wrong = wrong or _wrong_text(target_column(data), record.get(target_column(data)), words=False)
    if words and wrong is None:
        labels, count = record[label_column(data)], len(record[text_columns(data)[0]])
        if not isinstance(labels, list):
            wrong = f"`{label_column(data)}` is {labels!r}, not a list with a label for each word"
        elif len(labels) != count:
            wrong = f"`{label_column(data)}` has {len(labels)} labels for {count} words"
    if wrong is not None:
        hint = "the columns are " + ", ".join(f"`{name}`" for name in record)
        raise records.bad_line(source, line, f"data.{split}", wrong, hint)


def _wrong_text(column: str, value: Any, words: bool) -> str | None:
    """What is wrong with a text, or with a list of words; None where nothing is."""
    if value is None:
        return f"`{column}` is missing"
    if not words:
        return None if isinstance(value, str) else f"`{column}` is {value!r}, not text"
    if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
        return f"`{column}` is {value!r}, not a list of words"
    return None


def _labels(
    source: str, line: int, record: records.Record, data: "DataSection", split: str
) -> list[int | str]:
    """The label of a record, or those of its words."""
    value = record[label_column(data)]
    values = value if isinstance(value, list) else [value]
    return [_label(source, line, each, data, split) for each in values]


def _label(source: str, line: int, value: Any, data: "DataSection", split: str) -> int | str:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdigit() and source.lower().endswith(".csv"):
        return int(value)  # a CSV file has no types
    if isinstance(value, str) or (isinstance(value, int) and value >= 0):
        return value
    raise records.bad_line(
        source,
        line,
        f"data.{split}",
        f"the label `{label_column(data)}` is {value!r}",
        "a class is a name or a whole number from 0",
    )


def text_columns(data: "DataSection") -> Sequence[str]:
    """The one or two text columns of the job."""
    return [data.text] if isinstance(data.text, str) else data.text


def label_column(data: "DataSection") -> str:
    """The column of the class."""
    return data.label or "label"


def target_column(data: "DataSection") -> str:
    """The column of the text that is to be written."""
    return data.target or "target"


def _tokenise(
    batch: list[records.Record],
    data: "DataSection",
    tokenizer: "PreTrainedTokenizerBase",
    task: str,
    max_length: int,
) -> tuple[dict[str, list[list[int]]], int]:
    """(field -> token values of each sample, how many samples were cut to ``max_length``).

    For a token-classification the field ``LABELS`` has the number of the word that begins at each token, or
    None; for seq2seq-lm, the tokens of the target.
    """
    texts = [[record[column] for record in batch] for column in text_columns(data)]
    words = task == "token-classification"
    fields, long = _encoded(tokenizer, texts, max_length, words, cut=task != "causal-lm")
    if task == "seq2seq-lm":
        targets = [record[target_column(data)] for record in batch]
        written, longer = _encoded(tokenizer, [targets], max_length, words, target=True)
        fields[LABELS] = written["input_ids"]
        long = sorted({*long, *longer})
    if task == "causal-lm":
        end = tokenizer.eos_token_id
        for ids in fields["input_ids"]:
            if end is not None and (not ids or ids[-1] != end):
                ids.append(end)
        fields = {"input_ids": fields["input_ids"]}
        long = [i for i, ids in enumerate(fields["input_ids"]) if len(ids) > max_length]
        for i in long:
            del fields["input_ids"][i][max_length:]
    return fields, len(long)


def _encoded(
    tokenizer: "PreTrainedTokenizerBase",
    texts: Sequence[list[Any]],
    max_length: int,
    words: bool,
    cut: bool = True,
    target: bool = False,
) -> tuple[dict[str, list[list[Any]]], list[int]]:
    """(field -> token values of each sample, the samples that are longer than ``max_length``).

    Args:
        texts: of each column, those of the samples; or lists of ``words``.
        cut: the longer ones are cut.
        target: they are what a decoder is to write.
    """

    def encode(texts: Sequence[list[Any]], **how: Any) -> dict[str, list[list[Any]]]:
        given = {"text_target": texts[0]} if target else dict(zip(("text", "text_pair"), texts, strict=False))
        encoded = tokenizer(
            **given,
            is_split_into_words=words,
            padding=False,
            return_attention_mask=False,
            verbose=False,
            **how,
        )
        fields = {name: [list(row) for row in encoded[name]] for name in encoded}
        if words:
            fields[LABELS] = [_beginnings(encoded.word_ids(index)) for index in range(len(texts[0]))]
        return fields

    # Tokenised whole, then cut: the only way to know what was cut. The overflow is counted per sample.
    fields = encode(texts, truncation=False)
    long = [index for index, ids in enumerate(fields["input_ids"]) if len(ids) > max_length]
    if long and cut:
        shorter = [[column[index] for index in long] for column in texts]
        for name, rows in encode(shorter, truncation=True, max_length=max_length).items():
            for index, row in zip(long, rows, strict=True):
                fields[name][index] = row
    return fields, long


def _beginnings(word_ids: Sequence[int | None]) -> list[int | None]:
    """The word of each token that is the first of one; None for the others."""
    return [word if word != before else None for before, word in pairwise([None, *word_ids])]


def label_names(train: Tokens, num_labels: int | None) -> list[str]:
    """The classes of a job: names in alphabetical order, or the numbers from 0.

    Raises:
        JobMismatch: names and numbers are mixed, or there are more classes than ``num_labels``.
    """
    values = train.labels.values
    names = sorted(value for value in values if isinstance(value, str))
    if names and len(names) < len(values):
        number = next(i for i, value in enumerate(values) if not isinstance(value, str))
        raise records.bad_line(
            train.source,
            train.labels.lines[number],
            "data.train",
            f"the label is the number {values[number]}, others are names",
            "use one or the other",
        )
    if names:
        classes = names
    else:
        top = max(value for value in values if isinstance(value, int))
        classes = [str(value) for value in range(max(top + 1, num_labels or 0, 2))]
    if num_labels is not None and len(classes) > num_labels:
        if names:
            raise JobMismatch(
                "model.num_labels",
                f"{train.source} has {len(names)} labels: {', '.join(names[:10])}",
                f"set `num_labels` to {len(names)}",
            )
        at = values.index(len(classes) - 1)
        raise records.bad_line(
            train.source,
            train.labels.lines[at],
            "data.train",
            f"the label is {values[at]}, out of range for num_labels {num_labels}",
            f"labels go from 0 to {num_labels - 1}; mend the line, or raise `num_labels`",
        )
    if len(classes) < 2:
        raise JobMismatch("data.train", f"{train.source} has one label only", "give at least two classes")
    return classes


def class_of_code(tokens: Tokens, classes: Sequence[str], key: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The class that each of the label codes in ``tokens.codes`` stands for.

    Raises:
        JobMismatch: a label that is not among ``classes``; ``key`` names the data file in the job.
    """
    known = {name: index for index, name in enumerate(classes)}
    ids = []
    for value, line in zip(tokens.labels.values, tokens.labels.lines, strict=True):
        if str(value) not in known:
            raise records.bad_line(
                tokens.source,
                line,
                key,
                f"the label {value!r} is not among the classes of `data.train`",
                "the classes are " + ", ".join(classes[:10]),
            )
        ids.append(known[str(value)])
    return np.array(ids, dtype=np.int64)


def summary(tokens: Tokens) -> dict[str, Any]:
    """What to tell about the data: samples, tokens, the longest sample, how many were truncated."""
    lengths = tokens.lengths
    return {
        "source": tokens.source,
        "samples": len(tokens),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "longest": int(lengths.max()),
        "truncated": tokens.truncated,
    }
