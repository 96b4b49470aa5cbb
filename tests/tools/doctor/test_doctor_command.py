from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssync_pl.cli import main
from ssync_pl.tools.doctor.load import build_model, working_folder_first

BATCH = "2,2,3,4,4"
SAVI = {
    "num_slots": 3,
    "slot_dim": 8,
    "feature_dim": 8,
    "encoder_channels": [8],
    "encoder_strides": [2],
    "encoder_mlp_hidden": 8,
    "corrector_mlp_hidden": 8,
    "predictor_mlp_hidden": 8,
    "decoder_broadcast": [4, 4],
    "decoder_channels": [8],
    "decoder_strides": [2],
}


def doctor(*words: str) -> int:
    return main(["doctor", *words])


def write_config(folder: Path, model: Any, **trainer: Any) -> str:
    data = {
        "root": str(folder / "data"), "num_train": 2, "num_validation": 1, "resolution": 16, "frames": 2,
        "generate_workers": 0, "scene": {"antialias": 1}, "batch_size": 2, "clip_length": 2, "num_workers": 0,
    }  # fmt: skip
    content = {"model": model, "data": {"class_path": "SyntheticDataModule", "init_args": data}, "trainer": trainer}
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "mine.yaml")


@pytest.fixture
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])


def test_a_plain_model_of_unusual_names(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("user_code:Net", "--init", "slots=5", "--batch", "img=" + BATCH, "--call", "loss_function") == 0
    out = capsys.readouterr().out
    assert "Net (plain PyTorch)" in out
    assert "B=2 T=2 S=5 N=16, grid 4 x 4" in out
    assert "found at      softmax:binder, softmax:painter" in out
    assert "with attach(model, attention='softmax:binder', masks='softmax:painter', total_steps=...) as ssync:" in out


@pytest.mark.parametrize(("host", "batch"), [("Host", "video (2, 2, 3, 4, 4)"), ("Bare", "a tensor (2, 2, 3, 4, 4)")])
def test_what_it_says_to_write_can_be_written(
    user_folder: Path, capsys: pytest.CaptureFixture[str], host: str, batch: str
) -> None:
    import lightning.pytorch as L

    from ssync_pl import SSyncCallback

    assert doctor(f"user_code:{host}", "--batch", BATCH) == 0
    captured = capsys.readouterr()
    assert f"batch         {batch}" in captured.out
    assert captured.err == ""
    assert not list(user_folder.glob("lightning_logs"))
    line = next(line for line in captured.out.splitlines() if "L.Trainer(" in line)
    callback = eval(line.split("callbacks=[")[1][:-2], {"SSyncCallback": SSyncCallback})
    callback.__init__(attention=callback.adapter.attention, masks=callback.adapter.masks, warmup_steps=0)
    with working_folder_first():
        model = build_model(f"user_code:{host}")
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    video = torch.rand(2, 2, 3, 4, 4)
    data = [{"video": video} if host == "Host" else video] * 2
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=None))
    assert "ssync/merged_slots" in trainer.callback_metrics


