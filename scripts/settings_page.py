"""Write the reference of all settings from `exnorm/config/schema.py` and `conf/`: type, default and meaning of each.

    python scripts/settings_page.py    # prints the page, in Markdown; `make docs` makes it a part of the site

A setting's meaning is the comment behind it, in the schema or in the YAML file.
"""

import ast
import dataclasses
import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from exnorm.config import schema
from exnorm.config.explain import dotted
from exnorm.config.folders import conf_dir
from exnorm.config.groups import describe, file_values, group_options, option_file, option_values
from exnorm.config.options import UNTYPED, written

HEAD = """# Settings
Every setting of `exnorm train` and `exnorm eval`. `exnorm train --help` has the most used ones with examples, and
`exnorm train KEY=VALUE ... --cfg job` prints all of them as a run would have them.

A group such as `data` has named options: `data=cifar10` sets several of its keys. [The last section](#named-options)
lists them. Keys of the same group that you set yourself come last, so they win.
"""
OF_DATA = "A data set sets some of these keys itself, as [the last section](#named-options) says."
NOUNS = {"str": "text", "int": "integer", "float": "number", "bool": "true or false", "None": "null", "Any": "any"}


class Setting(NamedTuple):
    """A row of the page."""

    key: str
    kind: str
    default: str
    meaning: str


def settings_page() -> str:
    """Return the page."""
    parts = [HEAD, "## exnorm train", table(top_settings())]
    for name, cls in typed_groups().items():
        note = OF_DATA if name == "data" else ""
        parts += [f"## {name}", f"{documentation(cls)} {note}".strip(), table(class_settings(cls, f"{name}."))]
    for group in UNTYPED:
        parts += [f"## {group}", f"Each `{group}=NAME` has settings of its own. Their types are those of the defaults."]
        for option in group_options(group):
            parts += [f"### {group}={option}", f"{describe(group, option)}.", table(yaml_settings(group, option))]
    parts += ["## exnorm eval", f"{documentation(schema.EvalConfig)} The keys of `data` are those above."]
    parts += [table(eval_settings()), "## Named options", *map(options_table, named_groups())]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def typed_groups() -> dict[str, type]:
    """Return the groups of a training run whose keys the schema types, with their classes."""
    fields = dataclasses.fields(schema.TrainConfig)
    return {field.name: cls for field in fields if (cls := group_class(field)) is not None}


def group_class(field: "dataclasses.Field[Any]") -> type | None:
    """Return the class of a field that is a group; None for a single setting."""
    return field.type if isinstance(field.type, type) and dataclasses.is_dataclass(field.type) else None


def top_settings() -> list[Setting]:
    """Return the settings of a training run that are in no group, and the groups' own ones, such as `norm`."""
    single = [row for row in class_settings(schema.TrainConfig, "") if row.key not in UNTYPED]
    chosen = chosen_options()
    groups = [
        Setting(group, "name of an option", f"`{chosen.get(group) or 'null'}`", "see [named options](#named-options)")
        for group in (*UNTYPED, *named_groups())
    ]
    for place, group in enumerate(UNTYPED):
        groups[place] = groups[place]._replace(meaning=f"see [{group}](#{group})")
    return groups + single


def eval_settings() -> list[Setting]:
    """Return the settings of an evaluation, except those of its data set."""
    return [row for row in class_settings(schema.EvalConfig, "", nested=True) if not row.key.startswith("data.")]


def class_settings(cls: type, prefix: str, *, nested: bool = False) -> list[Setting]:
    """Return the settings of a class of the schema. Groups in the top class have sections of their own."""
    meanings, annotations = comments_of(cls), annotations_of(cls)
    rows = []
    for field in dataclasses.fields(cls):
        inner = group_class(field)
        if inner is not None and (prefix or nested):
            rows += class_settings(inner, f"{prefix}{field.name}.", nested=nested)
        elif inner is None:
            key = f"{prefix}{field.name}"
            default = default_of(field, key)
            rows.append(Setting(key, in_words(annotations[field.name]), default, meanings.get(field.name, "")))
    return rows


def default_of(field: "dataclasses.Field[Any]", key: str) -> str:
    """Return the default of a setting: that of the schema, or of the group's option that is chosen by default."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    group, _, name = key.partition(".")
    if group in ("optim", "trainer", "logger"):
        value = all_values(group, str(chosen_options()[group])).get(name, value)
    return in_cell(value)


def all_values(group: str, option: str) -> dict[str, Any]:
    """Return the values of an option's YAML file, with those of the files that it is made of."""
    return dotted({key: value for key, value in option_values(group, option).items() if key != "defaults"})


