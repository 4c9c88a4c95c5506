"""Scenes of colored shapes, a number and a word: the demo checkpoint's pictures, drawn with Pillow.

A scene is a frozen, exact description. The questions' answers are derived from it, and so is the
drawing. Everything follows from a seed. Places are the nine cells of a 3 x 3 grid, row by row from
the top left. A wide text has a whole row for itself and counts as an item in the row's middle cell.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from words import WORDS, invented_word

SHAPES = (
    "circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring", "moon", "arrow",
)  # fmt: skip
COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 130, 25),
    "yellow": (245, 215, 40),
    "green": (35, 150, 60),
    "blue": (35, 85, 205),
    "purple": (125, 45, 165),
    "pink": (250, 140, 190),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "black": (20, 20, 20),
    "beige": (240, 225, 195),
    "light blue": (190, 220, 245),
    "light green": (200, 240, 200),
}
PLACES = (
    "top left", "top", "top right", "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
CELLS = range(9)
# The middle cells of the three rows
MIDDLE_CELLS = (1, 4, 7)

# Least distance in RGB between an item and its background
_CONTRAST = 100.0
_COLOR_JITTER = 10
# Largest share of a cell that an item may fill
_FILL = 0.95
# Smallest share of a cell that a shape fills, unless sizes are compared
_SMALLEST = 0.55
# Scenes are drawn this many times larger and then averaged
_SMOOTHING = 2


@dataclass(frozen=True)
class Item:
    """One item of a scene. Sizes and offsets are in units of a cell's shorter side."""

    # "shape", "number" or "word"
    kind: str
    # The shape's name, the digits or the letters
    text: str
    color: str
    cell: int
    # A shape's diameter, or a text's greatest width
    size: float
    rgb: tuple[int, int, int]
    # Offset from the cell's center, -1 to 1 of the free room
    shift: tuple[float, float] = (0.0, 0.0)
    angle: float = 0.0  # degrees
    # Whether the item is alone in its row
    wide: bool = False

    @property
    def name(self) -> str:
        """Return the item's name with its color: ``red circle``, ``number 47``, ``word "lamp"``."""
        if self.kind == "shape":
            return f"{self.color} {self.text}"
        return f"number {self.text}" if self.kind == "number" else f'word "{self.text}"'

    @property
    def cells(self) -> tuple[int, ...]:
        """Return every cell that the item covers."""
        return (self.cell - 1, self.cell, self.cell + 1) if self.wide else (self.cell,)


@dataclass(frozen=True)
class Scene:
    """The full description of a picture, with its items in reading order."""

    width: int
    height: int
    background: str
    background_rgb: tuple[int, int, int]
    items: tuple[Item, ...]

    @property
    def shapes(self) -> tuple[Item, ...]:
        """Return the items that are shapes."""
        return tuple(item for item in self.items if item.kind == "shape")

    def text(self, kind: str) -> Item | None:
        """Return the scene's ``"number"`` or ``"word"``; a scene has at most one of each."""
        return next((item for item in self.items if item.kind == kind), None)

    def at(self, cell: int) -> Item | None:
        """Return the item whose place is ``cell``."""
        return next((item for item in self.items if item.cell == cell), None)

    @property
    def free_cells(self) -> tuple[int, ...]:
        """Return the cells that no item covers."""
        taken = {cell for item in self.items for cell in item.cells}
        return tuple(cell for cell in CELLS if cell not in taken)

    def with_items(self, items: list[Item]) -> "Scene":
        """Return the scene with other items, sorted into reading order."""
        return replace(self, items=tuple(sorted(items, key=lambda item: item.cell)))


