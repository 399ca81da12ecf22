"""Estimate the remaining time of a study from measured runs."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from exnorm.config.groups import group_options
from exnorm.config.metrics import metrics_of_task
from exnorm.config.options import USUAL_TASK
from exnorm.config.study import Study, load_study
from exnorm.runs.records import Row, read_records, recorded
from exnorm.studies.plan import Job


class Speed(NamedTuple):
    """Images that one device trains on per second (None if unknown), and the source of that number."""

    images_per_s: float | None
    source: str


def hours_left(jobs: Sequence[Job], speed: Speed, measured_h: dict[str, float]) -> float | None:
    """Return the hours of training left, on one device or core. None if the time of a run cannot be estimated.

    A run takes as long as the other seeds of its cell did on average, or else its images divided by the speed.
    """
    total = 0.0
    for job in jobs:
        hours = measured_h.get(job.name)
        if hours is None and job.images is not None and speed.images_per_s:
            hours = job.images / speed.images_per_s / 3600
        if hours is None:
            return None
        total += hours
    return total


def measured_hours(study: Study, results: Path) -> dict[str, float]:
    """Return the mean hours of training of each cell on one device, from the record at the study's scale."""
    hours: dict[str, list[float]] = {}
    for row in read_records(results, study.id):
        if row["scale"] == study.scale and row["metric"] == study.primary.name:
            hours.setdefault(row["cell"], []).append(float(row["hours"]) * _devices(row))
    return {cell: mean(values) for cell, values in hours.items()}


def speed_of(study: Study, results: Path, given: float | None) -> Speed:
    """Return the given speed, or else the mean of the task's records at this scale, or that of `exnorm bench train`."""
    if given is not None:
        return Speed(given, "given by --images-per-s")
    measured = [
        float(row["value"]) / _devices(row)
        for name in recorded(results)
        if _has_task_of(study, name)
        for row in read_records(results, name)
        if row["scale"] == study.scale and row["metric"] == "images_per_s"
    ]
    if measured:
        return Speed(mean(measured), f"the mean of {len(measured)} runs in {results / 'records'}")
    if study.primary != metrics_of_task(USUAL_TASK)[0]:
        return Speed(None, "nothing was measured yet for this task; give --images-per-s")
    if study.scale == "full":
        return _benchmarked(results / "bench" / "train.csv")
    return Speed(None, "nothing was measured yet")


def _has_task_of(study: Study, other: str) -> bool:
    """Return whether a recorded study has the same task, so that its runs are about as fast."""
    if other == study.id:
        return True
    return other in group_options("study") and load_study(other, study.scale).primary == study.primary


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
