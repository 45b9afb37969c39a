"""Promises of docs/distributed.py, held with two processes on the CPU.

python -m pytest docs/test_distributed.py
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for a pytest that is started without `python -m`

import data
import train
from docs.distributed import ParallelUNet, main
from pfce import partial_focal_cross_entropy
from unet import UNet


def make_model(kind):
    torch.manual_seed(0)
    return kind(5, None).train()


def mean_loss(model, batch):
    """As in train.py: the mean over the clicks of a crop, then over the crops."""
    images, labels = batch[:, :3], batch[:, 3]
    losses = [partial_focal_cross_entropy(z[None], y[None]) for z, y in zip(model(images), labels)]
    return torch.stack(losses).mean()


def make_batch(rank):
    """Three crops (3, 4, 64, 64), other ones for each process, with 1 to 60 clicks in each."""
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randint(256, (3, 4, 64, 64), dtype=torch.uint8, generator=generator)
    for crop, count in zip(batch, (1, 7 + rank, 60)):
        mask = torch.randint(5, (64, 64), generator=generator)
        crop[3] = data.paint(data.sample_points(mask, count, generator), (64, 64), (64, 64))
    return batch


def save_gradient(rank, folder):
    """One of two processes: its gradient, which is the mean of both."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = make_model(ParallelUNet)
    mean_loss(model, make_batch(rank)).backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    torch.save(gradient, f"{folder}/gradient_{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_have_the_gradient_of_one_with_both_batches(tmp_path):
    model = make_model(UNet)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    multiprocessing.spawn(save_gradient, (str(tmp_path),), nprocs=2)
    for rank in range(2):  # the mean of the two, accumulated
        (mean_loss(model, make_batch(rank)) / 2).backward()

    torch.set_num_threads(threads)
    for rank in range(2):
        gradient = torch.load(tmp_path / f"gradient_{rank}.pt")
        for name, p in model.named_parameters():
            assert p.grad.abs().max() > 0, name
            assert torch.equal(gradient[name], p.grad), name  # to the last bit


def test_two_processes_leave_a_checkpoint_with_the_score_that_they_print(tmp_path):
    folder = tmp_path / "photographs"
    for part in (1, 2, 3):
        for name in (f"images/image_part_00{part}.jpg", f"masks/image_part_00{part}.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "docs/demo/Tile 2" / name, folder / name)
    options = f"--data {folder} --weights none --epochs 1 --batch-size 4 --out {tmp_path}/run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [*torchrun, "-m", "docs.distributed", *options.split(), "--device", "cpu"]

    done = subprocess.run(
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    model = UNet.load(tmp_path / "run/checkpoint.pt")
    classes = data.read_classes(None)
    _, held_out = data.split(data.find_samples(folder), None, clicked=False)
    for name, score in train.evaluate(model, held_out, classes).items():
        assert f"  {name:<20} {score:.3f}\n" in done.stdout  # and once alone
    assert done.stdout.count("epoch 1/1") == 1


def test_a_mistake_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distributed", "--demo"])

    with pytest.raises(data.UserError, match="torchrun --nproc_per_node"):
        main()
