import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ssync_cases import Case, cases, close_to_largest, logits_of_kind, off_threshold, softmax
from ssync_naive import naive_ssync

from ssync_pl.method import redundant_slots, ssync_loss
from ssync_pl.method.maps import SSyncMaps

QUIET = {"deadline": None, "derandomize": True}
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=140, **QUIET)
@given(case=cases(), double=st.sampled_from([True, True, False]))
def test_logits(case, double):
    if double:
        output = case.check()
        if case.options["merge"] is not False:
            assert torch.equal(redundant_slots(case.maps(), case.options["merge_threshold"]), output.winners)
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
    logits = [logits_of_kind(rng, kind, *size, case.grid) for kind in ("normal", "blobs")]
    case.attention_probs, case.mask_probs = map(softmax, logits)
    case.check()


GOLDEN = Path(__file__).parents[1] / "golden"
RECORDS = ["chain_transitive", "smooth_blobs_movic", "exact_ties", "image_T1_S2", "no_boundary", "random_noise_counts"]
NAMES = pytest.mark.parametrize("name", RECORDS)
EXACT = {
    "grp_labels": "raw_encoder_labels",
    "dec_labels": "raw_decoder_labels",
    "merged_grp_labels": "encoder_labels",
    "merged_dec_labels": "decoder_labels",
    "boundary": "boundary",
    "interior": "interior",
}
OPTIONS = {"merge_threshold": "thr", "n_bd": "dif_n_bd", "n_nbd": "dif_n_nbd", "n_noise": "dif_n_bd_noise"}
OPTIONS["temperature"] = "temperature"


def load(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as archive:
        record = {key: archive[key] for key in archive.files}
    about = json.loads(str(record.pop("json")))
    options = {key: about["config"][theirs] for key, theirs in OPTIONS.items()}
    return record, (about["H"], about["W"]), options, about["stats"]


def run(record, grid, options, dtype=torch.float32):
    d, a = (torch.tensor(record[key], dtype=dtype, requires_grad=True) for key in ("dots", "alpha"))
    return ssync_loss(SSyncMaps(attention_logits=d, mask_logits=a, grid=grid), **options), d, a


@NAMES
def test_labels_and_regions_are_equal_bit_for_bit(name):
    record, grid, options, stats = load(name)
    output, _, _ = run(record, grid, options)
    reference = naive_ssync(record["dots"], record["alpha"], grid=grid, **options)
    for key, attribute in EXACT.items():
        np.testing.assert_array_equal(getattr(output, attribute).numpy(), record[key], err_msg=key)
        np.testing.assert_array_equal(getattr(reference, attribute), record[key], err_msg=key)
    assert (output.boundary_count.item(), output.interior_count.item()) == (stats["boundary"], stats["interior"])
    # The record counts labels that vanish: a merged slot that wins no patch is not among them.
    pairs = zip(output.raw_encoder_labels, output.encoder_labels, strict=True)
    assert [len(raw.unique()) - len(merged.unique()) for raw, merged in pairs] == stats["merged_slots"]
    np.testing.assert_array_equal(reference.coverage, record["coverage"])
    np.testing.assert_array_equal(reference.area, record["area"])
    for iou in (output.slot_iou.numpy(), reference.slot_iou):
        np.testing.assert_allclose(iou, record["slot_iou"], atol=1e-6)


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients(name, dtype):
    record, grid, options, _ = load(name)
    output, d, a = run(record, grid, options, dtype)
    # The record is NaN where nothing is selected.
    expected = [float(np.nan_to_num(record[key])) for key in ("loss_grp2dec", "loss_dec2grp")]
    got = [output.boundary_loss.item(), output.interior_loss.item(), output.loss.item()]
    assert got == pytest.approx([*expected, sum(expected)], rel=1e-6, abs=0)
    output.loss.backward()  # the record has the gradient of one loss on each side: they do not cross
    # In `no_boundary` the largest probability is 0.9997 or more and the record itself lost digits in 1 - p: the float64
    # truth is 7e-4 of the largest entry away from it (1.2e-8). Elsewhere the record is within 7e-7 of the truth.
    tolerance = 1e-3 if name == "no_boundary" else 1e-6
    close_to_largest(a.grad.numpy(), record["grad_grp2dec_alpha"].astype(np.float64), tolerance, "alpha")
    close_to_largest(d.grad.numpy(), record["grad_dec2grp_dots"].astype(np.float64), tolerance, "dots")
