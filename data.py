"""The data: find or fetch it, read it, split it, click on it, cut training crops from it.

    find_samples ─► split ─► held out: read when they are scored
                      ▼ training
    crop ◄── pixels (4, h, w) ◄── shrink_labels ◄── sample_points (a simulated annotator)
             R, G, B, label       (training size)   or click_map (a real one), or all labels

Dataset: "Semantic segmentation of aerial imagery", Humans in the Loop and Mohammed Bin Rashid Space
Centre, CC0: 72 satellite images of Dubai, `Tile 1..8/images/image_part_001..009.jpg` and masks.
A *label map* is an integer tensor (H, W): the class where labelled, IGNORE_INDEX elsewhere.
Letters: H, W original size; h, w size after scaling; S side of a training crop.
"""

import contextlib
import csv
import difflib
import fnmatch
import hashlib
import io
import os
import tempfile
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

CLASSES = ("Building", "Land", "Road", "Vegetation", "Water")
PALETTE = ((60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41))
NO_LABEL = ((155, 155, 155), (0, 0, 0))  # Dubai's Unlabeled, and black: 0.6 % of the pixels
IGNORE_INDEX = 255
STRAY = 254  # while a mask is read: a colour that no row of --classes names
KAGGLE_NAME = "humansintheloop/semantic-segmentation-of-aerial-imagery"
FOLDER = "Semantic segmentation dataset"  # what the archive unzips to
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"}


@dataclass(eq=False)
class Sample:  # one image and all that belongs to it
    name: str  # its path below --data, as in clicks.csv
    image: Path
    mask: Path | None
    rows: list = field(default_factory=list)  # of --clicks: (line, x, y, class)
    clicks: list = field(default_factory=list)  # [x, y, class] that it is trained on
    size: tuple[int, int] = (0, 0)  # (W, H), upright
    pixels: Tensor | None = None  # (4, h, w) uint8: R, G, B and label, which nothing moves apart
    labelled: Tensor | None = None  # (L,) int32: where in the h·w pixels a label is

    def click_map(self) -> Tensor:
        """The label map (H, W) uint8 of `rows`; less than a pixel outside is the border."""
        (W, H), first = self.size, {}
        label_map = torch.full((H, W), IGNORE_INDEX, dtype=torch.uint8)
        for line, x, y, c in self.rows:
            inside = -1 < x < W + 1 and -1 < y < H + 1
            refuse(not inside, f"line {line}: ({x:g}, {y:g}) is outside the {W}×{H} pixels")
            at = min(max(int(y), 0), H - 1), min(max(int(x), 0), W - 1)
            other, its_class = first.setdefault(at, (line, c))
            refuse(its_class != c, f"line {line}: this pixel has another class in line {other}")
            label_map[at] = c
        return label_map

    def draw(self, mask: Tensor, n: int | str, seed: int, epoch: int = 1) -> Tensor:
        """Simulated clicks on its mask, or "all": a label map (H, W), the same whenever drawn."""
        return mask if n == "all" else sample_points(mask, n, generator_for(seed, self.name, epoch))

    def crop(self, S: int, generator: torch.Generator) -> Tensor:
        """A square around one of the labels, turned and mirrored at random: (4, S, S) uint8."""
        draw = partial(torch.randint, size=(), generator=generator)  # low … high − 1
        _, h, w = self.pixels.shape
        y, x = divmod(int(self.labelled[draw(0, len(self.labelled))]), w)
        top = draw(max(0, y - S + 1), max(0, min(y, h - S)) + 1)
        left = draw(max(0, x - S + 1), max(0, min(x, w - S)) + 1)
        square = self.pixels[:, top : top + S, left : left + S]  # (4, S, S), or smaller
        fill = (0, S - square.shape[2], 0, S - square.shape[1])  # white, and without labels
        square = F.pad(square, fill, value=IGNORE_INDEX)  # (4, S, S)
        if draw(0, 2):  # seen from above, no direction is special; colours would be square[:3]
            square = square.flip(2)
        return square.rot90(int(draw(0, 4)), (1, 2))


@contextlib.contextmanager
def naming(what):
    """Turn what a user can cause into one line that begins with what is at fault."""
    others = Image.DecompressionBombError, csv.Error, AssertionError, ImportError  # torch's, too
    try:
        yield
    except (OSError, ValueError, RuntimeError, SyntaxError, MemoryError, *others) as error:
        reason = getattr(error, "strerror", None) or str(error) or "out of memory"
        raise ValueError(f"{what}: {' '.join(reason.split())}") from error


def refuse(when: bool, why: str) -> None:
    if when:
        raise ValueError(why)


def find_dataset(folder: str | None) -> Path:
    """The folder with the images: `folder`, or FOLDER in it. Without one, `data`, from Kaggle."""
    root = Path(folder or "data")
    if folder is None and not list_images(root):
        fetch(root)
    root = root / FOLDER if (root / FOLDER).is_dir() else root
    refuse(not list_images(root), f"no {', '.join(sorted(IMAGE_TYPES))} file is in --data {root}")
    return root


def list_images(root: Path) -> list[Path]:
    """Every image file below `root`, links followed, sorted; nothing hidden (., or a NAS's @)."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        skip = os.path.realpath(folder) in seen or "checkpoint.pt" in files  # by a link; a run
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in folders if name[0] not in ".@" and not skip]
        paths = [Path(folder, name) for name in files if name[0] != "." and not skip]
        found += [path for path in paths if path.suffix.lower() in IMAGE_TYPES]
    return sorted(found)


def fetch(root: Path) -> None:
    """Download Kaggle's archive and unzip it to `root/FOLDER`, all of it or nothing."""
    archives = ", ".join(map(str, root.glob("*.zip")))  # as a browser leaves them
    refuse(archives != "", f"no image in {root}, but {archives}: unzip that there")
    print(f"no image in {root}: downloading {KAGGLE_NAME} (32 MB) from Kaggle")
    if Path("kaggle.json").is_file():  # a token in the working directory counts too
        os.environ.setdefault("KAGGLE_CONFIG_DIR", os.getcwd())
    noise = io.StringIO()  # without a token, `import kaggle` logs in, fails and prints a long text
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial", dir=root) as temporary:
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                import kaggle  # here, because only this function may need a network

                kaggle.api.dataset_download_files(KAGGLE_NAME, path=temporary, unzip=True)
            Path(temporary, FOLDER).rename(root / FOLDER)
    except (Exception, SystemExit) as error:  # old kaggle clients exit where there is no token
        reason = " ".join(str(error).rpartition("Caused by ")[2].split())[:200]
        raise ValueError(
            f"the download failed ({reason or type(error).__name__}). By hand: unzip the archive "
            f"of kaggle.com/datasets/{KAGGLE_NAME} into {root}; with an account: KAGGLE_API_TOKEN "
            "or ~/.kaggle/access_token (or the legacy kaggle.json); without anything: --demo"
        ) from error


def find_samples(root: Path, masks: str | None = None) -> list[Sample]:
    """Every image below `root` with its mask, or None. It has the same path, whatever the suffix:
    below the folder `masks` that is given, else with `masks` for `images` wherever that stands in
    it, or in a folder `masks` beside the image."""
    whole = root.parent if root.name.lower() == "images" and not masks else root
    below = Path(masks or whole)

    def key(path: Path, folder: Path) -> tuple:
        *folders, name = path.relative_to(folder).with_suffix("").parts
        return (*("images" if f.lower() in ("images", "masks") else f for f in folders), name)

    mask_of, image_of, samples = {}, {}, []
    folders = [below] if whole == root else [root, *whole.glob("[mM][aA][sS][kK][sS]")]
    for mask in (path for folder in folders for path in list_images(folder)):
        if masks or "masks" in map(str.lower, mask.relative_to(below).parts[:-1]):
            twin = mask_of.setdefault(key(mask, below), mask)
            refuse(twin != mask, f"{twin} and {mask} are masks of the same image; remove one")
    known = {mask.absolute() for mask in mask_of.values()}
    images = [path for path in list_images(root) if path.absolute() not in known]
    for image in images:
        *folders, name = key(image, whole)
        mask = mask_of.get((*folders, name)) or mask_of.get((*folders, "images", name))
        twin = image_of.setdefault(mask or image, image)
        refuse(twin != image, f"{twin} and {image} share the mask {mask}; remove one of the two")
        samples.append(Sample(image.relative_to(root).as_posix(), image, mask))
    for mask in set(mask_of.values()) - image_of.keys():
        near = nearest(mask.stem, [image.stem for image in images])
        raise ValueError(f"{mask} fits no image: a mask has its image's path and name{near}")
    return samples


def nearest(name: str, names) -> str:
    """ ", did you mean {the most similar name}?", or nothing."""
    folded = {n.casefold(): n for n in names}
    close = difflib.get_close_matches(name.casefold(), folded, 1, cutoff=0.1)
    return f", did you mean {folded[close[0]]}?" if close else ""


