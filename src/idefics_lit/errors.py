"""The one exception that a user's mistake ends in."""


class InputError(ValueError):
    """Bad input: a file, a row or an option is wrong. The message is one line that names it and the cure.

    The command line prints the message alone and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # An exception raised in a loader's worker arrives as the text of its whole traceback, which ours ends.
        if message.startswith("Caught InputError in DataLoader worker"):
            message = message.rpartition(f"\n{InputError.__module__}.InputError: ")[2]
        super().__init__(" ".join(message.split()))


def first_line(error: Exception) -> str:
    """Return what an error of a library says first, or its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
