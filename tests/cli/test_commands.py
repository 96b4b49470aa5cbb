import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from ssync_pl import __version__
from ssync_pl.cli import main
from ssync_pl.cli.trainer import SSyncCLI, run_trainer
from ssync_pl.data import load_shards
from ssync_pl.hosts import SAVi
from tiny_run import TINY_SAVI, write_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli-data")


@pytest.fixture
def config(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    return write_tiny(tmp_path / "tiny.yaml", root)


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_version_and_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ssync-pl {__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "predict", "compare", "doctor", "data", "config", "checkpoint"):
        assert sum(line.startswith(f"  {verb} ") for line in text.splitlines()) == 1
    assert main([]) == 2
    assert main(["fit", "--help"]) == 0
    assert "--trainer.max_steps" in capsys.readouterr().out


def test_python_dash_m_is_the_same_and_its_terminal_may_lack_characters() -> None:
    words = [sys.executable, "-m", "ssync_pl"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "`? config convert`" in done.stdout
    done = subprocess.run([*words, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_light_commands_and_errors_of_spelling_import_no_torch(tmp_path: Path) -> None:
    code = "import sys; from ssync_pl.cli import main\n"
    code += "for verb in ('config', 'data', 'doctor', 'checkpoint', 'compare'): assert main([verb, '--help']) == 0\n"
    code += (
        "assert main(['fit']) == main(['fti']) == main(['compare', '--x']) == main(['predict', '--input', 'a']) == 2\n"
    )
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_package_that_a_logger_lacks_is_one_line(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needy_logger.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\n\nclass Needy(CSVLogger):\n"
        "    def __init__(self, save_dir: str = '.'):\n        import a_module_that_is_not_there\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["fit", "--config", str(config), "--trainer.logger=needy_logger.Needy"]) == 2
    error = capsys.readouterr().err
    assert "a_module_that_is_not_there" in error
    assert "Traceback" not in error


def test_processes_that_are_spawned_get_the_parser(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SSyncCLI, "_run_subcommand", lambda self, verb: None)
    cli = run_trainer(["fit", "--config", str(config)])
    # ddp_spawn pickles the trainer with its callbacks.
    saver = next(one for one in cli.trainer.callbacks if type(one).__name__ == "SaveConfigCallback")
    assert type(pickle.loads(pickle.dumps(saver.parser))) is type(cli.parser)


def test_a_run_writes_a_fresh_folder_and_runs_again_from_what_it_saved(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["SSyncCallback", "SSyncPictures", "ValidationSummary"]
    callbacks = [f"--trainer.callbacks+={name}" for name in names]
    assert main(["fit", "--config", str(config), *callbacks]) == 0
    assert "| this run " in capsys.readouterr().out
    folder = tmp_path / "runs" / "tiny" / "version_0"
    for name in ("metrics.csv", "summary.json", "pictures/step-000002.png"):
        assert (folder / name).is_file(), name
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["name"], saved["seed_everything"]) == ("tiny", 0)
    assert [one["class_path"].rsplit(".", 1)[-1] for one in saved["trainer"]["callbacks"]] == names
    assert main(["fit", "--config", str(folder / "config.yaml")]) == 0
    assert (tmp_path / "runs" / "tiny" / "version_1" / "config.yaml").is_file()
    for verb in ("validate", "test", "predict"):
        assert main([verb, "--config", str(config), "--ckpt_path", str(checkpoint)]) == 0, verb


def test_a_fixed_folder_is_used_again(config: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert main(["fit", "--config", str(config), "--trainer.logger=false"]) == 0
    assert (tmp_path / "runs" / "config.yaml").is_file()


def test_name_and_tensorboard_on_request(config: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert main(["fit", "--config", str(config), "--name=mine", "--trainer.logger=true"]) == 0
    folder = tmp_path / "runs" / "mine" / "version_0"
    assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.num_slots=x"], "num_slots"),
        (["--model.numslots=3"], "Option 'numslots' is not accepted"),
        (["--model.num_slots=0"], "Expected arguments `num_slots`"),
        (["--data.batch_size=0"], "Expected argument `batch_size` to be at least 1, but got 0."),
        (["--trainer.max_steps=abc"], "trainer.max_steps"),
        (["--trainer.callbacks+=SSyncCallbak"], "SSyncCallbak"),
        (
            ["--trainer.callbacks+=SSyncCallback", "--trainer.callbacks.merge_threshold=2"],
            "Expected argument `merge_threshold` to be in [0, 1], but got 2.0.",
        ),
        (["--trainer.max_steps=-1", "--trainer.fast_dev_run=-1"], "fast_dev_run"),
        (["--trainer.callbacks+=SSyncCallback"] * 2, "more than one stateful callback"),
        (
            ["--trainer.callbacks+=SSyncCallback", "--model=lightning.pytorch.demos.boring_classes.BoringModel"],
            "BoringModel is none",
        ),
        (["--config=none.yaml"], "'none.yaml', which is none"),
        (["--config", "tabs.yaml"], "tabs.yaml to hold YAML in UTF-8"),
        (["-c", "wide.yaml"], "wide.yaml to hold YAML in UTF-8"),
        (["--config=empty.yaml"], "empty.yaml to hold keys with values, but got nothing"),
    ],
)
def test_configuration_errors_name_the_key_or_the_file(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    config.with_name("tabs.yaml").write_text("trainer:\n\tmax_steps: 1")
    config.with_name("wide.yaml").write_text("trainer: {max_steps: 1}", encoding="utf-16")
    config.with_name("empty.yaml").touch()
    assert main(["fit", "--config", str(config), *words]) == 2
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    assert "usage:" not in streams.err
    assert any(line.startswith("ssync-pl") for line in streams.err.splitlines())
    assert message in streams.err


def test_what_is_missing_is_named(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit"]) == 2
    assert "Expected --config FILE" in capsys.readouterr().err
    assert main(["fit", "--trainer.max_steps=1"]) == 2
    assert "the following arguments are required" in capsys.readouterr().err


def test_debug_shows_the_traceback(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSYNC_DEBUG", "1")
    assert main(["fit", "--config", str(config), "--model.num_slots=0"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_data_generate_prints_patterns_that_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["data", "generate", "--preset", "a_zoom", "--out", str(tmp_path), "--train", "33", "--validation", "1"]
    args += ["--seed", "4", "--workers", "0"]
    args += [word for change in ("resolution=8", "frames=1", "antialias=1") for word in ("--set", change)]
    assert main([*args, "--set", "zoom=1.25"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["train"].startswith(f"{tmp_path}/")
    from ssync_pl.data.patterns import expand_shards

    for split, count in (("train", 33), ("validation", 1)):
        pattern = lines[split].removesuffix(f" (videos: {count})")
        assert sum(len(entry.samples) for entry in load_shards(expand_shards(pattern))) == count


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "zoo=3"], "got ['zoo']"),
        (["--set", "zoom"], "Expected --set NAME=VALUE"),
        (["--preset", "z"], "['a', 'a_zoom', 'c'"),
        (["--train", "-1"], "Expected --train"),
        (["--train", "0", "--validation", "0"], "to be above 0"),
    ],
)
def test_data_generate_refuses_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["data", "generate", "--out", str(tmp_path / "new"), *words]) == 2
    assert message in last_error(capsys)
    assert not (tmp_path / "new").exists()


def test_config_prints_the_overlay(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "ssync"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["trainer"]["callbacks+"][0]["class_path"] == "ssync_pl.SSyncCallback"
    assert main(["config", "nope"]) == 2
    assert "ssync" in last_error(capsys)


class Foreign(SAVi):
    """A user's own host."""


class Mark(L.Callback):
    """A user's own callback."""


@pytest.mark.parametrize("way", ["overlay", "option"])
def test_a_foreign_project_keeps_its_callbacks(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    monkeypatch.setitem(sys.modules, "foreign", SimpleNamespace(Mark=Mark))
    settings = yaml.safe_load(config.read_text())
    settings["model"] = TINY_SAVI
    settings["data"]["class_path"] = "ssync_pl.data.SyntheticDataModule"
    settings["trainer"] |= {"callbacks": [{"class_path": "foreign.Mark"}], "logger": False}
    config.write_text(yaml.safe_dump(settings))
    words = ["--trainer.callbacks+=ssync_pl.SSyncCallback", "--trainer.callbacks.warmup_ratio=0"]
    if way == "overlay":
        assert main(["config", "ssync"]) == 0
        config.with_name("ssync.yaml").write_text(capsys.readouterr().out)
        words = ["--config", "ssync.yaml"]
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(config), *words])
    cli = LightningCLI(Foreign, subclass_mode_data=True, save_config_callback=None)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]
    assert (names.count("Mark"), names.count("SSyncCallback")) == (1, 1)
    if way == "option":
        assert "ssync/boundary_loss" in cli.trainer.callback_metrics


@pytest.mark.parametrize(
    ("verb", "content"),
    [
        ("predict", b""),
        ("predict", b"PK\x03\x04 cut short"),
        ("validate", {"weight": torch.zeros(1)}),
        ("validate", {"state_dict": {"weight": torch.zeros(1)}, "pytorch-lightning_version": "2.6.0"}),
        ("fit", {"state_dict": SAVi(**TINY_SAVI).state_dict(), "pytorch-lightning_version": "2.6.0"}),
    ],
    ids=["empty", "cut", "state dict", "another model", "weights only"],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(
    config: Path, tmp_path: Path, verb: str, content: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert main([verb, "--config", str(config), "--ckpt_path", str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Expected --ckpt_path to be a whole checkpoint" in lines[-1]


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(parser: Any, words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssync_pl.cli.commands.data", stop)
    assert main(["data", "convert", "videos"]) == 130
    assert capsys.readouterr().err == "\nssync-pl: stopped.\n"


def test_a_run_of_unknown_length_says_what_to_set() -> None:
    from ssync_pl import SSyncConfig
    from ssync_pl.errors import ConfigError
    from ssync_pl.hosts.training import schedule_for
    from ssync_pl.plugin.engine import SSyncEngine

    with pytest.raises(ConfigError, match="max_steps"):
        SSyncEngine(SSyncConfig()).phase_in(SimpleNamespace(estimated_stepping_batches=-1, current_epoch=0))
    with pytest.raises(ConfigError, match="max_steps"):
        schedule_for(-1, warmup_steps=100, decay="exponential")
