"""`ssync-pl fit|validate|test|predict`: LightningCLI with the package's hosts, data and callbacks by short name."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as L
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import ssync_pl.data.synthetic_datamodule
import ssync_pl.hosts

# A class can be named without its module once it is imported.
import ssync_pl.plugin.callback
import ssync_pl.rivals.dense_callback
import ssync_pl.tools.pictures
import ssync_pl.tools.summary  # noqa: F401
from ssync_pl.cli.predict import add_input_options, describe_windows, refuse_alone, with_config
from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.plugin.step_seed import StepSeed
from ssync_pl.tools.doctor.steps import quiet
from ssync_pl.tools.official.checkpoints import public_globals
from ssync_pl.tools.predict.datamodule import CarrySlots, InputDataModule, carries_slots
from ssync_pl.tools.predict.writer import SlotPredictions

__all__ = ["Configured", "SSyncArgumentParser", "SSyncCLI", "from_configuration", "progress_bar", "run_trainer"]

_ROOT = "runs"
_SHORT = {"train/loss": "loss", "ssync/boundary_loss": "boundary", "ssync/interior_loss": "interior"}
# Words of an error of Lightning or PyTorch, and what to say instead; {} takes its text.
_EXPLAINED = {
    "pytorch-lightning_version": "Expected --ckpt_path to be a checkpoint of Lightning, but it is a state dict alone. "
    "A public one goes through `ssync-pl checkpoint convert`.",
    "optimizer state": "Expected --ckpt_path to hold the state of the optimizer, with which `fit` goes on, but it "
    "holds weights only. Take a checkpoint of a training: one of `ssync-pl checkpoint convert` is for validate, test "
    "and predict, and for `load_from_checkpoint`.",
    "PytorchStreamReader": "Expected --ckpt_path to be a whole checkpoint, but reading it failed: {}. Take another "
    "one; --debug shows where.",
    "loading state_dict": "Expected --ckpt_path to hold the tensors of the model in the configuration, but: {}. Take "
    "the configuration that it was trained with; a public checkpoint with further parts goes through "
    "`ssync-pl checkpoint convert`.",
    "more than one stateful callback": "{} The callback is in the configuration already: leave one of them out.",
}


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
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Folder of the run below trainer.default_root_dir. Default: the first configuration file's name.",
        )

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
            settings["name"] = Path(str(files[0])).stem if files else _class_name(settings)
        if self.config["subcommand"] == "predict" and settings.get("return_predictions") is None:
            settings["return_predictions"] = False  # Lightning would keep the masks of the whole set in memory

    def _parse_ckpt_path(self) -> None:
        settings = self.config.get(self.config.get("subcommand") or "") or {}
        wanted = _class_name(settings)
        super()._parse_ckpt_path()  # a checkpoint that knows its host puts it in the place of the configuration's
        found = _class_name(self.config[self.config["subcommand"]]) if settings.get("input") else wanted
        if wanted != found:
            raise ConfigError(
                f"Expected --ckpt_path to be a checkpoint of {wanted}, the model of the configuration, but it is "
                f"one of {found}. Take the configuration that it was trained with: config.yaml in its run's folder."
            )

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer."""
        try:
            super().instantiate_classes()
            if self._inputs():
                names = ("clip_frames", "projection", "backbone_checkpoint")
                options = (self.config_init["predict"].get(name) for name in names)
                self.datamodule = InputDataModule(self.datamodule, self._inputs(), *options)
        except (ValueError, TypeError, ModuleNotFoundError) as error:
            reason = _reason(error)
            if isinstance(reason, ModuleNotFoundError):
                text = " ".join(str(reason).split()).rstrip(".")
                raise ConfigError(
                    f"Expected the packages of the configuration's classes, but one is missing ({text}). Install it "
                    "with pip, or take another class."
                ) from error
            if reason is None:
                raise
            raise reason from None

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
            added.append(progress_bar())
        if self.subcommand == "predict":
            has_writer = has(SlotPredictions, BasePredictionWriter)
            refuse_alone(self.config_init["predict"], has_writer)
            if not has_writer:
                out = self.config_init["predict"].get("out")
                # Users' videos are larger than those that hosts are trained on.
                own = SlotPredictions(out, label_pngs=True, cell=480) if self._inputs() else SlotPredictions()
                added.append(own)
        if self._inputs():
            added.append(CarrySlots())
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
    try:
        with public_globals():  # public checkpoints can be named by --ckpt_path as they are
            return kind(
                L.LightningModule,
                L.LightningDataModule,
                args=with_config(args),
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                trainer_defaults={"default_root_dir": _ROOT},
                save_config_kwargs={"overwrite": True},
                parser_class=LightningArgumentParser if debug else SSyncArgumentParser,
                parser_kwargs={"prog": "ssync-pl"},
            )
    except (MisconfigurationException, EOFError, UnpicklingError, KeyError, RuntimeError) as error:
        explained = None if isinstance(error, SSyncError) else _explain(error)
        if explained is None:
            raise
        raise ConfigError(explained) from error


def _explain(error: Exception) -> str | None:
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, MisconfigurationException):
        return str(error)
    if isinstance(error, (EOFError, UnpicklingError)):
        text = f"{type(error).__name__}: {text or 'it ends early'}"
        return _EXPLAINED["PytorchStreamReader"].format(text[:300])
    return next((message.format(text[:300]) for words, message in _EXPLAINED.items() if words in text), None)


def _reason(error: BaseException | None) -> SSyncError | ModuleNotFoundError | None:
    """Returns the error behind one of jsonargparse."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, (SSyncError, ModuleNotFoundError)):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _class_name(settings: Any) -> str:
    return str((settings.get("model") or {}).get("class_path", "")).rsplit(".", 1)[-1]


def _as_list(callbacks: Any) -> list[Any]:
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _logger(settings: dict[str, Any], name: str) -> Any:
    logger = settings.get("logger")
    if logger is not None and logger is not True:
        return logger
    root = str(settings.get("default_root_dir") or _ROOT)
    if logger is True:
        try:
            return TensorBoardLogger(root, name=name)
        except ModuleNotFoundError:
            sys.stderr.write("ssync-pl: tensorboard is not installed, so metrics go to metrics.csv.\n")
    return CSVLogger(root, name=name)


class _ShowsLoss(ProgressBar):
    """Adds the loss of the last step (divided by accumulated batches), which Lightning 2 leaves out of its bar."""

    _last_loss: Any = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._last_loss = loss.detach() if isinstance(loss, Tensor) else None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        metrics = {_SHORT.get(name, name): value for name, value in metrics.items()}  # whole names do not fit
        if trainer.training and self._last_loss is not None and "loss" not in metrics:
            return {"loss": round(float(self._last_loss), 5), **metrics}
        return metrics


class _RichBar(_ShowsLoss, RichProgressBar):
    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning subtracts 1 from max_epochs, which is -1 where only max_steps is given.
        return str(super()._get_train_description(current_epoch)).replace("/-2", "")


class _TQDMBar(_ShowsLoss, TQDMProgressBar):
    pass


def progress_bar() -> ProgressBar:
    """Builds the progress bar: Rich's where rich is installed, otherwise the plain one."""
    # Each refresh reads numbers off the device, so not in every step.
    rich = importlib.util.find_spec("rich") is not None
    return _RichBar(refresh_rate=10) if rich else _TQDMBar(refresh_rate=10)
