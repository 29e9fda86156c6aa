"""Errors of the model part; no torch here, the front process imports this."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be used. The message names the file and the field, tensor or value at fault."""
