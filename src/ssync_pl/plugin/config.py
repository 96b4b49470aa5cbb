"""`SSyncConfig`: every setting of SSync in one place, checked when it is made."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import inf
from typing import Any, Literal, get_args

from ssync_pl.errors import require
from ssync_pl.method.loss import Backend, LossKind, check_options
from ssync_pl.method.merging import MergeRule

CollapseAction = Literal["warn", "backoff", "stop"]
Mode = Literal["published", "auto"]


@dataclass(frozen=True)
class SSyncConfig:
    """Settings that `SSyncCallback`, `SSyncRegularizer`, `attach` and the command line share; defaults as published.

    Args:
        mode: What settings become that are None: ``"published"``, or ``"auto"``, for hosts of any scale and maturity:
            ``gradient_share`` 0.1 (unless ``relative_weight`` is given), ``merge_threshold`` 0.5, ``warmup_ratio`` 0.5,
            ``least_agreement`` 0.6, ``on_collapse`` ``"backoff"`` and ``collapse_threshold`` 0.9.
        merge_threshold: Overlap above which slots are redundant, in [0, 1]. Published: 0.7 (MOVi-C), 0.65 (MOVi-E),
            0.6 (YT-VIS), 0.9 (COCO). None: 0.7, with ``mode="auto"`` 0.5.
        merge: Merge redundant slots' labels. None merges where the host's attention logits are there.
        merge_by: ``"coverage"`` (published), or ``"soft_iou"``, which takes no threshold.
        n_bd: Least number of differing neighbours of a boundary patch, in [0, 10].
        n_nbd: Number of differing neighbours that an interior patch stays below, in [1, 11].
        n_noise: Least number of agreeing neighbours of a boundary patch, in [0, 10].
        temperature: Temperature of the student's softmax, above 0.
        loss: ``"brier"`` (published) or ``"ce"`` (cross-entropy).
        boundary_weight: Weight of the encoder → decoder loss, at least 0.
        interior_weight: Weight of the decoder → encoder loss, at least 0.
        relative_weight: None adds the weighted losses as they are (published). A number above 0 scales them so that
            what is added has, on a running average, this share of the host's own loss; the two weights then only set
            the mix. While the two losses average below 0.01, the factor grows no more.
        gradient_share: A number in (0, 1) scales each loss so that the norm of its gradient, at the map that it trains,
            has on a running average this share of the norm of the host's own gradient there, whatever the host's loss
            measures, times the loss's own weight. While one slot wins nearly everything, nothing is added. Not together
            with ``relative_weight``.
        least_agreement: While Cohen's kappa of the slots that win in the two maps is below it on a running average,
            nothing is added: the maps disagree on which slot is where. In [0, 1), 0 never looks. None: 0, with
            ``mode="auto"`` 0.6.
        warmup_ratio: Share of the training's optimizer steps during which SSync is off, in [0, 1]. None: 0.3, with
            ``mode="auto"`` 0.5.
        warmup_steps: Number of optimizer steps during which SSync is off; takes the place of ``warmup_ratio``.
        ramp_steps: Optimizer steps over which the weight then grows linearly to its full size; 0 switches at once.
        on_collapse: What to do when slots fall out of use after switching on: ``"warn"``, ``"backoff"`` (halve the
            weight until they recover, then let it grow back) or ``"stop"`` the training. None: ``"warn"``, with
            ``mode="auto"`` ``"backoff"``.
        collapse_threshold: Share of the slots in use before switching on, in (0, 1), below which it is a collapse.
            None: 0.8, with ``mode="auto"`` 0.9.
        guard_window: Training steps over which slots in use are averaged before they are compared, at least 1.
        sync_counts: Under DDP, divide by the selected patches of all ranks instead of each rank's own.
        backend: ``"auto"`` takes the GPU kernels where they serve, ``"torch"`` leaves them out, ``"triton"`` insists on
            them. The first step logs which one runs and why.

    Raises:
        ConfigError: A setting is out of range; the message names it.

    Source: SSync (arXiv 2606.15527), implementation details.
    """

    mode: Mode = "published"
    merge_threshold: float | None = None
    merge: bool | None = None
    merge_by: MergeRule = "coverage"
    n_bd: int = 1
    n_nbd: int = 1
    n_noise: int = 1
    temperature: float = 1.0
    loss: LossKind = "brier"
    boundary_weight: float = 1.0
    interior_weight: float = 1.0
    relative_weight: float | None = None
    gradient_share: float | None = None
    least_agreement: float | None = None
    warmup_ratio: float | None = None
    warmup_steps: int | None = None
    ramp_steps: int = 0
    on_collapse: CollapseAction | None = None
    collapse_threshold: float | None = None
    guard_window: int = 50
    sync_counts: bool = False
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        require(self.mode in get_args(Mode), "argument `mode` to be 'published' or 'auto'", repr(self.mode))
        weighted = self.relative_weight is not None
        for name, values in _DEFAULTS.items():
            if getattr(self, name) is None and not (name == "gradient_share" and weighted):
                object.__setattr__(self, name, values[self.mode == "auto"])
        for name, (fits, wanted) in _RULES.items():
            value = getattr(self, name)
            require(fits(value), f"argument `{name}` to be {wanted}", repr(value))
        one = self.relative_weight is None or self.gradient_share is None
        require(one, "`relative_weight` or `gradient_share`", "both", advice="Leave one out.")
        checked = ("merge_threshold", "n_bd", "n_nbd", "n_noise", "temperature", "loss")
        check_options(**{name: getattr(self, name) for name in checked})

    @classmethod
    def from_options(cls, **options: Any) -> "SSyncConfig":
        """Makes the settings from keywords; raises `ConfigError` for names that do not exist."""
        known = [field.name for field in fields(cls)]
        for name in set(options) - set(known):
            near = ["warmup_ratio"] if name == "start" else get_close_matches(name, known, 1)
            advice = f"Did you mean `{near[0]}`?" if near else ""
            require(False, f"settings among {', '.join(known)}", name, advice=advice)
        return cls(**options)

    def loss_options(self) -> dict[str, Any]:
        """Returns the keyword arguments of `ssync_loss`, without the settings of the schedule and the guard."""
        return {name: getattr(self, name) for name in _LOSS_OPTIONS}


# Of settings that are None: as published, and with mode="auto".
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "merge_threshold": (0.7, 0.5),
    "gradient_share": (None, 0.1),
    "least_agreement": (0.0, 0.6),
    "warmup_ratio": (0.3, 0.5),
    "on_collapse": ("warn", "backoff"),
    "collapse_threshold": (0.8, 0.9),
}
_LOSS_OPTIONS = (
    *("merge_threshold", "merge", "merge_by", "n_bd", "n_nbd", "n_noise", "temperature", "loss"),
    *("boundary_weight", "interior_weight", "sync_counts", "backend"),
)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_WEIGHT = (lambda x: _is_number(x) and 0 <= x < inf, "a finite number of at least 0")
_SHARE = (lambda x: x is None or (_is_number(x) and 0 < x < inf), "a number above 0, without quotes, or None")
_NUMBER = (_is_number, "a number, without quotes")

_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "merge_threshold": _NUMBER,
    "temperature": _NUMBER,
    "merge": (lambda x: x is None or isinstance(x, bool), "true, false or None"),
    "merge_by": (lambda x: x in get_args(MergeRule), "'coverage' or 'soft_iou'"),
    "boundary_weight": _WEIGHT,
    "interior_weight": _WEIGHT,
    "relative_weight": _SHARE,
    "gradient_share": (lambda x: x is None or (_is_number(x) and 0 < x < 1), "a number in (0, 1), or None"),
    "least_agreement": (lambda x: _is_number(x) and 0 <= x < 1, "a number in [0, 1), a kappa"),
    "warmup_ratio": (lambda x: _is_number(x) and 0 <= x <= 1, "a number in [0, 1], the share of the training"),
    "warmup_steps": (lambda x: x is None or _is_count(x, 0), "None or an integer of at least 0, in optimizer steps"),
    "ramp_steps": (lambda x: _is_count(x, 0), "an integer of at least 0, in optimizer steps"),
    "on_collapse": (lambda x: x in get_args(CollapseAction), "'warn', 'backoff' or 'stop'"),
    "collapse_threshold": (lambda x: _is_number(x) and 0 < x < 1, "a number in (0, 1), a share of the slots in use"),
    "guard_window": (lambda x: _is_count(x, 1), "an integer of at least 1, in training steps"),
    "sync_counts": (lambda x: isinstance(x, bool), "true or false"),
    "backend": (lambda x: x in get_args(Backend), "'auto', 'torch' or 'triton'"),
}
