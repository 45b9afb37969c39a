"""The data, from files to tensors and back: find it, split it, click on it, cut crops from it.

    find_samples ─► split ─► training: photograph + clicks ─► pixels (4, h, w) ─► Crops ─► batches
                      │                            ▲
                      │        sample_points (simulated) or read_clicks (your clicks)
                      ▼
                   held out: scored on a label map (H, W), of a mask or of clicks

Dataset: "Semantic segmentation of aerial imagery", Humans in the Loop and Mohammed Bin Rashid Space
Centre, CC0: 72 satellite images of Dubai, `Tile 1..8/images/image_part_001..009.jpg` and masks.

*Clicks* are always a tensor (P, 3) of x, y, class, in pixels of the upright photograph.
A *label map* is an integer tensor (H, W): the class where labelled, IGNORE_INDEX elsewhere.
Letters in shapes: H, W original size; h, w size after scaling; S side of a training crop.

The method comes first: split, click, paint, crop. What follows opens other people's files:
photographs, folders, masks, and tables of clicks.
"""

import csv
import fnmatch
import glob
import hashlib
import io
import os
import tempfile
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageOps, TiffImagePlugin
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

CLASSES = ("Building", "Land", "Road", "Vegetation", "Water")
PALETTE = ((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41))
NO_LABEL = [("", (155, 155, 155)), ("", (0, 0, 0))]  # "Unlabeled", and stray black
IGNORE_INDEX = 255  # in label maps: no label; in class maps: transparent


@dataclass(eq=False)  # two are equal only if they are the same object
class Sample:
    """One photograph and what is known about it."""

    name: str  # its path below --data, as in clicks.csv
    image: Path
    mask: Path | None
    clicks: Tensor = None  # (P, 3) x, y, class; None before anyone has clicked
    pixels: Tensor = None  # (4, h, w) uint8: R, G, B and label, padded to S×S at least
    area: int = 0  # h · w without that padding


def split(samples, pattern, clicked):
    """(training, held-out) samples. If `clicked`, only those with clicks are trained on.

    Held out are the images that match `pattern`: a path, a folder or a glob. Without one: those
    with a mask but no clicks or, if nothing was clicked, the last two of every folder.
    """
    if pattern:
        held_out = [sample for sample in samples if matches(sample.name, pattern)]
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
    # Clicked images lose their masks, and those scored on masks their clicks.
    for sample in training:
        if sample.clicks is not None:
            sample.mask = None
    for sample in held_out:
        if sample.mask:
            sample.clicks = None
    return training, held_out


def sample_points(mask, n, generator=None):
    """The simulated annotator: n labelled pixels of a label map (H, W) as clicks (n, 3).

    Every set of n is equally likely. All of them if fewer than n are labelled. In row order.
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


def prepare(sample, classes, points, seed, scale, size):
    """Give a training sample its pixels and, unless someone has clicked on it, simulated clicks."""
    photo = open_photo(sample.image)
    if sample.clicks is None:
        mask = classes.read_mask(sample.mask, photo)  # (H, W)
        generator = torch.Generator().manual_seed(seed_for(seed, sample.name))
        count = mask.numel() if points == "all" else points
        sample.clicks = sample_points(mask, count, generator)  # (P, 3)
    image = resize(photo, scale)  # (3, h, w) uint8
    _, h, w = image.shape
    labels = paint(sample.clicks, photo.size, (h, w))  # (h, w) uint8
    # Image and label are stacked, so that crops and flips act on both alike. Images smaller than a
    # crop are padded with white that has no label.
    pixels = torch.cat([image, labels[None]])  # (4, h, w)
    padding = (0, max(0, size - w), 0, max(0, size - h))  # right and below
    sample.pixels = F.pad(pixels, padding, value=IGNORE_INDEX)
    sample.area = h * w
    if points == "all":
        sample.clicks = sample.clicks[:0]  # they would take 24 bytes a pixel


def truth_map(sample, photo, classes):
    """The label map (H, W) to score a held-out photograph on: its mask, or else its clicks."""
    if sample.mask:
        return classes.read_mask(sample.mask, photo)
    return paint(sample.clicks, photo.size, (photo.height, photo.width))


class Crops(torch.utils.data.Dataset):
    """Item i is a random square of image i around a label, rotated and flipped: (4, S, S) uint8."""

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
        y, x = divmod(int(labelled[random_int(0, len(labelled) - 1)]), w)
        top = random_int(max(0, y - S + 1), min(y, h - S))
        left = random_int(max(0, x - S + 1), min(x, w - S))
        crop = pixels[:, top : top + S, left : left + S]  # (4, S, S)
        # Augmentation: seen from above, no direction is special. (Colours would be crop[:3].)
        if random_int(0, 1):
            crop = crop.flip(2)
        return crop.rot90(random_int(0, 3), (1, 2))


def random_int(low, high):
    """A random whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, ()))


