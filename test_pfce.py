"""Every test of the project. Each name says what would be broken if the test failed.

python -m pytest             the tests: no network, no dataset, two and a half minutes on two cores
python test_pfce.py          a benchmark of the loss (timings are not tests)
"""

import csv
import functools
import http.server
import io
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from data import CLASSES, IGNORE_INDEX, PALETTE, UNLABELED, sample_points
from pfce import PartialFocalCrossEntropyLoss, partial_focal_cross_entropy
from unet import UNet, starts, upsample_rows

HERE = Path(__file__).parent


# ==== pfce.py: the loss ====


def example(*spatial, C=4, N=2, share=0.3, ignore_index=255, dtype=torch.float64, seed=0):
    """Random logits (N, C, *spatial) and a target with about `share` of its pixels labelled."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N, C, *spatial, generator=g, dtype=dtype)
    target = torch.randint(C, (N, *spatial), generator=g)
    target[torch.rand(target.shape, generator=g) > share] = ignore_index
    return logits, target


def by_hand(logits, target, gamma, alpha, ignore_index):
    """The formula, pixel by pixel in plain Python floats: (sum of the losses, number of labels)."""
    total, count = 0.0, 0
    for where in itertools.product(*(range(n) for n in target.shape)):
        y = int(target[where])
        if y == ignore_index:
            continue
        scores = [float(logits[(where[0], c, *where[1:])]) for c in range(logits.shape[1])]
        p = math.exp(scores[y]) / sum(math.exp(s) for s in scores)
        weight = alpha[y] if isinstance(alpha, list) else alpha
        total += weight * (1 - p) ** gamma * -math.log(p)
        count += 1
    return total, count


@pytest.mark.parametrize("spatial", [(), (9,), (5, 6), (4, 8), (2, 3, 4)])
@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2.0, 5])
@pytest.mark.parametrize("C, alpha", [(2, 0.25), (4, [0.1, 0.2, 0.3, 0.4]), (1, 1), (7, 1.5)])
def test_loss_equals_the_formula_written_out_by_hand(spatial, gamma, C, alpha):
    logits, target = example(*spatial, C=C, N=6)
    total, count = by_hand(logits, target, gamma, alpha, 255)
    options = {"gamma": gamma, "alpha": alpha}
    mean = partial_focal_cross_entropy(logits, target, **options)
    assert mean.item() == pytest.approx(total / max(count, 1), rel=1e-9, abs=1e-12)
    summed = partial_focal_cross_entropy(logits, target, **options, reduction="sum")
    assert summed.item() == pytest.approx(total, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("ignore_index", [255, -100, -1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gamma_0_alpha_1_is_torch_cross_entropy(ignore_index, reduction):
    logits, target = example(8, 16, ignore_index=ignore_index)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    ours = partial_focal_cross_entropy(logits, target, gamma=0, alpha=1, **options)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, **options))


def test_alpha_does_not_leak_into_p():
    logits, target = example(8, 8)
    one = partial_focal_cross_entropy(logits, target, alpha=1.0)
    for alpha in (0.0, 0.1, 3.0):
        scaled = partial_focal_cross_entropy(logits, target, alpha=alpha)
        torch.testing.assert_close(scaled, alpha * one)


def test_alpha_may_be_a_number_a_list_or_a_tensor():
    logits, target = example(8, 8)
    number = partial_focal_cross_entropy(logits, target, alpha=0.3)
    for alpha in ([0.3] * 4, torch.full((4,), 0.3), torch.tensor(0.3), np.full(4, 0.3)):
        same = partial_focal_cross_entropy(logits, target, alpha=alpha)
        torch.testing.assert_close(same, number, rtol=1e-7, atol=0)


def test_mean_is_over_labelled_pixels_not_over_all():
    logits, target = example(16, 16)
    padded_logits = F.pad(logits, (0, 48))  # three quarters of the image without a label
    padded_target = F.pad(target, (0, 48), value=255)
    torch.testing.assert_close(
        partial_focal_cross_entropy(padded_logits, padded_target),
        partial_focal_cross_entropy(logits, target),
    )


def test_reduction_none_keeps_the_shape_and_is_zero_where_unlabelled():
    for spatial in [(7,), (4, 8), (2, 3, 5)]:
        logits, target = example(*spatial)
        loss = partial_focal_cross_entropy(logits, target, reduction="none")
        assert loss.shape == target.shape
        assert (loss[target == 255] == 0).all() and (loss[target != 255] > 0).all()
        total = partial_focal_cross_entropy(logits, target, reduction="sum")
        torch.testing.assert_close(loss.sum(), total)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_label_at_all_gives_zero_and_zero_gradients(reduction):
    logits, target = example(8, 8, share=0)
    logits.requires_grad_()
    loss = partial_focal_cross_entropy(logits, target, reduction=reduction)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert loss.abs().sum().item() == 0 and loss.requires_grad
    loss.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 3, 8, 0), (0, 3)])
def test_empty_batches_give_zero(shape):
    logits = torch.zeros(shape, requires_grad=True)
    target = torch.zeros(shape[:1] + shape[2:], dtype=torch.long)
    loss = partial_focal_cross_entropy(logits, target)
    loss.backward()
    assert loss.item() == 0


def test_exactly_one_label_works():
    logits, target = example(8, 8, share=0)
    target[1, 3, 5] = 2
    logits.requires_grad_()
    loss = partial_focal_cross_entropy(logits, target)
    p = logits[1, :, 3, 5].softmax(0)[2]
    torch.testing.assert_close(loss, 0.25 * (1 - p) ** 2 * -p.log())
    loss.backward()
    assert (logits.grad != 0).sum() == 4  # the four classes of that one pixel


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unlabelled_pixels_cannot_reach_the_result_even_when_nan(bad, reduction):
    logits, target = example(8, 8)
    clean = partial_focal_cross_entropy(logits, target, reduction=reduction)
    logits = torch.where((target == 255)[:, None], bad, logits).requires_grad_()
    loss = partial_focal_cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(loss, clean, rtol=0, atol=0)
    loss.sum().backward()
    assert (logits.grad.movedim(1, -1)[target == 255] == 0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0, 0.1, 0.5, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_confident_pixels_have_finite_gradients(gamma, dtype):
    target = torch.tensor([[0, 1, 0, 1]])  # right, wrong, right, wrong with certainty
    logits = torch.tensor([[[500.0, 500, 1e4, 1e4], [-500, -500, -1e4, -1e4]]], dtype=dtype)
    logits.requires_grad_()
    loss = partial_focal_cross_entropy(logits, target, gamma=gamma)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("gap", [1, 10, 17, 30, 60])
@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_one_minus_p_is_not_cancelled_in_float32(gap, gamma):
    logits = torch.tensor([[[float(gap)], [0.0]]])  # p = 1 / (1 + e^−gap); float32 rounds p to 1
    loss = partial_focal_cross_entropy(logits, torch.tensor([[0]]), gamma=gamma, alpha=1)
    q = math.exp(-gap) / (1 + math.exp(-gap))
    assert loss.item() == pytest.approx(q**gamma * math.log1p(math.exp(-gap)), rel=1e-5)


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_a_label_that_the_logits_rule_out_costs_infinity_as_in_torch(gamma):
    logits, target = torch.tensor([[[-math.inf], [0.0]]]), torch.tensor([[0]])
    assert F.cross_entropy(logits, target) == math.inf
    assert partial_focal_cross_entropy(logits, target, gamma=gamma) == math.inf
    assert partial_focal_cross_entropy(logits, 1 - target, gamma=gamma) == 0


def test_float64_keeps_its_precision_on_pixels_that_are_wrong():
    logits = torch.tensor([[[-22.0], [0.0]]], dtype=torch.float64)
    loss = partial_focal_cross_entropy(logits, torch.tensor([[0]]), gamma=0, alpha=1)
    assert loss.item() == pytest.approx(math.log1p(math.exp(22)), rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_and_returned_in_float32(dtype):
    logits, target = example(8, 8, dtype=torch.float32)
    logits = logits.to(dtype).requires_grad_()
    loss = partial_focal_cross_entropy(logits, target)
    exact = partial_focal_cross_entropy(logits.detach().double(), target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward()
    assert logits.grad.dtype == dtype


def test_autocast_does_not_lower_the_precision():
    logits, target = example(8, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = partial_focal_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, partial_focal_cross_entropy(logits, target))


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_float64_stays_float64_and_passes_gradcheck(gamma):
    logits, target = example(3, 8)
    logits.requires_grad_()

    def loss(z):
        return partial_focal_cross_entropy(z, target, gamma=gamma, alpha=[1.0, 2, 3, 4])

    assert loss(logits).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64],
)
def test_targets_of_every_integer_type_give_the_same(dtype):
    logits, target = example(8, 16, ignore_index=100)
    want = partial_focal_cross_entropy(logits, target, ignore_index=100)
    got = partial_focal_cross_entropy(logits, target.to(dtype), ignore_index=100)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_ignore_index_beyond_the_target_type_does_not_wrap_around_to_a_class():
    logits, target = example(8, 8, share=1)
    want = partial_focal_cross_entropy(logits, target)
    # −253 + 256 = 3: as uint8 it would hide all pixels of class 3
    got = partial_focal_cross_entropy(logits, target.to(torch.uint8), ignore_index=-253)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_a_target_may_begin_anywhere_in_memory(start, dtype):
    logits, target = example(8, 16)
    want = partial_focal_cross_entropy(logits, target)
    storage = torch.zeros(start + target.numel(), dtype=dtype)
    inside = storage[start:].view(target.shape).copy_(target)  # at an offset torch knows of
    size = target.numel() * dtype.itemsize
    array = np.zeros(size + 8, np.uint8)[start : start + size].view(f"u{dtype.itemsize}")
    foreign = torch.from_numpy(array).view(dtype).view(target.shape).copy_(target)  # odd address
    for moved in (inside, foreign):
        assert torch.equal(partial_focal_cross_entropy(logits, moved), want)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_a_target_may_be_every_second_value_or_one_value_expanded(dtype):
    logits, target = example(8, 16)
    target = target.to(dtype)
    second = target.repeat_interleave(2, dim=-1)[..., ::2]
    want = partial_focal_cross_entropy(logits, target)
    assert torch.equal(partial_focal_cross_entropy(logits, second), want)
    row = target[:, :1].expand(-1, 8, -1)
    want = partial_focal_cross_entropy(logits, row.clone())
    assert torch.equal(partial_focal_cross_entropy(logits, row), want)


@pytest.mark.parametrize("width", [16, 13])
def test_strided_and_channels_last_inputs_give_the_same_and_keep_their_layout(width):
    logits, target = example(16, width)
    plain = logits.clone().requires_grad_()
    want = partial_focal_cross_entropy(plain, target)
    want.backward()
    views = {
        "channels_last": (logits.clone(memory_format=torch.channels_last), target),
        "transposed": (logits.mT.contiguous().mT, target.mT.contiguous().mT),
        "sliced": (F.pad(logits, (1, 2))[..., 1:-2], F.pad(target, (1, 2))[..., 1:-2]),
    }
    for name, (z, t) in views.items():
        z = z.detach().requires_grad_()
        loss = partial_focal_cross_entropy(z, t)
        loss.backward()
        torch.testing.assert_close(loss, want, msg=name)
        torch.testing.assert_close(z.grad, plain.grad, msg=name)
        if name == "channels_last":
            assert z.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore")
def test_torch_compile_gives_the_same():
    logits, target = example(8, 16, dtype=torch.float32)
    compiled = torch.compile(partial_focal_cross_entropy, backend="aot_eager")
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    compiled(a, target).backward()
    partial_focal_cross_entropy(b, target).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_module_is_the_function_without_parameters_and_moves_with_its_alpha():
    logits, target = example(8, 8)
    module = PartialFocalCrossEntropyLoss(gamma=1.5, alpha=[0.5, 1, 2, 4], ignore_index=3)
    target[target == 255] = 3
    want = partial_focal_cross_entropy(
        logits, target, gamma=1.5, alpha=[0.5, 1, 2, 4], ignore_index=3
    )
    torch.testing.assert_close(module(logits, target), want)
    assert not list(module.parameters()) and not module.state_dict()
    assert module.to("meta").alpha.device.type == "meta"
    assert PartialFocalCrossEntropyLoss().alpha == 0.25


L, T = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)


@pytest.mark.parametrize(
    "logits, target, options, words",
    [
        (L, T[:, :3], {}, ["(2, 4, 5)", "(2, 3, 5)"]),
        (L, T[0], {}, ["(2, 4, 5)", "(4, 5)"]),
        (L, T.float(), {}, ["integer", "float32"]),
        (L, T.bool(), {}, ["integer", "bool"]),
        (L, L.long(), {}, ["(2, 4, 5)", "(2, 3, 4, 5)"]),  # one-hot
        (L.long(), T, {}, ["float", "int64"]),
        (L[0, 0, 0], T, {}, ["(N, C, *spatial)", "(5,)"]),
        (L, T + 3, {}, ["0…2", "3"]),
        (L, T - 1, {}, ["0…2", "-1"]),
        (L, T.to(torch.uint8) + 255, {"ignore_index": -1}, ["0…2", "255"]),
        (L, T, {"alpha": [1.0, 2.0]}, ["3 weights", "(2,)"]),
        (L, T, {"alpha": -0.1}, ["alpha", "-0.1"]),
        (L, T, {"alpha": math.nan}, ["alpha", "nan"]),
        (L, T, {"alpha": [1, 1, math.inf]}, ["alpha", "inf"]),
        (L, T, {"alpha": torch.tensor([1.0, -1, 1])}, ["alpha", "-1"]),
        (L, T, {"gamma": -1}, ["gamma", "-1"]),
        (L, T, {"gamma": math.nan}, ["gamma", "nan"]),
        (L, T, {"gamma": math.inf}, ["gamma", "inf"]),
        (L, T, {"reduction": "average"}, ["reduction", "average"]),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(logits, target, options, words):
    with pytest.raises(ValueError) as refusal:
        partial_focal_cross_entropy(logits, target, **options)
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize("options", [{"gamma": -1}, {"alpha": [-1.0, 1]}, {"reduction": "avg"}])
def test_module_refuses_bad_options_when_it_is_made(options):
    with pytest.raises(ValueError):
        PartialFocalCrossEntropyLoss(**options)


@pytest.mark.parametrize("spatial", [(), (13,), (8, 16)])
def test_a_gpu_gets_the_same_from_operations_that_every_device_has(monkeypatch, spatial):
    logits, target = example(*spatial, N=5)
    plain, away = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    want = partial_focal_cross_entropy(plain, target)
    want.backward()
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    with Operations() as calls:
        loss = partial_focal_cross_entropy(away, target)
        loss.backward()
    assert not {"take", "put_"} & {call.split(".")[1] for call in calls}, calls
    assert torch.equal(loss, want) and torch.equal(away.grad, plain.grad)


def test_at_most_two_synchronisations_per_call(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # so that the CPU does what a GPU does
    logits, target = example(8, 16)
    logits.requires_grad_()
    for alpha in (0.25, [1.0, 2, 3, 4], torch.ones(4)):
        with Operations() as calls:
            partial_focal_cross_entropy(logits, target, alpha=alpha).backward()
        waits = [
            call
            for call in calls
            if any(word in call for word in ("nonzero", "local_scalar", "item", "equal"))
        ]
        assert 1 <= len(waits) <= 2, waits


class Operations(TorchDispatchMode):
    """Names of the operations that torch executes, as "aten.add.Tensor"."""

    def __enter__(self):
        super().__enter__()
        self.calls = []
        return self.calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_dense_temporary_beyond_the_gradient_in_either_layout(layout):
    logits, target = example(64, 64, N=4, C=6, share=0.01, dtype=torch.float32)
    logits = logits.to(memory_format=layout).requires_grad_()
    peak = extra_memory(lambda: partial_focal_cross_entropy(logits, target).backward(), logits)
    assert 1 <= peak < 1.25  # 1 is the gradient; a gradient in another layout is copied: 2


def extra_memory(step, logits) -> float:
    """Peak of what torch allocates during `step`, in units of the logits' gradient."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate(event.nbytes() for event in events), default=0)
    return peak / (logits.numel() * logits.element_size())


