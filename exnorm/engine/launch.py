"""The controller: finds the identity and the folder of a run, and starts one worker per device. Imports no torch.

It gets a configuration that Hydra has composed. It checks the settings before a folder is made, forwards signals, and
turns the workers' exit codes into one line or its own exit code.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from exnorm.config.compose import calibration_data, compose_eval, default_values, schema_defaults, values_of
from exnorm.config.errors import UserError
from exnorm.config.metrics import metrics_of
from exnorm.config.schema import TestConfig
from exnorm.data import fingerprint
from exnorm.engine.batch import BatchPlan, fitting_devices, parse_batch, plan_batch
from exnorm.engine.check_recipe import check_recipe
from exnorm.engine.check_task import check_targets, check_task, check_views, read_task
from exnorm.engine.in_job import Job, current_job, train_as_leader
from exnorm.engine.processes import missing_gpu, run_workers, visible_gpus
from exnorm.engine.summary import print_evaluations, print_result, print_shorter
from exnorm.runs.folder import (
    RunFolder,
    RunLocked,
    read_json,
    write_json_atomic,
    write_text_atomic,
)
from exnorm.runs.identity import config_hash, flatten, run_dir, short_hash
from exnorm.runs.lock import holder
from exnorm.runs.metrics import MetricsLog
from exnorm.runs.provenance import collect, uncommitted_patch
from exnorm.runs.sinks import check_classes

CHOICES = {
    "trainer.device": ("auto", "cpu", "cuda"),
    "trainer.precision": ("fp32", "bf16", "fp16"),
    "trainer.inference": ("moving_average", "batch_average"),
    "optim.schedule": ("step", "cosine", "poly"),
    "optim.decay": ("all", "weights"),
    "logger.wandb": ("off", "offline", "online"),
}
INITIAL_WEIGHTS = ("init_from", "init_ratios_from")
POSITIVE = (
    "optim.warmup_steps",
    "trainer.epochs",
    "trainer.steps",
    "trainer.validate_every",
    "trainer.checkpoint_every",
    "trainer.passes",
    "trainer.eval_batch_size",
    "trainer.calibration_batches",
)


def run(config: DictConfig) -> None:
    """Train, resume, or print the result of the run that a composed config describes.

    Raises:
        UserError: a setting cannot work, and nothing was made; or a worker failed.
        RunLocked: another process trains this run.
        SystemExit: 130 or 143 after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    job = current_job()
    plan = check(config)
    values: Any = OmegaConf.to_container(config, resolve=True)
    data = fingerprint(config.data)
    hash8 = identity(config, values, data=data)
    folder = RunFolder(run_dir(values, hash8=hash8))
    if folder.is_locked():
        raise RunLocked(f"{folder.path} is in use by {holder(folder.lock_file)}. Wait for it, or choose another seed")
    earlier = folder.path.with_name(f".{folder.path.name}.earlier")
    if config.fresh and folder.path.exists():
        _set_aside(folder, earlier)
    if folder.read_record() is not None:
        _keep_config(folder, values, hash8)
        with suppress(OSError):  # of a failure after the end of the run; the folder may be read-only
            folder.error_file.unlink(missing_ok=True)
        print(f"{folder.path} has finished. To start it over, type fresh=true")
        print_result(folder)
        return
    made = prepare(folder, values, hash8, data_id=short_hash(data))
    if made:
        print_shorter(folder, values, partial(identity, config, data=data))
    try:
        gpu = on_gpu(config.trainer.device, "trainer.device")
        _note_missing_gpu(config.trainer.device)
        if job is not None:
            train_as_leader(job, folder, "cuda" if gpu else "cpu", span=plan.span)
        else:
            run_workers(
                [str(folder.path)],
                count=plan.devices,
                on_gpu=gpu,
                resumes=folder,
                deterministic=config.trainer.deterministic,
            )
    except RunLocked:
        raise  # another process has just started the run; what is in the folder is its own
    except UserError as problem:
        if made and _is_worthless(folder, beside=earlier):
            _remove(folder)
            if earlier.exists():
                earlier.rename(folder.path)
        else:
            with suppress(OSError):  # the disk may be full; the error then says so
                write_text_atomic(folder.error_file, f"{problem}\n")
        raise
    shutil.rmtree(earlier, ignore_errors=True)
    print_result(folder)


