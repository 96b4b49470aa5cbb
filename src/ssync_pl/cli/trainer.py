"""`ssync-pl fit|validate|test|predict`: LightningCLI with the package's hosts, data and callbacks by short name."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
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
from ssync_pl.cli.checkpoint_errors import bad_checkpoint, other_checkpoint
from ssync_pl.cli.predict_words import INPUT_OPTIONS, describe_windows, gather_inputs, refuse_alone, with_config
from ssync_pl.cli.progress import progress_bar
from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.plugin.step_seed import StepSeed
from ssync_pl.tools.official.checkpoints import public_globals
from ssync_pl.tools.predict.datamodule import CarrySlots, InputDataModule, carries_slots
from ssync_pl.tools.predict.writer import SlotPredictions

__all__ = ["SSyncArgumentParser", "SSyncCLI", "run_trainer"]

_DEFAULT_ROOT = "runs"


class SSyncArgumentParser(LightningArgumentParser):
    """LightningCLI's parser; an error is its message and where the options are listed, without usage or traceback."""

    debug = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Write what is wrong with which key, and exit with status 2."""
        if self.debug or not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{program}: error: {message.rstrip()}\nSee {program} --help.\n")
        self.exit(2)


class SSyncCLI(LightningCLI):
    """LightningCLI that logs to `runs/<name>/version_<n>`, a fresh folder a run.

    * `trainer.logger: null` (default) writes `metrics.csv`; `true` writes TensorBoard files where tensorboard is
      installed; `false` logs nothing; a class path is taken as it is.
    * `name` defaults to the name of the first configuration file, or to the model's class.
    * The configuration of the run is saved beside its logs, and replaced if a fixed folder is used again.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--name`."""
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Folder of the run below trainer.default_root_dir. Default: the first configuration file's name.",
        )

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            for option in INPUT_OPTIONS:
                parser.add_argument(f"--{option.name}", type=option.kind, default=option.default, help=option.help)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words and settle the name of the run."""
        with warnings.catch_warnings():
            # Words are always handed over explicitly here, so that the warning about sys.argv is noise.
            warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
            super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        if settings.get("name") is None:
            settings["name"] = _run_name(settings)
        if self.config["subcommand"] == "predict" and settings.get("return_predictions") is None:
            settings["return_predictions"] = False  # Lightning would keep the masks of the whole set in memory

    def _parse_ckpt_path(self) -> None:
        settings = self.config.get(self.config.get("subcommand") or "") or {}
        wanted = _class_name(settings)
        super()._parse_ckpt_path()  # a checkpoint that knows its host puts it in the place of the configuration's
        if settings.get("input"):
            found = _class_name(self.config[self.config["subcommand"]])
            if wanted != found:
                raise ConfigError(
                    f"Expected --ckpt_path to be a checkpoint of {wanted}, the model of the configuration, but it is "
                    f"one of {found}. Take the configuration that it was trained with: config.yaml in its run's folder."
                )

    def instantiate_classes(self) -> None:
        """Build model, data and trainer."""
        try:
            super().instantiate_classes()
            if self._inputs():
                options = self.config_init["predict"]
                self.datamodule = InputDataModule(
                    self.datamodule,
                    self._inputs(),
                    options.get("clip_frames"),
                    options.get("projection"),
                    options.get("backbone_checkpoint"),
                )
        except (ValueError, TypeError) as error:
            refused = _refusal(error)
            if refused is None:
                raise
            raise refused from None

    def _inputs(self) -> list[str]:
        return (self._get(self.config_init, "input") or []) if self.subcommand == "predict" else []

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with the package's own logger and callbacks where the user named none."""
        trainer_config = self._get(self.config_init, "trainer")
        if not trainer_config.get("barebones"):
            name = self._get(self.config_init, "name")
            kwargs.setdefault("logger", _logger(trainer_config, name))
            callbacks = trainer_config.get("callbacks") or []
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
            added: list[L.Callback] = []
            if self._get(self.config_init, "seed_everything") is not False and not any(
                isinstance(callback, StepSeed) for callback in callbacks
            ):
                added.append(StepSeed())
            if not has_bar and trainer_config.get("enable_progress_bar") is not False:
                added.append(progress_bar())
            writers = (SlotPredictions, BasePredictionWriter)
            has_writer = any(isinstance(callback, writers) for callback in callbacks)
            if self.subcommand == "predict":
                refuse_alone(self.config_init["predict"], has_writer)
                if not has_writer:
                    out = self.config_init["predict"].get("out")
                    # Users' videos are larger than those that hosts are trained on.
                    added.append(
                        SlotPredictions(out, label_pngs=True, cell=480) if self._inputs() else SlotPredictions()
                    )
            if self._inputs():
                added.append(CarrySlots())
                kwargs.setdefault("devices", 1)  # the windows of a video go one after the other
                kwargs.setdefault("num_nodes", 1)
            if added:
                kwargs.setdefault("callbacks", [*callbacks, *added])
        return super().instantiate_trainer(**kwargs)

    def before_predict(self) -> None:
        """Say so when no checkpoint is named: weights that were never trained predict without any complaint."""
        if self._get(self.config_init, "ckpt_path") is None and self.trainer.is_global_zero:
            sys.stderr.write("ssync-pl: without --ckpt_path the host predicts with the weights that it starts with.\n")

    def after_predict(self) -> None:
        """Say where the predictions are."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SlotPredictions) and callback.folder and self.trainer.is_global_zero:
                if self._inputs():
                    sys.stdout.write(describe_windows(callback.written, carries_slots(self.model)))
                sys.stdout.write(f"predictions: {callback.total} videos in {callback.folder}\n")


def _class_name(settings: Any) -> str:
    return str((settings.get("model") or {}).get("class_path", "")).rsplit(".", 1)[-1]


def _refusal(error: BaseException | None) -> SSyncError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, SSyncError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _run_name(settings: Any) -> str:
    files = settings.get("config") or []
    if files:
        return Path(str(files[0])).stem
    return str(settings["model"]["class_path"]).rsplit(".", 1)[-1]


def _logger(trainer_config: dict[str, Any], name: str) -> Any:
    logger = trainer_config.get("logger")
    if logger is not None and logger is not True:
        return logger
    root = str(trainer_config.get("default_root_dir") or _DEFAULT_ROOT)
    if logger is True:
        try:
            return TensorBoardLogger(root, name=name)
        except ModuleNotFoundError:
            sys.stderr.write("ssync-pl: tensorboard is not installed, so metrics go to metrics.csv.\n")
    return CSVLogger(root, name=name)


def run_trainer(args: list[str], *, debug: bool = False) -> SSyncCLI:
    """Parse the words, build host, data and trainer, and run the verb."""
    args = with_config(gather_inputs(args))
    parser_class = type("SSyncArgumentParser", (SSyncArgumentParser,), {"debug": debug})
    try:
        with public_globals():  # public checkpoints can be named by --ckpt_path as they are
            return SSyncCLI(
                L.LightningModule,
                L.LightningDataModule,
                args=args,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                trainer_defaults={"default_root_dir": _DEFAULT_ROOT},
                save_config_kwargs={"overwrite": True},
                parser_class=parser_class,
                parser_kwargs={"prog": "ssync-pl"},
            )
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    except (EOFError, UnpicklingError) as error:
        raise bad_checkpoint(error) from error
    except KeyError as error:
        if "pytorch-lightning_version" in str(error):
            raise ConfigError(
                "Expected --ckpt_path to be a checkpoint of Lightning, but it is a state dict alone. A public one goes "
                "through `ssync-pl checkpoint convert`."
            ) from error
        if "optimizer state" not in str(error):
            raise
        raise ConfigError(
            "Expected --ckpt_path to hold the state of the optimizer, with which `fit` goes on, but it holds weights "
            "only. Take a checkpoint of a training: one of `ssync-pl checkpoint convert` is for validate, test and "
            "predict, and for `load_from_checkpoint`."
        ) from error
    except RuntimeError as error:
        if "PytorchStreamReader" in str(error):
            raise bad_checkpoint(error) from error
        if "loading state_dict" in str(error):
            raise other_checkpoint(error) from error
        if "more than one stateful callback" not in str(error):
            raise
        raise ConfigError(f"{error} The callback is in the configuration already: leave one of them out.") from error
