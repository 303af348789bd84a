"""``python -m idefics_lit``."""

import gc

if __name__ == "__main__":
    # Imports create many objects, and all stay: garbage collection among them would take a fifth of the time of --help.
    # Later collections skip frozen objects.
    gc.disable()
    from idefics_lit.cli.main import main

    gc.freeze()
    gc.enable()
    main()
