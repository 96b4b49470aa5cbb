"""Examines a host: one training step, listened to as in a training."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ssync_pl.adapters import HostAdapter, PathAdapter, locate
from ssync_pl.adapters.discover import discover
from ssync_pl.errors import HostError, ShapeError
from ssync_pl.method.loss import ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.regularizer import SSyncRegularizer
from ssync_pl.plugin.session import HostSession, adapter_from
from ssync_pl.tools.doctor.report import DoctorReport, hints, lines
from ssync_pl.tools.doctor.steps import Run, StepError, describe_batch, in_trainer, namespace, plain_step

_UNNAMED = dict.fromkeys(("attention", "masks", "grid"))
_DEFAULTS = {"adapter": "auto", "attention_kind": "probs", "masks_kind": "probs"}
_NUMBERS = ("boundary_loss", "interior_loss", "boundary_fraction", "agreement", "merged_slots")
_DICT_FOR_TENSOR = (AttributeError, IndexError, KeyError, TypeError)  # what the one in place of the other gives
_UNKNOWN = (
    "No adapter knows this host; its maps were found at the softmaxes named above. Look at the shapes: S has to be the "
    "number of slots, and N that of the patches."
)
_NO_MAPS = (
    "{what}. Looked for: a softmax over S slots in the slot attention and one over the same S in the decoder, both "
    "with more patches than slots, on the same videos and frames. A decoder that predicts tokens one after another "
    "(STEVE, SLATE) draws no object masks. Where modules return the maps, name them: --attention path:key --masks "
    "path:key; a softmax inside a module is named softmax:path."
)


def diagnose(host: nn.Module, data: Any, settings: Mapping[str, Any], method: str = "") -> DoctorReport:
    """Examines a LightningModule in a Trainer, and any other model, or its `method` that gives the loss, by itself.

    `data` is a batch, or the data module of a LightningModule, which gets a tensor of videos or images as a dict with
    `"video"` or `"image"` first. `settings` are arguments of `SSyncCallback` that say how the host is read.
    """
    name = type(host).__name__
    if method or namespace(host) is None:
        return examine(host, plain_step(host, data, method), data, settings=settings)
    if isinstance(host, SSyncRegularizer):
        hint = f"{name} is an SSyncRegularizer and adds SSync itself: leave the callback out."
        return DoctorReport(name, "lightning", "its own", hints=(hint,))
    reports: list[DoctorReport] = []

    def look(run: Run, batch: Any) -> None:
        reports.append(examine(host, run, batch, settings=settings, kind="lightning"))

    try:
        SSyncCallback().setup(None, host, "fit")
    except HostError as error:
        return DoctorReport(name, "lightning", problems=(str(error),))
    named = isinstance(data, Tensor) and data.ndim in (4, 5)
    failures: list[StepError] = []
    for batch in [{"video" if data.ndim == 5 else "image": data}, data] if named else [data]:
        try:
            in_trainer(host, batch, look)
            return reports[0]
        except StepError as error:
            failures.append(error)
            if not isinstance(error.__cause__, _DICT_FOR_TENSOR):
                raise
    raise failures[0]


def settings_of(callbacks: Sequence[Any]) -> dict[str, Any] | None:
    """Returns how the first `SSyncCallback` reads its host, as arguments of another one; None without one."""
    own = next((callback for callback in callbacks if isinstance(callback, SSyncCallback)), None)
    return None if own is None else {"adapter": own.adapter, "grid": own.grid}


def examine(
    host: nn.Module, run: Run, batch: Any = None, *, settings: Mapping[str, Any] | None = None, kind: str = "plain"
) -> DoctorReport:
    """Finds a host's maps, uses them once, and says what to write; a host that cannot be used has `problems`.

    `run` makes one training step, in training mode, and gives the host's own loss, None for a skipped one; `batch` is
    the batch of that step, for hosts whose grid follows from the size of the frames; `settings` as in `diagnose`.
    """
    report = DoctorReport(type(host).__name__, kind, batch="" if batch is None else describe_batch(batch))
    named = {name: value for name, value in (settings or {}).items() if value not in (None, "auto")}
    adapter, grid = adapter_from(**{**_UNNAMED, **_DEFAULTS, **named})
    try:
        located = locate(adapter, host, grid)
    except HostError as error:
        if adapter == "auto" and "all do" not in str(error):  # no adapter knows it
            return _search(host, run, batch, named, report)
        return replace(report, problems=(str(error),))
    return _listen(host, run, batch, located.adapter, named, report)


def _listen(
    host: nn.Module, run: Run, batch: Any, adapter: HostAdapter, named: Mapping[str, Any], report: DoctorReport
) -> DoctorReport:
    report, session = replace(report, adapter=adapter.name), None
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            session = HostSession(host, adapter)
        report = replace(report, part=session.path)
        session.open(training_only=report.kind == "plain")  # as `attach` and as `SSyncCallback` listen
        loss = run()
        if loss is None:
            raise HostError("The training step gave no loss for this batch: it was skipped.")
        maps = session.collect(batch, SSyncConfig())
        output = ssync_loss(maps)
    except StepError:
        raise
    except (HostError, ShapeError) as error:
        return replace(report, problems=(str(error),))
    finally:
        if session is not None:
            session.remove()
    numbers: dict[str, Any] = {name: float(getattr(output, name).detach().float().mean()) for name in _NUMBERS}
    report = replace(
        report,
        places=_places(session),
        shape=maps.shape,
        grid=maps.grid,
        kinds=(_kind(maps, "attention"), _kind(maps, "mask")),
        used_slots=(float(output.used_encoder_slots.mean()), float(output.used_decoder_slots.mean())),
        loss=float(loss.detach()),
        lines=() if isinstance(named.get("adapter"), HostAdapter) else lines(report.kind, named),
        **numbers,
        **_measure_cost(maps, host, run),
    )
    own = tuple(str(one.message) for one in told if "ssync_pl" in one.filename)  # what adapters say of this host
    return replace(report, hints=(*own, *hints(report)))


def _search(host: nn.Module, run: Run, batch: Any, named: dict[str, Any], report: DoctorReport) -> DoctorReport:
    """Tries the softmaxes of a host that no adapter knows."""
    losses: list[Tensor | None] = []
    found = discover(host, lambda: losses.append(run()))
    pairs = [dict(zip(("attention", "masks"), pair.places, strict=True)) for pair in found.pairs]
    texts = [f"attention='{pair['attention']}' with masks='{pair['masks']}'" for pair in pairs]
    failed: list[str] = []
    for pair, text in zip(pairs, texts, strict=True):
        adapter = PathAdapter(pair["attention"], pair["masks"], grid=named.get("grid"))
        tried = _listen(host, run, batch, adapter, {**named, **pair}, report)
        if tried.ready:
            others = "; ".join([other for other in texts if other != text][:3])
            more = f"Other softmaxes would fit as well, should these be the wrong ones: {others}."
            return replace(tried, hints=(_UNKNOWN, *tried.hints, *([more] if others else [])))
        failed += [f"{text}: {problem}" for problem in tried.problems]
    if losses == [None]:
        failed = ["The training step gave no loss for this batch: it was skipped."]
    what = "No two maps over slots were found" if found.spots else "This model has no slots: no softmax ran at all"
    spots = tuple(
        f"softmax of {spot.slots} on axis {spot.axis} of {spot.shape} in '{spot.path}', {spot.calls} call(s)"
        + ("" if spot.has_gradient else ", without gradient")
        for spot in found.spots[:12]
    )
    return replace(report, problems=tuple(failed[:3] or [_NO_MAPS.format(what=what)]), candidates=spots)


def _places(session: HostSession) -> tuple[str, ...]:
    """Returns the outermost modules that are listened to, as paths from the host."""
    if isinstance(session.adapter, PathAdapter):
        return tuple(place.text for place in session.adapter.places)
    watched = {id(module) for module in session.capture.modules.values()}
    paths = [f"{session.path}.{name}".strip(".") for name, one in session.root.named_modules() if id(one) in watched]
    return tuple(one for one in paths if one and not any(one.startswith(f"{other}.") for other in paths if other))


def _kind(maps: SSyncMaps, field: str) -> str:
    return " and ".join(kind for kind in ("logits", "probs") if getattr(maps, f"{field}_{kind}") is not None)


def _measure_cost(maps: SSyncMaps, host: nn.Module, run: Run) -> dict[str, Any]:
    """Times SSync on maps of these shapes, and the host's own step."""
    device = maps.attention.device
    value = torch.randn(maps.shape, device=device, requires_grad=True)
    alone = SSyncMaps(attention_logits=value, mask_logits=value, grid=maps.grid)
    parameters = [parameter for parameter in host.parameters() if parameter.requires_grad]

    def step() -> None:
        loss = run()
        if parameters and loss is not None and loss.requires_grad:
            torch.autograd.grad(loss, parameters, allow_unused=True)

    return {
        "ssync_seconds": _seconds(lambda: torch.autograd.grad(ssync_loss(alone).loss, [value]), device),
        "step_seconds": _seconds(step, device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    times: list[float] = []
    while len(times) < 6 and sum(times) < 10:  # slow hosts are measured less often
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)  # the first one warms up
