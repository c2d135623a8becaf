"""The hostfile: which machines there are, and how many ranks each of them runs.

The syntax is DeepSpeed's, ``worker-1 slots=8`` a line, read strictly: where DeepSpeed takes ``slots=4x`` for
4, or ``worker-1:22`` for a name, there is an error here. Comments begin at ``#``; blank lines mean nothing.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from memlaunch.launcher.errors import Problem, UserError
from memlaunch.launcher.paths import read_small

#: More are a slip of the finger: no machine has as many GPUs.
MAX_SLOTS = 1024

_WORD = re.compile(r"[^ \t]+")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_EXAMPLE = "write a line such as `worker-1 slots=8` for each machine"


@dataclass(frozen=True)
class Host:
    """A machine, and the slots that run a rank each: the indices of its GPUs, in ascending order."""

    name: str
    slots: tuple[int, ...]


def read(path: Path, name: str | None = None) -> tuple[Host, ...]:
    """The hosts that the file at ``path`` lists; ``name`` is what the user calls it.

    Raises:
        UserError: it cannot be read, or :func:`parse` refuses it.
    """
    name = name or str(path)
    try:
        text = read_small(path).decode()
    except OSError as error:
        raise UserError(f"{name}: the hostfile cannot be read: {error.strerror}", hint=_EXAMPLE) from None
    except UnicodeDecodeError as error:
        problem = f"{name}: the hostfile is not UTF-8 text: byte 0x{error.object[error.start]:02x}"
        raise UserError(problem, hint="save it as plain text") from None
    return parse(text, name)


def parse(text: str, source: str = "hostfile") -> tuple[Host, ...]:
    """The hosts that ``text`` lists, in its order; ``source`` is its name in messages.

    Raises:
        UserError: with everything that is wrong, each with its line and column.
    """
    hosts: list[Host] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = list(_WORD.finditer(line.removesuffix("\r").partition("#")[0]))
        if not words:
            continue
        name = words[0][0]
        found = list(_mistakes(words))
        if not found and (first := seen.setdefault(name.lower(), number)) != number:
            hint = "a machine has one line, with all of its slots"
            found.append((words[0], f"`{name}` stands in line {first} already", hint))
        if not found:
            hosts.append(Host(name, tuple(range(int(words[1][0].removeprefix("slots="))))))
        problems += [
            Problem(
                source=source,
                message=message,
                hint=hint,
                line=number,
                column=word.start() + 1,
                length=len(word[0]),
                text=line.rstrip("\r"),
            )
            for word, message, hint in found
        ]
    if not hosts and not problems:
        problems.append(Problem(source=source, message="the hostfile lists no host", hint=_EXAMPLE))
    if problems:
        raise UserError(problems=problems)
    return tuple(hosts)


def select(hosts: Sequence[Host], include: str = "", exclude: str = "") -> tuple[Host, ...]:
    """The hosts and slots that ``include`` names, or all but those that ``exclude`` names; the order stays.

    Either is written ``worker-1@worker-2:0,2``: all slots of one host, and the slots 0 and 2 of another.

    Raises:
        ValueError: both are given, one names what is not there, or nothing is left.
    """
    if include and exclude:
        raise ValueError("`include` and `exclude` are given, and only one of them can be")
    if not include and not exclude:
        return tuple(hosts)
    named = _parse_filter(include or exclude, {host.name: host for host in hosts})
    left = (
        Host(
            host.name,
            tuple(slot for slot in host.slots if (slot in named.get(host.name, ())) == bool(include)),
        )
        for host in hosts
    )
    if not (some := tuple(host for host in left if host.slots)):
        raise ValueError(f"`exclude` of `{exclude}` leaves no slot")
    return some


def render(hosts: Iterable[Host]) -> str:
    """A hostfile of ``hosts``, which any launcher reads; it counts their slots, and does not name them."""
    return "".join(f"{host.name} slots={len(host.slots)}\n" for host in hosts)


def is_host_name(name: str) -> bool:
    """Whether ``name`` is a host name or an IPv4 address, and so can be no option of a program."""
    return _NAME.fullmatch(name) is not None


def _mistakes(words: Sequence[re.Match[str]]) -> Iterator[tuple[re.Match[str], str, str | None]]:
    """(where, message, hint) of what is wrong with the words of a line that has some."""
    name = words[0][0]
    if not is_host_name(name):
        hint = None
        if name.startswith("slots="):
            yield words[0], "the name of the host is missing", _EXAMPLE
            return
        if ":" in name or "@" in name:
            hint = "a user or a port is set in `~/.ssh/config`, or in `cluster.ssh_options`"
        elif "[" in name:
            hint = "each machine has a line of its own"
        yield words[0], f"`{name}` is not a host name", hint
    if len(words) == 1:
        yield words[0], f"`{name}` has no slots", f"write `{name} slots=8` for a machine of 8 GPUs"
        return
    slots = words[1][0]
    if not slots.startswith("slots="):
        yield words[1], f"expected `slots=NUMBER`, not `{slots}`", None
        return
    count = slots.removeprefix("slots=")
    if len(words) > 2 and not count:
        yield words[1], "the number of slots is missing", "there is no space around the `=`"
    elif count == "0":
        yield words[1], "a host of 0 slots runs nothing", "leave its line out"
    elif not _NUMBER.fullmatch(count):
        yield words[1], f"`{count}` is not a number of slots", "write a whole number, such as `slots=8`"
    elif int(count) > MAX_SLOTS:
        yield words[1], f"no host has {count} slots", f"it is at most {MAX_SLOTS}"
    elif len(words) > 2:
        yield words[2], f"`{words[2][0]}` means nothing here", "a line is a host and its slots"


def _parse_filter(text: str, hosts: dict[str, Host]) -> dict[str, set[int]]:
    """Host name -> the slots that a filter names. Raises ValueError."""
    named: dict[str, set[int]] = {}
    whole: set[str] = set()
    for part in text.split("@"):
        name, colon, numbers = part.partition(":")
        if name not in hosts:
            raise ValueError(f"`{name}` in `{text}` is not in the hostfile, which lists {', '.join(hosts)}")
        slots = set(hosts[name].slots)
        chosen = {_slot(number, part) for number in numbers.split(",")} if colon else slots
        if absent := sorted(chosen - slots):
            raise ValueError(f"slot {absent[0]} in `{text}` is not one of the {len(slots)} of {name}")
        if name in named and (not colon or name in whole):
            raise ValueError(f"`{text}` names {name} twice, once with all of its slots")
        whole |= set() if colon else {name}
        named[name] = named.get(name, set()) | chosen
    return named


def _slot(number: str, part: str) -> int:
    if not _NUMBER.fullmatch(number):
        raise ValueError(f"`{part}` must be `HOST` or `HOST:SLOT,SLOT`")
    return int(number)
