"""README.md and docs/ say only what works: their blocks run, their settings, commands and names exist."""

import importlib
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from conftest import ROOT, CliRunner
from engine_cases import make_image_folder, train_here
from omegaconf import OmegaConf
from snippet_cases import COMMAND, PAGES, Block, Line, blocks, code_words, parsed, shell_lines, single_runs

from exnorm.cli import app
from exnorm.config.compose import check_train, compose_eval, compose_train
from exnorm.config.explain import FREE, known_values
from exnorm.config.groups import group_options, groups
from exnorm.config.words import without_submit

BLOCKS = [block for page in PAGES for block in blocks(page)]
LINES = [line for block in BLOCKS if block.is_shell for line in shell_lines(block)]
EXNORM = [line for line in LINES if line.name == "exnorm"]
TRAINING = [line for line in EXNORM if line.words[0] == "train"]

ELSEWHERE = "docs/frameworks.md"  # tests/test_frameworks.py runs its blocks one after the other
# Blocks that are no Python and no commands, by a text that begins them, with the reason.
NOT_RUN = {"y = act(a * (x - m) + b + r)": "a formula"}
# What the reader has, for blocks of Python that begin with these words.
PRELUDES = {
    "from exnorm.testing import check_norm": (
        "import exnorm\n"
        "class MyNorm(exnorm.norms.InstanceNorm):\n"
        "    def __init__(self, num_features, *, alpha=1.0, **options):\n"
        "        super().__init__(num_features, **options)\n"
    ),
    'model = timm.create_model(f"local-dir:{folder}")': "import exnorm, timm\n",
    "norms = {id(p) for m in model.modules()": (
        "import exnorm, timm\nmodel = exnorm.convert(timm.create_model('test_resnet'), 'en')\n"
    ),
}
# Small replacements in blocks of Python, with the reason.
CHANGES = {
    '"runs/..."': ("RUN_DIR", "the reader's own run"),
    "alpha=0.5)": ("alpha=0.5, compiled=False)\n\ntest_my_norm()", "pytest calls it; tests/test_testing.py compiles"),
}
# Settings that make a training one of seconds. A line with data of the reader is composed only.
SMALL = ["model=resnet_mini", "data.workers=0", "logger=off", "ops.backend=eager", "trainer.steps=1", "batch=2x4"]
SMALL_DATA = {"glyph_scenes": ["data.num_train=16", "data.num_val=4"]}
OWN_DATA = ("imagenet", "webvision", "camvid", "ade20k", "cifar10", "cifar100")


class Runs(NamedTuple):
    """What the pages call RUN_DIR, DIR and IMAGE."""

    classification: Path
    foldable: Path  # its layers are BN
    segmentation: Path
    folder: Path
    image: Path

    def filled(self, words: list[str], *, masks: bool = False) -> list[str]:
        """Return words with the places that they name."""
        run = str(self.foldable if words[0] == "fold" else self.segmentation if masks else self.classification)
        places = {"RUN_DIR": run, "RUN_DIR...": run, "IMAGE...": str(self.image), "IMAGE|FOLDER...": str(self.image)}
        folders = {"RUN_DIR": run, "DIR": str(self.folder)}
        texts = [places.get(word, word) for word in words]
        return [re.sub(r"(?<==)(RUN_DIR|DIR)\b", lambda found: folders[found[1]], text) for text in texts]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Train a network on digits with wrong labels, and one on scenes with masks."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("snippets")
    noise = ["data.noise.kind=symmetric", "data.noise.rate=0.4"]
    resnet = [*SMALL, "model=resnet18", "model.name=test_resnet"]
    labels = train_here(["train", "norm=en", *noise, *resnet], folder / "a")
    foldable = train_here(["train", "norm=bn", *resnet], folder / "c")
    scenes = ["task=segmentation", "data=glyph_scenes", *SMALL_DATA["glyph_scenes"]]
    masks = train_here(["train", "norm=en", *scenes, *SMALL], folder / "b")
    Image.new("RGB", (40, 36), (200, 30, 90)).save(folder / "image.png")
    make_image_folder(folder)
    return Runs(labels, foldable, masks, folder, folder / "image.png")


