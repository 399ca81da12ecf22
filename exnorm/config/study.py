"""Studies: a table of a paper as axes, settings and claims, in `conf/study/<id>.yaml` or in a file of one's own.

A cell is one choice of a value on every axis. What it runs is `exnorm train` with the settings of, in this order, the
scale (`conf/scale/`), the scale's rules (`when`), the study, the study at that scale, the cell's values, and the
study's rules, as far as its values meet them; the last setting of a key counts. A setting that begins with `eval:`
belongs to `exnorm eval`, run after the training.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any, NamedTuple

from exnorm.config.errors import UserError, suggest
from exnorm.config.groups import first_comment
from exnorm.config.metrics import Metric, metrics_of_task
from exnorm.config.options import USUAL_TASK
from exnorm.config.study_file import REPLACED, SCALES, has_scale, read_scale, read_study, seed_range
from exnorm.config.study_settings import SettingLayers, answers_of, as_list, as_text, meets, option_of

EVAL = "eval:"
TASK = "task="
SEED = "seed"

Key = tuple[tuple[str, str], ...]  # an axis and its value, for each axis in the study's order


@dataclass(frozen=True)
class Cell:
    """One entry of a study's table: what it is called, what is run for it, and with which seeds."""

    key: Key
    train: tuple[str, ...]
    evaluate: tuple[str, ...]
    seeds: tuple[int, ...] = field(compare=False)

    @property
    def name(self) -> str:
        """The values as one types them: `norm=sn batch=8x2`."""
        return cell_name(self.key)


@dataclass(frozen=True)
class Study:
    """A study at a scale, with all of its cells."""

    id: str
    named: str  # as the commands take it: its id, or the path of a file
    scale: str
    title: str
    values: Mapping[str, Any]  # of its yaml
    axes: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    sources: Mapping[str, tuple[str, ...]]  # runs whose checkpoints others begin with: settings by name
    notes: tuple[str, ...]  # what a reader of its numbers has to know
    scale_notes: tuple[str, ...]  # and of those of every study at this scale
    stand_ins: Mapping[str, str]  # what a value of an axis is at this scale, where it is something smaller
    threads: int | None  # of a run; None: all cores
    train_images: Mapping[str, int]  # of the data sets that do not say it in their configuration

    @property
    def metrics(self) -> tuple[str, ...]:
        """What its tables show, the first one first."""
        return tuple(self.values.get("metrics", (self.primary.name,)))

    @property
    def task_metrics(self) -> tuple[Metric, ...]:
        """The metrics of its task, the primary one first.

        Raises:
            UserError: its cells have different tasks.
        """
        found = {text.removeprefix(TASK) for cell in self.cells for text in cell.train if text.startswith(TASK)}
        if len(found) > 1:
            raise UserError(f"study {self.id}: its cells have the tasks {', '.join(sorted(found))}; give them one")
        return metrics_of_task(next(iter(found), USUAL_TASK))

    @property
    def primary(self) -> Metric:
        """The primary metric of its task."""
        return self.task_metrics[0]

    @property
    def followed(self) -> tuple[Cell, ...]:
        """The cells whose layers are recorded and drawn one by one."""
        return self._cells_of("layers_of")

    @property
    def by_class(self) -> tuple[Cell, ...]:
        """The cells, of a norm with ratios per image, whose ratios are recorded class by class."""
        return self._cells_of("classes_of")

    @property
    def by_label(self) -> tuple[Cell, ...]:
        """The cells, of a norm with ratios per image, of which it is recorded how well ratios tell wrong labels."""
        return self._cells_of("labels_of")

    def cell(self, values: Mapping[str, Any]) -> Cell:
        """The cell with these values.

        Raises:
            UserError: there is no such cell, or several.
        """
        found = self.cells_with(values)
        if len(found) != 1:
            raise UserError(f"study {self.id}: {len(found)} cells have {_written(values)}; name one")
        return found[0]

    def cells_with(self, values: Mapping[Any, Any]) -> tuple[Cell, ...]:
        """The cells with these values on some of the axes.

        Raises:
            UserError: there is none.
        """
        wanted = {str(axis): str(value) for axis, value in values.items()}
        found = tuple(cell for cell in self.cells if wanted.items() <= dict(cell.key).items())
        if not found:
            raise UserError(f"study {self.id}: no cell has {_written(values)}; axes: {', '.join(self.axes)}")
        return found

    def _cells_of(self, key: str) -> tuple[Cell, ...]:
        chosen = {cell for item in self.values.get(key, ()) for cell in self.cells_with(item)}
        return tuple(cell for cell in self.cells if cell in chosen)

    def label(self, value: str) -> str:
        """A value of an axis as tables show it."""
        return self.stand_ins.get(value, value)


def _written(values: Mapping[Any, Any]) -> str:
    return cell_name((str(axis), str(value)) for axis, value in values.items())


