"""How long a plan says that a study takes: hours of one device, from what was measured on such devices."""

from pathlib import Path

import pytest

from exnorm.config.study import load_study
from exnorm.runs.records import COLUMNS, Row, change_records
from exnorm.studies.estimate import hours_left, measured_hours, speed_of
from exnorm.studies.plan import jobs_of

BENCH = "model,image_size,layers,device,images_per_s,peak_mib"
IMAGES = 1_281_167 * 100  # of a run of the papers' protocol


def put(results: Path, metric: str, value: float, facts: str, hours: float = 10.0) -> None:
    """Record a metric of one run at scale full."""
    row: Row = dict.fromkeys(COLUMNS["runs"], "")
    row |= {"scale": "full", "cell": "norm=bn batch=8x32", "seed": "0", "metric": metric, "value": str(value)}
    rows = [row | {"facts": facts, "hours": str(hours)}]
    change_records(results, "sn-table2", lambda before: {**before, "runs": [*before["runs"], *rows]})


@pytest.mark.parametrize(("facts", "devices"), [("inference=moving_average", 1), ("devices=8 drop_rate=0.5", 8)])
def test_hours_and_speed_are_of_one_device(facts: str, devices: int, tmp_path: Path) -> None:
    """Eight GPUs for ten hours are eighty GPU-hours; a cell that was measured takes as long again."""
    put(tmp_path, "top1", 76.0, facts)
    put(tmp_path, "images_per_s", 800.0, facts)
    study = load_study("sn-table2", "full", seeds=1)
    speed, hours = speed_of(study, tmp_path, None), measured_hours(study, tmp_path)
    assert speed.images_per_s == 800 / devices and hours == {"norm=bn batch=8x32": 10.0 * devices}
    jobs = jobs_of(study, study.cells[:2], tmp_path)
    rate = 800 / devices
    assert hours_left(jobs, speed, hours) == pytest.approx(10 * devices + IMAGES / rate / 3600)


def test_a_benchmark_of_a_processor_says_nothing_about_gpus(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    file = tmp_path / "bench" / "train.csv"
    processor, gpu = 'resnet50,224,en compiled,"a CPU, 2 threads",5,', "resnet50,224,en compiled,NVIDIA X,900,2000.5"
    others = ["resnet50,224,timm,NVIDIA X,950,2000.5", "resnet50,32,en compiled,NVIDIA X,9000,100.0"]
    study = load_study("sn-table2", "full")
    file.write_text("\n".join([BENCH, processor, *others]))
    assert speed_of(study, tmp_path, None).images_per_s is None
    file.write_text("\n".join([BENCH, gpu, processor, *others]))
    speed = speed_of(study, tmp_path, None)
    assert speed.images_per_s == 900 and "NVIDIA X" in speed.source
    assert speed_of(study, tmp_path, 123.0).images_per_s == 123
    assert hours_left(jobs_of(study, study.cells[:1], tmp_path), speed_of(study, Path("nowhere"), None), {}) is None


def test_the_speed_of_one_task_says_nothing_about_another(tmp_path: Path) -> None:
    """A segmentation network takes many times as long for an image."""
    put(tmp_path, "images_per_s", 800.0, "inference=moving_average")
    assert speed_of(load_study("en-imagenet", "full"), tmp_path, None).images_per_s == 800
    speed = speed_of(load_study("sn-table7", "full"), tmp_path, None)
    assert speed.images_per_s is None and "--images-per-s" in speed.source