# ==== data.py: masks, clicks, crops ====


@pytest.fixture
def tiny(tmp_path):
    return make_tiny(tmp_path)


def make_tiny(tmp_path):
    """A dataset in the layout of the real one: two tiles of four images of 72×56 pixels."""
    rng = np.random.default_rng(0)
    colors = np.array(PALETTE, np.uint8)
    for tile, part in itertools.product((1, 2), (1, 2, 3, 4)):
        folder = tmp_path / "tiny" / data.FOLDER / f"Tile {tile}"
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        index = rng.integers(0, 5, (7, 9)).repeat(8, 0).repeat(8, 1)
        photo = colors[index] // 2 + rng.integers(0, 60, (56, 72, 3))
        name = f"image_part_{part:03d}"
        Image.fromarray(photo.astype(np.uint8)).save(folder / "images" / f"{name}.jpg")
        Image.fromarray(colors[index]).save(folder / "masks" / f"{name}.png")
    return tmp_path / "tiny" / data.FOLDER


def test_sampler_keeps_exactly_n_distinct_labelled_pixels_with_their_class():
    mask = torch.randint(5, (40, 50), dtype=torch.uint8)
    mask[:, :20] = IGNORE_INDEX
    before = mask.clone()
    for n in (1, 2, 100, 1199, 1200):
        points = sample_points(mask, n, torch.Generator().manual_seed(n))
        kept = points != IGNORE_INDEX
        assert kept.sum() == n and points.shape == mask.shape and points.dtype == mask.dtype
        assert (points[kept] == mask[kept]).all() and (mask[kept] != IGNORE_INDEX).all()
    assert torch.equal(mask, before)


