"""The run's clock. Imported first: loading the libraries counts."""

import time

START = time.monotonic()


def log(*words: object) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s]", *words, flush=True)
