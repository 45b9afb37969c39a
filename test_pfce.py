"""All tests but those in docs/: a list of promises. A name says what is broken if it fails."""

import csv
import http.server
import io
import itertools
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from unittest.mock import DEFAULT, Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet34
from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image

import data
import train
import unet
from data import CLASSES, IGNORE_INDEX, PALETTE, open_photo, sample_points
from pfce import PartialFocalCrossEntropyLoss, partial_focal_cross_entropy
from unet import UNet

each = pytest.mark.parametrize


# ==== What everything rests on ====


@each("cast", ["double", "float", "half", "bfloat16"])
@each("spatial", [(), (5, 6), (2, 3, 4)])
@each("gamma", [0, 0.5, 2])
@each("alpha", [1.5, [0.1, 0.2, 0.3, 0.4]])
def test_loss_equals_the_formula_written_out_in_numpy(cast, spatial, gamma, alpha):
    logits, target = example(*spatial)
    logits = getattr(logits, cast)()
    m = target != 255
    y = target[m].numpy()  # (P,)
    exp = np.exp(logits.double().movedim(1, -1)[m].numpy())  # (P, C)
    p = exp[range(len(y)), y] / exp.sum(1)  # (P,)
    want = np.full(4, alpha)[y] * (1 - p) ** gamma * -np.log(p)  # (P,)

    loss, gradient = loss_and_gradient(logits, target, gamma=gamma, alpha=alpha)

    assert loss.item() == pytest.approx(want.mean(), rel=1e-5)
    assert gradient.dtype == logits.dtype


@each("ignore_index", [255, -100, 2])
@each("reduction", ["mean", "sum", "none"])
def test_gamma_0_alpha_1_is_torchs_cross_entropy(ignore_index, reduction):
    logits, target = example(8, 16)
    target[target == 255] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction}

    ours = partial_focal_cross_entropy(logits, target, gamma=0, alpha=1, **options)

    assert_close(ours, F.cross_entropy(logits, target, **options))


@each("bad", [math.nan, math.inf])
def test_unlabelled_pixels_cannot_reach_the_result_even_when_nan(bad):
    logits, target = example(8, 8)
    spoilt = logits.masked_fill((target == 255)[:, None], bad)

    got = loss_and_gradient(spoilt, target)

    assert_close(got, loss_and_gradient(logits, target), rtol=0, atol=0)


def test_clicks_are_drawn_once_and_every_crop_counts_alike_however_many_it_holds(
    photos, out, monkeypatch
):
    drawn = watch(monkeypatch, data, "sample_points")
    losses = watch(monkeypatch, train, "partial_focal_cross_entropy")

    fit(photos, "--points 5 --gamma 1 --alpha 0.5")

    means, counts = [], set()
    for call in losses.call_args_list:
        for z, label in zip(*call.args):  # (C, S, S), (S, S)
            m = label != 255
            y = label[m].long()  # (P,)
            p = z.double().softmax(0)[:, m][y, range(len(y))]  # (P,)
            means.append((0.5 * (1 - p) * -p.log()).mean().item())
            counts.add(len(y))
    assert drawn.call_count == 2  # images to train on, in two epochs of eight crops
    assert len(means) == 16 and len(counts) > 1 and max(counts) <= 5
    epochs = [float(row["loss"]) for row in table(f"{out}/metrics.csv")]
    assert epochs == pytest.approx([np.mean(means[:8]), np.mean(means[8:])], 1e-4)


@each("h, w, ways", [(48, 48, 8), (130, 150, 120), (33, 90, 120)])  # also smaller than the crop
def test_crops_hold_a_label_in_many_ways_and_labels_stay_on_their_pixel(tmp_path, h, w, ways):
    classes = noise(h, w) % 5
    photo = draw_png(tmp_path / "a.png", np.dstack([classes, *np.indices((h, w))]))
    clicks = sample_points(torch.tensor(classes), 12)
    sample = data.Sample("a", photo, None, clicks)
    data.prepare(sample, None, points=12, seed=0, scale=1, size=48)
    dataset = data.Crops([sample], 48)
    found, crops = set(), set()

    for _ in range(200):
        crop = dataset[0].numpy()
        y, x, label = crop[1:, crop[3] != IGNORE_INDEX]  # the photograph's colours: class, y, x
        assert crop.shape == (4, 48, 48) and len(label)
        found.update(zip(x, y, label))
        crops.add(crop.tobytes())

    assert found == set(map(tuple, sample.clicks.tolist()))  # each label has its turn
    assert len(crops) >= ways  # 8 of 12 labels would be 96, if each were always in the middle


# ==== What several tests need ====

HERE = Path(__file__).parent
DEMO = HERE / "docs/demo"
ROTATED = Image.Exif()
ROTATED[274] = 6  # a quarter turn: upright as wide as it is stored high


def example(*spatial):
    """Random logits (6, 4, *spatial) and a target of which about half is labelled."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 4, *spatial, dtype=torch.float64)
    target = torch.randint(4, (6, *spatial))
    target[torch.rand(target.shape) > 0.5] = 255
    return logits, target


def loss_and_gradient(logits, target, **options):
    logits = logits.detach().requires_grad_()  # with the strides that they have
    loss = partial_focal_cross_entropy(logits, target, **options)
    loss.backward()
    return loss.detach(), logits.grad


def noise(*shape):
    return np.random.default_rng(0).integers(256, size=shape)


def random_image(height, width):
    torch.manual_seed(0)
    return to_pil_image(torch.rand(3, height, width))


def draw_png(path, pixels, mode=None, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).convert(mode).save(path, **options)
    return path


def make_photos(folder, colors, mode=None):
    """Four photographs (80, 96), masks of random blocks in these colours, the last one's blocks."""
    rng = np.random.default_rng(0)
    for i in range(4):
        blocks = rng.integers(len(colors), size=(5, 6)).repeat(16, 0).repeat(16, 1)
        draw_png(f"{folder}/masks/{i}.png", np.array(colors)[blocks], mode)
        draw_png(f"{folder}/images/{i}.png", noise(80, 96, 3) // 4 + 30 * blocks[..., None])
    return blocks


def touch(folder, names):
    for path in [folder / name for name in names.split()]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def watch(monkeypatch, module, name):
    mock = Mock(wraps=getattr(module, name))
    monkeypatch.setattr(module, name, mock)
    return mock


def assert_refused(words, call, *arguments, **options):
    """Refused in one line that holds these words."""
    with pytest.raises((ValueError, SystemExit)) as refusal:
        call(*arguments, **options)

    message = str(refusal.value)
    assert "\n" not in message
    assert all(word in message for word in str(words).split()), message


@pytest.fixture
def float32(monkeypatch):
    """No bfloat16, even where the processor has it."""
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)


# ==== pfce.py: the loss ====


@each("N", [0, 2])
def test_no_label_at_all_gives_zero_and_zero_gradients(N):
    logits = torch.randn(N, 3, 8)
    target = torch.full((N, 8), 255)

    loss, gradient = loss_and_gradient(logits, target)

    assert loss == 0
    assert (gradient == 0).all()


@each("gap", [-1e4, -30, 0, 1e4])
@each("gamma", [0, 0.5, 2])
def test_float32_is_as_exact_as_torchs_cross_entropy_and_gradients_are_finite(gap, gamma):
    logits = torch.tensor([[gap, 0.0]])
    target = torch.tensor([0])

    loss, gradient = loss_and_gradient(logits, target, gamma=gamma, alpha=1)

    ce = F.cross_entropy(logits, target).double()
    want = ce * (-torch.expm1(-ce)) ** gamma
    assert_close(loss.double(), want, rtol=1e-6, atol=1e-37)
    assert gradient.isfinite().all()


