"""The runs of a study: the configuration and folder of each cell and seed, and whether the run has finished.

A run can begin with a checkpoint of another run, its source. In a setting, `{source@0.3}` is the snapshot of the source
after 0.3 of its epochs (`trainer.snapshots`), with the same seed. `{source}` is its last checkpoint. Such a run is
identified by the configuration of its source, not by the bytes of the file. So a plan can be made before the source
has run. A source can be a cell of another study; its run is that study's.
"""

import functools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from exnorm.config.errors import UserError
from exnorm.config.metrics import Metric, metrics_of
from exnorm.config.study import Cell, Study
from exnorm.config.variants import compose_variant
from exnorm.data import noise
from exnorm.engine.batch import parse_batch
from exnorm.engine.launch import check, evaluation_id, identity, resolve_eval_config
from exnorm.runs.folder import RunFolder
from exnorm.runs.identity import run_dir
from exnorm.runs.metrics import MetricsLog

Facts = tuple[str | None, float | None, str]  # config_hash, images and problem of a job
RunKey = tuple[str | tuple[str, ...], int]  # the hash (the settings if the data are missing) and the seed
CLASSES, LABELS = "classes", "labels"  # kinds of records that `exnorm ratios` measures
SOURCE = re.compile(r"\{([\w-]+(?:/[\w=. -]+)?)(?:@(\d*\.?\d+))?\}")  # a name, or STUDY/CELL


@dataclass(frozen=True)
class Job:
    """One run of a study: a cell, or the source of cells, with a seed.

    Attributes:
        cell: None for a source.
        settings: arguments of `exnorm train`, without seed and runs; `{source@0.3}` as in the study.
        config_hash: hash of the configuration, the same for all seeds. None if the data are missing.
        images: number of training images times epochs. None if the size of the data set is unknown.
        problem: why there is no hash.
        needs: the job of the source, if the run begins with a checkpoint of it.
        looks: what is measured of the ratios besides: CLASSES, LABELS.
    """

    cell: Cell | None
    name: str
    seed: int
    settings: tuple[str, ...]
    config_hash: str | None
    images: float | None
    problem: str
    runs: Path
    needs: "Job | None" = None
    looks: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The name of the job in lists."""
        return f"{self.name}, seed {self.seed}"

    @property
    def primary(self) -> Metric:
        """The primary metric of its task."""
        return _primary(self._own())

    @property
    def run_key(self) -> "RunKey":
        """The key of the run. Cells that share a run have the same key."""
        return self.config_hash or self.settings, self.seed

    @property
    def result_hash(self) -> str | None:
        """The hash of the run and, after a dash, of the cell's evaluation of it.

        None if the data of one of them are missing.
        """
        if self.config_hash is None or self.cell is None or not self.cell.evaluate:
            return self.config_hash
        try:
            evaluated = _evaluation_id(json.dumps(_values(self._own())), self.cell.evaluate)
        except UserError:
            return None
        return f"{self.config_hash}-{evaluated}"

    def arguments(self) -> list[str]:
        """Return the arguments of `exnorm train`.

        Raises:
            UserError: the checkpoint that the run begins with does not exist.
        """
        return [*self._with_checkpoints(), f"seed={self.seed}", f"runs={self.runs}"]

    def folder(self) -> RunFolder | None:
        """Return the run's folder, which need not exist. None before its source has run, or if its data are missing."""
        if self.config_hash is None or (self.needs and not self.needs.trained()):
            return None
        values, hash8 = _identified(tuple(self._with_checkpoints()))
        return RunFolder(run_dir({**values, "seed": self.seed, "runs": str(self.runs)}, hash8=hash8))

    def trained(self) -> bool:
        """Return whether the run has finished and has its configuration."""
        folder = self.folder()
        return folder is not None and folder.is_complete()

    def diverged(self) -> bool:
        """Return whether the run ended with a loss that is not finite. Such a run is not started again."""
        folder = self.folder()
        return folder is not None and folder.diverged_at() is not None

    def finished(self) -> bool:
        """Return whether the run has finished, with the evaluation and the looks that its cell asks for."""
        evaluates = self.cell is not None and self.cell.evaluate
        if not self.trained() or (evaluates and self.evaluation() is None):
            return False
        return all(self.look_file(look).is_file() for look in self.looks)

    def missing_snapshots(self) -> list[float]:
        """Return the snapshots that the study asks for now and that the finished run did not keep."""
        folder = self.folder()
        if folder is None or not self.trained():
            return []
        return [share for share in _config(self._own()).trainer.snapshots if not folder.snapshot_file(share).exists()]

    def evaluation(self) -> dict[str, Any] | None:
        """Return the row of `evaluations.jsonl` for this cell and the run's last checkpoint; None if there is none."""
        folder = self.folder()
        record = folder.read_record() if folder is not None else None
        if folder is None or record is None or self.cell is None:
            return None
        wanted = _evaluation_id(json.dumps(folder.read_config()), self.cell.evaluate)
        rows = MetricsLog.read(folder.path / "evaluations.jsonl")
        return next((row for row in reversed(rows) if (row.get("id"), row["step"]) == (wanted, record["steps"])), None)

    def look_file(self, look: str) -> Path:
        """Return the file in which `exnorm ratios` keeps what it measures of the finished run."""
        folder = self.folder()
        record = folder.read_record() if folder is not None else None
        assert folder is not None and record is not None and self.cell is not None
        if look == LABELS:
            return folder.label_ratios_file(record["steps"])
        wanted = _evaluation_id(json.dumps(folder.read_config()), self.cell.evaluate)
        return folder.class_ratios_file(wanted, record["steps"])

    def check(self) -> None:
        """Refuse settings that cannot work, before anything runs.

        Raises:
            UserError: a setting of the training or of the evaluation cannot work.
        """
        try:
            check(_config(self._own()))
            if self.cell is not None and self.cell.evaluate:
                resolve_eval_config(_values(self._own()), list(self.cell.evaluate))
            if LABELS in self.looks and not noise.is_on(_config(self._own()).data.noise):
                raise UserError("labels_of is for runs with wrong labels; give it data.noise, or leave it out")
        except UserError as problem:
            raise UserError(f"{self.name}: {problem}") from None

    def _own(self) -> tuple[str, ...]:
        """Return the settings without those that name a checkpoint of a source."""
        return tuple(text for text in self.settings if not SOURCE.search(text))

    def _with_checkpoints(self) -> list[str]:
        return [self._with_checkpoint(text) for text in self.settings]

    def _with_checkpoint(self, text: str) -> str:
        found = SOURCE.search(text)
        if not found:
            return text
        assert self.needs is not None
        folder = self.needs.folder()
        fraction = found[2]
        path = None if folder is None else folder.snapshot_file(float(fraction)) if fraction else folder.path
        if path is None or not path.exists():
            raise UserError(f"{self.name} begins with {found[0]}, but {path or 'that run'} does not exist")
        return text.replace(found[0], str(path))


