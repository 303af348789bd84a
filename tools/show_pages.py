"""Draw a page of each family on one sheet: `python tools/show_pages.py` writes docs/pages.png for the README."""

from pathlib import Path

from PIL import Image

from idefics_lit.data.pages import FAMILIES, render_page

SEEDS = dict(zip(FAMILIES, (120, 142, 48, 73, 93, 76), strict=True))
"""Pages that show what their families can look like."""
ACROSS, GAP, BACKGROUND = 3, 10, 120
OUTPUT = Path(__file__).parents[1] / "docs" / "pages.png"


def main() -> None:
    """Write the sheet."""
    pages = [render_page(family, seed).image for family, seed in SEEDS.items()]
    width, height = pages[0].size
    down = -(-len(pages) // ACROSS)
    sheet = Image.new("L", (ACROSS * (width + GAP) + GAP, down * (height + GAP) + GAP), BACKGROUND)
    for i, page in enumerate(pages):
        sheet.paste(page, (GAP + i % ACROSS * (width + GAP), GAP + i // ACROSS * (height + GAP)))
    OUTPUT.parent.mkdir(exist_ok=True)
    # 32 greys are enough to look at and keep the file small.
    sheet.quantize(32).save(OUTPUT, optimize=True)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
