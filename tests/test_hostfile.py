"""The hostfile and its filters: what DeepSpeed reads is read alike, what it misreads is an error."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlaunch.launcher import hostfile
from memlaunch.launcher.errors import UserError
from memlaunch.launcher.hostfile import Host

EIGHT = (0, 1, 2, 3, 4, 5, 6, 7)


def deepspeed_pool(text: str) -> dict[str, int] | None:
    """What DeepSpeed's launcher makes of a hostfile; None if it refuses it."""
    from deepspeed.launcher.runner import _parse_hostfile  # type: ignore[import-untyped]

    try:
        return dict(_parse_hostfile(text.splitlines(keepends=True)))
    except ValueError:
        return None


def deepspeed_filter(hosts: tuple[Host, ...], include: str, exclude: str) -> dict[str, list[int]] | None:
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    try:
        pool = {host.name: len(host.slots) for host in hosts}
        return dict(parse_inclusion_exclusion(pool, include, exclude))
    except ValueError:
        return None


def only_problem(text: str) -> tuple[int, int, str]:
    with pytest.raises(UserError) as caught:
        hostfile.parse(text)
    [problem] = caught.value.problems
    return problem.line, problem.column, problem.message


GOOD = {
    "one host": ("worker-1 slots=2\n", [("worker-1", 2)]),
    "several hosts, in their order": (
        "worker-2 slots=2\nworker-1 slots=16\n",
        [("worker-2", 2), ("worker-1", 16)],
    ),
    "no last line break": ("worker-1 slots=2", [("worker-1", 2)]),
    "comments and blank lines": (
        "# the cluster\n\nworker-1 slots=2\n  \n#worker-2 slots=9\nworker-3 slots=2\n",
        [("worker-1", 2), ("worker-3", 2)],
    ),
    "a comment behind": (
        "worker-1 slots=2 # the first\nworker-2 slots=4#\n",
        [("worker-1", 2), ("worker-2", 4)],
    ),
    "indented": ("   # indented too\n\t worker-1   \t slots=2\t \n", [("worker-1", 2)]),
    "lines of Windows": ("worker-1 slots=2\r\n\r\nworker-2 slots=2\r\n", [("worker-1", 2), ("worker-2", 2)]),
    "addresses and long names": (
        "10.0.0.1 slots=1\ngpu-1.rack_2.example.org slots=1\n",
        [("10.0.0.1", 1), ("gpu-1.rack_2.example.org", 1)],
    ),
}


@pytest.mark.parametrize(("text", "expected"), GOOD.values(), ids=GOOD)
def test_good_hostfiles_are_read_as_deepspeed_reads_them(text: str, expected: list[tuple[str, int]]) -> None:
    hosts = hostfile.parse(text)
    assert hosts == tuple(Host(name, tuple(range(slots))) for name, slots in expected)
    assert deepspeed_pool(text) == dict(expected)


BAD = {
    "no slots": ("worker-1\n", (1, 1, "`worker-1` has no slots")),
    "slots left empty": ("worker-1 slots=\n", (1, 10, "`` is not a number of slots")),
    "slots that are a word": ("worker-1 slots=two\n", (1, 10, "`two` is not a number of slots")),
    "another key": ("worker-1 gpus=2\n", (1, 10, "expected `slots=NUMBER`, not `gpus=2`")),
    "a bare number": ("worker-1 4\n", (1, 10, "expected `slots=NUMBER`, not `4`")),
    "a host twice": (
        "worker-1 slots=2\nworker-2 slots=2\nworker-1 slots=2\n",
        (3, 1, "`worker-1` stands in line 1 already"),
    ),
    "a host twice, with other slots": (
        "worker-1 slots=2\nworker-1 slots=4\n",
        (2, 1, "`worker-1` stands in line 1 already"),
    ),
    "spaces around =": ("worker-1 slots = 4\n", (1, 10, "expected `slots=NUMBER`, not `slots`")),
    "a space behind =": ("worker-1 slots= 4\n", (1, 10, "the number of slots is missing")),
    "slots alone": ("slots=4\n", (1, 1, "the name of the host is missing")),
    "a negative number": ("worker-1 slots=-1\n", (1, 10, "`-1` is not a number of slots")),
    "nothing": ("", (0, 0, "the hostfile lists no host")),
    "nothing but comments": ("# none\n\n", (0, 0, "the hostfile lists no host")),
}