def test_sampler_keeps_all_where_there_are_fewer():
    mask = torch.full((9, 9), IGNORE_INDEX)
    mask[2, 3], mask[4, 5] = 1, 2
    assert torch.equal(sample_points(mask, 100, torch.Generator()), mask)
    assert (sample_points(torch.full((3, 3), 255), 5, torch.Generator()) == 255).all()


def test_sampler_is_reproducible_from_its_generator():
    mask = torch.zeros(30, 30, dtype=torch.long)
    a, b, c = (sample_points(mask, 50, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_sampler_is_unbiased_every_pair_of_pixels_is_equally_likely():
    mask = torch.tensor([[0, 255, 0], [0, 0, 255], [255, 0, 0]])  # 6 labelled pixels, 15 pairs
    g, rounds, seen = torch.Generator().manual_seed(0), 6000, {}
    for _ in range(rounds):
        pair = tuple((sample_points(mask, 2, g).flatten() != 255).nonzero()[:, 0].tolist())
        seen[pair] = seen.get(pair, 0) + 1
    chi2 = sum((n - rounds / 15) ** 2 / (rounds / 15) for n in seen.values())
    assert len(seen) == 15 and chi2 < 36.1  # 14 degrees of freedom, one in a thousand


def test_clicks_depend_on_seed_and_image_and_not_on_the_order_of_reading(tiny):
    samples, _, _ = data.read_dataset(tiny, PALETTE)
    args = train.parse_args(["--points", "20"])
    forwards, backwards = train.click(samples, args, 1), train.click(samples[::-1], args, 1)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)
    other_epoch = train.click(samples, args, 2)
    assert not any(torch.equal(forwards[name], other_epoch[name]) for name in forwards)


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_masks_are_read_by_colour_whatever_their_file_type(tmp_path, mode):
    colors = np.array([*PALETTE, UNLABELED, (0, 0, 0), (1, 2, 3)], np.uint8)
    index = np.random.default_rng(0).integers(0, 5, (30, 40))
    index[0], index[1], index[2, 0] = 5, 6, 7  # a row Unlabeled, a row black, one stray pixel
    image = Image.fromarray(colors[index])
    image = image.quantize(16, dither=0) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "mask.png")
    label_map = data.read_mask(tmp_path / "mask.png", PALETTE)
    assert label_map.dtype == torch.uint8
    assert np.array_equal(label_map, np.where(index < 5, index, IGNORE_INDEX))


def test_mask_in_foreign_colours_is_refused_by_name(tmp_path):
    colors = np.array([*PALETTE, (9, 9, 9)], np.uint8)
    index = np.zeros((10, 10), int)
    index[0] = 5
    Image.fromarray(colors[index]).save(tmp_path / "a.png")  # exactly a tenth is foreign: accepted
    assert (data.read_mask(tmp_path / "a.png", PALETTE) == 255).sum() == 10
    index[1, 0] = 5
    Image.fromarray(colors[index]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="b.png.*11%"):
        data.read_mask(tmp_path / "b.png", PALETTE)


@pytest.mark.parametrize("size", [(40, 60), (20, 30), (37, 41), (80, 120)])
def test_every_click_is_carried_to_the_training_size_near_its_place(size):
    points = sample_points(torch.randint(5, (40, 60)), 300, torch.Generator().manual_seed(0))
    small = data.shrink_points(points, *size)
    assert small.shape == size
    counts = [(m[m != 255].bincount(minlength=5)).tolist() for m in (points, small)]
    assert counts[0] == counts[1]  # none lost, none of another class
    for c in range(5):  # each click has a labelled pixel of its class close by
        there = (small == c).nonzero()
        for y, x in (points == c).nonzero().tolist():
            want = torch.tensor([(y + 0.5) * size[0] / 40 - 0.5, (x + 0.5) * size[1] / 60 - 0.5])
            assert (there - want).abs().amax(1).min() <= 2.5


def test_without_resizing_clicks_stay_where_they_are():
    points = sample_points(torch.randint(5, (40, 60)), 300, torch.Generator().manual_seed(0))
    assert torch.equal(data.shrink_points(points, 40, 60), points)


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirrored", [False, True])
def test_augmentation_moves_image_and_clicks_together(turns, mirrored):
    labels = torch.arange(64).view(8, 8)  # a pixel's label is its colour
    image = labels[..., None].expand(8, 8, 3)
    turned, moved = data.turn(image, labels, turns, mirrored)
    assert torch.equal(turned[..., 0], moved)
    want = np.rot90(np.fliplr(labels) if mirrored else labels, turns)
    assert np.array_equal(moved, want)


@pytest.mark.parametrize("size", [(60, 70), (40, 90), (33, 34)])  # also smaller than the crop
def test_crops_hold_a_click_and_every_click_lies_on_its_own_pixel(size):
    H, W = size
    pixels = np.random.default_rng(0).integers(0, 5, (H, W)).astype(np.uint8)  # colour = class
    points = sample_points(torch.from_numpy(pixels), 12, torch.Generator().manual_seed(0))
    image = Image.fromarray(np.stack([pixels] * 3, axis=2))
    crops = data.Crops(image, points, scale=1.0, S=48, dense=False)
    seen, g = set(), torch.Generator().manual_seed(0)
    for _ in range(200):
        crop, labels = crops.draw(g)
        assert crop.shape == (3, 48, 48) and labels.shape == (48, 48)
        clicked = labels != IGNORE_INDEX
        assert 1 <= clicked.sum() <= 12
        assert torch.equal(crop[0][clicked], labels[clicked])
        seen.add(int(clicked.sum()))
    assert len(seen) > 1 or max(size) < 48


def test_shrinking_an_image_is_what_predict_does():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 99, 3), np.uint8))
    resized = torchvision.transforms.functional.resize(image, [38, 50])
    assert np.array_equal(data.shrink(image, 0.5), resized)


# ==== unet.py: the network ====


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    return UNet(5, weights=None).eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 96), (100, 37), (127, 255)])
def test_network_takes_any_size_from_32_up(model, size):
    with torch.inference_mode():
        assert model(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_normalisation_is_part_of_the_network(model):
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.equal(model.mean.flatten(), mean) and torch.equal(model.std.flatten(), std)
    seen = []
    hook = model.encoder.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 32, 32)
    model(image)
    hook.remove()
    want = torchvision.transforms.functional.normalize(image, mean.tolist(), std.tolist())
    torch.testing.assert_close(seen[0], want)


