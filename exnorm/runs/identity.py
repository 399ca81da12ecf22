"""The identity of a run: a hash of every value that changes the result, and the folder named after it.

    hash8 = first 8 hex digits of sha256( sorted JSON of {key: value that differs from its default} + fingerprint )

A value equal to its default is left out, so a new option does not change the hashes of earlier runs.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

# Paths, speed, hardware and output of a run; the seed is in the folder's name.
EXCLUDED = frozenset(
    {
        "data.root",
        "data.roots",
        "data.exclude",  # the content of this file and the next three is in the fingerprint of the data
        "data.noise.file",
        "data.train_list",
        "data.val_list",
        "data.cache",
        "data.max_bad_fraction",
        "data.epochs",  # trainer.epochs, optim.schedule and optim.lr_per_256 have the values that were used
        "data.schedule",
        "data.lr_per_256",
        "data.workers",
        "trainer.device",
        "trainer.devices",
        "trainer.passes",
        "trainer.channels_last",
        "trainer.compile",
        "trainer.cuda_graph",
        "trainer.deterministic",
        "trainer.checkpoint_every",
        "trainer.checkpoint_every_steps",
        "trainer.max_hours",
        "trainer.snapshots",
        "trainer.eval_batch_size",
        "runs",
        "fresh",
        "seed",
    }
)
EXCLUDED_GROUPS = ("logger.", "ops.")


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings under dotted keys; a list is one value, an empty mapping none."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_hash(config: dict[str, Any], *, defaults: dict[str, Any], fingerprint: str) -> str:
    """Return 8 hex digits for a resolved configuration and the fingerprint of its data.

    `defaults` has the shape of `config` (`exnorm.config.compose.default_values`); a key that it lacks is always in
    the hash. An integer counts as a float if its default is a float.
    """
    usual = flatten(defaults)
    counted = {}
    for key, value in flatten(config).items():
        if key in EXCLUDED or key.startswith(EXCLUDED_GROUPS):
            continue
        if isinstance(usual.get(key), float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if key not in usual or value != usual[key]:
            counted[key] = value
    text = json.dumps([counted, fingerprint], sort_keys=True, allow_nan=False)
    return short_hash(text)


def short_hash(text: str) -> str:
    """Return 8 hex digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_dir(config: dict[str, Any], *, hash8: str) -> Path:
    """Return `<runs>/<data>/<model>-<norm>-<batch>-<hash8>-s<seed>`."""
    parts = (config["model"]["name"], config["norm"]["name"], config["batch"], hash8, f"s{config['seed']}")
    name = "-".join(str(part) for part in parts)
    return Path(config["runs"]) / in_path(config["data"]["name"]) / in_path(name)


def in_path(name: str) -> str:
    """Make a name safe as one part of a path."""
    return name.replace("/", "_").replace("\\", "_").replace(":", "_")
