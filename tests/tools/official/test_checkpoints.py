from __future__ import annotations

import pathlib
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from ssync_pl.errors import ConfigError
from ssync_pl.hosts import DINOSAUR, SlotContrast, VideoSAUR
from ssync_pl.tools.official.checkpoints import convert_checkpoint as convert
from ssync_pl.tools.official.checkpoints import public_globals, read_checkpoint

RECORDED = Path(__file__).parents[2] / "hosts" / "recorded"
CACHED = ["backbone=null", "layer=null", "feature_dim=12", "similarity_dim=12", "decoder_hidden=[16, 16]"]


def convert_checkpoint(path: Any, out: Any, changes: Any = ()) -> Any:
    pairs = (change.partition("=") for change in changes)
    return convert(path, out, options={name: yaml.safe_load(value) for name, _, value in pairs})


def _state(name: str) -> dict[str, Tensor]:
    with np.load(RECORDED / f"{name}.npz", allow_pickle=False) as file:
        return {key[6:]: torch.from_numpy(file[key]) for key in file.files if key.startswith("state/")}


@pytest.fixture
def old_file(tmp_path):
    """A file as a Lightning of the time wrote it: the folder of the checkpoints is a Path."""

    def write(state: dict[str, Tensor], name: str = "old.ckpt", **more: Any) -> Path:
        content = {
            "epoch": 3,
            "global_step": 100_000,
            "pytorch-lightning_version": "1.8.6",
            "state_dict": state,
            "loops": {"validate_loop": {"state_dict": {}, "epoch_loop.state_dict": {}}},
            "callbacks": {
                "ModelCheckpoint": {"dirpath": pathlib.Path("/home/somebody/logs"), "best_model_score": None}
            },
            "optimizer_states": [],
            "lr_schedulers": [],
            **more,
        }
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return write


def test_old_files_are_read_without_running_anything_in_them(old_file, tmp_path):
    allowed = torch.serialization.get_safe_globals()
    public = read_checkpoint(old_file(_state("slotcontrast")))
    assert (public.epoch, public.global_step) == (3, 100_000)
    torch.testing.assert_close(public.state["initializer.slots"], _state("slotcontrast")["initializer.slots"])
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    torch.save({"state_dict": {"a": torch.ones(1)}, "module": torch.nn.Linear(1, 1)}, tmp_path / "module.ckpt")
    with pytest.raises(ConfigError, match=r"tensors and plain values only.*none is read in a way"):
        read_checkpoint(tmp_path / "module.ckpt")


def test_the_allowance_for_old_files_ends_with_its_block(old_file):
    path = old_file(_state("dinosaur"))
    with public_globals():
        assert torch.load(path, weights_only=True)["global_step"] == 100_000
    with pytest.raises(Exception, match="pathlib"):
        torch.load(path, weights_only=True)


def test_bare_state_dicts_and_safetensors_are_read(tmp_path):
    state = _state("slotcontrast")
    torch.save(state, tmp_path / "bare.pth")
    assert read_checkpoint(tmp_path / "bare.pth").state.keys() == state.keys()
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, tmp_path / "a.safetensors")
    assert convert_checkpoint(tmp_path / "a.safetensors", None, changes=CACHED).tensors == len(state)


def test_damaged_and_strange_files_are_refused(tmp_path):
    (tmp_path / "short.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigError, match="reading it failed"):
        read_checkpoint(tmp_path / "short.ckpt")
    torch.save({"state_dict": {"a": 3, "b": torch.ones(1)}}, tmp_path / "numbers.ckpt")
    with pytest.raises(ConfigError, match="tensors by name, but a are none"):
        read_checkpoint(tmp_path / "numbers.ckpt")
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    with pytest.raises(ConfigError, match="hold a state dict, but got list"):
        read_checkpoint(tmp_path / "list.ckpt")
    with pytest.raises(ConfigError, match="there is no such file"):
        read_checkpoint(tmp_path / "absent.ckpt")


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("slotcontrast", SlotContrast, []),
        ("ssync", SlotContrast, []),
        ("srl", SlotContrast, []),
        ("dinosaur", DINOSAUR, ["num_slots=4"]),
        ("videosaur_movi", VideoSAUR, ["num_slots=4", "decoder_hidden=[16, 16, 16]", "similarity_layer=null"]),
        ("videosaur_ytvis", VideoSAUR, ["num_slots=4", "decoder_hidden=[16, 16, 16]", "similarity_layer=null"]),
    ],
)
def test_a_converted_file_loads_through_lightning(old_file, tmp_path, name, kind, more):
    state = _state(name)
    changes = [change for change in CACHED if kind is not DINOSAUR or not change.startswith("similarity")]
    done = convert_checkpoint(old_file(state), tmp_path / "out" / "ours.ckpt", changes=[*changes, *more])
    assert done.host == kind.__name__
    assert done.dropped == [key for key in state if key.startswith("projector")]
    content = torch.load(tmp_path / "out" / "ours.ckpt", weights_only=True)
    assert content["global_step"] == 100_000
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ours.ckpt"]
    host = kind.load_from_checkpoint(tmp_path / "out" / "ours.ckpt")
    found = host.state_dict()
    assert found.keys() == {key for key in state if not key.startswith("projector")}
    assert all(torch.equal(found[key], state[key]) for key in found)


