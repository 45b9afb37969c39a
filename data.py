"""The data: find or download it, split it, click on it, cut training crops from it.

    find_samples ─► split ─► training: photograph + clicks ─► pixels (4, h, w) ─► Crops ─► batches
                      │                            ▲
                      │        sample_points (simulated) or read_clicks (your own)
                      ▼
                   held out: scored on a label map (H, W), of a mask or of clicks

Dataset: "Semantic segmentation of aerial imagery", Humans in the Loop and Mohammed Bin Rashid Space
Centre, CC0: 72 satellite images of Dubai, `Tile 1..8/images/image_part_001..009.jpg` and masks.

*Clicks* are always a tensor (P, 3) of x, y, class, in pixels of the upright photograph.
A *label map* is an integer tensor (H, W): the class where labelled, IGNORE_INDEX elsewhere.
Letters in shapes: H, W original size; h, w size after scaling; S side of a training crop.

The method comes first: split, click, crop. Then come the files: where the photographs are, what the
colours of masks mean, and how clicks are read from a table.
"""

import contextlib
import csv
import fnmatch
import glob
import io
import os
import tempfile
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor

from unet import (
    IGNORE_INDEX,
    IMAGE_TYPES,
    UserError,
    geo_tags,
    open_image,
    reason,
    transparent,
    upright,
    world_file,
)

CLASSES = ("Building", "Land", "Road", "Vegetation", "Water")
PALETTE = ((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41))
NO_LABEL = ((155, 155, 155), (0, 0, 0))  # Dubai's Unlabeled, and black: 0.6 % of the pixels
KAGGLE_NAME = "humansintheloop/semantic-segmentation-of-aerial-imagery"
FOLDER = "Semantic segmentation dataset"  # what the archive unzips to
NUMBERS = {"x", "y", "map_x", "map_y", "width", "height"}  # columns of a file of clicks


# ---- The method: split, click, crop ----


@dataclass(eq=False)
class Sample:
    """One photograph and what is known about it."""

    name: str  # its path below --data, as in clicks.csv
    image: Path
    mask: Path | None
    clicks: Tensor = None  # (P, 3) x, y, class; None before anyone has clicked
    pixels: Tensor = None  # (4, h, w) uint8: R, G, B and label, padded to S×S at least
    area: int = 0  # h · w without that padding


def split(samples, pattern, clicked):
    """(training, held-out) samples. With own clicks, images without any label are in neither.

    Held out are the images that match `pattern`: a path, a folder or a glob. Without one: those
    with a mask but no clicks or, if nothing was clicked, the last two of every folder.
    """
    if pattern:
        folder = pattern.removesuffix("*").rstrip("/")  # compared literally: "[2021]" is a name
        held_out = []
        for sample in samples:
            inside = sample.name == folder or sample.name.startswith(f"{folder}/")
            if inside or fnmatch.fnmatchcase(sample.name, pattern):
                held_out.append(sample)
        if len(held_out) in (0, len(samples)):
            raise UserError(
                f"--hold-out {pattern} matches {len(held_out)} of {len(samples)} images, such as "
                f"{samples[0].name}; it must match some, and leave some to train on"
            )
    elif clicked:
        held_out = [sample for sample in samples if sample.mask and sample.clicks is None]
    else:
        held_out, folders = [], defaultdict(list)
        for sample in samples:
            folders[sample.image.parent].append(sample)
        for folder in folders.values():
            held_out += folder[1:][-2:]  # never the first: something must be left to train on

    training = [sample for sample in samples if sample not in held_out]
    if clicked:
        training = [sample for sample in training if sample.clicks is not None]
        held_out = [sample for sample in held_out if sample.mask or sample.clicks is not None]
    for sample in training + held_out:
        if not sample.mask and sample.clicks is None:
            raise UserError(
                f"{sample.image} has no mask; expected at the same path with masks for images, or "
                "below --masks DIR. Or click on it and give --clicks FILE"
            )
    # Drop what is not used, so that nobody can use it by mistake later.
    for sample in training:
        if sample.clicks is not None:
            sample.mask = None
    for sample in held_out:
        if sample.mask:
            sample.clicks = None
    return training, held_out


def sample_points(mask, n, generator=None):
    """The simulated annotator: n labelled pixels of a label map (H, W) as clicks (n, 3).

    Every set of n is equally likely. If fewer than n are labelled, all of them. In row order.
    (Bearman et al. 2016, arXiv:1506.02106, click on objects. Here no objects are needed.)
    """
    y, x = (mask != IGNORE_INDEX).nonzero(as_tuple=True)  # (M,) each
    chosen = torch.randperm(len(y), generator=generator)[:n].sort().values  # (n,)
    y, x = y[chosen], x[chosen]
    return torch.stack([x, y, mask[y, x].long()], dim=1)