@each("gamma", [0, 0.5, 2])
def test_gradients_are_those_of_finite_differences(gamma):
    logits, target = example(2, 3)
    loss = PartialFocalCrossEntropyLoss(gamma)

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(), target))


LAYOUTS = ["contiguous", "channels last"]


def lay_out(tensor, layout):
    """The same tensor with other strides."""
    if layout == "channels last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor


@each("layout", LAYOUTS)
@each("dtype", ["uint8", "int32", "uint16", "uint64"])
def test_every_memory_layout_and_integer_type_gives_the_same(layout, dtype):
    logits, target = example(16, 13)
    want = loss_and_gradient(logits, target)
    target[target == 255] = 100

    target = lay_out(target, layout).to(getattr(torch, dtype))
    got = loss_and_gradient(lay_out(logits, layout), target, ignore_index=100)

    assert_close(got, want)


class CountOperations(TorchDispatchMode):
    """Those that compute something (30 µs each on a GPU), and those that wait for a result."""

    count = waits = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        self.waits += operation.name() in ("aten::nonzero", "aten::_local_scalar_dense")
        return operation(*args, **(kwargs or {}))


@each("layout", LAYOUTS)
def test_few_operations_two_synchronisations_and_no_dense_temporary_beyond_the_gradient(layout):
    logits, target = example(64, 64)
    logits = lay_out(logits, layout)
    target[:, 1:] = 255

    with CountOperations() as operations:
        loss_and_gradient(logits, target.byte())
    with torch.profiler.profile(profile_memory=True) as profile:
        loss_and_gradient(logits, target)

    assert operations.count <= 36
    assert operations.waits <= 1  # besides tolist(), which is no operation
    events = profile.profiler.kineto_results.events()
    allocated = sum(event.nbytes() for event in events if event.nbytes() > 0)
    assert 1 <= allocated / logits.nbytes < 1.25  # 1 is the gradient


def test_the_module_is_the_function_even_if_made_on_meta_and_cast_to_half():
    logits, target = example(8, 8)
    options = {"gamma": 1, "alpha": [0.1, 0.2, 0.3, 0.4], "ignore_index": 3, "reduction": "sum"}
    target[target == 255] = 3

    with torch.device("meta"):
        module = PartialFocalCrossEntropyLoss(**options).half()

    want = partial_focal_cross_entropy(logits, target, **options)
    assert_close(module(logits, target), want)


Z = torch.zeros(2, 3, 4)
Y = torch.zeros(2, 4).long()


