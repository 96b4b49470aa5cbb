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
from ssync_pl.adapters.discover import Discovery, FoundPair, discover
from ssync_pl.errors import HostError, ShapeError
from ssync_pl.method.loss import SSyncOutput, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.regularizer import SSyncRegularizer
from ssync_pl.plugin.session import HostSession, adapter_from
from ssync_pl.tools.doctor.report import CostReport, DoctorReport, MapReport, hints, lines, manual_lines
from ssync_pl.tools.doctor.steps import Run, StepError, describe_batch, in_trainer, is_lightning, plain_step

__all__ = ["diagnose", "examine", "settings_of"]

_DEFAULTS: dict[str, Any] = {
    "adapter": "auto",
    "attention": None,
    "masks": None,
    "attention_kind": "probs",
    "masks_kind": "probs",
    "grid": None,
}
_BYTES_PER_ENTRY = 28  # both maps are read, and softmax, labels and both gradients are kept
_REPEATS = 5
_PATIENCE_SECONDS = 10.0
_LISTED = 12
_SKIPPED = "The training step gave no loss for this batch: it was skipped."
_MASK_WORDS = ("dec", "mixer", "render", "readout", "paint")
_DICT_FOR_TENSOR = (AttributeError, IndexError, KeyError, TypeError)  # what the one in place of the other gives
_UNKNOWN = (
    "No adapter knows this host; its maps were found at the softmaxes named above. Look at the shapes: S has to be the "
    "number of slots, and N that of the patches."
)
_NAME_THEM = "Where modules return the maps, name them: --attention path:key --masks path:key."
_LOOKED_FOR = (
    "Looked for: a softmax over S slots in the slot attention and one over the same S in the decoder, both with more "
    "patches than slots, on the same videos and frames"
)


def diagnose(host: nn.Module, data: Any, settings: Mapping[str, Any], method: str = "") -> DoctorReport:
    """Examines a LightningModule in a Trainer, and any other model, or its `method` that gives the loss, by itself.

    `data` is a batch, or the data module of a LightningModule, which gets a tensor of videos or images as a dict with
    `"video"` or `"image"` first. `settings` are arguments of `SSyncCallback` that say how the host is read.
    """
    name = type(host).__name__
    if method or not is_lightning(host):
        run = plain_step(host, data, method)
        return examine(host, run, data, settings=settings, batch_text=describe_batch(data))
    if isinstance(host, SSyncRegularizer):
        hint = f"{name} is an SSyncRegularizer and adds SSync itself: leave the callback out."
        return DoctorReport(name, "lightning", "its own", hints=(hint,))
    if not host.automatic_optimization:
        problem = (
            f"{name} sets automatic_optimization=False and calls backward itself, so a loss that a callback adds would "
            "have no effect. Use the SSyncRegularizer mixin, or attach(self) around the forward pass, in its "
            "training_step."
        )
        return DoctorReport(name, "lightning", problems=(problem,), lines=manual_lines())
    reports: list[DoctorReport] = []

    def look(run: Run, batch: Any) -> None:
        text = describe_batch(batch)
        reports.append(examine(host, run, batch, settings=settings, kind="lightning", batch_text=text))

    if not isinstance(data, Tensor) or data.ndim not in (4, 5):
        in_trainer(host, data, look)
        return reports[0]
    try:
        in_trainer(host, {"video" if data.ndim == 5 else "image": data}, look)
    except StepError as first:
        if not isinstance(first.__cause__, _DICT_FOR_TENSOR):
            raise
        try:
            in_trainer(host, data, look)
        except StepError as second:
            raise first if isinstance(second.__cause__, _DICT_FOR_TENSOR) else second from second.__cause__
    return reports[0]


def settings_of(callbacks: Sequence[Any]) -> dict[str, Any] | None:
    """Returns how the first `SSyncCallback` reads its host, as its arguments that are no defaults; None without one."""
    own = next((callback for callback in callbacks if isinstance(callback, SSyncCallback)), None)
    if own is None:
        return None
    settings = {"adapter": own.adapter, "grid": own.grid}
    if isinstance(own.adapter, PathAdapter):
        names = ("attention", "masks", "attention_kind", "masks_kind", "grid")
        settings = {name: getattr(own.adapter, name) for name in names}
    elif isinstance(own.adapter, HostAdapter):
        settings["adapter"] = own.adapter.name
    return {name: value for name, value in settings.items() if value != _DEFAULTS[name]}


