"""The examination: one training step of a host, listened to as in a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ssync_pl.adapters import HostAdapter, PathAdapter, locate
from ssync_pl.adapters.discover import Discovery, FoundPair, discover
from ssync_pl.errors import HostError, ShapeError
from ssync_pl.method.loss import ssync_loss
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.session import HostSession, adapter_from
from ssync_pl.tools.doctor.advice import Wanted, hints, lines
from ssync_pl.tools.doctor.measure import map_report, measure_cost
from ssync_pl.tools.doctor.report import DoctorReport

__all__ = ["examine"]

_LISTED = 12
_SKIPPED = "The training step gave no loss for this batch: it was skipped."
_MASK_WORDS = ("decod", "dec", "mixer", "render", "readout", "paint")


@dataclass(frozen=True)
class _Case:
    host: nn.Module
    run: Callable[[], Tensor | None]
    batch: Any
    wanted: Wanted


def examine(
    host: nn.Module,
    run: Callable[[], Tensor | None],
    batch: Any = None,
    *,
    wanted: Wanted | None = None,
    kind: str = "plain",
    batch_text: str = "",
) -> DoctorReport:
    """Find a host's maps, use them once, and say what to write.

    Args:
        host: The model.
        run: Runs one training step, in training mode, and gives the host's own loss; None for a skipped one.
        batch: The batch of that step, for hosts whose grid follows from the size of the frames.
        wanted: How the user wants the host to be read; None recognises it.
        kind: ``"lightning"`` or ``"plain"``.
        batch_text: Shapes of the batch, in words.

    Returns:
        The report; a host that cannot be used has problems in it.

    Raises:
        ConfigError: ``wanted`` contradicts itself.

    Example:
        >>> import torch
        >>> from ssync_pl.hosts import SAVi
        >>> model = SAVi(num_slots=2, slot_dim=8, encoder_channels=(8,), encoder_strides=(2,), feature_dim=8,
        ...              decoder_broadcast=(4, 4), decoder_channels=(8,), decoder_strides=(2,))
        >>> video = torch.rand(1, 2, 3, 16, 16)
        >>> report = examine(model, lambda: model(video).reconstruction.square().mean())
        >>> report.adapter, report.ready
        ('savi', True)
    """
    wanted = Wanted() if wanted is None else wanted
    case = _Case(host, run, batch, wanted)
    empty = DoctorReport(host=type(host).__name__, kind=kind, batch=batch_text)
    spec, grid = adapter_from(
        wanted.adapter, wanted.attention, wanted.masks, wanted.attention_kind, wanted.masks_kind, wanted.grid
    )
    try:
        located = locate(spec, host, grid)
    except HostError as error:
        if spec != "auto" or "all do" in str(error):
            return replace(empty, problems=(str(error),))
        return _unknown(case, empty)
    return _with_session(case, replace(empty, adapter=located.adapter.name, part=located.path), spec, grid)


def _with_session(
    case: _Case, report: DoctorReport, adapter: str | HostAdapter, grid: tuple[int, int] | None
) -> DoctorReport:
    session = None
    try:
        session = HostSession(case.host, adapter, grid)
        # As `attach` and as `SSyncCallback` listen.
        session.open(training_only=report.kind == "plain")
        loss = case.run()
        if loss is None:
            return replace(report, problems=(_SKIPPED,))
        maps = session.collect(case.batch, SSyncConfig())
        output = ssync_loss(maps)
        places = _places(session)
        sides = tuple(map_report(case.host, maps, side, places[side], output) for side in ("attention", "masks"))
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
        cost=measure_cost(maps.detach(), case.host, case.run),
    )
    problems = tuple(
        f"No gradient reaches a parameter through the {one.side}." for one in sides if not one.has_gradient
    )
    report = replace(report, problems=problems)
    return replace(report, hints=hints(report), lines=lines(report.kind, case.wanted))


def _unknown(case: _Case, report: DoctorReport) -> DoctorReport:
    losses: list[Tensor | None] = []
    found = discover(case.host, lambda: losses.append(case.run()))
    if losses == [None]:
        return replace(report, problems=(_SKIPPED,))
    failed: list[str] = []
    for pair in found.pairs:
        wanted = replace(case.wanted, attention=pair.places[0], masks=pair.places[1])
        adapter: HostAdapter = PathAdapter(*pair.places, grid=case.wanted.grid)
        named = replace(report, adapter=adapter.name)
        tried = _with_session(replace(case, wanted=wanted), named, adapter, None)
        if tried.ready:
            others = tuple(_line(one) for one in found.pairs if one is not pair)
            if others:
                hint = f"Other softmaxes would fit as well, should these be the wrong ones: {'; '.join(others[:3])}."
                tried = replace(tried, hints=(*tried.hints, hint))
            return replace(tried, hints=(_UNKNOWN_HINT, *tried.hints))
        failed += [f"{_line(pair)}: {problem}" for problem in tried.problems]
    problems = tuple(failed[:3]) if failed else (_no_maps(found),)
    return replace(report, problems=problems, candidates=_candidates(found))


_UNKNOWN_HINT = (
    "No adapter knows this host; its maps were found at the softmaxes named above. Look at the shapes: S has to be the "
    "number of slots, and N that of the patches."
)


def _no_maps(found: Discovery) -> str:
    wanted = (
        "a softmax over S slots in the slot attention and one over the same S in the decoder, both with more patches "
        "than slots, on the same videos and frames"
    )
    if not found.spots:
        return (
            f"This model has no slots, or normalises its maps without a softmax. Looked for: {wanted}; no softmax over "
            "an axis of a batch ran at all. Where modules return the maps, name them: --attention path:key "
            "--masks path:key."
        )
    return (
        f"No two maps over slots were found. Looked for: {wanted}. A decoder that predicts tokens one after another "
        "(STEVE, SLATE) draws no object masks. Where modules return the maps, name them: --attention path:key --masks "
        "path:key; a softmax inside a module is named softmax:path."
    )


def _candidates(found: Discovery) -> tuple[str, ...]:
    spots = [
        f"softmax of {spot.slots} on axis {spot.axis} of {spot.shape} in '{spot.path}', {spot.calls} call(s)"
        + ("" if spot.has_gradient else ", without gradient")
        for spot in found.spots
    ]
    more = (f"and {len(spots) - _LISTED} more",) if len(spots) > _LISTED else ()
    return (*spots[:_LISTED], *more)


def _line(pair: FoundPair) -> str:
    return f"attention='{pair.places[0]}' with masks='{pair.places[1]}'"


def _places(session: HostSession) -> dict[str, tuple[str, ...]]:
    """Paths of the modules that are listened to, by side."""
    if isinstance(session.adapter, PathAdapter):
        first, second = session.adapter.places
        return {"attention": (first.text,), "masks": (second.text,)}
    hooked = [
        f"{session.path}.{name}".strip(".") or "."
        for name, module in session.root.named_modules()
        if any(
            getattr(hook, "capture", None) is session.capture
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        )
    ]
    # What is inside of a named module, and the host around all of them, say nothing more.
    whole = session.path or "."
    paths = [one for one in hooked if one != whole and not _inside(one, hooked, whole)]
    masks = tuple(path for path in paths if any(word in path.lower() for word in _MASK_WORDS))
    attention = tuple(path for path in paths if path not in masks)
    return {"attention": attention or (whole,), "masks": masks or (whole,)}


def _inside(path: str, others: list[str], whole: str) -> bool:
    return any(path.startswith(f"{other}.") for other in others if other != whole)
