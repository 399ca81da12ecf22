"""What an exported file says about its model: enough to build the model again, and to prepare images for it.

The values are texts, because the headers of ONNX and safetensors files take only texts. All but a few are JSON.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import safe_open

from exnorm import __version__
from exnorm.config.errors import UserError, first_line
from exnorm.config.schema import ModelConfig
from exnorm.data import MASKS
from exnorm.engine.check_task import read_task
from exnorm.engine.weight_files import read_file
from exnorm.runs.folder import RunFolder, read_json

PARTS = ("model", "norm", "task", "class_names")  # what a model is built from
FROM_ELSEWHERE = ("pretrained", "init_from", "init_ratios_from")  # initial weights, which the export replaces


def describe(folder: RunFolder, config: Any, state: Mapping[str, Any]) -> dict[str, str]:
    """Return the description of the model in a run's checkpoint.

    Args:
        config: the run's config.
        state: the content of the checkpoint.
    """
    model: Any = OmegaConf.to_container(config.model, resolve=True)
    values = {
        "model": {key: value for key, value in model.items() if key not in FROM_ELSEWHERE},
        "norm": OmegaConf.to_container(config.norm, resolve=True),
        "task": OmegaConf.to_container(config.task, resolve=True),
        "num_classes": len(state["classes"]),
        "class_names": list(state["classes"]),
        "preprocessing": preprocessing(config),
    }
    return {
        "exnorm_version": __version__,
        "run": str((read_json(folder.provenance_file) or {}).get("config_hash", "")),
        "step": str(state["step"]),
        "running_statistics": "batch_average" if state.get("calibrated") else "moving_average",
        **{key: json.dumps(value) for key, value in values.items()},
    }


def preprocessing(config: Any) -> dict[str, Any]:
    """Return how an image becomes an input: (pixels / 255 - mean) / std in RGB, after resizing and cropping."""
    data = config.data
    return {
        "mean": list(data.mean),
        "std": list(data.std),
        "resize": data.resize,  # px, of the shorter side
        "crop": None if config.task.targets == MASKS else data.image_size,  # px, of the centre; None: complete image
        "interpolation": "bilinear",
    }


def read_exported(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the config and the state from which `checkpoint.build_trained` builds the model of a safetensors file.

    Raises:
        UserError: the file is damaged, or `exnorm export` did not write it.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            texts = opened.metadata() or {}
    except Exception as problem:  # noqa: BLE001 - the reader has errors of its own for a strange file
        raise UserError(f"{path} cannot be read as weights ({first_line(problem)})") from None
    try:
        parts = {key: json.loads(texts[key]) for key in PARTS}
        parts["task"] = read_task(parts)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{path} does not say how to build its model, because exnorm export did not write it. Build the model, and "
            "load these weights into it"
        ) from None
    classes = parts.pop("class_names")
    config = OmegaConf.create(parts)
    config.model = OmegaConf.merge(OmegaConf.structured(ModelConfig), config.model)
    return config, {"classes": classes, "model": read_file(path)}
