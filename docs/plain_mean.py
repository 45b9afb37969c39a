"""The plain mean over the clicks of a batch, to compare with train.py's, where crops count alike.

    python -m docs.plain_mean --data DIR --clicks FILE            else as `python train.py`
    python -m docs.plain_mean imagenet --data DIR --clicks FILE   else as `docs.pretrained imagenet`

Where images have unequal numbers of clicks, this mean is ruled by the crops that hold many of them.
train.py's own loop runs: only the loss that it calls is another one. A run to resume must be
resumed by this script, too.
"""

import sys

import train
from data import IGNORE_INDEX
from docs import pretrained
from pfce import partial_focal_cross_entropy
from unet import run


def weighted_loss(logits, labels, *, reduction, **options):
    """The loss of every pixel, (N, S, S), weighted so that train.py's mean becomes the plain one.

    train.py divides the sum of each crop by its clicks, and the sum of that by the N crops. A
    weight of N · clicks of the crop / clicks of the batch turns it into sum / clicks of the batch.
    """
    assert reduction == "none"  # or train.py's mean is another one, and the weights are wrong
    loss = partial_focal_cross_entropy(logits, labels, reduction="none", **options)  # (N, S, S)
    count = (labels != IGNORE_INDEX).sum((1, 2))  # (N,)
    weight = len(count) * count / count.sum()  # (N,)
    return loss * weight[:, None, None]


def main():
    words = sys.argv[1:]
    if words and words[0] in pretrained.WEIGHTS:
        args = pretrained.parse_args(words)
        train.UNet = pretrained.EfficientUNet
    else:
        args = train.parse_args(words)
    args.mean = "plain"  # for config.json, by which docs/results.py knows it
    train.partial_focal_cross_entropy = weighted_loss
    train.main(args)


if __name__ == "__main__":
    run(main)
