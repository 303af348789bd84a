"""``python -m idefics_lit``."""

from idefics_lit.cli.main import main

if __name__ == "__main__":
    main()
