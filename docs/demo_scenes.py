"""Paint the demo scenes: synthetic aerial images with masks, laid out like the Dubai dataset.

    python -m docs.demo_scenes    writes 36 scenes in four folders, and classes.csv, to docs/demo

The random numbers of a scene depend on its tile and its part alone, so a second run writes the same
files. docs/demo/clicks.csv comes from elsewhere: `python train.py --demo --points 30` leaves it.

A scene is painted from the ground up, and `draw_scene` lists its layers in order. Everything is
painted on a canvas of twice the final size. Halving it at the end makes the edges smooth.

Letters: H, W size of the scene; x, y a point on the canvas; u, v the same point measured across and
along the streets, which are rotated. x, y, u and v all count canvas pixels.
"""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFilter import GaussianBlur

from data import CLASSES, NO_LABEL, PALETTE

# A label is a row of COLORS.
COLORS = [*PALETTE, *(color for _, color in NO_LABEL)]
BUILDING, LAND, ROAD, VEGETATION, WATER, UNLABELED, NO_DATA = range(7)

SAND = (188, 168, 132)
LAWN = (96, 112, 62)
KERB = (176, 170, 160)
ASPHALT = (104, 103, 106)
MARKING = (192, 190, 182)
BEACH = (222, 208, 172)
DEEP_WATER = (28, 78, 104)
SHALLOWS = (58, 74, 48)  # added to DEEP_WATER at the shore
GARDEN = (104, 124, 66)
BARE_SOIL = (150, 122, 96)
TRENCH = (122, 96, 74)
ROOFS = (
    (236, 234, 230),  # white paint
    (214, 214, 214),  # concrete
    (186, 104, 78),  # clay tiles
    (150, 160, 172),  # sheet metal
    (244, 240, 226),  # limestone
)
LEAVES = (58, 80, 42)
SHADOW = (12, 12, 20)
SHADOW_OPACITY = 140  # of 255


class Tile(NamedTuple):
    """What the scenes of one tile have in common."""

    size: tuple  # (W, H)
    angle: float  # of the streets, in radians
    spacing: int  # of the streets, in canvas pixels
    water: float  # share of the pixels
    lawn: float  # share of the pixels, before streets and water cover some of it
    built: float  # share of the lots


TILES = {
    "Tile 1": Tile((512, 416), 0.12, 300, 0.00, 0.10, 0.75),  # a suburb in the desert
    "Tile 2": Tile((352, 384), 0.65, 236, 0.00, 0.14, 0.95),  # an old town
    "Tile 3": Tile((480, 480), -0.3, 330, 0.34, 0.10, 0.60),  # a town by the sea
    "Tile 4": Tile((560, 448), 0.35, 380, 0.12, 0.34, 0.45),  # parks and a lake
}
PARTS = 9  # scenes per tile, as in the real dataset


def make_demo(root: Path) -> None:
    """Write all scenes and classes.csv to the folder `root`."""
    colors = np.array(COLORS, np.uint8)  # (7, 3), one row per label
    for number, (folder, tile) in enumerate(TILES.items()):
        images = root / folder / "images"
        masks = root / folder / "masks"
        images.mkdir(parents=True, exist_ok=True)
        masks.mkdir(exist_ok=True)
        for part in range(1, PARTS + 1):
            rng = np.random.default_rng([number, part])
            photo, labels = draw_scene(tile, rng)
            mask = Image.fromarray(colors[labels])  # (H, W, 3)
            if folder == "Tile 2":
                # One tile has palette masks, so that the demo covers both ways of storing them.
                mask = mask.quantize(16, dither=Image.Dither.NONE)
            name = f"image_part_{part:03d}"
            photo.save(images / f"{name}.jpg", quality=75)
            mask.save(masks / f"{name}.png", optimize=True)
    write_classes(root / "classes.csv")


def write_classes(path: Path) -> None:
    """Write the colour of each class. A row without a name is a colour that means no label."""
    names = (*CLASSES, "", "")
    lines = ["class,color"]
    for name, color in zip(names, COLORS):
        code = bytes(color).hex().upper()
        lines.append(f"{name},#{code}")
    path.write_text("\n".join(lines) + "\n")


def draw_scene(tile, rng):
    """One scene seen from above: the photograph, an image, and its labels, an array (H, W)."""
    scene = Scene(tile.size, rng)
    scene.add_land(tile.lawn)
    scene.add_streets(tile.angle, tile.spacing)
    scene.add_water(tile.water)
    scene.add_lots(tile.built)
    scene.add_woods()
    scene.add_shadows()  # before roofs and trees: shadows fall on the ground only
    scene.add_roofs()
    scene.add_trees()
    return scene.take_photo()