def test_json(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("user_code:Host", "--batch", BATCH, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] is True
    assert report["shape"] == [2, 2, 3, 16]
    assert report["places"] == ["softmax:net.binder", "softmax:net.painter"]
    assert report["maps"][1]["parameters"] > 0
    assert report["ssync_seconds"] > 0
    assert "No adapter knows this host" in report["hints"][0]


def test_named_places_and_weights(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with working_folder_first():
        torch.save(build_model("user_code:Host").state_dict(), user_folder / "weights.pt")
    places = "--attention softmax:net.binder --masks softmax:net.painter:1 --grid 2,8 --ckpt_path weights.pt"
    assert doctor("user_code:Host", "--batch", BATCH, *places.split()) == 0
    out = capsys.readouterr().out
    assert "grid 2 x 8" in out
    assert "masks='softmax:net.painter:1', grid=(2, 8)" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["user_code:classifier"], "This model has no slots"),
        (["user_code:tokens"], "No two maps over slots were found"),
        (["user_code:Net", "--init", "detach=true"], "decoder masks of Net to carry gradient"),
        (["user_code:Host", "--init", "automatic=false"], "Use the SSyncRegularizer mixin"),
        (["user_code:Skips"], "gave no loss for this batch"),
    ],
)
def test_models_that_cannot_be_used(
    user_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert doctor(*words, "--batch", BATCH) == 1
    out = capsys.readouterr().out
    assert "SSync cannot be used as it is:" in out
    assert message in " ".join(out.split())


def test_a_host_that_has_ssync_already(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("user_code:Regularized", "--batch", BATCH) == 0
    out = capsys.readouterr().out
    assert "adds SSync itself" in out
    assert out.endswith("ready: nothing to add.\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either a model as package.module:name or --config FILE"),
        (["user_code:Net", "--config", "mine.yaml"], "either a model as package.module:name or --config FILE"),
        (["user_code:Net"], "shape of a batch, but got none. Add e.g. --batch 2,4,3,64,64"),
        (["user_code:Net", "--batch", "2,a"], "--batch as sizes"),
        (["user_code:Net", "--batch", BATCH, "--slots", "3"], "options of ssync-pl doctor, but got --slots 3"),
        (["user_code:Nets", "--batch", BATCH], "no attribute 'Nets'"),
        (["user_code:fails", "--batch", BATCH], "ValueError: no weights"),
        (["user_code:Bare", "--batch", "2,2,3,5,5"], "it raised RuntimeError"),
        (["user_code:Net", "--batch", "2,2,3,5,5"], "it raised RuntimeError: .* [(]user_code.py, line"),
        (["user_code:Host", "--init", "key=img", "--batch", BATCH], "it raised KeyError: 'img' [(]user_code.py, line"),
        (["user_code:Net", "--batch", BATCH, "--call", "lose"], "have a method 'lose', but it has none"),
        (["user_code:Net", "--batch", BATCH, "--attention", "binder"], "`attention` and `masks` to come together"),
        (["user_code:Net", "--batch", BATCH, "--adapter", "savvy"], "`adapter` to be 'auto' or one of"),
        (["user_code:Net", "--batch", BATCH, "--attention", "softmax:", "--masks", "b"], "place as 'path'"),
        (["user_code:Net", "--batch", BATCH, "--ckpt_path", "no.pt"], "checkpoint at 'no.pt'"),
        (["user_code:Net", "--batch", BATCH, "--grid", "4"], "--grid: Expected H,W, but got '4'"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    user_folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert doctor(*words) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_configuration_with_its_data(user_folder: Path, argv: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(user_folder, {"class_path": "SAVi", "init_args": SAVI}, accelerator="gpu", devices=4)
    assert doctor("--config", path) == 0
    out = capsys.readouterr().out
    assert "adapter       savi" in out
    assert "B=2 T=2 S=3 N=64, grid 8 x 8" in out
    assert "callbacks=[SSyncCallback()]" in out
    assert not (user_folder / "runs").exists()


def test_a_configuration_with_options_and_a_batch(
    user_folder: Path, argv: None, capsys: pytest.CaptureFixture[str]
) -> None:
    callbacks = [{"class_path": "SSyncCallback", "init_args": {"adapter": "savi"}}]
    path = write_config(user_folder, {"class_path": "SAVi", "init_args": SAVI}, callbacks=callbacks)
    assert doctor("--config", path, "--model.num_slots", "5", "--batch", "1,3,3,16,16") == 0
    out = capsys.readouterr().out
    assert "B=1 T=3 S=5 N=64" in out
    assert "has an SSyncCallback already" in out
    assert out.endswith("ready: nothing to add.\n")
    assert not (user_folder / "data").exists()


def test_a_configuration_names_the_user_s_own_host(
    user_folder: Path, argv: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(user_folder, {"class_path": "user_code.Host"})
    assert doctor("--config", path, "--batch", BATCH) == 0
    assert "softmax:net.painter" in capsys.readouterr().out


def test_a_configuration_that_is_wrong(user_folder: Path, argv: None, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(user_folder, {"class_path": "SAVi", "init_args": SAVI})
    assert doctor("--config", path, "--model.num_slot", "5") == 2
    assert "num_slot" in capsys.readouterr().err
    assert doctor("--config", str(user_folder / "nothing.yaml")) == 2
    assert "nothing.yaml" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--help") == 0
    assert "exit status: 0 SSync can be used, 1 it cannot as it is" in capsys.readouterr().out