def chosen_options() -> dict[str, Any]:
    """Return the option of each group in the defaults of `exnorm train`."""
    entries = [entry for entry in file_values(conf_dir() / "train.yaml")["defaults"] if isinstance(entry, dict)]
    return {group: option for entry in entries for group, option in entry.items() if " " not in group}


def named_groups() -> list[str]:
    """Return the groups whose options set keys that the schema types."""
    return [group for group in chosen_options() if group not in UNTYPED]


def options_table(group: str) -> str:
    """Return a table of a group's options and the keys that each sets."""
    lines = [f"### {group}=", "| name | what it is | what it sets |", "| --- | --- | --- |"]
    for option in group_options(group):
        values = {key: value for key, value in all_values(group, option).items() if key != "name"}
        texts = [f"`{key}={written(value)}`" for key, value in values.items()]
        lines.append(f"| `{option}` | {escaped(describe(group, option))} | {escaped(' '.join(texts))} |")
    return f"{lines[0]}\n\n" + "\n".join(lines[1:])


def yaml_settings(group: str, option: str) -> list[Setting]:
    """Return the settings of a normalizer or a task, which its YAML file types."""
    text = option_file(group, option).read_text(encoding="utf-8")
    meanings = dict(re.findall(r"^(\w+):[^\n]*? # ([^\n]*)", text, re.MULTILINE))
    values = {key: value for key, value in option_values(group, option).items() if key not in ("name", "_target_")}
    return [
        Setting(f"{group}.{key}", in_words(type_of(value)), in_cell(value), meanings.get(key, ""))
        for key, value in values.items()
    ]


def type_of(value: Any) -> str:
    """Return the type that `exnorm.config.options.fits` allows beside a default."""
    if value is None:
        return "Any"
    if isinstance(value, list):
        return f"list[{type_of(value[0])}]" if value and not isinstance(value[0], dict) else "list"
    return type(value).__name__


def in_words(annotation: str) -> str:
    """Return a type in words: `list[float] | None` becomes "list of numbers, or null"."""
    parts = [part.strip() for part in annotation.split("|")]
    words = [
        f"list of {NOUNS[inner[1]]}s" if (inner := re.fullmatch(r"list\[(\w+)\]", part)) else NOUNS.get(part, part)
        for part in parts
    ]
    words = ["mapping" if word.startswith("dict[") else word for word in words]
    return ", or ".join(words)


def in_cell(value: Any) -> str:
    """Return a default for a cell of a table; a reference to another setting is named."""
    if value == dataclasses.MISSING or value == "???":
        return "the group's option"
    if isinstance(value, str) and (found := re.fullmatch(r"\$\{oc\.env:(\w+),null\}", value)):
        return f"the environment variable `{found[1]}`"
    if isinstance(value, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", value)):
        return f"that of `{found[1]}`"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"`{written([item['name'] for item in value])}`"
    if isinstance(value, dict):
        return "`{}`" if not value else f"`{value}`"
    return f"`{written(value)}`" if written(value) else "empty"


def table(rows: Iterable[Setting]) -> str:
    """Return a table in Markdown."""
    lines = ["| setting | type | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{row.key}` | {row.kind} | {escaped(row.default)} | {escaped(row.meaning)} |" for row in rows]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Return a text for a cell of a table, in which a bar would begin the next cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def comments_of(cls: type) -> dict[str, str]:
    """Return the comment behind each field of a class of the schema."""
    source = Path(schema.__file__).read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string[1:].strip() for token in tokens if token.type == tokenize.COMMENT}
    return {name: comments[node.lineno] for name, node in nodes_of(cls).items() if node.lineno in comments}


def annotations_of(cls: type) -> dict[str, str]:
    """Return the type of each field of a class of the schema, as it is written."""
    return {name: ast.unparse(node.annotation) for name, node in nodes_of(cls).items()}


def nodes_of(cls: type) -> dict[str, ast.AnnAssign]:
    """Return the lines of the schema that define the fields of a class."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__]
    lines = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: node for node in lines if isinstance(node.target, ast.Name)}


def documentation(cls: type) -> str:
    """Return the docstring of a class of the schema."""
    return " ".join((cls.__doc__ or "").split())


if __name__ == "__main__":
    print(settings_page(), end="")
