"""The data: find or fetch it, read it, split it, click on it, cut training crops from it.

    files on disk ─► find_pairs ─► read_image, read_mask ─► Sample ─► split ─► held-out samples
    or Kaggle, or    (paths)       (uint8, original size)     │
    demo scenes                                               ▼ training samples
                         batches ◄── shrink_points ◄── sample_points (the simulated annotator)
                      (crops, turned)  (training size)   or read_clicks (a real one's CSV file)

Dataset: "Semantic segmentation of aerial imagery", Humans in the Loop and Mohammed Bin Rashid Space
Centre, CC0: 72 satellite images of Dubai in 8 tiles, `Tile 1..8/images/image_part_001..009.jpg`,
each with a colour-coded mask of the same name in `masks/`.

Words: a *label map* is an integer tensor (H, W), the class where labelled, IGNORE_INDEX elsewhere.
Letters: H, W original size; h, w size after scaling; S side of a training crop; N batch.
"""

import contextlib
import csv
import hashlib
import io
import os
import shutil
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

CLASSES = ("Building", "Land", "Road", "Vegetation", "Water")
PALETTE = ((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41))
UNLABELED = (155, 155, 155)  # the dataset's sixth colour: an annotator's "none of these"
NO_DATA = (0, 0, 0)  # 0.6 % of the pixels, 17 % of one mask: in no class list, so unlabelled too
IGNORE_INDEX = 255

KAGGLE_NAME = "humansintheloop/semantic-segmentation-of-aerial-imagery"
FOLDER = "Semantic segmentation dataset"  # what the archive unzips to
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}


@dataclass(eq=False)
class Sample:
    """One photograph. `name` is its path in the dataset folder, `tile` the folder it lies in."""

    name: str
    tile: str
    image: Image.Image  # RGB, W × H
    mask: Tensor | None  # (H, W) uint8 label map; None where there is no mask


# ---- find or fetch ----


def find_dataset(folder: str, demo: bool = False, download: bool = True) -> Path:
    """The folder with the images: `folder` itself, or FOLDER in it.

    Where it has no image yet, demo scenes are drawn or the dataset is downloaded into it. Raises
    OSError if there are none and none can be had.
    """
    root = Path(folder)
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"--data {folder} is a file; give the folder with the images")
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    if not image_files(root):
        if demo:
            make_demo(root)
        elif download:
            fetch(root)
        else:
            raise FileNotFoundError(f"there is no image in --data {folder}")
        root = root / FOLDER
    return root


def image_files(root: Path) -> list[Path]:
    """All images below `root`, sorted by name; those in folders called masks are left out."""
    folders = {path: path.relative_to(root).parts[:-1] for path in all_files(root)}
    return [path for path, parts in folders.items() if "masks" not in map(str.lower, parts)]


def all_files(root: Path) -> list[Path]:
    """Everything below `root` that is an image by its suffix, hidden files left out, sorted."""
    return sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in IMAGE_TYPES
        and not any(part[0] == "." for part in path.relative_to(root).parts)
    )


def fetch(root: Path) -> None:
    """Download the dataset from Kaggle and unzip it to `root/FOLDER`, all 72 pairs or nothing."""
    print(f"no images in {root}: downloading {KAGGLE_NAME} (32 MB) from Kaggle to {root / FOLDER}")
    if Path("kaggle.json").is_file():  # a token in the working directory counts too
        os.environ.setdefault("KAGGLE_CONFIG_DIR", os.getcwd())
    noise = io.StringIO()  # without a token, `import kaggle` logs in, fails and prints a long text
    try:
        with staging(root) as partial:
            if shutil.disk_usage(root).free < 200e6:
                raise OSError(f"less than 200 MB of room in {root}")
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                import kaggle  # here, because only this function may need a network

                kaggle.api.dataset_download_files(KAGGLE_NAME, path=partial)
            with zipfile.ZipFile(partial / f"{KAGGLE_NAME.split('/')[1]}.zip") as archive:
                archive.extractall(partial)  # drops "..", drive letters and leading slashes
            pairs = [mask for _, mask in find_pairs(partial / FOLDER) if mask]
            if len(pairs) != 72:
                raise ValueError(f"the archive holds {len(pairs)} image/mask pairs, not 72")
    except (Exception, SystemExit) as error:  # old kaggle clients exit where there is no token
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        reason = "no connection" if "Max retries" in reason else reason
        raise OSError(
            f"the download from Kaggle failed ({reason}). Get the archive by hand at "
            f"kaggle.com/datasets/{KAGGLE_NAME} and unzip it into {root}; or, if Kaggle asks for "
            "an account, put its API token kaggle.json here or into ~/.kaggle; or try --demo, "
            "which needs nothing"
        ) from error


