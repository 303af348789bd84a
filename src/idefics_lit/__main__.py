"""The entry point of ``python -m idefics_lit`` and of the script ``idefics-lit``."""

import gc
import signal


def main() -> None:
    """Import and run the command line."""
    # Imports create many objects that stay until the end. Garbage collection among them takes 1 s while they are
    # imported, and 2 s at exit. It skips frozen objects.
    gc.disable()
    try:
        from idefics_lit.cli.main import main  # takes seconds, in which Ctrl-C shows no traceback

        gc.freeze()
        gc.enable()
        main()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
