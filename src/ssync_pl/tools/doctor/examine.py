"""Examines a host: one training step, listened to as in a training; what was found and what to write, as text."""

import functools
import math
import shlex
import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssync_pl.adapters import HostAdapter, PathAdapter, locate
from ssync_pl.adapters.discover import discover
from ssync_pl.adapters.pairing import Pair, sources
from ssync_pl.errors import HostError, ShapeError
from ssync_pl.method.loss import ssync_loss
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.regularizer import SSyncRegularizer
from ssync_pl.plugin.session import HostSession
from ssync_pl.tools.doctor import steps

_NUMBERS = ("boundary_loss", "interior_loss", "boundary_fraction", "agreement", "merged_slots")
_USED = ("used_encoder_slots", "used_decoder_slots")
_PACKAGE = str(Path(__file__).parents[2])
_OTHER_KIND = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # a tensor in a dict's place, and so on
_UNKNOWN = (
    "No adapter knows this host; its maps were found at the softmaxes named above. Look at the shapes: S has to be the "
    "number of slots, and N that of the patches."
)
_UNLINKED = "No gradient goes from these masks to this attention: another one draws them, or the slots are detached."
_NO_MAPS = (
    "Expected a softmax over S slots in the slot attention and one over the same S in the decoder, both with more "
    "patches than slots, but {found} (a decoder that predicts tokens one after another draws no masks). Where modules "
    "return the maps, name them: --attention path:key --masks path:key, or softmax:path for one inside a module."
)


@dataclass(frozen=True)
class DoctorReport:
    """Everything that `ssync-pl doctor` says; `kind` is `"lightning"` or `"plain"`."""

    host: str
    kind: str
    batch: str = ""
    adapter: str | None = None
    places: tuple[str, ...] = ()  # modules that are listened to, slot attention first
    shape: tuple[int, ...] = ()  # (B, T, S, N)
    grid: tuple[int, int] | None = None  # (H, W) patches
    kinds: tuple[str, ...] = ()  # "logits" or "probs", of slot attention and of the masks
    numbers: Mapping[str, float] = field(default_factory=dict)  # losses, shares of patches, slots that win a patch
    problems: tuple[str, ...] = ()  # why SSync cannot be used as it is
    hints: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()  # softmaxes that were looked at, where no map was found
    lines: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the lines can be added as they are."""
        return not self.problems


def lines(kind: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the lines that add SSync to a script, with `settings` of `SSyncCallback`."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    if kind != "lightning":
        return (
            "from ssync_pl import attach",
            f"with attach({', '.join(filter(None, ('model', arguments, 'total_steps=...')))}) as ssync:",
            "    ...  # your training loop, and in each step, after the forward pass:",
            "    total = ssync.add(loss)",
            "    total.backward()",
        )
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    words = [shlex.quote(f"--trainer.callbacks.{name}={value}") for name, value in values.items()]
    return (
        "from ssync_pl import SSyncCallback",
        f"trainer = L.Trainer(..., callbacks=[SSyncCallback({arguments})])",
        "# or, on the command line of a LightningCLI:",
        " ".join(["python train.py fit ... --trainer.callbacks+=ssync_pl.SSyncCallback", *words]),
    )


def hints(report: DoctorReport, clips: set[tuple[int, int]]) -> tuple[str, ...]:
    """Returns what the numbers of a host that can be used suggest; `clips` are (B, T) that its batch may have."""
    (batch, time, slots, _), loss = report.shape, report.numbers["loss"]
    frames = {videos * length for videos, length in clips}
    scale = "the published weights go with one near 1: relative_weight=0.1 adds a tenth of the host's loss instead"
    merging = "Redundant slots are merged by logits only: attention='softmax:path' takes them from inside a module."
    missed = f"SSync sees {batch * time} frames of a batch of {max(frames, default=0)}: check that this is meant."
    folded = f"SSync takes the frames for {batch} clips of {time}: right only where frames hand on no slots."
    advice = [
        (not math.isfinite(loss), f"The host's own loss is {loss}: check the host and the batch."),
        (not 0.2 <= abs(loss) <= 5.0 and math.isfinite(loss), f"The host's own loss is {loss:.3g}, and {scale}."),
        (bool(frames) and batch * time not in frames, missed),
        (batch * time in frames and (batch, time) not in clips, folded),
        (slots == 1, "There is one slot: both maps are 1 everywhere, so that SSync is 0 and changes nothing."),
        (report.kinds[0] == "probs", merging),
    ]
    return tuple(text for holds, text in advice if holds)


def diagnose(host: nn.Module, data: Any, settings: Mapping[str, Any], method: str = "") -> DoctorReport:
    """Examines a LightningModule in a Trainer, and any other model, or its `method` that gives the loss, by itself.

    `data` is a batch or a data module; `settings` are arguments of `SSyncCallback` that say how the host is read.
    """
    if method or steps.namespace(host) is None:
        return examine(host, steps.plain_step(host, data, method), data, settings)
    report = DoctorReport(type(host).__name__, "lightning")
    try:
        if not isinstance(host, SSyncRegularizer):
            SSyncCallback().setup(None, host, "fit")
    except HostError as error:
        return replace(report, problems=(str(error),))
    named = isinstance(data, Tensor) and data.ndim in (4, 5)
    failures: list[steps.StepError] = []
    for batch in [{"video" if data.ndim == 5 else "image": data}, [data], data] if named else [data]:
        try:
            return steps.in_trainer(host, batch, functools.partial(examine, host, settings=settings, kind="lightning"))
        except steps.StepError as error:
            failures.append(error)
            if not isinstance(error.__cause__, _OTHER_KIND):
                raise
    raise failures[0]


def examine(
    host: nn.Module, run: steps.Run, batch: Any, settings: Mapping[str, Any] | None = None, kind: str = "plain"
) -> DoctorReport:
    """Finds a host's maps in one training step, `run` on `batch`, uses them once, and says what to write."""
    report = DoctorReport(type(host).__name__, kind, steps.describe_batch(batch))
    named = {name: value for name, value in (settings or {}).items() if value not in (None, "auto")}
    callback = SSyncCallback(**named)
    try:
        if kind == "lightning" and isinstance(host, SSyncRegularizer):
            run()  # which checks the maps
            unused = () if host._ssync_checked else (f"Expected {report.host} to call self.ssync, but it does not.",)
            hint = f"{report.host} is an SSyncRegularizer and adds SSync itself: leave the callback out."
            return replace(report, adapter="its own", problems=unused, hints=(hint,))
        adapter = locate(callback.adapter, host, callback.grid).adapter
    except (HostError, ShapeError) as error:
        own = isinstance(host, SSyncRegularizer) or callback.adapter != "auto" or "all do" in str(error)
        return replace(report, problems=(str(error),)) if own else _search(report, host, run, batch, named)
    return _listen(report, host, run, batch, named, adapter)


