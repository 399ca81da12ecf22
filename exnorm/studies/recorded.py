"""What `--skip-recorded` leaves out: results that the study's record has, or that the record of another study has."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from exnorm.config.study import Study
from exnorm.engine.launch import INITIAL_WEIGHTS
from exnorm.runs.records import COLUMNS, DIVERGED_AT, Key, Row, Rows, change_records, key_of, read_records, recorded
from exnorm.studies.collect import key_of_job, kinds_of, with_results
from exnorm.studies.plan import SOURCE, Job


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

    Studies share runs. A result of another cell counts if it has the same configuration, seed and scale, and if all
    that this study records of it is there. With `copy`, its rows are copied into this study's record. Results with
    ratios by class or by label are always measured.
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
    """Return the rows of these jobs' results that the records have of other cells, as rows of the jobs' cells.

    Of several records with the same result the first is taken; a run that ended wins over one that diverged.
    """
    wanted: dict[tuple[str, str], list[Job]] = defaultdict(list)
    for job in filter(_is_known_by_hash, jobs):
        wanted[job.result_hash or "", str(job.seed)].append(job)
    found: dict[Key, Rows] = {}
    diverged: dict[Key, Rows] = {}
    for other in recorded(results):
        runs = {key: rows for key, rows in _by_key(results, other, "runs").items() if key[0] == study.scale}
        same = {key: wanted.get((rows[0]["config_hash"], rows[0]["seed"]), []) for key, rows in runs.items()}
        if not any(same.values()):
            continue
        kinds = {kind: _by_key(results, other, kind) for kind in COLUMNS if kind != "runs"} | {"runs": runs}
        for key, job in ((key, job) for key, sharing in same.items() for job in sharing):
            if all(key in kinds[kind] for kind in _needed(study, job, runs[key])):
                rows = {kind: kinds[kind].get(key, []) for kind in kinds_of(study, job)}
                own = {kind: [{**row, "cell": job.name} for row in rows.get(kind, [])] for kind in COLUMNS}
                (diverged if _has_diverged(runs[key]) else found).setdefault(key_of_job(study, job), own)
    return diverged | found


def _is_known_by_hash(job: Job) -> bool:
    """Return whether a result with the job's hash and seed is the job's.

    Snapshots and the content of a file with weights are not in the hash of a plan.
    """
    from_file = any(
        text.startswith(f"model.{key}=") and not SOURCE.search(text) for text in job.settings for key in INITIAL_WEIGHTS
    )
    return job.cell is not None and job.result_hash is not None and not job.looks and not from_file


def _needed(study: Study, job: Job, runs: list[Row]) -> set[str]:
    """Return the kinds of rows that a result must have, besides the numbers of the run."""
    if _has_diverged(runs):
        return set()
    with_ratios = any(row["metric"].startswith("ratio/") for row in runs)
    own_curves = job.cell is not None and not job.cell.evaluate
    needed = {"epochs": own_curves, "layers": with_ratios}
    return {kind for kind in kinds_of(study, job) if needed.get(kind)}


def _has_diverged(runs: list[Row]) -> bool:
    return any(row["metric"] == DIVERGED_AT for row in runs)


def _by_key(results: Path, study: str, kind: str) -> dict[Key, list[Row]]:
    """Return the rows of a record of one kind, by scale, cell and seed."""
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in read_records(results, study, kind):
        found[key_of(row)].append(row)
    return found
