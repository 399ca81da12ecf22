"""What `--skip-recorded` leaves out: results that the study's record has, or that the record of another study has."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from exnorm.config.study import Study
from exnorm.runs.records import COLUMNS, Key, Row, Rows, change_records, key_of, read_records, recorded
from exnorm.studies.collect import key_of_job, kinds_of, with_results
from exnorm.studies.plan import Job


def lacking(study: Study, jobs: Sequence[Job], results: Path) -> list[Job]:
    """Return the jobs whose results are not in the study's record, and the sources that these jobs begin with.

    A result counts only with the configuration that the study asks for now, and with the ratios that it asks for.
    """
    looked = {look: _by_key(results, study.id, look) for look in {look for job in jobs for look in job.looks}}
    hashes = {key_of(row): row["config_hash"] for row in read_records(results, study.id)}

    def is_recorded(job: Job) -> bool:
        key = key_of_job(study, job)
        known = job.result_hash is not None and hashes.get(key) == job.result_hash
        return known and all(key in looked[look] for look in job.looks)

    return _with_sources(jobs, [job for job in jobs if job.cell is not None and not is_recorded(job)])


def left_of_all(study: Study, jobs: Sequence[Job], results: Path, *, copy: bool) -> list[Job]:
    """Return the jobs whose results are in no record, and the sources that these jobs begin with.

    Studies share runs. A result of another study counts if it has the same configuration, seed and scale, and if all
    that this study records of it is there. With `copy`, its rows are copied into this study's record.
    """
    left = lacking(study, jobs, results)
    shared = _shared(study, left, results)
    if shared and copy:
        change_records(
            results, study.id, lambda before: with_results(study, before, shared), primary=study.primary.name
        )
    return _with_sources(jobs, [job for job in left if job.cell is not None and key_of_job(study, job) not in shared])


def _with_sources(jobs: Sequence[Job], left: list[Job]) -> list[Job]:
    needed = {job.needs.title for job in left if job.needs is not None}
    return [*(job for job in jobs if job.cell is None and job.title in needed), *left]


def _shared(study: Study, jobs: Sequence[Job], results: Path) -> dict[Key, Rows]:
    """Return the rows of these jobs' results that the records have of other cells, as rows of the jobs' cells."""
    wanted: dict[tuple[str, str], list[Job]] = defaultdict(list)
    for job in jobs:
        if job.cell is not None and job.result_hash is not None:
            wanted[job.result_hash, str(job.seed)].append(job)
    found: dict[Key, Rows] = {}
    for other in recorded(results):
        rows = [row for row in read_records(results, other) if row["scale"] == study.scale]
        same = {key_of(row): wanted.get((row["config_hash"], row["seed"]), []) for row in rows}
        kinds = {kind: _by_key(results, other, kind) for kind in COLUMNS} if any(same.values()) else {}
        for key, job in ((key, job) for key, jobs in same.items() for job in jobs):
            asked = kinds_of(study, job)
            if all(key in kinds[kind] for kind in asked if kind != "epochs"):  # a diverged run has none
                found[key_of_job(study, job)] = {
                    kind: [{**row, "cell": job.name} for row in kinds[kind][key]] if kind in asked else []
                    for kind in COLUMNS
                }
    return found


def _by_key(results: Path, study: str, kind: str) -> dict[Key, list[Row]]:
    """Return the rows of a record of one kind, by scale, cell and seed."""
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in read_records(results, study, kind):
        found[key_of(row)].append(row)
    return found
