"""``python -m idefics_lit``."""

import signal

if __name__ == "__main__":
    try:
        from idefics_lit.cli.main import main  # takes seconds, in which Ctrl-C shows no traceback

        main()
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
