"""The folder for files made once per machine: compiled code, drawn images, scans of data sets, the list of models."""

import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import platformdirs

from exnorm.config.errors import UserError

PRIVATE = 0o700  # compiled libraries are loaded from it
OTHERS_MAY_WRITE = 0o022


def cache_folder() -> Path:
    """Return the user's cache folder, `$XDG_CACHE_HOME/exnorm` on Linux, else one in the temporary folder.

    Only this user can write into the folder: it has mode 0700 and belongs to this user. If its mode was wider before,
    files that other users put there are removed.

    Raises:
        UserError: neither folder can be used.
    """
    problems = []
    for folder in (*_in_home(), Path(tempfile.gettempdir()) / f"exnorm-{os.getuid()}"):
        problem = _problem_with(folder)
        if problem is None:
            return folder
        problems.append(f"{folder} {problem}")
    raise UserError(
        f"there is no folder for compiled code: {'; '.join(problems)}. Set XDG_CACHE_HOME to a folder that you own"
    )


def _in_home() -> list[Path]:
    """Return the system's cache folder in a list; the list is empty for a user without a home folder."""
    try:
        folder = platformdirs.user_cache_path("exnorm")
    except RuntimeError:  # the system does not know the user
        return []
    return [folder] if folder.is_absolute() else []  # older versions of platformdirs return ~/.cache as it is


def _problem_with(folder: Path) -> str | None:
    """Make a folder, or check the existing one; return why it cannot be used, or None."""
    try:
        folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid != os.getuid():
            return f"belongs to the user {found.st_uid} and not to {os.getuid()}"
        if stat.S_IMODE(found.st_mode) != PRIVATE:
            _make_private(folder)
    except OSError as problem:
        return f"cannot be used ({problem.strerror})"
    if folder.stat().st_mode & OTHERS_MAY_WRITE:
        return "can be written by other users, on a file system that does not let this change"
    return None if os.access(folder, os.W_OK) else "cannot be written"


def _make_private(folder: Path) -> None:
    """Restrict a folder that has a wider mode to this user, and remove the files of other users in it."""
    was_open = folder.stat().st_mode & OTHERS_MAY_WRITE
    folder.chmod(PRIVATE)
    if not was_open:
        return
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent) / name for name in (*folders, *files)):
            if path.lstat().st_uid == os.getuid():
                continue
            print(f"exnorm: warning: {path} is another user's file and is removed", file=sys.stderr, flush=True)
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)