@each(
    "words, wrong",
    [
        ("(2, 3)", {"target": Y[:, :3]}),
        ("got -2", {"target": Y - 2}),
        ("got 255", {"target": Y.byte() + 255, "ignore_index": -1}),  # which is 255 as a uint8
        ("torch.from_numpy", {"target": Y.numpy()}),
        ("int64 (N, C, *spatial)", {"logits": Z.long()}),
        ("output['out']", {"logits": {"out": Z}}),  # of a torchvision model
        ("binary_cross_entropy_with_logits", {"logits": Z[:, :1]}),
        ("alpha 3 weights", {"alpha": [1, 2]}),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(words, wrong):
    assert_refused(words, partial_focal_cross_entropy, **{"logits": Z, "target": Y, **wrong})


@each("option", ["gamma", "alpha", "ignore_index", "reduction"])
@each("value", [None, "2", -0.5, math.nan])
def test_wrong_options_are_refused_by_name_when_the_loss_is_made(option, value):
    assert_refused(f"{option} {value}", PartialFocalCrossEntropyLoss, **{option: value})


def test_logits_and_target_in_the_place_of_options_are_refused():
    assert_refused("logits and target", PartialFocalCrossEntropyLoss, Z, Y)


# ==== data.py: clicks and crops ====


def test_simulated_clicks_are_distinct_labelled_pixels_in_row_order_and_equally_likely():
    mask = torch.tensor([[0, 255, 1], [2, 3, 255], [255, 255, 4]])
    labels = [[0, 0, 0], [2, 0, 1], [0, 1, 2], [1, 1, 3], [2, 2, 4]]  # x, y, class
    generator = torch.Generator().manual_seed(0)

    found = [str(sample_points(mask, 2, generator).tolist()) for _ in range(2000)]

    pairs, counts = np.unique(found, return_counts=True)
    assert {*pairs} == {str([*pair]) for pair in itertools.combinations(labels, 2)}
    assert ((counts - 200) ** 2).sum() / 200 < 27.9  # chi-square, 9 degrees of freedom, 0.1 %
    assert sample_points(mask, 9).tolist() == labels


@each("h, w", [(20, 30), (37, 71)])
def test_a_label_goes_to_the_cell_that_covers_its_pixel_and_the_later_one_wins(h, w):
    clicks = sample_points(torch.randint(5, (40, 60)), 300)
    want = np.full((h, w), IGNORE_INDEX)
    for x, y, c in clicks.tolist():
        want[int((y + 0.5) * h / 40), int((x + 0.5) * w / 60)] = c

    assert np.array_equal(data.paint(clicks, (60, 40), (h, w)), want)


# ==== data.py: photographs ====


@each("orientation", range(9))
def test_photographs_are_rotated_as_a_viewer_does_even_with_an_odd_exif_tag(tmp_path, orientation):
    odd_tag = "011A 0002 00000003 37320000"  # the resolution as a text, "72"
    tags = f"0112 0003 00000001 000{orientation} 0000 {odd_tag}"
    image = random_image(64, 96)
    path = tmp_path / "a.png"
    image.save(path, exif=bytes.fromhex(f"4D4D 002A 00000008 0002 {tags} 00000000"))

    photo = open_photo(path)

    image.getexif()[274] = orientation
    assert np.array_equal(photo.convert("RGB"), ImageOps.exif_transpose(image))
    assert np.array_equal(photo, open_photo(photo))  # not rotated twice


@each("suffix", ["jpg", "png", "tif", "webp"])
def test_an_orientation_in_xmp_alone_is_ignored_as_viewers_do(tmp_path, suffix):
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    chunk = PngInfo()
    chunk.add_itxt("XML:com.adobe.xmp", xmp.decode())
    path = tmp_path / f"a.{suffix}"
    random_image(64, 96).save(path, pnginfo=chunk, xmp=xmp, tiffinfo={700: xmp})

    photo = open_photo(path)

    assert xmp in path.read_bytes()
    assert photo.size == (96, 64)


def encoded(mode, kind, **options):
    """The bytes of a picture (64, 96)."""
    file = io.BytesIO()
    Image.new(mode, (96, 64)).save(file, kind, **options)
    return file.getvalue()


DEEP_RGB = bytes.fromhex(  # a PNG of 16 bits a channel, which Pillow would clip in silence
    "89504E470D0A1A0A0000000D4948445200000001000000011002000000C0E78F9D0000000B49"
    "444154789C636000030000070001B286ACF40000000049454E44AE426082"
)
STRIP = b"\x17\x01\4\0\1\0\0\0"  # tag 279, one whole number: how many bytes there are


@each(
    "content, words",
    [
        (DEEP_RGB, "8 bits"),
        (encoded("I;16", "PNG"), "8 bits"),
        (encoded("I", "TIFF"), "8 bits"),
        (encoded("F", "TIFF"), "8 bits"),
        (encoded("RGB", "PPM"), "identify"),
        (encoded("RGB", "TIFF", tiffinfo={274: 6}), "orientation"),
        (encoded("RGB", "TIFF").replace(STRIP + b"\0\x48", STRIP + b"\0\0"), "missing sparse"),
    ],
    ids=range(7),
)
def test_photographs_and_masks_that_would_be_misread_are_refused_by_name(tmp_path, content, words):
    path = tmp_path / "a.png"
    path.write_bytes(content)

    assert_refused(f"{path} {words}", open_photo, path)
    assert_refused(f"{path} {words}", read_mask, data.read_classes(None), path)


def test_a_fourth_band_that_is_no_opacity_is_refused_unlike_soft_edges_and_lossy_opacity(tmp_path):
    pixels = np.full((50, 100, 4), 250)  # of lossy JPEG 2000, as is 5
    pixels[::2] = 5
    pixels[:, :9, 3] = 100  # soft edges
    soft = draw_png(f"{tmp_path}/soft.png", pixels)
    pixels[:, :11, 3] = 100
    infrared = draw_png(f"{tmp_path}/infrared.png", pixels)

    assert open_photo(soft).size == (100, 50)
    assert_refused(f"{infrared} fourth band", open_photo, infrared)


# ==== data.py: folders ====


@each(
    "root, masks, images, found",
    [
        (".", "", "a/images/1.jpg b/images/1.png", "a/masks/1.png b/masks/1.bmp"),
        (".", "", "images/train/1.jpg images/val/1.jpg", "masks/train/1.png masks/val/1.png"),
        (".", "", "Images/a/Images/1.jpg x/1.JPG", "Masks/a/Masks/1.png x/masks/1.png"),
        (".", "", "Urban/images_png/1.png 2.jp2", "Urban/masks_png/1.png masks/2.png"),
        ("imgs", "labels", "imgs/2.png imgs/t/1.jpg", "labels/2.png labels/t/1.tif"),
        (".", "labels", "t/1.jpg", "labels/t/1.png"),
    ],
)
def test_images_find_their_masks(tmp_path, root, masks, images, found):
    touch(tmp_path, f"{images} {found}")

    samples = data.find_samples(tmp_path / root, masks and tmp_path / masks)

    pairs = {(sample.image, sample.mask) for sample in samples}
    assert pairs == {(tmp_path / a, tmp_path / b) for a, b in zip(images.split(), found.split())}


def test_of_two_photographs_with_one_mask_neither_gets_it(tmp_path):
    touch(tmp_path, "images/a.jpg images/a.tif images/b.jpg masks/a.png masks/b.png")

    samples = data.find_samples(tmp_path, clicked=True)

    assert_refused("a.jpg a.tif masks/a.png", data.find_samples, tmp_path)
    assert [sample.mask for sample in samples] == [None, None, tmp_path / "masks/b.png"]


def test_links_are_followed_and_what_is_hidden_or_of_a_run_is_no_image(tmp_path):
    near = tmp_path / "near"
    touch(tmp_path / "far", "images/0.png masks/0.png")
    touch(near, "photos/1.png run/1.png run/config.json run/metrics.csv")
    touch(near, ".t/1.png @eaDir/1.png ._2.png")
    (near / "far").symlink_to(tmp_path / "far")
    (near / "loop").symlink_to(near)

    samples = data.find_samples(near)

    assert [sample.name for sample in samples] == ["far/images/0.png", "photos/1.png"]
    assert len(data.find_samples(near / "run")) == 1  # --data itself is never skipped


@each(
    "pattern, clicked, held_out",
    [
        ("", "", "t/2 t/3 [2]n/1"),
        ("t/*", "", "t/0 t/1 t/2 t/3"),
        ("[2]n/*", "", "[2]n/0 [2]n/1"),
        ("*/[13]", "", "t/1 t/3 [2]n/1"),
        ("", "t/0 t/1", "t/3 [2]n/0 [2]n/1"),
        ("t/*", "t/0 [2]n/0", "t/0 t/1 t/3"),
    ],
)
def test_images_are_held_out_by_folder_pattern_path_or_by_having_no_click(
    pattern, clicked, held_out
):
    names = ["t/0", "t/1", "t/2", "t/3", "[2]n/0", "[2]n/1"]
    samples = [data.Sample(name, Path(name), Path("mask")) for name in names]
    for sample in samples:
        sample.clicks = torch.zeros(1, 3) if sample.name in clicked else None
    if clicked:
        samples[2].mask = None  # neither mask nor click: in neither part

    training, scored = data.split(samples, pattern, clicked != "")

    assert " ".join(sample.name for sample in scored) == held_out
    others = [name for name in names if name not in held_out and name in (clicked or names)]
    assert [sample.name for sample in training] == others


# ==== data.py: what masks hold, and clicks from a file ====


def read_classes(folder, text, clicks=None):
    (folder / "classes.csv").write_text(text, "utf-8")
    return data.read_classes(text and folder / "classes.csv" or None, clicks)


def read_mask(classes, path):
    """As label map, for a photograph whose first pixel is transparent."""
    photo = Image.new("RGBA", (96, 80), "white")
    photo.putpixel((0, 0), (0, 0, 0, 0))
    return classes.read_mask(path, open_photo(photo))


@each(
    "mode, colors, text",
    [
        ("P", [0, 1, 2, 3], "Class;Color\nbackground;0\nroad;1\nwater;2\nfield;3\n;\n"),
        ("L", [1, 2, 3, 0], "class,color\nroad,1\nwater,2\nfield,3\n,0"),
        ("1", [0, 255], "class,color\nbackground,0\nbuilding,1"),
        ("L", [0, 255], "class,color\nground,#000000\nhouse,#FFFFFF"),
        (
            "RGB",
            [(255, 255, 255), (0, 0, 9), (7, 7, 7)],
            "class,color\na,white\nb,#000009\n,#070707",
        ),
        ("RGB", [(255, 255, 255), (0, 0, 9)], "name, r, g, b\nroad, 255, 255, 255\nsea, 0, 0, 9"),
        ("RGBA", PALETTE, ""),
    ],
)
def test_classes_file_says_what_the_masks_hold(tmp_path, mode, colors, text):
    blocks = make_photos(tmp_path, colors, mode)
    classes = read_classes(tmp_path, text)

    label_map = read_mask(classes, f"{tmp_path}/masks/3.png")

    want = np.where(blocks < len(classes.names), blocks, IGNORE_INDEX)
    want[0, 0] = IGNORE_INDEX
    assert np.array_equal(label_map, want)
    assert len(set(classes.palette)) == len(classes.names)  # colours of their own


def test_what_a_mask_hides_has_no_label_whatever_its_colour(tmp_path):
    pixels = np.full((80, 96, 3), 255)
    pixels[:40] = 9  # of no class
    mask = draw_png(tmp_path / "a.png", pixels, transparency=(9, 9, 9))

    label_map = read_mask(read_classes(tmp_path, "class,color\nland,0\nhouse,255"), mask)

    assert (label_map[:40] == IGNORE_INDEX).all()
    assert (label_map[40:] == 1).all()


@each("second, refused", [((2, 2, 2), True), ((9, 9, 9), True), ((9, 8, 7), False)])
def test_a_palette_is_to_look_at_but_not_greys_in_another_order_than_their_indices(
    tmp_path, second, refused
):
    index = np.uint8([[0, 1, 2] * 32] * 80)
    mask = Image.fromarray(index)
    mask.putpalette([1, 1, 1, *second, 0, 0, 0])  # 9 was forgotten in the file of classes
    mask.save(tmp_path / "a.png")
    classes = read_classes(tmp_path, "class,color\na,0\nb,1\nc,2")

    if refused:
        assert_refused("a.png indices greys", read_mask, classes, tmp_path / "a.png")
    else:
        assert np.array_equal(read_mask(classes, tmp_path / "a.png")[1:], index[1:])


@each(
    "text, words",
    [
        ("name,color\na,#123456", "line 1 name,r,g,b"),
        ("class,color\na,#123456\n,#000000", "2"),
        ("class,color\na,256\nb,1", "line 2 256"),
        ("class,color\na,#123456\n\nA,#123457", "line 4"),
        ("class,color\na,#123456\nb,7", "colour number"),
        ("name,r,g,b\na,1,2,3\nb,1,2", "line 3"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused(tmp_path, text, words):
    assert_refused("classes.csv " + words, read_classes, tmp_path, text)


def test_colours_of_no_class_are_counted_and_above_a_tenth_refused(tmp_path):
    classes = data.read_classes(None)
    mask = np.full((80, 96, 3), PALETTE[0])
    mask[:8] = 255, 255, 0  # a tenth, but for a hidden pixel

    read_mask(classes, draw_png(f"{tmp_path}/a.png", mask))
    mask[8, :2] = 0, 1, 2
    draw_png(f"{tmp_path}/b.png", mask)

    assert classes.strays == {"#FFFF00": 767}  # 8 · 96, but for that one
    words = "b.png 10% #FFFF00 #000102 8 bits"
    assert_refused(words, read_mask, classes, f"{tmp_path}/b.png")


def write_clicks(folder, *rows, header="image,x,y,class,color"):
    path = folder / "my.csv"
    path.write_text("\n".join([header, *rows]), "utf-8")
    return path


def test_classes_of_clicks_with_colors_are_in_alphabetical_order_whatever_that_of_the_rows(
    tmp_path,
):
    rows = ["a,1,1,sea,#0072B2", "a,1,2,sea,", "a,1,3,mud,#d55e00", "a,1,4,ice,#009E73"]
    grey = draw_png(f"{tmp_path}/a.png", np.full((80, 96), 155))  # Dubai's Unlabeled

    for order in (rows, rows[::-1]):
        classes = data.read_classes(None, write_clicks(tmp_path, *order))
        label_map = read_mask(classes, grey)

        assert classes.names == ["ice", "mud", "sea"]
        assert classes.palette == [(0, 158, 115), (213, 94, 0), (0, 114, 178)]
        assert (label_map == IGNORE_INDEX).all()


@each(
    "color, text, names",
    [
        ("#3C1098", "", [*CLASSES]),  # Dubai's Building
        ("", "", [*CLASSES]),
        ("#123456", "class,color\na,1\nb,2", ["a", "b"]),
    ],
)
def test_clicks_with_dubais_colors_or_none_are_dubais_and_classes_win_over_them(
    tmp_path, color, text, names
):
    clicks = write_clicks(tmp_path, f"a,1,1,Building,{color}")

    classes = read_classes(tmp_path, text, clicks)

    assert classes.names == names


@each("row", ["a,1,2,sea,#D55E00", "a,1,2,mud,#0072B2"])
def test_two_colors_for_a_class_or_two_classes_for_a_color_are_refused_with_both_lines(
    tmp_path, row
):
    clicks = write_clicks(tmp_path, "a,1,1,ice,#009E73", "a,1,1,sea,#0072B2", "a,1,1,sea,", row)

    assert_refused("my.csv line 5 line 3", data.read_classes, None, clicks)


PIXELS = noise(6, 8, 3)


def clicks_of(folder, text, classes="", encoding="utf-8", pixels=PIXELS, name="a.tif", **options):
    """The clicks on é/NAME in a file of this text."""
    draw_png(f"{folder}/é/{name}", pixels, **options)
    (folder / "my.csv").write_text(text, encoding, newline="")
    names = [f"é/{name}", "b/b.tif", "c/b.tif"]
    samples = [data.Sample(name, folder / name, None) for name in names]
    data.read_clicks(folder / "my.csv", samples, read_classes(folder, classes))
    return samples[0].clicks.tolist()


@each(
    "text",
    [
        "image;x;y;class\na.tif;3;4;Road\n;;;\na.tif;7,5;0,25;Land\n;;;\n\n",
        "image\tx\ty\tclass\na.tif\t3,9\t4,0\tRoad\na.tif\t7\t0\tLand",
        "sep=;\r\nimage;x;y;class\r\na.tif;3;4;Road\r\na.tif;7;0;Land\r\n",
        "X,Y,id,Image,Class\r\n3,4,1,a.tif,Road\r\n7,0,2,a.tif,Land",  # of QGIS
        'image, x, y, class\n "a.tif" , 3, "4", "Road" \na.tif , 7,0 , Land',
        '"image","x","y","class"\n"a.tif",3,4,Road\na.tif,7,0,Land,\n',
        'image,x,y,class,note\na.tif,3,4,Road,"1\n2"\na.tif,7,0,Land',
        f"image,x,y,class,note\na.tif,3,4,Road,{'x' * 140_000}\na.tif,7,0,Land",
        "image,x,y,class\na.tif,3.9,4.0,2.0\na.tif,8,0.0,1",
        "Image,X,y,CLASS\nA.TIF,3,4,ROAD\na.tif,7,0,land",
        "image,x,y,class\na.png,3,4,Road\né/A.JPG,7,0,Land",
        "image,x,y,class\n.\\é\\a.tif,3,4,Road\ne\u0301/a.tif,7,0,Land",
        "image,x,y,class,width,height\na.tif,3,4,Road,8,6\na.tif,7,0,Land,,",
        "image,x,y,class\na.tif,3,4,Road\na.tif,3.5,4,Road\na.tif,7,0,Land",
    ],
    ids=range(14),
)
@each("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_clicks_are_read_in_the_forms_in_which_tools_write_them(tmp_path, encoding, text):
    clicks = clicks_of(tmp_path, text, encoding=encoding)

    assert clicks == [[7, 0, 1], [3, 4, 2]]  # in row order


@each(
    "text, words",
    [
        ("image,x,y,class,X\na.tif,1,1,Road,2", "two x"),
        ('image,x,y,class\na.tif,"1,032",1,Road', "line 2 1,032"),
        ("image,x,y,class\nb.tif,1,1,Road", "line 2 b.tif"),
        ("image,x,y,class\na.1,1,1,Road", "line 2 a.1"),  # a name with a dot, not a.tif
        ("image,x,y,class\na.tif,1,1,Road\n\na.tif,1.5,1,Land", "line 4 line 2"),
        ('image,x,y,class\na.tif,1,1,"Road\na.tif,2,2,Road', "quote"),
        ("image,x,y,class\na.tif,1,1,Road,7", "line 2 header"),
        ('image,x,y,class,note\na.tif,1,1,Road,"1\n2"\n\na.tif,9,1,Road', "line 5 8×6"),
        ("image,x,y,class,width,height\na.tif,1,1,Road,4,3", "line 2 4×3 8×6"),
        ("image,x,y,class,width,height\na.tif,1,1,Road,6,8", "line 2 6×8 8×6"),
        ("image,x,y,class\na.tif,1,1,Lake", "line 2 Lake Water"),
        ("image,map_x,map_y,class\na.tif,1,1,Road", "line 2 a.tif GeoTIFF"),
    ],
)
def test_clicks_that_can_be_read_in_two_ways_or_none_are_refused_by_line(tmp_path, text, words):
    assert_refused("my.csv " + words, clicks_of, tmp_path, text)


@each("name", ["b.1", "f 3.5m"])
def test_a_dot_in_a_name_does_not_begin_a_suffix(tmp_path, name):
    text = f"image,x,y,class\n{name},3,4,Road"

    assert clicks_of(tmp_path, text, name=f"{name}.png") == [[3, 4, 2]]


TIE = {33550: (2.0, 2.0, 0.0), 33922: (2.0, 1.0, 0.0, 1004.0, 4998.0, 0.0)}
MATRIX = {34264: (1.2, 1.6, 0.0, 1e3, 1.6, -1.2, 0.0, 5e3, *[0.0] * 8)}
POINT = {34735: (1, 1, 0, 2, 1024, 0, 1, 1, 1025, 0, 1, 2)}  # PixelIsPoint
AREA = {34735: (1, 1, 0, 2, 1024, 0, 1, 1, 1025, 0, 1, 1)}
WORLD = "1.2 1.6 1.6 -1.2 1000 5000"


@each(
    "photo, tags, world, place",
    [
        ("a.tif", TIE, "", "1006.2;4990.2"),
        ("a.tif", TIE | AREA, "a.tfw", "1006.2;4990.2"),
        ("a.tif", TIE | POINT, "", "1005.2;4991.2"),
        ("a.tif", MATRIX, "", "1011.56;4999.08"),
        ("a.tif", MATRIX | POINT, "", "1010.16;4998.88"),
        ("a.tif", AREA, "a.tfw", "1010.16;4998.88"),
        ("a.png", {}, "a.PGW", "1010.16;4998.88"),
    ],
)
def test_clicks_in_map_coordinates_are_those_in_pixels(tmp_path, photo, tags, world, place):
    text = f"image;map_x;map_y;class\n{photo};{place};Road"  # at (3.1, 4.9)
    (tmp_path / "é").mkdir()
    (tmp_path / "é" / (world or "none")).write_text(WORLD)

    assert clicks_of(tmp_path, text, name=photo, tiffinfo=tags) == [[3, 4, 2]]


@each(
    "tags, world",
    [
        ({33550: TIE[33550]}, ""),
        (TIE | {33922: (0.0, 0.0)}, ""),
        ({}, "1 2 3 4 5"),
        ({}, "0 0 0 0 1000 5000"),
    ],
)
def test_incomplete_georeferences_are_refused_by_the_name_of_the_photograph(tmp_path, tags, world):
    text = "image,map_x,map_y,class\na.tif,1,2,Road"
    touch(tmp_path, "é/a.tfw")
    (tmp_path / "é/a.tfw").write_text(world)

    assert_refused("my.csv line 2 é/a.tif give x, y", clicks_of, tmp_path, text, tiffinfo=tags)


def test_clicks_on_transparent_pixels_are_dropped_and_reported(tmp_path, capsys):
    pixels = np.full((6, 8, 4), 255)
    pixels[:, 3, 3] = 0
    text = "image,x,y,class\na.tif,3,4,Road\na.tif,5,4,Land"

    assert clicks_of(tmp_path, text, pixels=pixels) == [[5, 4, 1]]

    assert "é/a.tif: 1 clicks dropped" in capsys.readouterr().out


def test_clicks_on_a_photograph_stored_rotated_are_on_the_upright_picture(tmp_path):
    text = "image,x,y,class,width,height\na.tif,5,7,Road,6,8"

    assert clicks_of(tmp_path, text, format="PNG", exif=ROTATED) == [[5, 7, 2]]


# ==== unet.py: the network ====

TRAINED = {
    "classes": ["sand", "sea", "road", "roof", "tree"],
    "palette": [*range(256)] * 3,
    "scale": 0.5,
    "window": 48,
}


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    """A network that learnt nothing but sees every class somewhere, and its checkpoint."""
    torch.manual_seed(0)
    net = UNet(5, weights=None)
    vars(net).update(TRAINED)
    net.head.weight.data *= 1000
    net.head.bias.data -= net.logits(random_image(64, 96)).mean((1, 2))
    net.checkpoint = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    torch.save({"model": net.state_dict(), "settings": TRAINED}, net.checkpoint)
    yield net
    net.checkpoint.unlink()  # 90 MB


@each("key", [None, "state_dict", "model"])  # torchvision and smp, Lightning, ours
@each("prefix", ["", "encoder."])
def test_encoder_is_the_resnet34_of_a_file_on_a_normalised_image(tmp_path, key, prefix):
    resnet = resnet34().eval()
    tensors = {prefix + name: tensor for name, tensor in resnet.state_dict().items()}
    torch.save({key: tensors} if key else tensors, tmp_path / "r34.pth")
    pixels = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    image = normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    want = torch.nn.Sequential(*list(resnet.children())[:-2])(image)
    seen = []

    net = UNet(5, weights=tmp_path / "r34.pth").eval()
    net.encoder.layer4.register_forward_hook(lambda part, inputs, output: seen.append(output))
    for dtype in (torch.uint8, torch.int64):
        net(pixels.to(dtype))
    net(pixels / 255)

    assert_close(seen, [want] * 3, rtol=1e-3, atol=1e-3)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FOREIGN = saved({"model": {}, "settings": {"classes": [1, 2]}})


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@each("content", [FOREIGN, saved({}), saved([1]), b"", b"cos\nmkdir\n(S'owned'\ntR."], ids=range(5))
def test_wrong_weights_and_checkpoints_are_refused_by_name(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("a.pt").write_bytes(content)

    assert_refused("a.pt", UNet, 5, weights="a.pt")
    assert_refused("a.pt", UNet.load, "a.pt")

    assert not Path("owned").exists()  # no code was run


@each("mode", ["RGB", "L", "RGBA", "CMYK"])
@each("size", [(201, 125), (5, 200)])
def test_predict_is_the_argmax_of_the_logits_enlarged_to_the_photograph(net, mode, size):
    image = random_image(*size).convert(mode)

    class_map = net.predict(image)

    enlarged = F.interpolate(net.logits(image)[None], size=size, mode="bilinear")[0]
    assert (class_map == enlarged.argmax(0).numpy()).mean() > 0.999


def test_windows_are_blended_where_they_overlap(net, float32):
    image = random_image(160, 220)
    x = pil_to_tensor(image.resize((110, 80), Image.BILINEAR))[None]
    rise = np.bartlett(50)[1:-1]  # a triangle of 48 weights
    weight = torch.tensor(np.outer(rise, rise))
    total = torch.zeros(5, 80, 110)
    weights = torch.zeros(80, 110)
    for top in (0, 32):
        for left in (0, 36, 62):  # they overlap by a quarter or more
            window = np.s_[..., top : top + 48, left : left + 48]
            total[window] += net(x[window])[0] * weight
            weights[window] += weight

    logits = net.logits(image)

    assert_close(logits, total / weights, rtol=1e-4, atol=1e-3)


@each("scale", [0.3, 0.5, 1])
def test_the_map_of_a_tall_mosaic_is_the_same_in_strips_as_at_once(
    net, float32, monkeypatch, scale
):
    monkeypatch.setattr(net, "scale", scale)
    monkeypatch.setattr(unet, "STEPS", 4)  # 144 rows of the network, less than half of these
    mosaic = random_image(round(360 / scale), round(60 / scale))
    in_strips = net.predict(mosaic)
    monkeypatch.setattr(unet, "STEPS", 999)

    at_once = net.predict(mosaic)

    assert np.array_equal(in_strips, at_once)
    assert len(np.unique(at_once)) == 5


def test_large_photographs_need_little_memory():
    code = (
        "import resource, sys; from PIL import Image; from unet import UNet\n"
        "def peak(): return resource.getrusage(0).ru_maxrss\n"
        "net = UNet(5, None); net.scale = 0.05; before = peak()\n"
        "net.predict(Image.new('RGB', (5000, 5000)))\n"
        "print((peak() - before) // (2**20 if sys.platform == 'darwin' else 2**10))"
    )

    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, stdout=-1, check=True)

    assert int(run.stdout) < 800  # MiB; measured 645 to 711, with all classes enlarged at once 890


def test_a_picture_of_more_than_8_bits_is_refused_like_its_file(net):
    assert_refused("8 bits", net.predict, Image.new("I;16", (64, 64)))


# ==== unet.py: the command line ====


@pytest.fixture
def draw_maps(net, tmp_path, monkeypatch):
    """`python unet.py CHECKPOINT …` in an empty folder. Returns the exit status or message."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["", str(net.checkpoint), "--device=cpu", *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(unet.__file__, run_name="__main__")
        return end.value.code

    return command


def save_photos(*names, **options):
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        random_image(64, 96).save(name, **options)


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.*")}


def test_map_shows_the_predicted_classes_and_confidence_their_probability(draw_maps, net, capsys):
    save_photos("a.jpg")
    class_map = net.predict("a.jpg")

    assert draw_maps("a.jpg", "--confidence") == 0

    assert f" sand {np.mean(class_map == 0):.1%}" in capsys.readouterr().out
    picture = Image.open("maps/a.png")
    assert np.array_equal(picture, class_map) and picture.getpalette() == net.palette
    sure = Image.open("maps/a_confidence.png").reduce(2)
    want = 255 * net.logits("a.jpg").softmax(0).amax(0)  # (32, 48)
    assert np.abs(np.array(sure) - want.numpy()).mean() < 5


@each("hides", ["nodata", "mask"])
def test_what_a_tiff_hides_is_255_in_its_map_and_of_no_confidence(draw_maps, hides):
    hidden = np.indices((64, 96))[1] < 30
    pixels = noise(64, 96, 3).astype(np.uint8)
    pixels[hidden] = 7
    pixels[9, 50] = 7, 7, 8  # dark water, not nodata
    pages = [(pixels, {42113: "7"})]
    if hides == "mask":
        pages = [(pixels, {}), (~hidden, {254: 4}), (~hidden[::2], {254: 5})]  # 5: of an overview
    with TiffImagePlugin.AppendingTiffWriter("a.tif", new=True) as file:
        for picture, tags in pages:
            Image.fromarray(picture).save(file, "TIFF", tiffinfo=tags)
            file.newFrame()
    # GDAL's photometric interpretation (tag 262) of masks is 4. Pillow writes 1.
    tag = b"\x06\1\3\0\1\0\0\0"
    Path("a.tif").write_bytes(Path("a.tif").read_bytes().replace(tag + b"\1", tag + b"\4"))

    draw_maps("a.tif", "--confidence")

    assert np.array_equal(np.array(Image.open("maps/a.png")) == 255, hidden)
    assert np.array_equal(np.array(Image.open("maps/a_confidence.png")) == 0, hidden)


def test_what_is_transparent_everywhere_is_reported_by_name(draw_maps, capsys):
    Image.new("RGBA", (64, 64)).save("clear.png")

    draw_maps("clear.png")

    assert "clear.png transparent everywhere" in capsys.readouterr().out
    assert Image.open("maps/clear.png").getextrema() == (255, 255)


def test_maps_lie_as_their_photographs_do_and_no_error_stops_the_others(draw_maps, capsys):
    save_photos("a/1.jpg", "a/1.2.jpg", "b/1.jpg", "b/2.TIF", "b/2.webp", "b/masks/1.png")
    Path("b/0.jpg").write_text("no photograph")

    assert draw_maps("a/1.jpg", "a/1.2.jpg", "b") == 1

    assert files_below("maps") == {"a/1.png", "a/1.2.png", "b/1.png", "b/2.png"}
    errors = capsys.readouterr().err.splitlines()
    # Two photographs with one map are told first, before anything is computed.
    assert [error.split(":")[1] for error in errors] == [" b/2.webp", " b/0.jpg"]


@each("existing", ["a.png", "a.pgw", "a_confidence.png"])
def test_nothing_that_exists_is_overwritten(draw_maps, existing):
    save_photos("a.jpg")
    touch(Path.cwd(), f"a.jgw maps/{existing}")

    message = draw_maps("a.jpg", "--confidence")

    assert message.startswith("error: nothing is left to do")
    assert files_below("maps") == {existing}
    assert not Path("maps", existing).read_bytes()


def test_maps_and_masks_among_the_photographs_are_never_mapped(draw_maps, tmp_path):
    save_photos("in/1.jpg", "in/t/images/2.png", "in/t/masks/2.png")
    save_photos("in/3.tif", tiffinfo=TIE)

    for out in ("in/maps1", f"{tmp_path}/in/t/maps2", "in"):
        draw_maps("in", "--out", out, "--confidence")

    drawn = files_below("in/maps1")
    assert drawn == files_below("in/t/maps2") and len(drawn) == 6
    photos = [sample.name for sample in data.find_samples(Path("in"))]
    assert photos == ["1.jpg", "3.tif", "t/images/2.png"]


@each(
    "photo, world, kept",
    [
        ("a.jpg", "a.jgw", "maps/a.pgw"),
        ("a.jpg", "a.jpgw", "maps/a.pgw"),
        ("a.png", "a.WLD", "maps/a.pgw"),
        ("a.tif", "a.tfw", "maps/a.tfw"),
    ],
)
def test_maps_keep_their_photographs_place_but_a_world_file_not_if_it_is_rotated(
    draw_maps, photo, world, kept
):
    tags = {34735: (3072, 32640), 34736: (6378137.0, 298.25), 34737: "WGS 84|"}
    save_photos(photo, tiffinfo={**tags, 42113: "0"})
    save_photos("b.jpg", exif=ROTATED)
    Path(world).write_text("here")
    touch(Path(), "b.jgw")  # fits the pixels as they are stored, and not the map

    draw_maps(photo, "b.jpg", "--confidence")

    assert Path(kept).read_text() == "here" and len(list(Path("maps").glob("*w"))) == 2
    if photo == "a.tif":
        for name in ("maps/a.tif", "maps/a_confidence.tif"):
            written = Image.open(name).tag_v2
            assert tags == {tag: written[tag] for tag in tags}
            assert 42113 not in written  # it would make class 0 transparent


@each("n", [1, 2, 3, 4])
@each("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_all_files_of_a_photograph_appear_together_and_the_same_command_goes_on(
    draw_maps, capsys, error, n
):
    save_photos("a.jpg", "b.jpg")
    a, b = {"a.png", "a_confidence.png"}, {"b.png", "b_confidence.png"}
    effects = [DEFAULT] * (n - 1) + [error] + [DEFAULT] * 9

    with patch("os.replace", Mock(wraps=os.replace, side_effect=effects)):
        status = draw_maps("a.jpg", "b.jpg", "--confidence")
    drawn = files_below("maps")
    again = draw_maps("a.jpg", "b.jpg", "--confidence")

    assert status in (1, "error: interrupted") and drawn in (set(), a, b)
    assert again == 0 and files_below("maps") == a | b
    assert ("1 photographs have maps" in capsys.readouterr().out) == (drawn != set())


# ==== train.py: whole runs ====

QUICK = "--weights=none --size=48 --batch-size=4 --scale=0.6 --epochs=2 --lr=0.01"


@pytest.fixture(scope="session", autouse=True)
def short_epochs():
    """Two steps an epoch, of four crops each."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "MIN_STEPS", 1)
        monkeypatch.setattr(train, "CROPS_PER_IMAGE", 4)
        yield


def flags_for(photos, flags=""):
    points = "" if "--clicks" in flags else "--points 20"
    return f"--device cpu --data {photos} --out {photos.parent}/run {QUICK} {points} {flags}"


def cli(flags):
    """train.py in this process. It ends in SystemExit where a user sees one line of error."""
    unet.run(lambda: train.main(train.parse_args(flags.split())))


def fit(photos, flags=""):
    cli(flags_for(photos, flags))


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run on four photographs, which nothing may change."""
    folder = tmp_path_factory.mktemp("finished")
    make_photos(folder / "photos", [*PALETTE, (0, 0, 0)])
    fit(folder / "photos")
    return folder / "run"


@pytest.fixture
def photos(finished, tmp_path):
    yield shutil.copytree(finished / "../photos", tmp_path / "photos")
    shutil.rmtree(tmp_path)  # checkpoints are large


@pytest.fixture
def out(photos):
    return photos.parent / "run"


def test_demo_as_a_user_starts_it(tmp_path):
    flags = ["--demo", "--epochs=1", "--scale=0.25", "--size=48", "--batch-size=8"]
    command = [sys.executable, HERE / "train.py", *flags]
    printed = subprocess.check_output(command, cwd=tmp_path, text=True)

    (out,) = tmp_path.glob("runs/*")
    miou = float(table(f"{out}/metrics.csv")[0]["miou"])
    assert 0.2 < miou < 1 and f"mIoU {miou:.3f}" in printed


def test_scores_are_those_of_predict_at_the_held_out_masks_own_resolution(finished):
    model = UNet.load(f"{finished}/checkpoint.pt")
    masks = np.array([Image.open(f"{finished}/../photos/masks/{i}.png") for i in (2, 3)])
    guess = np.array([model.predict(f"{finished}/../photos/images/{i}.png") for i in (2, 3)])
    truth = np.full(guess.shape, 255)
    for c, color in enumerate(PALETTE):
        truth[(masks == color).all(-1)] = c
    guess, truth = guess[truth != 255], truth[truth != 255]  # (P,)

    ious = []
    for c in range(5):
        either = (guess == c) | (truth == c)
        ious.append((guess == truth)[either].sum() / either.sum())

    row = table(f"{finished}/metrics.csv")[-1]
    assert float(row["pixel_accuracy"]) == pytest.approx((guess == truth).mean(), abs=1e-6)
    scores = [float(row[name]) for name in row if "iou" in name]  # the mean comes first
    assert scores == pytest.approx([np.mean(ious), *ious], abs=1e-6)


def test_picture_shows_clicks_of_training_images_alone_and_the_truth_that_was_read(finished):
    rows = np.array(Image.open(f"{finished}/predictions.png"))[-4 * 340 :]
    # Cells (300, 360, 3): image, clicks, prediction, ground truth.
    cells = rows.reshape(4, 340, 4, 370, 3).swapaxes(1, 2)[:, :, :300, 5:365]
    last = table(f"{finished}/clicks.csv")[19]  # drawn over the others of its image
    x, y = (int((int(last[name]) + 0.5) * 3.75) for name in "xy")
    mask = np.array(Image.open(f"{finished}/../photos/masks/3.png"))
    mask[~mask.any(-1)] = train.GREY

    assert tuple(cells[0, 1, y, x]) == PALETTE[CLASSES.index(last["class"])]
    assert (cells[2:, 1] == 255).all()
    assert np.array_equal(cells[3, 3, 1::15, 1::15], mask[::4, ::4])


def assert_same_run(out, finished):
    for name in ("metrics.csv", "clicks.csv"):
        assert table(f"{out}/{name}") == table(f"{finished}/{name}")


def test_clicks_of_a_run_give_the_same_run_back_and_their_masks_are_never_read(
    finished, photos, out
):
    (photos / "masks/0.png").write_bytes(b"no picture")
    os.remove(photos / "masks/1.png")

    fit(photos, f"--clicks {finished}/clicks.csv")

    assert_same_run(out, finished)


def test_held_out_images_without_a_mask_are_scored_at_their_clicks(finished, photos, out):
    shutil.rmtree(photos / "masks")
    clicks = shutil.copy(finished / "clicks.csv", photos)
    with open(clicks, "a") as file:
        file.writelines(f"images/3.png,{10 * c},30,{name}\n" for c, name in enumerate(CLASSES))

    fit(photos, f"--epochs 1 --clicks {clicks} --hold-out *3.png")

    accuracy = table(f"{out}/metrics.csv")[0]["pixel_accuracy"]
    guess = UNet.load(f"{out}/checkpoint.pt").predict(f"{photos}/images/3.png")
    assert float(accuracy) == np.mean(guess[30, :50:10] == range(5))


@each(
    "able, precision, weights, rate",
    [("none", "float32", "none", 0.5), ("amx_bf16", "bfloat16", "r34.pth", 0.05)],
)
def test_loop_uses_its_precision_the_areas_and_a_tenth_of_the_rate_where_pretrained(
    photos, monkeypatch, able, precision, weights, rate
):
    monkeypatch.chdir(photos)
    torch.save(resnet34().state_dict(), "r34.pth")
    loss = watch(monkeypatch, train, "partial_focal_cross_entropy")
    sampler = watch(monkeypatch, train, "WeightedRandomSampler")
    cycle = watch(monkeypatch, torch.optim.lr_scheduler, "OneCycleLR")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {able: True})

    fit(photos, f"--epochs 1 --lr 0.5 --scale 0.5 --weights {weights}")

    assert sampler.call_args.args == ([48 * 40] * 2, 8)  # without the padding
    assert cycle.call_args.args[1:] == ([rate, 0.5], 2)
    assert str(loss.call_args.args[0].dtype) == f"torch.{precision}"


def test_own_classes_are_trained_on_and_what_cannot_be_used_is_told(photos, out, capsys):
    make_photos(photos, [0, 255, 7], "L")
    draw_png(f"{photos}/masks/0.png", np.full((80, 96), 7))  # no label in it
    draw_png(f"{photos}/images/1.png", noise(96, 80, 3), exif=ROTATED)
    read_classes(photos, "class,color\nGrund,0\nGebäude 道路,255\n,7\nA,1")

    fit(photos, f"--epochs 1 --points all --classes {photos}/classes.csv")

    told = capsys.readouterr().out
    assert "1 images left out" in told and "without labels" in told and "1 photographs are" in told
    assert table(f"{out}/metrics.csv")[0]["iou_Gebäude 道路"]
    assert not table(f"{out}/clicks.csv")


# ==== train.py: options, and everything that goes wrong ====


def test_what_is_typed_wins_over_the_demo_or_the_resumed_run_and_these_over_the_defaults(finished):
    demo = train.parse_args(["--demo", "--epochs=9"])
    pretrained = train.parse_args(["--demo", "--weights=imagenet"])
    resumed = train.parse_args([f"--resume={finished}", "--data=/elsewhere"])

    assert (demo.data, demo.epochs, demo.weights, demo.size) == (str(DEMO), 9, "none", 64)
    assert pretrained.weights == "imagenet"
    assert (resumed.data, resumed.epochs, resumed.size) == ("/elsewhere", 2, 48)
    assert_refused("--points --clicks", train.parse_args, ["--points=5", "--clicks=a"])


@each(
    "flags",
    [
        "--epochs 0",
        "--gamma -1",
        "--seed 99999999999999999999",
        "--wieghts none",
        "--device gpu7",
        "--hold-out nothing/*",
        "--hold-out *",
        "--out /dev",
        "--demo",
        "--data /dev/shm/nothing",
        f"--data {__file__}",
    ],
)
def test_a_wrong_flag_is_named_and_nothing_is_written(photos, out, flags):
    assert_refused(f"error: {flags}", fit, photos, flags)

    assert not out.exists()


@each("flag", ["--classes", "--clicks", "--weights", "--resume"])
def test_a_file_that_is_not_there_is_named_and_nothing_is_written(photos, out, flag):
    assert_refused("error: nowhere", fit, photos, f"{flag} nowhere")

    assert not out.exists()


@each("name", ["images/0.png", "images/3.png", "masks/0.png", "masks/3.png"])
def test_a_broken_picture_is_named_and_nothing_is_written(photos, out, name):
    os.truncate(photos / name, 90)

    assert_refused(f"error: {name}", fit, photos)

    assert not out.exists()


def test_masks_that_are_missing_of_another_size_or_twice_there_are_told(photos):
    draw_png(photos / "masks/1.png", noise(9, 9))
    assert_refused("error: masks/1.png (9, 9) (96, 80)", fit, photos)

    draw_png(photos / "masks/1.bmp", noise(80, 96))
    assert_refused("error: masks/1.bmp masks/1.png", fit, photos)

    os.remove(photos / "masks/2.png")
    os.remove(photos / "masks/1.png")
    assert_refused("error: images/2.png mask --masks", fit, photos)


def test_a_loss_that_is_not_finite_is_told(photos, monkeypatch):
    loss = watch(monkeypatch, train, "partial_focal_cross_entropy")
    loss.side_effect = lambda logits, labels, **options: logits[:, 0] * math.nan

    assert_refused("error: epoch 1/2 1/2 finite --lr", fit, photos)


def assert_goes_on(out, finished):
    """Resumed, a run ends like one left alone, with the photographs elsewhere."""
    cli(f"--resume {out} --data {finished.parent}/photos")
    assert_same_run(out, finished)
    assert len(os.listdir(out)) == 5


@each("accident", ["checkpoint.pt", "metrics.csv", "images/2.png", "interrupted"])
def test_what_happens_before_the_first_scores_is_told_and_the_run_goes_on(
    finished, photos, out, monkeypatch, accident
):
    evaluate = train.evaluate

    def happen(*arguments):
        if accident == "interrupted":
            raise KeyboardInterrupt
        elif accident == "images/2.png":
            os.remove(photos / accident)
        else:
            (out / f"{accident}.partial").symlink_to("/dev/full")
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", happen)
        assert_refused(accident, fit, photos)

    assert not list(out.glob("*.partial"))
    assert_goes_on(out, finished)


def test_a_run_killed_between_metrics_csv_and_the_checkpoint_repeats_the_epoch(
    finished, photos, out
):
    code = (
        "import os, signal, train; train.MIN_STEPS, train.CROPS_PER_IMAGE = 1, 4\n"
        "def replace(old, new, rename=os.replace):\n"
        "    if new.name == 'checkpoint.pt' and new.with_name('metrics.csv').exists():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    rename(old, new)\n"
        "os.replace = replace; train.main(train.parse_args())"
    )

    killed = subprocess.run(
        [sys.executable, "-c", code, *flags_for(photos).split()], cwd=HERE, check=False
    )

    assert killed.returncode == -signal.SIGKILL
    assert table(out / "metrics.csv") == table(finished / "metrics.csv")[:1]
    assert torch.load(out / "checkpoint.pt")["history"] == []  # the epoch is not in it
    assert_goes_on(out, finished)


@each(
    "name, content, words",
    [
        ("config.json", b"{}", "config.json version"),
        ("checkpoint.pt", b"", "checkpoint.pt"),
        ("checkpoint.pt", FOREIGN, "checkpoint.pt version"),
        ("clicks.csv", b"image,x,y,class\n", "clicks"),
    ],
    ids=range(4),
)
def test_resume_refuses_what_is_not_of_that_run(finished, out, name, content, words):
    shutil.copytree(finished, out)
    (out / name).write_bytes(content)

    assert_refused(words, cli, f"--resume {out}")


@each(
    "flags, words",
    [("--epochs 9", "epochs"), (f"--data {DEMO}", "images"), ("--clicks a", "--points")],
)
def test_resume_refuses_other_options_and_photographs(finished, flags, words):
    assert_refused(words, cli, f"--resume {finished} {flags}")


def test_of_two_runs_in_one_folder_or_in_the_same_second_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda text: "runs/now")
    run = train.parse_args([]), torch.device("cpu")

    train.create_run(*run)

    assert_refused("--out runs/now another run", train.create_run, *run)


def test_a_programmers_mistake_is_a_traceback(photos, monkeypatch):
    monkeypatch.setattr(train, "evaluate", Mock(side_effect=RuntimeError))

    with pytest.raises(RuntimeError):
        fit(photos)


# ==== the Kaggle client, for real ====


@pytest.fixture
def kaggle_server(tmp_path, monkeypatch):
    """A loopback server in Kaggle's place. The installed client talks to it over HTTP."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"{data.FOLDER}/a.jpg", "photo")
    state = {"status": 200, "body": archive.getvalue(), "tokens": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read1()  # only here: a download that goes on has no body
            state["tokens"].append(str(self.headers["Authorization"]))
            self.do_GET()

        def do_GET(self):
            self.send_response(state["status"])
            self.send_header("Content-Length", len(state["body"]))
            self.end_headers()
            self.wfile.write(state["body"])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", Mock())  # the client waits between its tries
    # A new home, and a new import, at which the client logs in.
    with patch.dict(os.environ, {"HOME": f"{tmp_path}"}, clear=True), patch.dict(sys.modules):
        monkeypatch.setattr("kagglesdk.kaggle_http_client.get_endpoint", lambda env: state["url"])
        yield state


@each(
    "file, content, token, change, reason",
    [
        ("none", "", "None", {"status": 403}, "403"),
        ("kaggle.json", '{"username": "a", "key": "a"}', "Basic YTph", {"status": 500}, "500"),
        (
            ".kaggle/kaggle.json",
            '{"username": "a", "key": "a"}',
            "Basic YTph",
            {"url": "ftp:"},
            "ftp",
        ),
        (".kaggle/access_token", "KGAT_a", "Bearer KGAT_a", {"body": b"no zip"}, "zip"),
    ],
)
def test_download_tells_why_it_failed_and_a_second_run_heals_it_and_uses_a_token_if_there_is_one(
    kaggle_server, file, content, token, change, reason
):
    Path(".kaggle").mkdir()
    Path(file).write_text(content)
    words = f"{reason} unzip KAGGLE_API_TOKEN access_token kaggle.json --demo"

    with patch.dict(kaggle_server, change):
        assert_refused(words, cli, "--out run")
    assert os.listdir("data") == [] and not Path("run").exists()

    assert data.find_dataset(None) == data.find_dataset(None)  # downloaded once
    assert os.listdir("data") == [data.FOLDER] and set(kaggle_server["tokens"]) == {token}
