"""Every test of the project; each name says what would be broken if it failed. Two minutes."""

import csv
import http.server
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

import data
import train
from data import CLASSES, IGNORE_INDEX, PALETTE, sample_points
from pfce import PartialFocalCrossEntropyLoss, partial_focal_cross_entropy
from unet import UNet, starts, upright

HERE = Path(__file__).parent
each = pytest.mark.parametrize


# ==== pfce.py: the loss ====


def example(*spatial, C=4, N=2, share=0.3, ignore_index=255, dtype=torch.float64):
    """Random logits (N, C, *spatial) and a target with about `share` of its pixels labelled."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(N, C, *spatial, generator=g, dtype=dtype)
    target = torch.randint(C, (N, *spatial), generator=g)
    target[torch.rand(target.shape, generator=g) > share] = ignore_index
    return logits.requires_grad_(), target


def by_hand(logits, target, gamma, alpha):
    """The formula in NumPy, in float64: (sum of the losses, number of labels)."""
    z, y = logits.detach().double().movedim(1, -1)[target != 255].numpy(), target[target != 255]
    p = (np.exp(z) / np.exp(z).sum(-1, keepdims=True))[np.arange(len(y)), y]
    weight = np.broadcast_to(alpha, z.shape[-1:])[y]
    return (weight * (1 - p) ** gamma * -np.log(p)).sum(), len(y)


def assert_refused(call, *words):
    with pytest.raises(ValueError) as refusal:
        call()
    message = str(refusal.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


@each("spatial", [(), (9,), (5, 6), (2, 3, 4)])
@each("gamma", [0, 0.5, 1, 2.0, 5])
@each("C, alpha", [(2, 0.25), (4, [0.1, 0.2, 0.3, 0.4]), (7, 1.5)])
@each("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_loss_equals_the_formula_written_out_by_hand(spatial, gamma, C, alpha, dtype):
    logits, target = example(*spatial, C=C, N=6, dtype=dtype)
    total, count = by_hand(logits, target, gamma, alpha)
    with torch.autocast("cpu", torch.bfloat16):  # which lowers nothing
        loss = partial_focal_cross_entropy(logits, target, gamma=gamma, alpha=alpha)
    loss.backward()
    double = dtype == torch.float64
    assert logits.grad.dtype == dtype and loss.dtype == (dtype if double else torch.float32)
    assert loss.item() == pytest.approx(total / max(count, 1), rel=1e-9 if double else 1e-5)
    module = PartialFocalCrossEntropyLoss(gamma, alpha)
    assert module(logits, target).item() == pytest.approx(loss.item(), rel=1e-6)
    assert not list(module.parameters()) and not module.state_dict()
    assert module.to("meta").alpha.device.type == "meta"


@each("ignore_index", [255, -100, -1, 2])
@each("reduction", ["mean", "sum", "none"])
def test_gamma_0_alpha_1_is_torch_cross_entropy(ignore_index, reduction):
    logits, target = example(8, 16, ignore_index=ignore_index)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    ours = partial_focal_cross_entropy(logits, target, gamma=0, alpha=1, **options)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, **options))


@each("parts", [[1, 3], [0, 4], [2, 1, 1]])
@each("averaged", [False, True])  # over processes; over batches they add up
def test_sums_over_the_count_of_all_labels_are_exact_in_unequal_parts(parts, averaged):
    logits, target = example(8, 8, N=4)
    target[0], labels = 255, (target[1:] != 255).sum()  # a part without any label
    (want,) = torch.autograd.grad(partial_focal_cross_entropy(logits, target), logits)
    for z, y in zip(logits.split(parts), target.split(parts)):
        loss = partial_focal_cross_entropy(z, y, reduction="sum") / labels
        (loss * len(parts) if averaged else loss).backward()
    torch.testing.assert_close(logits.grad / (len(parts) if averaged else 1), want)


@each("shape", [(2, 4, 8, 8), (0, 3, 8, 8), (2, 3, 8, 0), (0, 3)])
@each("reduction", ["mean", "sum", "none"])
def test_no_label_at_all_gives_zero_and_zero_gradients(shape, reduction):
    logits, target = torch.randn(shape, requires_grad=True), torch.full(shape[:1] + shape[2:], 255)
    loss = partial_focal_cross_entropy(logits, target, reduction=reduction)
    assert loss.shape == (target.shape if reduction == "none" else ()) and loss.sum() == 0
    loss.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@each("reduction", ["mean", "sum", "none"])
@each("bad", [math.nan, math.inf, -math.inf])
def test_unlabelled_pixels_cannot_reach_the_result_even_when_nan(bad, reduction):
    logits, target = example(8, 8)
    clean = partial_focal_cross_entropy(logits, target, reduction=reduction)
    logits = torch.where((target == 255)[:, None], bad, logits).detach().requires_grad_()
    loss = partial_focal_cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(loss, clean, rtol=0, atol=0)
    loss.sum().backward()
    assert (logits.grad.movedim(1, -1)[target == 255] == 0).all() and logits.grad.isfinite().all()


@each("gap", [-math.inf, -1e4, -500, -30, 0, 1, 10, 15, 500, 1e4])
@each("gamma", [0, 0.1, 0.5, 1, 2, 5])
def test_float32_is_as_exact_as_torchs_cross_entropy_and_gradients_are_finite(gap, gamma):
    logits, target = torch.tensor([[[gap], [0.0]]], requires_grad=True), torch.tensor([[0]])
    ce = F.cross_entropy(logits, target).item()
    loss = partial_focal_cross_entropy(logits, target, gamma=gamma, alpha=1)
    assert loss.item() == pytest.approx(ce * (-math.expm1(-ce)) ** gamma, rel=1e-6)
    loss.backward()
    assert logits.grad.isfinite().all() or math.isinf(gap)


@each("gamma", [0, 0.5, 2])
def test_float64_passes_gradcheck(gamma):
    logits, target = example(3, 8)
    loss = lambda z: partial_focal_cross_entropy(z, target, gamma=gamma, alpha=[1.0, 2, 3, 4])
    assert torch.autograd.gradcheck(loss, logits) and torch.autograd.gradgradcheck(loss, logits)


TYPES = ["uint8", "int8", "int16", "int32", "uint16", "uint32", "uint64"]


@pytest.mark.filterwarnings("ignore")
@each("how", ["channels_last", "transposed", "sliced", "second", "compiled", *TYPES])
def test_every_layout_and_type_and_torch_compile_give_the_same_and_keep_the_layout(how):
    logits, y = example(16, 13, ignore_index=100)
    want = partial_focal_cross_entropy(logits, y, ignore_index=100)
    want.backward()
    z, loss = logits.detach(), partial_focal_cross_entropy
    z, y = {
        "channels_last": (z.contiguous(memory_format=torch.channels_last), y),
        "transposed": (z.mT.contiguous().mT, y.mT.contiguous().mT),
        "sliced": (F.pad(z, (1, 2))[..., 1:-2], F.pad(y, (1, 2))[..., 1:-2]),
        "second": (z, y.repeat_interleave(2, dim=-1)[..., ::2].to(torch.uint8)),
    }.get(how, (z, y.to(getattr(torch, how)) if how in TYPES else y))
    loss = torch.compile(loss, backend="aot_eager") if how == "compiled" else loss
    z = z.detach().requires_grad_()
    got = loss(z, y, ignore_index=100)
    got.backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(z.grad, logits.grad)
    assert how == "sliced" or z.grad.stride() == z.stride()
    all_labelled = torch.full((2, 16, 13), 3, dtype=y.dtype)  # −253 would be class 3 as uint8
    assert loss(z, all_labelled, ignore_index=3 - 256) > 0


L, T = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)


@each(
    "logits, target, options, words",
    [
        (L, T[:, :3], {}, "(2, 4, 5)|(2, 3, 5)"),
        (L, L.long(), {}, "(2, 4, 5)|(2, 3, 4, 5)"),  # one-hot
        (L.long(), T, {}, "float|int64"),
        (L[0, 0, 0], T, {}, "(N, C, *spatial)|(5,)"),
        (L, T + 3, {}, "0…2|3"),
        (L, T.to(torch.uint8) + 255, {"ignore_index": -1}, "0…2|255"),
        (L[:, :1], T, {}, "C >= 2|(2, 1, 4, 5)|binary_cross_entropy_with_logits"),
        (L, T, {"alpha": [1.0, 2.0]}, "3 weights|(2,)"),
        (L, T, {"alpha": -0.1}, "alpha|-0.1"),
        (L, T, {"alpha": None}, "alpha|finite"),
        (L, T, {"gamma": -1}, "gamma|-1"),
        (L, T, {"reduction": "average"}, "reduction|average"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(logits, target, options, words):
    call = lambda: partial_focal_cross_entropy(logits, target, **options)
    assert_refused(call, *words.split("|"))
    if options.keys() - {"ignore_index"}:  # by the module where it is made
        assert_refused(lambda: PartialFocalCrossEntropyLoss(**options)(logits, target))


@each("layout", [torch.contiguous_format, torch.channels_last])
def test_two_synchronisations_and_no_dense_temporary_beyond_the_gradient(layout):
    logits, target = example(64, 64, N=4, C=6, share=0.01, dtype=torch.float32)
    logits = logits.detach().to(memory_format=layout).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        partial_focal_cross_entropy(logits, target, alpha=torch.ones(6)).backward()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    peak = max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))
    assert 1 <= peak / logits.nbytes < 1.25  # 1 is the gradient; in another layout, copied: 2
    calls = Counter({event.key: event.count for event in profile.key_averages()})
    assert 1 <= calls["aten::nonzero"] + calls["aten::_local_scalar_dense"] <= 2


# ==== data.py: masks, folders, clicks, crops ====

FIRST = "Tile 1/images/image_part_001.jpg"
MASK = "Tile 1/masks/image_part_001.png"
DEMO = HERE / "docs" / "demo"
HEAD = "image,x,y,class\n"
ROAD = HEAD + "a.jpg,1,1,Road\n"
CLASS = "class,color\na,#123456\n"


def make_tiny(folder):
    root, left_out = folder / "tiny" / data.FOLDER, shutil.ignore_patterns("*_00[5-9].*")
    for tile in ("Tile 1", "Tile 2"):
        shutil.copytree(DEMO / tile, root / tile, ignore=left_out)
    return root


@pytest.fixture
def tiny(tmp_path):
    return make_tiny(tmp_path)


def make_masks(folder, colors, mode=None, count=4):
    """Random images (50, 60), with masks of random blocks in RGB colours or in numbers."""
    rng = np.random.default_rng(0)
    for i in range(count):
        index = rng.integers(len(colors), size=(5, 6)).repeat(10, 0).repeat(10, 1)
        mask = Image.fromarray(np.array(colors, np.uint8)[index])
        if mode == "P":
            mask.putpalette([7, 7, 7] * 256)  # the numbers count, not what they look like
        mask = mask.convert(mode) if mode in ("1", "RGBA") else mask
        mask = mask.quantize(16, dither=0) if mode == "palette" else mask
        for name, image in (("images", random_image(50, 60)), ("masks", mask)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            image.save(folder / name / f"{i}.png")
    return index


def random_image(height, width, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def find_pairs(folder, names, root="", masks=None):
    for name in names.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    samples = data.find_samples(folder / root, masks and folder / masks)
    return {(str(s.image.relative_to(folder)), str(s.mask.relative_to(folder))) for s in samples}


def read_classes(tmp_path, text):
    (tmp_path / "classes.csv").write_text(text, encoding="utf-8")
    return data.read_classes(tmp_path / "classes.csv")


def test_sampler_keeps_exactly_n_labelled_pixels_and_every_pair_is_equally_likely():
    mask = torch.randint(5, (40, 50), dtype=torch.uint8)
    mask[:, :20] = IGNORE_INDEX
    before = mask.clone()
    for n in (1, 2, 100, 1199, 1200):
        points = sample_points(mask, n, torch.Generator().manual_seed(n))
        kept = points != IGNORE_INDEX
        assert kept.sum() == n and points.shape == mask.shape and points.dtype == mask.dtype
        assert (points[kept] == mask[kept]).all() and (mask[kept] != IGNORE_INDEX).all()
    assert torch.equal(sample_points(mask, 99_999_999), before)  # fewer: all of them
    a, b = map(data.Sample, "ab", "ab", "ab")  # clicks depend on seed, image and epoch alone
    draws = [a.draw(mask, 50, 1), b.draw(mask, 50, 1), a.draw(mask, 50, 2), a.draw(mask, 50, 1, 2)]
    assert len({draw.numpy().tobytes() for draw in [*draws, a.draw(mask, 50, 1)]}) == 4
    mask = torch.tensor([[0, 255, 0], [0, 0, 255], [255, 0, 0]])  # 6 labelled pixels, 15 pairs
    g = torch.Generator().manual_seed(0)
    seen = Counter(sample_points(mask, 2, g).numpy().tobytes() for _ in range(6000))
    chi2 = sum((n - 400) ** 2 / 400 for n in seen.values())
    assert len(seen) == 15 and chi2 < 36.1  # 14 degrees of freedom, one in a thousand


@each(
    "values, mode, file",
    [
        ([0, 1, 2, 3], "P", "Class;Color\nbackground;0\nroad;1\nwater;2\nfield;3\n;\n"),
        ([1, 2, 3, 0], "L", "class,color\nroad,1\nwater,2\nfield,3\n,0"),  # 0 = no label
        ([0, 255], "L", "class,color\nbackground,0\nbuilding,255"),
        ([0, 255], "1", "class,color\nbackground,0\nbuilding,1"),
        ([0, 255], "L", "class,color\nbackground,#000000\nbuilding,#FFFFFF"),
        ([(255, 255, 255), (0, 0, 9), (7, 7, 7)], "", "class,color\na,white\nb,#000009\n,#070707"),
        ([(255, 255, 255), (0, 0, 9)], "", "name, r, g, b\nroad, 255, 255, 255\nsea, 0, 0, 9"),
        *[([*PALETTE, *data.NO_LABEL], mode, None) for mode in ("", "RGBA", "palette")],
    ],
)
def test_classes_file_says_what_the_masks_hold(tmp_path, values, mode, file):
    index = make_masks(tmp_path, values, mode, count=1)
    classes = read_classes(tmp_path, file) if file else data.read_classes(None)
    got = classes.read_mask(tmp_path / "masks" / "0.png", (60, 50))
    assert np.array_equal(got, np.where(index < len(classes.names), index, IGNORE_INDEX))
    palette = np.array([*classes.palette, [225, 225, 225]])  # in the picture; grey: no label
    distance = np.abs(palette[:, None] - palette[None]).sum(-1) + 1000 * np.eye(len(palette))
    assert not classes.strays and (distance.min() > 50 or not classes.by_number)


def test_colours_without_a_row_are_counted_named_and_above_a_tenth_refused(tmp_path):
    labels = np.full((10, 10, 3), PALETTE[0], np.uint8)
    labels[0, :9], labels[0, 9] = (255, 255, 0), (0, 1, 2)  # a tenth in all
    classes, path = data.read_classes(None), tmp_path / "a.png"
    Image.fromarray(labels).save(path)
    assert (classes.read_mask(path, (10, 10)) == 255).sum() == 10
    assert classes.strays[path] == {"#FFFF00": 9, "#000102": 1}
    labels[1, 0] = (255, 255, 0)
    Image.fromarray(labels).save(path)
    refused = lambda: classes.read_mask(path, (10, 10))
    assert_refused(refused, "a.png", "11%", "#FFFF00 10%, #000102 1%", "--classes")


@each("size", [(40, 60), (20, 30), (37, 41), (80, 120), (3, 2)])
def test_labels_go_to_the_cell_that_covers_them_and_the_last_one_stays(size):
    points = sample_points(torch.randint(5, (40, 60), dtype=torch.uint8), 300)
    want = torch.full(size, IGNORE_INDEX, dtype=torch.uint8)
    for y, x in (points != IGNORE_INDEX).nonzero().tolist():  # in row order
        want[int((y + 0.5) * size[0] / 40), int((x + 0.5) * size[1] / 60)] = points[y, x]
    assert torch.equal(data.shrink_labels(points, *size), want)
    mask = torch.randint(5, (1000, 20), dtype=torch.uint8)  # dense, and strip by strip
    assert torch.equal(data.shrink_labels(mask, 500, 10), mask[1::2, 1::2])


@each("size", [(48, 48), (60, 70), (33, 90)])  # also smaller than the crop
def test_crops_hold_a_label_in_all_eight_ways_and_every_label_stays_on_its_own_pixel(size):
    image = torch.randint(5, (1, *size), dtype=torch.uint8).expand(3, -1, -1)  # colour = class
    labels = sample_points(image[0], 12, torch.Generator().manual_seed(0))
    sample = data.Sample("a", Path("a"), None, pixels=torch.cat([image, labels[None]]))
    sample.labelled = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0].int()
    g, seen, square = torch.Generator().manual_seed(0), set(), sample.pixels.numpy()
    for _ in range(100):
        crop = sample.crop(48, g)
        assert crop.shape == (4, 48, 48) and crop.dtype == torch.uint8
        labelled = crop[3] != IGNORE_INDEX
        assert 1 <= labelled.sum() <= 12 and torch.equal(crop[0][labelled], crop[3][labelled])
        seen.add(crop.numpy().tobytes())
    ways = [np.rot90(m, k, (1, 2)) for m in (square, square[:, :, ::-1]) for k in range(4)]
    assert size != (48, 48) or seen == {way.tobytes() for way in ways}


@each(
    "root, masks, images, found",
    [
        ("", None, "a/images/1.jpg b/images/1.png", "a/masks/1.png b/masks/1.bmp"),
        ("", None, "images/train/1.jpg images/val/1.jpg", "masks/train/1.png masks/val/1.png"),
        ("", None, "Images/a/Images/1.jpg x/1.JPG", "Masks/a/Masks/1.png x/masks/1.png"),
        ("x/images", None, "x/images/1.jpg", "x/masks/1.png"),
        ("imgs", "labels", "imgs/t/1.jpg imgs/2.png", "labels/t/1.tif labels/2.png"),
        ("", "labels", "t/1.jpg", "labels/t/1.png"),  # the masks lie among the images
    ],
)
def test_images_find_their_masks(tmp_path, root, masks, images, found):
    foreign = " x/y/masks/7.png" * root.endswith("/images")  # masks beside it are all it asks for
    pairs = find_pairs(tmp_path, images + " " + found + foreign, root, masks)
    assert pairs == set(zip(images.split(), found.split(), strict=True))


def test_links_are_followed_and_what_is_hidden_or_of_a_run_is_no_image(tmp_path):
    near = tmp_path / "near"
    make_masks(tmp_path / "far", [[60, 16, 152], [132, 41, 246]])
    find_pairs(near, ".t/1.png @eaDir/0.png/THUMB.jpg images.txt ._2.png r/checkpoint.pt r/1.png")
    (near / "0.png").mkdir()
    for name, target in (("images", "far/images"), ("masks", "far/masks"), ("loop", "near")):
        (near / name).symlink_to(tmp_path / target)
    names = [(s.name, s.mask.name) for s in data.find_samples(near)]
    assert names == [(f"images/{i}.png", f"{i}.png") for i in range(4)]


def test_images_are_held_out_by_folder_by_pattern_or_by_having_no_click():
    names = [f"{folder}/{i}.jpg" for folder in ("train", "val") for i in range(4)]
    samples = [data.Sample(name, Path(name), Path("mask")) for name in names]

    def split(*arguments):
        return [[sample.name for sample in part] for part in data.split(samples, *arguments)]

    assert split(None, False) == [names[:2] + names[4:6], names[2:4] + names[6:]]
    assert split("val/*", False) == [names[:4], names[4:]]
    samples[0].rows, samples[1].mask = [(2, 1.0, 1.0, 0)], None
    assert split(None, True) == [names[:1], names[2:]]
    assert split("val/[01]*", True) == [names[:1], names[4:6]]
    assert_refused(lambda: split("test/*", True), "--hold-out", "test/*", "no image", names[0])
    assert_refused(lambda: split("*", True), "--hold-out", "every image")
    assert_refused(lambda: split("train/*", True), names[1], "no mask", "--masks")


def clicks_of(tmp_path, text, classes=None):
    (tmp_path / "my.csv").write_text(text, encoding="utf-8")
    names = ("images/a.jpg", "images/b.jpg", "other/b.jpg", "d/é.jpg", "d/c.jpg", "c.jpg")
    samples = [data.Sample(name, Path("/d", name), None, size=(8, 6)) for name in names]
    data.read_clicks(tmp_path / "my.csv", samples, classes or data.read_classes(None))
    return next(sample.click_map() for sample in samples if sample.rows)


@each(
    "text",
    [
        HEAD.replace(",", ";") + "images/a.jpg;3;4;Road\nimages/a.jpg;7,5;0,25;Land\n",
        HEAD + "c.jpg,3,4,Road\nc.jpg,7,0,Land\n,,,\n\n",  # a path, whatever d/c.jpg is called
        "\ufeffX,Y,id,Image,Class\r\n3,4,1,a.jpg,Road\r\n7,0,2,a.jpg,Land\r\n",
        HEAD + "./images/a.jpg,3.9,4.0,2\nimages\\a.jpg,8.9,-0.9,Land\n",  # the border pixel
        HEAD + '"images/a.jpg",3,4,"Road"\nimages/a.jpg,7,0,Land,\n/d/images/a.jpg,3,4,Road\n',
        HEAD + "d/e\u0301.jpg,3,4,Road\nd/\u00e9.jpg,7,0,Land\n",  # two ways to write é
    ],
)
def test_clicks_are_read_in_the_forms_in_which_tools_write_them(tmp_path, text):
    label_map, numbers = clicks_of(tmp_path, text), "class,color\nsea,0\nland,5\nroad,7"
    same = clicks_of(tmp_path, HEAD + "a.jpg,3,4,7\na.jpg,7,0,5", read_classes(tmp_path, numbers))
    assert label_map.shape == (6, 8) and data.list_points(label_map) == [[7, 0, 1], [3, 4, 2]]
    assert torch.equal(label_map, same)  # what a number stands for is said in the file of classes


@each(
    "read, text, words",
    [
        (clicks_of, "", "--clicks|line 1|image,x,y,class"),
        (clicks_of, HEAD, "no clicks"),
        (clicks_of, HEAD + "images/A.JPG,1,1,Road", "line 2|A.JPG|did you mean images/a.jpg?"),
        (clicks_of, HEAD + "b.jpg,1,1,Road", "line 2|2 images|b.jpg, did you mean other/b.jpg?"),
        (clicks_of, ROAD + "\na.jpg,2,2,Lake", "line 4|'Lake'|Water"),
        (clicks_of, HEAD + "a.jpg,one,1,Road", "line 2|one"),
        (clicks_of, HEAD + "a.jpg,nan,1,Road", "line 2|nan"),
        (clicks_of, HEAD + "a.jpg,9,1,Road", "line 2|(9, 1)|8×6"),
        (clicks_of, HEAD + "a.jpg,1,-1,Road", "line 2|outside"),
        (clicks_of, ROAD + "a.jpg,1.5,1,Land", "line 3|line 2"),
        (clicks_of, ROAD + '"a.jpg,2,2,Road', "--clicks|unexpected end"),  # of what is in quotes
        (read_classes, "name,color\na,#123456", "--classes|line 1|class,color or name,r,g,b"),
        (read_classes, CLASS + ",#000000", "2 to 253"),
        (read_classes, "class,color\na,256\nb,1", "line 2|255"),
        (read_classes, CLASS + "\na,#123457", "line 4|taken"),  # the empty one counts
        (read_classes, CLASS + "b,7", "a colour, or a number"),
        (read_classes, "name,r,g,b\na,1,2,3\nb,1,2", "line 3"),
        (find_pairs, "1.jpg 1.png masks/1.png", "1.jpg|1.png|share|masks/1.png"),
        (find_pairs, "1.jpg masks/1.png masks/1.bmp", "1.png|1.bmp|same"),
        (find_pairs, "0.jpg 1.jpg masks/0_mask.png", "masks/0_mask.png|name|mean 0?"),
    ],
)
def test_what_does_not_fit_is_refused_by_line_or_file(tmp_path, read, text, words):
    assert_refused(lambda: read(tmp_path, text), *words.split("|"))


# ==== unet.py: the network ====


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    return UNet(5, weights=None).eval()


def test_network_takes_any_size_from_32_up_and_normalises_by_itself(model):
    seen, mean, std = [], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    hook = model.encoder.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for size in ((32, 32), (33, 47), (64, 96), (100, 37), (127, 255)):
        image = torch.rand(2, 3, *size)
        assert model(image).shape == (2, 5, *size)
        want = torchvision.transforms.functional.normalize(image, mean, std)
        torch.testing.assert_close(seen[-1], want)
    hook.remove()


@each("where", ["", "state_dict/module.", "model/_orig_mod.encoder.", "a/b/x."])
def test_a_resnet34_is_found_anywhere_in_a_file(tmp_path, where):
    resnet = torchvision.models.resnet34(num_classes=7).eval()
    *keys, prefix = where.split("/")
    tree = {prefix + name: tensor for name, tensor in resnet.state_dict().items()} | {"epoch": 3}
    for key in reversed(keys):
        tree = {"optimizer": {0: {"step": torch.zeros(1)}}, key: tree}
    torch.save(tree, tmp_path / "r34.pth")
    encoder = UNet(5, weights=str(tmp_path / "r34.pth")).eval().encoder
    deep, x = torch.nn.Sequential(*list(resnet.children())[:-2]), torch.rand(1, 3, 64, 64)
    assert torch.equal(torch.nn.Sequential(*encoder.children())(x), deep(x))


def test_imagenet_weights_come_from_torchs_hub_cache_or_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    file = "hub/checkpoints/resnet34-b627a593.pth"
    assert_refused(lambda: UNet(5), "refused", tmp_path / file, "--weights none")
    resnet = torchvision.models.resnet34()
    torch.save(resnet.state_dict(), tmp_path / file)
    assert torch.equal(UNet(5).encoder.layer4[2].conv2.weight, resnet.layer4[2].conv2.weight)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@each("content", ["garbage", "empty", "evil", "resnet18", "list", "absent"])
def test_wrong_weights_are_refused_by_name_and_run_no_code(tmp_path, content):
    path, evil = tmp_path / "weights.pth", f"cos\nmkdir\n(S'{tmp_path / 'owned'}'\ntR."  # os.mkdir
    raw = {"garbage": b"no", "empty": b"", "evil": evil.encode()}
    tensors = {"resnet18": torchvision.models.resnet18().state_dict(), "list": [1, 2]}
    if content in tensors:
        torch.save(tensors[content], path)
    elif content in raw:
        path.write_bytes(raw[content])
    assert_refused(lambda: UNet(5, weights=str(path)), path)
    assert_refused(lambda: UNet.load(path), path)
    assert not (tmp_path / "owned").exists()


@each("mode", ["RGB", "L", "RGBA", "CMYK"])
def test_predict_is_the_argmax_of_the_networks_logits_enlarged_to_the_image(model, mode):
    image = random_image(64, 60, mode)  # one window
    x = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        torch.testing.assert_close(model.logits(image), model(x)[0], atol=1e-5, rtol=1e-4)
    model.scale, image = 0.37, random_image(301, 205, mode)
    logits = model.train().logits(image)
    assert model.training and logits.shape == (5, round(301 * 0.37), round(205 * 0.37))
    whole = F.interpolate(logits[None], size=(301, 205), mode="bilinear").argmax(1)[0]
    assert (model.predict(image) == whole.numpy()).mean() > 0.999
    assert model.predict(random_image(5, 200, mode)).shape == (5, 200)
    model.eval().scale = 1.0


def test_windows_are_blended_where_they_overlap_and_are_as_large_as_the_crops(model):
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits = model.logits(random_image(64, 150))
    hook.remove()
    assert [tuple(batch.shape) for batch in seen] == [(3, 3, 64, 64)]  # begin at 0, 43, 86
    rise = np.minimum(np.arange(64) + 1, 64 - np.arange(64))
    total, weights = np.zeros((5, 64, 150)), np.zeros(150)
    for x, z in zip((0, 43, 86), model(seen[0]).detach().numpy()):
        total[:, :, x : x + 64] += z * rise
        weights[x : x + 64] += rise
    np.testing.assert_allclose(logits.numpy(), total / weights, atol=1e-4, rtol=1e-4)
    begins = starts(625, 64)  # they cover it, and overlap by a quarter
    assert begins[-1] == 625 - 64 and set(np.diff(begins)) <= set(range(1, 49))


def test_photographs_are_seen_as_a_viewer_shows_them(model, tmp_path, recwarn):
    image, exif, path = random_image(64, 96), Image.Exif(), tmp_path / "turned.png"
    for orientation, turn in ((0, None), (1, None), (3, Image.ROTATE_180), (6, Image.ROTATE_270)):
        exif[0x0112] = orientation
        image.save(path, exif=exif)
        want = image if turn is None else image.transpose(turn)
        assert np.array_equal(upright(path), want)
    assert model.predict(path).shape == (96, 64)
    image.quantize(200).save(path, transparency=bytes(range(200)))
    assert upright(path).mode == "RGB" and not recwarn.list


@each("what", ["grey", "rgb", "array", "text"])
def test_what_pillow_would_clip_or_cannot_read_is_refused(model, tmp_path, what):
    path = tmp_path / "a.png"
    Image.new("I;16", (4, 4)).save(path)
    if what == "text":
        path.write_text("hello")
    elif what == "rgb":  # 16 bits a channel, of which Pillow keeps the high byte and says nothing
        header, pixels = bytes([0, 0, 0, 4, 0, 0, 0, 4, 16, 2, 0, 0, 0]), bytes(4 * (1 + 4 * 6))
        png = path.read_bytes()[:8]
        for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(pixels), b"IEND"):
            length, crc = len(chunk) - 4, zlib.crc32(chunk)
            png += length.to_bytes(4, "big") + chunk + crc.to_bytes(4, "big")
        path.write_bytes(png)
    words = {"array": "Image.fromarray", "text": "8-bit RGB"}.get(what, "8 bits")
    assert_refused(lambda: model.predict(np.zeros((4, 4)) if what == "array" else path), words)


def test_large_images_need_little_memory():
    code = "import resource, torch; from PIL import Image; from unet import UNet\n"
    code += "m, r = UNet(5, None), lambda: resource.getrusage(0).ru_maxrss; m.scale = 0.25\n"
    code += "before = r(); m.predict(Image.new('RGB', (5000, 5000))); print(r() - before)"
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=True)
    mebibyte = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    assert int(run.stdout) < 700 * mebibyte  # of 25 million pixels; five logits of each are 500


# ==== train.py: whole runs ====

QUICK = ["--weights=none", "--size=48", "--batch-size=8", "--scale=0.15", "--epochs=2"]
POINTS = ["--points", "20"]
train.MIN_STEPS, train.EPOCH_PIXELS = 1, 4 * 48**2  # in this process: two steps an epoch


@pytest.fixture(autouse=True)
def no_old_checkpoints(tmp_path):
    yield
    for checkpoint in tmp_path.rglob("checkpoint.pt"):
        checkpoint.unlink()


def cli(*arguments) -> str | None:
    try:
        with data.naming("error"):
            train.main(train.parse_args(["--device=cpu", *map(str, arguments)]))
    except (ValueError, SystemExit) as error:
        assert str(error).startswith("error: ") and "\n" not in str(error)
        return str(error)
    return None


@pytest.fixture
def run(tmp_path):
    run = lambda root, *flags: cli("--data", root, *QUICK, "--out", run.out, *flags)
    run.out = tmp_path / "run"
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    root = make_tiny(folder)
    assert cli("--data", root, *QUICK, *POINTS, "--out", folder / "run") is None
    return root, folder / "run"


def metrics(folder, name="metrics.csv") -> list[dict]:
    with open(folder / name, newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_demo_as_a_user_starts_it_what_it_leaves_and_its_files_to_look_at(tmp_path):
    command = [sys.executable, HERE / "train.py", "--demo", "--epochs", "1", "--scale", "0.25"]
    env = os.environ | {"HOME": str(tmp_path), "PYTHONIOENCODING": "cp1251"}  # as on Windows
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
    assert all(f"iou_{name} " in done.stdout.decode() for name in CLASSES)
    (out,) = (tmp_path / "runs").iterdir()
    names = {"metrics.csv", "checkpoint.pt", "clicks.csv", "predictions.png", "config.json"}
    assert {f.name for f in out.iterdir()} == names
    (row,), clicks = metrics(out), metrics(out, "clicks.csv")
    assert row["epoch"] == "1" and 0 < float(row["loss"]) < 1 and 0 < float(row["miou"]) < 1
    assert [*clicks[0]] == ["image", "x", "y", "class"] and len(clicks) == 28 * 100
    assert len(Image.open(out / "predictions.png").getcolors(1 << 24)) > 1000
    assert (out / "checkpoint.pt").stat().st_size < 100e6  # of a finished run, no optimizer
    named, samples = data.read_classes(DEMO / "classes.csv"), data.find_samples(DEMO)
    data.read_clicks(DEMO / "clicks.csv", samples, named)
    assert named.palette == [list(c) for c in PALETTE] and sum(bool(s.rows) for s in samples) == 28
    assert {Image.open(sample.mask).mode for sample in samples} == {"RGB", "P"}


def test_same_command_gives_the_same_numbers_and_another_seed_does_not(finished, run, tmp_path):
    root, first = finished
    runs = [first]
    for flags in ([], ["--seed", "1"], ["--score-every", "3"]):
        runs.append(tmp_path / str(len(runs)))
        assert run(root, *POINTS, *flags, "--out", runs[-1]) is None
    same, again, other, spared = map(metrics, runs)
    assert same == again != other and same[1] == spared[1]
    assert same[0]["loss"] == spared[0]["loss"] and not spared[0]["miou"] and same[0]["miou"]
    clicks = [(out / "clicks.csv").read_bytes() for out in runs]
    assert clicks[0] == clicks[1] == clicks[3] != clicks[2]
    assert run(root, "--points", "all", "--gamma", "0") is None
    assert len(metrics(run.out)) == 2 and not metrics(run.out, "clicks.csv")


def test_own_classes_train_score_and_are_drawn_in_colour(run, tmp_path):
    make_masks(tmp_path / "d", [0, 255, 7], "L")
    read_classes(tmp_path, "class,color\nGrund,0\nGebäude 道路,255\n,7\n")
    assert run(tmp_path / "d", "--classes", tmp_path / "classes.csv", "--scale", "1") is None
    model = UNet.load(run.out / "checkpoint.pt")
    assert all(row[f"iou_{name}"] for row in metrics(run.out) for name in model.classes)
    drawn = {c for _, c in Image.open(run.out / "predictions.png").getcolors(1 << 24)}
    assert {tuple(color) for color in model.palette} <= drawn and len(model.classes) == 2


def test_scores_are_those_of_predict_at_the_held_out_masks_own_resolution(finished):
    root, folder = finished
    model, guess, truth = UNet.load(folder / "checkpoint.pt"), [], []
    for path in root.rglob("masks/*_00[34].png"):  # the last two of every folder
        photo = Path(str(path).replace("masks", "images")).with_suffix(".jpg")
        same = np.asarray(Image.open(path).convert("RGB"))[:, :, None] == np.array(PALETTE)
        labelled = same.all(-1).any(-1)  # (H, W)
        truth.extend(same.all(-1).argmax(-1)[labelled])
        guess.extend(model.predict(photo)[labelled])
    truth, guess, row = np.array(truth), np.array(guess), metrics(folder)[-1]
    parts = [((truth == c) & (guess == c), (truth == c) | (guess == c)) for c in range(5)]
    ious = [both.sum() / either.sum() if either.any() else None for both, either in parts]
    for name, iou in zip(CLASSES, ious):
        assert row[f"iou_{name}"] == ("" if iou is None else str(round(iou, 6)))
    want = np.mean([iou for iou in ious if iou is not None]), (truth == guess).mean()
    assert (float(row["miou"]), float(row["pixel_accuracy"])) == pytest.approx(want, abs=1e-6)
    assert {row["image"][-7:] for row in metrics(folder, "clicks.csv")} == {"001.jpg", "002.jpg"}


@pytest.fixture
def spied(monkeypatch):
    seen, loss = [], partial_focal_cross_entropy
    spy = lambda z, y, **options: seen.append((z.detach(), y)) or loss(z, y, **options)
    monkeypatch.setattr("train.partial_focal_cross_entropy", spy)
    return seen


def test_every_crop_counts_alike_whatever_its_number_of_clicks(tiny, run, spied):
    assert run(tiny, *POINTS, "--epochs", "1") is None
    crops = [(z[None], y[None]) for logits, target in spied for z, y in zip(logits, target)]
    totals, counts = np.array([by_hand(z, y, 2, 0.25) for z, y in crops]).T
    assert len(set(counts)) > 2 and min(counts) >= 1
    assert float(metrics(run.out)[0]["loss"]) == pytest.approx((totals / counts).mean(), abs=2e-6)


@each("able", ["", "amx_bf16", "avx512_bf16"])
def test_bfloat16_is_used_only_where_the_machine_is_fast_at_it(tiny, run, monkeypatch, spied, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    assert run(tiny, "--epochs", "1", "--device", "cpu") is None
    precision = json.loads((run.out / "config.json").read_text())["precision"]
    assert precision == ("bfloat16" if able else "float32")
    assert {str(logits.dtype) for logits, _ in spied} == {f"torch.{precision}"}


@each("weights, gentler", [("none", 1), ("resnet34.pth", 10), ("checkpoint.pt", 10)])
def test_a_pretrained_encoder_learns_more_gently(finished, run, monkeypatch, weights, gentler):
    root, folder = finished
    torch.save(torchvision.models.resnet34().state_dict(), folder / "resnet34.pth")
    seen, weights = [], weights if weights == "none" else folder / weights
    monkeypatch.setattr(train, "train_one_epoch", lambda parts, *_: seen.append(parts) or 1.0)
    assert run(root, "--weights", weights, "--lr", "0.5", "--epochs", "1") is None
    encoder, decoder = seen[0]["optimizer"].param_groups
    assert encoder["params"] == list(seen[0]["model"].encoder.parameters())
    both = len(encoder["params"]) + len(decoder["params"])
    assert both == len(list(seen[0]["model"].parameters()))  # all of them learn
    assert (encoder["max_lr"], decoder["max_lr"]) == pytest.approx((0.5 / gentler, 0.5))


@each("points, most", [("100", 1.1), ("all", 2.1)])
def test_a_training_image_takes_a_byte_per_original_pixel_or_two_where_dense(tiny, points, most):
    sample = data.Sample("a", tiny / FIRST, tiny / MASK)
    train.label(sample, data.read_classes(None), train.parse_args(["--points", points]))
    size = sample.pixels.nbytes + sample.labelled.nbytes
    assert size <= most * math.prod(sample.size) and sample.pixels.shape[0] == 4


# ==== your own clicks, a trained model ====


def test_clicks_csv_gives_the_same_run_back_and_needs_no_masks(finished, tiny, run, capsys):
    flags = ["--clicks", finished[1] / "clicks.csv"]
    (tiny / MASK).write_bytes(b"no picture")  # of a clicked image: never looked at
    assert run(tiny, *flags) is None
    assert metrics(finished[1]) == metrics(run.out)
    assert metrics(finished[1], "clicks.csv") == metrics(run.out, "clicks.csv")
    for masks in tiny.rglob("masks"):
        shutil.rmtree(masks)
    run.out = run.out.with_name("unscored")
    assert run(tiny, *flags) is None
    printed, rows = capsys.readouterr().out, metrics(run.out)
    assert "4 to train on, 0 to score, 4 unclicked" in printed
    assert "Water has no label: it cannot be learnt" in printed
    assert [r["loss"] for r in rows] == [r["loss"] for r in metrics(finished[1])]
    assert all(row["miou"] == "" == row["iou_Water"] for row in rows)


def test_clicks_on_a_photograph_stored_turned_are_on_the_upright_picture(tmp_path):
    exif, pixels = Image.Exif(), np.zeros((96, 128, 3), np.uint8)
    exif[0x0112] = 6
    pixels[5, 7] = 255  # upright, in a picture 96 wide and 128 high: x = 96 − 1 − 5, y = 7
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    sample = data.Sample("a.png", tmp_path / "a.png", None, rows=[(2, 90.0, 7.0, 3)])
    args = train.parse_args(["--clicks", "my.csv", "--scale", "1"])
    train.label(sample, data.read_classes(None), args)
    assert torch.equal(sample.pixels[:, 7, 90], torch.tensor([255, 255, 255, 3]))
    assert sample.pixels.shape == (4, 128, 96) and sample.labelled.tolist() == [7 * 96 + 90]


def test_unet_as_a_program_and_in_the_readme_predicts_and_overwrites_nothing(finished, tmp_path):
    root, folder = finished
    checkpoint = tmp_path / "runs" / "mine" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.symlink_to(folder / "checkpoint.pt")
    shutil.copy(root / FIRST, tmp_path / "photo.jpg")
    command = [sys.executable, HERE / "unet.py", checkpoint, "photo.jpg", root / FIRST, "--out=m"]
    env = os.environ | {"PYTHONPATH": str(HERE), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=tmp_path, check=True, env=env)
    again = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert again.returncode == 1 and again.stderr.startswith("error: photo.jpg: ")
    assert again.stderr.splitlines()[1].startswith(f"error: {root / FIRST}: ")  # it went on
    class_map, model = Image.open(tmp_path / "m" / "photo.png"), UNet.load(checkpoint)
    assert class_map.mode == "P" and np.array_equal(class_map, model.predict(root / FIRST))
    assert class_map.getpalette()[:15] == [value for color in model.palette for value in color]
    code = (HERE / "README.md").read_text().split("<!-- tested -->\n```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=env)


# ==== everything that goes wrong ====

DAMAGES = {  # a file, what becomes of it (None: it is gone), and what the message names
    "no mask": (MASK, None, "image_part_001.jpg|no mask"),
    "no image": (FIRST, None, "image_part_001.png|fits no image"),
    "cut image": (FIRST, lambda path: path.write_bytes(path.read_bytes()[:700]), FIRST),
    "cut mask": (MASK, lambda path: path.write_bytes(path.read_bytes()[:90]), MASK),
    "size": (MASK, lambda path: Image.new("L", (70, 50)).save(path), MASK + "|70×50|512×416"),
    "foreign": (MASK, lambda path: Image.new("RGB", (512, 416), "red").save(path), "#FF0000 100%"),
    "jpeg": (MASK, lambda path: Image.open(path).save(path, "JPEG"), MASK + "|PNG"),
    "bomb": (FIRST, lambda path: Image.new("1", (20_000, 20_000)).save(path, "PNG"), FIRST),
    "held out": (FIRST.replace("1.jpg", "4.jpg"), lambda path: path.write_text(""), "004.jpg"),
}
WRONG_FLAGS = """--epochs 0; --epochs 2.5; --points -3; --points some; --points all --resample;
    --seed 99999999999999999999; --size 47; --scale 0; --lr nan; --lr inf; --gamma -1; --alpha x;
    --wieghts none; --device cuda:99; --device gpu7; --device meta; --clicks nowhere.csv;
    --clicks x.csv --resample; --demo --data; --classes nowhere.csv; --masks nowhere; --device xpu;
    --hold-out nothing/*; --weights Imagenet; --resume nowhere --batch-size 8"""


@each("damage", DAMAGES)
def test_wrong_data_is_refused_by_name_and_nothing_is_written(tiny, run, damage):
    name, change, words = DAMAGES[damage]
    change(tiny / name) if change else (tiny / name).unlink()
    message = run(tiny)
    assert message and all(word in message for word in words.split("|")), message
    assert not run.out.exists()


def test_images_without_a_label_and_with_few_are_no_error(tiny, run, capsys):
    labels = np.array(Image.open(tiny / MASK))
    labels[0], labels[1:] = PALETTE[0], 0  # fewer labelled pixels than clicks
    Image.fromarray(labels).save(tiny / MASK)
    Image.new("L", (352, 384)).save(tiny / MASK.replace("Tile 1", "Tile 2"))  # none
    assert run(tiny, "--points", "600", "--epochs", "1") is None
    assert "3 to train on, 4 to score, 1 unclicked" in capsys.readouterr().out
    images = Counter(row["image"] for row in metrics(run.out, "clicks.csv"))
    assert sorted(images.values()) == [512, 600, 600]


@each("flags", WRONG_FLAGS.split(";"))
def test_wrong_flags_are_refused_and_named_and_nothing_is_written(tiny, run, flags):
    message = run(tiny, *flags.replace("--data", "").split())
    words = [word for word in flags.split() if word not in ("x.csv", "nowhere", "8", "all")]
    assert message and all(word in message for word in words), message
    assert not run.out.exists()


def test_a_folder_without_images_and_a_run_in_out_are_refused(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "fetch", lambda root: pytest.fail("a download"))
    assert f".webp file is in --data {tmp_path / 'nothing'}" in run(tmp_path / "nothing")
    run.out.mkdir()
    (run.out / "metrics.csv").write_text("precious")
    assert f"{run.out} exists" in run(tiny)
    assert [f.read_text() for f in run.out.iterdir()] == ["precious"]


@each("bad", ["loss 1", "loss 4", "save 3"])  # two steps an epoch; saved before and after each
def test_nan_or_a_full_disk_stops_the_run_and_it_resumes(finished, run, monkeypatch, bad):
    what, number = bad.split()
    loss, save, calls = partial_focal_cross_entropy, torch.save, itertools.count(1)
    fails = lambda: next(calls) == int(number)
    if what == "loss":
        nan = lambda *z, **options: loss(*z, **options) * (math.nan if fails() else 1)
        monkeypatch.setattr("train.partial_focal_cross_entropy", nan)
    else:  # /dev/full is a disk without room
        full = lambda checkpoint, path: save(checkpoint, "/dev/full" if fails() else path)
        monkeypatch.setattr("train.torch.save", full)
    message = run(finished[0], *POINTS)
    words = [f"epoch {bad[-1]}".replace("4", "2"), "nan", "--lr"] if what == "loss" else [run.out]
    assert all(str(word) in message for word in words), message
    assert len(metrics(run.out)) == (bad != "loss 1")
    assert cli("--resume", run.out) is None and metrics(run.out) == metrics(finished[1])


def test_interrupted_killed_and_resumed_run_ends_like_one_left_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MIN_STEPS", 10)  # as in the process to be killed
    monkeypatch.setattr(train, "EPOCH_PIXELS", 256**2)
    flags = ["--data", tiny, *QUICK, "--epochs", "3", *POINTS, "--resample"]
    alone, out, moved = tmp_path / "alone", tmp_path / "killed", tmp_path / "moved"
    assert cli(*flags, "--out", alone) is None

    def start_and_wait(condition, *arguments):
        command = [sys.executable, HERE / "train.py", "--device=cpu", *map(str, arguments)]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while not condition():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        return process

    trained = lambda: (out / "metrics.csv").exists() and len(metrics(out)) >= 1
    process = start_and_wait(trained, *flags, "--out", out)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode != 0 and f"--resume {out}" in errors and "Traceback" not in errors
    writing = (out / "checkpoint.pt.partial").exists
    process = start_and_wait(writing, "--resume", out)
    process.kill()
    process.communicate()
    assert 1 <= len(metrics(out)) < 3
    tiny.rename(moved)  # the data, too
    for _ in range(2):  # the second time it is complete already: draws and prints again
        assert cli("--resume", out, "--data", moved) is None
        assert metrics(out) == metrics(alone) and len(metrics(out, "clicks.csv")) == 4 * 3 * 20
        for name in ("clicks.csv", "predictions.png"):
            assert (out / name).read_bytes() == (alone / name).read_bytes()


def test_resume_takes_its_options_from_the_run_and_refuses_others(tiny, run, tmp_path):
    classes = Path(shutil.copy(DEMO / "classes.csv", tmp_path))
    assert run(tiny, *POINTS, "--classes", classes) is None
    before = metrics(run.out)
    classes.unlink()
    (run.out / "metrics.csv").unlink()  # as if killed just before it was written
    assert cli("--resume", run.out, "--device", "cpu") is None and metrics(run.out) == before
    message = cli("--resume", run.out, "--epochs", "9")
    assert all(word in message for word in ("--epochs", "learning rate", "--weights"))
    assert f"--resume {tmp_path}: there is no run" in cli("--resume", tmp_path)
    shutil.rmtree(tiny / "Tile 2")
    assert "not those" in cli("--resume", run.out)


# ==== the Kaggle client, for real ====

PROXY = {"url": "http://kaggle.invalid", "status": 407}  # of a company
FAILURES = [({"status": status}, status) for status in (401, 403, 404, 500)]
FAILURES += [({"body": b"not a zip"}, "zip"), ({"cut": True}, "failed"), (PROXY, 407)]
FAILURES += [({"url": "http://127.0.0.1:9"}, "Connection refused")]


@pytest.fixture
def kaggle_server(tmp_path, monkeypatch):
    """A loopback server in Kaggle's place; the installed client talks to it over HTTP."""
    state = {"status": 200, "body": archive(), "cut": False, "requests": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # like Kaggle: the API sends the client on to a storage server
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state["requests"].append((self.path, self.headers.get("Authorization")))
            self.do_GET(302 if state["status"] == 200 else state["status"], b"")

        def do_GET(self, status=200, body=None):
            body = state["body"] if body is None else body
            self.send_response(status)
            self.send_header("Location", "/storage/archive.zip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // (2 if state["cut"] else 1)])
            self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("kagglesdk.kaggle_http_client.get_endpoint", lambda env: state["url"])
    for name in {*os.environ, "KAGGLE_CONFIG_DIR"}:
        if name.startswith("KAGGLE"):  # set first, so that it is restored afterwards
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its tries
    for name in [m for m in sys.modules if m.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)  # it logs in when it is imported
    yield state
    server.shutdown()


def archive(*outside) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as file:
        for path in (DEMO / "Tile 1").rglob("*.*"):
            file.write(path, f"{data.FOLDER}/{path.relative_to(DEMO)}")
        for name in outside:
            file.writestr(name, "outside")
    return body.getvalue()


def test_download_without_an_account_trains_and_none_is_needed_twice(kaggle_server, capfd):
    kaggle_server["body"] = archive("../../evil.txt", "/evil.txt", f"{data.FOLDER}/../../evil")
    assert cli(*QUICK, "--epochs", "1", "--out", "one") is None
    assert not [*Path().glob("*evil*"), *Path("/").glob("*evil*"), *Path("..").glob("*evil*")]
    ((path, authorization),) = kaggle_server["requests"]
    assert "Dataset" in path and authorization is None
    printed = "".join(capfd.readouterr())
    assert data.KAGGLE_NAME in printed and "KAGGLE_API_TOKEN" not in printed  # its help text
    assert len(list(Path("data").rglob("*.jpg"))) == 9 and os.listdir("data") == [data.FOLDER]
    assert data.find_dataset(None) == Path("data") / data.FOLDER  # where a second run starts
    assert len(kaggle_server["requests"]) == 1


@each("file", ["kaggle.json", ".kaggle/kaggle.json", ".kaggle/access_token"])
def test_download_uses_a_token_where_there_is_one(kaggle_server, file):
    Path(".kaggle").mkdir()
    legacy = json.dumps({"username": "ada", "key": "secret"})
    Path(file).write_text(legacy if "json" in file else "KGAT_secret")
    data.find_dataset(None)
    want = "Basic YWRhOnNlY3JldA==" if "json" in file else "Bearer KGAT_secret"
    assert kaggle_server["requests"][-1][1] == want


@each("change, word", FAILURES)
def test_download_that_fails_tells_why_and_what_to_do(kaggle_server, monkeypatch, change, word):
    monkeypatch.setenv("http_proxy", kaggle_server["url"] if change is PROXY else "")
    before = kaggle_server | {}
    kaggle_server |= change
    message = cli(*QUICK, "--out", "run")
    for wanted in (word, "unzip", "KAGGLE_API_TOKEN", "access_token", "kaggle.json", "--demo"):
        assert str(wanted) in message
    assert os.listdir("data") == [] and not Path("run").exists()
    kaggle_server |= before
    monkeypatch.setenv("http_proxy", "")
    assert data.find_dataset(None) == Path("data") / data.FOLDER  # a second run heals it
    Path("data").rename("old")
    Path("data").mkdir()
    Path("data/archive.zip").write_bytes(archive())  # as a browser leaves it
    assert_refused(lambda: data.find_dataset(None), "data/archive.zip", "unzip")
