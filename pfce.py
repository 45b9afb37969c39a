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

    logits (N, C, *spatial): scores of any float type, C >= 2; half precision computes in float32
    target (N, *spatial): class indices 0 … C−1 of any integer type, `ignore_index` = no label
    gamma ≥ 0: focusing exponent; 0 weighs all pixels alike, 2 mutes those that are right already
    alpha ≥ 0: a number, or C weights, one per class; it weighs the losses, not the count Σ m_i
    reduction: "mean" over labelled pixels, "sum", or "none" (shape of target, 0 where no label)

    Exactly 0, with zero gradients, where nothing is labelled. ValueError where an argument does not
    fit. Synchronises a GPU twice. Over several batches or processes, whose means are over unequal
    numbers of labels, `reduction="sum"` divided by the count of all labels is exact."""
    if not logits.is_floating_point() or logits.ndim < 2:
        got = f"{logits.dtype} {tuple(logits.shape)}"
        raise ValueError(f"logits must be floats of shape (N, C, *spatial), got {got}")
    N, C, *spatial = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    host = torch.as_tensor(torch.nan if alpha is None else alpha, dtype=dtype)  # nan is refused
    alpha = host.to(logits.device, non_blocking=host.is_cpu)  # (host outlives the copy)
    integer = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    shape, reductions = (N, *spatial), ("mean", "sum", "none")
    two = "have C >= 2, the softmax of one is always 1 (or use binary_cross_entropy_with_logits)"
    for name, fits, wanted, got in (
        ("logits", C > 1, two, tuple(logits.shape)),
        ("target", integer, "hold integer class indices", target.dtype),
        ("target", target.shape == shape, f"have shape {shape}", tuple(target.shape)),
        ("gamma", 0 <= gamma < float("inf"), "be a finite number >= 0", gamma),
        ("alpha", alpha.shape in ((), (C,)), f"be one number or {C} weights", tuple(alpha.shape)),
        ("reduction", reduction in reductions, f"be one of {reductions}", reduction),
    ):
        if not fits:
            raise ValueError(f"{name} must {wanted}, got {got}")

    # 1. The P labelled pixels, m_i = 1, and their classes.
    m = target != ignore_index  # (N, *spatial)
    if not torch.iinfo(target.dtype).min <= ignore_index <= torch.iinfo(target.dtype).max:
        m = torch.ones_like(m)  # it would wrap around to a class, and ignores nothing
    where = m.nonzero(as_tuple=True)  # one index (P,) per dimension of target
    y = target[where].long()  # (P,)
    wrong_y, wrong_alpha = (y < 0) | (y >= C), ~((alpha >= 0) & alpha.isfinite())
    if wrong_y.any() | wrong_alpha.any():  # one question to the GPU, not two
        if wrong_alpha.any():
            raise ValueError(f"alpha must be finite and >= 0, got {alpha.tolist()}")
        got = f"got {y[wrong_y][0].item()} with {ignore_index=}"
        raise ValueError(f"target must lie in 0…{C - 1} or be ignore_index, {got}")

    # 2. Their logits. Which way they are indexed decides in which layout the gradient comes out.
    n, *s = where
    last = logits.movedim(1, -1)  # (N, *spatial, C), without a gap where logits are channels_last
    z = last[where] if last.is_contiguous() else logits[(n, slice(None), *s)]  # (P, C)

    # 3. The formula. 1 − p is kept off 0, where its power has no finite gradient for γ < 1.
    minus_log_p = F.cross_entropy(z.to(dtype), y, reduction="none")  # (P,)
    one_minus_p = (-torch.expm1(-minus_log_p)).clamp(min=torch.finfo(dtype).tiny)  # (P,)
    loss = alpha.expand(C)[y] * one_minus_p**gamma * minus_log_p  # (P,)
    if reduction == "none":
        return loss.new_zeros(target.shape).index_put(where, loss)
    return loss.sum() / max(len(y), 1) if reduction == "mean" else loss.sum()


class PartialFocalCrossEntropyLoss(nn.Module):
    """`partial_focal_cross_entropy` as a module without parameters; α moves with `.to()`."""

    def __init__(self, gamma=2.0, alpha=0.25, ignore_index=255, reduction="mean"):
        super().__init__()
        self.gamma, self.ignore_index, self.reduction = gamma, ignore_index, reduction
        alpha = torch.as_tensor(torch.nan if alpha is None else alpha, dtype=torch.float32)
        self.register_buffer("alpha", alpha, persistent=False)
        C = max(2, alpha.numel())
        self(torch.zeros(1, C), torch.zeros(1, dtype=torch.long))  # refuses a bad option here

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        options = {k: getattr(self, k) for k in ("gamma", "alpha", "ignore_index", "reduction")}
        return partial_focal_cross_entropy(logits, target, **options)
