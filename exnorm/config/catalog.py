"""The output of `exnorm list` and `exnorm show`, read from `conf/` and the sources without importing torch."""

import ast
from fnmatch import fnmatch
from pathlib import Path

from exnorm.config.backbones import timm_names
from exnorm.config.errors import UserError
from exnorm.config.groups import describe, group_options, option_file, option_values

NORMS = Path(__file__).resolve().parents[1] / "norms"


def catalog(group: str, pattern: str = "*") -> list[tuple[str, str]]:
    """Return (name, description) of a group's options that match a shell pattern; timm's models come last."""
    rows = [(name, describe(group, name)) for name in group_options(group)]
    if group == "model":
        ours = {name for name, _ in rows}
        rows += [(name, "") for name in timm_names() if name not in ours]
    found = [row for row in rows if fnmatch(row[0], pattern)]
    if not found:
        raise UserError(f"no {group} matches '{pattern}'. Try a wider pattern, such as --filter 'resnet*'")
    return found


def card(group: str, name: str) -> str:
    """Return an option's yaml; for a norm the docstring of its file comes first."""
    if group == "model" and name not in group_options(group) and name in timm_names():
        return f"# A model of timm, with the defaults of timm\n# exnorm train model={name}\nname: {name}"
    yaml = option_file(group, name).read_text(encoding="utf-8").rstrip()
    if group != "norm":
        return yaml
    target = str(option_values("norm", name)["_target_"])
    if not target.startswith("exnorm."):
        return yaml
    return f"{file_docstring(target.rpartition('.')[2])}\n\n{yaml}"


def file_docstring(class_name: str) -> str:
    """Return the docstring of the file in `exnorm/norms/` that defines a class."""
    for file in sorted(NORMS.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.ClassDef) and node.name == class_name for node in tree.body):
            return ast.get_docstring(tree) or ""
    raise UserError(f"no file in {NORMS} defines the class {class_name}. Correct _target_ in its yaml in conf/norm")