def examine(
    host: nn.Module,
    run: Run,
    batch: Any = None,
    *,
    settings: Mapping[str, Any] | None = None,
    kind: str = "plain",
    batch_text: str = "",
) -> DoctorReport:
    """Finds a host's maps, uses them once, and says what to write; a host that cannot be used has `problems`.

    `run` makes one training step, in training mode, and gives the host's own loss, None for a skipped one; `batch` is
    the batch of that step, for hosts whose grid follows from the size of the frames; `settings` as in `diagnose`.
    """
    settings = dict(settings or {})
    report = DoctorReport(type(host).__name__, kind, batch=batch_text)
    adapter, grid = adapter_from(**{**_DEFAULTS, **settings})
    try:
        located = locate(adapter, host, grid)
    except HostError as error:
        if adapter != "auto" or "all do" in str(error):
            return replace(report, problems=(str(error),))
        return _search(host, run, batch, settings, report)
    report = replace(report, adapter=located.adapter.name, part=located.path)
    return _listen(host, run, batch, settings, report)


def _listen(host: nn.Module, run: Run, batch: Any, settings: dict[str, Any], report: DoctorReport) -> DoctorReport:
    session = None
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            session = HostSession(host, *adapter_from(**{**_DEFAULTS, **settings}))
        session.open(training_only=report.kind == "plain")  # as `attach` and as `SSyncCallback` listen
        loss = run()
        if loss is None:
            return replace(report, problems=(_SKIPPED,))
        maps = session.collect(batch, SSyncConfig())
        output = ssync_loss(maps)
        sides = tuple(_map_report(host, maps, *side, output) for side in _places(session).items())
    except StepError:
        raise
    except (HostError, ShapeError) as error:
        return replace(report, problems=(str(error),))
    finally:
        if session is not None:
            session.remove()
    report = replace(
        report,
        shape=maps.shape,
        grid=maps.grid,
        maps=sides,
        loss=float(loss.detach()),
        boundary_loss=float(output.boundary_loss.detach()),
        interior_loss=float(output.interior_loss.detach()),
        boundary_fraction=float(output.boundary_fraction),
        agreement=float(output.agreement),
        merged_slots=float(output.merged_slots.float().mean()),
        cost=_measure_cost(maps.detach(), host, run),
        lines=lines(report.kind, settings),
        problems=tuple(
            f"No gradient reaches a parameter through the {one.side}." for one in sides if not one.has_gradient
        ),
    )
    own = tuple(str(one.message) for one in told if "ssync_pl" in one.filename)  # what adapters say of this host
    return replace(report, hints=(*own, *hints(report)))


def _search(host: nn.Module, run: Run, batch: Any, settings: dict[str, Any], report: DoctorReport) -> DoctorReport:
    """Tries the softmaxes of a host that no adapter knows."""
    losses: list[Tensor | None] = []
    found = discover(host, lambda: losses.append(run()))
    if losses == [None]:
        return replace(report, problems=(_SKIPPED,))
    failed: list[str] = []
    for pair in found.pairs:
        named = {**settings, "attention": pair.places[0], "masks": pair.places[1]}
        tried = _listen(host, run, batch, named, replace(report, adapter=PathAdapter.name))
        if tried.ready:
            others = [_line(one) for one in found.pairs if one is not pair]
            hint = f"Other softmaxes would fit as well, should these be the wrong ones: {'; '.join(others[:3])}."
            return replace(tried, hints=(_UNKNOWN, *tried.hints, *([hint] if others else [])))
        failed += [f"{_line(pair)}: {problem}" for problem in tried.problems]
    spots = [
        f"softmax of {spot.slots} on axis {spot.axis} of {spot.shape} in '{spot.path}', {spot.calls} call(s)"
        + ("" if spot.has_gradient else ", without gradient")
        for spot in found.spots
    ]
    more = [f"and {len(spots) - _LISTED} more"] if len(spots) > _LISTED else []
    return replace(report, problems=tuple(failed[:3] or [_no_maps(found)]), candidates=(*spots[:_LISTED], *more))


def _no_maps(found: Discovery) -> str:
    if not found.spots:
        return (
            f"This model has no slots, or normalises its maps without a softmax. {_LOOKED_FOR}; no softmax over an "
            f"axis of a batch ran at all. {_NAME_THEM}"
        )
    return (
        f"No two maps over slots were found. {_LOOKED_FOR}. A decoder that predicts tokens one after another (STEVE, "
        f"SLATE) draws no object masks. {_NAME_THEM} A softmax inside a module is named softmax:path."
    )