@contextlib.contextmanager
def staging(root: Path):
    """A folder to write FOLDER in, which moves to `root/FOLDER` only if the block succeeds."""
    partial = root / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / FOLDER).rename(root / FOLDER)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_pairs(root: Path) -> list[tuple[Path, Path | None]]:
    """Every image below `root` with its mask, or None: `a/images/b.jpg` goes with `a/masks/b.png`.

    An image that lies in no `images` folder goes with the `masks` folder beside it. Raises
    ValueError for a mask without an image.
    """
    masks: dict[tuple[Path, str], Path] = {}  # (folder that holds `masks`, stem) → mask
    for mask in all_files(root):
        if mask.parent.name.lower() == "masks":
            other = masks.setdefault((mask.parent.parent, mask.stem), mask)
            if other != mask:
                raise ValueError(f"{other} and {mask} are masks of the same image; remove one")
    pairs = []
    for image in image_files(root):
        folder = image.parent.parent if image.parent.name.lower() == "images" else image.parent
        pairs.append((image, masks.get((folder, image.stem))))
    orphans = set(masks.values()) - {mask for _, mask in pairs}
    if orphans:
        raise ValueError(
            f"{min(orphans)} has no image of the same name; add the image or remove the mask"
        )
    return pairs


# ---- read ----


