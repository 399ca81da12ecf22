"""The formats that hold weights: a safetensors file, and a folder in timm's hub layout.

The hub layout is `config.json`, with the architecture and the preprocessing, and `model.safetensors`. timm builds the
network of such a folder, but with its own norms. So the folder is used in three steps: `timm.create_model` builds the
network, `exnorm.convert` replaces its norms, and `timm.models.load_checkpoint` loads the weights. `README.md` in the
folder has these lines.
"""

import json
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import OmegaConf
from safetensors.torch import save
from timm.models._hub import save_config_for_hf  # what `timm.models.push_to_hf_hub` calls; it has no public name

from exnorm.config.errors import UserError
from exnorm.config.groups import is_own
from exnorm.config.options import imported_class
from exnorm.data.transforms import crop_pct
from exnorm.engine.checkpoint import load
from exnorm.export.exported import Exported, Loaded, write_synced
from exnorm.models.conversion import chosen_options
from exnorm.runs.folder import write_text_atomic

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"  # the first two names are timm's
OF_OTHER_WEIGHTS = ("tag", "license", "origin_url", "paper_ids")  # what timm says about its own weights
USUAL = {"replace": ("batch",), "keep": ()}  # the defaults of `exnorm.convert`
HERE = 'folder = "."  # the folder of this file\n'
CARD_TEXT = """---
library_name: timm
tags: [image-classification, timm, exnorm]
---
# {architecture} with {norm}
A {architecture} with the normalization layer `{norm}` of exnorm, for {classes} classes and images of {size} x {size}
pixels. `config.json` has the preprocessing and the names of the classes.

```python
{recipe}```

`exnorm.load("model.safetensors")` does the same in one step.
"""


def write_safetensors(exported: Exported, path: Path) -> None:
    """Write parameters and buffers under the model's names, with the description as metadata."""
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)  # two names of one tensor become two tensors
        for name, tensor in exported.model.state_dict().items()
    }
    write_synced(path, save(tensors, metadata={"format": "pt", **exported.description}))  # as other programs write it


def read_safetensors(path: Path) -> Loaded:
    """Return the network in a safetensors file, built from its metadata."""
    return Loaded(load(path))


def write_hub_folder(exported: Exported, path: Path) -> None:
    """Write a folder in timm's hub layout.

    Raises:
        UserError: timm cannot build the network.
    """
    model: Any = exported.model
    if not hasattr(model, "pretrained_cfg"):
        raise UserError(
            f"--format hf: timm cannot build the network of {exported.name} task={exported.config.task.name}. Type "
            "--format safetensors, and read the file with exnorm.load"
        )
    path.mkdir()
    write_safetensors(exported, path / WEIGHTS)
    options: Any = OmegaConf.to_container(exported.config.model.options, resolve=True)
    data = exported.config.data
    save_config_for_hf(
        model,
        str(path / CONFIG),
        model_config={"label_names": json.loads(exported.description["class_names"])},
        model_args=options,
        data_config={
            "input_size": (3, data.image_size, data.image_size),
            "mean": tuple(data.mean),
            "std": tuple(data.std),
            "interpolation": "bilinear",
            "crop_pct": crop_pct(data),
            "crop_mode": "center",
        },
    )
    if not exported.config.model.pretrained:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        for key in OF_OTHER_WEIGHTS:
            config["pretrained_cfg"].pop(key, None)
        write_text_atomic(path / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text_atomic(path / CARD, _card(exported))


def read_hub_folder(path: Path) -> Loaded:
    """Return the network in a folder, by the lines in its README."""
    names: dict[str, Any] = {"folder": str(path)}
    lines = (path / CARD).read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(lines.replace(HERE, ""), names)  # `recipe` wrote them a moment ago
    return Loaded(names["model"])


def _card(exported: Exported) -> str:
    config = exported.config
    return CARD_TEXT.format(
        architecture=architecture_of(config),
        norm=config.norm.name,
        classes=exported.description["num_classes"],
        size=config.data.image_size,
        recipe=recipe(config),
    )


def recipe(config: Any) -> str:
    """Return the Python code that makes `model` from `folder`."""
    norm: Any = OmegaConf.to_container(config.norm, resolve=True)
    given = {key: tuple(config.model[key]) for key in USUAL}
    options = {key: value for key, value in given.items() if value != USUAL[key]}
    options |= chosen_options(imported_class("norm", norm["_target_"]), norm)
    name = norm["name"] if is_own("norm", norm["name"]) else norm["_target_"]
    words = [repr(name), *(f"{key}={value!r}" for key, value in options.items())]
    architecture = architecture_of(config)
    registers = timm.models.model_entrypoint(architecture).__module__.startswith("exnorm.")
    return (
        "import exnorm, timm\n"
        + (f"import exnorm.models  # tells timm of {architecture}\n" if registers else "")
        + HERE
        + 'model = timm.create_model(f"local-dir:{folder}")\n'
        + f"exnorm.convert(model, {', '.join(words)})\n"
        + f'timm.models.load_checkpoint(model, f"{{folder}}/{WEIGHTS}")\n'
        + "model.eval()\n"
    )


def architecture_of(config: Any) -> str:
    """Return the name of the network in timm."""
    return config.model.architecture or config.model.name
