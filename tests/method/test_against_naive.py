"""Clips at random and by hand: the implementation equals the loop reference in all that it computes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssync_cases import Case, cases, logits_of_kind, off_threshold, softmax

QUIET = {"deadline": None, "derandomize": True}
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=140, **QUIET)
@given(case=cases(), double=st.sampled_from([True, True, False]))
def test_logits(case, double):
    if double:
        case.check()
    else:
        case.check(torch.float32, 2e-6 if case.options["loss"] == "brier" else 2e-5)


@settings(max_examples=40, **QUIET)
@given(case=cases(most_slots=6), sides=st.sampled_from(["both", "encoder", "decoder"]))
def test_probabilities_only_merge_nothing_by_default(case, sides):
    if sides != "decoder":
        case.attention_probs, case.attention_logits = softmax(case.attention_logits / 2), None
        case.options["merge"] = None
    if sides != "encoder":
        case.mask_probs, case.mask_logits = softmax(case.mask_logits / 2), None
    output = case.check()
    if sides != "decoder":
        assert output.slot_iou is None
        assert not output.merged_slots.any()


@settings(max_examples=25, **QUIET)
@given(seed=SEEDS, s=st.integers(2, 6), threshold=st.floats(0, 0.9))  # log 1 is constant: its coverage is rounding
def test_merging_of_probabilities_takes_their_logarithm(seed, s, threshold):
    rng = np.random.default_rng(seed)
    probs = softmax(logits_of_kind(rng, "copies", 2, 2, s, (3, 4)) + 0.01 * rng.random((2, 2, s, 12)))
    case = Case(None, logits_of_kind(rng, "blobs", 2, 2, s, (3, 4)), (3, 4), attention_probs=probs)
    case.options = {"merge": True, "merge_threshold": threshold}
    case.options["merge_threshold"] = off_threshold(case.reference().slot_iou, threshold)
    with pytest.warns(UserWarning, match="coverage"):
        case.check()


@settings(max_examples=25, **QUIET)
@given(case=cases(most_slots=6), seed=SEEDS)
def test_probabilities_beside_logits_are_the_loss_and_logits_the_merging(case, seed):
    rng, size = np.random.default_rng(seed), case.attention_logits.shape[:3]
    case.attention_probs, case.mask_probs = (
        softmax(logits_of_kind(rng, kind, *size, case.grid)) for kind in ("normal", "blobs")
    )
    case.check()


def test_one_patch_differs_only_in_time():
    labels_1_0_0 = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]).reshape(1, 3, 2, 1)
    case = Case(labels_1_0_0, np.zeros((1, 3, 2, 1)), (1, 1), options={"merge": False})
    assert case.check().boundary.flatten().tolist() == [True, True, False]
    case.frame_index = np.array([[4, 6, 7]])
    output = case.check()
    assert not output.boundary.any()
    assert output.loss.item() == output.interior_loss.item()