class Scene:
    """A photograph and its labels on the canvas. Each layer is painted over those before it."""

    def __init__(self, size, rng):
        W, H = size
        self.size = size
        self.rng = rng
        self.canvas_size = (2 * W, 2 * H)
        self.photo = Image.new("RGB", self.canvas_size)
        self.labels = Image.new("L", self.canvas_size)
        self.photo_brush = ImageDraw.Draw(self.photo)
        self.label_brush = ImageDraw.Draw(self.labels)
        # What stands up is planned with the lots, and painted when all of the ground is.
        self.roofs = []  # rectangles (u0, v0, u1, v1)
        self.trees = []  # (x, y, radius) each
        # Two textures that several layers share.
        self.rough = self.noise(60, 120)  # (H, W)
        self.fine = rng.standard_normal((H, W))

    # The layers, in the order of draw_scene.

    def add_land(self, lawn_share):
        """Sand with lawns in it."""
        texture = 12 * self.noise(4, 9) + 6 * self.rough + 4 * self.fine  # (H, W)
        everywhere = np.ones_like(texture)
        self.cover(everywhere, SAND, texture, LAND)

        field = self.noise(5, 9)  # (H, W)
        # The quantile gives the lawns the share of the pixels that the tile asks for.
        threshold = np.quantile(field, 1 - lawn_share)
        texture = 10 * self.noise(30, 60) + 8 * self.fine  # (H, W)
        self.cover(field > threshold, LAWN, texture, VEGETATION)

    def add_streets(self, angle, spacing):
        """A rotated grid of streets with kerbs and dashed lines."""
        rng = self.rng
        angle = angle + rng.normal(0, 0.08)
        cos = np.cos(angle)
        sin = np.sin(angle)
        self.u_axis = np.array((cos, sin))
        self.v_axis = np.array((-sin, cos))
        # u = v = 0 lies near the centre of the canvas, which is at (W, H).
        self.origin = self.size + rng.uniform(-0.5, 0.5, 2) * spacing  # (x, y)
        # Nine streets each way cover the canvas at any angle. Jitter varies the size of the blocks.
        jitter = rng.uniform(-0.12, 0.12, 9)
        self.streets = (np.arange(-4, 5) + jitter) * spacing  # (9,), the same in u and in v
        self.half_widths = np.full(9, 15)
        avenue = rng.integers(3, 6)
        self.half_widths[avenue] = 26

        # All kerbs come first, so that none crosses a street at a junction.
        self.stripes(self.half_widths + 5, -3000, 3000, KERB)
        self.stripes(self.half_widths, -3000, 3000, ASPHALT, ROAD)
        for dash in range(-1100, 1100, 44):
            self.stripes(np.ones(9), dash, dash + 20, MARKING)

    def add_water(self, share):
        """The sea or a lake, from the beach down to the deep."""
        W, _ = self.size
        side = self.rng.choice([-1, 1])
        # The slope puts most of the water on one side.
        slope = side * np.linspace(-1.5, 1.5, W)  # (W,)
        field = self.noise(3, 5) + slope  # (H, W)
        depth = field - np.quantile(field, 1 - share)  # (H, W), negative on land
        self.beach = np.clip(1 + 8 * depth, 0, 1)  # (H, W), 1 at the shore, 0 inland
        if share == 0:
            self.beach[:] = 0  # without water there is no shore
        self.cover(self.beach, BEACH, 4 * self.fine)

        shallow = np.exp(-3 * np.clip(depth, 0, None))  # (H, W), 1 at the shore, 0 in the deep
        color = DEEP_WATER + shallow[..., None] * SHALLOWS  # (H, W, 3)
        texture = 3 * self.rough + 3 * self.fine  # (H, W)
        self.cover(depth > 0, color, texture, WATER)

    def add_lots(self, built_share):
        """Cut the blocks between the streets into lots, and put them to use."""
        starts = self.streets[:-1] + self.half_widths[:-1] + 16  # (8,)
        ends = self.streets[1:] - self.half_widths[1:] - 16  # (8,)
        blocks = []  # the same in u and in v, as the streets are
        for start, end in zip(starts, ends):
            count = round((end - start) / 105)  # lots of about this width
            width = (end - start) / count
            centers = start + (np.arange(count) + 0.5) * width  # (count,)
            blocks.append((centers, width))

        for (u_centers, width), (v_centers, length) in product(blocks, blocks):
            for u, v in product(u_centers, v_centers):
                self.add_lot(u, v, width, length, built_share)
                self.add_lot_trees(u, v, width, length)

    def add_lot(self, u, v, width, length, built_share):
        """Use the lot around (u, v) for a building, a building site or a garden, or leave it."""
        if self.ground(*self.at(u, v)) != LAND:
            return
        # The rest, 12 % or more, stays free between neighbours.
        half_width = width * self.rng.uniform(0.32, 0.44)
        half_length = length * self.rng.uniform(0.32, 0.44)
        lot = (u - half_width, v - half_length, u + half_width, v + half_length)
        use = self.rng.random()
        if use < built_share:
            self.roofs.append(lot)
        elif use < built_share + 0.04:
            self.add_building_site(*lot)
        elif use < built_share + 0.1:
            self.fill(lot, GARDEN, VEGETATION)

    def add_building_site(self, u0, v0, u1, v1):
        """Bare soil with trenches: the part of the scene that belongs to no class."""
        self.fill((u0, v0, u1, v1), BARE_SOIL, UNLABELED)
        for u in np.arange(u0, u1 - 6, 14):
            self.fill((u, v0, u + 6, v1), TRENCH)

    def add_lot_trees(self, u, v, width, length):
        """Up to two trees anywhere on the lot around (u, v)."""
        rng = self.rng
        for _ in range(rng.integers(0, 3)):
            du = width * rng.uniform(-0.5, 0.5)
            dv = length * rng.uniform(-0.5, 0.5)
            x, y = self.at(u + du, v + dv)
            radius = rng.uniform(6, 13)
            if self.ground(x, y) in (LAND, VEGETATION):
                self.trees.append((x, y, radius))

    def add_woods(self):
        """Many trees on the lawns: drawn all over the canvas, and kept where grass is."""
        W, H = self.size
        low = (0, 0, 6)  # x, y, radius
        high = (2 * W, 2 * H, 15)
        count = W * H // 200
        for x, y, radius in self.rng.uniform(low, high, (count, 3)):
            if self.ground(x, y) == VEGETATION:
                self.trees.append((x, y, radius))

    def add_shadows(self):
        """The shadows of trees and buildings. The sun is at the upper left."""
        shadows = Image.new("L", self.canvas_size)
        brush = ImageDraw.Draw(shadows)
        for x, y, r in self.trees:
            center = (x + 0.7 * r, y + 0.5 * r)
            brush.circle(center, r, SHADOW_OPACITY)
        for roof in self.roofs:
            corners = self.corners(*roof)
            height = self.rng.integers(14, 34)
            # The walls are a stack of copies of the roof, and each copy casts its shadow.
            for z in range(0, height, 3):
                shifted = [(x + 0.9 * z, y + 0.6 * z) for x, y in corners]
                brush.polygon(shifted, SHADOW_OPACITY)
        soft = shadows.filter(GaussianBlur(1))
        self.photo.paste(SHADOW, mask=soft)

    def add_roofs(self):
        """Roofs with parapets and air conditioners."""
        rng = self.rng
        for roof in self.roofs:
            color = rng.choice(ROOFS) + rng.integers(-12, 12)  # (3,)
            wings = [roof]
            if rng.random() < 0.4:
                wings = l_shape(*roof)
            # The parapets of both wings come first, so that none crosses the roof.
            for wing in wings:
                self.fill(wing, shade(color, 0.8), BUILDING)
            for u0, v0, u1, v1 in wings:
                inside = (u0 + 4, v0 + 4, u1 - 4, v1 - 4)
                self.fill(inside, shade(color, 1.0))
            for _ in range(rng.integers(1, 5)):
                self.add_air_conditioner(*roof, color)

    def add_air_conditioner(self, u0, v0, u1, v1, color):
        """A small box and its shadow, near the corner that an L-shaped roof has too."""
        rng = self.rng
        u = u0 + 8 + rng.uniform(0, 0.4) * (u1 - u0)
        v = v0 + 8 + rng.uniform(0, 0.4) * (v1 - v0)
        side = rng.uniform(4, 9)
        for edge, brightness in ((1.5 * side, 0.6), (side, 0.9)):
            square = (u, v, u + edge, v + edge)
            self.fill(square, shade(color, brightness))

    def add_trees(self):
        """Crowns seen from above, each with a highlight on the side of the sun."""
        brush = self.photo_brush
        for x, y, r in self.trees:
            color = np.array(LEAVES) + self.rng.integers(-10, 12)  # (3,)
            brush.circle((x, y), r, shade(color, 1.0))
            highlight = (x - 0.3 * r, y - 0.3 * r)
            brush.circle(highlight, 0.5 * r, shade(color, 1.3))
            self.label_brush.circle((x, y), r, VEGETATION)

    def take_photo(self):
        """Add what a camera adds: blur, uneven light and grain. Return photograph and labels."""
        rng = self.rng
        blurred = self.photo.filter(GaussianBlur(1.2))
        pixels = np.asarray(blurred.reduce(2))  # (H, W, 3)
        light = 1 + 0.04 * self.noise(3) + 0.03 * self.noise(90, 180)  # (H, W)
        grain = rng.normal(0, 2.5, pixels.shape)  # (H, W, 3)
        photo = to_image(pixels * light[..., None] + grain)
        labels = np.array(self.labels)[::2, ::2]  # (H, W)
        # Some masks lack a strip on the left, because Dubai's masks have black pixels too.
        if rng.random() < 1 / 9:
            width = rng.integers(10, 60)
            labels[:, :width] = NO_DATA
        return photo, labels

    # The tools that the layers share.

    def noise(self, *cells):
        """A smooth random field (H, W) with mean 0: the sum of one octave for each cell count."""
        field = 0
        for n in cells:
            values = self.rng.standard_normal((n, n), np.float32)
            octave = Image.fromarray(values).resize(self.size)
            field = field + np.asarray(octave)  # (H, W)
        # The standard deviation is about 1.2, however many octaves there are.
        return field / (0.7 * len(cells) ** 0.5)

    def cover(self, weights, color, texture, label=None):
        """Blend a textured colour into the photograph. The weights go from 0 to 1.

        color: (3,) or (H, W, 3); weights and texture: (H, W)
        """
        surface = to_image(color + texture[..., None])  # (H, W, 3)
        stencil = to_image(255 * weights)  # (H, W)
        # Pillow enlarges smoothly: its default is bicubic interpolation.
        surface = surface.resize(self.canvas_size)  # (2H, 2W, 3)
        stencil = stencil.resize(self.canvas_size)  # (2H, 2W)
        self.photo.paste(surface, mask=stencil)
        # Pillow blends the labels too. Where the stencil is soft, that leaves a thin line of wrong
        # labels, on 0.2 % of the pixels. The committed masks have it.
        if label is not None:
            self.labels.paste(label, mask=stencil)

    def fill(self, rectangle, color, label=None):
        """Fill a rectangle (u0, v0, u1, v1)."""
        corners = self.corners(*rectangle)
        self.photo_brush.polygon(corners, color)
        if label is not None:
            self.label_brush.polygon(corners, label)

    def stripes(self, half_widths, start, end, color, label=None):
        """Paint a stripe on every street of both directions, from `start` to `end`."""
        for street, half_width in zip(self.streets, half_widths):
            low = street - half_width
            high = street + half_width
            self.fill((low, start, high, end), color, label)
            self.fill((start, low, end, high), color, label)

    def at(self, u, v):
        """The canvas point (x, y) of a point (u, v)."""
        return tuple(self.origin + u * self.u_axis + v * self.v_axis)

    def corners(self, u0, v0, u1, v1):
        """The corners (x, y) of a rectangle, in order around it."""
        return [
            self.at(u0, v0),
            self.at(u1, v0),
            self.at(u1, v1),
            self.at(u0, v1),
        ]

    def ground(self, x, y):
        """The label at a canvas point, or None where nothing may stand."""
        W, H = self.size
        inside = 0 <= x < 2 * W and 0 <= y < 2 * H
        if not inside:
            return None
        column = int(x)
        row = int(y)
        if self.beach[row // 2, column // 2] > 0:
            return None
        return self.labels.getpixel((column, row))


def l_shape(u0, v0, u1, v1):
    """Two wings that leave a corner of the rectangle free."""
    first = (u0, v0, u1, v0 + 0.6 * (v1 - v0))
    second = (u0, v0, u0 + 0.5 * (u1 - u0), v1)
    return [first, second]


def to_image(pixels):
    """Clip an array (H, W) or (H, W, 3) to 0 … 255 and make it an image."""
    clipped = np.clip(pixels, 0, 255)
    return Image.fromarray(clipped.astype(np.uint8))


def shade(color, brightness):
    """A brighter or darker colour, as the tuple of integers that Pillow expects."""
    return tuple(int(channel) for channel in color * brightness)


if __name__ == "__main__":
    make_demo(Path(__file__).resolve().parent / "demo")
