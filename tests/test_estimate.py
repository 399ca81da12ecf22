"""How long a plan says that a study takes: hours of one device, from what was measured on such devices."""

from pathlib import Path

import pytest

from exnorm.config.study import Study, load_study
from exnorm.runs.records import COLUMNS, Row, change_records
from exnorm.studies.estimate import Estimate, estimate_of
from exnorm.studies.plan import Job, jobs_of, trainings_of

BENCH = "model,image_size,layers,device,images_per_s,peak_mib"
IMAGES = 1_281_167 * 100  # of a run of the papers' protocol


def put(results: Path, metric: str, value: float, facts: str, hours: float = 10.0, config_hash: str = "") -> None:
    """Record a metric of one run at scale full."""
    row: Row = dict.fromkeys(COLUMNS["runs"], "")
    row |= {"scale": "full", "cell": "norm=bn batch=8x32", "seed": "0", "metric": metric, "value": str(value)}
    rows = [row | {"facts": facts, "hours": str(hours), "config_hash": config_hash}]
    change_records(results, "sn-table2", lambda before: {**before, "runs": [*before["runs"], *rows]})


def estimate(study: Study, results: Path, images_per_s: float | None = None) -> Estimate:
    """The estimate for all runs of a study."""
    return estimate_of(study, jobs_of(study, study.cells, results), results, images_per_s)


def speed(study: Study, results: Path, images_per_s: float | None = None) -> float | None:
    """The speed for the study's task."""
    return estimate(study, results, images_per_s).speeds[study.primary].images_per_s


@pytest.mark.parametrize(("facts", "devices"), [("inference=moving_average", 1), ("devices=8 drop_rate=0.5", 8)])
def test_hours_and_speed_are_of_one_device(facts: str, devices: int, tmp_path: Path) -> None:
    """Eight GPUs for ten hours are eighty GPU-hours; a cell that was measured takes as long again."""
    put(tmp_path, "top1", 76.0, facts)
    put(tmp_path, "images_per_s", 800.0, facts)
    study = load_study("sn-table2", "full", seeds=1)
    found = estimate(study, tmp_path)
    assert speed(study, tmp_path) == 800 / devices and found.by_cell == {"norm=bn batch=8x32": 10.0 * devices}
    first, second = jobs_of(study, study.cells[:2], tmp_path)
    assert found.hours_of(first) == 10 * devices
    assert found.hours_of(second) == pytest.approx(IMAGES / (800 / devices) / 3600)


def test_a_benchmark_of_a_processor_says_nothing_about_gpus(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    file = tmp_path / "bench" / "train.csv"
    processor, gpu = 'resnet50,224,en compiled,"a CPU, 2 threads",5,', "resnet50,224,en compiled,NVIDIA X,900,2000.5"
    others = ["resnet50,224,timm,NVIDIA X,950,2000.5", "resnet50,32,en compiled,NVIDIA X,9000,100.0"]
    study = load_study("sn-table2", "full")
    file.write_text("\n".join([BENCH, processor, *others]))
    assert speed(study, tmp_path) is None and estimate(study, tmp_path).hours(runs(study, tmp_path)) == "unknown"
    file.write_text("\n".join([BENCH, gpu, processor, *others]))
    found = estimate(study, tmp_path).speeds[study.primary]
    assert found.images_per_s == 900 and "NVIDIA X" in found.source
    assert speed(study, tmp_path, 123.0) == 123


def runs(study: Study, results: Path) -> list[Job]:
    """The runs of a study, sources included."""
    return trainings_of(jobs_of(study, study.cells, results))


def test_the_speed_of_one_task_says_nothing_about_another(tmp_path: Path) -> None:
    """A segmentation network takes many times as long for an image. Its backbones are runs of the other task."""
    put(tmp_path, "images_per_s", 800.0, "inference=moving_average")
    assert speed(load_study("en-imagenet", "full"), tmp_path) == 800
    study = load_study("sn-table7", "full", seeds=1)
    found = estimate(study, tmp_path)
    assert speed(study, tmp_path) is None and "--images-per-s" in found.speeds[study.primary].source
    sources = [job for job in runs(study, tmp_path) if job.cell is None]
    pretraining = sum(job.images or 0 for job in sources) / 800 / 3600
    assert len(sources) == 5 and found.hours(runs(study, tmp_path)) == f"more than {pretraining:.1f}"
    given, steps = estimate(study, tmp_path, 30.0), (100000 + 37200) * 8 * 16
    assert float(given.hours(runs(study, tmp_path))) == pytest.approx(pretraining + steps / 30 / 3600, abs=0.1)


def test_a_source_is_reported_with_the_metric_of_its_own_task(tmp_path: Path) -> None:
    jobs = runs(load_study("en-segmentation", "mini", seeds=1), tmp_path)
    assert {(job.cell is None, job.primary.label) for job in jobs} == {(True, "top-1"), (False, "mIoU")}


def test_a_source_takes_as_long_as_the_runs_of_its_own_study(tmp_path: Path) -> None:
    study = load_study("en-segmentation", "mini", seeds=1)
    source = next(job for job in runs(study, tmp_path) if job.name == "source sn-table2/norm=en batch=8x32")
    assert estimate(study, tmp_path).hours_of(source) is None
    put(tmp_path, "images_per_s", 800.0, "", hours=3.0, config_hash=source.config_hash or "")
    file = tmp_path / "records" / "sn-table2.csv"
    file.write_text(file.read_text().replace("full,", "mini,"))
    assert estimate(study, tmp_path).hours_of(source) == 3.0
