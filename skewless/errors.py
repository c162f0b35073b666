"""The errors raised outside of the core, by who has to act on them; the command turns them into exit codes."""


class CheckFailedError(ValueError):
    """A check ran and failed: nothing is wrong with what was asked for, but its numbers are not the ones recorded."""


class BuildError(ValueError):
    """The parts do not make an archive that serves what was evaluated; the message says what differs."""


class ServerError(RuntimeError):
    """TorchServe did not do what it was asked; its own words are in the message."""


class UsageError(ServerError):
    """What was asked for cannot be done, such as stopping a server where none runs; the message says what to do."""


class SignatureError(UsageError):
    """An archive is not signed as it has to be, or not what was signed; the message says which."""


class LoadError(ServerError):
    """A worker could not load an archive; the message is the handler's own."""


class ScoringError(ServerError):
    """The workers of a scoring run ended before every file had its row; what there is, is kept."""
