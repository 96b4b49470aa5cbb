import os
import pickle
import signal
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from ssync_pl import __version__, cli
from ssync_pl.cli import main, with_config
from ssync_pl.cli.trainer import SSyncCLI, add_predict_options, run_trainer
from ssync_pl.data import load_shards
from ssync_pl.data.patterns import expand_shards
from ssync_pl.errors import ConfigError
from ssync_pl.hosts import SAVi
from tiny_run import TINY_SAVI, write_tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cli-data")


@pytest.fixture
def config(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    return write_tiny(tmp_path / "tiny.yaml", root)


def test_version_and_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ssync-pl"])
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ssync-pl {__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in ("fit", "validate", "test", "predict", "compare", "doctor", "data", "config", "checkpoint", "zoo"):
        assert sum(line.startswith(f"  {verb} ") for line in text.splitlines()) == 1
    assert main([]) == 2
    assert main(["fit", "--help"]) == 0
    assert "--trainer.max_steps" in capsys.readouterr().out


def test_python_dash_m_is_the_same_and_its_terminal_may_lack_characters():
    words = [sys.executable, "-m", "ssync_pl"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "`? config convert`" in done.stdout
    for other in (["nonsense"], ["data", "check", "a\x1b[31m\n\u202e.tar"]):
        done = subprocess.run([*words, *other], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.removeprefix("ssync-pl: loading PyTorch\n").removesuffix("\n").isprintable()
    for redirection, statuses in ((">&-", (0,)), (">&- 2>&-", (0,)), ("| true", (0, 2)), ("> /dev/full", (2,))):
        command = f"set -o pipefail; exec 3>&2; {sys.executable} -m ssync_pl config ssync {redirection}"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert done.returncode in statuses, (redirection, done.stderr)
        assert done.stderr.count("\n") == (redirection == "> /dev/full")


def test_ctrl_c_while_modules_are_imported_is_one_line():
    words = [sys.executable, "-m", "ssync_pl", "data", "check", "a.tar"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "ssync-pl: loading PyTorch\n"
        process.send_signal(signal.SIGINT)
        assert (process.stderr.read(), process.wait()) == ("\nssync-pl: stopped.\n", 130)


def test_light_commands_and_errors_of_spelling_import_no_torch(tmp_path):
    code = "import sys; from ssync_pl.cli import main\n"
    code += (
        "for verb in ('config', 'data', 'doctor', 'checkpoint', 'compare', 'zoo'): assert main([verb, '--help']) == 0\n"
    )
    code += "assert main(['zoo']) == main(['zoo', 'quickstart']) == 0\n"
    code += (
        "assert main(['fit']) == main(['fti']) == main(['compare', '--x']) == main(['predict', '--input', 'a']) == 2\n"
    )
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_processes_that_are_spawned_get_the_parser(config, monkeypatch):
    monkeypatch.setattr(SSyncCLI, "_run_subcommand", lambda self, verb: None)
    cli = run_trainer(["fit", "--config", str(config)])
    # ddp_spawn pickles the trainer with its callbacks.
    saver = next(one for one in cli.trainer.callbacks if type(one).__name__ == "SaveConfigCallback")
    assert type(pickle.loads(pickle.dumps(saver.parser))) is type(cli.parser)


def test_a_run_writes_a_fresh_folder_and_runs_again_from_what_it_saved(config, tmp_path, capsys):
    names = ["SSyncCallback", "SSyncPictures", "ValidationSummary"]
    callbacks = [f"--trainer.callbacks+={name}" for name in names]
    assert main(["fit", "--config", str(config), *callbacks]) == 0
    streams = capsys.readouterr()
    assert "| this run " in streams.out
    lines = [line for line in streams.out.splitlines() if line.startswith("epoch ")]
    assert lines[-1].startswith("epoch 1, step 2 of 2: train/loss 0.")
    assert "Tip:" not in streams.err
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


def test_fixed_folders_names_and_tensorboard_on_request(config, tmp_path):
    for _ in range(2):  # the configuration is replaced
        assert main(["fit", "--config", str(config), "--trainer.logger=false"]) == 0
    (tmp_path / "runs" / "config.yaml").write_text("mine: true")
    assert main(["fit", "--config", str(config), "--trainer.logger=false"]) == 2
    assert (tmp_path / "runs" / "config.yaml").read_text() == "mine: true"
    pytest.importorskip("tensorboard")
    assert main(["fit", "--config", str(config), "--name=mine", "--trainer.logger=true"]) == 0
    assert list((tmp_path / "runs" / "mine" / "version_0").glob("events.out.tfevents.*"))


SSYNC = "--trainer.callbacks+=SSyncCallback"
FIT = ["fit", "--config", "tiny.yaml"]
GENERATE = ["data", "generate", "--out", "new"]
REFUSED = [
    ([*FIT, "--model.num_slots=x"], "num_slots"),
    ([*FIT, "--model.numslots=3"], "Option 'numslots' is not accepted"),
    ([*FIT, "--model.num_slots=0"], "Expected arguments `num_slots`"),
    ([*FIT, "--data.batch_size=0"], "Expected argument `batch_size` to be at least 1, but got 0."),
    ([*FIT, "--trainer.max_steps=abc"], "trainer.max_steps"),
    ([*FIT, "--trainer.callbacks+=SSyncCallbak"], "SSyncCallbak"),
    ([*FIT, SSYNC, "--trainer.callbacks.merge_threshold=2"], "Expected argument `merge_threshold` to be in [0, 1]"),
    ([*FIT, "--trainer.max_steps=-1", "--trainer.fast_dev_run=-1"], "fast_dev_run"),
    ([*FIT, SSYNC, SSYNC], "more than one stateful callback"),
    ([*FIT, SSYNC, "--model=lightning.pytorch.demos.boring_classes.BoringModel"], "BoringModel is none"),
    ([*FIT, "--config=none.yaml"], "'none.yaml', which is none"),
    ([*FIT, "--model.num_slots=100000000000000000000"], "Expected arguments `num_slots`"),
    ([*FIT, "--model.slot_dim=100000000000"], "Expected a configuration that can be built"),
    ([*FIT, "--trainer.default_root_dir=a\0b"], "embedded null"),
    ([*FIT, "--config=twice.yaml"], "'max_steps' is given twice"),
    ([*FIT, "--config=unfolds.yaml"], "unfold to more than"),
    ([*FIT, "--config", "tabs.yaml"], "tabs.yaml to hold YAML in UTF-8"),
    ([*FIT, "-c", "wide.yaml"], "wide.yaml to hold YAML in UTF-8"),
    ([*FIT, "--config=empty.yaml"], "empty.yaml to hold keys with values, but got nothing"),
    (["fit"], "Expected --config FILE"),
    (["fit", "--trainer.max_steps=1"], " required"),
    ([*GENERATE, "--set", "zoo=3"], "got ['zoo']"),
    ([*GENERATE, "--set", "zoom"], "Expected --set NAME=VALUE"),
    ([*GENERATE, "--preset", "z"], "['a', 'a_zoom', 'c'"),
    ([*GENERATE, "--train", "-1"], "Expected --train"),
    ([*GENERATE, "--train", "0", "--validation", "0"], "to be above 0"),
    (["config", "nope"], "ssync"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_errors_name_the_key_or_the_file(config, tmp_path, capsys, words, message):
    config.with_name("tabs.yaml").write_text("trainer:\n\tmax_steps: 1")
    config.with_name("wide.yaml").write_text("trainer: {max_steps: 1}", encoding="utf-16")
    config.with_name("empty.yaml").touch()
    config.with_name("twice.yaml").write_text("trainer:\n  max_steps: 1\n  max_epochs: 2\n  max_steps: 3\n")
    bomb = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    config.with_name("unfolds.yaml").write_text("\n".join(["a0: &a0 x", *bomb]))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert any(line.startswith("ssync-pl") for line in error.splitlines())
    assert message in error
    assert not (tmp_path / "new").exists()


def test_data_generate_prints_patterns_that_load(tmp_path, capsys):
    args = ["data", "generate", "--preset", "a_zoom", "--out", str(tmp_path), "--train", "33", "--validation", "1"]
    args += ["--seed", "4", "--workers", "0"]
    args += [word for change in ("resolution=8", "frames=1", "antialias=1", "zoom=1.25") for word in ("--set", change)]
    assert main(args) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["train"].startswith(f"{tmp_path}/")
    for split, count in (("train", 33), ("validation", 1)):
        pattern = lines[split].removesuffix(f" (videos: {count})")
        assert sum(len(entry.samples) for entry in load_shards(expand_shards(pattern))) == count


class Foreign(SAVi):
    """A user's own host."""


class Mark(L.Callback):
    """A user's own callback."""


@pytest.mark.parametrize("way", ["overlay", "option"])
def test_a_foreign_project_keeps_its_callbacks(config, monkeypatch, capsys, way):
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


VERSION = {"pytorch-lightning_version": "2.6.0"}
CHECKPOINTS = [
    ("predict", b""),
    ("validate", {"weight": torch.zeros(1)}),  # a state dict
    ("validate", {"state_dict": {"weight": torch.zeros(1)}, **VERSION}),  # of another model
    ("fit", {"state_dict": SAVi(**TINY_SAVI).state_dict(), **VERSION}),  # weights only
]


@pytest.mark.parametrize(("verb", "content"), CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_one_line(config, tmp_path, verb, content, capsys):
    path = tmp_path / "bad.ckpt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert main([verb, "--config", str(config), "--ckpt_path", str(path)]) == 2
    assert "Expected --ckpt_path to be a whole checkpoint" in capsys.readouterr().err.strip().splitlines()[-1]


def test_ctrl_c_is_one_line_and_debug_shows_the_traceback(config, monkeypatch, capsys):
    def stop(parser, words):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssync_pl.cli.commands.data", stop)
    assert main(["data", "convert", "videos"]) == 130
    assert capsys.readouterr().err == "\nssync-pl: stopped.\n"
    monkeypatch.setenv("SSYNC_DEBUG", "1")
    assert main([*FIT, "--model.num_slots=0"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_ends_a_training_with_130(config, monkeypatch):
    monkeypatch.setattr(SAVi, "training_step", lambda *_: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["fit", "--config", str(config)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `lightning WORDS...` with lightning-sdk or without; `main` of ssync-pl only says its words."""
    monkeypatch.setattr(cli, "main", lambda words: sys.stdout.write(f"ours {words}") and 5)

    def call(words, sdk):
        ours = SimpleNamespace(dist=SimpleNamespace(name="ssync-pl"), load=None)
        theirs = SimpleNamespace(dist=SimpleNamespace(name="lightning_sdk"), load=lambda: lambda: 7)
        monkeypatch.setattr(metadata, "entry_points", lambda group, name: [ours, *[theirs] * sdk])
        monkeypatch.setattr(sys, "argv", ["lightning", *words])
        return cli.lightning(), capsys.readouterr()

    return call


def test_lightning_trains_with_ours_and_hands_all_else_to_the_sdk(run):
    for words in (["login", "--now"], ["--help"], [], ["run", "fit"]):
        assert run(words, sdk=True)[0] == 7
        assert sys.argv == ["lightning", *words]
    for verb in ("fit", "validate", "test", "predict"):
        status, streams = run([verb, "--config", "x.yaml"], sdk=True)
        assert (status, streams.out) == (5, f"ours ['{verb}', '--config', 'x.yaml']")
    status, streams = run(["login"], sdk=False)
    assert (status, streams.out) == (2, "")
    assert "pip install lightning-sdk" in streams.err
    for words in (["--help"], ["-h"], []):
        status, streams = run(words, sdk=False)
        assert status == 0
        assert "fit,validate,test,predict" in streams.out


def test_the_configuration_beside_the_run(tmp_path, capsys):
    for words in (["fit", "--ckpt_path", "a"], ["predict", "--model=SAVi", "--x=1"], ["validate", "-h"], ["--help"]):
        assert with_config(words) == words
    for words in ([], [f"--ckpt_path={tmp_path / 'a.ckpt'}"]):
        with pytest.raises(ConfigError, match=r"--config FILE, or --ckpt_path .*config\.yaml"):
            with_config(["predict", "--input=a", *words])
    (tmp_path / "config.yaml").write_text("a: 1")
    found = f"--config={tmp_path / 'config.yaml'}"
    for verb, below in (("predict", "checkpoints"), ("validate", ".")):
        words = [verb, "--ckpt_path", str(tmp_path / below / "last.ckpt"), "--input", "a"]
        assert with_config(words) == [verb, found, *words[1:]]
        assert f"configuration: {tmp_path / 'config.yaml'}" in capsys.readouterr().err
        assert with_config([*words, found]) == [*words, found]


def test_inputs_come_several_times_and_stay_whole():
    parser = LightningArgumentParser()
    add_predict_options(parser)
    options = parser.parse_args(["--input", "a.mp4", 'b,"c".mp4', "--clip-frames", "8", "--input=null"])
    assert (options.input, options.clip_frames) == (["a.mp4", 'b,"c".mp4', "null"], 8)