def jobs_of(study: Study, cells: Iterable[Cell], runs: Path) -> list[Job]:
    """Return the runs of cells: sources first, then seed by seed, so that all cells get their first seed early."""
    chosen = list(cells)
    facts = {cell: _facts(study, cell.train) for cell in chosen}
    sources: dict[tuple[str, int], Job] = {}
    looked_at = {CLASSES: study.by_class, LABELS: study.by_label}
    jobs: list[Job] = []
    for seed in sorted({seed for cell in chosen for seed in cell.seeds}):
        for cell in (cell for cell in chosen if seed in cell.seeds):
            source = _source_of(study, cell.train)
            if source is not None and (source, seed) not in sources:
                settings = study.sources[source]
                sources[source, seed] = Job(None, f"source {source}", seed, settings, *_facts(study, settings), runs)
            needs = None if source is None else sources[source, seed]
            looks = tuple(look for look, cells in looked_at.items() if seed == 0 and cell in cells)
            jobs.append(Job(cell, cell.name, seed, cell.train, *facts[cell], runs, needs, looks))
    return [*sources.values(), *jobs]


def trainings_of(jobs: Iterable[Job]) -> list[Job]:
    """Return one job for each run. Several cells may be evaluations of the same run."""
    return [group[-1] for group in by_run(jobs).values()]


def by_run(jobs: Iterable[Job]) -> dict[RunKey, list[Job]]:
    """Return the jobs of each run: its training and the evaluations of it."""
    groups: dict[RunKey, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.run_key, []).append(job)
    return groups


def _source_of(study: Study, settings: Iterable[str]) -> str | None:
    found = {match[1]: None for text in settings for match in SOURCE.finditer(text)}
    if len(found) > 1:
        raise UserError(f"study {study.id}: a cell can begin with one source, not with {' and '.join(found)}")
    return next(iter(found), None)


def _facts(study: Study, settings: tuple[str, ...]) -> Facts:
    """Return hash, images and problem of a configuration. The source's hash replaces the path of a checkpoint."""
    source = _source_of(study, settings)
    if source is None:
        return _composed(settings, study.train_images)
    if source not in study.sources:
        raise UserError(f"study {study.id} has no source '{source}'; allowed: {', '.join(study.sources) or 'none'}")
    begins = study.sources[source]
    if _source_of(study, begins) is not None:
        raise UserError(f"study {study.id}: the source '{source}' begins with another source, which is not possible")
    kept = list(_config(begins).trainer.snapshots)
    asked = [float(match[2]) for text in settings if (match := SOURCE.search(text)) and match[2]]
    if lacking := [share for share in asked if share not in kept]:
        raise UserError(
            f"study {study.id}: the source '{source}' keeps no snapshot {lacking[0]:g}; its settings have "
            f"trainer.snapshots={kept}"
        )
    own = _facts(study, begins)[0]
    marked = [SOURCE.sub(lambda found: f"run-{own}-{found[2] or 'last'}", text) for text in settings]
    return _composed(tuple(marked), study.train_images)


@functools.cache
def _config(settings: tuple[str, ...]) -> Any:
    return compose_variant(settings)


@functools.cache
def _values(settings: tuple[str, ...]) -> Any:  # nobody may change them
    return OmegaConf.to_container(_config(settings), resolve=True)


@functools.cache
def _primary(settings: tuple[str, ...]) -> Metric:
    return metrics_of(_values(settings))[0]


def _composed(settings: tuple[str, ...], train_images: Mapping[str, int]) -> Facts:
    config = _config(settings)
    size = config.data.num_train or train_images.get(config.data.name)
    images = None if size is None else float(size * config.trainer.epochs)
    if config.trainer.steps is not None:
        images = float(config.trainer.steps * math.prod(parse_batch(config.batch)))
    try:
        return identity(config, _values(settings), content_id=lambda source, key: source), images, ""
    except UserError as problem:
        return None, images, str(problem)


@functools.cache
def _identified(settings: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    values = _values(settings)
    return values, identity(_config(settings), values)


@functools.cache
def _evaluation_id(run_config: str, overrides: tuple[str, ...]) -> str:
    trained = json.loads(run_config)
    return evaluation_id(resolve_eval_config(trained, list(overrides)), trained)