def cell_name(key: Iterable[tuple[str, str]]) -> str:
    """`norm=sn batch=8x2`."""
    return " ".join(f"{axis}={value}" for axis, value in key)


def load_study(name: str, scale: str, *, seeds: int | None = None) -> Study:
    """Read a study and lay out its cells; `seeds`, if given, is the number of seeds of every cell.

    Raises:
        UserError: no such study or scale, an unknown key, a value of another form, a cell or an axis that is not there.
    """
    file, values = read_study(name)
    if not has_scale(name, scale):
        offered = ", ".join(one for one in SCALES if has_scale(name, one))
        raise UserError(f"study {file.stem} has no scale {scale}. Its scales are {offered}")
    shared, own = read_scale(scale), values.get("scales", {}).get(scale, {})
    values = values | {key: own[key] for key in REPLACED if key in own}
    axes = {axis: _axis_values(axis, given) for axis, given in values["axes"].items()}
    layers = SettingLayers(shared, values, own)
    sources = {
        source: tuple(layers.resolve(texts, {}).values())
        for source, texts in values.get("sources", {}).items()
        if isinstance(texts, list)
    }
    cells = []
    others: dict[str, Study] = {}  # each is read once
    for chosen in itertools.product(*(options.items() for options in axes.values())):
        key = tuple((axis, value) for axis, (value, _) in zip(axes, chosen, strict=True))
        if any(meets(left_out, dict(key)) for left_out in own.get("leave_out", ())):
            continue
        given = layers.resolve([text for _, texts in chosen for text in texts], dict(key))
        for source, wanted in values.get("sources", {}).items():
            if isinstance(wanted, Mapping):
                if wanted["study"] not in others:
                    others[wanted["study"]] = load_study(wanted["study"], scale)
                begins = _cell_elsewhere(file.stem, wanted, dict(key), others[wanted["study"]])
                renamed = {option: _renamed(text, source, begins.name) for option, text in given.items()}
                if renamed != given:
                    sources[begins.name], given = begins.train, renamed
        counted = seeds if seeds is not None else _seeds(values, dict(key), given)
        cells.append(
            Cell(
                key,
                train=tuple(text for text in given.values() if not text.startswith(EVAL)),
                evaluate=tuple(text.removeprefix(EVAL) for text in given.values() if text.startswith(EVAL)),
                seeds=tuple(range(counted)),
            )
        )
    study = Study(
        file.stem,
        name,
        scale,
        title=first_comment(file) or file.stem,
        values=values,
        axes={axis: tuple(options) for axis, options in axes.items()},
        cells=tuple(cells),
        sources=sources,
        notes=(*values.get("notes", ()), *own.get("notes", ())),
        scale_notes=tuple(shared.get("notes", ())),
        stand_ins={**shared.get("stand_ins", {}), **own.get("stand_ins", {})},
        threads=own.get("threads", shared.get("threads")),
        train_images={**shared.get("train_images", {}), **own.get("train_images", {})},
    )
    _check_rules(study, own)
    _check_names(study)
    return study if seeds is not None else replace(study, cells=tuple(_with_fresh_seeds(study)))


def _with_fresh_seeds(study: Study) -> Iterator[Cell]:
    """Yield the cells, with the seeds of their own that comparisons have."""
    fresh: dict[Cell, set[int]] = {}
    for claim in study.values.get("claims", ()):
        for wanted in (cell for side in ("left", "right") for cell in compared_cells(claim.get(side))):
            for cell in study.cells_with(wanted):
                fresh.setdefault(cell, set()).update(fresh_seeds(claim, study.scale))
    for cell in study.cells:
        yield replace(cell, seeds=tuple(sorted({*cell.seeds, *fresh.get(cell, ())})))


def fresh_seeds(claim: Mapping[str, Any], scale: str) -> tuple[int, ...]:
    """The seeds that alone decide a comparison at a scale; none if all seeds of its cells do."""
    return seed_range(str(claim.get("seeds", {}).get(scale, "")))


class _Elsewhere(NamedTuple):
    """A cell of another study: its name with that of the study, and its settings."""

    name: str
    train: tuple[str, ...]


def _cell_elsewhere(study_id: str, wanted: Mapping[str, Any], key: Mapping[str, str], other: Study) -> _Elsewhere:
    """Return the cell of another study that a source names; `{axis}` is the value of the cell that begins with it."""
    try:
        values = {axis: str(value).format(**key) for axis, value in wanted["cell"].items()}
    except KeyError as problem:
        raise UserError(f"study {study_id}: sources: there is no axis {problem}; axes: {', '.join(key)}") from None
    cell = other.cell(values)
    return _Elsewhere(f"{other.id}/{cell.name}", cell.train)


def _renamed(text: str, source: str, name: str) -> str:
    """Return a setting in which a source, `{source}` or `{source@0.3}`, has another name."""
    return text.replace(f"{{{source}}}", f"{{{name}}}").replace(f"{{{source}@", f"{{{name}@")


