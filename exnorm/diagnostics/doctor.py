"""`exnorm doctor`: check that this installation works on this machine. Each check runs real code on small data."""

import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from exnorm.runs.provenance import cpu_model, versions
from exnorm.runs.subprocesses import available_cores

MIN_FREE_GIB = 5.0


def run() -> int:
    """Print one line per check; return 0 if all passed, else 1."""
    passed = True
    for name, check in CHECKS.items():
        try:
            print(f"ok    {name}: {check()}", flush=True)
        except Exception as problem:  # noqa: BLE001 - every failure is printed, and the next check runs
            passed = False
            print(f"FAIL  {name}: {' '.join(str(problem).split()) or type(problem).__name__}", flush=True)
    return 0 if passed else 1


def _python() -> str:
    if not (3, 11) <= sys.version_info < (3, 14):
        raise RuntimeError(f"this is Python {platform.python_version()}; exnorm needs Python 3.11 to 3.13")
    return f"{platform.python_version()} on {platform.system()}"


def _packages() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def _matching_pair() -> str:
    import torch
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5)
    if kept.tolist() != [0]:
        raise RuntimeError(f"torchvision.ops.nms kept {kept.tolist()} instead of [0]")
    return f"torch {torch.__version__} and torchvision {torchvision.__version__} work together"


def _devices() -> str:
    import torch

    cpu = f"{cpu_model()}, {available_cores()} cores"
    if not torch.cuda.is_available():
        return f"{cpu}; no GPU"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{cpu}; GPUs: {', '.join(names)}; bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"


def _normalizers() -> str:
    import torch

    from exnorm import ops
    from exnorm.config.groups import group_options
    from exnorm.surgery import norm_class

    names = group_options("norm")
    with ops.using_backend("eager"):  # a compilation would take minutes
        for name in names:
            x = torch.randn(2, 8, 4, 4, requires_grad=True)
            norm_class(name)(8)(x).sum().backward()
            if x.grad is None or not x.grad.isfinite().all():
                raise RuntimeError(f"{name}: its gradient is not finite")
    return f"{', '.join(names)} run forward and backward"


def _data() -> str:
    from exnorm.config.compose import compose_train
    from exnorm.data import load

    splits = load(compose_train(["data=digits"]).data)
    splits.train.open_image(0)
    return f"digits: {len(splits.train)} training and {len(splits.val)} validation images"


def _disk() -> str:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    with tempfile.NamedTemporaryFile(dir=Path.cwd()):
        pass
    if free_gib < MIN_FREE_GIB:
        raise RuntimeError(f"only {free_gib:.1f} GiB are free in {Path.cwd()}; runs need {MIN_FREE_GIB:.0f} GiB")
    return f"{free_gib:.0f} GiB are free in the current folder, and it is writable"


def _wandb() -> str:
    import wandb

    if wandb.login(prompt=False, verify=False):
        return "a key is stored; logger=online uses it"
    return "no key is stored, so runs are logged offline. Type wandb login to store one"


CHECKS: dict[str, Callable[[], str]] = {
    "Python": _python,
    "packages": _packages,
    "torch pair": _matching_pair,
    "devices": _devices,
    "normalizers": _normalizers,
    "data": _data,
    "disk": _disk,
    "W&B": _wandb,
}