def split(samples: list[Sample], pattern: str | None, clicked: bool):
    """(training, held-out) samples. Held out are the images that match `pattern`; without one,
    where there are clicks, those with a mask and no click, else the last two of every folder."""
    folders = defaultdict(list)
    for sample in samples:
        folders[sample.image.parent].append(sample)
    held_out = [sample for folder in folders.values() for sample in folder[1:][-2:]]
    if clicked:
        held_out = [sample for sample in samples if sample.mask and not sample.rows]
    if pattern:
        held_out = [sample for sample in samples if fnmatch.fnmatchcase(sample.name, pattern)]
        which = f"{'every' if held_out else 'no'} image, such as {samples[0].name}"
        refuse(len(held_out) in (0, len(samples)), f"--hold-out {pattern} matches {which}")
    for sample in held_out if clicked else samples:
        rule = "it has the same path with masks for images, or below --masks DIR"
        refuse(sample.mask is None, f"{sample.image} has no mask: {rule}")
    return [s for s in samples if s not in held_out and (s.rows or not clicked)], held_out


class Classes:
    """What stands for the classes in masks: rows (name, RGB or number); no name means no label."""

    def __init__(self, rows):
        self.rows, self.by_number = rows, isinstance(rows[0][1], int)
        self.names, self.palette = [name for name, _ in rows if name], []
        self.table = np.full(2**24, STRAY, np.uint8)  # colour 0xRRGGBB → class
        self.strays: dict[Path, Counter] = {}  # of each mask: pixels of each colour without a row
        for name, value in rows:
            r, g, b = [value] * 3 if self.by_number else value
            i = len(self.palette) if name else IGNORE_INDEX
            self.table[r << 16 | g << 8 | b] = i
            if self.by_number:  # a picture needs colours that can be told apart
                color = f"hsv({i * 222 % 360},{100 - i % 3 * 30}%,{95 - i // 3 % 3 * 25}%)"
                r, g, b = ImageColor.getrgb(color)
            self.palette += [[r, g, b]] if name else []

    def read_mask(self, path: Path, size: tuple[int, int]) -> Tensor:
        """A mask as label map (H, W) uint8. Raises ValueError where it is not of its image's `size`
        (W, H), or over a tenth of its colours have no row; up to that they are left unlabelled."""
        with naming(path), Image.open(path) as image:
            both = "{}×{} pixels, its upright image {}×{}".format(*image.size, *size)
            refuse(image.size != size, f"{both}; they must be the same")
            refuse(image.format in ("JPEG", "MPO"), "JPEG changes colours; masks must be PNG")
            refuse(image.mode[0] in "IF", "more than 8 bits a pixel; save the mask with 8")
            if self.by_number and image.mode in ("1", "P"):  # indices, not what they look like
                white = 255 if image.mode == "1" and self.table[0x010101] == STRAY else 1
                image = Image.fromarray(np.asarray(image).astype(np.uint8) * np.uint8(white))
            color = np.asarray(image.convert("RGBA")).view(">u4")[..., 0] >> 8  # (H, W) 0xRRGGBB
            label_map = self.table[color]  # (H, W)
            stray = label_map == STRAY
            if stray.any():
                found = zip(*np.unique(color[stray], return_counts=True))
                self.strays[path] = Counter({f"#{value:06X}": int(n) for value, n in found})
                most = [f"{c} {n / stray.size:.0%}" for c, n in self.strays[path].most_common(5)]
                share = f"{stray.mean():.0%} of the pixels are of no class ({', '.join(most)})"
                refuse(stray.mean() > 0.1, f"{share}: name what they hold in a file for --classes")
                label_map[stray] = IGNORE_INDEX
        return torch.from_numpy(label_map)


def read_classes(path: str | None) -> Classes:
    """CSV `class,color` or `name,r,g,b`; without a file the five classes of Dubai."""
    if path is None:
        return Classes([*zip(CLASSES, PALETTE), *(("", color) for color in NO_LABEL)])
    rows = []
    with naming(f"--classes {path}"):
        for line, row in read_table(path, "class,color", "name,r,g,b"):
            with naming(f"line {line}"):
                name = row.get("class", row.get("name"))
                color = row.get("color") or "rgb({r},{g},{b})".format_map(defaultdict(str, row))
                value = int(color) if color.isdecimal() else ImageColor.getrgb(color)[:3]
                taken = any(value == v or name == n != "" for n, v in rows)
                refuse(taken or np.max(value) > 255, f"{name},{color} is taken, or above 255")
                rows.append((name, value))
        refuse(len({type(v) for _, v in rows}) != 1, "give every class a colour, or a number")
        refuse(not 2 <= sum(n != "" for n, _ in rows) < STRAY, "give 2 to 253 classes")
    return Classes(rows)


