"""Every test of the project, a list of promises. A name says what would be broken if it failed."""

import copy
import csv
import http.server
import io
import json
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
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.testing import assert_close
from torchvision.models import resnet34
from torchvision.transforms.functional import normalize, pil_to_tensor, to_pil_image

import data
import train
import unet
from data import CLASSES, IGNORE_INDEX, PALETTE, sample_points
from pfce import PartialFocalCrossEntropyLoss, partial_focal_cross_entropy
from unet import UNet, upright

HERE = Path(__file__).parent
DEMO = HERE / "docs/demo"
each = pytest.mark.parametrize
TURNED = Image.Exif()
TURNED[274] = 6  # a quarter turn: upright as wide as it is stored high


def each_row(names, table):
    r"""Parametrise with the rows of a table. In it \n and the like are as in Python."""
    lines = [line.encode("latin-1").decode("unicode_escape") for line in table.strip().splitlines()]
    return each(names, [[cell.strip() for cell in line.split("|")] for line in lines])


def draw_png(path, pixels, mode=None, **options):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).convert(mode).save(path, **options)
    return path


def noise(*shape):
    return np.random.default_rng(0).integers(256, size=shape)


def make_photos(folder, colors, mode=None):
    """Four photographs (80, 96), masks of random blocks in these colours, the last one's blocks."""
    rng = np.random.default_rng(0)
    for i in range(4):
        blocks = rng.integers(len(colors), size=(5, 6)).repeat(16, 0).repeat(16, 1)
        draw_png(f"{folder}/masks/{i}.png", np.array(colors)[blocks], mode)
        draw_png(f"{folder}/images/{i}.png", noise(80, 96, 3) // 4 + 30 * blocks[..., None])
    return blocks


def assert_refused(words, call, *arguments):
    """Refused in one line that holds these words."""
    with pytest.raises((ValueError, SystemExit)) as refusal:
        call(*arguments)

    message = str(refusal.value)
    assert "\n" not in message
    assert all(word in message for word in str(words).split()), message


# ==== pfce.py: the loss ====


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
    loss.sum().backward()
    return loss.detach(), logits.grad


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


def test_sums_over_the_count_of_all_labels_are_the_mean_over_unequal_parts():
    logits, target = example(8, 8)
    target[:4] = 255  # a part without any label
    _, want = loss_and_gradient(logits, target)

    gradients = []
    for z, y in zip(logits.split(4), target.split(4)):  # 4 images, then 2
        _, gradient = loss_and_gradient(z, y, reduction="sum")
        gradients.append(gradient)

    assert_close(torch.cat(gradients) / (target != 255).sum(), want)


@each("N", [0, 2])
def test_no_label_at_all_gives_zero_and_zero_gradients(N):
    logits = torch.randn(N, 3, 8)
    target = torch.full((N, 8), 255)

    loss, gradient = loss_and_gradient(logits, target)

    assert loss == 0
    assert (gradient == 0).all()


@each("bad", [math.nan, math.inf])
def test_unlabelled_pixels_cannot_reach_the_result_even_when_nan(bad):
    logits, target = example(8, 8)
    spoilt = logits.masked_fill((target == 255)[:, None], bad)

    got = loss_and_gradient(spoilt, target)

    assert_close(got, loss_and_gradient(logits, target), rtol=0, atol=0)


@each("gap", [-1e4, -30, 0, 30, 1e4])
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


LAYOUTS = {
    "contiguous": torch.clone,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: F.pad(x, (1, 2))[..., 1:-2],
}


@each("layout", LAYOUTS)
@each("dtype", ["uint8", "int8", "int16", "int32", "uint16", "uint32", "uint64"])
def test_every_memory_layout_and_integer_type_gives_the_same(layout, dtype):
    logits, target = example(16, 13)
    want = loss_and_gradient(logits, target)
    target[target == 255] = 100
    change = LAYOUTS[layout]

    target = change(target).to(getattr(torch, dtype))
    got = loss_and_gradient(change(logits), target, ignore_index=100)

    assert_close(got, want)


@each("layout", LAYOUTS)
def test_two_synchronisations_and_no_dense_temporary_beyond_the_gradient(layout):
    logits, target = example(64, 64)
    logits = LAYOUTS[layout](logits)
    target[:, 1:] = 255

    with torch.profiler.profile(profile_memory=True) as profile:
        loss_and_gradient(logits, target)

    events = profile.profiler.kineto_results.events()
    calls = [event.name() for event in events]
    allocated = sum(event.nbytes() for event in events if event.nbytes() > 0)
    assert 1 <= allocated / logits.nbytes < 1.25  # 1 is the gradient
    # The third is about alpha, which lies on the CPU.
    assert calls.count("aten::nonzero") + calls.count("aten::_local_scalar_dense") <= 3


def test_the_module_is_the_function_even_if_made_on_meta_cast_to_half_and_compiled():
    logits, target = example(8, 8)
    options = {"gamma": 1, "alpha": [0.1, 0.2, 0.3, 0.4], "ignore_index": 3, "reduction": "sum"}
    target[target == 255] = 3
    want = partial_focal_cross_entropy(logits, target, **options)

    with torch.device("meta"):
        module = PartialFocalCrossEntropyLoss(**options)
    compiled = torch.compile(module.half(), backend="aot_eager")

    assert_close(compiled(logits, target), want)


Z = torch.zeros(2, 3, 4)
Y = torch.zeros(2, 4).long()
WRONG_INPUT = {  # what the message names: what is wrong
    "(2, 3)": {"target": Y[:, :3]},
    "got 3": {"target": Y + 3},
    "got -2": {"target": Y - 2},
    "got 255": {"target": Y.byte() + 255, "ignore_index": -1},  # which is 255 as a uint8
    "torch.from_numpy": {"target": Y.numpy()},
    "int64": {"logits": Z.long()},
    "(N, C, *spatial)": {"logits": Z[0, 0]},
    "output['out']": {"logits": {"out": Z}},  # of a torchvision model
    "binary_cross_entropy_with_logits": {"logits": Z[:, :1]},
    "gamma must be a number": {"gamma": None},
    "-0.5": {"gamma": -0.5},
    "alpha a number": {"alpha": None},
    "-0.1": {"alpha": -0.1},
    "3 weights": {"alpha": [1, 2]},
    "average": {"reduction": "average"},
}


@each("word", WRONG_INPUT)
def test_wrong_input_is_refused_in_one_sentence(word):
    arguments = {"logits": Z, "target": Y, **WRONG_INPUT[word]}

    assert_refused(word, lambda: partial_focal_cross_entropy(**arguments))


def test_logits_and_target_in_the_place_of_options_are_refused():
    assert_refused("logits and target", lambda: PartialFocalCrossEntropyLoss(Z, Y))


# ==== unet.py: the network ====

SETTINGS = {
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
    vars(net).update(SETTINGS)
    net.head.weight.data *= 1000
    net.head.bias.data -= net.logits(random_image(64, 96)).mean((1, 2))
    net.checkpoint = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    torch.save({"model": net.state_dict(), "settings": SETTINGS}, net.checkpoint)
    yield net
    net.checkpoint.unlink()  # 90 MB


def random_image(height, width):
    torch.manual_seed(0)
    return to_pil_image(torch.rand(3, height, width))


@each("size", [(32, 32), (33, 255)])
def test_network_takes_any_size_from_32_up(net, size):
    assert net(torch.rand(2, 3, *size)).shape == (2, 5, *size)


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
    net(pixels)
    net(pixels / 255)

    assert_close(seen, [want, want])


def test_imagenet_weights_come_from_torchs_hub_cache_or_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    folder = tmp_path / "hub" / "checkpoints"

    assert_refused(folder, lambda: UNet(5))

    torch.save(resnet34().state_dict(), folder / "resnet34-b627a593.pth")
    UNet(5)


@each("mode", ["RGB", "L", "RGBA", "CMYK"])
@each("size", [(201, 125), (5, 200)])
@each("cast", ["float", "half", "bfloat16"])
def test_predict_is_the_argmax_of_the_logits_enlarged_to_the_photograph(net, mode, size, cast):
    net = getattr(copy.deepcopy(net), cast)()
    image = random_image(*size).convert(mode)

    class_map = net.predict(image)

    enlarged = F.interpolate(net.logits(image)[None], size=size, mode="bilinear")[0]
    assert (class_map == enlarged.argmax(0).numpy()).mean() > 0.999


def test_windows_are_blended_where_they_overlap(net):
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


# ==== unet.py: photographs and other files ====


@each("orientation", range(9))
def test_photographs_are_turned_as_a_viewer_does_even_with_an_odd_exif_tag(tmp_path, orientation):
    odd_tag = "011A 0002 00000003 37320000"  # the resolution as a text, "72"
    tags = f"0112 0003 00000001 000{orientation} 0000 {odd_tag}"
    image = random_image(64, 96)
    path = tmp_path / "a.png"
    image.save(path, exif=bytes.fromhex(f"4D4D 002A 00000008 0002 {tags} 00000000"))

    photo = upright(path)

    image.getexif()[274] = orientation
    assert np.array_equal(photo.convert("RGB"), ImageOps.exif_transpose(image))
    assert np.array_equal(photo, upright(photo))  # not turned twice


@each("mode", ["RGBA", "P"])
def test_transparent_pixels_have_no_class(net, tmp_path, mode):
    index = np.uint8([[0, 1, 2] * 20] * 40)
    image = Image.fromarray(index)
    image.putpalette(net.palette)
    image.save(tmp_path / "a.png", transparency=b"\x00\x01\xff")

    class_map = net.predict(Image.open(tmp_path / "a.png").convert(mode))

    assert np.array_equal(class_map == 255, index == 0)


DEEP_RGB = bytes.fromhex(  # a PNG of 16 bits a channel, which Pillow would clip in silence
    "89504E470D0A1A0A0000000D4948445200000001000000011002000000C0E78F9D0000000B49"
    "444154789C636000030000070001B286ACF40000000049454E44AE426082"
)
UNREADABLE = {
    "empty": lambda path: path.touch(),
    "old version": lambda path: torch.save({"model": {}}, path),
    "code": lambda path: path.write_text(f"cos\nmkdir\n(S'{path.parent}/owned'\ntR."),  # os.mkdir
    "grey of 16 bits": lambda path: Image.new("I;16", (4, 4)).save(path),
    "RGB of 16 bits": lambda path: path.write_bytes(DEEP_RGB),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@each("content", UNREADABLE)
def test_wrong_photographs_weights_and_checkpoints_are_refused_by_name(tmp_path, content):
    path = tmp_path / "a.png"
    UNREADABLE[content](path)

    assert_refused(path, lambda: upright(path))
    assert_refused(path, lambda: UNet(5, weights=path))
    assert_refused(path, lambda: UNet.load(path))

    assert not (tmp_path / "owned").exists()  # no code was run


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


def maps():
    return {path.as_posix() for path in Path("maps").rglob("*.*")}


def test_map_shows_the_predicted_classes_and_confidence_their_probability(draw_maps, net, capsys):
    save_photos("a.jpg")
    class_map = net.predict("a.jpg")

    assert draw_maps("a.jpg", "--confidence") == 0

    picture = Image.open("maps/a.png")
    assert np.array_equal(picture, class_map)
    assert picture.getpalette() == net.palette
    sure = Image.open("maps/a_confidence.png")
    want = 255 * net.logits("a.jpg").softmax(0).amax(0)  # (32, 48)
    assert sure.size == (96, 64)
    assert np.abs(np.array(sure.reduce(2)) - want.numpy()).mean() < 5
    assert f" sand {np.mean(class_map == 0):.1%}" in capsys.readouterr().out


def test_maps_lie_as_their_photographs_do_overwrite_nothing_and_no_error_stops_them(
    draw_maps, capsys
):
    save_photos("a/1.jpg", "b/1.jpg", "b/2.TIF", "b/2.webp", "b/masks/1.png", "maps/a/1.png")
    Path("b/0.jpg").write_text("no photograph")
    Path("b/notes.txt").touch()

    assert draw_maps("a/1.jpg", "b") == 1

    assert maps() == {"maps/a/1.png", "maps/b/1.png", "maps/b/2.png"}
    assert Image.open("maps/a/1.png").mode == "RGB"  # a photograph, as before
    errors = capsys.readouterr().err.splitlines()
    # What exists is told first, before anything is computed.
    assert [error.split(":")[1] for error in errors] == [" a/1.jpg", " b/2.webp", " b/0.jpg"]


def test_maps_of_geotiffs_and_photographs_with_a_world_file_keep_their_place(draw_maps, net):
    tags = {
        33550: (0.3, 0.3),
        33922: (325000.5, 2787000.25),
        34735: (3072, 32640),
        34736: (6378137.0, 298.25),
        34737: "WGS 84|",
    }
    turned = Image.Exif()
    turned[274] = 6
    save_photos("a.tif", tiffinfo={**tags, 42113: "0"})
    save_photos("b.jpg")
    save_photos("c.jpg", exif=turned)
    Path("b.jgw").touch()
    Path("c.jgw").touch()  # fits the pixels as they are stored, and not the map

    draw_maps("a.tif", "b.jpg", "c.jpg", "--confidence")

    for name in ("maps/a.tif", "maps/a_confidence.tif"):
        written = Image.open(name).tag_v2
        assert tags == {tag: written[tag] for tag in tags}
        assert 42113 not in written  # it would make class 0 transparent
    assert Image.open("maps/a.tif").getpalette() == net.palette
    assert Path("maps/b.pgw").exists()
    assert not Path("maps/c.pgw").exists()


def test_a_full_disk_leaves_nothing_behind(draw_maps, monkeypatch, capsys):
    def fail(*paths):
        raise OSError(28, "No space left on device")

    save_photos("a.jpg")
    monkeypatch.setattr("os.replace", fail)

    assert draw_maps("a.jpg") == 1

    assert "No space left" in capsys.readouterr().err
    assert not maps()


def test_a_wrong_flag_ends_in_one_line(draw_maps):
    message = draw_maps("a.jpg", "--device=nonsense")

    assert message.startswith("error: --device nonsense")


# ==== data.py: clicks and crops ====


def test_simulated_clicks_are_n_labelled_pixels_in_row_order_and_equally_likely():
    mask = torch.randint(5, (40, 50))
    mask[:, :20] = IGNORE_INDEX
    small = torch.tensor([[0, 255, 0], [0, 0, 255], [255, 0, 0]])  # 6 labels, 15 pairs
    g = torch.Generator().manual_seed(0)

    for n in (1, 1200, 9999):
        x, y, c = sample_points(mask, n, g).T
        assert len(x) == min(n, 1200) and torch.equal(mask[y, x], c)
        assert (x >= 20).all() and ((y * 50 + x).diff() > 0).all()  # distinct, too
    pairs = [str(sample_points(small, 2, g)) for _ in range(6000)]

    _, counts = np.unique(pairs, return_counts=True)
    assert len(counts) == 15
    assert ((counts - 400) ** 2).sum() / 400 < 36.1  # chi-square, 14 degrees of freedom, 0.1 %


@each("h, w", [(20, 30), (37, 71)])
def test_a_label_goes_to_the_cell_that_covers_its_pixel_and_the_later_one_wins(h, w):
    clicks = sample_points(torch.randint(5, (40, 60)), 300)
    want = np.full((h, w), IGNORE_INDEX)
    for x, y, c in clicks.tolist():
        want[int((y + 0.5) * h / 40), int((x + 0.5) * w / 60)] = c

    label_map = data.paint(clicks, (60, 40), (h, w))

    assert np.array_equal(label_map, want)


def load_photo(folder, classes, points, **options):
    """A loaded sample. The colour of a pixel is its class, y and x."""
    photo = draw_png(f"{folder}/a.png", np.dstack([classes, *np.indices(classes.shape)]))
    mask = draw_png(f"{folder}/m.png", np.array(PALETTE)[classes])
    sample = data.Sample("a", photo, mask)
    train.load(sample, data.read_classes(None), points, 0, **options)
    return sample


@each("h, w, places", [(48, 48, 2), (130, 150, 120), (33, 90, 30)])  # also smaller than the crop
def test_crops_hold_a_label_in_all_eight_ways_and_labels_stay_on_their_pixel(
    tmp_path, h, w, places
):
    sample = load_photo(tmp_path, noise(h, w) % 5, 12, scale=1, size=48)
    dataset = data.Crops([sample], 48)
    found, crops, starts = set(), set(), set()

    for _ in range(200):
        crop = dataset[0].numpy()
        y, x, label = crop[1:, crop[3] != IGNORE_INDEX]
        assert crop.shape == (4, 48, 48) and len(label)
        found.update(zip(x, y, label))
        crops.add(crop.tobytes())
        starts.update(enumerate(crop[1:3].min((1, 2))))  # (0, top) and (1, left)

    assert found == set(map(tuple, sample.clicks.tolist()))  # each label has its turn
    assert len(crops) >= 8 and len(starts) >= places  # the label is not always in the middle


@each("points, most", [(100, 1.1), ("all", 2.1)])
def test_a_training_image_takes_a_byte_a_pixel_or_two_where_dense(tmp_path, points, most):
    sample = load_photo(tmp_path, noise(300, 400) % 5, points, scale=0.5, size=64)
    (labelled,) = data.Crops([sample], 64).labelled

    assert sample.pixels.nbytes + sample.clicks.nbytes + labelled.nbytes <= most * 300 * 400


# ==== data.py: folders ====


def touch(folder, names):
    for path in [folder / name for name in names.split()]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@each_row(
    "root, masks, images, found",
    r"""
        . | | a/images/1.jpg b/images/1.png | a/masks/1.png b/masks/1.bmp
        . | | images/train/1.jpg images/val/1.jpg | masks/train/1.png masks/val/1.png
        . | | Images/a/Images/1.jpg x/1.JPG | Masks/a/Masks/1.png x/masks/1.png
        . | | Urban/images_png/1.png 2.jp2 | Urban/masks_png/1.png masks/2.png
        imgs | labels | imgs/2.png imgs/t/1.jpg | labels/2.png labels/t/1.tif
        . | labels | t/1.jpg | labels/t/1.png
    """,
)
def test_images_find_their_masks(tmp_path, root, masks, images, found):
    touch(tmp_path, f"{images} {found}")

    samples = data.find_samples(tmp_path / root, masks and tmp_path / masks)

    pairs = {(sample.image, sample.mask) for sample in samples}
    assert pairs == {(tmp_path / a, tmp_path / b) for a, b in zip(images.split(), found.split())}


def test_links_are_followed_and_what_is_hidden_or_of_a_run_is_no_image(tmp_path, capsys):
    near = tmp_path / "near"
    touch(tmp_path / "far", "images/0.png masks/0.png")
    touch(near, "photos/1.png photos/checkpoint.pt run/1.png run/config.json run/metrics.csv")
    touch(near, ".t/1.png @eaDir/1.png ._2.png")
    (near / "far").symlink_to(tmp_path / "far")
    (near / "loop").symlink_to(near)

    samples = data.find_samples(near)

    assert [sample.name for sample in samples] == ["far/images/0.png", "photos/1.png"]
    assert samples[0].mask and "/run" in capsys.readouterr().out
    assert len(data.find_samples(near / "run")) == 1  # --data itself is never passed over


@each_row(
    "pattern, clicked, unmasked, training, held_out",
    r"""
        | | | t/0, t/1, [21] n/0 | t/2, t/3, [21] n/1
        t/* | | | [21] n/0, [21] n/1 | t/0, t/1, t/2, t/3
        t | | | [21] n/0, [21] n/1 | t/0, t/1, t/2, t/3
        [21] n/1 | | | t/0, t/1, t/2, t/3, [21] n/0 | [21] n/1
        [21] n/* | | | t/0, t/1, t/2, t/3 | [21] n/0, [21] n/1
        */[13] | | | t/0, t/2, [21] n/0 | t/1, t/3, [21] n/1
        | t/0, t/1 | t/0, t/2 | t/0, t/1 | t/3, [21] n/0, [21] n/1
        t/* | t/0, [21] n/0 | t/0, t/2 | [21] n/0 | t/0, t/1, t/3
    """,
)
def test_images_are_held_out_by_folder_pattern_path_or_by_having_no_click(
    pattern, clicked, unmasked, training, held_out
):
    names = "t/0, t/1, t/2, t/3, [21] n/0, [21] n/1".split(", ")  # noqa: SIM905
    samples = [data.Sample(name, Path(name), None) for name in names]
    for sample in samples:
        sample.clicks = torch.zeros(1, 3) if sample.name in clicked else None
        sample.mask = None if sample.name in unmasked else Path("mask")

    parts = data.split(samples, pattern, clicked != "")

    names = [", ".join(sample.name for sample in part) for part in parts]
    assert names == [training, held_out]


# ==== data.py: what masks hold, and clicks from a file ====


def read_classes(folder, text):
    (folder / "classes.csv").write_text(text, "utf-8")
    return data.read_classes(text and folder / "classes.csv" or None)


def read_mask(classes, path):
    """As label map, for a photograph whose first pixel is transparent."""
    photo = Image.new("RGBA", (96, 80), "white")
    photo.putpixel((0, 0), (0, 0, 0, 0))
    return classes.read_mask(path, unet.upright(photo))


@each_row(
    "mode, colors, text",
    r"""
        P | [0, 1, 2, 3] | Class;Color\nbackground;0\nroad;1\nwater;2\nfield;3\n;\n
        L | [1, 2, 3, 0] | class,color\nroad,1\nwater,2\nfield,3\n,0
        L | [0, 255] | class,color\nbackground,0\nbuilding,255
        1 | [0, 255] | class,color\nbackground,0\nbuilding,1
        L | [0, 255] | class,color\nbackground,#000000\nbuilding,#FFFFFF
        RGB | [[255, 255, 255], [0, 0, 9], [7, 7, 7]] | class,color\na,white\nb,#000009\n,#070707
        RGB | [[255, 255, 255], [0, 0, 9]] | name, r, g, b\nroad, 255, 255, 255\nsea, 0, 0, 9
        RGBA | [[60, 16, 152], [132, 41, 246], [110, 193, 228], [254, 221, 58], [226, 169, 41]] |
    """,
)
def test_classes_file_says_what_the_masks_hold(tmp_path, mode, colors, text):
    blocks = make_photos(tmp_path, json.loads(colors), mode)
    classes = read_classes(tmp_path, text)

    label_map = read_mask(classes, f"{tmp_path}/masks/3.png")

    want = np.where(blocks < len(classes.names), blocks, IGNORE_INDEX)
    want[0, 0] = IGNORE_INDEX
    assert np.array_equal(label_map, want)


@each_row(
    "text, words",
    r"""
        name,color\na,#123456 | line 1 name,r,g,b
        class,color\na,#123456\n,#000000 | 2
        class,color\na,256\nb,1 | line 2 256
        class,color\na,#123456\n\nA,#123457 | line 4
        class,color\na,#123456\nb,7 | colour number
        name,r,g,b\na,1,2,3\nb,1,2 | line 3
    """,
)
def test_classes_that_cannot_be_told_apart_are_refused(tmp_path, text, words):
    assert_refused("classes.csv " + words, read_classes, tmp_path, text)


def test_colours_of_no_class_are_counted_and_above_a_tenth_refused(tmp_path):
    classes = data.read_classes(None)
    mask = np.full((80, 96, 3), PALETTE[0])
    mask[:8] = 255, 255, 0  # a tenth

    read_mask(classes, draw_png(f"{tmp_path}/a.png", mask))
    mask[8, 0] = 0, 1, 2
    draw_png(f"{tmp_path}/b.png", mask)

    assert classes.strays == {"#FFFF00": 8 * 96}
    assert_refused("b.png 10% #FFFF00 #000102", read_mask, classes, f"{tmp_path}/b.png")


PIXELS = noise(6, 8, 3)


def clicks_of(folder, text, classes="", encoding="utf-8", pixels=PIXELS, **options):
    """The clicks on é/a.tif in a file of this text."""
    draw_png(f"{folder}/é/a.tif", pixels, **options)
    (folder / "my.csv").write_text(text, encoding, newline="")
    names = "é/a.tif b/b.tif c/b.tif".split()  # noqa: SIM905
    samples = [data.Sample(name, folder / name, None) for name in names]
    data.read_clicks(folder / "my.csv", samples, read_classes(folder, classes))
    return samples[0].clicks.tolist()


@each_row(
    "dialect, encoding, text",
    r"""
        a table | utf-8 | image,x,y,class\né/a.tif,3,4,Road\né/a.tif,7,0,Land
        empty rows | utf-8 | image;x;y;class\na.tif;3;4;Road\n;;;\na.tif;7,5;0,25;Land\n;;;\n\n
        tabs | utf-8 | image\tx\ty\tclass\na.tif\t3,9\t4,0\tRoad\na.tif\t7\t0\tLand
        sep | utf-8 | sep=;\r\nimage;x;y;class\r\na.tif;3;4;Road\r\na.tif;7;0;Land\r\n
        byte order mark | utf-8-sig | image,x,y,class\na.tif,3,4,Road\na.tif,7,0,Land
        Excel | utf-16 | image,x,y,class\né/a.tif,3,4,Road\na.tif,7,0,Land
        QGIS | utf-8 | X,Y,id,Image,Class\r\n3,4,1,a.tif,Road\r\n7,0,2,a.tif,Land
        blanks, quotes | utf-8 | image, x, y, class\n "a.tif" , 3, "4", "Road" \na.tif , 7,0 , Land
        quoted header | utf-8 | "image","x","y","class"\n"a.tif",3,4,Road\na.tif,7,0,Land,\n
        quoted line break | utf-8 | image,x,y,class,note\na.tif,3,4,Road,"1\n2"\na.tif,7,0,Land
        long field | utf-8 | image,x,y,class,note\na.tif,3,4,Road,LONG\na.tif,7,0,Land
        numbers | utf-8 | image,x,y,class\na.tif,3.9,4.0,2.0\na.tif,8,0.0,1
        capitals | utf-8 | Image,X,y,CLASS\nA.TIF,3,4,ROAD\na.tif,7,0,land
        suffix | utf-8 | image,x,y,class\na.png,3,4,Road\né/A.JPG,7,0,Land
        backslashes | utf-8 | image,x,y,class\n.\\é\\a.tif,3,4,Road\ne\u0301/a.tif,7,0,Land
        size | utf-8 | image,x,y,class,width,height\na.tif,3,4,Road,8,6\na.tif,7,0,Land,,
        twice | utf-8 | image,x,y,class\na.tif,3,4,Road\na.tif,3.5,4,Road\na.tif,7,0,Land
    """,
)
def test_clicks_are_read_in_the_forms_in_which_tools_write_them(tmp_path, dialect, encoding, text):
    clicks = clicks_of(tmp_path, text.replace("LONG", "x" * 140_000), encoding=encoding)

    assert clicks == [[7, 0, 1], [3, 4, 2]]  # in row order


@each_row(
    "text, words",
    r"""
        image,x,y,class,X\na.tif,1,1,Road,2 | two x
        image,map_x,map_y,class,MAP_X\na.tif,1,1,Road,2 | two map_x
        image,x,y,class\na.tif,"1,032",1,Road | line 2 1,032
        image,x,y,class\nb.tif,1,1,Road | line 2 b.tif
        image,x,y,class\nz.tif,1,1,Road | line 2 z.tif
        image,x,y,class\na.tif,1,1,Road\n\na.tif,1.5,1,Land | line 4 line 2
        image,x,y,class\na.tif,1,1,"Road\na.tif,2,2,Road | quote
        image,x,y,class\na.tif,1,1,Road,7 | line 2 header
        image,x,y,class,note\na.tif,1,1,Road,"1\n2"\n\na.tif,9,1,Road | line 5 8\xd76
        image,x,y,class,width,height\na.tif,1,1,Road,4,3 | line 2 4\xd73 8\xd76
        image,x,y,class,width,height\na.tif,1,1,Road,6,8 | line 2 6\xd78 8\xd76
        image,x,y,class\na.tif,1,-0.5,Road | line 2 -0.5
        image,x,y,class\na.tif,nan,1,Road | line 2 nan
        image,x,y,class\na.tif,one,1,Road | line 2 one
        image,x,y,class\na.tif,1,1,Lake | line 2 Lake Water
        image,map_x,map_y,class\na.tif,1,1,Road | line 2 a.tif GeoTIFF
        image,x,class\na.tif,1,Road | line 1 image,x,y,class
    """,
)
def test_clicks_that_can_be_read_in_two_ways_or_none_are_refused_by_line(tmp_path, text, words):
    assert_refused("my.csv " + words, clicks_of, tmp_path, text)


def test_the_number_of_a_class_is_that_of_its_file(tmp_path):
    classes = "class,color\nsea,0\nland,5\nroad,7"

    assert clicks_of(tmp_path, "image,x,y,class\na.tif,3,4,7", classes) == [[3, 4, 2]]


@each_row(
    "where, tags, world",
    r"""
        1006.2 4990.2 | {33550: (2., 2., 0.), 33922: (2., 1., 0., 1004., 4998., 0.)} |
        1005.2 4991.2 | {33550: (2., 2., 0.), 33922: (2., 1., 0., 1004., 4998., 0.), POINT} |
        1011.56 4999.08 | {34264: (1.2, 1.6, 0., 1e3, 1.6, -1.2, 0., 5e3, *[0.] * 8)} |
        1010.16 4998.88 | {34264: (1.2, 1.6, 0., 1e3, 1.6, -1.2, 0., 5e3, *[0.] * 8), POINT} |
        1010.16 4998.88 | {} | 1.2 1.6 1.6 -1.2 1000 5000
    """,
)
def test_clicks_in_map_coordinates_are_those_in_pixels(tmp_path, where, tags, world):
    tags = eval(tags.replace("POINT", "34735: (1, 1, 0, 1, 1025, 0, 1, 2)"))  # PixelIsPoint
    text = "image;map_x;map_y;class\na.tif;{};{};Road".format(*where.split())  # at (3.1, 4.9)
    draw_png(f"{tmp_path}/é/a.tif", noise(6, 8))
    Path(f"{tmp_path}/é/a.tfw").write_text(world)

    assert clicks_of(tmp_path, text, tiffinfo=tags) == [[3, 4, 2]]


def test_a_click_on_a_transparent_pixel_is_none(tmp_path):
    pixels = np.full((6, 8, 4), 255)
    pixels[:, 3, 3] = 0
    text = "image,x,y,class\na.tif,3,4,Road\na.tif,5,4,Land"

    assert clicks_of(tmp_path, text, pixels=pixels) == [[5, 4, 1]]


def test_clicks_on_a_photograph_stored_turned_are_on_the_upright_picture(tmp_path):
    pixels = np.zeros((96, 128, 3))
    pixels[5, 7] = 255  # upright, 96 wide and 128 high: x = 96 − 1 − 5, y = 7
    text = "image,x,y,class,width,height\na.tif,90,7,3,96,128"

    clicks = clicks_of(tmp_path, text, pixels=pixels, format="PNG", exif=TURNED)
    sample = data.Sample("a", f"{tmp_path}/é/a.tif", None, torch.tensor(clicks))
    train.load(sample, None, 100, 0, scale=1, size=48)

    assert sample.pixels[:, 7, 90].tolist() == [255, 255, 255, 3]


# ==== train.py: whole runs ====

train.MIN_STEPS, train.EPOCH_PIXELS = 1, 4 * 48**2  # in this process: two steps an epoch
QUICK = "--weights=none --size=48 --batch-size=4 --scale=0.6 --epochs=2 --lr=0.01"


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


def test_demo_as_a_user_starts_it_and_its_files_to_look_at(tmp_path):
    command = [sys.executable, HERE / "train.py", "--demo", "--epochs=1", "--scale=0.25"]
    printed = subprocess.check_output(command, cwd=tmp_path, text=True)
    samples = data.find_samples(DEMO)
    data.read_clicks(f"{DEMO}/clicks.csv", samples, data.read_classes(f"{DEMO}/classes.csv"))

    (out,) = tmp_path.glob("runs/*")
    miou = float(table(f"{out}/metrics.csv")[0]["miou"])
    assert 0.2 < miou < 1 and f"mIoU {miou:.3f}" in printed
    assert len(table(f"{out}/clicks.csv")) == 28 * 100


def test_another_seed_gives_other_clicks_and_numbers(finished, photos, out):
    fit(photos, "--seed 1")

    for name in ("metrics.csv", "clicks.csv"):
        assert table(f"{out}/{name}")[-1] != table(f"{finished}/{name}")[-1]


def test_scores_are_those_of_predict_at_the_held_out_masks_own_resolution(finished):
    (_, row), ious = table(f"{finished}/metrics.csv"), []
    model = unet.UNet.load(f"{finished}/checkpoint.pt")
    truth = np.array([Image.open(f"{finished}/../photos/masks/{i}.png") for i in (2, 3)])
    guess = np.array([model.predict(f"{finished}/../photos/images/{i}.png") for i in (2, 3)])
    labelled = truth.any(-1)  # (2, H, W), all but black
    right = (np.array(PALETTE)[guess] == truth).all(-1)  # (2, H, W)

    for c, color in enumerate(PALETTE):
        either = (guess == c) & labelled | (truth == color).all(-1)
        ious.append((right & (guess == c)).sum() / either.sum())

    assert float(row["pixel_accuracy"]) == pytest.approx(right[labelled].mean(), abs=1e-6)
    scores = [float(row[name]) for name in row if "iou" in name]  # the mean comes first
    assert scores == pytest.approx([np.mean(ious), *ious], abs=1e-6)


def cells_of(out, count=4):
    """predictions.png as rows of cells (300, 360, 3): image, clicks, prediction, truth."""
    rows = np.array(Image.open(f"{out}/predictions.png"))[-340 * count :]
    return rows.reshape(count, 340, 4, 370, 3).swapaxes(1, 2)[:, :, :300, 5:365]


def colors_of(cells):
    return set(map(tuple, cells.reshape(-1, 3).tolist()))


def test_picture_shows_training_images_with_their_clicks_and_held_out_ones_without(finished):
    last = table(f"{finished}/clicks.csv")[19::20]  # drawn over the others of their image
    cells = cells_of(finished)

    for dots, row in zip(cells[:2, 1], last):
        x, y = (int((int(row[name]) + 0.5) * 3.75) for name in "xy")
        assert tuple(dots[y, x]) == PALETTE[CLASSES.index(row["class"])]
    assert (cells[2:, 1] == 255).all()
    for i, (photo, _, prediction, truth) in enumerate(cells):
        mask = np.array(Image.open(f"{finished}/../photos/masks/{i}.png"))
        mask[~mask.any(-1)] = train.GREY
        assert np.array_equal(truth[1::15, 1::15], mask[::4, ::4])
        assert colors_of(prediction) <= {*PALETTE} and len(colors_of(photo)) > 999


def assert_same_run(out, finished):
    for name in ("metrics.csv", "clicks.csv"):
        assert table(f"{out}/{name}") == table(f"{finished}/{name}")
    # Ground truth is shown where it was read: not that of images that someone clicked on.
    assert np.array_equal(cells_of(out)[:, :3], cells_of(finished)[:, :3])


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
    guess = unet.UNet.load(f"{out}/checkpoint.pt").predict(f"{photos}/images/3.png")
    assert float(accuracy) == np.mean(guess[30, :50:10] == range(5))
    assert colors_of(cells_of(out, 3)[2, 1]) > {*PALETTE}


def watch(monkeypatch, module, name):
    mock = Mock(wraps=getattr(module, name))
    monkeypatch.setattr(module, name, mock)
    return mock


@each_row(
    "able, precision, weights, rate",
    """
        none | float32 | none | 0.5
        amx_bf16 | bfloat16 | r34.pth | 0.05
    """,
)
def test_loop_uses_gamma_alpha_precision_areas_and_a_tenth_of_the_rate_where_pretrained(
    photos, monkeypatch, able, precision, weights, rate
):
    monkeypatch.chdir(photos)
    torch.save(unet.resnet34().state_dict(), "r34.pth")
    loss = watch(monkeypatch, train, "partial_focal_cross_entropy")
    sampler = watch(monkeypatch, train, "WeightedRandomSampler")
    cycle = watch(monkeypatch, torch.optim.lr_scheduler, "OneCycleLR")
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {able: True})

    fit(photos, f"--epochs 1 --gamma 1.5 --alpha 0.7 --lr 0.5 --scale 0.5 --weights {weights}")

    (logits, _), options = loss.call_args
    optimizer, *rates = cycle.call_args.args
    config = json.loads(Path("../run/config.json").read_text())
    assert options == {"gamma": 1.5, "alpha": 0.7}
    assert sampler.call_args.args == ([48 * 40] * 2, 8)  # without the padding
    assert rates == [[float(rate), 0.5], 2]
    assert [len(group["params"]) for group in optimizer.param_groups] == [108, 32]  # all learn
    assert str(logits.dtype) == f"torch.{precision}" and config["precision"] == precision
    assert config.keys() > {*vars(train.parse_args([])), "threads", "torch"}


def test_own_classes_are_trained_on_and_drawn_and_what_cannot_be_used_is_told(photos, out, capsys):
    blocks = make_photos(photos, [0, 255, 7], "L")
    mask = np.array([0, 255, 7])[blocks]
    mask[0, :3] = 9
    draw_png(f"{photos}/masks/3.png", mask)
    draw_png(f"{photos}/masks/77.png", mask)
    draw_png(f"{photos}/masks/00.png", np.full((80, 96), 7))  # no label in it
    draw_png(f"{photos}/images/00.png", noise(80, 96, 3))
    draw_png(f"{photos}/images/1.png", noise(96, 80, 3), exif=TURNED)
    (photos / "images/notes.txt").touch()
    read_classes(
        photos, "class,color\nGrund,0\nGebäude 道路,255\n,7\nA,1\nB,2\nC,3\nD,4\nE,5\nF,6\n"
    )

    fit(photos, f"--epochs 1 --points all --classes {photos}/classes.csv")

    told = capsys.readouterr().out
    words = "3,867 notes.txt 77.png 1_images_left_out stored_turned 3_pixels #090909 without_labels"
    assert all(word.replace("_", " ") in told for word in words.split())
    row = table(f"{out}/metrics.csv")[0]
    mean, *ious = [
        float(row[name]) for name in row if "iou" in name and row[name]
    ]  # A … F may have none
    assert mean == pytest.approx(np.mean(ious), abs=1e-6)
    assert row["iou_Gebäude 道路"] and not table(f"{out}/clicks.csv")
    drawn = sorted(colors_of(cells_of(out)[2:, 3]))
    assert len(drawn) == 3 and np.abs(np.diff(drawn, axis=0)).sum(1).min() > 50


# ==== train.py: everything that goes wrong ====


@each_row(
    "mistake, words",
    r"""
        --epochs 0 | --epochs 0
        --epochs 2.5 | --epochs 2.5
        --points -3 | --points -3
        --points some | --points some
        --size 47 | --size 47
        --scale 0 | --scale 0
        --lr nan | --lr nan
        --lr inf | --lr inf
        --gamma -1 | --gamma -1
        --alpha x | --alpha x
        --seed 99999999999999999999 | --seed 9999
        --wieghts none | --wieghts
        --device gpu7 | --device gpu7
        --device meta | --device meta
        --classes nowhere.csv | nowhere.csv
        --clicks nowhere.csv | nowhere.csv
        --points 5 --clicks x | --points --clicks
        --hold-out nothing/* | --hold-out nothing/* images/0.png
        --hold-out * | --hold-out *
        --weights Imagenet | Imagenet --weights
        --resume nowhere | nowhere
        --out /dev | --out /dev
        --demo | --demo --data
        --data /dev/shm/nothing | --data /dev/shm/nothing
        masks/0.png gone | images/0.png mask --masks
        masks/3.png gone | images/3.png mask
        images/0.png cut | images/0.png
        images/3.png cut | images/3.png
        masks/0.png cut | masks/0.png
        masks/3.png cut | masks/3.png
        masks/0.png 9 | masks/0.png (9, 9) (96, 80)
        masks/0.bmp 9 | masks/0.png masks/0.bmp
    """,
)
def test_a_mistake_is_named_and_nothing_is_written(photos, out, mistake, words):
    name, change, *_ = mistake.split() + [""]
    if change == "9":
        draw_png(f"{photos}/{name}", noise(9, 9))
    elif change == "cut":
        os.truncate(photos / name, 90)
    elif change == "gone":
        os.remove(photos / name)

    assert_refused(f"error: {words}", fit, photos, mistake if mistake[0] == "-" else "")

    assert not out.exists()


def assert_goes_on(out, finished):
    """Resumed, a run ends like one left alone, with the photographs elsewhere."""
    cli(f"--resume {out} --data {finished.parent}/photos")
    assert_same_run(out, finished)
    assert len(os.listdir(out)) == 5


@each_row(
    "what, words",
    r"""
        model.head.bias.data.fill_(torch.nan) | epoch 2/2 --lr
        (out / "checkpoint.pt.partial").symlink_to("/dev/full") | checkpoint.pt space
        (out / "metrics.csv.partial").symlink_to("/dev/full") | metrics.csv space
        shutil.rmtree(photos) | images/2.png
        signal.raise_signal(signal.SIGINT) | interrupted
    """,
)
def test_what_happens_before_the_first_scores_is_told_and_the_run_goes_on(
    finished, photos, out, what, words
):
    evaluate = train.evaluate

    def happen(model, *arguments, photos=photos, out=out):
        eval(what)
        return evaluate(model, *arguments)

    with patch.object(train, "evaluate", happen):
        assert_refused(words, fit, photos)

    assert not list(out.glob("*.partial"))
    assert_goes_on(out, finished)


def test_a_run_killed_while_it_saves_goes_on(finished, photos, out):
    code = "import train as t; t.MIN_STEPS, t.EPOCH_PIXELS = 1, 9216; t.main(t.parse_args())"
    command = [sys.executable, "-c", code, *flags_for(photos).split()]
    process = subprocess.Popen(command, cwd=HERE)
    files = [out / "metrics.csv", out / "checkpoint.pt.partial"]
    while process.poll() is None and not all(map(Path.exists, files)):
        time.sleep(0.001)

    process.kill()

    assert process.wait() == -signal.SIGKILL
    assert_goes_on(out, finished)


@each_row(
    "name, content, flags, words",
    r"""
        config.json | {} | | config.json version
        config.json | {"data": | | config.json
        checkpoint.pt | | | checkpoint.pt
        checkpoint.pt | OLD | | checkpoint.pt version
        clicks.csv | image,x,y,class\n | | clicks
        old.txt | | --epochs 9 | epochs
        old.txt | | --data {} | images
    """,
)
def test_resume_refuses_what_is_not_the_same_run(finished, out, name, content, flags, words):
    shutil.copytree(finished, out)
    (out / name).write_text(content)
    if content == "OLD":
        torch.save({}, out / name)

    assert_refused(words, cli, f"--resume {out} " + flags.format(DEMO))


def test_default_names_are_never_shared_and_of_two_runs_with_one_out_one_is_refused(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda text: "runs/now")
    args = train.parse_args([])

    folders = {train.begin(args, "cpu", "") for _ in range(3)}
    args.out = folders.pop()

    assert len(folders) == 2
    assert_refused(f"--out {args.out}", train.begin, args, "cpu", "")


def test_in_a_notebook_it_runs_and_a_programmers_mistake_is_a_traceback(photos, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # cannot be reconfigured
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
    body = archive.getvalue()
    state = {"status": 200, "body": body, "size": len(body), "tokens": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read1()  # only here: a download that goes on has no body
            state["tokens"].append(str(self.headers["Authorization"]))
            self.do_GET()

        def do_GET(self):
            self.send_response(state["status"])
            self.send_header("Content-Length", state["size"])
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


@each_row(
    "file, content, token, change, reason",
    r"""
        none | | None | {"status": 403} | 403
        kaggle.json | {"username": "a", "key": "a"} | Basic YTph | {"size": 99999} | failed
        .kaggle/kaggle.json | {"username": "a", "key": "a"} | Basic YTph | {"url": "ftp:"} | ftp
        .kaggle/access_token | KGAT_a | Bearer KGAT_a | {"body": b"no zip", "size": 6} | zip
    """,
)
def test_download_tells_why_it_failed_and_a_second_run_heals_it_and_uses_a_token_if_there_is_one(
    kaggle_server, file, content, token, change, reason
):
    Path(".kaggle").mkdir()
    Path(file).write_text(content)
    words = f"{reason} unzip KAGGLE_API_TOKEN access_token kaggle.json --demo"

    with patch.dict(kaggle_server, eval(change)):
        assert_refused(words, cli, "--out run")
    assert os.listdir("data") == [] and not Path("run").exists()

    assert data.find_dataset(None) == data.find_dataset(None)  # downloaded once
    assert os.listdir("data") == [data.FOLDER] and set(kaggle_server["tokens"]) == {token}


def test_an_archive_that_a_browser_left_is_named(tmp_path):
    (tmp_path / "archive.zip").touch()

    assert_refused("archive.zip unzip", data.fetch, tmp_path)


# ==== docs/click.html: a person's clicks, in a real browser ====

PAGE = (HERE / "docs/click.html").as_uri()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --window-size=1200,800"


@pytest.fixture(scope="session")
def browsers():
    """One browser per device pixel ratio: an emulated ratio does not reach the canvas."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser")
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome to open docs/click.html in")
    with api.sync_playwright() as playwright:
        yield {
            ratio: playwright.chromium.launch(
                executable_path=CHROMIUM,
                args=[*FLAGS.split(), f"--force-device-scale-factor={ratio}"],
            )
            for ratio in (1, 1.5, 2)
        }


@pytest.fixture(params=[1])
def page(browsers, request):
    """docs/click.html as it is opened for the first time."""
    context = browsers[request.param].new_context(no_viewport=True)
    page = context.new_page()
    page.goto(PAGE)
    page.on("dialog", lambda dialog: dialog.accept())
    yield page
    context.close()


@pytest.fixture
def photo(page, tmp_path):
    """A photograph that the page has opened."""
    photo = make_photo(tmp_path / "a.png")
    open_photos(page, photo)
    return photo


def make_photo(path, width=60, height=40, **options):
    """A photograph whose colours say the position."""
    y, x = np.indices((height, width))
    color = np.dstack([x, y, x // 256 * 16 + y // 256]).astype(np.uint8)  # (H, W, 3)
    Image.fromarray(color).save(path, quality=100, subsampling=0, **options)
    return path


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def open_photos(page, *photos):
    page.set_input_files("#files", photos)
    wait_for(page, photos[-1])


def wait_for(page, photo):
    page.wait_for_selector(f"#view[data-image$={photo.name[-5:]!r}]")


def aim(page, dx=0, dy=0):
    """Move the pointer to a place that is told from the canvas's middle."""
    x, y, width, height = page.locator("#view").bounding_box().values()
    place = x + width / 2 + dx, y + height / 2 + dy
    page.mouse.move(*place)
    return place


def click(page, dx=0, dy=0):
    page.mouse.click(*aim(page, dx, dy))


def colors(page, *places):
    """What the screen shows there."""
    ratio = page.evaluate("devicePixelRatio")
    screen = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    return [screen.getpixel((int(x * ratio), int(y * ratio))) for x, y in places]


def save(page):
    """The bytes of clicks.csv and classes.csv."""
    is_second = lambda file: file.suggested_filename == "classes.csv"
    with page.expect_download(is_second) as classes, page.expect_download() as clicks:
        page.click("#save")
    return [Path(file.value.path()).read_bytes() for file in (clicks, classes)]


def rows(page):
    """image, x, y, class, width, height of every click."""
    lines = csv.reader(io.StringIO(save(page)[0].decode()))
    return [[int(v) if v.isdecimal() else v for v in line] for line in lines][1:]


def pixels(page):
    return [(x, y) for _, x, y, *_ in rows(page)]


def texts(page, selector):
    return page.locator(selector).all_text_contents()


@each("page", [1, 1.5, 2], indirect=True)
@each("wheel", [0, -100, -450, -1500])
def test_a_click_is_the_pixel_whose_colour_the_screen_shows(page, tmp_path, wheel):
    photo = make_photo(tmp_path / "a.png", 301, 203)
    open_photos(page, photo)
    page.keyboard.press("h")
    aim(page, 37, -21)
    page.mouse.wheel(0, wheel)

    places = [aim(page, n * 9.5, n * 5.5) for n in range(9)]
    shown = colors(page, *places)
    for place in places:
        page.mouse.click(*place)

    assert [Image.open(photo).getpixel(pixel) for pixel in pixels(page)] == shown


@each("orientation", range(1, 9))
def test_a_turned_photograph_is_clicked_as_pillow_turns_it(page, tmp_path, orientation):
    photo = make_photo(tmp_path / "a.jpg", 200, 120, exif=turned(orientation))
    open_photos(page, photo)

    [shown] = colors(page, aim(page, 60, 90))
    click(page, 60, 90)

    sample = data.Sample("a.jpg", photo, None)
    for name, content in zip(("clicks.csv", "classes.csv"), save(page)):
        (tmp_path / name).write_bytes(content)
    classes = data.read_classes(tmp_path / "classes.csv")
    data.read_clicks(tmp_path / "clicks.csv", [sample], classes)  # it checks the size, too
    [[x, y, _]] = sample.clicks.tolist()
    assert ImageOps.exif_transpose(Image.open(photo)).getpixel((x, y)) == pytest.approx(
        shown, abs=4
    )


@each("width, height", [(1, 1), (5000, 4000)])
def test_photographs_of_one_and_of_20_million_pixels_are_clicked(page, tmp_path, width, height):
    open_photos(page, make_photo(tmp_path / "a.png", width, height, compress_level=1))

    click(page)

    assert pixels(page) == [pytest.approx((width // 2, height // 2), abs=10)]


def test_a_drag_moves_the_photograph_and_clicks_nothing(page, photo):
    before = colors(page, aim(page))

    page.mouse.down()
    place = aim(page, 100, 50)
    page.mouse.up()

    assert colors(page, place) == before
    assert not rows(page)


def test_reloading_and_loading_bring_every_byte_back(page, tmp_path):
    open_photos(page, make_photo(tmp_path / 'a, "b" c.png'))
    click(page)
    page.click("#add")
    page.keyboard.press("6")
    click(page, 30)
    saved = save(page)

    page.reload()
    assert save(page) == saved

    page.evaluate("localStorage.clear()")
    page.reload()  # now nothing is open, and nothing stored
    page.set_input_files("#load", [{"name": "", "mimeType": "", "buffer": file} for file in saved])
    page.wait_for_selector("#images .closed")
    assert save(page) == saved


def test_a_name_from_a_file_runs_nothing(page, tmp_path):
    photo = make_photo(tmp_path / "<img src=x onerror=alert(1)>.png")

    open_photos(page, photo)
    click(page)

    assert texts(page, "#images li") == [photo.name]
    assert not texts(page, "img")


def test_classes_are_added_renamed_and_removed_with_their_clicks(page, photo):
    page.click("#add")
    for digit in "61":
        page.keyboard.press(digit)
        click(page, 50 * int(digit))

    page.locator("#classes [type=text]").last.fill("Pool, blue")
    page.keyboard.press("Enter")
    assert [row[3] for row in rows(page)] == ["Pool, blue", "Building"]

    page.locator("#classes button").last.click()
    assert [row[3] for row in rows(page)] == ["Building"]


def test_two_tabs_share_their_clicks(page, photo):
    other = page.context.new_page()
    other.goto(PAGE)

    click(page)
    other.wait_for_selector("#images .closed")
    other.click("#undo")
    page.wait_for_selector("#images li:not([data-clicks='1'])")

    assert not rows(page)


def test_a_full_store_is_told_and_closing_warns(page, photo):
    page.evaluate("Storage.prototype.setItem = null")

    click(page)
    message = texts(page, "#message")
    with page.expect_event("dialog") as dialog:
        page.close(run_before_unload=True)

    assert "save before" in message[0] and dialog.value.type == "beforeunload"


@each("name", ["b.jpg", "b.tif", "b.webp"])
def test_what_cannot_be_shown_is_named_and_the_next_is_opened(page, photo, tmp_path, name):
    broken = make_photo(tmp_path / name, exif=turned(6))
    if name == "b.jpg":
        broken.write_bytes(b"no picture")

    open_photos(page, broken, make_photo(tmp_path / "c.png"))

    assert texts(page, "#message")[0].startswith(name)
    assert texts(page, "#images li") == ["a.png", "c.png"]


def test_proposed_points_are_labelled_by_keys_and_passed_by_space(page, tmp_path):
    open_photos(page, make_photo(tmp_path / "a.png", 12, 9))
    page.click("#propose")

    for key in [*"12345" * 19, "Space", "Space", "Control+z", *"1234"]:
        page.keyboard.press(key)

    assert len(set(pixels(page))) == 99
    assert {row[3] for row in rows(page)[::5]} == {"Building"}


def test_delete_takes_the_nearest_dot_and_undo_goes_back_across_photographs(page, photo, tmp_path):
    click(page, 3, 3)
    click(page, 60)
    aim(page, 50)
    page.keyboard.press("Delete")
    assert pixels(page) == [(30, 20)]

    open_photos(page, make_photo(tmp_path / "b.png"))
    page.keyboard.press("Control+z")
    wait_for(page, photo)
    assert len(rows(page)) == 2


def test_maps_are_laid_over_photographs_of_their_size_alone(page, photo, tmp_path):
    (tmp_path / "maps").mkdir()
    Image.new("RGB", (60, 40), "red").save(tmp_path / "maps/a.png")
    Image.new("L", (30, 20)).save(tmp_path / "maps/a_confidence.png")

    page.set_input_files("#maps", tmp_path / "maps")
    page.fill("#opacity", "100")
    page.wait_for_timeout(300)
    shown = colors(page, aim(page))
    page.keyboard.press("m")
    page.wait_for_selector("#message:not(:empty)")

    assert shown == [(255, 0, 0)]
    assert "30×20 pixels, its photograph 60×40" in texts(page, "#message")[0]
