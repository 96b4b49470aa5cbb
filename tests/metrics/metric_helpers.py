from collections.abc import Callable

import torch
from torch import Tensor

from ssync_pl import metrics
from ssync_pl.metrics import functional
from ssync_pl.metrics.functional import contingency, read_scene

# Class and function of each score, and whether its items are videos or frames
CLASSES: dict[str, tuple[type[metrics.MaskMetric], Callable[..., Tensor], str]] = {
    "video_fg_ari": (metrics.VideoARI, functional.adjusted_rand_index, "video"),
    "image_fg_ari": (metrics.ImageARI, functional.adjusted_rand_index, "image"),
    "video_mbo": (metrics.VideoMBO, functional.mean_best_overlap, "video"),
    "image_mbo": (metrics.ImageMBO, functional.mean_best_overlap, "image"),
    "video_miou": (metrics.VideoMIoU, functional.mean_iou, "video"),
    "image_miou": (metrics.ImageMIoU, functional.mean_iou, "image"),
    "slots_per_object": (metrics.SlotsPerObject, functional.slots_per_object, "video"),
    "identity": (metrics.SlotIdentity, functional.slot_identity, "image"),
}


def items(function, pred, true, valid=None, *, level="video", background=False, overlaps=False, **options):
    counts = contingency(read_scene(pred, true, valid), background, overlaps)
    counts = counts.foreground() if background else counts
    return function(counts.videos() if level == "video" else counts, **options)


def random_scene() -> tuple[Tensor, Tensor]:
    """Labels (3, 4, 16, 16) of 5 slots that loosely follow true masks (3, 4, 4, 16, 16), channel 0 = background."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 4, (3, 4, 4, 4), generator=generator)
    truth = blocks.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randint(0, 5, truth.shape, generator=generator)
    pred = torch.where(torch.rand(truth.shape, generator=generator) < 0.4, noise, truth)
    return pred, truth.unsqueeze(2) == torch.arange(4)[:, None, None]


SCENE = random_scene()


def scores_of(videos: slice) -> dict[str, float]:
    pred, true = (part[videos] for part in SCENE)
    masks = torch.nn.functional.one_hot(pred, 7).movedim(-1, 2).float()
    everything, single = metrics.SegmentationMetrics(scores=metrics.metric_names()), metrics.VideoMIoU()
    everything.update(masks, true)
    single.update(pred, true)
    return {name: float(value) for name, value in {**everything.compute(), "single": single.compute()}.items()}
