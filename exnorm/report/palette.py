"""One colour for each normalizer, in every figure: the palette of Okabe and Ito (2008), safe for the colour-blind."""

from matplotlib import colormaps
from matplotlib.colors import to_hex

COLOURS = {
    "in": "#0072B2",
    "ln": "#E69F00",
    "bn": "#009E73",
    "gn": "#CC79A7",
    "brn": "#56B4E9",
    "ssn": "#F0E442",
    "sn": "#D55E00",
    "en": "#000000",
}
OTHER = "#7F7F7F"


def shade(number: int, count: int) -> str:
    """Return a colour for line `number` of `count` lines that are not normalizers: dark to light, also safe."""
    return to_hex(colormaps["viridis"](0.85 * number / max(1, count - 1)))


def colour(normalizer: str) -> str:
    """Return the colour of a normalizer; grey if it has none."""
    return COLOURS.get(normalizer, OTHER)
