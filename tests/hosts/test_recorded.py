"""Hosts against numbers recorded from the public code: tiny random state dicts, features, and what came out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssync_pl import SSyncMaps, hosts, ssync_loss

RECORDED = Path(__file__).parent / "recorded"
SHARED = {"num_slots": 4, "slot_dim": 8, "backbone": None, "feature_dim": 12, "grid": (3, 3)}
SHARED["decoder_hidden"] = (16,) * 2
MIXER = {"similarity_dim": 12, "decoder_hidden": (16,) * 3, "similarity_weight": 0.1}
MOVI = {**MIXER, "reconstruction_weight": 0.0, "similarity_temperature": 0.075}
YTVIS = {**MIXER, "mixer_blocks": 3, "similarity_temperature": 0.25}
CONTRAST, SIMILAR = {"similarity_dim": 12}, {"similarity": "loss_timesim"}
BOTH = {"reconstruction": "loss_featrec", "contrast": "loss_ss"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "videosaur_movi": ("VideoSAUR", MOVI, SIMILAR),
    "videosaur_ytvis": ("VideoSAUR", YTVIS, {**SIMILAR, "reconstruction": "loss_featrec"}),
    "dinosaur": ("DINOSAUR", {}, {"reconstruction": "mse"}),
    "slotcontrast": ("SlotContrast", CONTRAST, BOTH),
    "ssync": ("SlotContrast", CONTRAST, BOTH),
    "srl": ("SlotContrast", CONTRAST, {"reconstruction": "loss_recon"}),  # SRL contrasts slots in a form of its own
}


def _load(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with np.load(RECORDED / f"{name}.npz", allow_pickle=False) as file:
        values = {key: torch.from_numpy(file[key]) for key in file.files}
    state = {key.removeprefix("state/"): value for key, value in values.items() if key.startswith("state/")}
    return state, values


def _host(name: str, state: dict[str, Tensor]) -> Any:
    kind, options, _ = CASES[name]
    host = getattr(hosts, kind)(**{**SHARED, **options}).eval()
    own = {key: value for key, value in state.items() if not key.startswith("projector")}
    assert [key for key, _ in host.named_parameters()] == list(own)  # optimizer states are kept by position
    host.load_state_dict(own, strict=True)
    return host


@pytest.mark.parametrize("name", CASES)
def test_a_public_state_dict_gives_the_public_numbers(name):
    state, recorded = _load(name)
    host = _host(name, state)
    if "noise" in recorded:
        first = host.initializer.mean + recorded["noise"] * host.initializer.log_std.exp()
        host.initializer.forward = lambda *_: first
    with torch.no_grad():
        features = recorded["features"]
        out = host(features)
        losses = host.losses(out, torch.ones(features.shape[:2], dtype=torch.bool))
    found = {
        "slots": out.slots,
        "attention_logits": out.attention_logits,
        "attention": out.attention_logits.softmax(2),
        "masks": out.mask_logits.softmax(2).flatten(-2),
        "reconstruction": out.reconstruction,
    }
    for key, value in found.items():
        assert recorded[key].abs().max() > 0.2
        torch.testing.assert_close(value, recorded[key], atol=1e-5, rtol=0)
    for ours, theirs in CASES[name][2].items():
        torch.testing.assert_close(losses[ours][1], recorded[f"loss/{theirs}"], atol=1e-5, rtol=0)


def test_ssync_on_the_loaded_host_gives_the_public_losses():
    state, recorded = _load("ssync")
    with torch.no_grad():
        out = _host("ssync", state)(recorded["features"])
    maps = SSyncMaps(out.attention_logits, out.mask_logits.flatten(-2), grid=out.attention_grid)
    found = ssync_loss(maps, merge_threshold=0.5)
    assert found.merged_slots.sum() > 0
    torch.testing.assert_close(found.boundary_loss, recorded["loss/loss_grp2deccls"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.interior_loss, recorded["loss/loss_dec2grpcls"], atol=1e-5, rtol=0)
