"""What is shipped: the wheel works outside the repository, pins are exact, no file holds a registry address."""

import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import exnorm

ROOT = Path(__file__).resolve().parents[1]
# Written in two halves, so that this file does not hold them.
FORBIDDEN = [
    first + second
    for first, second in [
        ("pypi", ".org"),
        ("pythonhosted", ".org"),
        ("download.pytorch", ".org"),
        ("registry.npmjs", ".org"),
        ("conda.anaconda", ".org"),
        ("--index", "-url"),
        ("--extra-index", "-url"),
        ("--find", "-links"),
    ]
]


def normalized(name: str) -> str:
    """Return the name of a distribution as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Return the lines of constraints.txt; an AssertionError names one that is no exact pin."""
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = {}
    for line in lines:
        if not line or line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line)
        assert match, f"no exact pin: {line}"
        found[match[1]] = match[2]
    return found


def test_every_constraint_is_an_exact_pin_and_every_dependency_has_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + extras["dev"] + extras["docs"]
    names = {normalized(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in required}
    assert names <= set(pins()), f"not pinned: {names - set(pins())}"


def test_the_constraints_leave_the_cuda_libraries_to_torch() -> None:
    assert not [name for name in pins() if name.startswith(("nvidia-", "cuda-")) or name == "triton"]


def test_no_file_holds_the_address_of_a_package_registry() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is no list of the files")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert ROOT / "pyproject.toml" in files
    for file in files:
        text = file.read_bytes().decode(errors="ignore").lower()
        assert not [address for address in FORBIDDEN if address in text], file


def test_the_version_is_the_same_everywhere() -> None:
    assert f"\nversion: {exnorm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{exnorm.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel."""
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment that has the wheel and sees this environment's dependencies.

    A line of a .pth file adds a folder without reading the .pth files in it: an editable exnorm stays invisible.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    where = run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout.strip()
    Path(where, "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "bin"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the source distribution."""
    return build("sdist", tmp_path_factory.mktemp("sdist"))


def build(kind: str, folder: Path) -> Path:
    """Build a distribution from the checkout without an isolated environment, and return the only file in `folder`."""
    run(sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.iterdir()
    return built


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that has to succeed, without a PYTHONPATH through which it would see the checkout."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_configuration_and_the_papers_numbers_only(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    conf = {f"exnorm/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")}
    code = {
        file.relative_to(ROOT).as_posix()
        for kind in ("py", "cpp", "html")
        for file in (ROOT / "exnorm").rglob(f"*.{kind}")
    }
    published = {f"exnorm/published/{file.name}" for file in (ROOT / "results" / "published").iterdir()}
    assert conf and published and shipped == conf | code | published
    assert [name for name in names if name.endswith("licenses/LICENSE")]


@pytest.mark.slow
def test_the_installed_wheel_lists_and_trains_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    location = run(installed / "python", "-c", "import exnorm; print(exnorm.__file__)", cwd=tmp_path).stdout
    assert Path(location.strip()).is_relative_to(installed.parent)
    norms = run(installed / "exnorm", "list", "norms", cwd=tmp_path).stdout
    assert {line.split()[0] for line in norms.splitlines()} >= {"bn", "en", "sn"}
    run(installed / "python", "-c", "from exnorm.report.published import claims; assert claims()", cwd=tmp_path)
    tiny = ["model=resnet18", "model.name=test_resnet", "norm=bn"]
    options = [*tiny, "trainer.epochs=1", "data.workers=0", "logger=off"]
    run(installed / "exnorm", "train", *options, cwd=tmp_path)
    assert len(list(tmp_path.rglob("record.json"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_a_registry_accepts_the_metadata_and_shows_the_readme(wheel: Path, sdist: Path) -> None:
    """`twine check` renders the description as registries do; a warning, such as a missing one, is an error."""
    done = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", wheel, sdist, cwd=wheel.parent)
    assert re.findall(r": (PASSED|FAILED)", done.stdout) == ["PASSED", "PASSED"], done.stdout


@pytest.mark.slow
def test_the_source_distribution_holds_what_its_tests_and_its_documentation_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("conf", "docs", "examples", "exnorm", "scripts", "tests")
    needed = {file.relative_to(ROOT).as_posix() for name in folders for file in (ROOT / name).rglob("*.*")}
    needed = {name for name in needed if "__pycache__" not in name and (ROOT / name).is_file()}
    assert needed | {"mkdocs.yml", "README.md", "Makefile", "constraints.txt", "pyproject.toml"} <= names
