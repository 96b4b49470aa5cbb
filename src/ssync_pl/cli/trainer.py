"""`ssync-pl fit|validate|test|predict`: LightningCLI with the package's hosts, data and callbacks by short name."""

import importlib.util
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_module

import ssync_pl.data.synthetic_datamodule
import ssync_pl.hosts

# A class can be named without its module once it is imported.
import ssync_pl.plugin.callback
import ssync_pl.rivals.dense_callback
import ssync_pl.tools.pictures
import ssync_pl.tools.summary  # noqa: F401
from ssync_pl.cli import with_config
from ssync_pl.data.files import refuse_foreign
from ssync_pl.errors import ConfigError, SSyncError, require
from ssync_pl.plugin.step_seed import StepSeed
from ssync_pl.tools.doctor.steps import quiet
from ssync_pl.tools.official.checkpoints import public_globals
from ssync_pl.tools.predict.inputs import InputDataModule
from ssync_pl.tools.predict.writer import SlotPredictions
from ssync_pl.tools.progress import EpochLines

# Words are always handed over explicitly here, and nobody can follow hints about Lightning's own code or products.
warnings.filterwarnings("ignore", message=".*(LightningCLI's args parameter|isinstance.treespec, LeafSpec)")
rank_zero_module.log.addFilter(lambda record: "Tip: For seamless" not in record.getMessage())

_ROOT = "runs"


