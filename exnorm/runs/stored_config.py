"""Read `config.yaml` of a run. OmegaConf takes 16 ms for it, and a folder may have 100,000 runs."""

import re
from contextlib import suppress
from typing import Any

import yaml
from omegaconf import OmegaConf

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader

INTERPOLATION = "${"


class Loader(SafeLoader):  # pyright: ignore[reportGeneralTypeIssues]  # one of two
    """A loader that reads 1e-3 as a number and 2020-01-01 as a text, as OmegaConf does."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own attribute
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_stored(text: str) -> Any:
    """Return what OmegaConf reads from a YAML text, with all interpolations resolved.

    Raises:
        YAMLError, OmegaConfBaseException: the text is damaged.
    """
    if INTERPOLATION not in text:
        with suppress(yaml.YAMLError):  # libyaml refuses file names that are not UTF-8
            return yaml.load(text, Loader)
    return OmegaConf.to_container(OmegaConf.create(text), resolve=True)