def paint(clicks, size, shape):
    """Clicks (P, 3) on a photograph of size (W, H) → label map (h, w) uint8.

    Each goes to the cell that covers its pixel. If two share a cell, the later one wins. Resizing a
    label map like an image would lose three of four clicks at scale 0.5, or move them.
    """
    (W, H), (h, w) = size, shape
    x, y, c = clicks.numpy().T  # (P,) each; NumPy promises that the last of equal indices wins
    label_map = np.full((h, w), IGNORE_INDEX, np.uint8)
    # The centre of the pixel, (x + 0.5) · w / W, in whole numbers.
    label_map[(2 * y + 1) * h // (2 * H), (2 * x + 1) * w // (2 * W)] = c
    return torch.from_numpy(label_map)


class Crops(torch.utils.data.Dataset):
    """Item i is a square around a random label of image i, rotated and flipped: (4, S, S) uint8."""

    def __init__(self, samples, size):
        self.size = size
        self.pixels = [sample.pixels for sample in samples]
        self.labelled = []  # where the labels of each image are: y · w + x, (L,)
        for pixels in self.pixels:
            where = (pixels[3].flatten() != IGNORE_INDEX).nonzero()[:, 0]
            self.labelled.append(where.int())  # half of int64, which matters for dense masks

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        S, pixels, labelled = self.size, self.pixels[i], self.labelled[i]
        _, h, w = pixels.shape
        # Pick a label, so that no crop is empty, then a window that contains it.
        y, x = divmod(int(labelled[draw(0, len(labelled) - 1)]), w)
        top = draw(max(0, y - S + 1), min(y, h - S))
        left = draw(max(0, x - S + 1), min(x, w - S))
        crop = pixels[:, top : top + S, left : left + S]  # (4, S, S)
        # Augmentation: seen from above, no direction is special. (Colours would be crop[:3].)
        if draw(0, 1):
            crop = crop.flip(2)
        return crop.rot90(draw(0, 3), (1, 2))


def draw(low, high):
    """A random whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


# ---- Finding the photographs and their masks ----


def find_dataset(folder):
    """The folder of the photographs; by default `data`, filled from Kaggle if it is empty."""
    root = Path(folder or "data").absolute()
    # An empty folder that the user named is a mistake: nothing is downloaded into it.
    if folder is None and not list_images(root):
        fetch(root)
    inner = root / FOLDER
    return inner if inner.is_dir() else root


def fetch(root):
    """Download Kaggle's archive and unzip it to `root/FOLDER`, all of it or nothing."""
    for archive in root.glob("*.zip"):  # as a browser leaves it
        raise UserError(f"no image in {root}, but {archive}: unzip that there")
    print(f"no image in {root}: downloading {KAGGLE_NAME} (32 MB) from Kaggle")
    if Path("kaggle.json").is_file():  # a token in the working directory counts, too
        os.environ.setdefault("KAGGLE_CONFIG_DIR", os.getcwd())
    noise = io.StringIO()  # without a token, `import kaggle` prints a long help text
    try:
        root.mkdir(parents=True, exist_ok=True)
        # An interrupted download must not look like a dataset: unpack elsewhere, then rename.
        with tempfile.TemporaryDirectory(prefix=".partial", dir=root) as temporary:
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                import kaggle  # here, because nothing else needs a network

                kaggle.api.dataset_download_files(KAGGLE_NAME, path=temporary, unzip=True)
            Path(temporary, FOLDER).rename(root / FOLDER)
    except (Exception, SystemExit) as error:  # older clients exit where there is no token
        raise UserError(
            f"the download failed ({reason(error)}). By hand: unzip the archive of "
            f"kaggle.com/datasets/{KAGGLE_NAME} into {root}. With an account: set KAGGLE_API_TOKEN "
            "or write ~/.kaggle/access_token (or the legacy kaggle.json). Without: try --demo"
        ) from error


def list_images(root):
    """All images below a folder, following links; not hidden ones, not those of a run."""
    images = {}  # by their real path: a link can lead back up
    # Short paths first: of two paths to an image, the more direct one is kept.
    for name in sorted(glob.glob("**/*.*", root_dir=root, recursive=True), key=len):
        path = root / name
        if path.suffix.lower() not in IMAGE_TYPES or "/@" in f"/{name}" or path.is_dir():
            continue  # a NAS hides its own pictures in @eaDir
        # The predictions.png of a run is no photograph.
        of_run = path.with_name("config.json").exists() and path.with_name("metrics.csv").exists()
        if of_run and path.parent != root:
            print(f"note      {path.parent} is the folder of a run: passed over")
        else:
            images.setdefault(path.resolve(), path)
    return sorted(images.values())


def find_samples(root, masks=None):
    """Every photograph below `root` with its mask, or None, as Samples.

    A mask has the path of its photograph, whatever the suffix and capitals: below the folder
    `masks` if that is given, else with "masks" for "images", or in `masks/` beside the photograph.
    """
    images = list_images(root)
    # Name what is skipped: it may be of a type that is not in IMAGE_TYPES.
    others = []
    for folder in {path.parent for path in images}:
        others += [f for f in folder.glob("[!.]*.*") if f.suffix.lower() not in IMAGE_TYPES]
    if others:
        print(f"note      passed over {len(others)} other files, such as {min(others)}")

    # Masks first; the rest are photographs.
    mask_of = {}  # pair_key: mask
    for path in list_images(Path(masks)) if masks else images:
        if masks or "masks" in fold(path.relative_to(root).parent):
            key = pair_key(path, masks or root)
            if key in mask_of:
                raise UserError(f"{mask_of[key]} and {path} are masks of one image; remove one")
            mask_of[key] = path

    samples = []
    for path in sorted(set(images) - set(mask_of.values())):
        beside = path.parent / "masks" / path.name
        mask = mask_of.pop(pair_key(path, root), None) or mask_of.pop(pair_key(beside, root), None)
        samples.append(Sample(path.relative_to(root).as_posix(), path, mask))
    for mask in mask_of.values():  # harmless
        print(f"note      {mask} fits no image: a mask has its image's path and name")
    if not samples:
        raise UserError(f"no image in --data {root}, none of {', '.join(sorted(IMAGE_TYPES))}")
    return samples


def pair_key(path, folder):
    """The same key for a photograph and its mask."""
    return fold(path.relative_to(folder).with_suffix("")).replace("masks", "images")


def fold(path):
    """A path or name to compare, without case and the two Unicode spellings of é."""
    return unicodedata.normalize("NFC", Path(path).as_posix()).lower()


# ---- Data of your own: what masks hold, and clicks from a file ----


class Classes:
    """Maps mask values to classes, by rows of (name, RGB colour or number).

    A row without a name means no label. Colours without a row are counted in `strays`.
    """

    def __init__(self, rows):
        self.rows = rows
        self.by_number = isinstance(rows[0][1], int)
        self.names, self.palette = [], []
        self.index = {}  # what a file of clicks calls a class → class
        self.known = np.zeros(2**24, bool)  # colours 0xRRGGBB
        self.table = np.full(2**24, IGNORE_INDEX, np.uint8)  # colour → class
        self.strays = Counter()
        self.turned = 0  # masks of photographs that are stored turned
        for name, value in rows:
            color = value * 0x010101 if self.by_number else int.from_bytes(bytes(value), "big")
            self.known[color] = True
            if name:
                c = self.table[color] = len(self.names)
                number = value if self.by_number else c
                self.index |= {str(number): c, f"{number}.0": c}  # pandas writes 2.0 beside gaps
                self.names.append(name)
                # Numbered classes need distinct colours in pictures.
                hue = f"hsv({c * 222 % 360},{100 - c % 3 * 30}%,{95 - c // 3 % 3 * 25}%)"
                self.palette.append(ImageColor.getrgb(hue) if self.by_number else value)
        # Names last: they win over numbers, so "2" is the class with the name 2.
        self.index |= {fold(name): c for c, name in enumerate(self.names)}

    def read_mask(self, path, photo):
        """A mask as label map (H, W) uint8, without a label where the photograph is transparent.

        Raises UserError if its size differs from the upright photograph's, or if over a tenth of
        its pixels have an unknown colour.
        """
        image = open_image(path)
        if image.size != photo.size:
            raise UserError(f"{path}: {image.size} pixels, its upright image {photo.size}")
        if self.by_number and (image.mode == "P" or image.mode == "1" and self.known[0x010101]):
            image = Image.fromarray(np.asarray(image).astype(np.uint8))  # indices, not colours
        # RGBA as one big-endian number, without its A.
        color = np.asarray(image.convert("RGBA")).view(">u4")[..., 0] >> 8  # (H, W) 0xRRGGBB
        stray = ~self.known[color]  # (H, W) bool
        values, counts = np.unique(color[stray], return_counts=True)
        found = Counter({f"#{v:06X}": n for v, n in zip(values, counts.tolist())})
        if stray.mean() > 0.1:
            raise UserError(
                f"{path}: {stray.mean():.0%} of the pixels have no class, {found.most_common(3)}; "
                "say what they are in a file for --classes, and save masks as PNG, not as JPEG"
            )
        # A few strays (blurred edges, a forgotten class) are reported and left unlabelled.
        self.strays += found
        self.turned += photo.info["turned"]
        label_map = torch.from_numpy(self.table[color])  # (H, W)
        label_map[transparent(photo)] = IGNORE_INDEX
        return label_map


def read_classes(path):
    """CSV `class,color` or `name,r,g,b`; without a file the five classes of Dubai."""
    if path is None:
        return Classes([*zip(CLASSES, PALETTE), *(("", color) for color in NO_LABEL)])
    rows = []
    for line, row in read_table(path, "class,color", "name,r,g,b"):
        with at_line(path, line):
            name = row.get("class", row.get("name"))
            color = row["color"] if "color" in row else f"rgb({row['r']},{row['g']},{row['b']})"
            value = int(color) if color.isdecimal() else ImageColor.getrgb(color)[:3]
            for other, its_value in rows:
                if value == its_value or fold(name) == fold(other) and name:
                    raise UserError(f"{name},{color} is taken")
            if np.max(value) > 255:
                raise UserError(f"{color} is above 255")
            rows.append((name, value))
    # Colours and numbers cannot be mixed in one file.
    if len({type(value) for _, value in rows}) != 1:
        raise UserError(f"{path}: give every class a colour, or every class a number")
    if not 2 <= sum(name != "" for name, _ in rows) < IGNORE_INDEX:
        raise UserError(f"{path}: give 2 to 254 classes")
    return Classes(rows)


def read_clicks(path, samples, classes):
    """Read clicks from a CSV file into the `clicks` of their samples.

    image: a path below --data, or a bare name if only one image has it; the suffix may differ
    x, y: pixels of the upright photograph from its top left; or map_x, map_y of its own system
    class: a name, its number in --classes, else its index
    width, height: where given, the size of the upright photograph
    """
    rows_of = defaultdict(list)  # by the name of the image: each is looked up and opened once
    for line, row in read_table(path, "image,x,y,class", "image,map_x,map_y,class"):
        rows_of[row["image"]].append((line, row))
    # Per sample: (y, x) → (line in the file, class).
    found = defaultdict(dict)
    for name, rows in rows_of.items():
        with at_line(path, rows[0][0]):
            sample = find_image(name, samples)
        photo = upright(sample.image)
        hidden = transparent(photo)  # (H, W)
        for line, row in rows:
            with at_line(path, line):
                pixel, c = read_click(row, sample, photo, classes)
                if hidden[pixel]:  # such as an orthomosaic's border
                    continue
                other, its_class = found[sample].setdefault(pixel, (line, c))
                if c != its_class:
                    raise UserError(f"this pixel has another class in line {other}")
    for sample, pixels in found.items():
        # In row order, as simulated clicks are: the same clicks give the same run.
        clicks = [(x, y, c) for (y, x), (_, c) in sorted(pixels.items())]
        sample.clicks = torch.tensor(clicks)  # (P, 3)


@contextlib.contextmanager
def at_line(path, line):
    """Prefix errors with the file and the line."""
    try:
        yield
    except (ValueError, KeyError) as error:  # also from float(…) and ImageColor
        raise UserError(f"{path}: line {line}: {error}") from error


def find_image(name, samples):
    """The one sample that a row refers to, by its path or the end of it; the suffix may differ."""
    path = Path(name.replace("\\", "/").lstrip("/"))
    whole, stem = fold(path), fold(path.with_suffix(""))
    # An exact path wins. The suffix counts least: people click on a PNG copy of a GeoTIFF.
    found = (
        [sample for sample in samples if sample.name == name]
        or [sample for sample in samples if fold(sample.image).endswith(f"/{whole}")]
        or [s for s in samples if fold(s.image.with_suffix("")).endswith((f"/{stem}", f"/{whole}"))]
    )
    if len(found) != 1:
        raise UserError(f"{len(found) or 'no'} images match {name}; give its path")
    return found[0]


def read_click(row, sample, photo, classes):
    """One row of a file of clicks: pixel (y, x) and class."""
    W, H = photo.size
    # Clicks made on a resized or rotated copy would land anywhere.
    size = [row.get("width", ""), row.get("height", "")]
    if any(size) and tuple(map(float, size)) != photo.size:
        raise UserError(f"made on {'×'.join(size)} pixels, {sample.name} has {W}×{H}")
    if "x" in row:
        x, y = float(row["x"]), float(row["y"])
    elif photo.info["turned"]:
        raise UserError(f"{sample.image} is stored turned; give x, y in pixels")
    else:
        x, y = map_to_pixel(sample.image, float(row["map_x"]), float(row["map_y"]))
    # The pixel is the whole part. On the far edge it is the last one.
    if not (0 <= x <= W and 0 <= y <= H):
        raise UserError(f"({x:g}, {y:g}) is outside the {W}×{H} pixels of {sample.name}")
    name = fold(row["class"])
    if name not in classes.index:
        raise UserError(f"class {row['class']!r} is none of {', '.join(classes.names)}")
    return (min(int(y), H - 1), min(int(x), W - 1)), classes.index[name]


def map_to_pixel(path, map_x, map_y):
    """Map coordinates → pixel coordinates (x, y) of a photograph, from its top left.

    (map_x, map_y) = A (x, y) + b, with A and b of the GeoTIFF tags (OGC 19-008r4) or a world file.
    """
    tags, world = geo_tags(path), world_file(path)
    # Key 1025 with value 2 says PixelIsPoint: coordinates are those of pixel centres.
    from_centre = " 1025, 0, 1, 2" in str(tags.get(34735))
    if 34264 in tags:  # a 4×4 matrix
        a, b, _, c, d, e, _, f = tags[34264][:8]
    elif 33550 in tags:  # the size of a pixel, and a tie point
        i, j, _, x, y, _ = tags[33922][:6]  # pixel (i, j) lies at (x, y)
        a, e, _ = tags[33550]
        b, d, e = 0, 0, -e  # north is up
        c, f = x - a * i, y - e * j
    elif world:
        a, d, b, e, c, f = map(float, world.read_text().split())
        from_centre = True  # as specified
    else:
        raise UserError(f"{path} has no GeoTIFF tags and no world file; give x, y in pixels")
    x, y = np.linalg.solve([[a, b], [d, e]], [map_x - c, map_y - f])
    return x + from_centre / 2, y + from_centre / 2  # the centre of the first pixel is 0.5


def read_table(path, *headers):
    """Yield the rows of a CSV file that hold anything: (line in an editor, values by column).

    Comma, semicolon or tab; UTF-8 or UTF-16; the case of the header does not matter. Raises
    UserError if columns are missing or a row is ambiguous.
    """
    content = Path(path).read_bytes()
    # Excel's "Unicode text" is UTF-16 with a byte-order mark; -sig skips the mark of UTF-8.
    encoding = "utf-16" if content[:1] in b"\xff\xfe" else "utf-8-sig"
    try:
        text = unicodedata.normalize("NFC", content.decode(encoding))
        first = text.partition("\n")[0]
        named = first.startswith("sep=")  # Excel writes the delimiter above the header
        delimiter = first[4:5] or "," if named else max(",;\t", key=first.count)
        csv.field_size_limit(len(text) + 1)  # notes can be long
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True
        )
        table = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}; save it as CSV UTF-8") from error
    # csv would silently swallow the rest of the file.
    if text.count('"') % 2:
        raise UserError(f"{path}: a quote is never closed")
    (_, header), *table = table[named:] or [(1, [])]
    header = [name.lower() for name in header]
    if not any(set(names.split(",")) <= set(header) for names in headers):
        raise UserError(f"{path}: line 1 must have {' or '.join(headers)}")
    # QGIS adds X and Y to existing x and y: ambiguous.
    for name in header:
        if name and header.count(name) > 1:
            raise UserError(f"{path}: two columns are called {name} or {name.upper()}")
    for line, cells in table:
        row = dict(zip(header, cells + [""] * len(header)))  # short rows are filled up
        if any(cells[len(header) :]):
            raise UserError(f"{path}: line {line} has more cells than the header")
        # A decimal comma is fine where the comma is not the delimiter as well.
        for name in NUMBERS & row.keys():
            if "," in row[name] and delimiter == ",":
                raise UserError(f"{path}: line {line}: is the comma in {row[name]} decimal or not?")
            row[name] = row[name].replace(",", ".")
        if any(cells):
            yield line, row
