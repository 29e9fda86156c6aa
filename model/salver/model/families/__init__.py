"""One small file per family: from config.json to a `ModelSpec`.

A module of this folder registers its architectures with `@family`; dropping in a file is all it
takes. No torch here.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from ..config_reader import ConfigReader
from ..encoder_spec import EncoderSpec
from ..spec import ModelSpec

Family = Callable[[ConfigReader], ModelSpec]
FAMILIES: dict[str, Family] = {}
# Of encoders, which get the architecture's name too: it says which head there is.
EncoderFamily = Callable[[ConfigReader, str], EncoderSpec]
ENCODER_FAMILIES: dict[str, EncoderFamily] = {}


def family(architecture: str) -> Callable[[Family], Family]:
    """Registers a function for a name in config.json's `architectures`."""

    def register(function: Family) -> Family:
        if architecture in FAMILIES:
            raise ValueError(f"{architecture} is registered twice")
        FAMILIES[architecture] = function
        return function

    return register


def encoder_family(*architectures: str) -> Callable[[EncoderFamily], EncoderFamily]:
    """Registers a function for the names of an encoder's body and of the body with each head."""

    def register(function: EncoderFamily) -> EncoderFamily:
        for architecture in architectures:
            if architecture in ENCODER_FAMILIES or architecture in FAMILIES:
                raise ValueError(f"{architecture} is registered twice")
            ENCODER_FAMILIES[architecture] = function
        return function

    return register


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
