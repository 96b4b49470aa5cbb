import math

import pytest
import torch
from torch.nn.functional import normalize

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.rivals.dense_alignment import DenseAlignment, decoder_consistency, encoder_consistency, slot_redundancy

B, T, N, C, S = 2, 4, 6, 5, 4


def features(seed, size=C, b=B, t=T):
    return torch.randn(b, t, N, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed):
    return torch.randint(0, 3, (B, T, N), generator=torch.Generator().manual_seed(seed))


def groups(one, other, label, frames):
    for b in range(B):
        for start in range(0, T, frames):
            x, y, objects = (value[b, start : start + frames].flatten(0, 1) for value in (one, other, label))
            yield normalize(x, dim=1), normalize(y, dim=1), objects


def loop_decoder(student, anchor, label, frames, temperature, base):
    losses = []
    for x, y, objects in groups(student, anchor, label, frames):
        for i in range(len(x)):
            logs = (y @ x[i] / temperature).log_softmax(0)
            losses.append(-(logs[objects == objects[i]].mean() + logs[i]) / 2 * temperature / base)
    return sum(losses) / len(losses)


def loop_encoder(student, fixed, label, frames, neighbours, temperature, base):
    losses = []
    for x, y, objects in groups(student, fixed, label, frames):
        for i in range(len(x)):
            others, near = torch.arange(len(x)) != i, torch.zeros(len(x), dtype=torch.bool)
            scores = x @ x[i] / temperature
            logs = scores - scores[others].logsumexp(0)
            near[(y @ y[i]).topk(neighbours * frames).indices] = True
            chosen = [logs[picked & others] for picked in (near, objects == objects[i])]
            losses.append(-sum(one.mean() for one in chosen if len(one)) / 2 * temperature / base)
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("frames", "scale"), [(1, (0.1, 0.07)), (2, (0.5, 0.25)), (4, (0.1, 0.07))])
@pytest.mark.parametrize("neighbours", [1, 3, 6])
def test_consistency_by_loops(frames, scale, neighbours):
    x, y, label = features(3), features(4), labels(5)
    options = {"group_frames": frames, "temperature": scale[0], "base_temperature": scale[1]}
    got = decoder_consistency(x, y, label, **options)
    torch.testing.assert_close(got, loop_decoder(x, y, label, frames, *scale), rtol=1e-10, atol=0)
    got = encoder_consistency(x, y := features(4, 7), label, neighbours=neighbours, **options)
    torch.testing.assert_close(got, loop_encoder(x, y, label, frames, neighbours, *scale), rtol=1e-6, atol=0)


def test_patches_that_tie_are_all_near_and_one_alone_in_its_object_counts_nothing_for_it():
    # Of three equal patches one neighbour, itself, is asked for: the others tie with it.
    y = torch.ones(1, 1, 3, 2, dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64).view(1, 1, 3, 2)
    got = encoder_consistency(x, y, torch.tensor([[[0, 1, 2]]]), group_frames=1, neighbours=1, temperature=1.0)
    # Patches 0 and 2 are alike (1) and far from patch 1 (0); nothing shares an object.
    norm = math.log(math.e + 1)
    assert got.item() == pytest.approx((2 * (norm - 0.5) + math.log(2)) / 3 / 2 / 0.07, rel=1e-6)


def loop_redundancy(attention, slots, redundant):
    divergences = []
    for maps, last in zip(attention, normalize(slots[:, -1], dim=-1), strict=True):
        kl = (maps * (maps + 1e-8).log()).sum(-1).mean(0) + math.log(N)
        alike, chosen = (last @ last.T).tolist(), []
        while len(chosen) < redundant and S - len(chosen) > 1:
            free = [i for i in range(S) if i not in chosen]
            i, j = max(((i, j) for i in free for j in free if i < j), key=lambda pair: alike[pair[0]][pair[1]])
            chosen.append(i if kl[i] <= kl[j] else j)
        divergences.append(kl[chosen].mean())
    return sum(divergences) / len(divergences)