class SSyncArgumentParser(LightningArgumentParser):
    """LightningCLI's parser; an error is its message and where the options are listed, without usage or traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Writes what is wrong with which key, and exits with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        program = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        sys.stderr.write(f"{program}: error: {message.rstrip()}\nSee {program} --help.\n")
        self.exit(2)


class SSyncCLI(LightningCLI):
    """LightningCLI that logs to `runs/<name>/version_<n>`, a fresh folder per run.

    `trainer.logger: null` (default) writes `metrics.csv`, `true` TensorBoard files, `false` nothing; a class path is
    taken as it is. The configuration is saved beside the logs, in the place of none but one that a run saved.
    """

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        text = "Name of the run's folder. Default: that of the first configuration file."
        parser.add_argument("--name", type=str | None, default=None, help=text)
        if subcommand == "predict":
            add_predict_options(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the words and settles the name of the run."""
        super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        if settings.get("name") is None:
            files = settings.get("config") or []
            settings["name"] = Path(str(files[0])).stem if files else self._model()
        if settings.get("return_predictions", False) is None:
            settings["return_predictions"] = False  # Lightning would keep the masks of the whole set in memory

    def _model(self) -> str:
        settings = self.config.get(self.config.get("subcommand") or "") or {}
        return str((settings.get("model") or {}).get("class_path", "")).rsplit(".", 1)[-1]

    def _parse_ckpt_path(self) -> None:
        wanted = self._model()
        super()._parse_ckpt_path()  # a checkpoint that knows its host puts it in the place of the configuration's
        expected = f"--ckpt_path to be a checkpoint of {wanted}, the model of the configuration"
        advice = "Take the configuration that it was trained with: config.yaml in its run's folder."
        require(wanted in ("", self._model()), expected, f"one of {self._model()}", advice=advice)

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer; `predict --input` puts the user's videos into the place of the data."""
        settings = self.config[self.config["subcommand"]]
        companions = ("clip_frames", "backbone_checkpoint")
        given = {name: settings[name] for name in companions if settings.get(name) is not None}
        inputs = settings.get("input")
        require(bool(inputs) or not given, f"--{' and --'.join(given)} only with --input", "no --input")
        super().instantiate_classes()
        if inputs:
            self.datamodule = InputDataModule(self.datamodule, inputs, **given)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds the trainer with the package's own logger and callbacks where the user named none."""
        keys = ("trainer", "name", "input", "out", "merge", "seed_everything")
        settings, name, inputs, out, merge, seed = (self._get(self.config_init, key) for key in keys)
        if settings.get("barebones"):
            return super().instantiate_trainer(**kwargs)
        if settings.get("logger") in (None, True):
            logger = TensorBoardLogger if settings.get("logger") else CSVLogger
            kwargs.setdefault("logger", logger(str(settings.get("default_root_dir") or _ROOT), name=name))
        callbacks = _as_list(settings.get("callbacks"))
        added: list[L.Callback] = []

        def lacks(*kinds: type) -> bool:
            return not any(isinstance(callback, kinds) for callback in callbacks)

        if seed is not False and lacks(StepSeed):
            added.append(StepSeed())
        if settings.get("enable_progress_bar") is not False and lacks(ProgressBar):
            bar = TQDMProgressBar if importlib.util.find_spec("rich") is None else RichProgressBar
            # Each refresh reads numbers off the device, so not in every step.
            added.append(bar(refresh_rate=10) if sys.stdout.isatty() else EpochLines())
        if self.subcommand == "predict":
            if lacks(SlotPredictions, BasePredictionWriter):
                added.append(SlotPredictions(out, merge))
            else:
                expected = "--out and --merge only without a prediction writer in the configuration"
                require(out is merge is None, expected, "both", advice="Set the writer's own options instead.")
            if inputs:
                kwargs = {"devices": 1, "num_nodes": 1, **kwargs}  # the windows of a video go one after the other
        trainer = super().instantiate_trainer(**{"callbacks": [*callbacks, *added], **kwargs})
        if trainer.is_global_zero and trainer.log_dir is not None:
            refuse_foreign(Path(trainer.log_dir) / "config.yaml", "# lightning.pytorch==")
        return trainer

    def after_predict(self) -> None:
        """Says where the predictions are, and of which weights when no checkpoint is named."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SlotPredictions) and self.trainer.is_global_zero:
                sys.stdout.write(f"predictions: {len(callback.written)} videos in {callback.folder}\n")
                if self._get(self.config_init, "ckpt_path") is None:
                    sys.stderr.write("ssync-pl: without --ckpt_path the host has the weights that it starts with.\n")


class _Parts(SSyncCLI):
    """Builds everything, and runs nothing."""

    callbacks: list[Any]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.callbacks = _as_list(self._get(self.config_init, "trainer").get("callbacks"))
        # The configured trainer may need devices that are not here, and would open loggers.
        return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def _run_subcommand(self, subcommand: str) -> None:
        return


def from_configuration(words: list[str]) -> _Parts:
    """Builds `model`, `datamodule` and `callbacks` of a configuration, with `words` as after `ssync-pl fit`."""
    with quiet():
        parts: _Parts = run_trainer(with_config(["fit", *words]), kind=_Parts)
    return parts


def run_trainer(words: list[str], *, kind: Any = SSyncCLI) -> Any:
    """Parses the words, builds host, data and trainer, runs the verb, and returns the LightningCLI."""
    try:
        with public_globals():  # public checkpoints can be named by --ckpt_path as they are
            return kind(
                L.LightningModule,
                L.LightningDataModule,
                args=words,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                trainer_defaults={"default_root_dir": _ROOT},
                save_config_kwargs={"overwrite": True},
                parser_class=SSyncArgumentParser,
                parser_kwargs={"prog": "ssync-pl"},
            )
    except Exception as error:
        # Lightning's own errors have no class of their own, but a place.
        frames = traceback.extract_tb(error.__traceback__)
        places = {name for frame in frames for name in (Path(frame.filename).name, frame.name)}
        if isinstance(error, SSyncError):
            raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(".")
        if {"callback_connector.py", "seed_everything"} & places:
            raise ConfigError(str(error)) from error
        odd = isinstance(error, ValueError | TypeError | RuntimeError | OverflowError | MemoryError)
        if odd and "instantiate_classes" in places:
            advice = "Correct it; with SSYNC_DEBUG=1 in the environment the traceback is shown."
            raise ConfigError(f"Expected a configuration that can be built, but got {text}. {advice}") from error
        if {"checkpoint_connector.py", "_parse_ckpt_path"} & places:
            raise ConfigError(
                f"Expected --ckpt_path to be a whole checkpoint of this model, but reading it failed: {text}. Take one "
                "that `fit` wrote; a public one, or weights alone, goes through `ssync-pl checkpoint convert`."
            ) from error
        raise


def _as_list(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def add_predict_options(parser: Any) -> None:
    """Adds `--out`, `--input` and its companions to the parser of `predict`."""
    add = parser.add_argument
    add("--input", nargs="+", action="extend", type=str, help="Video files, folders of frames or of videos, shards.")
    add("--out", type=str | None, help="Folder of the predictions. Default: predictions in the run's log folder.")
    add("--merge", nargs="?", const=0.7, type=float | None, help="Give redundant slots (overlap above 0.7) one label.")
    add("--clip_frames", "--clip-frames", type=int | None, help="Most frames at once (64). Only with --input.")
    text = "Weights of the cached features' backbone, where they are not published ones. Only with --input."
    add("--backbone_checkpoint", "--backbone-checkpoint", type=str | None, help=text)
