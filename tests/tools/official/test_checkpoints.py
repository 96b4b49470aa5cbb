import hashlib
import pathlib
import re
import shlex
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from flaky_server import FlakyServer

from ssync_pl.cli import main
from ssync_pl.data.shards import ShardWriter
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import SlotContrast
from ssync_pl.tools.official.checkpoints import convert_checkpoint, public_globals, read_checkpoint

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(VERSION < (2, 6), reason="older PyTorch cannot be told that a Path is harmless")


@pytest.fixture(scope="module")
def state():
    """Weights of the public SRL."""
    with np.load(Path(__file__).parents[2] / "hosts" / "recorded" / "srl.npz", allow_pickle=False) as file:
        return {key[6:]: torch.from_numpy(file[key]) for key in file.files if key.startswith("state/")}


def old_file(path, state):
    """A file as a Lightning of the time wrote it: the folder of the checkpoints is a Path."""
    content = {"epoch": 3, "global_step": 100_000, "pytorch-lightning_version": "1.8.6", "state_dict": state}
    callbacks = {"ModelCheckpoint": {"dirpath": pathlib.Path("/home/me/logs"), "best_model_score": None}}
    torch.save(content | {"callbacks": callbacks, "optimizer_states": []}, path)
    return path


def test_files_are_read_without_running_anything_in_them(tmp_path, state):
    allowed = torch.serialization.get_safe_globals()
    old = old_file(tmp_path / "old.ckpt", state)
    torch.save(state, tmp_path / "bare.pth")
    pytest.importorskip("safetensors.torch").save_file(state, tmp_path / "a.safetensors")
    for path, steps in ((old, (3, 100_000)), (tmp_path / "bare.pth", (0, 0)), (tmp_path / "a.safetensors", (0, 0))):
        public = read_checkpoint(path)
        assert (public["epoch"], public["global_step"]) == steps
        assert public["state_dict"].keys() == state.keys()
        assert all(torch.equal(public["state_dict"][name], tensor) for name, tensor in state.items())
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    with public_globals():
        assert torch.load(old, weights_only=True)["global_step"] == 100_000
    with pytest.raises(Exception, match="pathlib"):  # the allowance ends with its block
        torch.load(old, weights_only=True)


DAMAGED = [
    ({"state_dict": {"a": torch.ones(1)}, "module": torch.nn.Linear(1, 1)}, "plain values only.*none is read"),
    ({"state_dict": {"a": 3, "b": torch.ones(1)}}, "tensors by name, but got a"),
    ([torch.ones(1)], "hold a state dict, but got list"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED)
def test_damaged_and_strange_files_are_refused(tmp_path, content, message):
    path = tmp_path / "a.ckpt"
    torch.save(content, path)
    with pytest.raises(ConfigError, match=message):
        convert_checkpoint(path, tmp_path / "ours.ckpt")
    assert not (tmp_path / "ours.ckpt").exists()


def test_a_converted_file_holds_what_the_host_needs(tmp_path, capsys, state):
    out = tmp_path / "out" / "ours.ckpt"
    words = ["checkpoint", "convert", str(old_file(tmp_path / "old.ckpt", state)), str(out)]
    assert main(words) == 0
    assert "left out: projector2.projector.weight" in capsys.readouterr().err
    content = torch.load(out, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 100_000)
    assert content["state_dict"].keys() == {name for name in state if not name.startswith("projector")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in content["state_dict"].items())
    out.write_bytes(b"mine")
    assert main(words) == 2
    assert "which exists" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["slotcontrast", "ssync", "videosaur", "dinosaur"])