def test_any_resnet34_state_dict_loads_and_gives_torchvisions_features(tmp_path):
    resnet = torchvision.models.resnet34(num_classes=7).eval()
    for parameter in resnet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save(resnet.state_dict(), tmp_path / "r34.pth")
    encoder = UNet(5, weights=str(tmp_path / "r34.pth")).eval().encoder
    deep = torch.nn.Sequential(*list(resnet.children())[:-2])
    ours = torch.nn.Sequential(*encoder.children())
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), deep(x))


def test_imagenet_weights_come_from_torchs_hub_cache_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    resnet = torchvision.models.resnet34()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(resnet.state_dict(), tmp_path / "hub/checkpoints/resnet34-b627a593.pth")
    loaded = UNet(5).encoder.layer4[2].conv2.weight
    assert torch.equal(loaded, resnet.layer4[2].conv2.weight)


def test_imagenet_weights_out_of_reach_name_the_file_and_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = "http://127.0.0.1:9/resnet34-b627a593.pth"  # nothing listens there
    monkeypatch.setattr("unet.IMAGENET_URL", url)
    with pytest.raises(OSError, match="resnet34-b627a593.pth.*hub/checkpoints.*--weights none"):
        UNet(5)


class Evil:
    def __reduce__(self):
        return (os.mkdir, (str(Evil.path),))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", ["garbage", "empty", "evil", "resnet18", "list", "absent"])
def test_wrong_weights_are_refused_by_name_and_run_no_code(tmp_path, content):
    path = tmp_path / "weights.pth"
    Evil.path = tmp_path / "owned"
    if content in ("garbage", "empty"):
        path.write_bytes(b"not a state dict" if content == "garbage" else b"")
    elif content == "evil":
        path.write_bytes(pickle.dumps({"conv1.weight": Evil()}))
    elif content == "resnet18":
        torch.save(torchvision.models.resnet18().state_dict(), path)
    elif content == "list":
        torch.save([1, 2], path)
    for load in (lambda: UNet(5, weights=str(path)), lambda: UNet.load(path)):
        with pytest.raises((ValueError, OSError)) as refusal:
            load()
        message = str(refusal.value)
        assert str(path) in message and "\n" not in message and len(message) < 500
    assert not Evil.path.exists()


def test_upsampling_in_strips_is_bilinear_interpolation():
    logits = torch.randn(1, 3, 37, 53)
    whole = F.interpolate(logits, size=(1100, 130), mode="bilinear")
    strips = [upsample_rows(logits, top, 1100, 130) for top in range(0, 1100, 512)]
    torch.testing.assert_close(torch.cat(strips, dim=2), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size, mode", [((75, 99), "RGB"), ((64, 64), "L"), ((5, 200), "RGBA")])
def test_predict_gives_the_class_map_at_the_images_own_size(model, size, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    class_map = model.predict(image)
    assert class_map.shape == size and class_map.dtype == np.uint8 and class_map.max() < 5
    x = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    if min(size) >= 32:  # one window, no resizing: nothing but the network and an argmax
        with torch.inference_mode():
            want = model(x).argmax(1)[0].numpy()
        assert (class_map == want).mean() > 0.999


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_predict_refuses_pixels_that_pillow_would_clip(model, mode):
    with pytest.raises(ValueError, match="8 bits"):
        model.predict(Image.new(mode, (40, 40)))


def test_predict_leaves_the_model_in_the_mode_it_was_in(model):
    model.train()
    model.predict(Image.new("RGB", (40, 40)))
    assert model.training
    model.eval()


def test_windows_cover_every_pixel_and_overlap_by_a_quarter():
    for length in (32, 63, 64, 65, 88, 128, 163, 625):
        begins = starts(length, 64)
        assert begins[0] == 0 and begins[-1] == max(0, length - 64)
        assert all(0 < b - a <= 48 for a, b in itertools.pairwise(begins))


def test_predict_sees_windows_of_the_size_of_the_training_crops(model):
    sizes = []
    hook = model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[2:]))
    model.predict(Image.new("RGB", (300, 100)))
    hook.remove()
    assert set(sizes) == {(model.tile, model.tile)}


# ==== train.py: whole runs ====


@pytest.fixture(autouse=True)
def quick_runs(monkeypatch, tmp_path):
    """Runs in this process take no ten steps an epoch for four small images, and do not wait until
    each checkpoint of 290 MB has reached the disk; their checkpoints go with the test."""
    monkeypatch.setattr(train, "MIN_STEPS", 1)
    monkeypatch.setattr(train, "EPOCH_PIXELS", 4 * 48**2)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    yield
    for checkpoint in tmp_path.rglob("checkpoint.pt"):
        checkpoint.unlink()


QUICK = [
    "--weights",
    "none",
    "--size",
    "48",
    "--batch-size",
    "8",
    "--epochs",
    "2",
    "--points",
    "20",
]


def cli(*arguments) -> str | None:
    """`python train.py …` in this process: its error message, or None if it went well."""
    try:
        train.main(train.parse_args([str(a) for a in arguments]))
    except SystemExit as error:
        assert isinstance(error.code, str), "the exit status would be 0"
        return error.code
    return None


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(dataset, folder of a quick run on it), for tests that only read them."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "MIN_STEPS", 1)
        patch.setattr(train, "EPOCH_PIXELS", 4 * 48**2)
        root = make_tiny(folder)
        assert cli("--data", root, *QUICK, "--out", folder / "run") is None
    return root, folder / "run"


