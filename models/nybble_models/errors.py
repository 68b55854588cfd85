"""Errors that a checkpoint can cause: what is wrong, and how to mend it."""

from __future__ import annotations


class ModelError(Exception):
    """Something about a model or its files; `hint` says what to do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UnsupportedModel(ModelError):
    """The model is whole, but not one this program knows."""


class BrokenCheckpoint(ModelError):
    """A file is missing, truncated, or contradicts the config."""