def test_converted_configurations_parse(tmp_path, capsys, public, name):
    out = tmp_path / "ours.yaml"
    assert main(["config", "convert", str(public(name)), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["fit", "--config", str(out), "--print_config"]) == 0
    parsed = yaml.safe_load(capsys.readouterr().out)
    ours = yaml.safe_load(out.read_text("utf-8"))
    for part in ("model", "data"):
        options = parsed[part]["init_args"] | parsed[part].get("dict_kwargs", {})
        assert {key: options[key] for key in ours[part]["init_args"]} == ours[part]["init_args"]
    callbacks = [entry["class_path"].rpartition(".")[2] for entry in parsed["trainer"]["callbacks"]]
    assert callbacks == [entry["class_path"] for entry in ours["trainer"]["callbacks"]]


def test_config_convert_prints_lists_and_replaces_nothing_unasked(tmp_path, capsys, public):
    path, out = str(public("ssync")), tmp_path / "ours.yaml"
    assert main(["config", "convert", path, "--set", "globals.SLOTS=5", "--data-root", "sets"]) == 0
    printed = capsys.readouterr()
    config = yaml.safe_load(printed.out)
    assert config["model"]["init_args"]["num_slots"] == 5
    assert config["data"]["init_args"]["train"].startswith("sets/movi/")
    assert printed.err == "not converted: model.visualize: the callback SSyncPictures draws pictures\n"
    out.write_text("mine")
    assert main(["config", "convert", path, "--out", str(out)]) == 2
    assert "which exists" in capsys.readouterr().err
    assert out.read_text() == "mine"


@pytest.fixture
def run(tmp_path, public):
    """A small run on shards: a public configuration with a ViT, converted."""
    pytest.importorskip("timm")
    for split, frames in (("train", 8), ("validation", 3)):
        with ShardWriter(tmp_path / "movi", f"movi-{split}") as writer:
            for number in range(2):
                ids = np.zeros((frames, 32, 32, 1), np.uint8)
                ids[:, 4:20, 4:20], ids[:, 22:, 10:] = 1, 2
                video = np.random.default_rng(number).integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)
                writer.write(str(number), {"video.npy": video, "segmentations.npy": ids})
    changes = [
        *("globals.VIT=test_vit", "globals.FEATURES=64", "globals.PATCHES=4", "globals.SLOTS=3", "globals.BATCH=2"),
        *("model.encoder.backbone.features=vit_block2", "model.encoder.backbone.pretrained=false"),
        *(f"dataset.{part}_pipeline.transforms.input_size=32" for part in ("train", "val")),
        *("dataset.train_shards=movi/movi-train-000000.tar", "dataset.num_workers=0", "dataset.num_val_workers=0"),
        *("trainer.max_steps=2", "trainer.val_check_interval=1", "trainer.log_every_n_steps=1"),
    ]
    official, config = public("ssync", *changes), tmp_path / "ours.yaml"
    assert main(["config", "convert", str(official), "--out", str(config), "--data-root", str(tmp_path)]) == 0

    def start(verb, *words):
        quiet = ["--trainer.accelerator=cpu", "--trainer.precision=32", "--trainer.enable_progress_bar=false"]
        root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
        return main([verb, "--config", str(config), *words, *quiet, root])

    return start, config


def published(config):
    """Weights as a public checkpoint of the converted configuration has them."""
    torch.manual_seed(3)
    model = SlotContrast(**yaml.safe_load(config.read_text("utf-8"))["model"]["init_args"])
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("fingerprint")}
    backbone = model.encoder.module.backbone.model
    return state | {
        f"encoder.module.backbone.model.{key}": value + 0.01 for key, value in backbone.state_dict().items()
    }