def metrics(folder) -> list[dict]:
    with open(Path(folder) / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_refused(message: str | None, *words, out=None) -> None:
    """One line that names all `words`, and nothing left behind."""
    assert message is not None, "it was not refused"
    assert message.startswith("error: ") and "\n" not in message.strip(), message
    assert all(str(word) in message for word in words), message
    assert out is None or not Path(out).exists(), "something was written"


def test_demo_as_a_user_starts_it_and_what_it_leaves(tmp_path):
    command = [sys.executable, HERE / "train.py", "--demo"]
    command += ["--epochs", "1", "--scale", "0.25", "--size", "64"]  # a tenth of the time
    env = os.environ | {"HOME": str(tmp_path)}
    run = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (out,) = (tmp_path / "runs").iterdir()
    assert {f.name for f in out.iterdir()} == {
        "metrics.csv", "checkpoint.pt", "clicks.csv", "predictions.png", "config.json",
    }  # fmt: skip
    (row,) = metrics(out)
    assert row["epoch"] == "1" and 0 < float(row["loss"]) < 1 and 0 < float(row["miou"]) < 1
    assert all(f"IoU {name}" in run.stdout for name in CLASSES) and "mIoU" in run.stdout
    clicks = (out / "clicks.csv").read_text().splitlines()
    assert clicks[0] == "image,x,y,class" and len(clicks) == 1 + 28 * 100
    config = json.loads((out / "config.json").read_text())
    assert config["seed"] == 0 and config["torch"] == torch.__version__
    picture = Image.open(out / "predictions.png")
    assert picture.width > 1400 and len(picture.getcolors(1 << 24)) > 1000
    masks = list((tmp_path / "demo").rglob("masks/*.png"))
    modes = {Image.open(mask).mode for mask in masks}
    sizes = {Image.open(mask).size for mask in masks}
    values = {color for mask in masks for _, color in Image.open(mask).convert("RGB").getcolors()}
    assert modes == {"RGB", "P"} and len(sizes) >= 4
    assert values == {*PALETTE, UNLABELED, (0, 0, 0)}


def test_same_command_gives_the_same_numbers_and_another_seed_does_not(finished, tmp_path):
    root, a = finished
    b, c = tmp_path / "b", tmp_path / "c"
    for out, seed in ((b, 0), (c, 1)):
        assert cli("--data", root, *QUICK, "--seed", seed, "--out", out) is None
    assert metrics(a) == metrics(b) != metrics(c)
    clicks = [(out / "clicks.csv").read_bytes() for out in (a, b, c)]
    assert clicks[0] == clicks[1] != clicks[2]


@pytest.mark.parametrize(
    "options", [["--points", "all"], ["--resample"], ["--learn-unlabeled"], ["--gamma", "0"]]
)
def test_variants_run_to_their_end(tiny, tmp_path, options):
    assert cli("--data", tiny, *QUICK, *options, "--out", tmp_path / "run") is None
    rows = metrics(tmp_path / "run")
    assert len(rows) == 2 and all(0 <= float(row["miou"]) <= 1 for row in rows)
    assert [k for k in rows[0] if k.startswith("iou_")] == [f"iou_{name}" for name in CLASSES]
    loaded = UNet.load(tmp_path / "run" / "checkpoint.pt")
    assert loaded.classes == [*CLASSES] + ["Unlabeled"] * ("--learn-unlabeled" in options)


def test_scores_are_those_of_predict_at_the_masks_own_resolution(finished):
    tiny, run = finished
    model = UNet.load(run / "checkpoint.pt")
    truth, guess = [], []
    for tile, part in itertools.product((1, 2), (3, 4)):  # the last two of every tile
        name = f"image_part_{part:03d}"
        image = Image.open(tiny / f"Tile {tile}/images/{name}.jpg")
        guess.append(model.predict(image).flatten())
        truth.append(data.read_mask(tiny / f"Tile {tile}/masks/{name}.png", PALETTE).flatten())
    truth, guess = np.concatenate(truth), np.concatenate(guess)
    row = metrics(run)[-1]
    ious = []
    for c, name in enumerate(CLASSES):
        both, either = ((truth == c) & (guess == c)).sum(), ((truth == c) | (guess == c)).sum()
        ious.append(both / either)
        assert float(row[f"iou_{name}"]) == pytest.approx(both / either, abs=1e-6)
    assert float(row["miou"]) == pytest.approx(np.mean(ious), abs=1e-6)
    assert float(row["pixel_accuracy"]) == pytest.approx((truth == guess).mean(), abs=1e-6)


def test_held_out_images_are_never_trained_on(finished):
    tiny, run = finished
    training, held_out, _ = data.read_dataset(tiny, PALETTE)
    assert [s.name[-7:-4] for s in held_out] == ["003", "004"] * 2 and len(training) == 4
    with open(run / "clicks.csv") as file:
        assert {row["image"] for row in csv.DictReader(file)} == {s.name for s in training}


def test_loss_printed_is_the_mean_over_the_clicked_pixels_of_the_epoch(tiny, tmp_path, monkeypatch):
    seen = []

    def spy(logits, target, gamma, alpha):
        labelled = target != IGNORE_INDEX
        p = (
            logits.float()
            .softmax(1)
            .movedim(1, -1)[labelled]
            .gather(1, target[labelled].long()[:, None])
        )
        seen.append((0.25 * (1 - p) ** 2 * -p.log()).detach())
        return partial_focal_cross_entropy(logits, target, gamma=gamma, alpha=alpha)

    monkeypatch.setattr("train.partial_focal_cross_entropy", spy)
    assert cli("--data", tiny, *QUICK, "--epochs", "1", "--out", tmp_path / "run") is None
    (row,) = metrics(tmp_path / "run")
    assert float(row["loss"]) == pytest.approx(torch.cat(seen).mean().item(), abs=2e-6)


def test_bfloat16_is_used_only_where_the_machine_is_fast_at_it(tiny, tmp_path, monkeypatch):
    seen = []

    def spy(logits, target, **options):
        seen.append(logits.dtype)
        return partial_focal_cross_entropy(logits, target, **options)

    monkeypatch.setattr("train.partial_focal_cross_entropy", spy)
    for fast, precision in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cpu, "get_capabilities", lambda fast=fast: {"amx_bf16": fast}, raising=False
        )
        out = tmp_path / str(fast)
        assert cli("--data", tiny, *QUICK, "--epochs", "1", "--device", "cpu", "--out", out) is None
        assert set(seen) == {precision}
        assert json.loads((out / "config.json").read_text())["precision"] == str(precision)[6:]
        seen.clear()


@pytest.mark.parametrize("weights, gentler", [("none", 1), ("resnet34.pth", 10)])
def test_a_pretrained_encoder_learns_at_a_tenth_of_the_rate(tiny, tmp_path, weights, gentler):
    if weights != "none":
        weights = tmp_path / weights
        torch.save(torchvision.models.resnet34().state_dict(), weights)
    flags = ["--data", tiny, *QUICK, "--weights", weights, "--lr", "0.5"]
    run = train.prepare(train.parse_args([str(flag) for flag in flags]))
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    rates = {
        names.pop(parameter): group["max_lr"]
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    assert not names  # all of them learn
    for name, rate in rates.items():
        assert rate == pytest.approx(0.5 / gentler if name.startswith("encoder.") else 0.5)


# ==== your own clicks ====


def test_clicks_csv_gives_the_same_run_back(finished, tmp_path):
    root, run = finished
    quick = [*QUICK[:-2], "--clicks", run / "clicks.csv"]
    assert cli("--data", root, *quick, "--out", tmp_path / "b") is None
    assert metrics(run) == metrics(tmp_path / "b")
    assert (run / "clicks.csv").read_bytes() == (tmp_path / "b" / "clicks.csv").read_bytes()


def test_images_without_masks_train_on_clicks_with_nothing_to_score(
    finished, tiny, tmp_path, capsys
):
    run = finished[1]
    for masks in tiny.rglob("masks"):
        shutil.rmtree(masks)
    quick = [*QUICK[:-2], "--clicks", run / "clicks.csv"]
    assert cli("--data", tiny, *quick, "--out", tmp_path / "b") is None
    printed = capsys.readouterr().out
    assert "nothing to score" in printed and "4 images have no click" in printed
    rows = metrics(tmp_path / "b")
    assert [r["loss"] for r in rows] == [r["loss"] for r in metrics(run)]
    assert all(row["miou"] == "" == row["iou_Water"] for row in rows)
    a, b = (Image.open(out / "predictions.png") for out in (run, tmp_path / "b"))
    assert b.width < a.width  # no ground-truth column


def test_own_images_in_a_flat_folder_with_own_classes(tmp_path):
    folder = tmp_path / "crops"
    folder.mkdir()
    for name in ("one.JPG", "two.jpeg", "three.png"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)).save(
            folder / name
        )
    (tmp_path / "classes.csv").write_text("class,color\nvine,#2e7d32\nsoil,#8d6e63\n\n")
    (tmp_path / "clicks.csv").write_text(
        "image,x,y,class\none.JPG,3,4,vine\none.JPG,59,49,1\ntwo.jpeg,7.9,8.2,soil\n"
    )
    quick = [
        *QUICK[:-2],
        "--classes",
        tmp_path / "classes.csv",
        "--clicks",
        tmp_path / "clicks.csv",
    ]
    assert cli("--data", folder, *quick, "--out", tmp_path / "run") is None
    clicks = (tmp_path / "run" / "clicks.csv").read_text().splitlines()[1:]
    assert clicks == ["one.JPG,3,4,vine", "one.JPG,59,49,soil", "two.jpeg,7,8,soil"]
    model = UNet.load(tmp_path / "run" / "checkpoint.pt")
    assert model.classes == ["vine", "soil"] and model.palette == [[46, 125, 50], [141, 110, 99]]