def _line(pair: FoundPair) -> str:
    return f"attention='{pair.places[0]}' with masks='{pair.places[1]}'"


def _places(session: HostSession) -> dict[str, tuple[str, ...]]:
    """Returns the paths of the modules that are listened to, per side."""
    if isinstance(session.adapter, PathAdapter):
        first, second = session.adapter.places
        return {"attention": (first.text,), "masks": (second.text,)}
    whole = session.path or "."
    hooked = [
        f"{session.path}.{name}".strip(".")
        for name, module in session.root.named_modules()
        if name
        and any(
            getattr(hook, "capture", None) is session.capture
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
    ]
    # What is inside of a named module says nothing more.
    outer = [one for one in hooked if not any(one.startswith(f"{other}.") for other in hooked)]
    masks = tuple(path for path in outer if any(word in path.lower() for word in _MASK_WORDS))
    return {"attention": tuple(path for path in outer if path not in masks) or (whole,), "masks": masks or (whole,)}


def _map_report(host: nn.Module, maps: SSyncMaps, side: str, places: tuple[str, ...], output: SSyncOutput) -> MapReport:
    field, used = (
        ("attention", output.used_encoder_slots) if side == "attention" else ("mask", output.used_decoder_slots)
    )
    given = {kind: getattr(maps, f"{field}_{kind}") for kind in ("logits", "probs")}
    probs = given["logits"].float().softmax(2) if given["probs"] is None else given["probs"].float()
    sums = probs.detach().sum(2)
    sums = sums if maps.patch_valid is None else sums[maps.patch_valid]
    reached = _reached(host, probs)
    return MapReport(
        side=side,
        places=places,
        kind="+".join(kind for kind, value in given.items() if value is not None),
        sums=(float(sums.min()), float(sums.max())),
        parameters=len(reached),
        reaches=_modules(host, reached),
        used_slots=float(used.mean()),
    )


def _reached(host: nn.Module, value: Tensor) -> list[str]:
    """Returns the names of the parameters that the gradient of a map reaches."""
    named = {name: parameter for name, parameter in host.named_parameters() if parameter.requires_grad}
    if not named or not value.requires_grad:
        return []
    # Any function of the map will do that is not constant over slots.
    weights = torch.linspace(-1, 1, value.shape[2], device=value.device)[:, None]
    objective = (value * weights).nan_to_num().square().sum()
    gradients = torch.autograd.grad(objective, [*named.values()], allow_unused=True, retain_graph=True)
    return [name for name, gradient in zip(named, gradients, strict=True) if gradient is not None]


def _modules(host: nn.Module, names: list[str]) -> tuple[str, ...]:
    every = [name.split(".") for name, _ in host.named_parameters()]
    depth = 1
    # The one child of a wrapper says nothing.
    while len({tuple(parts[:depth]) for parts in every}) == 1 and all(len(parts) > depth for parts in every):
        depth += 1
    return tuple(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))


def _measure_cost(maps: SSyncMaps, host: nn.Module, run: Run) -> CostReport:
    """Times SSync on maps of these shapes, and the host's own step."""
    device = maps.attention.device
    names = ("attention_logits", "attention_probs", "mask_logits", "mask_probs")
    given = {name: value for name in names if (value := getattr(maps, name)) is not None}
    alone = replace(maps, **{name: value.detach().requires_grad_() for name, value in given.items()})
    parameters = [parameter for parameter in host.parameters() if parameter.requires_grad]

    def block() -> None:
        torch.autograd.grad(ssync_loss(alone).loss, [alone.attention, alone.masks], allow_unused=True)

    def step() -> None:
        loss = run()
        if parameters and loss is not None and loss.requires_grad:
            torch.autograd.grad(loss, parameters, allow_unused=True)

    return CostReport(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        ssync_seconds=_median_seconds(block, device),
        step_seconds=_median_seconds(step, device),
        bytes=_BYTES_PER_ENTRY * maps.attention.numel(),
    )


def _median_seconds(work: Callable[[], None], device: torch.device) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    repeats = max(1, min(_REPEATS, int(_PATIENCE_SECONDS / max(seconds(), 1e-9))))  # slow hosts are measured less often
    return statistics.median(seconds() for _ in range(repeats))
