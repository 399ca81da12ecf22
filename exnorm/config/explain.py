"""Turn Hydra's and OmegaConf's exceptions into one line: what was wrong, and what to type instead.

The patterns match the messages of Hydra 1.3. A message that matches none is shortened to its first line.
"""

import functools
import os
import re
import traceback
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from exnorm.config.errors import UserError, first_line, nearest, shorten
from exnorm.config.groups import OF_STUDIES, group_options, groups, option_file, option_values, unknown_option
from exnorm.config.options import UNTYPED, written
from exnorm.config.schema import EvalConfig, TrainConfig
from exnorm.config.words import quoted

# The keys that name a file or a folder.
PATHS = frozenset(
    [f"data.{name}" for name in ("root", "roots", "train_list", "val_list", "source", "exclude")]
    + ["model.init_from", "model.init_ratios_from", "runs", "checkpoint"]
)
FOLLOWED = {  # users set the second key of a pair
    "data.epochs": "trainer.epochs",
    "data.schedule": "optim.schedule",
    "data.lr_per_256": "optim.lr_per_256",
}
FREE = ("norm.", "model.options", "logger.sinks.")  # keys below these are checked elsewhere
SHOWN = 60  # characters of a wrong value
SIMILAR = 0.66  # from this similarity on, one word counts as a misspelling of the other
NOUNS = {
    r"converted to Integer": "an integer",
    r"converted to Float": "a number",
    r"not a valid bool": "true or false",
    r"not a ListConfig": "a list",
    r"to string": "a word",
}


def is_user_error(exc: BaseException) -> bool:
    """Return whether an exception is a mistake of the user, which is shown as one line.

    These are the errors of exnorm, Hydra, OmegaConf and Typer, and system errors about a file. Any other exception is
    a bug, in exnorm or in code that it runs, and keeps its traceback.
    """
    if misused(exc) is not None or refused_file(exc) is not None or _is_hydras_own(exc):
        return True
    return isinstance(exc, UserError | HydraException | OmegaConfBaseException)


def _is_hydras_own(exc: BaseException) -> bool:
    """Return whether Hydra itself raised a ValueError, as it does for some overrides."""
    frames = list(traceback.walk_tb(exc.__traceback__))
    return isinstance(exc, ValueError) and bool(frames) and frames[-1][0].f_globals["__name__"].startswith("hydra.")


def misused(exc: BaseException) -> str | None:
    """Return one line for a command-line error of Typer (its class is not public); None for any other exception."""
    if not hasattr(exc, "format_message"):
        return None
    usage: Any = exc
    said = " ".join(usage.format_message().split()).replace("Value error, ", "")
    command = usage.ctx.command_path if usage.ctx else "exnorm"
    return f"{said}{'' if said.endswith(('.', '?')) else '.'} See {command} --help"


def refused_file(exc: BaseException) -> str | None:
    """Return one line for a system error about a file; None for any other exception."""
    if isinstance(exc, OSError) and exc.filename is not None:
        return f"{os.fsdecode(exc.filename)}: {exc.strerror}"
    return None


def explain(exc: BaseException, config_name: str = "train") -> str:
    """Return one line for an exception; `config_name` ("train" or "eval") names the keys that are allowed."""
    text = str(exc)
    if (line := misused(exc) or refused_file(exc)) is not None:
        return line
    if isinstance(exc, OverrideParseException):
        return unreadable(exc.override)
    if found := re.search(r"Could not find '([^']*)/([^'/]*)'", text):
        return missing_option(found[1], found[2], text)
    if found := re.search(r"Could not override '([^'=]*)", text):
        return unknown_key(found[1], config_name)
    if found := re.search(r"Error merging override (.*)", text):
        return wrong_type(found[1], str(exc.__cause__), config_name)
    if found := re.match(r"In '(.*)': \w+ raised while composing config:\n(.*)", text, re.DOTALL):
        return wrong_file(found[1], found[2], config_name)
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        return several_values(found[1], config_name)
    if "Config group override must be a string" in text:
        return "a group takes the name of one of its options, such as norm=en. A number, null or nothing is not allowed"
    if (found := re.search(r"Interpolation key '(\w+)' not found", text)) and found[1] in os.environ:
        return f"{first_line(exc)}. For the environment variable {found[1]} write ${{oc.env:{found[1]}}}"
    return first_line(exc)


def wrong_file(option: str, reason: str, config_name: str) -> str:
    """Explain a YAML file, such as that of `logger/mine`, with an unknown key or a value of the wrong type."""
    group, _, name = option.partition("/")
    file = option_file(group, name) if name in group_options(group) else f"{option}.yaml"
    key = re.search(r"full_key: (\S+)", reason)
    if key and reason.startswith("Key "):
        return f"{file}: {unknown_key(key[1], config_name)}"
    where = f"{file}: {key[1]}: " if key else f"{file}: "
    if "Incompatible value 'None'" in reason:
        return f"{where}null is not allowed; give a value"
    value, noun = re.match(r"Value '(.*)' (?:of type|is not)", reason, re.DOTALL), noun_of(reason)
    if noun is None:
        return where + reason.splitlines()[0]
    return f"{where}{value[1][:SHOWN]!r} is not {noun}" if value else f"{where}write {noun}"