def test_three_lines_of_the_readme_predict_with_a_trained_model(finished, tmp_path, monkeypatch):
    tiny, run = finished
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "checkpoint.pt").symlink_to(run / "checkpoint.pt")
    code = (HERE / "README.md").read_text().split("<!-- tested -->\n```python\n")[1].split("```")[0]
    shutil.copy(next(tiny.rglob("*.jpg")), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    subprocess.run(
        [sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(HERE)}
    )
    assert Image.open("classes.png").size == Image.open("photo.jpg").size


@pytest.mark.parametrize(
    "lines, words",
    [
        ("", ["line 1", "image,x,y,class"]),
        ("image,x,y,class", ["no clicks"]),
        ("image,x,class\nTile 1/images/image_part_001.jpg,1,Road", ["line 1", "no column y"]),
        ("image,x,y,class\nTile 1/images/image_part_001.jpg,1,Road", ["line 2", "4 values"]),
        ("image,x,y,class\nTile 9/a.jpg,1,1,Road", ["line 2", "Tile 9/a.jpg"]),
        ("image,x,y,class\nIMG,1,1,Road\nIMG,2,2,Lake", ["line 3", "'Lake'", "Water"]),
        ("image,x,y,class\nIMG,1,1,5", ["line 2", "'5'"]),
        ("image,x,y,class\nIMG,one,1,Road", ["line 2", "'one'"]),
        ("image,x,y,class\nIMG,nan,1,Road", ["line 2", "'nan'"]),
        ("image,x,y,class\nIMG,inf,1,Road", ["line 2", "'inf'"]),
        ("image,x,y,class\nIMG,72,1,Road", ["line 2", "72×56"]),
        ("image,x,y,class\nIMG,1,-1,Road", ["line 2", "outside"]),
        ("image,x,y,class\nIMG,1,1,Road\nIMG,1,1,Land", ["line 3", "line 2", "(1, 1)"]),
    ],
)
def test_wrong_clicks_are_refused_with_the_number_of_the_line(tiny, tmp_path, lines, words):
    path, out = tmp_path / "my.csv", tmp_path / "run"
    path.write_text(lines.replace("IMG", "Tile 1/images/image_part_001.jpg"))
    assert_refused(
        cli("--data", tiny, *QUICK[:-2], "--clicks", path, "--out", out), "my.csv", *words, out=out
    )


def test_the_same_click_twice_counts_once(tiny, tmp_path):
    name = "Tile 1/images/image_part_001.jpg"
    (tmp_path / "my.csv").write_text(f"image,x,y,class\n{name},1,2,Road\n{name},1,2,2\n")
    label_map = data.read_clicks(str(tmp_path / "my.csv"), tiny, list(CLASSES))[name]
    assert (label_map != 255).sum() == 1 and label_map[2, 1] == 2


@pytest.mark.parametrize(
    "lines, words",
    [
        ("", "line 1"),
        ("name,color", "line 1"),
        ("class,color\na,#123456", "got 1"),
        ("class,color\na,red\nb,#000001", "line 2"),
        ("class,color\na,#123456\n\na,#123457", "line 4"),  # the empty one counts
        ("class,color\na,#123456\nb,#123456", "line 3"),
        ("class,color\na,#000000\nb,#123456", "without a label"),
    ],
)
def test_wrong_classes_are_refused(tiny, tmp_path, lines, words):
    path = tmp_path / "classes.csv"
    path.write_text(lines)
    assert_refused(cli("--data", tiny, *QUICK, "--classes", path), "classes.csv", words)


def test_the_mask_of_a_clicked_image_is_never_looked_at(tiny):
    name = "Tile 1/images/image_part_001.jpg"
    (tiny / "Tile 1/masks/image_part_001.png").write_bytes(b"no picture")
    training, held_out, _ = data.read_dataset(tiny, PALETTE, {name: None})
    assert [(s.name, s.mask) for s in training] == [(name, None)]
    assert len(held_out) == 7 and all(s.mask is not None for s in held_out)


# ==== everything that goes wrong ====


def first(root: Path, pattern: str) -> Path:
    return min(root.rglob(pattern))


def drop_mask(root):
    first(root, "masks/*.png").unlink()
    return ["image_part_001.jpg", "no mask"]


def drop_image(root):
    first(root, "images/*.jpg").unlink()
    return ["image_part_001.png", "no image"]


def cut_image(root):
    path = first(root, "images/*.jpg")
    path.write_bytes(path.read_bytes()[:700])
    return [path, "cannot be used"]


def cut_mask(root):
    path = first(root, "masks/*.png")
    path.write_bytes(path.read_bytes()[:100])
    return [path, "cannot be used"]


def not_an_image(root):
    path = first(root, "images/*.jpg")
    path.write_text("hello")
    return [path, "cannot be used"]


def other_size(root):
    path = first(root, "masks/*.png")
    Image.open(path).resize((70, 50), Image.Resampling.NEAREST).save(path)
    return [path, "70×50", "72×56"]


def foreign_colours(root):
    path = first(root, "masks/*.png")
    Image.new("RGB", (72, 56), (1, 2, 3)).save(path)
    return [path, "100%", "--classes"]


def sixteen_bits(root):
    path = first(root, "images/*.jpg")
    Image.fromarray(np.zeros((56, 72), np.uint16)).save(path.with_suffix(".png"))
    path.unlink()
    return ["image_part_001.png", "8 bits"]


def stored_turned(root):
    path = first(root, "images/*.jpg")
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    return [path, "upright"]


def two_masks(root):
    path = first(root, "masks/*.png")
    Image.open(path).save(path.with_suffix(".bmp"))
    return [path, "same image"]


def bomb(root):
    path = first(root, "images/*.jpg")
    Image.new("1", (20_000, 20_000)).save(path.with_suffix(".png"))
    path.unlink()
    return ["image_part_001.png", "million pixels"]


def all_unlabelled(root):
    for path in root.rglob("masks/*.png"):
        Image.new("RGB", (72, 56), UNLABELED).save(path)
    return [root, "no image", "labelled pixel"]


@pytest.mark.parametrize(
    "damage",
    [drop_mask, drop_image, cut_image, cut_mask, not_an_image, other_size, foreign_colours,
     sixteen_bits, stored_turned, two_masks, bomb, all_unlabelled],
)  # fmt: skip
def test_wrong_data_is_refused_by_the_name_of_the_file(tiny, tmp_path, damage):
    words = damage(tiny)
    assert_refused(
        cli("--data", tiny, *QUICK, "--out", tmp_path / "run"), *words, out=tmp_path / "run"
    )


def test_data_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    assert_refused(cli("--data", tmp_path / "file", *QUICK), "--data", "is a file")


def test_unusual_but_sound_data_works(tiny, tmp_path, capsys):
    one = min(tiny.glob("Tile 1/images/*"))
    Image.open(one).convert("L").save(one.with_suffix(".JPEG"))  # grey, upper case
    one.unlink()
    mask = tiny / "Tile 1/masks/image_part_001.png"
    Image.open(mask).convert("RGBA").save(mask)
    labels = np.array(Image.open(tiny / "Tile 1/masks/image_part_002.png"))
    labels[1:] = UNLABELED  # fewer labelled pixels than clicks
    Image.fromarray(labels).save(tiny / "Tile 1/masks/image_part_002.png")
    Image.new("RGB", (72, 56), UNLABELED).save(tiny / "Tile 2/masks/image_part_001.png")  # none
    quick = [*QUICK, "--points", "100", "--epochs", "1"]
    assert cli("--data", tiny, *quick, "--out", tmp_path / "run") is None
    assert "272 clicks" in capsys.readouterr().out  # 100 + 72 + 0 + 100
    lines = (tmp_path / "run" / "clicks.csv").read_text().splitlines()[1:]
    counts = [sum(f"Tile {t}/images/image_part_{p:03d}." in line for line in lines)
              for t, p in ((1, 1), (1, 2), (2, 1), (2, 2))]  # fmt: skip
    assert counts == [100, 72, 0, 100]


def test_one_single_image_trains_with_nothing_to_score(tiny, tmp_path, capsys):
    for path in [*tiny.rglob("*.jpg"), *tiny.rglob("*.png")]:
        if "Tile 1" not in str(path) or "001" not in path.name:
            path.unlink()
    assert cli("--data", tiny, *QUICK, "--out", tmp_path / "run") is None
    assert "nothing to score" in capsys.readouterr().out
    assert (tmp_path / "run" / "predictions.png").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--epochs", "0"], ["--epochs", "at least 1", "'0'"]),
        (["--epochs", "2.5"], ["--epochs", "whole number"]),
        (["--points", "-3"], ["--points", "'-3'"]),
        (["--points", "all", "--resample"], ["--points all", "--resample"]),
        (["--seed", "99999999999999999999"], ["--seed"]),
        (["--points", "some"], ["--points", "'some'"]),
        (["--batch-size", "nan"], ["--batch-size", "'nan'"]),
        (["--size", "47"], ["--size", "at least 48"]),
        (["--scale", "0"], ["--scale", "above 0"]),
        (["--lr", "nan"], ["--lr", "'nan'"]),
        (["--lr", "inf"], ["--lr", "'inf'"]),
        (["--gamma", "-1"], ["--gamma", "'-1'"]),
        (["--alpha", "x"], ["--alpha", "'x'"]),
        (["--seed", "-1"], ["--seed", "'-1'"]),
        (["--epoch", "3"], ["--epoch", "did you mean --epochs"]),
        (["--wieghts", "none"], ["did you mean --weights"]),
        (["frobnicate"], ["frobnicate"]),
        (["--device", "cuda:99"], ["--device cuda:99", "--device cpu"]),
        (["--device", "gpu7"], ["--device gpu7", "--device cpu"]),
        (["--device", "meta"], ["--device meta", "--device cpu"]),
        (["--clicks", "nowhere.csv"], ["nowhere.csv"]),
        (["--clicks", "x.csv", "--points", "5"], ["--clicks", "--points"]),
        (["--classes", "nowhere.csv"], ["nowhere.csv"]),
        (["--weights", "nowhere.pth"], ["--weights nowhere.pth"]),
        (["--weights", "Imagenet"], ["--weights Imagenet", "imagenet or none"]),
        (["--resume", "nowhere"], ["--resume nowhere", "no checkpoint.pt"]),
        (["--resume", "nowhere", "--epochs", "9"], ["--resume", "--epochs"]),
    ],
)
def test_wrong_flags_are_refused(tiny, tmp_path, flags, words):
    given = (
        flags
        if "--resume" in flags
        else ["--data", tiny, "--weights", "none", "--out", tmp_path / "run", *flags]
    )
    assert_refused(cli(*given), *words, out=tmp_path / "run")


