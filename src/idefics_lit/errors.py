"""The exception for user errors."""


class InputError(ValueError):
    """A file, a row or an option is invalid. The message is one line that names it and the cure.

    The command line prints only the message and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # The message of an exception from a DataLoader worker is its traceback, which ends with the original message.
        if message.startswith("Caught InputError in DataLoader worker"):
            message = message.rpartition(f"\n{InputError.__module__}.InputError: ")[2]
        super().__init__(" ".join(message.split()))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's class name if the message is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)
