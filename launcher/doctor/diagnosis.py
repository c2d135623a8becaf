"""What the answers of nodes mean for a run, and the table of it; pure functions."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "failed"]

#: What stands for a node where this machine is meant.
HERE = "this machine"

#: How a node is reached.
Way = Literal["ssh", "srun", "here"]

#: What ``memlaunch.launcher.doctor.on_node.survey`` answers.
Survey = Mapping[str, Any]

#: Seconds that the clock of a node may be off.
CLOCK_LIMIT = 2.0

#: Bytes of an output folder below which there is a warning.
ROOM = 10**9

#: The part of a GPU's memory that something else may hold.
HELD = 0.02

#: What to do about what only shows between nodes.
BETWEEN = "see what the others say; look at the firewalls between the nodes, and at their names"

_SAME = "install the same versions on every machine"

#: What ssh says -> (what it means, what to do); the first that is found.
_SSH = {
    "REMOTE HOST IDENTIFICATION HAS CHANGED": (
        "its host key is not the one that is known",
        "ask who changed it; `ssh-keygen -R {node}` forgets the old one",
    ),
    "Host key verification failed|host key is known": (
        "its host key is not known here",
        "log in once by hand, `ssh {node}`, and compare the key",
    ),
    "Permission denied": (
        "it does not let us in without a password",
        "put your public key there: `ssh-copy-id {node}`",
    ),
    "Could not resolve hostname|Name or service not known": (
        "no such host is known here",
        "look at its name in the hostfile, and at DNS or `/etc/hosts`",
    ),
    "timed out|No route to host|Network is unreachable|not responding": (
        "it does not answer",
        "is it up, and does its network let ssh in?",
    ),
    "Connection refused": (
        "nothing listens for ssh there",
        "start its sshd, or give the port in `cluster.ssh_options`",
    ),
    "Connection (closed|reset)|Broken pipe": (
        "it closed the connection",
        "look at the log of its sshd",
    ),
    "[Bb]ad .*option|unknown option|illegal option|no argument after|command-line line": (
        "ssh does not take its options",
        "look at `cluster.ssh_options` and `~/.ssh/config`",
    ),
}

#: What programs put before their complaints.
_SPEAKER = re.compile(r"^(-?bash|srun|salloc|sbatch|sinfo): (line \d+: )?((error|fatal): )?")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at on one node, how it stands, and what to do about it."""

    node: str
    check: str
    state: State
    message: str
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``; no hint is null."""
        return {**asdict(self), "hint": self.hint or None}


class Lost(Exception):
    """A node that does not answer.

    Attributes:
        stage: how far it came: ``None``, ``shell``, ``setup``, ``python``.
        status: with which exit status what reached it ended; None where it answers too late.
        words: what it said on standard error.
        limit: seconds that it had.
    """

    def __init__(self, stage: str | None, status: int | None, words: str, limit: float) -> None:
        super().__init__(words)
        self.stage = stage
        self.status = status
        self.words = words
        self.limit = limit


@dataclass(frozen=True)
class Needs:
    """What a job asks of its nodes.

    Attributes:
        ranks: of each node, by its name.
        device: where the ranks compute.
        packages: without which they do not start.
    """

    ranks: Mapping[str, int]
    device: Literal["auto", "cuda", "cpu"]
    packages: AbstractSet[str]


def explain_ssh(node: str, words: str) -> tuple[str, str]:
    """(what is wrong, what to do) where ssh did not reach ``node``, and said ``words``."""
    for pattern, (message, hint) in _SSH.items():
        if re.search(pattern, words):
            return message, hint.format(node=node)
    return last_line(words) or "ssh ended without a word", f"try `ssh {node}` by hand"


def lost(node: str, over: Way, check: str, lost: Lost, python: str) -> Finding:
    """Why a node has no answer to the question of ``check``."""
    last = last_line(lost.words)
    limit = f"it did not answer within {lost.limit:.0f} s"
    if lost.stage is None and over == "ssh" and lost.status is not None:
        return Finding(node, "reachable", "failed", *explain_ssh(node, lost.words))
    if lost.stage is None:
        hint = (
            "look at `sinfo` and `scontrol show node`" if over == "srun" else "is it up, and not overloaded?"
        )
        return Finding(node, "reachable", "failed", limit if lost.status is None else last or limit, hint)
    how = f"ended with exit status {lost.status}: {last}".removesuffix(": ")
    if lost.stage == "shell":
        how = f"did not end within {lost.limit:.0f} s" if lost.status is None else how
        hint = "run its lines there by hand; without `cluster.setup`, look at `.bashrc`"
        return Finding(node, "setup", "failed", f"`cluster.setup` {how}", hint)
    if lost.stage == "setup":
        message = f"{python} does not start" + (f": {last}" if last else "")
        return Finding(
            node, "python", "failed", message, "the same environment must stand at this path there"
        )
    return Finding(node, check, "failed", limit if lost.status is None else f"it {how}", BETWEEN)


def last_line(words: str) -> str:
    """The last line of ``words`` that says something, without the name of the program that says it."""
    lines = [line for line in words.splitlines() if any(map(str.isalnum, line))]
    return _SPEAKER.sub("", lines[-1]).strip() if lines else ""


def cause(words: str) -> str:
    """What is wrong, of all that a program printed: an exception, or else the first line of words."""
    lines = [line.strip() for line in words.splitlines() if any(map(str.isalpha, line))]
    thrown = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return thrown[-1] if thrown else _SPEAKER.sub("", lines[0]) if lines else ""


def versions(
    surveys: Mapping[str, Survey], here: Mapping[str, str | None], needs: Needs
) -> Iterator[Finding]:
    """Python and packages: there where they are needed, and the same on all nodes and ``here``."""
    found = {node: survey["versions"] for node, survey in surveys.items()}
    expected = {name: _most_common([all_[name] for all_ in found.values()], here[name]) for name in here}
    for node, theirs in found.items():
        problems = [
            finding
            for name in here
            if (finding := _version(node, name, theirs[name], expected[name], name in needs.packages))
        ]
        yield from problems
        if not problems:
            listed = ", ".join(f"{name} {version}" for name, version in theirs.items() if version)
            yield Finding(node, "versions", "ok", listed)
    for name, version in expected.items():
        if version != here[name]:
            message = f"{name} is {here[name] or 'missing'} here, and {version or 'missing'} on the nodes"
            state: State = "failed" if name == "memlaunch" else "warning"
            yield Finding(HERE, "versions", state, message, _SAME)


def _version(node: str, name: str, version: str | None, expected: str | None, needed: bool) -> Finding | None:
    if version is None and (needed or expected is not None):
        hint = "install it there, in the environment that runs memlaunch here"
        return Finding(node, "versions", "failed", f"{name} is missing", hint)
    if version == expected:
        return None
    same_minor = name == "Python" and str(version).split(".")[:2] == str(expected).split(".")[:2]
    message = f"{name} is {version}, and {expected or 'missing'} on the others"
    return Finding(node, "versions", "warning" if same_minor else "failed", message, _SAME)


def clock(node: str, samples: Iterable[tuple[float, float, float]]) -> Finding:
    """The clock of a node against ours.

    The one with the shortest way of all ``samples`` counts: (our time before, its time, our time after), in
    seconds. It is known to half of the way there and back.
    """
    before, theirs, after = min(samples, key=lambda sample: sample[2] - sample[0])
    error = (after - before) / 2
    off = theirs - (before + error)
    if abs(off) - error > CLOCK_LIMIT:
        message = f"its clock is {abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} this machine's"
        return Finding(node, "clock", "warning", message, "start NTP there: `timedatectl set-ntp true`")
    return Finding(node, "clock", "ok", f"as here, to {max(abs(off), error):.2f} s")


def gpus(
    surveys: Mapping[str, Survey], torch: Mapping[str, Mapping[str, Any]], needs: Needs
) -> Iterator[Finding]:
    """The GPUs of the nodes, which torch must be able to use, and their memory.

    Args:
        torch: what torch says of the GPUs of a node, where there are some.
    """
    if needs.device == "cpu":
        return
    seen = {node: survey["gpus"]["cards"] for node, survey in surveys.items()}
    asked = needs.device == "cuda" or any(seen.values())
    kinds = [_kind(survey["gpus"]) for survey in surveys.values() if survey["gpus"]["cards"]]
    for node, survey in surveys.items():
        cards, ranks = seen[node], needs.ranks[node]
        usable = torch.get(node, {}).get("gpus", 0)
        if not asked:
            yield Finding(node, "GPUs", "ok", "none: the ranks compute on the CPU")
        elif len(cards) < ranks:
            why = f" ({survey['gpus']['problem']})" if "problem" in survey["gpus"] else ""
            message = f"{_count(len(cards), 'GPU')} for {_count(ranks, 'rank')}{why}"
            hint = "look at `nvidia-smi` and CUDA_VISIBLE_DEVICES there, or ask for fewer ranks"
            yield Finding(node, "GPUs", "failed", message, hint)
        elif usable < ranks:
            message = f"torch {survey['versions']['torch']} can use {usable} of {_count(len(cards), 'GPU')}"
            hint = f"install a build of torch that suits driver {survey['gpus']['driver']}"
            yield Finding(node, "GPUs", "failed", message, hint)
        elif (kind := _kind(survey["gpus"])) != (most := _most_common(kinds, kinds[0])):
            hint = "the slowest sets the pace, and the smallest the memory"
            yield Finding(node, "GPUs", "warning", f"{kind}; the others have {most}", hint)
        else:
            yield Finding(node, "GPUs", "ok", kind)
        for card in cards:
            if (finding := _memory(node, card)) is not None:
                yield finding


def _memory(node: str, card: Mapping[str, Any]) -> Finding | None:
    held = card["total"] - card["free"]
    if held <= HELD * card["total"] and not card["held_by"]:
        return None
    who = f" by {', '.join(card['held_by'])}" if card["held_by"] else ""
    message = f"GPU {card['index']}: {held / 1e9:.1f} of {card['total'] / 1e9:.1f} GB are held{who}"
    return Finding(
        node, "GPU memory", "warning", message, "end it, or choose other GPUs with `cluster.exclude`"
    )


def _kind(gpus: Mapping[str, Any]) -> str:
    names = sorted({card["name"] for card in gpus["cards"]})
    return f"{len(gpus['cards'])} x {', '.join(names)}, driver {gpus['driver']}"


def files(node: str, theirs: Survey, here: Mapping[str, Mapping[str, Any]]) -> Iterator[Finding]:
    """The files and folders of a job as a node finds them, against those of this machine; path -> look."""
    wrong = False
    for path, look in theirs["paths"].items():
        if "error" in look:
            hint = "put it on a file system that all nodes mount, or copy it to the same path"
            yield Finding(node, "files", "failed", f"{path}: {look['error']}", hint)
        elif look.get("size") != here[path].get("size"):
            message = f"{path}: {look['size']} bytes, and {here[path].get('size', 'no')} here"
            yield Finding(node, "files", "warning", message, "copy it again, so that all ranks read the same")
        else:
            continue
        wrong = True
    if theirs["paths"] and not wrong:
        yield Finding(node, "files", "ok", f"{_count(len(theirs['paths']), 'path')} of the job can be read")


def shared(node: str, folder: str, answer: Mapping[str, Any], came_back: bool) -> Finding:
    """An output folder that this machine and a node should both see."""
    hint = "let `output.dir` name a folder on a file system that all nodes mount"
    if (problem := answer.get("unshared")) is not None:
        message = f"`{folder}` is not the folder of this machine: {problem}"
        return Finding(node, "output", "failed", message, hint)
    if (problem := answer.get("readonly")) is not None:
        hint = "mount it for writing there, or look at its permissions"
        return Finding(node, "output", "failed", f"`{folder}` cannot be written to: {problem}", hint)
    if not came_back:
        message = f"what it writes to `{folder}` does not come here"
        return Finding(node, "output", "failed", message, hint)
    return Finding(node, "output", "ok", f"`{folder}` is shared")


def room(folder: str, free: int) -> Finding:
    """The room that an output folder has, in bytes."""
    if free < ROOM:
        message = f"`{folder}` has room for {free / 1e9:.2f} GB"
        return Finding(HERE, "output", "warning", message, "a checkpoint may not fit; make room")
    return Finding(
        "this machine", "output", "ok", f"`{folder}` can be written to, {free / 1e9:.0f} GB are free"
    )


def port(node: str, master: str, number: int, answer: Mapping[str, Any]) -> Finding:
    """Whether a node reaches the port where the ranks meet."""
    place = f"port {number} of {master}"
    if "problem" not in answer:
        return Finding(node, "port", "ok", f"{place} is reached")
    if answer["at"] is None:
        message = f"the name {master}, where the ranks meet, is not known: {answer['problem']}"
        return Finding(node, "port", "failed", message, "add it to DNS or to `/etc/hosts` there")
    message = f"{place}, which is {answer['at']} there, is not reached: {answer['problem']}"
    hint = "open ports 20000 and up between the nodes in their firewalls; look where the name should lead"
    return Finding(node, "port", "failed", message, hint)


def address(node: str, theirs: Survey) -> Finding | None:
    """A node among several that does not know itself by an address that others reach."""
    at = theirs["address"]
    if at is not None and not at.startswith("127."):
        return None
    message = f"its own name, {theirs['host']}, " + ("is not known there" if at is None else f"leads to {at}")
    hint = "give the name its address in `/etc/hosts` there, or set GLOO_SOCKET_IFNAME in `cluster.env`"
    return Finding(node, "name", "warning", message, hint)


def table(findings: Sequence[Finding]) -> str:
    """The findings for people, a line each; what is the same on several nodes is told once."""
    nodes: dict[tuple[str, str, str, str], list[str]] = {}
    for finding in findings:
        key = (finding.check, finding.state, finding.message, finding.hint)
        nodes.setdefault(key, []).append(finding.node)
    rows = [("node", "check", "state", "found; what to do")]
    for (check, state, message, hint), those in nodes.items():
        text = " ".join(f"{message}; {hint}".removesuffix("; ").split())
        rows.append((names(those), check, state, "".join(c if c.isprintable() else "?" for c in text)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)


def names(nodes: Sequence[str]) -> str:
    """The nodes, by their names where they are few."""
    return ", ".join(nodes) if len(nodes) <= 3 else f"{nodes[0]} and {len(nodes) - 1} more"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _most_common(values: Sequence[str | None], preferred: str | None) -> Any:
    return max(values, key=lambda value: (values.count(value), value == preferred))