def _listen(
    report: DoctorReport, host: nn.Module, run: steps.Run, batch: Any, named: Mapping[str, Any], adapter: HostAdapter
) -> DoctorReport:
    report, session = replace(report, adapter=adapter.name), None
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            session = HostSession(host, adapter)
            session.open(training_only=report.kind == "plain")  # as `attach` and as `SSyncCallback` listen
            loss = run()
            if not loss.requires_grad:
                raise HostError("Expected the step to give a loss with a gradient, but it has none. Was it detached?")
            maps = session.collect(batch, SSyncConfig())
            output = ssync_loss(maps)
            hidden = any(one._compiled_call_impl or hasattr(one, "_orig_mod") for one in host.modules())  # compiled
            pair = None if hidden or not isinstance(adapter, PathAdapter) else adapter.pair(session.capture)
            unlinked = () if pair is None else _unlinked(pair)
    except (HostError, ShapeError) as error:
        return replace(report, problems=(str(error),))
    finally:
        if session is not None:
            session.remove()
    values = {name: float(getattr(output, name).detach().float().mean()) for name in (*_NUMBERS, *_USED)}
    report = replace(
        report,
        places=_places(session),
        shape=maps.shape,
        grid=maps.grid,
        kinds=tuple("probs" if logits is None else "logits" for logits in (maps.attention_logits, maps.mask_logits)),
        numbers={"loss": float(loss.detach()), **values},
        lines=lines(report.kind, named),
    )
    clips = {(value.shape[0], value.shape[1]) for value in steps.tensors_of(batch) if value.ndim == 5}
    own = tuple(str(one.message) for one in told if one.filename.startswith(_PACKAGE))  # what adapters say of this host
    return replace(report, hints=(*own, *unlinked, *hints(report, clips)))


