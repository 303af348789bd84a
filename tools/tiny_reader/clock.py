"""The time since the start of the run; imported first, so that loading the libraries counts."""

import time

START = time.monotonic()


def log(*message: object) -> None:
    """Print a message with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s]", *message, flush=True)
