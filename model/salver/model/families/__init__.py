"""One small file per family: from config.json to a `ModelSpec`.

A module of this folder registers its architectures with `@family`; dropping in a file is all it
takes. No torch here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from ..config_reader import ConfigReader
from ..spec import ModelSpec

Family = Callable[[ConfigReader], ModelSpec]
FAMILIES: dict[str, Family] = {}


def family(architecture: str) -> Callable[[Family], Family]:
    """Registers a function for a name in config.json's `architectures`."""

    def register(function: Family) -> Family:
        if architecture in FAMILIES:
            raise ValueError(f"{architecture} is registered twice")
        FAMILIES[architecture] = function
        return function

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
