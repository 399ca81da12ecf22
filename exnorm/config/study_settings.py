"""The settings of a cell: which layers of a study's yaml they come from, and which rules they meet."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class SettingLayers(NamedTuple):
    """The yaml values that the settings of a cell come from; a later one wins over an earlier one."""

    scale: Mapping[str, Any]
    study: Mapping[str, Any]
    study_at_scale: Mapping[str, Any]

    def resolve(self, texts: Iterable[str], key: Mapping[str, str]) -> dict[str, str]:
        """The settings of a cell or a source, by option: `texts` are its own, `key` its values on the axes."""
        scale = _by_option(self.scale.get("set", ()))
        own = _by_option([*self.study.get("set", ()), *self.study_at_scale.get("set", ()), *texts])
        scale_rules = self.scale.get("when", ())
        own_rules = [*self.study.get("when", ()), *self.study_at_scale.get("when", ())]
        # What a study sets wins over the scale's rules, and the study's rules win over all.
        return _with_rules(_with_rules(scale | own, scale_rules, key) | own, own_rules, key)


def _with_rules(given: dict[str, str], rules: Iterable[Any], key: Mapping[str, str]) -> dict[str, str]:
    """Settings with those of the rules that they and the cell's values meet, one rule after the other."""
    for rule in rules:
        if meets(rule["if"], answers_of(given, key)):
            given = given | _by_option(rule["set"])
    return given


def _by_option(texts: Iterable[str]) -> dict[str, str]:
    return {option_of(text): text for text in texts}


def option_of(text: str) -> str:
    """The option that a setting sets: `trainer.epochs` of `+trainer.epochs=3`."""
    return text.partition("=")[0].lstrip("+")


def answers_of(given: Mapping[str, str], key: Mapping[str, str]) -> dict[str, str]:
    """What a condition can ask about: the value of each setting, and of each axis."""
    return {**{name: text.partition("=")[2] for name, text in given.items()}, **key}


def meets(condition: Mapping[str, Any], answers: Mapping[str, str]) -> bool:
    """Whether each setting or axis that a condition names has the value, or one of the values, that it asks for."""
    return all(answers.get(name) in [as_text(value) for value in as_list(wanted)] for name, wanted in condition.items())


def as_text(value: Any) -> str:
    """A value of a condition as settings write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_list(given: Any) -> list[Any]:
    """A list as it is, of anything else a list of one."""
    return given if isinstance(given, list) else [given]