def command(name: str) -> Any:
    """Return the command line of exnorm, or one of its commands."""
    found: Any = typer.main.get_command(app)
    for word in name.split():
        found = found.commands[word]
    return found


PYTHON = [
    block
    for block in BLOCKS
    if not block.is_shell and not block.language and not any(map(block.text.startswith, NOT_RUN))
]


@pytest.mark.parametrize("block", BLOCKS, ids=[block.place for block in BLOCKS])
def test_a_block_is_made_of_commands_or_is_python(block: Block) -> None:
    """So none is overlooked by the tests below. The others say what they are: outputs (text) and YAML files."""
    assert block.language in ("", "text", "yaml")
    if block in PYTHON:
        compile(block.text, block.place, "exec")
    if block.language == "yaml":
        assert OmegaConf.create(block.text)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_no_block_of_commands_follows_a_list(page: Path) -> None:
    """GitHub takes what is indented below a list for a part of its last item, and shows no block."""
    text = page.read_text(encoding="utf-8")
    commands = re.findall(r"^(?:[*-]|\d+\.) [^\n]*\n\n {4}(\S[^\n]*)", text, re.MULTILINE)
    assert not [command for command in commands if COMMAND.match(command)]


def test_the_exceptions_are_those_of_the_pages() -> None:
    for text in (*NOT_RUN, *PRELUDES):
        assert any(block.text.startswith(text) for block in BLOCKS), text
    for text in CHANGES:
        assert any(text in block.text for block in PYTHON), text


def write_studies(folder: Path) -> None:
    """Write the study of the tutorial, under the names that the pages give to studies of their readers."""
    (study,) = [block.text for block in BLOCKS if block.language == "yaml" and "\naxes:" in block.text]
    for name in ("tiny.yaml", "mine.yaml"):
        (folder / name).write_text(study, encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [block for block in PYTHON if not block.place.startswith(ELSEWHERE)], ids=lambda block: block.place
)
def test_a_block_of_python_runs(
    block: Block, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli_here: CliRunner
) -> None:
    """As a module of its own, behind what its reader has."""
    text = next((before for start, before in PRELUDES.items() if block.text.startswith(start)), "") + block.text
    for old, (new, _reason) in CHANGES.items():
        text = text.replace(old, new)
    if "{folder}" in text:
        done = cli_here("export", runs.classification, "--format", "hf", "--out", tmp_path / "hf")
        assert done.returncode == 0, done.stderr
    run = runs.foldable if "exnorm.fold(" in text else runs.classification
    head = f"RUN_DIR = {str(run)!r}\nfolder = {str(tmp_path / 'hf')!r}\n"
    (tmp_path / "snippet.py").write_text(head + text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "snippet", raising=False)
    importlib.import_module("snippet")