def test_shapes_give_the_options(old_file):
    done = convert_checkpoint(
        old_file(_state("videosaur_ytvis")), None, changes=[*CACHED[:4], "num_slots=4", "similarity_layer=null"]
    )
    expected = {
        "slot_dim": 8,
        "slot_init": "gaussian",
        "encoder_hidden": 24,
        "corrector_mlp_hidden": 0,
        "predictor_blocks": 1,
        "predictor_mlp_hidden": 32,
        "decoder": "mixer",
        "decoder_hidden": [16, 16, 16],
        "mixer_blocks": 3,
        "reconstruction_weight": 1.0,
        "similarity_weight": 0.1,
        "grid": [3, 3],
    }
    assert {name: done.options[name] for name in expected} == expected
    assert set(done.assumed) == {"grid", "iterations_first", "iterations_later", "mixer_heads", "predictor_heads"}


def test_what_no_shape_tells_has_to_be_given(old_file):
    with pytest.raises(ConfigError, match=r"Expected num_slots, backbone, layer of the host.*--set num_slots="):
        convert_checkpoint(old_file(_state("videosaur_movi")), None)


def test_unexpected_tensors_are_named(old_file, tmp_path):
    state = _state("slotcontrast")
    path = old_file({**state, "decoder.module.gate.weight": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"decoder\.module\.gate\.weight"):
        convert_checkpoint(path, tmp_path / "ours.ckpt", changes=CACHED)
    del state["processor.module.corrector.gru.bias_hh"]
    with pytest.raises(ConfigError, match=r"processor\.module\.corrector\.gru\.bias_hh"):
        convert_checkpoint(old_file(state), tmp_path / "ours.ckpt", changes=CACHED)
    assert not (tmp_path / "ours.ckpt").exists()


def test_options_against_the_file_are_refused_before_anything_is_written(old_file, tmp_path):
    path = old_file(_state("slotcontrast"))
    with pytest.raises(ConfigError, match=r"to be those of SlotContrast.*initializer\.slots"):
        convert_checkpoint(path, tmp_path / "ours.ckpt", changes=[*CACHED, "num_slots=5"])
    with pytest.raises(ConfigError, match="Expected options of SlotContrast"):
        convert_checkpoint(path, tmp_path / "ours.ckpt", changes=[*CACHED, "colour=red"])
    assert not list(tmp_path.glob("*ours*"))


def test_a_file_with_its_vit_needs_no_weights_from_elsewhere(old_file, tmp_path):
    pytest.importorskip("timm")
    options = {"num_slots": 3, "slot_dim": 8, "backbone": "test_vit", "layer": "vit_block2", "grid": (2, 2)}
    public = SlotContrast(**options, backbone_weights="none", decoder_hidden=(16,))
    backbone = public.encoder.module.backbone
    state = {key: value for key, value in public.state_dict().items() if not key.endswith("fingerprint")}
    name = "encoder.module.backbone.model."
    state |= {f"{name}{key}": torch.randn_like(value) for key, value in backbone.model.state_dict().items()}
    with pytest.raises(ConfigError, match="Expected backbone of the host"):
        convert_checkpoint(old_file(state), tmp_path / "ours.ckpt")
    done = convert_checkpoint(old_file(state), tmp_path / "ours.ckpt", changes=["backbone=test_vit"])
    assert done.options["layer"] == "vit_block2"
    assert done.options["backbone_weights"] == "none"
    host = SlotContrast.load_from_checkpoint(tmp_path / "ours.ckpt")
    loaded = host.encoder.module.backbone.model.state_dict()
    assert all(torch.equal(loaded[key[len(name) :]], value) for key, value in state.items() if key.startswith(name))
    with torch.no_grad():
        assert host(torch.randn(1, 2, 3, 32, 32)).slots.shape == (1, 2, 3, 8)


def test_a_trainer_takes_public_and_converted_files(old_file, tmp_path):
    public = old_file(_state("slotcontrast"))
    convert_checkpoint(public, tmp_path / "ours.ckpt", changes=CACHED)
    host = SlotContrast.load_from_checkpoint(tmp_path / "ours.ckpt")
    batch = {
        "features": torch.randn(2, 3, 9, 24),
        "video": torch.randn(2, 3, 3, 12, 12),
        "segmentations": torch.nn.functional.one_hot(torch.randint(2, (2, 3, 12, 12)), 2).movedim(-1, 2).bool(),
    }
    scores = []
    for path in (public, tmp_path / "ours.ckpt"):
        for parameter in host.parameters():
            torch.nn.init.normal_(parameter)
        trainer = L.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with public_globals():
            scores.append(
                trainer.validate(host, DataLoader([batch], batch_size=None), ckpt_path=path, verbose=False)[0]
            )
    assert scores[0] == scores[1]
    torch.testing.assert_close(host.initializer.slots.data, _state("slotcontrast")["initializer.slots"])


@pytest.mark.parametrize("name", ["initializer.slots", "decoder.module.pos_emb"])
def test_tensors_without_axes_are_refused(tmp_path, name):
    state = _state("slotcontrast") | {name: torch.ones(())}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=f"Expected {name} to have . axes"):
        convert_checkpoint(tmp_path / "a.pt", None, changes=CACHED)


def test_sizes_beyond_memory_and_options_of_another_type(tmp_path):
    torch.save(_state("slotcontrast"), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="to fit into memory"):
        convert_checkpoint(tmp_path / "a.pt", None, changes=[*CACHED, "slot_dim=1000000000000000"])
    pytest.importorskip("timm")  # a backbone is asked for
    with pytest.raises(ConfigError, match="Correct --set"):
        convert_checkpoint(tmp_path / "a.pt", None, changes=["backbone=3", "layer=vit_block1"])
