"""The method once more, in float64: merging and regions in loops, and nothing shared with the package."""

import math
from types import SimpleNamespace

import numpy as np
import torch

NEIGHBOURS_IN_FRAME = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def naive_ssync(
    attention_logits=None, mask_logits=None, *, attention_probs=None, mask_probs=None, grid, slot_valid=None,
    patch_valid=None, frame_index=None, merge_threshold=0.7, n_bd=1, n_nbd=1, n_noise=1, temperature=1.0, loss="brier",
    merge=None, boundary_weight=1.0, interior_weight=1.0,
):  # fmt: skip
    """Labels, regions, losses and gradients of arrays (B, T, S, N).

    `grad_decoder` is the gradient of the (unweighted) boundary loss with respect to the decoder side's input,
    `grad_encoder` that of the interior loss with respect to the encoder side's: probabilities where given, else logits.
    """
    encoder, decoder = (
        np.asarray(logits if probs is None else probs, np.float64)
        for logits, probs in ((attention_logits, attention_probs), (mask_logits, mask_probs))
    )
    b_, t_, s_, n_ = encoder.shape
    assert n_ == grid[0] * grid[1]
    places = list(np.ndindex(b_, t_, n_))
    sv = np.ones((b_, s_), bool) if slot_valid is None else np.asarray(slot_valid)
    pv = np.ones((b_, t_, n_), bool) if patch_valid is None else np.asarray(patch_valid)
    fi = np.tile(np.arange(t_), (b_, 1)) if frame_index is None else np.asarray(frame_index)
    raw_e, raw_d = _labels(encoder, sv), _labels(decoder, sv)
    area = np.zeros((b_, s_))
    for b, t, x in places:
        area[b, raw_e[b, t, x]] += pv[b, t, x]

    slot_iou, coverage = None, None
    winners = np.tile(np.arange(s_), (b_, 1))
    if (attention_logits is not None) if merge is None else merge:
        with np.errstate(divide="ignore"):
            logits = np.log(encoder) if attention_logits is None else np.asarray(attention_logits, np.float64)
        coverage = _coverage(logits, sv, pv)
        slot_iou = _slot_iou(coverage)
        for b in range(b_):
            for component in _components(slot_iou[b], merge_threshold):
                winners[b, component] = max(component, key=lambda i: (area[b, i], -i))

    merged_e, merged_d = raw_e.copy(), raw_d.copy()
    for b, t, x in places:
        merged_e[b, t, x] = winners[b, raw_e[b, t, x]]
        merged_d[b, t, x] = winners[b, raw_d[b, t, x]]
    boundary, interior = np.zeros((2, b_, t_, n_), bool)
    for b, t, x in places:
        if pv[b, t, x]:
            n_e, n_d = (_differing(labels, pv, fi, b, t, x, *grid) for labels in (merged_e, merged_d))
            boundary[b, t, x] = n_e >= n_bd and 10 - n_e >= n_noise
            interior[b, t, x] = n_d < n_nbd

    padded, soft_d, soft_e = slot_valid is not None, mask_probs is not None, attention_probs is not None
    boundary_loss, grad_decoder = _loss(decoder, soft_d, padded, boundary, merged_e, sv, temperature, loss)
    interior_loss, grad_encoder = _loss(encoder, soft_e, padded, interior, merged_d, sv, temperature, loss)
    pairs = [zip(raw, pv, strict=True) for raw in (raw_e, raw_d)]
    used_e, used_d = (np.array([len(set(one[valid])) for one, valid in pair]) for pair in pairs)
    valid, shape = int(pv.sum()), (b_, t_, *grid)
    return SimpleNamespace(
        loss=boundary_weight * boundary_loss + interior_weight * interior_loss,
        boundary_loss=boundary_loss,
        interior_loss=interior_loss,
        grad_decoder=grad_decoder,
        grad_encoder=grad_encoder,
        raw_encoder_labels=raw_e.reshape(shape),
        raw_decoder_labels=raw_d.reshape(shape),
        encoder_labels=merged_e.reshape(shape),
        decoder_labels=merged_d.reshape(shape),
        boundary=boundary.reshape(shape),
        interior=interior.reshape(shape),
        winners=winners,
        merged_slots=np.array([sum(int(winners[b, i] != i) for i in range(s_)) for b in range(b_)]),
        slot_iou=slot_iou,
        coverage=coverage,
        area=area,
        boundary_count=boundary.sum(),
        interior_count=interior.sum(),
        boundary_fraction=boundary.sum() / valid,
        interior_fraction=interior.sum() / valid,
        overlap_fraction=(boundary & interior).sum() / valid,
        agreement=((merged_e == merged_d) & pv).sum() / valid,
        used_encoder_slots=used_e,
        used_decoder_slots=used_d,
    )


def _labels(scores, sv):
    return np.where(sv[:, None, :, None], scores, -np.inf).argmax(2)


def _coverage(logits, sv, pv):
    out = np.zeros(logits.shape, bool)
    for b, i in np.ndindex(*sv.shape):
        own = logits[b, :, i]
        if sv[b, i] and pv[b].any():
            out[b, :, i] = pv[b] & (own > math.fsum(own[pv[b]]) / pv[b].sum())
    return out


def _slot_iou(coverage):
    covered = coverage.astype(np.float64)
    both, area = np.einsum("btin,btjn->btij", covered, covered), covered.sum(3) + 1e-6
    return (both / (area[:, :, :, None] + area[:, :, None] - both)).mean(1)


def _components(iou, threshold):
    """Connected components of i ~ j where IoU > threshold, found breadth first; each in ascending order."""
    left, components = set(range(len(iou))), []
    while left:
        queue = [min(left)]
        for i in queue:
            left.discard(i)
            queue += [j for j in left if iou[i, j] > threshold and j not in queue]
        components.append(sorted(queue))
    return components


def _differing(labels, pv, fi, b, t, x, height, width):
    row, column = divmod(x, width)
    places = []
    for dr, dc in NEIGHBOURS_IN_FRAME:
        r, c = min(max(row + dr, 0), height - 1), min(max(column + dc, 0), width - 1)
        places.append((t, r * width + c))
    for other in (t - 1, t + 1):
        if 0 <= other < labels.shape[1] and abs(int(fi[b, other]) - int(fi[b, t])) == 1:
            places.append((other, x))
    return sum(bool(pv[b, u, y] and labels[b, u, y] != labels[b, t, x]) for u, y in places)


def _loss(scores, is_probs, renormalise, selected, labels, sv, temperature, kind):
    """Mean over the selected patches (and, for Brier, valid slots); 0 and zero gradient when nothing is selected."""
    x, terms, divisor = torch.tensor(scores, requires_grad=True), [], 0
    for b in range(len(scores)):
        slots, (t, n) = np.flatnonzero(sv[b]), np.nonzero(selected[b])
        p = x[b, t[:, None], slots, n[:, None]]
        if not is_probs:
            p = (p / temperature).softmax(1)
        elif temperature != 1 or renormalise:
            p = p ** (1 / temperature) / (p ** (1 / temperature)).sum(1, keepdim=True)
        taught = torch.tensor(labels[b, t, n][:, None] == slots)
        terms.append((p - taught.double()).square().sum() if kind == "brier" else -p[taught].log().sum())
        divisor += len(t) * (len(slots) if kind == "brier" else 1)
    loss = sum(terms) / max(divisor, 1)
    return loss.item(), torch.autograd.grad(loss, x)[0].numpy()
