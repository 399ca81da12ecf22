"""Estimate the remaining time of a study from measured runs."""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from exnorm.config.groups import group_options
from exnorm.config.metrics import Metric, metrics_of_task
from exnorm.config.options import USUAL_TASK
from exnorm.config.study import Study, load_study
from exnorm.runs.records import Row, read_records, recorded
from exnorm.studies.plan import Job


class Speed(NamedTuple):
    """Images that one device trains on per second (None if unknown), and the source of that number."""

    images_per_s: float | None
    source: str


@dataclass(frozen=True)
class Estimate:
    """How long the runs of a study take on one device or core.

    Attributes:
        by_configuration: mean hours of the recorded runs of a configuration, of any study, by its hash.
        by_cell: mean hours of the recorded runs of each cell of this study, for a machine without the data.
        speeds: by the primary metric of a task, the study's own first. Sources may have another task.
    """

    by_configuration: Mapping[str, float]
    by_cell: Mapping[str, float]
    speeds: Mapping[Metric, Speed]

    def hours(self, jobs: Iterable[Job]) -> str:
        """Return the hours of training of runs in words, which say so if the time of some is unknown."""
        hours = [self.hours_of(job) for job in jobs]
        known = [each for each in hours if each is not None]
        if len(known) < len(hours):
            return f"more than {sum(known):.1f}" if known else "unknown"
        return f"{sum(known):.1f}"

    def hours_of(self, job: Job) -> float | None:
        """Return the hours of training of a run. None if they cannot be estimated.

        A run takes as long as those with other seeds did on average, or else its images divided by the speed.
        """
        measured = self.by_cell.get(job.name)
        if job.config_hash is not None:
            measured = self.by_configuration.get(job.config_hash, measured)
        rate = self.speeds[job.primary].images_per_s
        if measured is None and job.images is not None and rate:
            return job.images / rate / 3600
        return measured


def estimate_of(study: Study, jobs: Iterable[Job], results: Path, images_per_s: float | None) -> Estimate:
    """Return what records and benchmarks say; `images_per_s`, if given, is the speed of the study's task."""
    configurations: dict[str, list[float]] = {}
    cells: dict[str, list[float]] = {}
    rates: dict[Metric, list[float]] = {}
    for name in recorded(results):
        rows = [row for row in read_records(results, name) if _speed_at(study.scale, row)]
        for row in rows:
            hours = float(row["hours"]) * _devices(row)
            configurations.setdefault(row["config_hash"].partition("-")[0], []).append(hours)
            if name == study.id:
                cells.setdefault(row["cell"], []).append(hours)
        if rows and (primary := _primary_of(study, name)):
            rates.setdefault(primary, []).extend(float(row["value"]) / _devices(row) for row in rows)
    primaries = dict.fromkeys((study.primary, *(job.primary for job in jobs)))
    speeds = {primary: _speed(primary, rates.get(primary), study, results) for primary in primaries}
    if images_per_s is not None:
        speeds[study.primary] = Speed(images_per_s, "given by --images-per-s")
    return Estimate(_means(configurations), _means(cells), speeds)


def _speed_at(scale: str, row: Row) -> bool:
    return row["scale"] == scale and row["metric"] == "images_per_s"


def _means(values: Mapping[str, list[float]]) -> dict[str, float]:
    return {key: mean(each) for key, each in values.items()}


def _primary_of(study: Study, recorded_study: str) -> Metric | None:
    """Return the primary metric of a recorded study. None if it is not one of the project's."""
    if recorded_study == study.id:
        return study.primary
    return load_study(recorded_study, study.scale).primary if recorded_study in group_options("study") else None


def _speed(primary: Metric, rates: list[float] | None, study: Study, results: Path) -> Speed:
    """Return the mean speed of the task's records at this scale, or else that of `exnorm bench train`."""
    if rates:
        return Speed(mean(rates), f"the mean of {len(rates)} runs in {results / 'records'}")
    if primary != metrics_of_task(USUAL_TASK)[0]:
        return Speed(None, "nothing was measured yet for this task; give --images-per-s")
    if study.scale == "full":
        return _benchmarked(results / "bench" / "train.csv")
    return Speed(None, "nothing was measured yet")


def _devices(row: Row) -> int:
    found = re.search(r"\bdevices=(\d+)", row["facts"])
    return int(found[1]) if found else 1


def _benchmarked(file: Path) -> Speed:
    """Return the speed in the benchmark's last row for ResNet-50 at 224 px with an exnorm layer on a GPU."""
    unknown = "nothing was measured yet; run exnorm bench train, or give --images-per-s"
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        return Speed(None, unknown)
    fitting = [
        row
        for row in rows
        if (row["model"], row["image_size"]) == ("resnet50", "224") and row["layers"] != "timm" and row["peak_mib"]
    ]  # only rows of a GPU have a peak of memory
    if not fitting:
        return Speed(None, unknown)
    last = fitting[-1]
    return Speed(float(last["images_per_s"]), f"resnet50 with {last['layers']} on {last['device']}, {file}")
