"""The colors that a style sheet's variables have in one of the site's schemes."""

import colorsys
import re
from collections.abc import Iterable

Color = tuple[float, float, float, float]
"""Red, green, blue and alpha, from 0 to 1."""

_BLOCK = re.compile(r"([^{}]+)\{([^{}]*)\}")
_VARIABLE = re.compile(r"(--[\w-]+):\s*([^;]+)")


class Colors:
    """Variables by name, as a page of the scheme has them.

    Args:
        style: The text of all style sheets, in the order in which they are loaded.
        scheme: The value of ``data-md-color-scheme``.
    """

    def __init__(self, style: str, scheme: str) -> None:
        style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL).replace('"', "")
        primary = "[data-md-color-primary"
        of_scheme = f"[data-md-color-scheme={scheme}]"
        selectors = {
            ":root": 0,
            of_scheme: 1,
            f"{primary}=indigo]": 1,
            f"{of_scheme}{primary}]": 2,
            f"{of_scheme}{primary}=indigo]": 2,
        }
        found: dict[str, tuple[int, str]] = {}
        for names, body in _BLOCK.findall(style):
            weight = max((selectors.get(name.strip(), -1) for name in names.split(",")), default=-1)
            for name, value in _VARIABLE.findall(body):
                if weight >= found.get(name, (0, ""))[0]:
                    found[name] = (weight, value.strip())
        self._values = {name: value for name, (_, value) in found.items()}

    def names(self) -> Iterable[str]:
        """Return the names of all variables."""
        return self._values.keys()

    def contrast(self, text: str, ground: str) -> float:
        """Return the contrast of two variables by WCAG 2, over the page's color."""
        page = self._color(self._values.get("--md-default-bg-color", "#fff"))
        below = self._over(self._color(self._values[ground]), page)
        above = self._over(self._color(self._values[text]), below)
        light, dark = sorted((_luminance(above), _luminance(below)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    @staticmethod
    def _over(above: Color, below: Color) -> Color:
        alpha = above[3]
        red, green, blue = (
            a * alpha + b * (1 - alpha) for a, b in zip(above[:3], below[:3], strict=True)
        )
        return red, green, blue, 1.0

    def _color(self, value: str) -> Color:
        value = re.sub(r"var\((--[\w-]+)\)", lambda found: self._values[found[1]], value)
        if "var(" in value:
            return self._color(value)
        if value.startswith("#"):
            digits = value[1:]
            if len(digits) < 6:
                digits = "".join(2 * digit for digit in digits)
            parts = [part / 255 for part in bytes.fromhex(digits.ljust(8, "f"))]
            return parts[0], parts[1], parts[2], parts[3]
        parts = [float(part) for part in re.findall(r"[\d.]+", value)]
        alpha = parts[3] if len(parts) > 3 else 1.0
        if value.startswith("rgb"):
            return parts[0] / 255, parts[1] / 255, parts[2] / 255, alpha
        assert value.startswith("hsl"), value
        red, green, blue = colorsys.hls_to_rgb(parts[0] / 360, parts[2] / 100, parts[1] / 100)
        return red, green, blue, alpha


def _luminance(color: Color) -> float:
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in color[:3]
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