def unreadable(override: str) -> str:
    """Explain an override that Hydra cannot parse, with the quotes that its value needs."""
    key, equals, value = override.partition("=")
    if equals and value and (key in PATHS or value[0] not in "([{") and re.fullmatch(r"[\w.+]+", key):
        return f"cannot read '{override}'. A value with such characters needs quotes: type {quoted(key, value)}"
    return f"cannot read '{override}'. Write KEY=VALUE, such as batch=8x32 or 'data.scale=[0.2,1]'"


def several_values(override: str, config_name: str) -> str:
    """Explain a comma outside of a sweep: it may mean several runs, a list, or a path with a comma."""
    key, _, value = override.partition("=")
    line = f"{override} has several values. Add -m to run one after the other"
    if isinstance(known_values(config_name).get(key), list) or key == "logger":
        return f"{line}, or for a list type '{key}=[{value}]'"
    return f"{line}, or for one value with a comma type {quoted(key, value)}" if key in PATHS else line


def missing_option(group: str, name: str, text: str) -> str:
    """Explain an option that a group lacks; Hydra's message lists those that it has."""
    listed = re.findall(r"^\t(?!provider)(\S+)$", text, flags=re.MULTILINE)
    return unknown_option(group, name, listed)


def unknown_key(key: str, config_name: str = "train") -> str:
    """Explain a key that does not exist, with keys that the user may mean."""
    group, _, option = key.partition(".")
    if group in OF_STUDIES:
        return f"unknown key '{key}': a study is a set of runs. Type exnorm reproduce STUDY --scale mini"
    if key.startswith("model.options"):
        return f"unknown key '{key}'. To pass another argument to the model, add a plus, such as +model.options.width=2"
    if key.startswith("logger.sinks."):
        return f"unknown key '{key}'. To pass another argument to a sink, add a plus, such as +{key}=VALUE"
    having = [name for name in group_options("norm") if option in option_values("norm", name)]
    if group == "norm" and having and config_name == "train":
        return f"unknown key '{key}' for this norm: {', '.join(having)} {'has' if len(having) == 1 else 'have'} it"
    similar = meant_keys(key, config_name)
    if similar:
        return f"unknown key '{key}': did you mean " + " or ".join(f"'{other}'" for other in similar) + "?"
    own = [other.removeprefix(f"{group}.") for other in known_values(config_name) if other.startswith(f"{group}.")]
    if own:
        return f"unknown key '{key}': {group} has {', '.join(own)}"
    return f"unknown key '{key}': allowed: {shorten(top_keys(config_name))}"


def top_keys(config_name: str) -> list[str]:
    """Return the first words of all keys, including the groups."""
    firsts = {key.split(".")[0] for key in known_values(config_name)}
    return sorted(firsts | set(groups() if config_name == "train" else ()))


def meant_keys(key: str, config_name: str = "train") -> list[str]:
    """Return the existing keys that a wrong key may mean; their last words are compared.

    A key of the same group comes first, then keys of other groups with the same last word, then with a similar one.
    """
    group, _, word = key.rpartition(".")
    if not group and word in top_keys(config_name):
        return [word]
    known = known_values(config_name)
    last_words = {other: other.rpartition(".")[2] for other in known if FOLLOWED.get(other) not in known}
    own = [other for other in last_words if group and other.rpartition(".")[0] == group]
    near = nearest(word, [last_words[other] for other in own], cutoff=SIMILAR)
    if near:
        return [f"{group}.{near[0]}"]
    same = [other for other, last in last_words.items() if last == word]
    if same or own:
        return same
    if not group and (tops := nearest(word, top_keys(config_name), cutoff=SIMILAR)):
        return tops
    like = nearest(word, set(last_words.values()), cutoff=SIMILAR)
    return [other for other, last in last_words.items() if last in like]


def wrong_type(override: str, reason: str, config_name: str) -> str:
    """Explain a value of the wrong type, with the schema's default as the example."""
    key, _, value = override.partition("=")
    default = known_values(config_name).get(key)
    example = f", such as {key}={written(default)}" if default not in (None, "???", value) else ""
    if "is not Optional" in reason:
        return f"{override}: null is not allowed; give a value{example}"
    noun = noun_of(reason)
    return f"{override} is not {noun}{example}" if noun else f"{override}: {reason.splitlines()[0]}{example}"


def noun_of(reason: str) -> str | None:
    """Return what a value must be, from OmegaConf's message about its type."""
    return next((noun for pattern, noun in NOUNS.items() if re.search(pattern, reason)), None)


@functools.cache
def known_values(config_name: str) -> dict[str, Any]:
    """Return every dotted key that a command knows, with its default."""
    schema = OmegaConf.structured({"train": TrainConfig, "eval": EvalConfig}[config_name])
    known = dotted(OmegaConf.to_container(schema, throw_on_missing=False))
    if config_name == "train":
        for group in UNTYPED:
            del known[group]
            for name in group_options(group):
                known |= {f"{group}.{key}": value for key, value in option_values(group, name).items()}
    return known


def dotted(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys; lists and empty mappings are values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_keys(values: dict[str, Any], config_name: str) -> None:
    """Raise UserError for a key that the schema does not have; Hydra's `+key=value` would accept it."""
    known = known_values(config_name)
    for key in dotted(values):
        if key not in known and key != "norm" and not key.startswith(FREE):
            raise UserError(unknown_key(key, config_name))