def test_images_too_large_for_the_memory_end_in_one_line(tiny, tmp_path, monkeypatch):
    def no_room(*_):
        raise MemoryError

    monkeypatch.setattr(data, "Crops", no_room)
    message = cli("--data", tiny, *QUICK, "--out", tmp_path / "run")
    assert_refused(message, "out of memory", out=tmp_path / "run")


def test_wrong_weights_end_in_one_line(tiny, tmp_path):
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    flags = ["--data", tiny, "--weights", path, "--out", tmp_path / "run"]
    assert_refused(cli(*flags), path, "ResNet-34", out=tmp_path / "run")


def test_out_that_holds_a_run_is_refused_and_untouched(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("precious")
    message = cli("--data", tiny, *QUICK, "--out", tmp_path / "run")
    assert_refused(message, tmp_path / "run", "--resume")
    assert [f.read_text() for f in (tmp_path / "run").iterdir()] == ["precious"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
    tiny, tmp_path, monkeypatch
):
    calls = itertools.count(1)

    def explode(*args, **kwargs):
        loss = partial_focal_cross_entropy(*args, **kwargs)
        return loss * math.nan if next(calls) == 4 else loss  # two steps an epoch

    monkeypatch.setattr("train.partial_focal_cross_entropy", explode)
    message = cli("--data", tiny, *QUICK, "--epochs", "3", "--out", tmp_path / "run")
    assert "epoch 2, step 2" in message and "nan" in message and "--lr" in message
    assert len(metrics(tmp_path / "run")) == 1
    weights = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    assert all(w.isfinite().all() for w in weights.values())


def start(*arguments, cwd) -> subprocess.Popen:
    command = [sys.executable, HERE / "train.py", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=90):
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.005)


