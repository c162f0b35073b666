"""The error that the core raises for what its user can correct."""


class DefinitionError(ValueError):
    """A definition that cannot be used as it is written; the message names the value and what was expected."""