def evaluate_run(run_path: Path, overrides: list[str]) -> None:
    """Evaluate a run's checkpoint with the settings of `exnorm eval`; print and store the metrics.

    Raises:
        UserError: there is no run folder or no checkpoint, or the data do not fit.
    """
    folder = RunFolder(run_path)
    trained = folder.read_config()
    config = resolve_eval_config(trained, overrides)
    for key in ("inference", "precision", "device"):
        _check_choice(config[key], key, CHOICES[f"trainer.{key}"])
    for key in ("batch_size", "calibration_batches"):
        _check_positive(config[key], key)
    task = read_task(trained)
    check_views(config.test, task)
    check_targets(config.data, task)
    gpu = on_gpu(config.device, "device")
    _note_missing_gpu(config.device)
    if config.precision == "fp16" and not gpu:
        raise UserError("precision=fp16 needs a GPU. On a CPU use precision=bf16 or precision=fp32")
    values: Any = OmegaConf.to_container(config, resolve=True)
    run_workers(
        [str(folder.path), json.dumps({**values, "id": evaluation_id(config, trained)})],
        count=_count_devices(config.devices, "devices", gpu) or 1,
        on_gpu=gpu,
        resumes=None,
    )
    sets = len(config.data.val or [config.data.name])
    print_evaluations(MetricsLog.read(folder.path / "evaluations.jsonl")[-sets:], metrics_of(trained))


def resolve_eval_config(trained: dict[str, Any], overrides: list[str]) -> DictConfig:
    """Return the configuration of an evaluation of a run; the run's config `trained` gives what is not overridden."""
    config = compose_eval(trained["data"], overrides)
    for key in ("inference", "calibration_batches", "precision"):
        if config[key] is None:
            config[key] = trained["trainer"][key]
    return config


def evaluation_id(config: DictConfig, trained: dict[str, Any]) -> str:
    """Return a hash of everything that changes the result of an evaluation of given weights of the run `trained`.

    Raises:
        UserError: its data do not exist.
    """
    values: Any = OmegaConf.to_container(config, resolve=True)
    averages = config.inference == "batch_average"
    keys = ("data", "checkpoint", "inference", "precision", "test", *(["calibration_batches"] if averages else []))
    defaults = {"data": schema_defaults()["data"], "test": values_of(TestConfig)}
    calibrates = averages and calibration_data(config.data, trained["data"]) is config.data
    text = fingerprint(config.data, train=calibrates)
    return config_hash({key: values[key] for key in keys}, defaults=defaults, fingerprint=text)


