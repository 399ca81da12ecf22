"""Records and studies of one's own for the tests of studies."""

from pathlib import Path

from exnorm.runs.records import COLUMNS, Row, change_records


def row(cell: str, seed: int, value: float, metric: str = "top1", **more: str) -> Row:
    """A row of a record."""
    usual = dict.fromkeys(COLUMNS["runs"], "x") | {"scale": "mini", "hours": "0.01", "facts": "", "uncommitted": "no"}
    return usual | {"cell": cell, "seed": str(seed), "metric": metric, "value": str(value), **more}


def put(results: Path, study: str, rows: list[Row]) -> None:
    """Write a record."""
    change_records(results, study, lambda before: {kind: rows if kind == "runs" else [] for kind in COLUMNS})


def own_study(tmp_path: Path, text: str) -> str:
    """A study of one's own, as the path of its file."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"# A study of mine\n{text}", encoding="utf-8")
    return str(path)