def _unlinked(pair: Pair) -> tuple[str, ...]:
    """Says that masks do not come from the attention, and refuses maps whose frames or sides are exchanged."""
    for frame in {0, pair.frames - 1}:
        try:
            used = sources(pair, frame)
        except RuntimeError:  # such as that of reentrant checkpointing
            return ()
        if not used.any():
            return (_UNLINKED,)
        if not used[0, frame]:
            text = f"masks of frame {frame} of the first video to come from the attention to it, but it was another's"
            raise HostError(f"Expected the {text}. Let both maps have their axes in one order: B, T, S, N.")
    return ()


def _search(report: DoctorReport, host: nn.Module, run: steps.Run, batch: Any, named: dict[str, Any]) -> DoctorReport:
    """Tries the softmaxes of a host that no adapter knows."""
    try:
        with steps.quiet():
            found = discover(host, run)
    except HostError as error:
        return replace(report, problems=(str(error),))
    pairs = {"attention='{}' with masks='{}'".format(*pair.places): pair.places for pair in found.pairs}
    tried: dict[str, DoctorReport] = {}
    for text, (attention, masks) in list(pairs.items())[:8]:
        adapter = PathAdapter(attention, masks, grid=named.get("grid"))
        tried[text] = _listen(report, host, run, batch, {**named, "attention": attention, "masks": masks}, adapter)
    ready = [text for text, one in tried.items() if one.ready]
    if ready:
        best, *others = sorted(ready, key=lambda text: _UNLINKED in tried[text].hints)
        more = f"Other softmaxes would fit as well, should these be the wrong ones: {'; '.join(others[:3])}."
        return replace(tried[best], hints=(_UNKNOWN, *tried[best].hints, *((more,) if others else ())))
    failed = [f"{text}: {problem}" for text, one in tried.items() for problem in one.problems]
    what = "no two such maps were found" if found.spots else "this model has no slots: no softmax ran at all"
    spots = tuple(
        f"softmax of {spot.slots} on axis {spot.axis} of {spot.shape} in '{spot.path}', {spot.calls} call(s)"
        + ("" if spot.has_gradient else ", without gradient")
        for spot in found.spots[:12]
    )
    return replace(report, problems=tuple(failed[:3]) or (_NO_MAPS.format(found=what),), candidates=spots)


def _places(session: HostSession) -> tuple[str, ...]:
    """Returns the outermost modules that are listened to, as paths from the host."""
    if isinstance(session.adapter, PathAdapter):
        return tuple(place.text for place in session.adapter.places)
    watched = {id(module) for module in session.capture.modules.values()}
    paths = [f"{session.path}.{name}".strip(".") for name, one in session.root.named_modules() if id(one) in watched]
    return tuple(one for one in paths if one and not any(one.startswith(f"{other}.") for other in paths if other))


def render_report(report: DoctorReport) -> str:
    """Writes a report for people."""
    kind = "LightningModule" if report.kind == "lightning" else "plain PyTorch"
    rows = {"host": f"{report.host} ({kind})", "adapter": report.adapter or "none", "batch": report.batch}
    if report.grid is not None:
        sizes = " ".join(f"{name}={size}" for name, size in zip("BTSN", report.shape, strict=True))
        own, boundary, interior, share, same, merged, attention, masks = report.numbers.values()
        rows |= {
            "found at": ", ".join(report.places),
            "maps": f"{sizes}, grid {report.grid[0]} x {report.grid[1]}",
            "attention": f"{report.kinds[0]}, {attention:.1f} slots in use",
            "masks": f"{report.kinds[1]}, {masks:.1f} slots in use",
            "losses": f"host {own:.4g}, SSync {boundary:.4g} (boundary) + {interior:.4g} (interior)",
            "agreement": f"same slot in {same:.0%} of patches, {share:.0%} at borders, {merged:.1f} slots merged",
        }
    text = [f"{name:<13} {value}" for name, value in rows.items() if value]
    if report.candidates:
        text += ["", "what was looked at:", *(f"  {one}" for one in report.candidates)]
    fill = textwrap.TextWrapper(110, "  - ", "    ", break_on_hyphens=False).fill
    for title, notes in (("SSync cannot be used as it is:", report.problems), ("to consider:", report.hints)):
        text += ["", title, *map(fill, notes)] if notes else []
    if report.ready:
        text += ["", "ready. Add:" if report.lines else "ready: nothing to add.", *(f"  {one}" for one in report.lines)]
    return "\n".join(text)
