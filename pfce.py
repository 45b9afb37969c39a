"""Partial focal cross-entropy (pfCE): train dense segmentation from a few labelled pixels.

    pfCE = Σ_i m_i · α_{y_i} · (1 − p_i)^γ · (−log p_i)  /  Σ_i m_i

p_i is the softmax probability of pixel i's own class y_i; m_i is 1 where pixel i is labelled and 0
where its target is `ignore_index`. The focal loss of Lin et al. 2017 (arXiv:1708.02002, eq. 5) over
softmax, averaged over labelled pixels alone like the partial cross-entropy of Tang et al. 2018
(arXiv:1804.01346); no other pixel is computed. It needs torch and nothing else: copy this file.

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
    dtype = torch.promote_types(logits.dtype, torch.float32)
    alpha = torch.as_tensor(alpha, dtype=dtype).to(logits.device, non_blocking=logits.is_cuda)
    integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    shape, reductions = (N, *spatial), ("mean", "sum", "none")
    for name, fits, wanted, got in (
        ("target", integer, "hold integer class indices", target.dtype),
        ("target", target.shape == shape, f"have shape {shape}", tuple(target.shape)),
        ("gamma", 0 <= gamma < float("inf"), "be a finite number >= 0", gamma),
        ("alpha", alpha.shape in ((), (C,)), f"be one number or {C} weights", tuple(alpha.shape)),
        ("reduction", reduction in reductions, f"be one of {reductions}", reduction),
    ):
        if not fits:
            raise ValueError(f"{name} must {wanted}, got {got}")

    # 1. The labelled pixels, m_i = 1, and their classes.
    i = _labelled(target.reshape(-1), ignore_index)  # (P,)
    y = target.reshape(-1)[i][None].long()  # (1, P)
    wrong_y = y != y.clamp(0, C - 1)
    wrong_alpha = alpha != alpha.clamp(0, torch.finfo(dtype).max)  # also where it is NaN
    if wrong_y.any() | wrong_alpha.any():  # one question to the GPU, not two
        if wrong_alpha.any():
            raise ValueError(f"alpha must be finite and >= 0, got {alpha.tolist()}")
        got = f"got {y[wrong_y][0].item()} with {ignore_index=}"
        raise ValueError(f"target must lie in 0…{C - 1} or be ignore_index, {got}")

    # 2. Their logits. Pixel s of the S in image n has index i = n·S + s in target, and its class c
    #    has index (n·C + c)·S + s in logits.
    S = torch.Size(spatial).numel()
    n = i // S  # (P,)
    if logits.is_cpu:  # fast, and the gradient comes out in the memory layout of the logits
        c = torch.arange(C, device=i.device)[:, None]  # (C, 1)
        z = logits.take(i + (n * (C - 1) + c) * S)  # (C, P)
    else:  # MPS has no `take`, and CUDA no deterministic gradient of it
        z = logits.reshape(N, C, S)[n, :, i % S].T  # (C, P)
    z = z.to(dtype)

    # 3. The formula, by s = log((1 − p) / p): −log p = softplus(s), −log(1 − p) = softplus(−s).
    #    1 − p is never formed: it would cancel, and underflow to an infinite gradient for γ < 1.
    others = z.scatter(0, y, torch.finfo(dtype).min)  # (C, P), the own class taken out
    s = others.logsumexp(0, keepdim=True) - z.gather(0, y)  # (1, P)
    minus_log_p, minus_log_1_minus_p = (F.softplus(x, threshold=40) for x in (s, -s))  # (1, P)
    loss = alpha.expand(C)[y] * (-gamma * minus_log_1_minus_p).exp() * minus_log_p  # (1, P)

    if reduction == "none":
        return loss.new_zeros(target.numel()).index_put((i,), loss[0]).view(target.shape)
    return loss.sum() / max(len(i), 1) if reduction == "mean" else loss.sum()


def _labelled(target: Tensor, ignore_index: int) -> Tensor:
    """Indices (P,) of the labels in a flat target; a CPU compares 8 bytes of it at a time."""
    info, k = torch.iinfo(target.dtype), 8 // target.element_size()
    if not info.min <= ignore_index <= info.max:  # would wrap around to a class
        return torch.arange(len(target), device=target.device)
    aligned = target.is_contiguous() and not (len(target) % k or target.storage_offset() % k)
    if not (target.is_cpu and aligned):
        return (target != ignore_index).nonzero()[:, 0]
    nothing = target.new_full((k,), ignore_index).view(torch.int64)
    word = (target.view(torch.int64) != nothing).nonzero()  # (W, 1), those with a label in them
    i = (word * k + torch.arange(k, device=word.device)).view(-1)  # (W·k,)
    return i[target[i] != ignore_index]


class PartialFocalCrossEntropyLoss(nn.Module):
    """`partial_focal_cross_entropy` as a module: no parameters, α per class moves with `.to()`."""

    def __init__(self, gamma=2.0, alpha=0.25, ignore_index=255, reduction="mean"):
        super().__init__()
        if not isinstance(alpha, (int, float)):
            alpha = nn.Buffer(torch.as_tensor(alpha, dtype=torch.float32), persistent=False)
        self.gamma, self.alpha = gamma, alpha
        self.ignore_index, self.reduction = ignore_index, reduction
        C = torch.as_tensor(alpha).numel()
        self(torch.zeros(1, C), torch.zeros(1, dtype=torch.long))  # refuse a bad option here

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        rest = {"ignore_index": self.ignore_index, "reduction": self.reduction}
        return partial_focal_cross_entropy(
            logits, target, gamma=self.gamma, alpha=self.alpha, **rest
        )