def test_a_converted_configuration_trains_and_checkpoints_validate_alike(run, tmp_path, capsys):
    start, config = run
    state = published(config)
    public, ours = old_file(tmp_path / "public.ckpt", state), tmp_path / "converted.ckpt"
    assert main(["checkpoint", "convert", str(public), str(ours)]) == 0
    alone, shard = tmp_path / "alone" / "a.ckpt", tmp_path / "movi" / "movi-validation-000000.tar"
    assert main(["checkpoint", "convert", str(public), str(alone), "--config", str(config)]) == 0
    words = ["--ckpt_path", str(alone), "--input", str(shard), "--out", str(tmp_path / "seen")]
    assert main(["predict", *words, "--trainer.accelerator=cpu"]) == 0
    assert (tmp_path / "seen" / "index.json").is_file()
    for other, message in ((config, "no config.yaml in OUT's folder"), (tmp_path / "ssync.yaml", "config convert")):
        capsys.readouterr()
        assert main(["checkpoint", "convert", str(public), str(alone.with_stem("b")), "--config", str(other)]) == 2
        assert message in capsys.readouterr().err
    assert start("fit") == 0
    (last,) = config.parent.rglob("last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 2
    scores = []
    for path in (public, ours):
        capsys.readouterr()
        assert start("validate", "--ckpt_path", str(path)) == 0
        scores.append([line for line in capsys.readouterr().out.splitlines() if "val/" in line])
    assert len(scores[0]) >= 8
    assert scores[0] == scores[1]
    torch.save(state, tmp_path / "bare.ckpt")
    further = old_file(tmp_path / "srl.ckpt", state | {"projector.projector.weight": torch.ones(1)})
    wrong = {name: tensor[..., :1] if "slots" in name else tensor for name, tensor in state.items()}
    refused = {
        ("fit", ours): "to be a whole checkpoint",
        ("validate", tmp_path / "bare.ckpt"): "to be a whole checkpoint",
        ("validate", further): "ssync-pl checkpoint convert",
        ("validate", old_file(tmp_path / "wrong.ckpt", wrong)): "initializer.slots",
    }
    for (verb, path), message in refused.items():
        assert start(verb, "--ckpt_path", str(path)) == 2
        assert message in capsys.readouterr().err


def test_the_zoo_lists_and_shows_what_can_be_found_where_it_says(tmp_path, capsys):
    root = Path(__file__).parents[3]
    entries = yaml.safe_load((resources.files("ssync_pl") / "configs" / "zoo.yaml").read_text("utf-8"))
    assert main(["zoo"]) == 0
    table = capsys.readouterr().out
    for name, entry in entries.items():
        row = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert main(["zoo", name]) == 0
        shown = capsys.readouterr().out
        assert all(text in part for text in map(str, entry["scores"].values()) for part in (row, shown))
        assert entry["source"].startswith("https://") or (root / entry["source"].partition("#")[0]).is_file()
        assert all((root / path).is_file() for path in re.findall(r"examples/\S+\.yaml", shown))
        if "files" in entry:
            config, checkpoint = (entry["files"][f".official.{kind}"] for kind in ("yaml", "ckpt"))
            assert re.fullmatch("[0-9a-f]{64}", config["sha256"])
            assert all(
                one["address"].startswith("https://") and one["address"] in shown for one in (config, checkpoint)
            )
    scores = [f"{entries['quickstart']['scores'][metric] / 100:.3f}" for metric in ("FG-ARI", "mBO")]
    found = re.search(
        r"^\| decoder, with SSync \| ([\d.]+) .*\| ([\d.]+) ", (root / "README.md").read_text("utf-8"), re.M
    )
    assert [*found.groups()] == scores
    for words in (["nonsense"], ["quickstart", "--fetch", str(tmp_path / "a")], ["--fetch", str(tmp_path / "a")]):
        assert main(["zoo", *words]) == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture
def server(tmp_path):
    server = FlakyServer(tmp_path)
    yield server
    server.close()


def test_what_the_zoo_says_to_type_works(run, tmp_path, capsys, monkeypatch, server):
    old_file(tmp_path / "theirs.ckpt", published(run[1]))
    config = {"address": f"{server.url}/ssync.yaml"}
    config["sha256"] = hashlib.sha256((tmp_path / "ssync.yaml").read_bytes()).hexdigest()
    files = {".official.yaml": config, ".official.ckpt": {"address": f"{server.url}/theirs.ckpt"}}
    entry = {"model": "a", "data": "b", "scores": {"FG-ARI": 1.0, "mBO": 2.0}, "files": files}
    listed, work = tmp_path / "configs" / "zoo.yaml", tmp_path / "work"
    for folder in (listed.parent, work):
        folder.mkdir()
    listed.write_text(yaml.safe_dump({"tiny": entry}))
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    monkeypatch.chdir(work)
    assert main(["zoo", "tiny"]) == 0
    fetch, *commands = re.findall(r"^  ssync-pl (.*)$", capsys.readouterr().out, re.M)
    server.script = [("whole",), ("cut", 5000)]
    for command in (fetch, *commands):
        words = shlex.split(command.replace("SHARDS", str(tmp_path)))
        assert main([*words, *["--trainer.accelerator=cpu"] * (words[0] == "validate")]) == 0
    assert "val/" in capsys.readouterr().out
    theirs = work / "zoo" / "tiny.official.ckpt"
    assert theirs.read_bytes() == (tmp_path / "theirs.ckpt").read_bytes()
    theirs.write_bytes(b"mine")
    assert main(shlex.split(fetch)) == 0
    assert capsys.readouterr().out.count("left alone") == 2
    assert main(["zoo", "tiny", "--fetch", str(theirs)]) == 2
    assert "Choose another folder" in capsys.readouterr().err
    assert theirs.read_bytes() == b"mine"

    def refused(message, **changes):
        listed.write_text(
            yaml.safe_dump({"tiny": {**entry, "files": {".official.ckpt": files[".official.ckpt"] | changes}}})
        )
        assert main(["zoo", "tiny", "--fetch", "other"]) == 2
        assert message in capsys.readouterr().err
        assert not list((work / "other").iterdir())

    refused("sha256", sha256=64 * "0")
    refused("Open the address in a browser", address=config["address"])
    refused("there is no such file", address=f"{server.url}/absent.ckpt")
    refused("Connect to the internet", address="http://127.0.0.1:9/a.ckpt")
