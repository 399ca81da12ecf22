"""Collect where a result came from: code, versions, machine. Names of users and machines are not collected."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from exnorm.runs.lock import utc_now

PACKAGES = (
    "exnorm",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "scikit-learn",
    "hydra-core",
    "omegaconf",
    "wandb",
)
PATCH_BYTES = 1_000_000  # of uncommitted changes; a larger patch is cut, since it is probably data
CODE = ("exnorm", "conf")
TRACKED = (".", ":(exclude)results")  # the record that a study writes does not affect later runs
STUDY = "EXNORM_STUDY"  # set by `exnorm reproduce`: the study of a run, as JSON
CHECKOUT = Path(__file__).resolve().parents[2]


def collect(command: list[str]) -> dict[str, Any]:
    """Return time (UTC), command, interpreter, platform, processor, versions, commit of a checkout, and the study."""
    return {
        "time": utc_now(),
        "command": command,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "versions": versions(),
        "git": git_state(CHECKOUT),
        "study": json.loads(os.environ.get(STUDY, "null")),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result depends on, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Return the commit of a checkout and whether files outside `results/` changed; None for a wheel."""
    top = git(checkout, "rev-parse", "--show-toplevel")
    commit = git(checkout, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top.strip()).resolve() != checkout.resolve():
        return None
    changed = git(checkout, "status", "--porcelain", "--untracked-files=no", "--", *TRACKED)
    return {"commit": commit.strip(), "dirty": bool(changed or untracked_code(checkout))}


def untracked_code(checkout: Path) -> list[str]:
    """Return the files of code and configuration that git does not know yet."""
    listed = git(checkout, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE)
    return [name for name in (listed or "").split("\0") if name]


def uncommitted_patch() -> str | None:
    """Return the uncommitted changes outside `results/` as a patch, cut at a megabyte; None if there are none."""
    if git_state(CHECKOUT) is None:
        return None
    patch = git(CHECKOUT, "diff", "HEAD", "--", *TRACKED) or ""
    for name in untracked_code(CHECKOUT):
        patch += git(CHECKOUT, "diff", "--no-index", "--", "/dev/null", name) or ""
    if len(patch.encode()) > PATCH_BYTES:
        cut = patch.encode()[:PATCH_BYTES].decode(errors="ignore")
        return f"{cut}\n# cut here: the uncommitted changes are larger than {PATCH_BYTES} bytes\n"
    return patch or None


def git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints, or None where it fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    except OSError:
        return None
    found_difference = done.returncode == 1 and "--no-index" in arguments
    return done.stdout.decode(errors="replace") if done.returncode == 0 or found_difference else None
