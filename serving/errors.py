"""What can go wrong between us and TorchServe, by whose turn it is."""


class ServerError(RuntimeError):
    """TorchServe did not do what it was asked; its own words are in the message."""


class UsageError(ServerError):
    """It was asked for something that cannot be; the message says what to do instead."""


class LoadError(ServerError):
    """A worker could not load an archive; the message is the handler's own."""
