"""What ``memlaunch doctor`` runs on a node: it answers questions about the node, a JSON object a line.

It goes there as text, so it must do without anything of ours, whatever is installed: at its top it imports
the standard library alone. A line of standard input is a question, ``{"do": NAME, ...}``, where NAME is one
of ``QUESTIONS`` and the rest are its arguments; its answer is a line of standard output behind ``MARK``, and
has an ``error`` where it could not be answered. The end of standard input ends the program at once.
"""

import contextlib
import importlib.util
import json
import os
import platform
import queue
import socket
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

#: Stands before our lines, among whatever else a node prints.
MARK = "@memlaunch-doctor "

#: Seconds that a file which another machine wrote may take to show, and a connection to stand.
PATIENCE = 10.0


def clock() -> dict[str, Any]:
    """The time of day here, in seconds."""
    return {"time": time.time()}


def survey(packages: list[str], paths: list[str], gpus: bool) -> dict[str, Any]:
    """What is installed here, what can be read, and which GPUs there are, where ``gpus`` asks for them."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = None
    return {
        "host": socket.gethostname(),
        "address": address,
        "versions": {"Python": platform.python_version(), **{name: _version(name) for name in packages}},
        "paths": {path: look(path) for path in paths},
        "gpus": _gpus() if gpus else None,
    }


def look(path: str) -> dict[str, Any]:
    """The bytes of a file, or of the files of a folder, each of which is opened; ``error`` if one cannot be.

    ``package:NAME/FOLDER`` is a folder of an installed package.
    """
    place = Path(path)
    if path.startswith("package:"):
        name, _, folder = path.partition(":")[2].partition("/")
        found = importlib.util.find_spec(name)
        if found is None or not found.submodule_search_locations:
            return {"error": f"the package {name} is not installed"}
        place = Path(next(iter(found.submodule_search_locations)), folder)
    try:
        size = 0
        for file in [inner for inner in place.iterdir() if inner.is_file()] if place.is_dir() else [place]:
            with file.open("rb") as stream:
                stream.read(1)
            size += file.stat().st_size
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {"size": size}


def share(folder: str, token: str, name: str) -> dict[str, Any]:
    """Whether the ``token`` in ``folder`` is read here; answered with it in a file ``name`` beside it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if Path(folder, "token").read_text(encoding="utf-8") == token:
                break
            problem = "holds something else"
        except OSError as error:
            problem = error.strerror or str(error)
        if time.monotonic() > deadline:
            return {"unshared": problem}
        time.sleep(0.2)
    try:
        Path(folder, name).write_text(token, encoding="utf-8")
    except OSError as error:
        return {"readonly": error.strerror or str(error)}
    return {}


def listen(token: str) -> dict[str, Any]:
    """Find a port as a run does, and say ``token`` to whoever comes there."""
    global _listener
    from memlaunch.launcher import ports

    try:
        port = ports.find()
    except OSError as error:
        return {"problem": str(error)}
    if socket.has_dualstack_ipv6():
        _listener = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        _listener = socket.create_server(("", port))
    threading.Thread(target=_greet, args=(_listener, token.encode()), daemon=True).start()
    return {"port": port}


def connect(address: str, port: int, token: str) -> dict[str, Any]:
    """Whether ``token`` is what is said at a port; ``at`` is the address that the name leads to."""
    at, heard = None, b""
    try:
        at = socket.gethostbyname(address)
        with socket.create_connection((address, port), PATIENCE) as connection:
            while part := connection.recv(1024):
                heard += part
    except OSError as error:
        return {"at": at, "problem": error.strerror or str(error)}
    return {"at": at} if heard == token.encode() else {"at": at, "problem": "something else answers there"}


def load() -> dict[str, Any]:
    """Import torch, which takes its time."""
    import torch
    import torch.distributed

    return {"gpus": torch.cuda.device_count(), "version": str(torch.__version__)}


def reduce(
    address: str, port: int, rank: int, size: int, on_gpu: bool, count: int, times: int, patience: float
) -> dict[str, Any]:
    """Sum ``count`` float32 numbers over ``size`` nodes: the seconds of one of ``times`` all-reduces."""
    if _listener is not None:
        _listener.shutdown(socket.SHUT_RDWR)  # a close alone leaves the port to the thread that waits there
        _listener.close()
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"tcp://{address}:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=patience),
    )
    seconds = []
    for _ in range(1 + times):  # the first finds the connections
        numbers = torch.full((count,), float(rank + 1), device=device)
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(numbers)
        total = [numbers.min().item(), numbers.max().item()]  # waits for a GPU, too
        seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    if total != [size * (size + 1) / 2] * 2:
        return {"error": f"the sum is {total[0]:g} to {total[1]:g}, not {size * (size + 1) / 2:g}"}
    return {"seconds": sum(seconds[1:]) / times}


QUESTIONS = {
    function.__name__: function for function in (clock, survey, share, listen, connect, load, reduce)
}

_listener: "socket.socket | None" = None


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    questions: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    answer: dict[str, Any] = {"at": "python"}
    while True:
        print(MARK + json.dumps(answer), file=answers, flush=True)
        question = json.loads(questions.get())
        try:
            answer = QUESTIONS[question.pop("do")](**question)
        except Exception as error:  # whatever a library of the node throws is told, not thrown
            lines = str(error).strip().splitlines() or ["no more is known"]
            answer = {"error": f"{type(error).__name__}: {lines[0]}"}


def _read(questions: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        questions.put(line)
    os._exit(0)  # also out of a call that waits for another node


def _version(package: str) -> "str | None":
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> dict[str, Any]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves: name, bytes of memory, and who holds some of it."""
    try:
        import pynvml
    except ImportError:
        return {"driver": None, "cards": [], "problem": "pynvml is not installed"}
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        indices = list(range(pynvml.nvmlDeviceGetCount()))
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")]
        if visible in (["-1"], [""]):
            indices = []
        elif all(name.isdecimal() for name in visible):
            indices = [int(name) for name in visible if int(name) in indices]
        cards = []
        for index in indices:
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(card)
            name = pynvml.nvmlDeviceGetName(card)
            held = []
            with contextlib.suppress(pynvml.NVMLError):  # not every driver tells
                held = [process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(card)]
            cards.append(
                {
                    "index": index,
                    "name": name if isinstance(name, str) else name.decode(),
                    "total": memory.total,
                    "free": memory.free,
                    "held_by": [_process(pid) for pid in held],
                }
            )
    except pynvml.NVMLError as error:
        return {"driver": None, "cards": [], "problem": str(error)}
    return {"driver": driver if isinstance(driver, str) else driver.decode(), "cards": cards}


def _process(pid: int) -> str:
    with contextlib.suppress(OSError):
        return f"{pid} ({Path(f'/proc/{pid}/comm').read_text(encoding='utf-8').strip()})"
    return str(pid)


def _greet(listener: socket.socket, token: bytes) -> None:
    with contextlib.suppress(OSError):  # closed
        while True:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(token)


if __name__ == "__main__":
    main()
