"""The cache folder, from which compiled code is loaded: one for the package, and nobody else's."""

import os
import pwd
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT

from exnorm.config.cache import cache_folder
from exnorm.config.errors import UserError

ANOTHER_USER = 54321
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can make another user's files")


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder, a cache and a temporary folder for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def mode(path: Path) -> int:
    """The permissions of a path."""
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_the_folder_is_the_users_alone_whatever_the_umask_is(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = cache_folder()
    finally:
        os.umask(before)
    assert folder == tmp_path / "xdg" / "exnorm" and mode(folder) == 0o700


def test_without_a_variable_it_is_in_the_home_folder_also_for_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "exnorm"


def test_a_user_whom_the_system_does_not_know_has_a_private_one_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a number: no HOME, no entry in passwd."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    folder = cache_folder()
    assert folder == tmp_path / "tmp" / f"exnorm-{os.getuid()}" and mode(folder) == 0o700
    assert not (tmp_path / "~").exists()


def test_a_folder_that_others_could_write_is_closed_and_kept(tmp_path: Path) -> None:
    """Earlier versions made it with the mode that the umask left."""
    (tmp_path / "xdg" / "exnorm").mkdir(parents=True)
    (tmp_path / "xdg" / "exnorm").chmod(0o777)
    (tmp_path / "xdg" / "exnorm" / "native.so").write_text("mine")
    folder = cache_folder()
    assert mode(folder) == 0o700 and (folder / "native.so").read_text() == "mine"


@as_root
def test_what_another_user_put_into_an_open_folder_is_not_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "xdg" / "exnorm"
    (folder / "BatchNorm-1").mkdir(parents=True)
    folder.chmod(0o777)
    for name in ("mine.so", "planted.so", "BatchNorm-1/forward.so"):
        (folder / name).write_text(name)
    (folder / "theirs").mkdir()
    for name in ("planted.so", "BatchNorm-1/forward.so", "theirs"):
        os.chown(folder / name, ANOTHER_USER, ANOTHER_USER)
    assert cache_folder() == folder
    assert sorted(path.name for path in folder.rglob("*")) == ["BatchNorm-1", "mine.so"]
    assert capsys.readouterr().err.count("another user's file") == 3


@as_root
def test_another_users_folder_is_not_used_wherever_it_is(tmp_path: Path) -> None:
    """Who knows the name of the folder in the shared temporary folder can make it first."""
    for folder in (tmp_path / "xdg" / "exnorm", tmp_path / "tmp" / f"exnorm-{os.getuid()}"):
        folder.mkdir(parents=True)
    os.chown(tmp_path / "xdg" / "exnorm", ANOTHER_USER, ANOTHER_USER)
    assert cache_folder() == tmp_path / "tmp" / f"exnorm-{os.getuid()}"
    os.chown(tmp_path / "tmp" / f"exnorm-{os.getuid()}", ANOTHER_USER, ANOTHER_USER)
    with pytest.raises(UserError, match=rf"belongs to the user {ANOTHER_USER} .*Set XDG_CACHE_HOME"):
        cache_folder()


def test_a_folder_that_cannot_be_made_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "xdg").write_text("a file")
    assert cache_folder().parent == tmp_path / "tmp"


def test_the_whole_package_has_one_cache_folder(tmp_path: Path) -> None:
    """Compiled code, drawn images and the list of models come from the folder whose owner was checked."""
    code = (
        "import sys\n"
        "from exnorm.config import backbones\n"
        "from exnorm.ops import native\n"
        "from exnorm.data import rendered\nfrom exnorm.data.sets import glyphs\n"
        "backbones.LIST_MODELS = \"print('a')\"\n"
        "backbones.timm_names()\n"
        "native._built()\n"
        "from exnorm.config.compose import compose_train\n"
        "from exnorm import data\n"
        "few = [f'data.num_{what}=10' for what in ('train', 'val', 'classes')]\n"
        "data.load(compose_train(['data=glyphs', *few]).data)\n"
    )
    home = tmp_path / "home"
    env = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    env |= {"HOME": str(home), "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    kinds = {path.name.partition("-")[0] for path in (home / ".cache" / "exnorm").iterdir()}
    assert {"timm", "native", "images"} <= kinds
    assert [path.name for path in (home / ".cache").iterdir()] == ["exnorm"]
    assert not list((tmp_path / "tmp").glob("exnorm*"))
