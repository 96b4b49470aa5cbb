"""`ssync-pl fit|validate|test|predict`: LightningCLI with the package's hosts, data and callbacks by short name."""

from __future__ import annotations

import importlib.util
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import ssync_pl.data.synthetic_datamodule
import ssync_pl.hosts

# A class can be named without its module once it is imported.
import ssync_pl.plugin.callback
import ssync_pl.rivals.dense_callback
import ssync_pl.tools.pictures
import ssync_pl.tools.summary  # noqa: F401
from ssync_pl.cli.predict import add_input_options, describe_windows, refuse_alone, with_config
from ssync_pl.compare.configs import read_yaml
from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.plugin.step_seed import StepSeed
from ssync_pl.tools.doctor.steps import quiet
from ssync_pl.tools.official.checkpoints import public_globals
from ssync_pl.tools.predict.datamodule import InputDataModule, carries_slots
from ssync_pl.tools.predict.writer import SlotPredictions

__all__ = ["Configured", "SSyncArgumentParser", "SSyncCLI", "from_configuration", "run_trainer"]

_ROOT = "runs"


class SSyncArgumentParser(LightningArgumentParser):
    """LightningCLI's parser; an error is its message and where the options are listed, without usage or traceback."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Writes what is wrong with which key, and exits with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{program}: error: {message.rstrip()}\nSee {program} --help.\n")
        self.exit(2)


class SSyncCLI(LightningCLI):
    """LightningCLI that logs to `runs/<name>/version_<n>`, a fresh folder per run.

    * `trainer.logger: null` (default) writes `metrics.csv`; `true` writes TensorBoard files where tensorboard is
      installed; `false` logs nothing; a class path is taken as it is.
    * `name` defaults to the name of the first configuration file, or to the model's class.
    * The configuration of the run is saved beside its logs, and replaced if a fixed folder is used again.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--name`."""
        text = "Folder of the run below trainer.default_root_dir. Default: the first configuration file's name."
        parser.add_argument("--name", type=str | None, default=None, help=text)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            add_input_options(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the words and settles the name of the run."""
        with warnings.catch_warnings():
            # Words are always handed over explicitly here, so that the warning about sys.argv is noise.
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
            super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        if settings.get("name") is None:
            files = settings.get("config") or []
            settings["name"] = Path(str(files[0])).stem if files else self._model()
        if self.config["subcommand"] == "predict" and settings.get("return_predictions") is None:
            settings["return_predictions"] = False  # Lightning would keep the masks of the whole set in memory

    def _model(self) -> str:
        """Returns the class name of the model that is to be built."""
        settings = self.config.get(self.config.get("subcommand") or "") or {}
        return str((settings.get("model") or {}).get("class_path", "")).rsplit(".", 1)[-1]

    def _parse_ckpt_path(self) -> None:
        wanted = self._model()
        super()._parse_ckpt_path()  # a checkpoint that knows its host puts it in the place of the configuration's
        if wanted and wanted != self._model():
            raise ConfigError(
                f"Expected --ckpt_path to be a checkpoint of {wanted}, the model of the configuration, but it is one "
                f"of {self._model()}. Take the configuration that it was trained with: config.yaml in its run's folder."
            )

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer; what their classes refuse is an error of the configuration."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ModuleNotFoundError) as error:
            reason: BaseException | None = error
            while reason is not None and not isinstance(reason, SSyncError | ModuleNotFoundError):
                reason = reason.__cause__ or reason.__context__
            if reason is None:
                raise
            if isinstance(reason, SSyncError):
                raise reason from None
            text = " ".join(str(reason).split())
            raise ConfigError(
                f"Expected the packages of the configuration's classes, but one is missing ({text}). Install it with "
                "pip, or take another class."
            ) from error
        if self._inputs():
            names = ("clip_frames", "projection", "backbone_checkpoint")
            options = (self.config_init["predict"].get(name) for name in names)
            self.datamodule = InputDataModule(self.datamodule, self._inputs(), *options)

    def _inputs(self) -> list[str]:
        return (self._get(self.config_init, "input") or []) if self.subcommand == "predict" else []

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Builds the trainer with the package's own logger and callbacks where the user named none."""
        settings = self._get(self.config_init, "trainer")
        if settings.get("barebones"):
            return super().instantiate_trainer(**kwargs)
        kwargs.setdefault("logger", _logger(settings, self._get(self.config_init, "name")))
        callbacks = _as_list(settings.get("callbacks"))
        added: list[L.Callback] = []

        def has(*kinds: type) -> bool:
            return any(isinstance(callback, kinds) for callback in callbacks)

        if self._get(self.config_init, "seed_everything") is not False and not has(StepSeed):
            added.append(StepSeed())
        if settings.get("enable_progress_bar") is not False and not has(ProgressBar):
            # Each refresh reads numbers off the device, so not in every step.
            bar = TQDMProgressBar if importlib.util.find_spec("rich") is None else RichProgressBar
            added.append(bar(refresh_rate=10))
        if self.subcommand == "predict":
            has_writer = has(SlotPredictions, BasePredictionWriter)
            refuse_alone(self.config_init["predict"], has_writer)
            if not has_writer:
                out = self.config_init["predict"].get("out")
                # Users' videos are larger than those that hosts are trained on.
                own = SlotPredictions(out, label_pngs=True, cell=480) if self._inputs() else SlotPredictions()
                added.append(own)
        if self._inputs():
            kwargs.setdefault("devices", 1)  # the windows of a video go one after the other
            kwargs.setdefault("num_nodes", 1)
        if added:
            kwargs.setdefault("callbacks", [*callbacks, *added])
        return super().instantiate_trainer(**kwargs)

    def before_predict(self) -> None:
        """Says so when no checkpoint is named: weights that were never trained predict without any complaint."""
        if self._get(self.config_init, "ckpt_path") is None and self.trainer.is_global_zero:
            sys.stderr.write("ssync-pl: without --ckpt_path the host predicts with the weights that it starts with.\n")

    def after_predict(self) -> None:
        """Says where the predictions are."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SlotPredictions) and callback.folder and self.trainer.is_global_zero:
                if self._inputs():
                    sys.stdout.write(describe_windows(callback.written, carries_slots(self.model)))
                sys.stdout.write(f"predictions: {len(callback.written)} videos in {callback.folder}\n")


class Configured(NamedTuple):
    """What a configuration makes."""

    host: L.LightningModule
    data: L.LightningDataModule | None
    callbacks: list[Any]


class _Parts(SSyncCLI):
    """Builds everything, and runs nothing."""

    found: list[Any]

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.found = _as_list(self._get(self.config_init, "trainer").get("callbacks"))
        # The configured trainer may need devices that are not here, and would open loggers.
        return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def _run_subcommand(self, subcommand: str) -> None:
        return


def from_configuration(words: list[str]) -> Configured:
    """Builds what a configuration names, with `words` as after `ssync-pl fit`, and runs nothing."""
    with quiet():
        cli = run_trainer(["fit", *words], kind=_Parts)
    return Configured(cli.model, cli.datamodule, cli.found)


def run_trainer(args: list[str], *, debug: bool = False, kind: Any = SSyncCLI) -> Any:
    """Parses the words, builds host, data and trainer, runs the verb, and returns the LightningCLI."""
    words = with_config(args)
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, path = word.partition("=")
        if option in ("--config", "-c") and (equals or following):
            read_yaml(path if equals else following)  # jsonargparse refuses a bad file without its name
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
                parser_class=LightningArgumentParser if debug else SSyncArgumentParser,
                parser_kwargs={"prog": "ssync-pl"},
            )
    except Exception as error:
        explained = None if isinstance(error, SSyncError) else _explained(error)
        if explained is None:
            raise
        raise ConfigError(explained) from error


def _explained(error: Exception) -> str | None:
    """Says what Lightning could not do with a configuration, a checkpoint or callbacks, by where it failed."""
    places = {(Path(frame.filename).name, frame.name) for frame in traceback.extract_tb(error.__traceback__)}
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300].rstrip(".")
    if any(file == "checkpoint_connector.py" or function == "_parse_ckpt_path" for file, function in places):
        return (
            f"Expected --ckpt_path to be a whole checkpoint of this model, but reading it failed: {text}. Take one "
            "that `fit` wrote with this configuration; a public one, or a state dict alone, goes through `ssync-pl "
            "checkpoint convert` and is for validate, test and predict."
        )
    if isinstance(error, MisconfigurationException) or any(file == "callback_connector.py" for file, _ in places):
        return str(error)
    return None


def _as_list(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _logger(settings: dict[str, Any], name: str) -> Any:
    logger, root = settings.get("logger"), str(settings.get("default_root_dir") or _ROOT)
    if logger is not None and logger is not True:
        return logger
    if logger is True and importlib.util.find_spec("tensorboard") is not None:
        return TensorBoardLogger(root, name=name)
    if logger is True:
        sys.stderr.write("ssync-pl: tensorboard is not installed, so metrics go to metrics.csv.\n")
    return CSVLogger(root, name=name)
