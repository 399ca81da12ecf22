"""Prepare a command line for Hydra: home folders, options with dashes, and how to quote a value.

Hydra has a grammar for values. Characters such as ( ) [ ] { } = , ~ # and letters beyond ASCII have a meaning in it or
are not allowed. Such a value needs quotes, which must be protected from the shell: 'data.root="a=b"'.
"""

import os
import re
import shlex
from collections.abc import Iterable
from typing import Any

from exnorm.config.errors import UserError

PLAIN = re.compile(r"[A-Za-z0-9_/.:%+@?|\\-]*")  # needs no quotes in Hydra's grammar
HOME_VALUE = re.compile(r"(?P<key>[^=~]+)=(?P<quote>['\"]?)(?P<value>~.*)", re.DOTALL)
MULTIRUN = frozenset(["-m", "--multirun"])
HYDRA_OPTIONS = MULTIRUN | frozenset(
    ["-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "--resolve", "-p", "--package", "-r", "--run"]
    + ["-sc", "--shell-completion", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"]
    + ["--experimental-rerun", "-i", "--info"]
)


def quoted(key: str, value: str) -> str:
    """Return KEY=VALUE as it is typed in a shell, quoted so that Hydra takes the value literally."""
    return shlex.quote(f"{key}={in_hydras_quotes(value)}")


def in_hydras_quotes(value: str) -> str:
    """Return a value with quotes around it, so that Hydra takes it literally."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value).replace("${", "\\${")
    last = len(escaped) - len(escaped.rstrip("\\"))
    return f'"{escaped}{escaped[len(escaped) - last :]}"'


def with_home(word: str) -> str:
    """Return KEY=VALUE with a `~` at the beginning of the value replaced by the home folder; shells do not do this."""
    found = HOME_VALUE.fullmatch(word)
    if found is None:
        return word
    key, quote, value = found["key"], found["quote"], found["value"]
    if quote:
        return f"{key}={quote}{os.path.expanduser(value)}"
    values = [os.path.expanduser(part) for part in value.split(",")]
    if not all(PLAIN.fullmatch(part) for part in values):
        values = [in_hydras_quotes(part) for part in values]
    return f"{key}={','.join(values)}"


def chosen(group: str, overrides: Iterable[str]) -> list[Any]:
    """Return the values of `GROUP=VALUE`, one for each job of a sweep; skip what Hydra cannot parse or search for."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    values: list[Any] = []
    for text in overrides:
        if not text.startswith(f"{group}="):
            continue
        try:
            override = parser.parse_override(text)
        except HydraException:
            continue
        if not override.is_sweep_override():
            values.append(override.value())
        elif not isinstance(override.value(), Glob):
            values += chosen(group, [f"{group}={value}" for value in override.sweep_string_iterator()])
    return values


def is_sweep(words: Iterable[str]) -> bool:
    """Return whether a command line asks for a sweep, which is several runs."""
    return not MULTIRUN.isdisjoint(words)


def without_submit(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the words without `--submit KEY=VALUE`, and these values."""
    rest, options = list(words), list[str]()
    while "--submit" in rest:
        place = rest.index("--submit")
        options += rest[place + 1 : place + 2] or [""]
        del rest[place : place + 2]
    return rest, options


def check_options(words: Iterable[str]) -> None:
    """Check that every word that begins with a dash is an option of Hydra.

    Raises:
        UserError: another option; the message gives the setting that the user probably means.
    """
    listed = list(words)
    for place, word in enumerate(listed):
        name, equals, value = word.partition("=")
        if name in ("-cd", "--config-dir"):
            raise UserError("--config-dir comes before the command: exnorm --config-dir DIR train ...")
        if not word.startswith("-") or name in HYDRA_OPTIONS:
            continue
        following = listed[place + 1] if place + 1 < len(listed) else ""
        if not equals and not following.startswith("-") and "=" not in following:
            value = following
        raise UserError(f"there is no option {name}. {_setting(name.lstrip('-').replace('-', '_'), value)}")


def _setting(name: str, value: str) -> str:
    from exnorm.config.explain import meant_keys

    keys = meant_keys(name)
    if not keys:
        return "A setting is written KEY=VALUE, such as trainer.epochs=3; exnorm train --help lists all settings"
    return "Write " + " or ".join(f"{key}={value or 'VALUE'}" for key in keys)