def chosen_cells(study: Study, only: Iterable[str]) -> tuple[Cell, ...]:
    """The cells that meet every `axis=value` (or `axis=a,b`), with the seeds of `seed=0,1`, or else all.

    Raises:
        UserError: an unknown axis or value, or words of another form.
    """
    there = sorted({seed for cell in study.cells for seed in cell.seeds})
    choices = {**study.axes, SEED: tuple(map(str, there))}
    wanted: dict[str, set[str]] = {}
    for word in only:
        axis, equals, given = word.partition("=")
        if not equals:
            raise UserError(f"--only {word}: write AXIS=VALUE, such as --only norm=sn; axes: {', '.join(study.axes)}")
        if axis not in choices:
            raise UserError(f"--only {word}: {study.id} has no axis '{axis}': {suggest(axis, choices)}")
        for value in given.split(","):
            if value not in choices[axis]:
                raise UserError(f"--only {word}: no {axis} '{value}' in {study.id}: {suggest(value, choices[axis])}")
            wanted.setdefault(axis, set()).add(value)
    seeds = wanted.pop(SEED, None)
    chosen = [cell for cell in study.cells if all(value in wanted[axis] for axis, value in cell.key if axis in wanted)]
    if seeds is None:
        return tuple(chosen)
    return tuple(replace(cell, seeds=tuple(seed for seed in cell.seeds if str(seed) in seeds)) for cell in chosen)


def compared_cells(side: Any) -> list[Mapping[Any, Any]]:
    """The cells that one side of a comparison names: a cell, `[[weight, cell], ...]`, or a number."""
    if isinstance(side, Mapping):
        return [side]
    return [cell for _, cell in side] if isinstance(side, list) else []


def _check_rules(study: Study, own: Mapping[str, Any]) -> None:
    """Refuse a rule, of the study or of the study at its scale, that no cell can meet."""
    keys = {option_of(text) for cell in study.cells for text in (*cell.train, *cell.evaluate)}
    where = f"study {study.id}: "
    conditions = [(where + "when", rule["if"], keys) for rule in study.values.get("when", ())]
    conditions += [(where + "more_seeds", rule["if"], keys) for rule in study.values.get("more_seeds", ())]
    conditions += [(f"{where}scales.{study.scale}.when", rule["if"], keys) for rule in own.get("when", ())]
    conditions += [(f"{where}scales.{study.scale}.leave_out", item, set()) for item in own.get("leave_out", ())]
    for place, condition, settings in conditions:
        for name, wanted in condition.items():
            known = {*study.axes, *settings}
            if name not in known:
                what = "axis or setting" if settings else "axis"
                raise UserError(f"{place}: no {what} '{name}': {suggest(str(name), known)}")
            for value in map(as_text, as_list(wanted)):
                if name in study.axes and value not in study.axes[name]:
                    raise UserError(f"{place}: no {name} '{value}': {suggest(value, study.axes[name])}")


def _check_names(study: Study) -> None:
    """Refuse what names an axis or a cell that the study does not have."""
    for claim in study.values.get("claims", ()):
        for side in (claim[side] for side in ("left", "right") if side in claim):
            for cell in compared_cells(side):
                study.cells_with(cell)
    for key in ("columns", "compare"):
        axis = study.values.get(key)
        if axis is not None and axis not in study.axes:
            raise UserError(f"study {study.id}: {key}: there is no axis '{axis}': {suggest(str(axis), study.axes)}")
    patterns = [text for given in study.values.get("published", {}).values() for text in as_list(given)]
    for name in (name for text in patterns for _, name, _, _ in Formatter().parse(str(text)) if name is not None):
        if name not in study.axes:
            raise UserError(f"study {study.id}: published: no axis '{name}': {suggest(name, study.axes)}")
    for cell in (*study.followed, *study.by_class, *study.by_label):
        other = [text for text in cell.evaluate if not text.startswith(("data=", "data."))]
        if cell in study.by_class and other:
            raise UserError(f"study {study.id}: classes_of: {cell.name} evaluates {other[0]}; it takes data= alone")
    for pair in study.values.get("ratio_differences", ()):
        for side in ("left", "right"):
            if study.cell(pair[side]) not in study.by_class:
                raise UserError(f"study {study.id}: ratio_differences: {pair} is not among classes_of")


def _axis_values(axis: str, given: Any) -> dict[str, tuple[str, ...]]:
    """Each value of an axis with its settings: `axis=value` for a list, what a mapping says otherwise."""
    if isinstance(given, Mapping):
        return {str(value): tuple(settings) for value, settings in given.items()}
    return {str(value): (f"{axis}={value}",) for value in given}


def _seeds(values: Mapping[str, Any], key: Mapping[str, str], given: Mapping[str, str]) -> int:
    answers = answers_of(given, key)
    more = [rule["seeds"] for rule in values.get("more_seeds", ()) if meets(rule["if"], answers)]
    return max([values.get("seeds", 3), *more])