def seed_for(seed, what, number=1):
    """A seed that depends on its arguments alone, not on what was drawn before."""
    digest = hashlib.sha256(repr((seed, what, number)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


# ---- If you read for the method, stop here. The rest opens other people's files. ----

IMAGE_TYPES = ".bmp .gif .jfif .jp2 .jpeg .jpg .png .tif .tiff .webp".split()  # noqa: SIM905
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "TIFF", "WEBP")  # whatever the suffix says
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)  # GeoTIFF: position and coordinate system
MARK = "unet.py"  # the tag Software of class maps, by which they are told from photographs
KAGGLE_NAME = "humansintheloop/semantic-segmentation-of-aerial-imagery"
FOLDER = "Semantic segmentation dataset"  # what the archive unzips to
NUMBERS = {"x", "y", "map_x", "map_y", "width", "height"}  # columns of a file of clicks
DUBAI = [*zip(CLASSES, PALETTE), *NO_LABEL]  # rows of Classes
CLICKS = ("image,x,y,class", "image,map_x,map_y,class")  # their headers
ROTATED = range(2, 9)  # EXIF orientations, all but 1
Image.MAX_IMAGE_PIXELS = None  # orthomosaics are large
# An internal mask of GDAL: a page of photometric interpretation 4, which Pillow does not know.
TiffImagePlugin.OPEN_INFO[TiffImagePlugin.II, 4, (1,), 1, (1,), ()] = ("1", "1")


class UserError(ValueError):
    """A user's mistake. The message names the file or the flag, and the remedy."""


@contextmanager
def whole_file(path):
    """Write a binary file that appears as `path` only once it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # no space left; torch raises RuntimeError
        raise UserError(f"{path} was not written: {reason(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def reason(error):
    """The message of a library's exception, in one line."""
    text = str(error) or type(error).__name__
    return text.splitlines()[0][:400]


# ---- Photographs, and other pictures ----


def open_photo(image):
    """A path or a Pillow image as RGBA, upright as a viewer shows it. info["rotated"]: by EXIF.

    Alpha is 0 where nothing is shown. Raises UserError for what Pillow cannot read, or misreads.
    """
    if "rotated" in getattr(image, "info", ()):
        return image  # it was opened here
    with open_image(image) as image:  # noqa: PLR1704
        opacity = tiff_opacity(image) if image.format == "TIFF" else None
        image = image.convert("RGBA")  # under the same name, so that what was decoded is freed
        # Soft edges have less than a tenth of the pixels.
        if sum(image.histogram()[-256:][8:248]) > image.width * image.height / 10:
            raise ValueError("its fourth band is no opacity (near infrared?)")
    if opacity is not None:
        image.putalpha(Image.fromarray(opacity & np.asarray(image.getchannel("A"))))
    image.info = {"rotated": rotate(image)}
    return image