def check(config: DictConfig) -> BatchPlan:
    """Raise UserError for settings that cannot work; return how the batch is distributed over devices."""
    for key, allowed in CHOICES.items():
        _check_choice(OmegaConf.select(config, key), key, allowed)
    for key in POSITIVE:
        if (value := OmegaConf.select(config, key)) is not None:
            _check_positive(value, key)
    for key, value in flatten(OmegaConf.to_container(config, resolve=True)).items():  # pyright: ignore[reportArgumentType]
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} is not possible; give a finite number")
    check_task(config)
    sinks: Any = OmegaConf.to_container(config.logger.sinks, resolve=True)
    check_classes(sinks)
    if not all(0 < fraction <= 1 for fraction in config.trainer.snapshots):
        raise UserError(
            f"trainer.snapshots={list(config.trainer.snapshots)}: give fractions of the epochs, above 0 and up to 1"
        )
    gpu = on_gpu(config.trainer.device, "trainer.device")
    if config.trainer.precision == "fp16" and not gpu:
        raise UserError("trainer.precision=fp16 needs a GPU. On a CPU use bf16 or fp32")
    if config.trainer.cuda_graph:
        _check_cuda_graph(config, gpu=gpu)
    if config.trainer.max_hours is not None and config.trainer.max_hours <= 0:
        raise UserError(f"trainer.max_hours={config.trainer.max_hours}: give a number above 0, such as 23.5")
    if config.optim.power <= 0:
        raise UserError(f"optim.power={config.optim.power}: give a number above 0, such as 0.9")
    sync = bool(config.norm.get("sync", False))
    job = current_job()
    if job is not None:
        devices = _processes_of(job, config.trainer.devices)
    else:
        devices = _count_devices(config.trainer.devices, "trainer.devices", gpu)
    if devices is None:
        replicas, samples = parse_batch(config.batch)
        devices = max(fitting_devices(replicas, samples, limit=visible_gpus() if gpu else 1))
    plan = plan_batch(config.batch, devices=devices, passes=config.trainer.passes, sync=sync)
    check_recipe(config, plan)
    return plan


def content_id(source: str, key: str) -> str:
    """Return a hash of initial weights: of the last checkpoint of a run folder, or of a file.

    Raises:
        UserError: there are no weights; the message names the setting `key`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        checkpoints = sorted((path / "checkpoints").glob("step-*.pt"))
        if not checkpoints:
            raise UserError(f"{key}={source} is a folder without checkpoints. Give a run folder or a file")
        path = checkpoints[-1]
    if not path.is_file():
        raise UserError(f"{key}={source}: there is no such run folder or file")
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def identity(
    config: DictConfig,
    values: dict[str, Any],
    *,
    content_id: Callable[[str, str], str] = content_id,
    data: str | None = None,
) -> str:
    """Return a hash of everything that changes the result: values, data, and the content of initial weights.

    Args:
        content_id: returns the hash of initial weights, from the setting's value and key.
        data: the fingerprint of the data, where it is known.
    """
    contents = {
        key: content_id(values["model"][key], f"model.{key}") for key in INITIAL_WEIGHTS if values["model"][key]
    }
    values = {**values, "model": {**values["model"], **contents}}
    defaults = default_values(values["norm"]["name"], values["task"]["name"])
    return config_hash(values, defaults=defaults, fingerprint=fingerprint(config.data) if data is None else data)


def prepare(folder: RunFolder, values: dict[str, Any], hash8: str, *, data_id: str) -> bool:
    """Make the run folder, or check that the existing one belongs to this run; write config and provenance.

    Args:
        data_id: a hash of the data's fingerprint, which the worker compares with the data that it opens.

    Returns:
        Whether this call made the folder.
    """
    made = not folder.path.exists()
    if not made and folder.config_file.is_file():
        _check_same_run(folder, hash8)
    folder.create(OmegaConf.to_yaml(OmegaConf.create(values)))
    folder.error_file.unlink(missing_ok=True)
    _note_start(folder, hash8, data_id)
    return made


def _keep_config(folder: RunFolder, values: dict[str, Any], hash8: str) -> None:
    """Write the configuration of a finished run again, if its file is missing or damaged."""
    try:
        folder.read_config()
    except UserError:
        _check_same_run(folder, hash8)
        folder.create(OmegaConf.to_yaml(OmegaConf.create(values)))
        print(f"{folder.config_file} was missing or damaged. It was written again")


def _note_start(folder: RunFolder, hash8: str, data_id: str) -> None:
    """Write the provenance of this start: at the top level for the first start, in a list for later ones."""
    now = collect([*sys.argv[0].split(), *sys.argv[1:]])
    first = read_json(folder.provenance_file)
    if first is None:
        start, provenance = 0, {**now, "config_hash": hash8, "data_id": data_id, "resumed": []}
    else:
        start, provenance = len(first["resumed"]) + 1, {**first, "resumed": [*first["resumed"], now]}
    write_json_atomic(folder.provenance_file, provenance)
    patch = uncommitted_patch()
    if patch:
        name = f"uncommitted-{start}.patch" if start else "uncommitted.patch"
        write_text_atomic(folder.path / name, patch)


def on_gpu(device: str, key: str) -> bool:
    """Return whether workers will run on GPUs; `key` is the name of the setting.

    Raises:
        UserError: the setting asks for a GPU and there is none.
    """
    if device == "cuda" and visible_gpus() == 0:
        raise UserError(f"{key}=cuda, but torch finds no GPU: {missing_gpu()}. Type {key}=cpu to use the CPU")
    return device != "cpu" and visible_gpus() > 0


def _note_missing_gpu(device: str) -> None:
    """Warn that the CPU is used, if the user seems to expect a GPU."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if device == "auto" and visible_gpus() == 0 and (chosen.strip() not in ("", "-1") or shutil.which("nvidia-smi")):
        found = f"CUDA_VISIBLE_DEVICES={chosen}; " if chosen else ""
        print(f"exnorm: warning: torch finds no GPU ({found}{missing_gpu()}); the CPU is used", file=sys.stderr)