def random_size(rng: random.Random) -> tuple[int, int]:
    """Draw a size (width, height) in pixels: square, 4:3 or 3:4.

    The longer side is from 224 to 480 pixels. Small sizes are drawn more often.
    """
    side = 8 * round(28 + 32 * rng.random() ** 2)
    return rng.choice(((side, side), (side, side), (side, side * 3 // 4), (side * 3 // 4, side)))


def random_scene(
    rng: random.Random,
    size: tuple[int, int],
    max_shapes: int = 7,
    with_text: float = 0.45,
    invented: float = 0.0,
) -> Scene:
    """Draw a scene of ``size`` (width, height).

    Args:
        rng: The only source of randomness.
        size: Width and height in pixels, both even.
        max_shapes: The most shapes. A scene that prints a text has at most four.
        with_text: The share of scenes that print a number, a word or both.
        invented: The share of words that are not from ``WORDS``.
    """
    background = rng.choice(tuple(BACKGROUNDS))
    scene = Scene(*size, background, _jittered(rng, BACKGROUNDS[background]), ())
    texts: tuple[str, ...] = ()
    if rng.random() < with_text:
        texts = rng.choice((("number",), ("number",), ("word",), ("word",), ("number", "word")))
    items: list[Item] = []
    for kind in texts:
        items.append(random_text(rng, scene.with_items(items), kind, invented))
    if texts:
        count = rng.randrange(0, min(4, max_shapes) + 1)
    else:
        count = rng.choice((1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 6, 7))
    free = list(scene.with_items(items).free_cells)
    count = min(count, max_shapes, len(free))
    rng.shuffle(free)
    shapes, colors = list(SHAPES), list(visible_colors(background))
    # Few kinds leave more shapes of each to count
    if rng.random() < 0.4:
        shapes, colors = rng.sample(shapes, 2), rng.sample(colors, 2)
    sizes = _random_sizes(rng, count, alone=not texts)
    for cell, diameter in zip(free, sizes, strict=False):
        items.append(_shape(rng, rng.choice(shapes), rng.choice(colors), cell, diameter))
    return scene.with_items(items)


def random_shape(rng: random.Random, scene: Scene, cell: int) -> Item:
    """Draw a shape for ``cell`` of ``scene``, in a color that stands out on the background."""
    color = rng.choice(visible_colors(scene.background))
    return _shape(rng, rng.choice(SHAPES), color, cell, rng.uniform(_SMALLEST, _FILL))


def random_text(rng: random.Random, scene: Scene, kind: str, invented: float = 0.0) -> Item:
    """Draw a number (in a free cell or row) or a word (in a free row) for ``scene``."""
    free = set(scene.free_cells)
    rows = [cell for cell in MIDDLE_CELLS if {cell - 1, cell, cell + 1} <= free]
    if kind == "word":
        text = invented_word(rng) if rng.random() < invented else rng.choice(WORDS)
        wide, size = True, rng.uniform(2.1, 2.9)
    else:
        wide = bool(rows) and rng.random() < 0.5
        text = str(rng.randrange(10 ** rng.randrange(1, 4 if wide else 3)))
        size = rng.uniform(1.4, 2.4) if wide else rng.uniform(0.8, _FILL)
    cell = rng.choice(rows) if wide else rng.choice(sorted(free))
    color = rng.choice(visible_colors(scene.background))
    return Item(
        kind=kind,
        text=text,
        color=color,
        cell=cell,
        size=size,
        rgb=_jittered(rng, COLORS[color]),
        shift=_random_shift(rng),
        wide=wide,
    )


def recolored(rng: random.Random, item: Item, color: str) -> Item:
    """Return ``item`` in another color."""
    return replace(item, color=color, rgb=_jittered(rng, COLORS[color]))


def with_background(rng: random.Random, scene: Scene, background: str) -> Scene:
    """Return ``scene`` on another background."""
    rgb = _jittered(rng, BACKGROUNDS[background])
    return replace(scene, background=background, background_rgb=rgb)


def redrawn(rng: random.Random, scene: Scene) -> Scene:
    """Return the same scene with every item at a slightly different place in its cell."""
    return replace(
        scene, items=tuple(replace(item, shift=_random_shift(rng)) for item in scene.items)
    )


@lru_cache
def visible_colors(background: str) -> tuple[str, ...]:
    """Name the colors that stand out on ``background``."""
    back = BACKGROUNDS[background]
    return tuple(name for name, rgb in COLORS.items() if math.dist(rgb, back) >= _CONTRAST)


def render(scene: Scene) -> Image.Image:
    """Draw ``scene`` as an RGB image of its size."""
    width, height = scene.width * _SMOOTHING, scene.height * _SMOOTHING
    image = Image.new("RGB", (width, height), scene.background_rgb)
    draw = ImageDraw.Draw(image)
    for item in scene.items:
        if item.kind == "shape":
            _draw_shape(draw, item, width, height)
        else:
            _draw_text(draw, item, width, height)
    return image.reduce(_SMOOTHING)


def _shape(rng: random.Random, name: str, color: str, cell: int, size: float) -> Item:
    # An arrow points in any direction. The other shapes are tilted a little.
    angle = rng.choice((0, 90, 180, 270)) if name == "arrow" else 0
    return Item(
        kind="shape",
        text=name,
        color=color,
        cell=cell,
        size=size,
        rgb=_jittered(rng, COLORS[color]),
        shift=_random_shift(rng),
        angle=angle + rng.uniform(-9, 9),
    )


def _random_sizes(rng: random.Random, count: int, alone: bool) -> list[float]:
    """Draw diameters: arbitrary ones, or with one that is clearly the largest or the smallest."""
    if count == 1 and alone:
        return [rng.uniform(_SMALLEST, 1.6)]
    style = rng.random()
    if count < 2 or style < 0.5:
        return [rng.uniform(_SMALLEST, _FILL) for _ in range(count)]
    if style < 0.8:
        return [rng.uniform(0.86, _FILL)] + [rng.uniform(0.48, 0.58) for _ in range(count - 1)]
    return [rng.uniform(0.48, 0.54)] + [rng.uniform(0.8, _FILL) for _ in range(count - 1)]


def _random_shift(rng: random.Random) -> tuple[float, float]:
    return rng.uniform(-1, 1), rng.uniform(-1, 1)


def _jittered(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (
        min(255, max(0, value + rng.randint(-_COLOR_JITTER, _COLOR_JITTER))) for value in rgb
    )
    return red, green, blue


def _center(
    item: Item, width: int, height: int, half_width: float, half_height: float
) -> tuple[float, float]:
    """Return the pixel position of an item: its cell's center, shifted, and inside the image."""
    row, column = divmod(item.cell, 3)
    columns = 3 if item.wide else 1
    room_x = max(0.0, width * columns / 6 - half_width)
    room_y = max(0.0, height / 6 - half_height)
    x = width * (column * 2 + 1) / 6 + item.shift[0] * room_x * 0.9
    y = height * (row * 2 + 1) / 6 + item.shift[1] * room_y * 0.9
    x = min(max(x, half_width), width - half_width)
    y = min(max(y, half_height), height - half_height)
    return x, y


def _draw_shape(draw: ImageDraw.ImageDraw, item: Item, width: int, height: int) -> None:
    radius = item.size * min(width, height) / 6
    x, y = _center(item, width, height, radius, radius)
    box = (x - radius, y - radius, x + radius, y + radius)
    if item.text == "circle":
        draw.ellipse(box, fill=item.rgb)
    elif item.text == "ring":
        draw.ellipse(box, outline=item.rgb, width=max(1, round(radius * 0.38)))
    else:
        cos, sin = math.cos(math.radians(item.angle)), math.sin(math.radians(item.angle))
        points = [
            (x + radius * (px * cos - py * sin), y + radius * (px * sin + py * cos))
            for px, py in _OUTLINES[item.text]
        ]
        draw.polygon(points, fill=item.rgb)


def _draw_text(draw: ImageDraw.ImageDraw, item: Item, width: int, height: int) -> None:
    cell = min(width, height) / 3
    widest = item.size * cell
    tallest = cell * 0.8
    unit = _font(100)
    scale = min(widest / unit.getlength(item.text), tallest / 100)
    font = _font(max(8, int(100 * scale)))
    left, top, right, bottom = font.getbbox(item.text, anchor="mm")
    half_width, half_height = (right - left) / 2, (bottom - top) / 2
    x, y = _center(item, width, height, half_width, half_height)
    # The anchor is the middle of the line, not of these letters
    draw.text((x - (left + right) / 2, y - (top + bottom) / 2), item.text, item.rgb, font, "mm")


@lru_cache(maxsize=512)
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("scenes need a Pillow built with FreeType")
    return font


def _around(angles: list[float], radii: list[float]) -> list[tuple[float, float]]:
    """Return points at ``angles`` (degrees, 0 is up, clockwise) and ``radii``."""
    return [
        (radius * math.sin(math.radians(angle)), -radius * math.cos(math.radians(angle)))
        for angle, radius in zip(angles, radii, strict=True)
    ]


def _heart() -> list[tuple[float, float]]:
    steps = [2 * math.pi * k / 48 for k in range(48)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
        )
        for t in steps
    ]


def _moon() -> list[tuple[float, float]]:
    outer = _around([180 + 180 * k / 24 for k in range(-6, 31)], [1.0] * 37)
    (x_end, y_end), (x_start, y_start) = outer[-1], outer[0]
    # The inner edge is a flatter curve between the horns
    inner = []
    for k in range(1, 24):
        t = k / 24
        x, y = x_end + (x_start - x_end) * t, y_end + (y_start - y_end) * t
        inner.append((x - 0.95 * math.sin(math.pi * t), y))
    return outer + inner


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "triangle": [(0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "star": _around([36.0 * k for k in range(10)], [1.0, 0.42] * 5),
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "heart": _heart(),
    "moon": _moon(),
    "arrow": [
        (1, 0), (0.2, -0.8), (0.2, -0.3), (-1, -0.3), (-1, 0.3), (0.2, 0.3), (0.2, 0.8),
    ],
}  # fmt: skip