@contextmanager
def open_image(image):
    """Open a picture by its path, or take a Pillow image, and refuse what Pillow would misread.

    A Pillow image loses its XMP. Whatever goes wrong until the end of the block is one line that
    names the file.
    """
    name = getattr(image, "filename", image)
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image, formats=FORMATS)
        # Pillow follows an orientation in XMP, and in ImageMagick's own chunk. No viewer does.
        for key in ("xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            image.info.pop(key, None)
        # ;16 is RGB of 16 bits, of which Pillow silently keeps 8.
        if image.mode[0] in "IF" or ";16" in str(getattr(image, "tile", "")):
            raise ValueError("more than 8 bits a channel")
        if image.format == "TIFF":
            if image.tag_v2.get(274, 1) != 1:
                raise ValueError("it has an orientation, which Pillow follows and GDAL ignores")
            # Their sizes in bytes: where one is missing, Pillow reads the file's own header.
            if 0 in image.tag_v2.get(325, image.tag_v2.get(279, ())):
                raise ValueError("blocks are missing in it (a sparse TIFF)")
        yield image
    except Exception as error:  # broken files raise exceptions of any type
        raise UserError(
            f"{name}: {reason(error)}; what is read is upright, of three 8-bit bands or one"
        ) from error


def tiff_opacity(image):
    """0 where a TIFF's nodata value or internal mask hides the photograph, else 255: (H, W) uint8.

    As in GDAL's dataset mask, nodata hides a pixel where all its bands have that value.
    """
    opacity = np.full((image.height, image.width), 255, np.uint8)
    for page in range(1, image.n_frames):
        image.seek(page)
        if image.tag_v2.get(254) == 4:  # a mask of full size; masks of overviews have 5
            opacity = np.array(image.convert("L"))
    image.seek(0)
    nodata = image.tag_v2.get(42113)
    if nodata is not None:
        shown = np.zeros_like(opacity)
        for name in image.getbands():
            shown |= np.asarray(image.getchannel(name)) != float(nodata.strip("\0 "))
        opacity *= shown
    return opacity


def rotate(image):
    """Rotate a picture in place by its EXIF, as a viewer shows it. Returns whether it had to."""
    exif = image.getexif()
    for tag in set(exif) - {274}:  # Pillow would write them again, and fail at an odd one
        del exif[tag]
    rotated = exif.get(274) in ROTATED
    ImageOps.exif_transpose(image, in_place=True)
    return rotated


def transparent(photo):
    """Where an upright photograph shows nothing, as at an orthomosaic's border: (H, W) bool."""
    return pil_to_tensor(photo.getchannel("A"))[0] == 0


def resize(photo, scale):
    """(H, W) → (3, h, w) uint8, in training and in `predict` alike. No side falls below 32."""
    w, h = (max(32, round(side * scale)) for side in photo.size)
    return pil_to_tensor(photo.convert("RGB").resize((w, h), Image.Resampling.BILINEAR))


def read_tags(path):
    """The TIFF or EXIF tags of a picture, {} where it cannot be read."""
    with suppress(Exception), open_image(path) as image:
        return dict(image.getexif())
    return {}


def geo_tags(path):
    """The georeferencing tags of a GeoTIFF; {} for any other file."""
    return {tag: value for tag, value in read_tags(path).items() if tag in GEO_TAGS}


def world_file(path):
    """The world file beside a.jpg, such as a.jgw, a.jpgw or a.wld, or None.

    None, too, where EXIF rotates the photograph: it fits the pixels as they are stored.
    """
    if read_tags(path).get(274) in ROTATED:
        return None
    suffix = path.suffix  # .jpg
    for name in (f"{suffix[:2]}{suffix[-1:]}w", f"{suffix}w", ".wld"):
        for file in (path.with_suffix(name.lower()), path.with_suffix(name.upper())):
            if file.is_file():
                return file
    return None


# ---- Folders: the photographs and their masks ----


def find_dataset(folder):
    """The folder of the photographs; by default `data`, filled from Kaggle if it is empty."""
    root = Path(folder or "data").absolute()
    if root.is_file():
        raise UserError(f"--data {folder} is a file: give its folder")
    # An empty folder that the user named is a mistake: nothing is downloaded into it.
    if folder is None and not list_images(root):
        fetch(root)
    inner = root / FOLDER
    return inner if inner.is_dir() else root


def fetch(root):
    """Download Kaggle's archive and unzip it to `root/FOLDER`, all of it or nothing."""
    print(f"no image in {root}: downloading {KAGGLE_NAME} (32 MB) from Kaggle")
    if Path("kaggle.json").is_file():  # a token in the working directory counts, too
        os.environ.setdefault("KAGGLE_CONFIG_DIR", os.getcwd())
    noise = io.StringIO()  # without a token, `import kaggle` prints a long help text
    try:
        root.mkdir(parents=True, exist_ok=True)
        # An interrupted download must not look like a dataset: unpack elsewhere, then rename.
        with tempfile.TemporaryDirectory(prefix=".partial", dir=root) as temporary:
            with redirect_stdout(noise), redirect_stderr(noise):
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
        if not of_run or path.parent == root:
            images.setdefault(path.resolve(), path)
    return sorted(images.values())


def is_mask(path, root):
    """Whether an image below `root` lies in a folder called masks, masks_png or the like."""
    return "masks" in comparable(path.relative_to(root).parent)


def list_photos(root):
    """The photographs below a folder: all images but masks, and maps, which unet.py marks."""
    return [
        path
        for path in list_images(root)
        if not is_mask(path, root) and read_tags(path).get(305) != MARK
    ]


def find_samples(root, masks=None, clicked=False):
    """Every photograph below `root` with its mask, or None, as Samples.

    A mask has the path of its photograph, whatever the suffix and capitals: below the folder
    `masks` if that is given, else with "masks" for "images", or in `masks/` beside the photograph.
    Raises UserError if two photographs share a mask; if `clicked`, neither has it then.
    """
    photos = list_photos(root)
    if not photos:
        raise UserError(f"no image in --data {root}, none of {', '.join(IMAGE_TYPES)}")

    mask_of = {}  # pair_key: mask
    for path in list_images(Path(masks or root)):
        if masks or is_mask(path, root):
            key = pair_key(path, masks or root)
            if key in mask_of:
                raise UserError(f"{mask_of[key]} and {path} are masks of one image; remove one")
            mask_of[key] = path

    photos_of = defaultdict(list)  # mask or None: photographs
    for path in sorted(set(photos) - set(mask_of.values())):  # --masks may lie below --data
        beside = path.parent / "masks" / path.name
        mask = mask_of.get(pair_key(path, root)) or mask_of.get(pair_key(beside, root))
        photos_of[mask].append(path)

    samples = []
    for mask, paths in photos_of.items():
        if mask and len(paths) > 1:
            if not clicked:
                raise UserError(f"{paths[0]} and {paths[1]} would share {mask}; remove one")
            mask = None  # it could be of either
        samples += [Sample(path.relative_to(root).as_posix(), path, mask) for path in paths]
    samples.sort(key=lambda sample: sample.image)
    return samples


def pair_key(path, folder):
    """The same key for a photograph and its mask."""
    return comparable(path.relative_to(folder).with_suffix("")).replace("masks", "images")


def matches(name, pattern):
    """Whether the path of an image is this path, below this folder, or fits this glob."""
    folder = pattern.rstrip("*/")  # compared literally: "[2021]" is a name
    is_inside = f"{name}/".startswith(f"{folder}/")
    return is_inside or fnmatch.fnmatchcase(name, pattern)


def comparable(path):
    """A path or name to compare, without case and the two Unicode spellings of é."""
    return unicodedata.normalize("NFC", Path(path).as_posix()).lower()


def without_suffix(path):
    """a.jpg → a. But plot.1 is a name."""
    return path.with_suffix("") if path.suffix.lower() in IMAGE_TYPES else path


# ---- Tables: what masks hold, and clicks from a file ----


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
        self.rotated = 0  # masks of photographs that EXIF rotates
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
        self.index |= {comparable(name): c for c, name in enumerate(self.names)}

    def read_mask(self, path, photo):
        """A mask as label map (H, W) uint8, unlabelled where it or the photograph is transparent.

        Raises UserError if its size differs from the upright photograph's, or if over a tenth of
        its pixels show an unknown colour.
        """
        with open_image(path) as image:
            rotate(image)
            red, green, blue = (np.asarray(c, np.uint32) for c in image.convert("RGB").split())
            color = red << 16 | green << 8 | blue  # (H, W) 0xRRGGBB
            if self.by_number and (image.mode == "P" or image.mode == "1" and self.known[0x010101]):
                index = np.asarray(image) * np.uint32(0x010101)  # (H, W), as a grey
                swapped = self.known[color] & (color != index)
                if swapped.any() and not (color % 0x010101).any():  # all of them are greys
                    raise ValueError("its indices are not its greys (a palette out of order)")
                color = index
        if image.size != photo.size:
            raise UserError(f"{path}: {image.size} pixels, its upright image {photo.size}")
        hidden = transparent(photo) | transparent(image.convert("RGBA"))  # (H, W) bool
        stray = ~self.known[color] & ~hidden.numpy()  # (H, W) bool
        found = Counter(f"#{value:06X}" for value in color[stray].tolist())
        if stray.mean() > 0.1:
            raise UserError(
                f"{path}: {stray.mean():.0%} of the pixels have no class, {found.most_common(3)}; "
                "say what they are in a file for --classes, and save masks as PNG of 8 bits"
            )
        # A few strays (blurred edges, a forgotten class) are reported and left unlabelled.
        self.strays += found
        self.rotated += photo.info["rotated"]
        return torch.from_numpy(self.table[color]).masked_fill_(hidden, IGNORE_INDEX)


def read_classes(path, clicks=None):
    """The classes of a file for --classes; without one those of a file of clicks, or Dubai's.

    Those of clicks are in alphabetical order: the same clicks in any order give the same run.
    """
    rows = DUBAI
    if path:
        rows = class_rows(path, "class,color", "name,r,g,b")
    elif clicks:
        found = class_rows(clicks, *CLICKS)
        if not set(found) <= set(DUBAI):
            rows = sorted(found) + NO_LABEL
    if not 2 <= sum(name != "" for name, _ in rows) < IGNORE_INDEX:
        raise UserError(f"{path or clicks}: give 2 to 254 classes")
    return Classes(rows)


def class_rows(path, *headers):
    """(name, RGB colour or number) of every row of a file of classes, or of clicks with `color`."""
    line_of = {}  # (name, colour): line
    for line, row in read_table(path, *headers):
        is_click = "image" in row
        if is_click and not row.get("color"):
            continue
        name = row.get("class", row.get("name"))
        color = row["color"] if "color" in row else f"rgb({row['r']},{row['g']},{row['b']})"
        with at_line(path, line):
            number = color.isdecimal() and not is_click
            value = int(color) if number else ImageColor.getrgb(color)[:3]
            if is_click and (name, value) in line_of:
                continue
            if np.max(value) > 255:
                raise UserError(f"{color} is above 255")
            for (other, its_value), its_line in line_of.items():
                if value == its_value or name and comparable(name) == comparable(other):
                    raise UserError(f"{name},{color} does not fit {other} in line {its_line}")
            line_of[name, value] = line
    if len({type(value) for _, value in line_of}) > 1:
        raise UserError(f"{path}: give every class a colour, or every class a number")
    return list(line_of)


def read_clicks(path, samples, classes):
    """Read clicks from a CSV file into the `clicks` of their samples.

    image: a path below --data, or a bare name if only one image has it; the suffix may differ
    x, y: pixels of the upright photograph from its top left; or map_x, map_y of its own system
    class: a name, its number in --classes, else its index
    width, height: where given, the size of the upright photograph
    """
    rows_of = defaultdict(list)  # by the name of the image: each is looked up and opened once
    for line, row in read_table(path, *CLICKS):
        rows_of[row["image"]].append((line, row))
    found = defaultdict(dict)  # per sample: (y, x) → (line in the file, class)
    for name, rows in rows_of.items():
        with at_line(path, rows[0][0]):
            sample = find_image(name, samples)
        photo = open_photo(sample.image)
        hidden, dropped = transparent(photo), 0  # (H, W)
        for line, row in rows:
            with at_line(path, line):
                pixel, c = read_click(row, sample, photo, classes)
                if hidden[pixel]:  # such as an orthomosaic's border
                    dropped += 1
                    continue
                other, its_class = found[sample].setdefault(pixel, (line, c))
                if c != its_class:
                    raise UserError(f"this pixel has another class in line {other}")
        if dropped:
            print(f"note      {sample.name}: {dropped} clicks dropped, where it is transparent")
    for sample, pixels in found.items():
        # In row order, as simulated clicks are: the same clicks give the same run.
        clicks = [(x, y, c) for (y, x), (_, c) in sorted(pixels.items())]
        sample.clicks = torch.tensor(clicks)  # (P, 3)


@contextmanager
def at_line(path, line):
    """Prefix errors with the file and the line."""
    try:
        yield
    except ValueError as error:  # also from float(…) and ImageColor
        raise UserError(f"{path}: line {line}: {error}") from error


def find_image(name, samples):
    """The one sample that a row refers to, by its path or the end of it; the suffix may differ."""
    path = Path(name.replace("\\", "/").lstrip("/"))
    whole, stem = comparable(path), comparable(without_suffix(path))
    # An exact path wins. The suffix counts least: people click on a PNG copy of a GeoTIFF.
    found = (
        [sample for sample in samples if sample.name == name]
        or [sample for sample in samples if comparable(sample.image).endswith(f"/{whole}")]
        or [s for s in samples if comparable(s.image.with_suffix("")).endswith(f"/{stem}")]
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
    else:
        x, y = map_to_pixel(sample.image, float(row["map_x"]), float(row["map_y"]))
    # The pixel is the whole part. On the far edge it is the last one.
    if not (0 <= x <= W and 0 <= y <= H):
        raise UserError(
            f"({x:g}, {y:g}) is outside the {W}×{H} pixels of {sample.name} (map_x, map_y?)"
        )
    name = comparable(row["class"])
    if name not in classes.index:
        raise UserError(
            f"class {row['class']!r} is none of {', '.join(classes.names)}: give --classes"
        )
    return (min(int(y), H - 1), min(int(x), W - 1)), classes.index[name]


def map_to_pixel(path, map_x, map_y):
    """Map coordinates → pixel coordinates (x, y) of a photograph, from its top left.

    (map_x, map_y) = A (x, y) + b, with A and b of the GeoTIFF tags (OGC 19-008r4) or a world file.
    """
    tags, world = geo_tags(path), world_file(path)
    # Four numbers a key. Key 1025 with value 2 says PixelIsPoint: coordinates of pixel centres.
    keys = tags.get(34735, ())
    from_centre = (1025, 0, 1, 2) in [keys[i : i + 4] for i in range(0, len(keys), 4)]
    try:
        if 34264 in tags:  # a 4×4 matrix
            a, b, _, c, d, e, _, f = tags[34264][:8]
        elif 33550 in tags and 33922 in tags:  # the size of a pixel, and a tie point
            a, e, _ = tags[33550]
            i, j, _, x, y, _ = tags[33922][:6]  # pixel (i, j) lies at (x, y)
            b, d, e = 0, 0, -e  # north is up
            c, f = x - a * i, y - e * j
        elif world:
            a, d, b, e, c, f = map(float, world.read_text().split())
            from_centre = True  # as specified
        else:
            raise ValueError("no position")
        x, y = np.linalg.solve([[a, b], [d, e]], [map_x - c, map_y - f])
    except (TypeError, ValueError) as error:
        lacking = f"{path} has no complete GeoTIFF tags, and no world file that fits"
        raise UserError(f"{lacking} ({error}); give x, y in pixels") from error
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
        csv.field_size_limit(2**31 - 1)  # notes can be long
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
