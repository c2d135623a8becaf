"""What of the documentation is made from elsewhere: the reference of the job file, figures, and examples.

python docs/generate.py

writes `docs/job-file.md` from the JSON Schema of a job, and in every page and the README the lines between
one of these marks and `<!-- end -->`:

- `<!-- measured: NAME -->`: figures from `benchmarks/results/techniques-cpu.md`. NAME is a technique of that
  table, or several with commas between, or `all`.
- `<!-- file: PATH -->`: the file at PATH, seen from the root of the repository.

A test holds that all of it is current.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from memlaunch.launcher.job import json_schema

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results" / "techniques-cpu.md"
MARKED = re.compile(r"(<!-- (measured|file): ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
#: Those columns of the results that a page shows, unless nothing was measured in them.
COLUMNS = (0, 2, 3, 4, 5, 6)

Schema = Mapping[str, Any]


def main() -> None:
    """Write what has changed."""
    for path, text in outputs().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


def outputs() -> dict[Path, str]:
    """Every file with something generated in it, and the text that it is to have."""
    made = {DOCS / "job-file.md": job_file(json_schema())}
    rows = table(RESULTS.read_text(encoding="utf-8"))
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        if MARKED.search(text):
            made[path] = MARKED.sub(lambda match: _between(match, rows), text)
    return made


def _between(match: re.Match[str], rows: Sequence[Sequence[str]]) -> str:
    begin, kind, asked, end = match.groups()
    return begin + (figures(asked, rows) if kind == "measured" else listing(ROOT / asked)) + end


def table(text: str) -> list[list[str]]:
    """The cells of the one Markdown table in ``text``, its heading first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if set("".join(row)) - set("-: ")]


def figures(asked: str, rows: Sequence[Sequence[str]]) -> str:
    """The rows of the techniques ``asked`` for as a Markdown table, behind the baseline.

    Raises:
        KeyError: there is no such row.
    """
    columns = [column for column in COLUMNS if any(row[column] != "-" for row in rows[1:])]
    heading, baseline, *others = [[row[column] for column in columns] for row in rows]
    by_name = {row[0]: row for row in others}
    names = list(by_name) if asked == "all" else [name.strip() for name in asked.split(",")]
    chosen = [heading, ["---", *["--:"] * (len(heading) - 1)], baseline, *(by_name[name] for name in names)]
    return "".join(f"| {' | '.join(row)} |\n" for row in chosen)


def listing(path: Path) -> str:
    """The file as a block of Markdown."""
    language = {".json": "json", ".py": "python", ".yaml": "yaml"}.get(path.suffix, "")
    return f"```{language}\n{path.read_text(encoding='utf-8').rstrip()}\n```\n"


def job_file(schema: Schema) -> str:
    """The reference of the job file, from its JSON Schema."""
    parts = [
        "# The job file",
        "JSON. Unknown keys, duplicate keys and values of another type are errors, with line, column and a "
        "hint. Paths are relative to the job file. Every default is written out in the run folder's "
        "`resolved.json`.",
        "`memlaunch schema` prints the JSON Schema that this page is made from; an editor that finds it by "
        "`$schema` completes keys.",
    ]
    for path, section, leading in sections(schema, schema):
        title = f"`{'.'.join(path)}`" if path else "Top level"
        parts.append(f"{'###' if len(path) > 1 else '##'} {title}")
        parts.append(" ".join(section.get("description", "").split()))
        if leading is not None:
            parts.append(f"May be written as `{leading}` alone.")
        rows = [_row((*path, key), value, schema) for key, value in section["properties"].items()]
        parts.append("\n".join(["| key | value | default | meaning |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def sections(
    schema: Schema, part: Schema, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Schema, str | None]]:
    """(path, object, its leading key) of every section, each behind the one that holds it."""
    for option in _options(part, schema):
        if option.get("type") == "object" and "properties" in option:
            yield path, option, _leading(part, schema)
            for key, value in option["properties"].items():
                yield from sections(schema, value, (*path, key))
        elif option.get("type") == "array":
            yield from sections(schema, option["items"], (*path[:-1], f"{path[-1]}[]"))


def _options(part: Schema, schema: Schema) -> list[Schema]:
    """What a value may be, one schema each; null left out."""
    if "$ref" in part:
        return _options(schema["$defs"][part["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in part and "properties" not in part:
        return [option for one in part["anyOf"] for option in _options(one, schema)]
    return [] if part.get("type") == "null" else [part]


def _leading(part: Schema, schema: Schema) -> str | None:
    """The key of the section ``part`` that may stand for all of it."""
    titles = [option.get("title") for option in _options(part, schema) if "properties" not in option]
    objects = [option for option in _options(part, schema) if "properties" in option]
    keys = objects[0]["properties"].items()
    return next((key for key, value in keys if titles and value.get("title") == titles[0]), None)


def _row(path: tuple[str, ...], part: Schema, schema: Schema) -> str:
    options = _options(part, schema)
    is_section = any("properties" in option for option in options)
    value = " or ".join(dict.fromkeys(map(_kind, options)))
    if is_section:
        value = f"[a section](#{re.sub('[^a-z0-9_-]', '', ''.join(path).lower())})"
    default = part.get("default")
    shown = "" if default is None or is_section else f"`{json.dumps(default)}`"
    cells = [f"`{path[-1]}`", value, shown, " ".join(part.get("description", "").split())]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind(option: Schema) -> str:
    """A kind of value, in words."""
    if "enum" in option or "const" in option:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in option.get("enum", [option.get("const")]))
    kind = option.get("type")
    if kind == "array":
        if "properties" in option["items"] or "$ref" in option["items"]:
            return "a list of sections"
        return "a list"
    words = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "`true`, `false`",
        "string": "a string",
        "object": "an object",
    }
    limits = {
        "minimum": "at least {:g}",
        "exclusiveMinimum": "above {:g}",
        "maximum": "at most {:g}",
        "exclusiveMaximum": "below {:g}",
    }
    bounds = [
        text.format(option[name])
        for name, text in limits.items()
        if name in option and abs(option[name]) < 2**31 - 1
    ]
    return " ".join([words[str(kind)], " and ".join(bounds)]).strip()


if __name__ == "__main__":
    main()