@pytest.mark.parametrize("redundant", [1, 3, 5])
def test_redundancy_by_loops_gives_no_gradient_to_slots(redundant):
    attention, slots = features(redundant, S, 3).mul(2).softmax(2).mT, features(redundant + 1, C, 3)[:, :, :S]
    got = slot_redundancy(attention.requires_grad_(), slots.requires_grad_(), redundant)
    torch.testing.assert_close(got, loop_redundancy(attention, slots.detach(), redundant), rtol=1e-7, atol=0)
    to_attention, to_slots = torch.autograd.grad(got, (attention, slots), allow_unused=True)
    assert to_attention.any()
    assert to_slots is None


@pytest.fixture
def parts():
    torch.manual_seed(0)
    sizes = {"backbone_features": 7, "rebuilt_features": 7, "encoder_features": C}
    maps = {name: torch.randn(B, T, S, N).softmax(2).requires_grad_() for name in ("attention", "masks")}
    slots = torch.randn(B, T, S, C, requires_grad=True)
    return {name: torch.randn(B, T, N, d, requires_grad=True) for name, d in sizes.items()} | maps | {"slots": slots}


def test_the_module_projects_weights_and_adds_what_is_on(parts):
    weights = {"weight": 0.3, "redundancy_weight": 0.7, "start_step": 9, "redundancy_steps": 10}
    dense = DenseAlignment(7, C, projection_dim=6, neighbours=2, **weights)
    out = dense(**parts, step=9)
    backbone, attention = parts["backbone_features"], parts["attention"]
    rebuilt, anchor = (dense.decoder_projection(x) for x in (parts["rebuilt_features"], backbone))
    encoded, drawn = dense.encoder_projection(parts["encoder_features"]), parts["masks"].argmax(2)
    decoder = decoder_consistency(rebuilt, anchor, attention.argmax(2))
    encoder = encoder_consistency(encoded, backbone, drawn, neighbours=2)
    redundancy = slot_redundancy(attention / attention.sum(-1, keepdim=True), parts["slots"])
    total = 0.3 * (decoder + encoder) + 0.7 * redundancy
    torch.testing.assert_close(tuple(out), (total, decoder, encoder, redundancy))
    out.loss.backward()
    reached = {name for name, value in parts.items() if value.grad is not None and value.grad.any()}
    assert reached == {"rebuilt_features", "encoder_features", "attention"}
    assert all(p.grad.any() for p in dense.parameters())
    on = [[bool(loss) for loss in dense(**parts, step=step)[1:]] for step in (0, 8, 9, 10)]
    assert on == [[False, False, True]] * 2 + [[True] * 3, [True, True, False]]


GOOD, LABEL, MAPS = features(0), labels(0), torch.rand(2, 3, 4, 5)
DIFFERENT = "of the same videos, frames and patches"


@pytest.mark.parametrize("loss", [decoder_consistency, encoder_consistency])
@pytest.mark.parametrize(
    ("given", "options", "error", "match"),
    [
        ((GOOD, GOOD, LABEL), {"group_frames": 3}, ShapeError, "`group_frames` to divide the 4 frames"),
        ((GOOD, GOOD, LABEL), {"temperature": 0.0}, ConfigError, "temperatures above 0"),
        ((GOOD[0], GOOD, LABEL), {}, ShapeError, DIFFERENT),
        ((GOOD, GOOD, LABEL[..., 1:]), {}, ShapeError, DIFFERENT),
        ((GOOD, GOOD[:1], LABEL), {}, ShapeError, DIFFERENT),
    ],
)
def test_features_and_groups_that_are_refused(loss, given, options, error, match):
    with pytest.raises(error, match=match):
        loss(*given, **options)
    with pytest.raises(ShapeError, match="of one clip"):
        slot_redundancy(MAPS, MAPS.mT)
