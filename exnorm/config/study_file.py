"""Read and check the yaml of a study or a scale: known keys, each with a value of the right form."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from exnorm.config.errors import UserError, suggest
from exnorm.config.groups import file_values, group_options, option_file, option_values

YAML = (".yaml", ".yml")
SCALES = ("mini", "small", "gpu", "full")
NAMED = ("small", "gpu")  # a study has these scales only if its yaml names them

Form = Callable[[Any], bool]


def _is_word(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_word, value))


def _is_settings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_mapping, value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_axis(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(map(_is_settings, value.values()))
    return bool(value) and _is_words(value)


def _is_axes(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_axis, value.values())) and "seed" not in value


def _is_side(value: Any) -> bool:
    """Return whether a value is a side of a comparison: a number, a cell, or weighted cells."""
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(part, list) and len(part) == 2 and _is_number(part[0]) and _is_mapping(part[1]) for part in value
        )
    return _is_number(value) or (_is_mapping(value) and bool(value))


def _is_expected(value: Any) -> bool:
    """Return whether a value is an expectation as in `results/published/claims.csv`."""
    return isinstance(value, str) and re.fullmatch(r"left >=? (\d+ \* )?right|unknown|always", value) is not None


def _is_seeds(value: Any) -> bool:
    """Return whether a value has a range of seeds for each scale that it names."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(scale in SCALES and isinstance(text, str) and seed_range(text) for scale, text in value.items())
    )


def seed_range(text: str) -> tuple[int, ...]:
    """Return the seeds `first-last`; none for a text of another form."""
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    return tuple(range(int(found[1]), int(found[2]) + 1)) if found else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


WORD = (_is_word, "a word")
WORDS = (_is_words, "a list of words")
SETTINGS = (_is_settings, "a list of settings such as [batch=8x32]")
MAPPING = (_is_mapping, "a mapping such as {norm: sn}")
MAPPINGS = (_is_mappings, "a list of mappings such as [{norm: sn}]")
COUNT = (_is_count, "a number above 0")
SIDE = (_is_side, "a cell such as {norm: sn}, a number, or weighted cells such as [[1, {norm: sn}], [-1, {norm: bn}]]")
SCALE_KEYS = {
    "set": SETTINGS,
    "when": MAPPINGS,
    "threads": COUNT,
    "stand_ins": (
        lambda v: _is_mapping(v) and all(map(_is_word, v.values())),
        "a mapping of values to stand-ins, such as {imagenet: glyphs}",
    ),
    "train_images": MAPPING,
    "notes": WORDS,
}
REPLACED = {  # keys of a study that can have another value at a scale
    "seeds": COUNT,
    "more_seeds": MAPPINGS,
    "layers_of": MAPPINGS,
    "classes_of": MAPPINGS,
    "labels_of": MAPPINGS,
    "claims": MAPPINGS,
}
OWN_SCALE_KEYS = {**SCALE_KEYS, **REPLACED, "leave_out": MAPPINGS}  # of a study; leave_out: cells it lacks at a scale
STUDY_KEYS = {
    **REPLACED,
    "paper": WORD,
    "table": WORD,
    "axes": (_is_axes, "axes with values, such as {norm: [bn, sn]} or {size: {large: [batch=8x32]}}, none called seed"),
    "set": SETTINGS,
    "when": MAPPINGS,
    "scales": MAPPING,
    "columns": WORD,
    "published": MAPPING,
    "as_published": MAPPING,
    "compare": WORD,
    "ratio_differences": MAPPINGS,
    "metrics": WORDS,
    "sources": (
        lambda v: _is_mapping(v) and all(_is_settings(source) or _is_mapping(source) for source in v.values()),
        "names, each with a list of settings or with a cell of another study, such as {study: sn-table2, cell: "
        "{norm: sn, batch: 8x2}}",
    ),
    "notes": WORDS,
}
RULE_KEYS = {"if": MAPPING, "set": SETTINGS}
SEEDS_KEYS = {"if": MAPPING, "seeds": COUNT}
EXPECT = (_is_expected, "left > right, left >= right, left >= N * right, unknown or always")
CLAIM_KEYS = {
    **{"id": WORD, "metric": WORD, "left": SIDE, "right": SIDE, "claim": WORD, "expect": EXPECT},
    "not_comparable": WORD,  # why a comparison is not the paper's
    "seeds": (_is_seeds, "a range of seeds for each scale, such as {mini: 10-29}"),  # that alone decide the comparison
}
PAIR_KEYS = {"left": MAPPING, "right": MAPPING}
SOURCE_KEYS = {"study": WORD, "cell": MAPPING}