@pytest.mark.parametrize(("text", "expected"), BAD.values(), ids=BAD)
def test_bad_hostfiles_are_refused_as_deepspeed_refuses_them(
    text: str, expected: tuple[int, int, str]
) -> None:
    assert only_problem(text) == expected
    assert deepspeed_pool(text) is None


STRICTER = {
    "letters behind the number": ("worker-1 slots=4x\n", (1, 10, "`4x` is not a number of slots")),
    "a decimal number": ("worker-1 slots=4.5\n", (1, 10, "`4.5` is not a number of slots")),
    "a leading zero": ("worker-1 slots=04\n", (1, 10, "`04` is not a number of slots")),
    "digits of another script": ("worker-1 slots=٤\n", (1, 10, "`٤` is not a number of slots")),
    "no slot": ("# two\nworker-1 slots=0\n", (2, 10, "a host of 0 slots runs nothing")),
    "far too many": ("worker-1 slots=99999\n", (1, 10, "no host has 99999 slots")),
    "a port": ("  h1:22 slots=4\n", (1, 3, "`h1:22` is not a host name")),
    "a user": ("me@h1 slots=4\n", (1, 1, "`me@h1` is not a host name")),
    "an option": ("-oProxyCommand=x slots=4\n", (1, 1, "`-oProxyCommand=x` is not a host name")),
    "a command": ("$(reboot) slots=4\n", (1, 1, "`$(reboot)` is not a host name")),
    "a range": ("node[1-4] slots=4\n", (1, 1, "`node[1-4]` is not a host name")),
    "two names": ("h1,h2 slots=4\n", (1, 1, "`h1,h2` is not a host name")),
    "no ASCII": ("wörker slots=4\n", (1, 1, "`wörker` is not a host name")),
    "a space that is none": (
        "h1\N{NO-BREAK SPACE} slots=4\n",
        (1, 1, "`h1\N{NO-BREAK SPACE}` is not a host name"),
    ),
    "a word too many": ("h1 slots=4 max_slots=8\n", (1, 12, "`max_slots=8` means nothing here")),
    "a host twice, in other letters": ("h1 slots=4\nH1 slots=4\n", (2, 1, "`H1` stands in line 1 already")),
}


@pytest.mark.parametrize(("text", "expected"), STRICTER.values(), ids=STRICTER)
def test_what_deepspeed_misreads_is_an_error(text: str, expected: tuple[int, int, str]) -> None:
    assert only_problem(text) == expected
    assert deepspeed_pool(text) is not None