def test_killed_and_resumed_run_ends_like_one_left_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MIN_STEPS", 10)  # as in the process to be killed
    monkeypatch.setattr(train, "EPOCH_PIXELS", 256**2)
    flags = ["--data", tiny, *QUICK, "--epochs", "3", "--batch-size", "2", "--resample"]
    assert cli(*flags, "--out", tmp_path / "alone") is None
    out = tmp_path / "killed"
    process = start(*flags, "--out", out, cwd=tmp_path)
    wait_for(
        lambda: out.exists() and (out / "metrics.csv").exists() and len(metrics(out)) >= 1, process
    )
    wait_for(lambda: (out / "checkpoint.pt.partial").exists(), process)  # in the middle of a write
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 1 <= len(metrics(out)) < 3
    assert cli("--resume", out) is None
    assert metrics(out) == metrics(tmp_path / "alone")
    for name in ("clicks.csv", "predictions.png"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert cli("--resume", out) is None  # complete already: draws and prints again
    assert metrics(out) == metrics(tmp_path / "alone")


def test_resume_takes_its_classes_from_the_run_and_refuses_other_images(tiny, tmp_path):
    lines = [f"{n},#{r:02x}{g:02x}{b:02x}" for n, (r, g, b) in zip(CLASSES, PALETTE)]
    (tmp_path / "classes.csv").write_text("\n".join(["class,color", *lines]))
    flags = ["--data", tiny, *QUICK, "--classes", tmp_path / "classes.csv"]
    assert cli(*flags, "--out", tmp_path / "run") is None
    before = metrics(tmp_path / "run")
    (tmp_path / "classes.csv").unlink()
    (tmp_path / "run" / "metrics.csv").unlink()  # as if killed just before it was written
    assert cli("--resume", tmp_path / "run", "--device", "cpu") is None
    assert metrics(tmp_path / "run") == before
    shutil.rmtree(tiny / "Tile 2")
    assert_refused(cli("--resume", tmp_path / "run"), "not those")


def test_interrupted_before_the_first_epoch_resumes_too(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def stop(*args):
            raise KeyboardInterrupt

        patch.setattr("train.train_one_epoch", stop)
        message = cli("--data", tiny, *QUICK, "--out", tmp_path / "run")
    assert f"--resume {tmp_path / 'run'}" in message
    assert cli("--resume", tmp_path / "run") is None
    assert len(metrics(tmp_path / "run")) == 2


def test_interrupted_before_anything_is_written_does_not_speak_of_resuming(
    tiny, tmp_path, monkeypatch
):
    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.UNet", stop)
    assert "before the training" in cli("--data", tiny, *QUICK, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_score_every_spares_scores_but_the_last_and_changes_nothing_else(finished, tmp_path):
    root, each = finished
    command = ["--data", root, *QUICK, "--score-every", "3", "--out", tmp_path / "run"]
    assert cli(*command) is None
    (first, last), (a, b) = metrics(each), metrics(tmp_path / "run")
    assert first["miou"] and not a["miou"] and not a["iou_Water"]
    assert a["loss"] == first["loss"] and b == last


def test_ctrl_c_says_how_to_resume(tiny, tmp_path):
    out = tmp_path / "run"
    process = start("--data", tiny, *QUICK, "--epochs", "500", "--out", out, cwd=tmp_path)
    wait_for(lambda: (out / "metrics.csv").exists(), process)
    process.send_signal(signal.SIGINT)  # some files of the run are not written yet
    _, errors = process.communicate()
    assert process.returncode != 0 and f"--resume {out}" in errors and "Traceback" not in errors


def test_a_full_disk_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    real, calls = torch.save, itertools.count(1)

    def save(checkpoint, path):  # /dev/full is a disk without room
        full = next(calls) == 3  # the start, epoch 1, epoch 2
        real(checkpoint, "/dev/full" if full else path)

    monkeypatch.setattr("train.torch.save", save)
    message = cli("--data", tiny, *QUICK, "--out", tmp_path / "run")
    assert "could not be written" in message and "\n" not in message.strip()
    UNet.load(tmp_path / "run" / "checkpoint.pt")
    assert len(metrics(tmp_path / "run")) == 1


# ==== the Kaggle client, for real ====


@pytest.fixture
def kaggle_server(tmp_path, monkeypatch):
    """A loopback server in Kaggle's place; the installed client talks to it over HTTP."""
    state = {"status": 200, "body": archive(), "cut": False, "requests": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # like Kaggle: the API sends the client on to a storage server
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state["requests"].append((self.path, self.headers.get("Authorization")))
            self.answer(302 if state["status"] == 200 else state["status"], b"")

        def do_GET(self):
            self.answer(200, state["body"])

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Location", "/storage/archive.zip")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/zip")
            self.end_headers()
            self.wfile.write(body[: len(body) // (2 if state["cut"] else 1)])
            self.close_connection = True

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state["url"] = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("kagglesdk.kaggle_http_client.get_endpoint", lambda env: state["url"])
    for name in list(os.environ):
        if name.startswith("KAGGLE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", "x")  # so that it is restored afterwards
    monkeypatch.delenv("KAGGLE_CONFIG_DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client waits between its tries
    for name in [m for m in sys.modules if m.split(".")[0] == "kaggle"]:
        monkeypatch.delitem(sys.modules, name)  # it logs in when it is imported
    yield state
    server.shutdown()


def archive(pairs=72, extra=()) -> bytes:
    """A zip file in the dataset's layout, with small images."""
    photo, mask, body = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 36), (90, 80, 70)).save(photo, "JPEG")
    Image.new("RGB", (40, 36), PALETTE[1]).save(mask, "PNG")
    with zipfile.ZipFile(body, "w") as file:
        file.writestr(f"{data.FOLDER}/classes.json", "{}")
        for i in range(pairs):
            folder, name = f"{data.FOLDER}/Tile {i // 9 + 1}", f"image_part_{i % 9 + 1:03d}"
            file.writestr(f"{folder}/images/{name}.jpg", photo.getvalue())
            file.writestr(f"{folder}/masks/{name}.png", mask.getvalue())
        for name in extra:
            file.writestr(name, "outside")
    return body.getvalue()


FETCH = [*QUICK[:4], "--epochs", "1", "--points", "5", "--batch-size", "16"]


def test_download_without_an_account_trains_and_a_second_run_downloads_nothing(
    kaggle_server, capfd
):
    assert cli(*FETCH, "--out", "one") is None
    ((path, authorization),) = kaggle_server["requests"]
    assert "Dataset" in path and authorization is None
    printed = "".join(capfd.readouterr())
    assert (
        "data/Semantic" in printed and "KAGGLE_API_TOKEN" not in printed
    )  # the client's help text
    assert len(list(Path("data").rglob("*.jpg"))) == 72 and sorted(os.listdir("data")) == [
        data.FOLDER
    ]
    assert data.find_dataset("data") == Path("data") / data.FOLDER  # where a second run starts
    assert len(kaggle_server["requests"]) == 1


def test_download_uses_a_kaggle_json_in_the_working_directory(kaggle_server):
    Path("kaggle.json").write_text(json.dumps({"username": "ada", "key": "secret"}))
    data.find_dataset("data")
    assert [a for _, a in kaggle_server["requests"]] == ["Basic YWRhOnNlY3JldA=="]  # ada:secret


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_download_refused_by_kaggle_says_what_to_do(kaggle_server, status):
    kaggle_server["status"] = status
    message = cli(*FETCH, "--out", "run")
    assert_refused(message, status, "by hand", "kaggle.json", "--demo", out="run")
    assert os.listdir("data") == []


def test_download_of_a_broken_or_incomplete_archive_leaves_nothing(kaggle_server):
    for body, word in ((b"not a zip", "zip"), (archive()[:-3000], "zip"), (archive(71), "71")):
        kaggle_server["body"] = body
        assert_refused(cli(*FETCH, "--out", "run"), word, "--demo", out="run")
        assert os.listdir("data") == []


def test_download_cut_off_half_way_is_healed_by_a_second_run(kaggle_server):
    kaggle_server["cut"] = True
    assert_refused(cli(*FETCH, "--out", "run"), "Kaggle failed", out="run")
    assert os.listdir("data") == []
    kaggle_server["cut"] = False
    assert data.find_dataset("data") == Path("data") / data.FOLDER


def test_download_without_room_on_the_disk_says_so(kaggle_server, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr("data.shutil.disk_usage", lambda path: usage)
    assert_refused(cli(*FETCH, "--out", "run"), "200 MB", out="run")
    assert kaggle_server["requests"] == []


def test_download_with_kaggle_out_of_reach_says_what_to_do(kaggle_server):
    kaggle_server["url"] = "http://127.0.0.1:9"
    assert_refused(
        cli(*FETCH, "--out", "run"), "no connection", "by hand", "kaggle.json", "--demo", out="run"
    )


def test_archive_cannot_write_outside_its_folder(kaggle_server, tmp_path):
    kaggle_server["body"] = archive(
        extra=["../../evil.txt", "/evil.txt", f"{data.FOLDER}/../../evil"]
    )
    root = data.find_dataset("data")
    outside = [p for p in tmp_path.rglob("*evil*") if root.resolve() not in p.parents]
    assert not outside and not Path("/evil.txt").exists()


# ==== the benchmark of the loss ====


def benchmark(blocks: int = 12, calls: int = 10) -> None:
    """Forward and backward at 8×6×256×256 with 100 labels per image: time and memory.

    The label map is uint8, as train.py holds it; `F.cross_entropy` takes int64 only, so what needs
    it pays for the conversion. Blocks of calls alternate, so that all meet the same machine.
    """

    def dense(logits, target):  # as most code does it: everywhere, then multiply by the mask
        mask = (target != 255).float()
        ce = F.cross_entropy(logits, target.clamp(max=5).long(), reduction="none")
        return (0.25 * (1 - (-ce).exp()) ** 2 * ce * mask).sum() / mask.sum()

    class Floor(torch.autograd.Function):  # one scan of the target, one write of the gradient
        @staticmethod
        def forward(ctx, logits, target):
            ctx.save_for_backward(logits)
            return logits.new_zeros(()) + (target != 255)[0, 0, 0]

        @staticmethod
        def backward(ctx, grad):
            return torch.zeros_like(ctx.saved_tensors[0]), None

    contestants = {
        "pfce.py": partial_focal_cross_entropy,
        "dense focal formula": dense,
        "F.cross_entropy": lambda z, t: F.cross_entropy(z, t.long(), ignore_index=255),
        "floor": Floor.apply,
    }
    g = torch.Generator().manual_seed(0)
    target = torch.stack(
        [sample_points(torch.randint(6, (256, 256), generator=g), 100, g) for _ in range(8)]
    ).to(torch.uint8)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, forward and backward")
    for layout in (torch.contiguous_format, torch.channels_last):
        logits = torch.randn(8, 6, 256, 256, generator=g).to(memory_format=layout).requires_grad_()
        times = {name: [] for name in contestants}
        memory = {}

        def step(loss, logits=logits):
            logits.grad = None
            loss(logits, target).backward()

        for _ in range(blocks):
            for name, loss in contestants.items():
                for call in range(calls):
                    started = time.perf_counter()
                    step(loss)
                    if call > 1:  # the first two find the caches full of another's data
                        times[name].append(time.perf_counter() - started)
        for name, loss in contestants.items():
            logits.grad = None
            memory[name] = extra_memory(functools.partial(step, loss), logits)
        ours = statistics.median(times["pfce.py"])
        print(f"{str(layout)[6:]:<22}    ms   × pfce.py   peak memory / gradient")
        for name, values in times.items():
            median = statistics.median(values)
            print(f"  {name:<20} {median * 1e3:5.2f} {median / ours:9.1f} {memory[name]:14.2f}")


def benchmark_predict(checkpoint: str) -> None:
    """Do windows show? What do 10 000 × 10 000 pixels cost? On mosaics of the demo scenes."""
    import resource  # not on Windows

    import unet

    model = UNet.load(checkpoint)
    scenes = [
        data.draw_scene(np.random.default_rng([9, i]), *options)[0]
        for i, options in enumerate(list(data.DEMO_TILES.values()) * 3)
    ]

    def mosaic(side):
        canvas, corners = Image.new("RGB", (side, side)), itertools.cycle(scenes)
        for y, x in itertools.product(range(0, side, 352), range(0, side, 384)):
            canvas.paste(next(corners).crop((0, 0, 384, 352)), (x, y))
        return canvas

    def shifted(length, tile, regular=unet.starts):
        return [0] + [start + tile // 2 for start in regular(length - tile // 2, tile)]

    image = mosaic(4000)
    here = model.predict(image)
    unet.starts, regular = shifted, unet.starts
    there = model.predict(image)
    unet.starts = regular
    print(f"windows of {model.tile} pixels at scale {model.scale:g}; 4000×4000, grid shifted by")
    print(f"half a window: {(here != there).mean():.2%} of the pixels change their class")
    image = mosaic(10_000)
    started = time.time()
    model.predict(image)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"10 000 × 10 000 pixels: {time.time() - started:.0f} s, peak memory {peak:.2f} GiB in all"
    )


if __name__ == "__main__":
    benchmark() if len(sys.argv) == 1 else benchmark_predict(sys.argv[1])