def read_study(name: str) -> tuple[Path, dict[str, Any]]:
    """Return the yaml file of a study and its checked values.

    Args:
        name: a study in `conf/study`, or the path of your own yaml file.

    Raises:
        UserError: there is no such study, or its file has an unknown key or a wrong value.
    """
    file = _study_file(name)
    values = file_values(file)
    check(values, STUDY_KEYS, str(file))
    if "axes" not in values:
        raise UserError(f"{file} has no axes. Write for example axes: {{norm: [bn, sn]}}")
    for scale, own in values.get("scales", {}).items():
        if scale not in SCALES:
            raise UserError(f"{file}, scales: unknown scale '{scale}': {suggest(str(scale), SCALES)}")
        check_scale(own, OWN_SCALE_KEYS, f"{file}, scales.{scale}")
    _check_items(values, str(file))
    for name, source in values.get("sources", {}).items():
        if _is_mapping(source):
            check(source, SOURCE_KEYS, f"{file}, sources.{name}", needed=SOURCE_KEYS)
    return file, values


def _check_items(values: Mapping[str, Any], where: str) -> None:
    """Raise UserError if a rule, a claim or a pair has an unknown key, a wrong value, or lacks a key."""
    for key, keys, needed in (
        ("when", RULE_KEYS, RULE_KEYS),
        ("more_seeds", SEEDS_KEYS, SEEDS_KEYS),
        ("claims", CLAIM_KEYS, ("id", "left")),
        ("ratio_differences", PAIR_KEYS, PAIR_KEYS),
    ):
        for item in values.get(key, ()):
            check(item, keys, f"{where}, {key}", needed=needed)


def has_scale(name: str, scale: str) -> bool:
    """Return whether a study can be run at a scale."""
    return scale not in NAMED or scale in read_study(name)[1].get("scales", {})


def read_scale(name: str) -> dict[str, Any]:
    """Return the checked values of `conf/scale/<name>.yaml`."""
    values = option_values("scale", name)
    check_scale(values, SCALE_KEYS, f"conf/scale/{name}.yaml")
    return values


def check_scale(values: Any, keys: Mapping[str, tuple[Form, str]], where: str) -> None:
    """Raise UserError if a scale, of all studies or of one, has an unknown key or a wrong value."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where} has no keys. Allowed keys: {', '.join(keys)}")
    check(values, keys, where)
    _check_items(values, where)


def check(
    values: Mapping[str, Any], keys: Mapping[str, tuple[Form, str]], where: str, *, needed: Iterable[str] = ()
) -> None:
    """Raise UserError for an unknown key, a value of the wrong form, or a missing key."""
    for key, value in values.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key '{key}': {suggest(str(key), keys)}")
        is_right, form = keys[key]
        if not is_right(value):
            raise UserError(f"{where}: {key}: {value!r} is not {form}")
    for key in needed:
        if key not in values:
            raise UserError(f"{where}: '{key}' is missing in {dict(values)}")


def is_file_name(name: str) -> bool:
    """Return whether a study is given as a yaml file, not by its id."""
    return name.lower().endswith(YAML)


def _study_file(name: str) -> Path:
    if not is_file_name(name):
        return option_file("study", name)
    file = Path(name)
    if not file.is_file():
        raise UserError(f"there is no study {name}. Give a yaml file or one of {', '.join(group_options('study'))}")
    if file.stem in group_options("study") and file.samefile(option_file("study", file.stem)):
        return file
    if file.stem in group_options("study") or "." in file.stem:
        raise UserError(
            f"{name}: its record would be {file.stem}.csv, which belongs to another study. Give the file another name"
        )
    return file
