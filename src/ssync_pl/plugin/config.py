"""`SSyncConfig`: every setting of the regulariser, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ssync_pl.errors import ConfigError
from ssync_pl.method.loss import LossKind, check_options

__all__ = ["CollapseAction", "SSyncConfig", "StartKind"]

CollapseAction = Literal["warn", "backoff", "stop"]
StartKind = Literal["schedule", "mature"]


@dataclass(frozen=True)
class SSyncConfig:
    """Settings shared by `SSyncCallback` and `SSyncRegularizer`; the defaults are the published ones.

    Args:
        merge_threshold: Overlap above which slots are redundant, in [0, 1]. Published: 0.7 (MOVi-C), 0.65 (MOVi-E),
            0.6 (YT-VIS), 0.9 (COCO).
        merge: Merge redundant slots' labels. None: when the host's attention logits are there.
        n_bd: A boundary patch has at least this many differing neighbours, in [0, 10].
        n_nbd: An interior patch has fewer differing neighbours than this, in [1, 11].
        n_noise: A boundary patch has at least this many agreeing neighbours, in [0, 10].
        temperature: Of the student's softmax, above 0.
        loss: ``"brier"`` (published) or ``"ce"``.
        boundary_weight: Of the encoder → decoder loss, at least 0.
        interior_weight: Of the decoder → encoder loss, at least 0.
        relative_weight: None adds the weighted losses as they are (published). A number, above 0, instead scales them
            so that what is added has, on a running average, this share of the host's own loss; the two weights then
            only set the mix. One setting fits hosts of any loss scale. While the two losses average below 0.01, the
            factor grows no more.
        warmup_ratio: Share of the training's optimizer steps during which SSync is off, in [0, 1].
        warmup_steps: The same as a number of optimizer steps; takes the place of ``warmup_ratio``.
        ramp_steps: Optimizer steps over which the weight then grows linearly to its full size; 0 switches at once.
        start: ``"schedule"`` switches on after the warm-up (published). ``"mature"`` then still waits until the host is
            mature: encoder and decoder agree on ``mature_agreement`` of the patches, or their agreement and the slots
            in use have stopped changing. It is looked at once every ``guard_window`` steps. A host that never matures
            never gets SSync; a warning at the end of the training says so.
        mature_agreement: Share of the patches that the same slot wins in both maps, in (0, 1].
        on_collapse: What to do when slots fall out of use after switching on: ``"warn"``, ``"backoff"`` (halve the
            weight until they recover, then let it grow back) or ``"stop"`` the training.
        collapse_threshold: Share of the slots in use before switching on, in (0, 1), below which it is a collapse.
        guard_window: Training steps over which slots in use are averaged before they are compared, at least 1.
        sync_counts: Under DDP, divide by the selected patches of all ranks instead of each rank's own.

    Raises:
        ConfigError: A setting is out of range; the message names it.

    Example:
        >>> SSyncConfig(merge_threshold=0.65).warmup_ratio
        0.3
        >>> SSyncConfig(warmup_ratio=2.0)
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected argument `warmup_ratio` to be in [0, 1], but got 2.0. It is the share \
of the training during which SSync is off.

    Source: SSync (arXiv 2606.15527), implementation details.
    """

    merge_threshold: float = 0.7
    merge: bool | None = None
    n_bd: int = 1
    n_nbd: int = 1
    n_noise: int = 1
    temperature: float = 1.0
    loss: LossKind = "brier"
    boundary_weight: float = 1.0
    interior_weight: float = 1.0
    relative_weight: float | None = None
    warmup_ratio: float = 0.3
    warmup_steps: int | None = None
    ramp_steps: int = 0
    start: StartKind = "schedule"
    mature_agreement: float = 0.5
    on_collapse: CollapseAction = "warn"
    collapse_threshold: float = 0.8
    guard_window: int = 50
    sync_counts: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        check_options(
            merge_threshold=self.merge_threshold,
            n_bd=self.n_bd,
            n_nbd=self.n_nbd,
            n_noise=self.n_noise,
            temperature=self.temperature,
            loss=self.loss,
        )
        for name in ("boundary_weight", "interior_weight"):
            value = getattr(self, name)
            _require(0.0 <= value < float("inf"), name, "to be finite and at least 0", value, "It weights one loss.")
        relative = self.relative_weight
        _require(
            relative is None or 0.0 < relative < float("inf"),
            "relative_weight",
            "to be None or above 0",
            relative,
            "It is the share of the host's loss that SSync adds; leave it out to use absolute weights.",
        )
        _require(
            0.0 <= self.warmup_ratio <= 1.0,
            "warmup_ratio",
            "to be in [0, 1]",
            self.warmup_ratio,
            "It is the share of the training during which SSync is off.",
        )
        _require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            "warmup_steps",
            "to be None or at least 0",
            self.warmup_steps,
            "It counts optimizer steps.",
        )
        _require(self.ramp_steps >= 0, "ramp_steps", "to be at least 0", self.ramp_steps, "It counts optimizer steps.")
        _require(
            self.start in ("schedule", "mature"),
            "start",
            "to be 'schedule' or 'mature'",
            repr(self.start),
            "Pick one of these.",
        )
        _require(
            0.0 < self.mature_agreement <= 1.0,
            "mature_agreement",
            "to be in (0, 1]",
            self.mature_agreement,
            "It is the share of the patches on which encoder and decoder agree.",
        )
        _require(
            self.on_collapse in ("warn", "backoff", "stop"),
            "on_collapse",
            "to be 'warn', 'backoff' or 'stop'",
            repr(self.on_collapse),
            "Pick one of these.",
        )
        _require(
            0.0 < self.collapse_threshold < 1.0,
            "collapse_threshold",
            "to be in (0, 1)",
            self.collapse_threshold,
            "It is a share of the slots in use before SSync was switched on.",
        )
        _require(self.guard_window >= 1, "guard_window", "to be at least 1", self.guard_window, "It counts steps.")

    def _check_types(self) -> None:
        numbers = ("merge_threshold", "temperature", "boundary_weight", "interior_weight", "warmup_ratio")
        for name in (*numbers, "collapse_threshold", "mature_agreement", "relative_weight"):
            value = getattr(self, name)
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            fits = fits or (name == "relative_weight" and value is None)
            _require(fits, name, "to be a number", repr(value), "Pass it without quotes.")
        for name in ("warmup_steps", "ramp_steps", "guard_window"):
            value = getattr(self, name)
            fits = isinstance(value, int) and not isinstance(value, bool)
            fits = fits or (name == "warmup_steps" and value is None)
            _require(fits, name, "to be an integer", repr(value), "It counts steps.")
        _require(self.merge in (None, True, False), "merge", "to be true, false or None", repr(self.merge), "Pick one.")
        _require(self.sync_counts in (True, False), "sync_counts", "to be true or false", repr(self.sync_counts), "")

    def loss_options(self) -> dict[str, Any]:
        """Keyword arguments for `ssync_loss`.

        Returns:
            Options of the method, without those of the schedule and the guard.

        Example:
            >>> SSyncConfig().loss_options()["merge_threshold"]
            0.7
        """
        names = (
            "merge_threshold",
            "merge",
            "n_bd",
            "n_nbd",
            "n_noise",
            "temperature",
            "loss",
            "boundary_weight",
            "interior_weight",
            "sync_counts",
        )
        return {name: getattr(self, name) for name in names}


def _require(fits: bool, name: str, wanted: str, got: object, advice: str) -> None:
    if not fits:
        raise ConfigError(f"Expected argument `{name}` {wanted}, but got {got}. {advice}".rstrip())