def test_all_that_is_wrong_is_said_at_once_with_line_and_caret() -> None:
    with pytest.raises(UserError) as caught:
        hostfile.parse("h1 slots=4x  # comment\nh2 slots=2\nh3\n", "cluster/hosts")
    assert caught.value.render() == (
        "cluster/hosts:1:4: error: `4x` is not a number of slots\n"
        "    1 | h1 slots=4x  # comment\n"
        "      |    ^^^^^^^^\n"
        "hint: write a whole number, such as `slots=8`\n"
        "\n"
        "cluster/hosts:3:1: error: `h3` has no slots\n"
        "    3 | h3\n"
        "      | ^^\n"
        "hint: write `h3 slots=8` for a machine of 8 GPUs"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    with pytest.raises(UserError, match="No such file"):
        hostfile.read(path)
    path.write_bytes(b"h\xff slots=1\n")
    with pytest.raises(UserError, match="byte 0xff"):
        hostfile.read(path)
    path.write_text("h1 slots=1\n")
    assert hostfile.read(path) == (Host("h1", (0,)),)
    assert hostfile.render(hostfile.read(path)) == "h1 slots=1\n"


WORDS = (
    "h1",
    "h2",
    "H1",
    "slots=1",
    "slots=0",
    "slots=2x",
    "slots",
    "=",
    ":",
    "@",
    " ",
    "\t",
    "\r",
    "\n",
    "#",
    "\x85",
)


@given(st.lists(st.sampled_from(WORDS)).map("".join) | st.text())
def test_any_text_is_hosts_or_a_mistake_of_the_users(text: str) -> None:
    try:
        hosts = hostfile.parse(text)
    except UserError:
        pass
    else:
        assert deepspeed_pool(text.replace("#", " #")) == {host.name: len(host.slots) for host in hosts}


TWO = (Host("worker-1", (0, 1, 2, 3)), Host("worker-2", (0, 1, 2, 3)))

FILTERS = {
    "neither": ("", "", [(0, 1, 2, 3), (0, 1, 2, 3)]),
    "include a host": ("worker-1", "", [(0, 1, 2, 3), ()]),
    "include both hosts, in the hostfile's order": ("worker-2@worker-1", "", [(0, 1, 2, 3), (0, 1, 2, 3)]),
    "include slots": ("worker-1:0,3", "", [(0, 3), ()]),
    "include slots of both": ("worker-1:0@worker-2:1,2", "", [(0,), (1, 2)]),
    "include a host and slots of another": ("worker-1@worker-2:2", "", [(0, 1, 2, 3), (2,)]),
    "include a slot twice": ("worker-1:1,1", "", [(1,), ()]),
    "include slots in any order": ("worker-1:3,0", "", [(0, 3), ()]),
    "include a host in two parts": ("worker-1:0@worker-1:2", "", [(0, 2), ()]),
    "exclude a host": ("", "worker-1", [(), (0, 1, 2, 3)]),
    "exclude slots": ("", "worker-1:0,3", [(1, 2), (0, 1, 2, 3)]),
    "exclude a slot twice": ("", "worker-1:1,1", [(0, 2, 3), (0, 1, 2, 3)]),
    "exclude all slots of a host": ("", "worker-2:0,1,2,3", [(0, 1, 2, 3), ()]),
    "exclude from both": ("", "worker-1:0@worker-2:1", [(1, 2, 3), (0, 2, 3)]),
    "exclude a host and slots of another": ("", "worker-1@worker-2:0", [(), (1, 2, 3)]),
}


@pytest.mark.parametrize(("include", "exclude", "expected"), FILTERS.values(), ids=FILTERS)
def test_filters_mean_what_they_mean_to_deepspeed(
    include: str, exclude: str, expected: list[tuple[int, ...]]
) -> None:
    hosts = hostfile.select(TWO, include, exclude)
    assert hosts == tuple(Host(host.name, slots) for host, slots in zip(TWO, expected, strict=True) if slots)
    assert deepspeed_filter(TWO, include, exclude) == {host.name: list(host.slots) for host in hosts}


BAD_FILTERS = {
    "both": ("worker-1", "worker-2", "only one of them can be"),
    "an unknown host": ("worker-3", "", "is not in the hostfile, which lists worker-1, worker-2"),
    "an unknown host to exclude": ("", "worker-3", "is not in the hostfile"),
    "an unknown host with slots": ("worker-3:0", "", "is not in the hostfile"),
    "an unknown slot": ("worker-1:4", "", "slot 4 in `worker-1:4` is not one of the 4 of worker-1"),
    "an unknown slot to exclude": ("", "worker-2:9", "slot 9"),
    "an unknown slot beside a known one": ("worker-1:0,5", "", "slot 5"),
    "a slot that is no number": ("worker-1:a", "", "must be `HOST` or `HOST:SLOT,SLOT`"),
    "no slot": ("worker-1:", "", "must be `HOST` or `HOST:SLOT,SLOT`"),
    "a slot missing": ("worker-1:0,,1", "", "must be `HOST` or `HOST:SLOT,SLOT`"),
    "a negative slot": ("worker-1:-1", "", "must be `HOST` or `HOST:SLOT,SLOT`"),
    "two colons": ("worker-1:0:1", "", "must be `HOST` or `HOST:SLOT,SLOT`"),
    "an empty part": ("worker-1@", "", "is not in the hostfile"),
    "a comma between hosts": ("worker-1,worker-2", "", "is not in the hostfile"),
}


@pytest.mark.parametrize(("include", "exclude", "message"), BAD_FILTERS.values(), ids=BAD_FILTERS)
def test_filters_that_deepspeed_refuses_are_refused(include: str, exclude: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hostfile.select(TWO, include, exclude)
    assert deepspeed_filter(TWO, include, exclude) is None


STRICTER_FILTERS = {
    "nothing is left": ("", "worker-1@worker-2", "leaves no slot"),
    "a host and its slots": ("worker-1@worker-1:0", "", "names worker-1 twice"),
    "a slot and its host": ("", "worker-1:0@worker-1", "names worker-1 twice"),
    "spaces": ("worker-1: 0", "", "must be `HOST` or `HOST:SLOT,SLOT`"),
}


@pytest.mark.parametrize(("include", "exclude", "message"), STRICTER_FILTERS.values(), ids=STRICTER_FILTERS)
def test_filters_that_say_two_things_are_refused(include: str, exclude: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hostfile.select(TWO, include, exclude)
    assert deepspeed_filter(TWO, include, exclude) is not None
