"""The dense rival: values by loops and by hand, where gradient flows, when each loss is on, what is refused."""

import math

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.rivals.dense_alignment import (
    DenseAlignment,
    decoder_consistency,
    encoder_consistency,
    slot_redundancy,
)

B, T, N, C, S = 2, 4, 6, 5, 4


def features(seed, size=C, b=B, t=T):
    return torch.randn(b, t, N, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed):
    return torch.randint(0, 3, (B, T, N), generator=torch.Generator().manual_seed(seed))


def unit(x):
    length = math.sqrt(sum(float(v) ** 2 for v in x))
    return [float(v) / length for v in x]


def dot(x, y):
    return sum(p * q for p, q in zip(x, y, strict=True))


def groups_of(x, frames):
    """Lists of patches, each a list of (video, frame, patch)."""
    for b in range(x.shape[0]):
        for start in range(0, x.shape[1], frames):
            yield [(b, t, n) for t in range(start, start + frames) for n in range(x.shape[2])]


def loop_decoder(student, anchor, label, frames, temperature, base):
    losses = []
    for group in groups_of(student, frames):
        columns = [unit(anchor[i]) for i in group]
        for i in group:
            scores = [dot(unit(student[i]), y) / temperature for y in columns]
            norm = math.log(sum(math.exp(s) for s in scores))
            mates = [j for j, other in enumerate(group) if label[other] == label[i]]
            of_object = sum(scores[j] - norm for j in mates) / len(mates)
            losses.append(-(of_object + scores[group.index(i)] - norm) / 2 * temperature / base)
    return sum(losses) / len(losses)


def loop_encoder(student, fixed, label, frames, neighbours, temperature, base):
    total, count = 0.0, 0
    for group in groups_of(student, frames):
        rows, still = [unit(student[i]) for i in group], [unit(fixed[i]) for i in group]
        for i, x in enumerate(rows):
            scores = {j: dot(x, y) / temperature for j, y in enumerate(rows) if j != i}
            norm = math.log(sum(math.exp(s) for s in scores.values()))
            order = sorted(range(len(group)), key=lambda j: -dot(still[i], still[j]))
            near = [j for j in order[: neighbours * frames] if j != i]
            for chosen in (near, [j for j in scores if label[group[j]] == label[group[i]]]):
                if chosen:
                    total += -sum(scores[j] - norm for j in chosen) / len(chosen) / 2 * temperature / base
            count += 1
    return total / count


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize(("temperature", "base"), [(0.1, 0.07), (0.5, 0.25)])
def test_decoder_consistency_by_loops(frames, temperature, base):
    x, y, label = features(0), features(1), labels(2)
    got = decoder_consistency(x, y, label, group_frames=frames, temperature=temperature, base_temperature=base)
    assert got.item() == pytest.approx(loop_decoder(x, y, label, frames, temperature, base), rel=1e-10)


@pytest.mark.parametrize(("frames", "neighbours"), [(1, 1), (1, 6), (2, 2), (4, 3)])
def test_encoder_consistency_by_loops(frames, neighbours):
    x, y, label = features(3), features(4, 7), labels(5)
    got = encoder_consistency(x, y, label, group_frames=frames, neighbours=neighbours)
    assert got.item() == pytest.approx(loop_encoder(x, y, label, frames, neighbours, 0.1, 0.07), rel=1e-6)


def test_patches_that_tie_are_all_near_and_one_alone_in_its_object_counts_nothing_for_it():
    # Of three equal patches one neighbour, itself, is asked for: the others tie with it.
    y = torch.ones(1, 1, 3, 2, dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64).view(1, 1, 3, 2)
    got = encoder_consistency(x, y, torch.tensor([[[0, 1, 2]]]), group_frames=1, neighbours=1, temperature=1.0)
    # Patches 0 and 2 are alike (1) and far from patch 1 (0); nothing shares an object.
    norm = math.log(math.e + 1)
    assert got.item() == pytest.approx((2 * (norm - 0.5) + math.log(2)) / 3 / 2 / 0.07, rel=1e-6)
    x, alone = features(6, b=1, t=1), torch.arange(N).view(1, 1, N)
    losses = [encoder_consistency(x, x, one, group_frames=1, neighbours=3) for one in (alone, torch.zeros_like(alone))]
    assert losses[0].isfinite()
    assert losses[1] > losses[0]


def loop_redundancy(attention, slots, redundant):
    total = 0.0
    b, t, s, n = attention.shape
    for maps, states in zip(attention.tolist(), slots, strict=True):
        kl = [[sum(a * (math.log(a + 1e-8) + math.log(n)) for a in one) for one in frame] for frame in maps]
        mean = [sum(frame[i] for frame in kl) / t for i in range(s)]
        last, chosen = [unit(one) for one in states[-1]], []
        while len(chosen) < redundant and s - len(chosen) > 1:
            free = [i for i in range(s) if i not in chosen]
            i, j = max(((i, j) for i in free for j in free if i < j), key=lambda p: dot(last[p[0]], last[p[1]]))
            chosen.append(i if mean[i] <= mean[j] else j)
        total += sum(frame[i] for frame in kl for i in chosen) / len(chosen) / t
    return total / b


