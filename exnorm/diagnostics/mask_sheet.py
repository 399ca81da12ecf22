"""Sheets of images in rows, above a legend of the classes whose colours lie over them."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from exnorm.data.palette import colours
from exnorm.diagnostics.doctor_lines import fitted, sheet_font

TILE = (208, 156)  # px
GAP = 4
LINE, SWATCH = 18, 12  # of the legend and of headings; px


def draw_sheet(
    tiles: Sequence[Image.Image | None], classes: Sequence[str], *, columns: int, headings: Sequence[str] = ()
) -> Image.Image:
    """Return a sheet of images.

    Args:
        tiles: row by row. Each keeps its shape and becomes as large as fits into TILE; None leaves its place white.
        classes: names for the legend, in the order of `palette.colours`.
        headings: of the columns.
    """
    fitting = [tile and ImageOps.contain(tile, TILE) for tile in tiles]
    rows = [fitting[first : first + columns] for first in range(0, len(fitting), columns)]
    heights = [max((tile.height for tile in row if tile), default=0) + GAP for row in rows]
    left, above = TILE[0] + GAP, LINE if headings else 0
    below = above + sum(heights)
    sheet = Image.new("RGB", (columns * left, below + -(-len(classes) // columns) * LINE + GAP), "white")
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            if tile:
                sheet.paste(tile, (column * left, above + sum(heights[:number])))
    pen, font = ImageDraw.Draw(sheet), sheet_font()
    for place, heading in enumerate(headings):
        pen.text((place * left, 1), fitted(heading, TILE[0], font), fill="black", font=font)
    for place, (name, colour) in enumerate(zip(classes, colours(len(classes)).tolist(), strict=True)):
        x, y = place % columns * left, below + GAP + place // columns * LINE
        pen.rectangle((x, y, x + SWATCH, y + SWATCH), fill=tuple(colour))
        pen.text((x + SWATCH + GAP, y - 1), fitted(name, TILE[0] - SWATCH - GAP, font), fill="black", font=font)
    return sheet