def read_image(path: Path, only_size: bool = False):
    """Any image file as 8-bit RGB, or only its (W, H). Raises ValueError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode[0] in "IF":  # "I;16", "F": Pillow would clip, not scale
                    raise ValueError(f"{image.mode} pixels; convert it to 8 bits per channel")
                if image.getexif().get(0x0112, 1) != 1:  # some programs turn it, others do not
                    raise ValueError("stored turned, by its EXIF orientation; save it upright")
                return image.size if only_size else image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
        raise ValueError(f"{path} has more than {limit}, Pillow's limit; cut it up") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except Exception as error:  # Pillow's decoders meet broken files with many kinds of exception
        reason = (str(error) or type(error).__name__).replace(str(path), "the file").splitlines()[0]
        raise ValueError(f"{path} cannot be used as an image ({reason})") from error


def read_mask(path: Path, palette) -> Tensor:
    """A colour-coded mask (RGB, palette or RGBA) as label map (H, W) uint8.

    Unlabeled, black and stray colours become IGNORE_INDEX. Raises ValueError where more than a
    tenth of the pixels is in none of the palette's colours: those are another dataset's masks.
    """
    rgb = np.asarray(read_image(path)).astype(np.int32)  # (H, W, 3)
    code = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]  # (H, W)
    label_map = np.full(code.shape, IGNORE_INDEX, np.uint8)
    known = np.zeros(code.shape, bool)
    for index, (r, g, b) in [
        *enumerate(palette),
        (IGNORE_INDEX, UNLABELED),
        (IGNORE_INDEX, NO_DATA),
    ]:
        here = (code == (r << 16 | g << 8 | b)) & ~known
        label_map[here] = index
        known |= here
    if known.mean() < 0.9:
        raise ValueError(
            f"{path}: {1 - known.mean():.0%} of the pixels have a colour that stands for no class; "
            "the palette is in data.py, your own goes into a file for --classes"
        )
    return torch.from_numpy(label_map)


def read_sample(root: Path, image_path: Path, mask_path: Path | None, palette) -> Sample:
    """Read one image and its mask. Raises ValueError where their sizes differ."""
    image = read_image(image_path)
    mask = None if mask_path is None else read_mask(mask_path, palette)
    if mask is not None and tuple(mask.shape) != (image.height, image.width):
        sizes = f"{mask.shape[1]}×{mask.shape[0]} pixels, its image {image.width}×{image.height}"
        raise ValueError(f"{mask_path} has {sizes}; they must be the same")
    tile = image_path.parent.relative_to(root).as_posix()
    return Sample(image_path.relative_to(root).as_posix(), tile, image, mask)


# ---- split ----


def read_dataset(root: Path, palette, clicks: dict[str, Tensor] | None = None):
    """Read the images and hold some out: (training samples, held-out samples, names left out).

    Without clicks of your own, every image needs a mask, and the last two images of every folder
    are held out (of a folder with fewer than three, all but the first). With clicks, the clicked
    images are for training, and those with a mask and no click are held out. Raises ValueError
    where a file is missing, broken or does not fit its partner.
    """
    pairs = find_pairs(root)
    folders: dict[Path, list[Path]] = {}
    for image, _ in pairs:
        folders.setdefault(image.parent, []).append(image)
    last_two = {image for images in folders.values() for image in images[1:][-2:]}
    training, held_out, left_out = [], [], []
    for image, mask in pairs:
        name = image.relative_to(root).as_posix()
        if clicks is None:
            if mask is None:
                raise ValueError(f"{image} has no mask of the same name in a masks folder")
            (held_out if image in last_two else training).append((image, mask))
        elif name in clicks:
            training.append((image, None))  # its mask, if it has one, is not for training on
        elif mask:
            held_out.append((image, mask))
        else:
            left_out.append(name)

    def read(pairs):
        return [read_sample(root, image, mask, palette) for image, mask in pairs]

    return read(training), read(held_out), left_out


# ---- click ----


def sample_points(mask: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """The simulated annotator: keep n labelled pixels of a label map, forget the others.

    Every set of n distinct labelled pixels is equally likely. (Bearman et al. 2016,
    arXiv:1506.02106, click on objects; uniform clicks need no one to know what an object is.)

    mask (H, W) any integer type, IGNORE_INDEX = unlabelled → label map of the same shape and type
    with exactly n labelled pixels, or all of them where there are fewer.
    """
    labelled = (mask.flatten() != IGNORE_INDEX).nonzero()[:, 0]  # (M,)
    chosen = labelled.new_empty(0)
    while len(chosen) < min(n, len(labelled)):  # draw as many as are missing, drop the doubles
        draw = torch.randint(
            len(labelled), (min(n, len(labelled)) - len(chosen),), generator=generator
        )
        chosen = torch.cat([chosen, draw]).unique()
    points = torch.full_like(mask, IGNORE_INDEX).flatten()
    points[labelled[chosen]] = mask.flatten()[labelled[chosen]]
    return points.view_as(mask)


def generator_for(*what) -> torch.Generator:
    """A random generator that depends on its arguments alone, not on what was drawn before."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def read_clicks(path: str, root: Path, classes: list[str]) -> dict[str, Tensor]:
    """Someone's own clicks: CSV `image,x,y,class` → label map (H, W) uint8 per clicked image.

    image: path relative to `root`; x, y: pixels of that image from its top-left corner, (0, 0) is
    the top-left pixel; class: a name or an index. Raises ValueError with the number of the line.
    """
    images = {image.relative_to(root).as_posix() for image in image_files(root)}
    label_maps: dict[str, Tensor] = {}
    seen_on: dict[tuple, int] = {}  # (image, x, y) → line
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets add a BOM
            reader = csv.DictReader(file)
            header = [name.strip() for name in reader.fieldnames or []]
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--clicks {path} is not a CSV file in UTF-8 ({error})") from None
    missing = [name for name in ("image", "x", "y", "class") if name not in header]
    if missing:
        raise ValueError(
            f"{path}, line 1: no column {', '.join(missing)}; the line must be image,x,y,class"
        )
    for line, row in rows:
        where = f"{path}, line {line}"
        if None in row.values() or None in row:
            raise ValueError(f"{where}: {len(header)} values expected, as in the first line")
        values = {key.strip(): value.strip() for key, value in row.items()}
        name, x, y, label = (values[key] for key in ("image", "x", "y", "class"))
        name = Path(name.replace("\\", "/")).as_posix()
        if name not in images:
            raise ValueError(f"{where}: there is no image {name} in {root}")
        if name not in label_maps:
            W, H = read_image(root / name, only_size=True)
            label_maps[name] = torch.full((H, W), IGNORE_INDEX, dtype=torch.uint8)
        H, W = label_maps[name].shape
        try:  # decimals, as labelling tools write them, fall into the pixel that they lie in
            x, y = int(float(x) // 1), int(float(y) // 1)
        except (ValueError, OverflowError):
            raise ValueError(f"{where}: x and y must be numbers, got {x!r} and {y!r}") from None
        if not (0 <= x < W and 0 <= y < H):
            raise ValueError(f"{where}: ({x}, {y}) lies outside {name}, {W}×{H} pixels")
        if label in classes:
            c = classes.index(label)
        elif label.isdecimal() and int(label) < len(classes):
            c = int(label)
        else:
            names = ", ".join(classes)
            raise ValueError(f"{where}: unknown class {label!r}; known are {names}, or their index")
        if label_maps[name][y, x] not in (IGNORE_INDEX, c):
            other = f"line {seen_on[name, x, y]}"
            raise ValueError(f"{where}: pixel ({x}, {y}) of {name} has another class in {other}")
        label_maps[name][y, x] = c
        seen_on.setdefault((name, x, y), line)
    if not label_maps:
        raise ValueError(f"--clicks {path} holds no clicks")
    return label_maps


def write_clicks(path: Path, label_maps: dict[str, Tensor], classes: list[str]) -> None:
    """Write label maps as the CSV file that `read_clicks` reads."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "x", "y", "class"])
        for name, label_map in label_maps.items():
            for y, x in (label_map != IGNORE_INDEX).nonzero().tolist():
                writer.writerow([name, x, y, classes[label_map[y, x]]])


def read_classes(path: str) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Your own classes: CSV `class,color` with colours like #3C1098 → (names, palette)."""
    names, palette = [], []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--classes {path} is not a CSV file in UTF-8 ({error})") from None
    if not rows or rows[0][1] != ["class", "color"]:
        raise ValueError(f"{path}, line 1: the first line must be class,color")
    for line, row in rows[1:]:
        name, color = row if len(row) == 2 else ("", "")
        digits = color.removeprefix("#")
        if not name or len(digits) != 6 or set(digits) - set("0123456789abcdefABCDEF"):
            raise ValueError(
                f"{path}, line {line}: expected a class and a colour: Building,#3C1098"
            )
        rgb = tuple(bytes.fromhex(digits))
        if name in names or rgb in palette:
            raise ValueError(f"{path}, line {line}: this name or colour is taken")
        if rgb in (UNLABELED, NO_DATA):
            raise ValueError(f"{path}, line {line}: {color} marks pixels without a label in masks")
        names.append(name)
        palette.append(rgb)
    if not 2 <= len(names) < IGNORE_INDEX:
        raise ValueError(f"--classes {path}: 2 to {IGNORE_INDEX - 1} classes, got {len(names)}")
    return names, palette


# ---- to the training size ----


def shrink(image: Image.Image, scale: float, smallest: int = 32) -> Image.Image:
    """The image at `scale`, no side shorter than `smallest`; as `UNet.predict` resizes it."""
    w, h = (max(smallest, round(side * scale)) for side in image.size)
    return image.resize((w, h), Image.Resampling.BILINEAR)


def shrink_mask(mask: Tensor, h: int, w: int) -> Tensor:
    """Nearest neighbour: label map (H, W) → (h, w)."""
    H, W = mask.shape
    rows = (torch.arange(h) * 2 + 1) * H // (2 * h)  # the pixel under each centre
    columns = (torch.arange(w) * 2 + 1) * W // (2 * w)
    return mask[rows[:, None], columns]


def shrink_points(points: Tensor, h: int, w: int) -> Tensor:
    """Carry every click to the size (h, w): label map (H, W) → (h, w), as many labelled pixels.

    A click moves to the pixel that covers it; of two that meet there, the second takes a free one
    beside it. Resizing the label map at scale 0.5 would lose three of four, overwriting a few.
    """
    H, W = points.shape
    small = torch.full((h, w), IGNORE_INDEX, dtype=points.dtype)
    y, x = (points != IGNORE_INDEX).nonzero(as_tuple=True)  # (P,) each
    if len(y) > h * w:
        raise ValueError(f"{len(y)} clicks do not fit on {w}×{h} pixels; raise --scale")
    Y, X = (2 * y + 1) * h // (2 * H), (2 * x + 1) * w // (2 * W)
    grid = small.numpy()  # shares the memory of `small`
    for row, column, c in zip(Y.tolist(), X.tolist(), points[y, x].tolist()):
        radius = 0
        while grid[row, column] != IGNORE_INDEX:
            radius += 1
            top, left = max(0, row - radius), max(0, column - radius)
            window = grid[top : row + radius + 1, left : column + radius + 1]
            free = np.argwhere(window == IGNORE_INDEX) + (top, left)
            if len(free):
                row, column = free[((free - (row, column)) ** 2).sum(1).argmin()]
        grid[row, column] = c
    return small


# ---- training crops ----


class Crops:
    """Training crops of side S of one image, each around one of its labelled pixels.

    Crops at one ground scale, not whole images squashed to a square: that would show the network
    the same house at sizes that differ four times from tile to tile.
    """

    def __init__(self, image: Image.Image, label_map: Tensor, scale: float, S: int, dense: bool):
        pixels = np.asarray(shrink(image, scale))  # (h, w, 3)
        self.size, self.S, self.dense = pixels.shape[:2], S, dense
        h, w = self.size
        self.pad = ((0, max(0, S - h)), (0, max(0, S - w)))  # smaller than a crop: mirror it
        self.image = torch.from_numpy(np.pad(pixels, (*self.pad, (0, 0)), mode="symmetric"))
        self.label(label_map)

    def label(self, label_map: Tensor) -> None:
        """Take the labels from a label map (H, W) at the original size."""
        labels = (shrink_mask if self.dense else shrink_points)(label_map, *self.size).numpy()
        self.labels = torch.from_numpy(np.pad(labels, self.pad, constant_values=IGNORE_INDEX))
        self.labelled = (self.labels != IGNORE_INDEX).nonzero().int()  # (P, 2)

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One crop, turned and mirrored at random: image (3, S, S) uint8, label map (S, S)."""
        h, w = self.labels.shape
        y, x = self.labelled[randint(0, len(self.labelled), generator)].tolist()
        S = self.S
        top = randint(max(0, y - S + 1), min(y, h - S) + 1, generator)
        left = randint(max(0, x - S + 1), min(x, w - S) + 1, generator)
        window = (slice(top, top + S), slice(left, left + S))
        turns, mirrored = randint(0, 4, generator), randint(0, 2, generator)
        image, labels = turn(self.image[window], self.labels[window], turns, bool(mirrored))
        return image.permute(2, 0, 1), labels


def turn(image: Tensor, labels: Tensor, turns: int, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Quarter turns and mirroring move pixels and never mix them, so clicks stay exact.

    image (S, S, 3), labels (S, S) → the same shapes. From above, no direction is special.
    """
    if mirrored:
        image, labels = image.flip(1), labels.flip(1)
    return image.rot90(turns, (0, 1)), labels.rot90(turns, (0, 1))


def randint(low: int, high: int, generator: torch.Generator) -> int:
    """An integer in low … high − 1."""
    return int(torch.randint(low, high, (), generator=generator))


# ---- demo scenes ----

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
    """Write synthetic aerial scenes to `root/FOLDER`, with the layout and the quirks of Dubai's."""
    print(f"drawing demo scenes into {root / FOLDER}")
    with staging(root) as partial:
        for t, (tile, (size, grid, water, green, built)) in enumerate(DEMO_TILES.items()):
            folder = partial / FOLDER / tile
            (folder / "images").mkdir(parents=True)
            (folder / "masks").mkdir()
            for part in range(1, DEMO_IMAGES + 1):
                rng = np.random.default_rng([t, part])
                photo, labels = draw_scene(rng, size, grid, water, green, built)
                colors = np.array([*PALETTE, UNLABELED, NO_DATA], np.uint8)
                mask = Image.fromarray(colors[labels])
                if tile == "Tile 2":
                    mask = mask.quantize(16, dither=Image.Dither.NONE)
                name = f"image_part_{part:03d}"
                photo.save(folder / "images" / f"{name}.jpg", quality=92)
                mask.save(folder / "masks" / f"{name}.png")


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