@pytest.mark.parametrize("redundant", [1, 3, 5])
def test_redundancy_by_loops(redundant):
    generator = torch.Generator().manual_seed(redundant)
    attention = torch.randn(3, T, S, N, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    slots = torch.randn(3, T, S, C, generator=generator, dtype=torch.float64)
    got = slot_redundancy(attention, slots, redundant)
    assert got.item() == pytest.approx(loop_redundancy(attention, slots, redundant), rel=1e-9)


def test_redundancy_by_hand():
    # Slots 0 and 1 are alike and slot 1 is the flatter one: its attention (3/4, 1/4) is what is pushed to uniform.
    attention = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5]]).view(1, 1, 3, 2).requires_grad_()
    slots = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]).view(1, 1, 3, 2).requires_grad_()
    loss = slot_redundancy(attention, slots, redundant=1)
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    loss.backward()
    assert slots.grad is None
    assert attention.grad[0, 0, 1].all()
    assert not attention.grad[0, 0, [0, 2]].any()


def test_gradients_are_right_and_flow_into_the_student_only():
    x, y, label = features(9, t=2, b=1).requires_grad_(), features(10, t=2, b=1).requires_grad_(), labels(3)[:1, :2]
    for loss in (decoder_consistency, lambda *args, **o: encoder_consistency(*args, neighbours=2, **o)):
        to_x, to_y = torch.autograd.grad(loss(x, y, label, group_frames=2), (x, y), allow_unused=True)
        assert to_x.any()
        assert to_y is None
        assert torch.autograd.gradcheck(lambda v, loss=loss: loss(v, y.detach(), label, group_frames=2), x)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    maps = [torch.randn(B, T, S, N).softmax(2).requires_grad_() for _ in range(2)]
    return {
        "backbone_features": torch.randn(B, T, N, 7, requires_grad=True),
        "rebuilt_features": torch.randn(B, T, N, 7, requires_grad=True),
        "encoder_features": torch.randn(B, T, N, C, requires_grad=True),
        "attention": maps[0],
        "masks": maps[1],
        "slots": torch.randn(B, T, S, C, requires_grad=True),
    }


def module(**options):
    torch.manual_seed(1)
    return DenseAlignment(7, C, projection_dim=6, neighbours=2, **options)


def test_the_module_projects_weights_and_adds(parts):
    dense = module(weight=0.3, redundancy_weight=0.7, start_step=0, redundancy_steps=1)
    out = dense(**parts, step=0)
    project = dense.decoder_projection.weight
    decoder = decoder_consistency(
        parts["rebuilt_features"] @ project.T, parts["backbone_features"] @ project.T, parts["attention"].max(2).indices
    )
    encoder = encoder_consistency(
        parts["encoder_features"] @ dense.encoder_projection.weight.T,
        parts["backbone_features"],
        parts["masks"].max(2).indices,
        neighbours=2,
    )
    share = parts["attention"] / parts["attention"].sum(-1, keepdim=True)
    redundancy = slot_redundancy(share, parts["slots"])
    torch.testing.assert_close(out.decoder_loss, decoder)
    torch.testing.assert_close(out.encoder_loss, encoder)
    torch.testing.assert_close(out.redundancy_loss, redundancy)
    torch.testing.assert_close(out.loss, 0.3 * (decoder + encoder) + 0.7 * redundancy)
    out.loss.backward()
    reached = {name for name, value in parts.items() if value.grad is not None and value.grad.any()}
    assert reached == {"rebuilt_features", "encoder_features", "attention"}
    assert all(p.grad.any() for p in dense.parameters())


@pytest.mark.parametrize(
    ("step", "consistency", "redundancy"), [(0, False, True), (4, False, True), (5, False, False), (9, True, False)]
)
def test_schedule(parts, step, consistency, redundancy):
    out = module(redundancy_steps=5, start_step=9)(**parts, step=step)
    assert bool(out.decoder_loss) == consistency
    assert bool(out.encoder_loss) == consistency
    assert bool(out.redundancy_loss) == redundancy


GOOD, LABEL, MAPS = features(0), labels(0), torch.rand(2, 3, 4, 5)


@pytest.mark.parametrize("loss", [decoder_consistency, encoder_consistency])
@pytest.mark.parametrize(
    ("given", "options", "error", "match"),
    [
        ((GOOD, GOOD, LABEL), {"group_frames": 3}, ShapeError, "`group_frames` to divide the 4 frames"),
        ((GOOD, GOOD, LABEL), {"group_frames": 0}, ShapeError, "`group_frames` to divide"),
        ((GOOD, GOOD, LABEL), {"temperature": 0.0}, ConfigError, "temperatures above 0"),
        ((GOOD, GOOD, LABEL), {"base_temperature": -1.0}, ConfigError, "temperatures above 0"),
        ((GOOD[0], GOOD, LABEL), {}, ShapeError, "of the same videos, frames and patches"),
        ((GOOD, GOOD, LABEL[..., 1:]), {}, ShapeError, "of the same videos, frames and patches"),
        ((GOOD, GOOD[:1], LABEL), {}, ShapeError, "of the same videos, frames and patches"),
    ],
)
def test_refusals(loss, given, options, error, match):
    with pytest.raises(error, match=match):
        loss(*given, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: encoder_consistency(GOOD, GOOD, LABEL, neighbours=0), ConfigError, r"`neighbours` to be in \[1, 6\]"),
        (lambda: encoder_consistency(GOOD, GOOD, LABEL, neighbours=N + 1), ConfigError, "`neighbours`"),
        (lambda: slot_redundancy(MAPS, MAPS.mT), ShapeError, "of one clip"),
        (lambda: slot_redundancy(MAPS, MAPS, 0), ConfigError, "`redundant` to be at least 1"),
    ],
)
def test_more_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