def test_the_data_set_of_the_pages_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML file that `docs/own-data.md` shows, in a folder of the reader."""
    (text,) = [block.text for block in BLOCKS if block.language == "yaml" and "\nname: my_photos" in block.text]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my_photos.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("EXNORM_CONF", str(tmp_path))
    config = compose_train(["data=my_photos"])
    check_train(config)
    own, usual = config.data, compose_train(["data=imagefolder"]).data
    assert (own.name, own.image_size, own.epochs) == ("my_photos", 64, 30) and own.scale == usual.scale


@pytest.mark.parametrize("line", TRAINING, ids=[f"{line.place} {' '.join(line.words[1:])}" for line in TRAINING])
def test_a_training_of_the_pages_composes(line: Line, tmp_path: Path) -> None:
    for words in single_runs(line.words[1:]):
        config = compose_train([re.sub(r"=(RUN_DIR|DIR)\b", f"={tmp_path}", word) for word in words])
        check_train(config)
        chosen = dict(word.split("=", 1) for word in words)
        assert config.norm.name == chosen.get("norm", "en") and config.data.name == chosen.get("data", "digits")


def needs_own_data(line: Line) -> bool:
    """Whether a line reads data that its reader has."""
    return any(f"data={name}" in line.words for name in OWN_DATA) or "data.noise.file=labels.csv" in line.words


OWN = [line for line in TRAINING if not needs_own_data(line)]


@pytest.mark.slow
@pytest.mark.parametrize("line", OWN, ids=[f"{line.place} {' '.join(line.words[1:])}" for line in OWN])
def test_a_training_of_the_pages_runs(line: Line, tmp_path: Path) -> None:
    """With a small network, one step, and where the line names one, its own recipe."""
    words = single_runs(line.words[1:])[0]
    data = next((word.removeprefix("data=") for word in words if word.startswith("data=")), "")
    own = [word for word in words if not word.startswith(("model=", "+model.options."))]
    if "data.root=DIR" in own:
        own[own.index("data.root=DIR")] = f"data.root={make_image_folder(tmp_path / 'images')}"
    run = train_here(["train", *own, *SMALL, *SMALL_DATA.get(data, [])], tmp_path)
    assert (run / "record.json").is_file()


def is_run(line: Line) -> bool:
    """Whether a command of the pages, other than a training, can run here. A study of the reader has no record."""
    own = line.words[1:] == ["tiny.yaml"]
    return line.words[0] not in ("train", "reproduce") and not needs_own_data(line) and not own


OTHERS = [line for line in EXNORM if is_run(line)]


@pytest.mark.slow
@pytest.mark.parametrize("line", OTHERS, ids=[f"{line.place} {' '.join(line.words)}" for line in OTHERS])
def test_another_command_of_the_pages_runs(line: Line, runs: Runs, tmp_path: Path, cli_here: CliRunner) -> None:
    """Studies, tables and reports read the records of the repository."""
    masks = line.place.startswith("docs/segmentation.md")
    words = runs.filled(line.words, masks=masks)
    words = [word.replace("test.window=713", "test.window=65") for word in words]  # the scenes are smaller
    for run in (runs.classification, runs.foldable):
        shutil.rmtree(run / "export", ignore_errors=True)  # an export overwrites nothing
    write_studies(tmp_path)
    if line.words[0] in ("table", "claims", "report"):
        words += ["--results", str(ROOT / "results")]
    if line.words == ["runs"]:
        words += [str(runs.folder / "a" / "runs")]
    done = cli_here(*words)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


EVALUATIONS = [line for line in EXNORM if line.words[0] == "eval"]


@pytest.mark.parametrize("line", EVALUATIONS, ids=[f"{line.place} {' '.join(line.words)}" for line in EVALUATIONS])
def test_an_evaluation_of_the_pages_composes(line: Line) -> None:
    compose_eval({"name": "digits"}, line.words[2:])


STUDIES = [line for line in EXNORM if line.words[0] == "reproduce"]


@pytest.mark.parametrize("line", STUDIES, ids=[f"{line.place} {' '.join(line.words)}" for line in STUDIES])
def test_a_study_of_the_pages_has_a_plan(line: Line, tmp_path: Path, cli_here: CliRunner) -> None:
    write_studies(tmp_path)
    done = cli_here(*line.words, *([] if "--plan" in line.words else ["--plan"]), "--results", ROOT / "results")
    assert done.returncode == 0 and " at scale " in done.stdout, f"{done.stdout}\n{done.stderr}"


def targets() -> list[str]:
    """Return the targets of the Makefile."""
    return re.findall(r"^([\w%-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def check_make(words: list[str]) -> None:
    """Check that the Makefile has the targets and the variables of a command."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, _ = word.partition("=")
        study = name.removeprefix("reproduce-table-")
        known = f"$({name}" in text if equals else name in targets() or study in group_options("study")
        assert known, f"make {word}"


