"""The papers' numbers: complete, each with its source, and typed nowhere else."""

import csv
import re
from pathlib import Path

import pytest
import yaml

from exnorm.config.errors import UserError
from exnorm.config.study import load_study
from exnorm.report.published import published

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "results" / "published"
TABLES = ("sn2019", "en2020", "other")
COLUMNS = ["paper", "table", "method", "backbone", "dataset", "split", "setting", "metric", "value", "note"]


def rows(name: str) -> list[dict[str, str]]:
    """The rows of a file of published numbers."""
    return list(csv.DictReader((PUBLISHED / f"{name}.csv").read_text(encoding="utf-8").splitlines()))


@pytest.mark.parametrize("name", TABLES)
def test_every_number_has_a_source_and_a_setting(name: str) -> None:
    """A cell without a value says why."""
    sources = yaml.safe_load((PUBLISHED / "SOURCES.yaml").read_text(encoding="utf-8"))
    assert (PUBLISHED / f"{name}.csv").read_text(encoding="utf-8").splitlines()[0].split(",") == COLUMNS
    for row in rows(name):
        assert row["paper"] in sources and all(row[key] for key in ("table", "method", "dataset", "metric")), row
        assert row["note"] if not row["value"] else float(row["value"]) == float(row["value"]), row


def test_every_claim_is_of_a_paper_with_a_source() -> None:
    sources = yaml.safe_load((PUBLISHED / "SOURCES.yaml").read_text(encoding="utf-8"))
    claims = rows("claims")
    assert len({row["id"] for row in claims}) == len(claims) > 0
    assert all(row["paper"] in sources and row["claim"] and row["left"] for row in claims)


def test_nothing_is_published_of_en_that_is_not_at_hand() -> None:
    """The paper's tables are not; a reader who has them adds rows, and this test then goes."""
    assert rows("en2020") == []


def test_no_published_number_is_typed_anywhere_else() -> None:
    """An accuracy or an error of a paper, such as 12.3, in code, configuration, scripts or the README."""
    values = {row["value"] for name in TABLES for row in rows(name)}
    values = {value for value in values if re.fullmatch(r"\d\d\.\d+", value)}
    assert len(values) > 100
    files = [*(ROOT / "exnorm").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "scripts").rglob("*.py")]
    for file in [*files, ROOT / "README.md", ROOT / "Makefile"]:
        text = re.sub(r"<!-- made by.*?<!-- end -->", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        found = set(re.findall(r"(?<![\d.])\d\d\.\d+(?![\d.])", text))
        assert not found & values, f"{file} has {found & values}; read it from results/published/"


def test_a_study_that_asks_for_several_numbers_at_once_is_refused(tmp_path: Path) -> None:
    """Not knowing the batch setting, none of the nine is the one."""
    file = tmp_path / "mine.yaml"
    file.write_text("axes: {norm: [bn]}\npublished: {table: table2, method: '{norm}'}\n")
    study = load_study(str(file), "mini")
    with pytest.raises(UserError, match="study mine: published: 9 numbers fit norm=bn, top1; .* differ in: setting"):
        published(study, study.cells[0], "top1")


def test_each_number_of_a_table_that_a_study_answers_to_stands_at_one_cell() -> None:
    """Of SN's tables II and III: every accuracy is found, each once, with its own value."""
    for study_id, table, metrics in (
        ("sn-table2", "table2", ("top1",)),
        ("sn-depth", "table3a", ("top1", "top5")),
        ("sn-hard", "table3b", ("top1",)),
    ):
        study = load_study(study_id, "full")
        printed = [row for row in rows("sn2019") if row["table"] == table and row["metric"] in metrics]
        found = [published(study, cell, metric) for cell in study.cells for metric in metrics]
        assert sorted(row["value"] for row in printed) == sorted(
            "" if item.value is None else item.text for item in found if item is not None
        )
    norms = {"in": "in", "ln": "ln", "bn": "bn", "gn": "gn", "sn": "sn", "ssn": "ssn", "sn-group2": "sn-group2"}
    study = load_study("sn-norms", "full")
    for name, method in norms.items():
        item = published(study, study.cell({"norm": name}), "top1")
        values = {
            row["value"]
            for row in (*rows("sn2019"), *rows("other"))
            if (row["method"], row["setting"], row["metric"]) == (method, "batch=8x32", "top1")
            and (row["backbone"], row["dataset"]) == ("resnet50", "imagenet")
        }
        assert item is not None and item.text.split()[0] in values, name
