"""Partial focal cross-entropy (pfCE): train dense segmentation from a few labelled pixels.

    pfCE = Σ_i m_i · α_{y_i} · (1 − p_i)^γ · (−log p_i)  /  Σ_i m_i

p_i is the softmax probability of pixel i's own class y_i. m_i is 1 where pixel i is labelled and 0
where its target is `ignore_index`. This is the focal loss of Lin et al. 2017 (arXiv:1708.02002,
eq. 5) over a softmax, averaged over the labelled pixels only, as in the partial cross-entropy of
Tang et al. 2018 (arXiv:1804.01346).

    loss = partial_focal_cross_entropy(model(image), label_map)  # label_map: 255 = no label
    loss.backward()

You may have these four lines in mind:

    ce = F.cross_entropy(logits, target, ignore_index=255, reduction="none")
    p = torch.exp(-ce)
    loss = alpha * (1 - p) ** gamma * ce
    loss = loss[target != 255].mean()

They give the same number, but take a softmax at every pixel, of which one in 600 may be labelled.
`1 - p` rounds to 0 where p is nearly 1, so that the gradient is nan if 0 < γ < 1. The mean of no
pixel is nan, too. Here, unlabelled pixels are never touched, and neither nan occurs.

This file depends only on torch, so that you can copy it into your project.
"""

from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def partial_focal_cross_entropy(
    logits, target, *, gamma=2.0, alpha=0.25, ignore_index=255, reduction="mean"
) -> Tensor:
    """Focal cross-entropy of the labelled pixels. γ = 0 and α = 1 give `F.cross_entropy`.

    logits: scores (N, C, *spatial) of any float type, C >= 2; half precision computes in float32
    target: classes 0 … C−1, (N, *spatial) of any integer type; `ignore_index` means no label
    gamma: focusing exponent >= 0; 0 weighs all pixels alike, 2 down-weights pixels that the
        network already gets right
    alpha: weight >= 0 of the loss, one number or one per class; the mean divides by the number of
        labels, not by the sum of weights
    reduction: "mean" over the labelled pixels, "sum", or "none": the shape of target, 0 where
        there is no label

    The loss is exactly 0, with zero gradients, if no pixel is labelled. ValueError if an argument
    does not fit. On a GPU it synchronises twice, and once more if alpha is a tensor there. For the
    exact mean over several batches or processes, divide `reduction="sum"` by the number of labels
    in all of them.
    """
    alpha = check_options(gamma, alpha, ignore_index, reduction)
    check_tensors(logits, target)
    C = logits.shape[1]

    # 1. Find the P labelled pixels, those with m_i = 1, and their classes y.
    m = target != ignore_index  # (N, *spatial)
    limits = torch.iinfo(target.dtype)
    if not limits.min <= ignore_index <= limits.max:
        m = torch.ones_like(m)  # no pixel can equal it, but −1 would wrap to 255
    where = m.nonzero(as_tuple=True)  # one index (P,) per dimension of target
    y = target[where].long()  # (P,)
    # Check their extremes alone, with one GPU synchronisation.
    lowest, highest = torch.stack(y.aminmax()).tolist() if len(y) else (0, 0)
    if lowest < 0 or highest >= C:
        got = f"got {lowest if lowest < 0 else highest} with {ignore_index=}"
        raise ValueError(f"target must lie in 0…{C - 1} or be ignore_index, {got}")

    # 2. Gather their logits z, from whichever view is contiguous: the gradient gets its layout. In
    # the other layout, the convolution before takes 8 to 15 ms longer at 8×6×256×256.
    last = logits.movedim(1, -1)  # (N, *spatial, C), contiguous where logits are channels_last
    n, *position = where
    z = last[where] if last.is_contiguous() else logits[(n, slice(None), *position)]  # (P, C)

    # 3. Apply the formula.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    minus_log_p = F.cross_entropy(z.to(dtype), y, reduction="none")  # (P,)
    one_minus_p = -torch.expm1(-minus_log_p)  # (P,), exact even where p is nearly 1
    if gamma < 1:  # x^γ has an infinite slope at 0
        one_minus_p = one_minus_p.clamp(min=torch.finfo(dtype).tiny)
    if isinstance(alpha, list | tuple):
        if len(alpha) != C:
            raise ValueError(f"alpha must be a number or {C} weights, got {len(alpha)}")
        alpha = torch.tensor(alpha, dtype=dtype).to(y.device, non_blocking=True)[y]  # (P,)
    loss = alpha * one_minus_p**gamma * minus_log_p  # (P,)
    if reduction == "none":
        return loss.new_zeros(target.shape).index_put(where, loss)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / max(len(y), 1)  # 0, not nan, where nothing is labelled


# ---- If you read for the method, stop here. What follows is the module, and the checks. ----


class PartialFocalCrossEntropyLoss(nn.Module):
    """`partial_focal_cross_entropy` as a module, without parameters or buffers."""

    def __init__(self, gamma=2.0, alpha=0.25, ignore_index=255, reduction="mean"):
        super().__init__()
        self.gamma = gamma
        self.alpha = check_options(gamma, alpha, ignore_index, reduction)  # fails early
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor):
        return partial_focal_cross_entropy(
            logits,
            target,
            gamma=self.gamma,
            alpha=self.alpha,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


def check_options(gamma, alpha, ignore_index, reduction):
    """Check the options (ValueError). Return alpha as a number, or as a list of C numbers.

    A tensor for gamma or ignore_index is logits or target in the wrong place.
    """
    hint = "for a tensor .item(); logits and target go to the instance, not to the class"
    if not isinstance(gamma, Real) or not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a number >= 0, got {gamma!r:.20}; {hint}")
    if not isinstance(ignore_index, Integral):
        raise ValueError(f"ignore_index must be an integer: {ignore_index!r:.20}")  # noqa: TRY004
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if hasattr(alpha, "tolist"):
        alpha = alpha.tolist()  # a tensor or an array
    weights = alpha if isinstance(alpha, list | tuple) else [alpha]
    for weight in weights:
        if not isinstance(weight, Real) or not 0 <= weight < float("inf"):
            raise ValueError(f"alpha must be a number >= 0 or C of them, got {alpha!r:.40}")
    return alpha


def check_tensors(logits, target):
    """Raise ValueError unless logits are (N, C, *spatial) and target is (N, *spatial)."""
    if not isinstance(logits, Tensor) or not isinstance(target, Tensor):
        raise ValueError(  # noqa: TRY004
            "logits and target must be tensors: use output['out'] of a torchvision model, "
            "torch.from_numpy(array) of an array"
        )
    if not logits.is_floating_point() or logits.ndim < 2:
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits must be floats of shape (N, C, *spatial), got {got}")
    N, C, *spatial = logits.shape
    if C < 2:
        raise ValueError(
            f"logits must have C >= 2, got {tuple(logits.shape)}: the softmax of one is always 1, "
            "use binary_cross_entropy_with_logits"
        )
    dtype = target.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"target must hold integer class indices, got {dtype}")
    if target.shape != (N, *spatial):
        raise ValueError(f"target must have shape {(N, *spatial)}, got {tuple(target.shape)}")