def check_pip(words: list[str]) -> None:
    """Check that an extra of exnorm exists, and that the other packages are dependencies or named on purpose."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in words[1:]:
        extra = re.fullmatch(r"exnorm\[(\w+)\]", word)
        assert extra is None or extra[1] in project["optional-dependencies"], word


def check_exnorm(words: list[str]) -> None:
    """Check that a command exists, with its options, and that the settings of a training are known."""
    if words and words[0] == "--config-dir":
        words = words[2:]
    name = " ".join(words[: 2 if words[:1] == ["bench"] else 1])
    found = command("" if name.startswith(("-", "...")) else name)
    options = {option for parameter in found.params for option in parameter.opts}
    options |= {"--help", "-m", "--cfg", "--submit"}
    for word in words:
        assert not word.startswith("-") or word in options, f"exnorm {' '.join(words)}: no option {word}"
    if name in ("train", "eval"):
        for word in without_submit(words[1:])[0]:
            check_setting(word, name)


def check_setting(word: str, name: str = "train") -> None:
    """Check that KEY=VALUE names a setting or a group."""
    key = word.strip("'").lstrip("+").partition("=")[0]
    if "=" in word:
        assert key in known_values(name) or key in groups() or key.startswith(FREE), f"unknown key {key}"


def check_launched(words: list[str]) -> None:
    """Check the command of exnorm that a launcher starts; `tests/test_jobs.py` starts such commands."""
    check_exnorm(words[words.index("exnorm") + 1 :])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "make": check_make,
    "pip": check_pip,
    "exnorm": check_exnorm,
    "torchrun": check_launched,
    "srun": check_launched,
}


@pytest.mark.parametrize("line", LINES, ids=[f"{line.place} {line.name} {' '.join(line.words)}" for line in LINES])
def test_a_command_of_the_pages_exists(line: Line) -> None:
    """Each kind of command has its check: targets of make, extras of pip, commands and settings of exnorm, files."""
    assert line.name in (*CHECKS, "python", "source", "git"), line.name
    CHECKS.get(line.name, lambda words: None)(line.words)
    if line.name == "python" and line.words[0].endswith(".py") and "/" in line.words[0]:
        assert (ROOT / line.words[0]).is_file(), line.words[0]


def test_the_commands_and_settings_in_the_text_exist() -> None:
    seen = 0
    for page, code in code_words():
        if re.match(r"(exnorm|make|pip) ", code):
            line = parsed(page, code)
            CHECKS[line.name](line.words)
        elif re.match(r"'?\+?[a-z_0-9]+(\.[a-z_0-9]+)+=", code):
            for word in shlex.split(code):
                check_setting(word, "eval" if word.startswith("test.") else "train")
        else:
            continue
        seen += 1
    assert seen > 60


def test_the_names_and_files_in_the_text_exist() -> None:
    """Names that begin with `my` are the reader's."""
    seen = 0
    for page, code in code_words():
        if (name := re.match(r"exnorm(\.\w+)+", code)) and code not in ("exnorm.conf", "exnorm.json"):
            assert resolves(name[0]), f"{page}: {code}"
        elif re.fullmatch(r"(exnorm|conf|tests|scripts|results|examples|docs)/[\w./-]*", code) and "/my" not in code:
            assert (ROOT / code).exists(), f"{page}: {code}"
        else:
            continue
        seen += 1
    assert seen > 60


def resolves(name: str) -> bool:
    """Return whether a dotted name is a module or an attribute."""
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    for place, word in enumerate(rest, 1):
        if not hasattr(found, word):
            try:
                importlib.import_module(".".join([first, *rest[:place]]))
            except ModuleNotFoundError:
                return False
        found = getattr(found, word)
    return True
