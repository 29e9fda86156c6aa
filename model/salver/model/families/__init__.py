"""One small file per family: config.json to `ModelSpec`. Every module of this folder is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from salver.model.config_reader import ConfigReader
from salver.model.spec import ModelSpec

Family = Callable[[ConfigReader], ModelSpec]
FAMILIES: dict[str, Family] = {}


def family(*architectures: str) -> Callable[[Family], Family]:
    """Registers a function for the names in config.json's `architectures`."""

    def register(function: Family) -> Family:
        for architecture in architectures:
            FAMILIES[architecture] = function
        return function

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
