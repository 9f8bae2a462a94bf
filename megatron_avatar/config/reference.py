"""Every setting with its type, default and meaning, read from the schema: `python -m megatron_avatar.config.reference`.

Prints docs/settings.md; with a key or the beginning of one (`rl.replay`) it prints those settings for a terminal.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from megatron_avatar.config import schema

INTRODUCTION = """# Settings

Made from `megatron_avatar/config/schema.py` by `python -m megatron_avatar.config.reference > docs/settings.md`.
Defaults are the schema's; a recipe (`megatron_avatar/config/recipe/`) changes what it names, an ablation changes the
recipe, and the command line changes both: `recipe=avatar_7b ablation=wo_tas rl.beta=0.05`. What a run was started with
stands in its `config.yaml`.
"""


@dataclass(frozen=True)
class Setting:
    """`key` as the command line has it, the type in words, the default as YAML, what it means."""

    key: str
    kind: str
    default: str
    meaning: str


def sections() -> Iterator[tuple[str, str, list[Setting]]]:
    """(prefix, what the section is about, its settings) of every dataclass below Config, in the schema's order."""
    yield from _sections(schema.Config, "")


def _sections(cls: type, prefix: str) -> Iterator[tuple[str, str, list[Setting]]]:
    hints, comments = get_type_hints(cls), _comments(cls)
    own: list[Setting] = []
    below: list[tuple[type, str]] = []
    for item in fields(cls):
        kind, key = hints[item.name], prefix + item.name
        inner = next((part for part in (kind, *get_args(kind)) if isinstance(part, type) and is_dataclass(part)), None)
        if inner is None:
            own.append(Setting(key, _words(kind), _default(item), comments.get(item.name, "")))
        else:
            below.append((inner, f"{key}.NAME." if inner is not kind else f"{key}."))
    about = "" if cls.__doc__ is None or cls.__doc__.startswith(f"{cls.__name__}(") else inspect.cleandoc(cls.__doc__)
    yield prefix.rstrip("."), about.replace("\n", " "), own
    for inner, place in below:
        yield from _sections(inner, place)


def _comments(cls: type) -> dict[str, str]:
    """The comment behind each field."""
    found = {}
    for line in inspect.getsource(cls).splitlines():
        code, mark, comment = line.partition("  # ")
        name, colon, _ = code.strip().partition(":")
        if mark and colon and name.isidentifier():
            found[name] = comment.strip()
    return found


def _words(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace(" | None", " or null")


def _default(item: Field) -> str:
    value = item.default_factory() if item.default_factory is not MISSING else item.default
    names = {None: "null", True: "true", False: "false", "": '""'}
    return names[value] if isinstance(value, bool | str | None) and value in names else str(value).replace("'", "")


def _cell(text: str) -> str:
    """A comment in a table: " | " stands between choices, another bar is |A|, which a table would split at."""
    return text.replace(" | ", " or ").replace("|", r"\|")


def markdown() -> str:
    """The page."""
    parts = [INTRODUCTION]
    for prefix, about, settings in sections():
        parts.append(f"## {f'`{prefix}`' if prefix else 'Of the run'}\n")
        if about:
            parts.append(f"{about}\n")
        rows = [f"| `{s.key}` | {s.kind} | `{s.default}` | {_cell(s.meaning)} |" for s in settings]
        parts.append("\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    if not arguments:
        print(markdown(), end="")
        return 0
    found = [s for _, _, settings in sections() for s in settings if s.key.startswith(arguments[0])]
    for setting in found:
        print(f"{setting.key}={setting.default}  ({setting.kind}) {setting.meaning}")
    if not found:
        print(f"error: no setting begins with {arguments[0]!r}: leave it out to see all", file=sys.stderr)
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
