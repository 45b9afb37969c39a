"""Partial focal cross-entropy (pfCE): train dense segmentation from a few labelled pixels.

    pfCE = Σ_i m_i · α_{y_i} · (1 − p_i)^γ · (−log p_i)  /  Σ_i m_i

    p_i  softmax probability of pixel i's own class y_i
    m_i  1 where pixel i is labelled, 0 where its target is `ignore_index`

The focal loss of Lin et al. 2017 (arXiv:1708.02002, eq. 5) over softmax probabilities, restricted
to labelled pixels like the partial cross-entropy of Tang et al. 2018 (arXiv:1804.01346).
Only labelled pixels are computed. This file needs torch and nothing else: copy it. Usage:

    loss = partial_focal_cross_entropy(model(image), label_map)  # label_map: 255 = no label
    loss.backward()
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def partial_focal_cross_entropy(
    logits, target, *, gamma=2.0, alpha=0.25, ignore_index=255, reduction="mean"
) -> Tensor:
    """Focal cross-entropy of the labelled pixels; γ = 0, α = 1 gives `F.cross_entropy`.

    logits (N, C, *spatial): scores of any float type; half precision computes in float32
    target (N, *spatial): class indices 0 … C−1 of any integer type, `ignore_index` = no label
    gamma ≥ 0: focusing exponent; 0 weighs all pixels alike, 2 mutes those that are right already
    alpha ≥ 0: a number, or C weights, one per class; it weighs the losses, not the count Σ m_i
    reduction: "mean" over labelled pixels, "sum", or "none" (shape of target, 0 where no label)

    Returns exactly 0, with zero gradients, where nothing is labelled. Raises ValueError where an
    argument does not fit. Synchronises a GPU twice.
    """
    if not logits.is_floating_point() or logits.ndim < 2:
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits must be floats of shape (N, C, *spatial), got {got}")
    N, C, *spatial = logits.shape
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integer class indices, got {target.dtype}")
    if target.shape != (N, *spatial):
        want = f"{(N, *spatial)} for logits {tuple(logits.shape)}"
        raise ValueError(f"target must have shape {want}, got {tuple(target.shape)}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if isinstance(alpha, (int, float)):
        wrong_alpha = not 0 <= alpha < float("inf")
    else:
        alpha = torch.as_tensor(alpha, dtype=dtype).to(logits.device, non_blocking=True)
        if alpha.shape not in ((), (C,)):
            raise ValueError(f"alpha must be one number or {C} weights, got {tuple(alpha.shape)}")
        wrong_alpha = ~((alpha >= 0) & alpha.isfinite()).all()

    # 1. Where is m_i = 1?
    i = _labelled(target.reshape(-1), ignore_index)  # (P,)
    y = target.reshape(-1)[i].long()[:, None]  # (P, 1)
    wrong_y = y != y.clamp(0, C - 1)
    if wrong_y.any() | wrong_alpha:  # one question to the GPU, not two
        if wrong_alpha:
            raise ValueError(f"alpha must be finite and >= 0, got {alpha}")
        got = f"got {y[wrong_y][0].item()} with {ignore_index=}"
        raise ValueError(f"target must lie in 0…{C - 1} or be ignore_index, {got}")

    # 2. Their logits. Of the S pixels of image n, pixel s has index n·S + s in target.
    S = torch.Size(spatial).numel()
    n = i // S  # (P,)
    if logits.is_cpu:  # fast, and the gradient comes out in the memory layout of the logits
        c = torch.arange(C)
        z = logits.take((i + n * (C * S - S))[:, None] + c * S)  # (P, C)
    else:  # MPS has no `take`, and CUDA no deterministic gradient of it
        z = logits.reshape(N, C, S)[n, :, i % S]  # (P, C)
    z = z.to(dtype)

    # 3. The formula, with s = log((1 − p) / p): no cancellation in 1 − p, and log(1 − p) is finite
    #    even where 1 − p underflows, so that gradients are finite for 0 < γ < 1 too.
    others = z.scatter(1, y, torch.finfo(dtype).min)  # (P, C), the own class taken out
    s = others.logsumexp(1, keepdim=True) - z.gather(1, y)  # (P, 1)
    minus_log_p, log_1_minus_p = F.softplus(s, threshold=40), F.logsigmoid(s)  # (P, 1)
    loss = (gamma * log_1_minus_p).exp() * minus_log_p  # (P, 1)
    loss = loss * (alpha[y] if isinstance(alpha, Tensor) and alpha.ndim else alpha)

    if reduction == "none":
        return loss.new_zeros(target.numel()).index_put((i,), loss[:, 0]).view(target.shape)
    return loss.sum() / max(len(y), 1) if reduction == "mean" else loss.sum()


def _labelled(target: Tensor, ignore_index: int) -> Tensor:
    """Indices (P,) where a flat target holds a label; a CPU compares 8 bytes of it at a time."""
    info, k = torch.iinfo(target.dtype), 8 // target.element_size()
    if not info.min <= ignore_index <= info.max:  # would wrap around to a class
        return torch.arange(len(target), device=target.device)
    if not target.is_cpu or len(target) % k or target.storage_offset() % k:
        return (target != ignore_index).nonzero()[:, 0]
    nothing = target.new_full((k,), ignore_index).view(torch.int64)
    word = (target.view(torch.int64) != nothing).nonzero()[:, 0]  # those with any label in them
    j, offset = (target.view(-1, k)[word] != ignore_index).nonzero(as_tuple=True)
    return word[j] * k + offset


class PartialFocalCrossEntropyLoss(nn.Module):
    """`partial_focal_cross_entropy` as a module: no parameters, α per class moves with `.to()`."""

    def __init__(self, gamma=2.0, alpha=0.25, ignore_index=255, reduction="mean"):
        super().__init__()
        self.gamma, self.ignore_index, self.reduction = gamma, ignore_index, reduction
        if isinstance(alpha, (int, float)):
            self.alpha = alpha
        else:
            alpha = torch.as_tensor(alpha, dtype=torch.float32)
            self.register_buffer("alpha", alpha, persistent=False)
        C = alpha.numel() if isinstance(alpha, Tensor) else 1
        self(torch.zeros(1, C), torch.zeros(1, dtype=torch.long))  # refuse a bad option here

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return partial_focal_cross_entropy(
            logits,
            target,
            gamma=self.gamma,
            alpha=self.alpha,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )
