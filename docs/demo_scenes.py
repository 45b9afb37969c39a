"""Paint the demo scenes: synthetic aerial images with masks, in the layout of the Dubai dataset.

python -m docs.demo_scenes    writes docs/demo, the 36 scenes in 4 folders, and its classes.csv

docs/demo/clicks.csv is the clicks.csv that `python train.py --demo --points 30` leaves.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data import CLASSES, NO_LABEL, PALETTE

# tile: size in pixels, street grid (angle, spacing), share of water and green, share of built lots
DEMO_TILES = {
    "Tile 1": ((512, 416), (0.12, 150), 0.00, 0.10, 0.75),  # suburb in the desert
    "Tile 2": ((352, 384), (0.65, 118), 0.00, 0.14, 0.95),  # old town, masks stored as palette PNG
    "Tile 3": ((480, 480), (-0.3, 165), 0.34, 0.10, 0.60),  # at the sea
    "Tile 4": ((560, 448), (0.35, 190), 0.12, 0.34, 0.45),  # parks and a lake
}
ROOFS = ((236, 234, 230), (214, 214, 214), (186, 104, 78), (150, 160, 172), (244, 240, 226))
DEMO_IMAGES = 9  # per tile, as in the real dataset


def make_demo(root: Path) -> None:
    """Write the scenes to `root`, with the layout and the quirks of the Dubai dataset."""
    for t, (tile, (size, grid, water, green, built)) in enumerate(DEMO_TILES.items()):
        folder = root / tile
        (folder / "images").mkdir(parents=True, exist_ok=True)
        (folder / "masks").mkdir(exist_ok=True)
        for part in range(1, DEMO_IMAGES + 1):
            rng = np.random.default_rng([t, part])
            photo, labels = draw_scene(rng, size, grid, water, green, built)
            colors = np.array([*PALETTE, *NO_LABEL], np.uint8)
            mask = Image.fromarray(colors[labels])
            if tile == "Tile 2":
                mask = mask.quantize(16, dither=Image.Dither.NONE)
            name = f"image_part_{part:03d}"
            photo.save(folder / "images" / f"{name}.jpg", quality=75)
            mask.save(folder / "masks" / f"{name}.png", optimize=True)
    rows = [*zip(CLASSES, PALETTE), *(("", color) for color in NO_LABEL)]
    lines = ["class,color", *(f"{name},#{r:02X}{g:02X}{b:02X}" for name, (r, g, b) in rows)]
    (root / "classes.csv").write_text("\n".join(lines) + "\n")


def draw_scene(rng, size, grid, water_share, green_share, built_share):
    """One scene seen from above: (photo, (H, W) array of labels; 5 is Unlabeled, 6 no data).

    Painted from the ground up: land, lawns, streets, water, then all that stands and its shadow;
    last light, blur and grain of the camera. What Pillow draws is drawn at twice the size, so that
    its edges come out smooth.
    """
    building, land, road, green, water, unlabeled, no_data = range(7)
    W, H = size

    def noise(*cells):  # a smooth random field (H, W) of variance 1: octaves of so many cells each
        fields = [Image.fromarray(rng.standard_normal((n, n), np.float32)) for n in cells]
        octaves = [f.resize(size, Image.Resampling.BICUBIC) for f in fields]
        return sum(np.asarray(o) for o in octaves) / (0.7 * len(cells) ** 0.5)

    def surface(
        color, texture
    ):  # color (3,) or (H, W, 3), texture (H, W) → image at twice the size
        pixels = np.clip(np.asarray(color) + texture[..., None], 0, 255).astype(np.uint8)
        return Image.fromarray(pixels).resize((2 * W, 2 * H), Image.Resampling.BICUBIC)

    def stencil(where):  # (H, W) weights 0 … 1 → mask at twice the size
        return Image.fromarray((where * 255).astype(np.uint8)).resize((2 * W, 2 * H))

    # 1. Land and lawns.
    rough, fine = noise(60, 120), rng.standard_normal((H, W))
    photo = surface((188, 168, 132), 12 * noise(4, 9) + 6 * rough + 4 * fine)
    labels = Image.new("L", photo.size, land)
    field = noise(5, 9)
    lawn = stencil(field > np.quantile(field, 1 - green_share))
    photo.paste(surface((96, 112, 62), 10 * noise(30, 60) + 8 * fine), mask=lawn)
    labels.paste(green, mask=lawn)
    on_photo, on_labels = ImageDraw.Draw(photo), ImageDraw.Draw(labels)

    # 2. Streets: a turned grid, kerbs, dashed lines. u runs across it, v along, in half pixels.
    angle, spacing = grid[0] + rng.normal(0, 0.08), grid[1] * 2
    u_axis, v_axis = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    origin = np.array([W, H]) + rng.uniform(-0.5, 0.5, 2) * spacing
    lines = (np.arange(-4, 5) + rng.uniform(-0.12, 0.12, 9)) * spacing
    half = np.where(np.arange(9) == rng.integers(3, 6), 26, 15)  # half widths; one is an avenue

    def at(u, v):
        return tuple(origin + u * u_axis + v * v_axis)

    def box(u0, v0, u1, v1):
        return [at(u0, v0), at(u1, v0), at(u1, v1), at(u0, v1)]

    for kerb, color in ((5, (176, 170, 160)), (0, (104, 103, 106))):
        for line, width in zip(lines, half + kerb):
            on_photo.polygon(box(line - width, -3000, line + width, 3000), color)
            on_photo.polygon(box(-3000, line - width, 3000, line + width), color)
    for line, width in zip(lines, half):
        on_labels.polygon(box(line - width, -3000, line + width, 3000), road)
        on_labels.polygon(box(-3000, line - width, 3000, line + width), road)
        for dash in range(-1100, 1100, 44):
            on_photo.polygon(box(line - 1, dash, line + 1, dash + 20), (192, 190, 182))
            on_photo.polygon(box(dash, line - 1, dash + 20, line + 1), (192, 190, 182))

    # 3. Water, from the beach down into the deep.
    slope = np.linspace(-1.5, 1.5, W) * rng.choice([-1, 1])  # the sea is on one side
    field = noise(3, 5) + slope
    depth = field - np.quantile(field, 1 - water_share)  # (H, W)
    beach, sea = np.clip(1 + depth * 8, 0, 1) * (water_share > 0), stencil(depth > 0)
    photo.paste(surface((222, 208, 172), 4 * fine), mask=stencil(beach))
    shallow = np.exp(-3 * np.clip(depth, 0, None))[..., None]
    blue = (28, 78, 104) + shallow * (58, 74, 48)  # (H, W, 3)
    photo.paste(surface(blue, 3 * rough + 3 * fine), mask=sea)
    labels.paste(water, mask=sea)

    # 4. Lots: blocks between streets are cut up for a building, a garden or a building site each.
    def ground(x, y):  # what lies at a point; water outside the scene and on the beach
        inside = 0 <= x < 2 * W and 0 <= y < 2 * H and beach[int(y) // 2, int(x) // 2] == 0
        return labels.getpixel((int(x), int(y))) if inside else water

    roofs, trees = [], []
    for i, j in np.ndindex(8, 8):
        u0, u1 = lines[i] + half[i] + 16, lines[i + 1] - half[i + 1] - 16
        v0, v1 = lines[j] + half[j] + 16, lines[j + 1] - half[j + 1] - 16
        columns, rows = round((u1 - u0) / 105), round((v1 - v0) / 105)
        du, dv = (u1 - u0) / columns, (v1 - v0) / rows
        for a, b in np.ndindex(columns, rows):
            u, v = u0 + (a + 0.5) * du, v0 + (b + 0.5) * dv
            if ground(*at(u, v)) == land:
                a, b = du * rng.uniform(0.32, 0.44), dv * rng.uniform(0.32, 0.44)
                lot, use = (u - a, v - b, u + a, v + b), rng.random()
                if use < built_share:
                    roofs.append(lot)
                elif use < built_share + 0.04:
                    on_photo.polygon(box(*lot), (150, 122, 96))
                    for x in np.arange(lot[0], lot[2] - 6, 14):
                        on_photo.polygon(box(x, lot[1], x + 6, lot[3]), (122, 96, 74))
                    on_labels.polygon(box(*lot), unlabeled)
                elif use < built_share + 0.1:
                    on_photo.polygon(box(*lot), (104, 124, 66))
                    on_labels.polygon(box(*lot), green)
            for _ in range(rng.integers(0, 3)):
                shift = rng.uniform(-0.5, 0.5, 2) * (du, dv)
                trees.append((*at(*(shift + (u, v))), rng.uniform(6, 13)))
    woods = rng.uniform(0, 1, (W * H // 200, 3)) * (2 * W, 2 * H, 9) + (0, 0, 6)
    trees += [tree for tree in woods if ground(*tree[:2]) == green]
    trees = [tree for tree in trees if ground(*tree[:2]) in (land, green)]

    # 5. The shadows of all that stands, then roofs and trees.
    def disc(draw, x, y, r, color):
        draw.ellipse((x - r, y - r, x + r, y + r), color)

    dark = Image.new("L", photo.size)
    on_dark = ImageDraw.Draw(dark)
    for x, y, r in trees:
        disc(on_dark, x + 0.7 * r, y + 0.5 * r, r, 140)
    for lot in roofs:
        for step in range(0, rng.integers(14, 34), 3):
            on_dark.polygon([(x + 0.9 * step, y + 0.6 * step) for x, y in box(*lot)], 140)
    photo.paste((12, 12, 20), mask=dark.filter(ImageFilter.GaussianBlur(1)))
    for u0, v0, u1, v1 in roofs:
        color = np.array(rng.choice(ROOFS)) + rng.integers(-12, 12)
        wings = [(u0, v0, u1, v1)]
        if rng.random() < 0.4:  # L-shaped
            wings = [(u0, v0, u1, v0 + (v1 - v0) * 0.6), (u0, v0, u0 + (u1 - u0) * 0.5, v1)]
        for shrink_by, shade in ((0, 0.8), (4, 1.0)):  # the parapet, the roof within it
            for a, b, c, d in wings:
                inner = box(a + shrink_by, b + shrink_by, c - shrink_by, d - shrink_by)
                on_photo.polygon(inner, tuple(int(x) for x in color * shade))
                on_labels.polygon(box(a, b, c, d), building)
        for _ in range(rng.integers(1, 5)):  # air conditioners with their shadows
            u, v = (u0 + 8, v0 + 8) + rng.uniform(0, 0.4, 2) * (u1 - u0, v1 - v0)
            s = rng.uniform(4, 9)
            on_photo.polygon(
                box(u, v, u + 1.5 * s, v + 1.5 * s), tuple(int(x) for x in color * 0.6)
            )
            on_photo.polygon(box(u, v, u + s, v + s), tuple(int(x) for x in color * 0.9))
    for x, y, r in trees:
        leaf = np.array((58, 80, 42)) + rng.integers(-10, 12)
        disc(on_photo, x, y, r, tuple(int(c) for c in leaf))
        disc(on_photo, x - 0.3 * r, y - 0.3 * r, 0.5 * r, tuple(int(c) for c in leaf * 1.3))
        disc(on_labels, x, y, r, green)

    # 6. The camera; one scene in nine ends at the edge of the satellite's strip.
    photo = np.asarray(photo.filter(ImageFilter.GaussianBlur(1.2)).reduce(2))  # (H, W, 3)
    light = 1 + 0.04 * noise(3) + 0.03 * noise(90, 180)
    photo = photo * light[..., None] + rng.normal(0, 2.5, photo.shape)
    labels = np.array(labels)[::2, ::2]
    if rng.random() < 1 / 9:
        labels[:, : rng.integers(10, 60)] = no_data
    return Image.fromarray(np.clip(photo, 0, 255).astype(np.uint8)), labels


if __name__ == "__main__":
    make_demo(Path(__file__).resolve().parent / "demo")
