"""What can go wrong outside of the core, by whose turn it is; the command makes its exit codes of these."""


class CheckFailedError(ValueError):
    """A check ran and failed: nothing is wrong with what was asked for, but its numbers are not the ones recorded."""


class BuildError(ValueError):
    """The parts do not make an archive that serves what was evaluated; the message says what differs."""


class ServerError(RuntimeError):
    """TorchServe did not do what it was asked; its own words are in the message."""


class UsageError(ServerError):
    """It was asked for something that cannot be; the message says what to do instead."""


class LoadError(ServerError):
    """A worker could not load an archive; the message is the handler's own."""