def read_table(path: str, *headers: str) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file that are not empty: (number of the line, value of each column).
    Comma, semicolon or tab, capitals or not; at least the columns of one of the headers."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: spreadsheets add a BOM
        head, *lines = unicodedata.normalize("NFC", file.read()).splitlines() or [""]
    delimiter = max(",;\t", key=head.count)
    header = [name.strip(' "').lower() for name in head.split(delimiter)]
    enough = any(set(names.split(",")) <= set(header) for names in headers)
    refuse(not enough, f"line 1: must have {' or '.join(headers)}")
    rows = enumerate(csv.reader(lines, delimiter=delimiter, strict=True), start=2)
    rows = [(line, [cell.strip() for cell in row]) for line, row in rows if "".join(row).strip()]
    return [(line, dict(zip(header, row + [""] * len(header)))) for line, row in rows]


def sample_points(mask: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """The simulated annotator: keep n labelled pixels of a label map, forget the others.
    mask (H, W) any integer type, IGNORE_INDEX = unlabelled → the same with exactly n labels, or all
    where there are fewer; every set of n is equally likely. (Bearman et al. 2016, arXiv:1506.02106,
    click on objects; here none need be known.)"""
    labelled = (mask.flatten() != IGNORE_INDEX).nonzero()[:, 0]  # (M,)
    chosen = labelled[torch.randperm(len(labelled), generator=generator)[:n]]  # (n,)
    points = torch.full_like(mask, IGNORE_INDEX).flatten()  # (H·W,)
    points[chosen] = mask.flatten()[chosen]
    return points.view_as(mask)


def generator_for(*what) -> torch.Generator:
    """A random generator that depends on its arguments alone, not on what was drawn before."""
    digest = hashlib.sha256(repr(what).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def read_clicks(path: str, samples: list[Sample], classes: Classes) -> None:
    """Someone's own clicks: the rows of CSV `image,x,y,class` go to the `rows` of their sample.
    image: path below --data, or a bare name that one image has; x, y: pixels of the upright image
    from its top-left corner (0, 0); class: a name, its number in --classes, else its index."""
    by_name, nfc = defaultdict(list), partial(unicodedata.normalize, "NFC")
    for sample in samples:
        by_name[nfc(sample.image.name)].append(sample)  # or its path, which wins
    by_name |= {nfc(name): [s] for s in samples for name in (s.name, s.image.as_posix())}
    numbers = [n for c, n in classes.rows if c] if classes.by_number else range(len(classes.names))
    number = {str(key): i for keys in (numbers, classes.names) for i, key in enumerate(keys)}
    with naming(f"--clicks {path}"):
        for line, row in read_table(path, "image,x,y,class"):
            with naming(f"line {line}"):
                name, label = Path(row["image"].replace("\\", "/")).as_posix(), row["class"]
                found = by_name.get(name, [])
                if len(found) != 1:
                    near = nearest(name, [sample.name for sample in found] or by_name)
                    raise ValueError(f"{len(found) or 'no'} images are called {name}{near}")
                refuse(label not in number, f"class {label!r} is none of {', '.join(number)}")
                x, y = (float(row[axis].replace(",", ".")) for axis in "xy")
                found[0].rows.append((line, x, y, number[label]))
        refuse(not any(sample.rows for sample in samples), "it holds no clicks")


def list_points(label_map: Tensor) -> list[list[int]]:
    """[x, y, class] of every labelled pixel of a label map (H, W), in row order."""
    y, x = (label_map != IGNORE_INDEX).nonzero(as_tuple=True)  # (P,) each
    return torch.stack([x, y, label_map[y, x].long()], dim=1).tolist()


def shrink_labels(label_map: Tensor, h: int, w: int) -> Tensor:
    """Carry labels (H, W) uint8 to the cell (h, w) that covers them; of two in one the later stays.
    Resizing as one resizes pictures would lose three of four clicks at scale 0.5, or move them."""
    H, W = label_map.shape
    source, small = label_map.numpy(), np.full((h, w), IGNORE_INDEX, np.uint8)
    for top in range(0, H, 256):  # a strip at a time: 16 bytes a label would fill the memory
        y, x = np.nonzero(source[top : top + 256] != IGNORE_INDEX)  # (P,) each, in row order
        y += top
        small[(2 * y + 1) * h // (2 * H), (2 * x + 1) * w // (2 * W)] = source[y, x]
    return torch.from_numpy(small)
