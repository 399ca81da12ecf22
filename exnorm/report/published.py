"""The papers' numbers and claims, from `results/published/`. The project writes them nowhere else."""

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from exnorm.config.errors import UserError
from exnorm.config.study import Cell, Study
from exnorm.config.study_settings import as_list

FILES = ("sn2019", "en2020", "other")


class Claim(NamedTuple):
    """A claim of a paper in our words, and the comparison in it."""

    paper: str
    claim: str
    expect: str


def published_folder() -> Path:
    """Return the folder of the CSV files: inside the package (wheel), else in the checkout.

    Raises:
        UserError: the folder is missing.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "published", package.parent / "results" / "published"):
        if (folder / "claims.csv").is_file():
            return folder
    raise UserError(f"there is no published/claims.csv in or next to {package}. Reinstall exnorm")


class Published(NamedTuple):
    """A number as printed in a paper, or only a text if the paper has no number.

    Attributes:
        note: a note on the number; empty if there is none.
    """

    text: str
    value: float | None
    note: str


def published(study: Study, cell: Cell, metric: str) -> Published | None:
    """Return the paper's number for a cell. None if the paper has none, or if its tables are not available.

    Raises:
        UserError: several of the paper's numbers fit the cell.
    """
    wanted = study.values.get("published")
    if wanted is None:
        return None
    written = study.values.get("as_published", {})
    values = {axis: written.get(value, value) for axis, value in cell.key}
    filters = {"metric": [metric], **{column: _filled(pattern, values) for column, pattern in wanted.items()}}
    rows = [row for row in _numbers() if all(row[column] in options for column, options in filters.items())]
    if len({row["value"] for row in rows}) > 1:
        differ = [column for column in rows[0] if column != "value" and len({row[column] for row in rows}) > 1]
        raise UserError(
            f"study {study.id}: published: {len(rows)} numbers fit {cell.name}, {metric}; add what they differ in: "
            + ", ".join(differ)
        )
    if not rows:
        return None
    row = rows[0]
    source = "" if row["paper"] == study.values.get("paper") else f" [{row['paper']}]"
    value = float(row["value"]) if row["value"] else None
    return Published((row["value"] or row["note"]) + source, value, row["note"] if row["value"] else "")


def claims() -> dict[str, Claim]:
    """Return the papers' claims by their id."""
    return {row["id"]: Claim(row["paper"], row["claim"], row["expect"]) for row in _rows("claims")}


def claims_of(study: Study) -> dict[str, Claim]:
    """Return the claims that a study tests: the papers', or its own with `claim` and `expect` in its yaml.

    Raises:
        UserError: a claim is neither.
    """
    papers, found = claims(), dict[str, Claim]()
    for wanted in study.values.get("claims", ()):
        name, own = str(wanted["id"]), {"claim", "expect"} & set(wanted)
        if name not in papers and len(own) < 2:
            raise UserError(
                f"study {study.id}: claim '{name}' is none of the papers' ({', '.join(papers)}). For your own "
                "claim, add claim: (its text) and expect: left > right"
            )
        if name in papers and own:
            raise UserError(f"study {study.id}: claim '{name}' is a paper's; give your own another id")
        found[name] = papers[name] if name in papers else Claim(study.id, str(wanted["claim"]), wanted["expect"])
    return found


def _filled(pattern: str | list[str], values: Mapping[str, str]) -> list[str]:
    return [text.format_map(values) for text in as_list(pattern)]


def _numbers() -> list[dict[str, str]]:
    return [row for name in FILES for row in _rows(name)]


@functools.cache
def _rows(name: str) -> list[dict[str, str]]:
    text = (published_folder() / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
