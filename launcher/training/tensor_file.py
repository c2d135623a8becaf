"""Writes safetensors: hashed on the way, without a copy in memory, and on the disk when done.

The format: https://huggingface.co/docs/safetensors. The files are read by the library itself.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from memlaunch.launcher.manifest import FileSum

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

#: Bytes that a save leaves free, for the lines that the run itself writes.
MARGIN = 1 << 20


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> FileSum:
    """Write ``tensors``, all in host memory, to ``path``; its size and hash.

    Raises:
        OSError: the disk is full, or cannot be written; nothing is left at ``path``.
    """
    header, ordered = _layout(tensors, metadata)
    total = len(header) + sum(tensor.nbytes for tensor in ordered)
    disk = os.statvfs(path.parent)
    if disk.f_bavail * disk.f_frsize < total + MARGIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    digest = hashlib.sha256(header)
    try:
        with path.open("wb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(header))
            for tensor in ordered:
                if tensor.nbytes:
                    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                    digest.update(raw)
                    _write_all(file.fileno(), raw)
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return FileSum(total, digest.hexdigest())


def _layout(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[Tensor]]:
    """(header with its length, the tensors in the order of the file: the widest types first, so aligned)."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end = start + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [tensors[name] for name in names]


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