def _count_devices(wanted: int | None, key: str, gpu: bool) -> int | None:
    """Return the number of workers that the setting `key` asks for, or None; on GPUs not more than exist."""
    if wanted is None:
        return None
    _check_positive(wanted, key)
    if gpu and wanted > visible_gpus():
        raise UserError(f"{key}={wanted}, but {visible_gpus()} GPUs are visible. Use at most {visible_gpus()}")
    return wanted


def _processes_of(job: Job, wanted: int | None) -> int:
    """Return the number of processes of a job, which `trainer.devices` has to agree with."""
    size = job.place.size
    if wanted not in (None, size):
        raise UserError(f"trainer.devices={wanted}, but {size} processes were started. Leave trainer.devices out")
    return size


def _set_aside(folder: RunFolder, earlier: Path) -> None:
    """Rename an earlier run, which is kept until the new one has finished. If one is kept already, remove this one."""
    if earlier.exists():
        shutil.rmtree(folder.path)
    else:
        folder.path.rename(earlier)


def _is_worthless(folder: RunFolder, *, beside: Path) -> bool:
    """Return whether nothing of a failed run is worth keeping; its metrics are, unless an earlier run of it exists."""
    if any(folder.checkpoints.glob("*.pt")) or folder.bad_images_file.is_file():
        return False
    return beside.exists() or not folder.metrics_file.is_file()


def _remove(folder: RunFolder) -> None:
    """Remove an incomplete run folder, and its parent folders if they are empty then."""
    shutil.rmtree(folder.path)
    with suppress(OSError):
        folder.path.parent.rmdir()
        folder.path.parent.parent.rmdir()


def _check_same_run(folder: RunFolder, hash8: str) -> None:
    """Raise UserError if another config made the folder; it has this run's name, so somebody renamed it."""
    other = (read_json(folder.provenance_file) or {}).get("config_hash", hash8)
    if other != hash8:
        raise UserError(f"{folder.path} was made by another config ({other}). Move it away, or use runs=DIR")


def _check_positive(value: int, key: str) -> None:
    if value < 1:
        raise UserError(f"{key}={value} is not possible; give 1 or more")


def _check_cuda_graph(config: DictConfig, *, gpu: bool) -> None:
    if not gpu:
        raise UserError("trainer.cuda_graph=true needs a GPU, and this run uses the CPU. Leave it out")
    if config.trainer.compile:
        raise UserError("trainer.cuda_graph=true and trainer.compile=true do not work together. Set one of them")


def _check_choice(value: Any, key: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value} is unknown; allowed: {', '.join(allowed)}")
