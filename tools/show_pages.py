"""Write docs/pages.png for the README, an overview with a page of each family: `python tools/show_pages.py`."""

from pathlib import Path

from PIL import Image

from idefics_lit.data.pages import FAMILIES, render_page

SEEDS = dict(zip(FAMILIES, (120, 142, 48, 73, 93, 76), strict=True))
"""The seed of each family's page."""
COLUMNS, GAP, BACKGROUND = 3, 10, 120
OUTPUT = Path(__file__).parents[1] / "docs" / "pages.png"


def main() -> None:
    """Draw the pages and write the overview."""
    pages = [render_page(family, seed).image for family, seed in SEEDS.items()]
    width, height = pages[0].size
    rows = -(-len(pages) // COLUMNS)
    overview = Image.new("L", (COLUMNS * (width + GAP) + GAP, rows * (height + GAP) + GAP), BACKGROUND)
    for i, page in enumerate(pages):
        overview.paste(page, (GAP + i % COLUMNS * (width + GAP), GAP + i // COLUMNS * (height + GAP)))
    OUTPUT.parent.mkdir(exist_ok=True)
    # 32 grey levels keep the file small.
    overview.quantize(32).save(OUTPUT, optimize=True)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
