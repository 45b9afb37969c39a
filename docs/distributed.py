"""train.py in several processes, each with a GPU or some cores, by torch's DistributedDataParallel.

    torchrun --nproc_per_node=2 -m docs.distributed --data DIR …    options of train.py

It runs train.py with the same options and outputs. Only the network differs: its gradients are
averaged over all processes. They have the same clicks, and each draws crops of its own: its share
of every batch, so that there are as many steps as in one process. Since every crop counts alike,
and all processes have as many, the mean of their gradients is exactly the mean over all crops.

BatchNorm sees all crops on CUDA. On a CPU each process normalises its own, and process 0's averages
are saved. The loss that is printed is process 0's. torchrun gives each process one core unless
OMP_NUM_THREADS says more. Tried with gloo on a CPU only: the lines for CUDA have not been run.
"""

import io
import os
import sys
import tempfile

import torch
from torch import distributed, nn

import data
import train
from unet import UNet, UserError, run


class Inner(nn.Module):
    """What DistributedDataParallel wraps. It cannot be the UNet, whose forward calls it."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, image):
        return UNet.forward(self.unet, image)


class ParallelUNet(UNet):
    """A UNet whose gradients are the mean over all processes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.parallel = []  # a list hides it from state_dict
        if torch.cuda.is_initialized():
            nn.SyncBatchNorm.convert_sync_batchnorm(self)

    def forward(self, image):
        if not self.training:
            return super().forward(image)
        if not self.parallel:  # now that the parameters are on their device
            self.parallel.append(nn.parallel.DistributedDataParallel(Inner(self)))
        return self.parallel[0](image)


def main():
    args = train.parse_args()
    if args.resume or not args.data or not distributed.is_torchelastic_launched():
        raise UserError("torchrun --nproc_per_node=N -m docs.distributed --data DIR, no --resume")
    if args.device == "cuda" or args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
        torch.cuda.init()
    distributed.init_process_group()  # NCCL on CUDA, gloo on a CPU
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    if args.batch_size % processes or train.CROPS_PER_IMAGE % processes:
        raise UserError(
            f"--nproc_per_node {processes}: use 2, 4, 8 or 16, which divide --batch-size"
        )

    train.UNet = ParallelUNet
    args.batch_size //= processes
    train.CROPS_PER_IMAGE //= processes
    seed_for = data.seed_for

    def own_seed_for(seed, what, number=1):
        """Of all random draws, only those of an epoch differ between processes: its crops."""
        return seed_for(seed, f"epoch of {rank}" if what == "epoch" else what, number)

    data.seed_for = own_seed_for
    with tempfile.TemporaryDirectory() as unseen:
        if rank > 0:  # process 0 speaks and writes for all
            sys.stdout = io.StringIO()
            args.out = unseen
        train.main(args)
    distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
