"""Random clips: the implementation equals the loop reference in every label, region, count, loss and gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssync_cases import Case, cases, logits_of_kind, off_threshold, softmax

from ssync_pl.method import ssync_loss

QUIET = {"deadline": None, "derandomize": True}


@settings(max_examples=100, **QUIET)
@given(case=cases())
def test_logits_float64(case):
    case.check(torch.float64, 1e-9)


@settings(max_examples=40, **QUIET)
@given(case=cases(most_slots=9))
def test_logits_float32(case):
    case.check(torch.float32, 2e-6 if case.options["loss"] == "brier" else 2e-5)


@settings(max_examples=40, **QUIET)
@given(case=cases(most_slots=6), sides=st.sampled_from(["both", "encoder", "decoder"]))
def test_probabilities_only(case, sides):
    if sides != "decoder":
        case.encoder_probs, case.encoder_logits = softmax(case.encoder_logits / 2), None
        case.options["merge"] = None
    if sides != "encoder":
        case.decoder_probs, case.decoder_logits = softmax(case.decoder_logits / 2), None
    output, _ = case.check(torch.float64, 1e-9)
    if sides != "decoder":
        assert output.slot_iou is None
        assert not output.merged_slots.any()


@settings(max_examples=25, **QUIET)
@given(seed=st.integers(0, 2**32 - 1), s=st.integers(1, 6), threshold=st.floats(0, 0.9))
def test_merging_of_probabilities_takes_their_logarithm(seed, s, threshold):
    rng = np.random.default_rng(seed)
    scores = logits_of_kind(rng, "copies", 2, 2, s, (3, 4)) + 0.01 * rng.random((2, 2, s, 12))
    probs = softmax(scores)
    case = Case(None, logits_of_kind(rng, "blobs", 2, 2, s, (3, 4)), (3, 4), encoder_probs=probs)
    case.options = {"merge": True, "merge_threshold": threshold}
    if s == 1:
        return  # log 1 is constant: its coverage is rounding
    case.options["merge_threshold"] = off_threshold(case.reference().slot_iou, threshold)
    with pytest.warns(UserWarning, match="coverage"):
        case.check(torch.float64, 1e-9)


@settings(max_examples=25, **QUIET)
@given(case=cases(most_slots=6), seed=st.integers(0, 2**32 - 1))
def test_probabilities_beside_logits_are_the_loss_and_logits_the_merging(case, seed):
    rng = np.random.default_rng(seed)
    b, t, s, _ = case.encoder_logits.shape
    case.encoder_probs = softmax(logits_of_kind(rng, "normal", b, t, s, case.grid))
    case.decoder_probs = softmax(logits_of_kind(rng, "blobs", b, t, s, case.grid))
    case.check(torch.float64, 1e-9)


def test_one_slot_has_neither_boundary_nor_loss():
    rng = np.random.default_rng(0)
    case = Case(rng.normal(size=(2, 3, 1, 6)), rng.normal(size=(2, 3, 1, 6)), (2, 3))
    output, _ = case.check()
    assert output.boundary_count.item() == 0
    assert output.interior_fraction.item() == 1
    assert output.agreement.item() == 1
    assert output.loss.item() == 0


def test_one_patch_differs_only_in_time():
    encoder = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]).reshape(1, 3, 2, 1)
    case = Case(encoder, np.zeros((1, 3, 2, 1)), (1, 1), options={"merge": False})
    output, _ = case.check()
    assert output.boundary.flatten().tolist() == [True, True, False]
    case.frame_index = np.array([[4, 6, 7]])
    output, _ = case.check()
    assert output.boundary.flatten().tolist() == [False, False, False]
    assert output.loss.item() == output.interior_loss.item()


def test_a_single_speck_is_noise():
    labels = np.zeros((1, 1, 9), int)
    labels[0, 0, 4] = 1
    encoder = (labels[:, :, None] == np.arange(2)[None, None, :, None]).astype(float)
    encoder = np.repeat(encoder, 1, axis=1)
    case = Case(encoder, encoder.copy(), (3, 3), options={"merge": False})
    # The speck differs from its 8 neighbours in the frame and equals itself twice in time.
    for n_noise, kept in ((2, True), (3, False)):
        case.options["n_noise"] = n_noise
        output, _ = case.check()
        assert output.boundary[0, 0, 1, 1].item() is kept
        assert output.boundary.sum().item() == 8 + kept


def test_overlap_threshold_is_strict_and_time_is_not_pooled():
    # Frame 0: two slots share 1 of 2 patches; frame 1: both cover nothing and count as 0.
    d = np.full((1, 2, 2, 4), -4.0)
    d[0, 0, 0, :2] = [8, 8]
    d[0, 0, 1, :2] = [8, -5]
    for threshold, merged in ((0.2, 1), (0.26, 0)):
        case = Case(d, d.copy(), (2, 2), options={"merge_threshold": threshold})
        output, _ = case.check()
        assert output.slot_iou[0, 0, 1].item() == pytest.approx(0.25, abs=1e-5)
        assert output.merged_slots.tolist() == [merged]


def test_equal_areas_go_to_the_lowest_slot():
    d = np.zeros((1, 1, 3, 4))
    d[0, 0, 1] = [3, 3, 1, 1]
    d[0, 0, 2] = [3, 3, 1, 1]
    d[0, 0, 0] = [0, 0, 2, 2]
    output, _ = Case(d, d.copy(), (2, 2), options={"merge_threshold": 0.5}).check()
    assert output.winners.tolist() == [[0, 1, 1]]
    assert output.raw_encoder_labels.flatten().tolist() == [1, 1, 0, 0]
    # With the lower of the two invalid, the other wins its patches, and nothing is left to merge.
    case = Case(d, d.copy(), (2, 2), slot_valid=np.array([[True, False, True]]), options={"merge_threshold": 0.5})
    output, _ = case.check()
    assert output.winners.tolist() == [[0, 1, 2]]
    assert output.encoder_labels.flatten().tolist() == [2, 2, 0, 0]


def test_temperature_is_no_part_of_the_labels():
    rng = np.random.default_rng(3)
    case = Case(logits_of_kind(rng, "normal", 1, 2, 4, (3, 3)), logits_of_kind(rng, "normal", 1, 2, 4, (3, 3)), (3, 3))
    plain, _ = case.check()
    case.options["temperature"] = 0.25
    sharp, _ = case.check()
    assert torch.equal(plain.encoder_labels, sharp.encoder_labels)
    assert plain.loss.item() != sharp.loss.item()


def test_default_merging_follows_the_encoder_logits():
    rng = np.random.default_rng(4)
    logits = logits_of_kind(rng, "blobs", 1, 2, 3, (3, 3))
    assert ssync_loss(Case(logits, logits, (3, 3)).maps()).slot_iou is not None
    decoder_only_probs = Case(logits, None, (3, 3), decoder_probs=softmax(logits))
    assert ssync_loss(decoder_only_probs.maps()).slot_iou is not None
    encoder_probs = Case(None, logits, (3, 3), encoder_probs=softmax(logits))
    assert ssync_loss(encoder_probs.maps()).slot_iou is None
