"""Specs of the SAVi family: this package's host, and SOLD, SlotFormer, Genera1Z's and junkeun-yi's code."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ssync_pl.adapters.base import register_adapter
from ssync_pl.adapters.calls import MapCall, check_close, watch_softmax
from ssync_pl.adapters.capture import NAME_THEM, Capture, output_entry
from ssync_pl.adapters.grids import Grid
from ssync_pl.adapters.slot_model import SlotModelAdapter
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps


@register_adapter
class SaviAdapter(SlotModelAdapter):
    """`ssync_pl.hosts.SAVi` and its subclasses: the corrector returns ``logits``, the decoder ``mask_logits``."""

    name: ClassVar[str] = "savi"
    modules = "encoder corrector decoder"
    attention, decoder, features = "corrector", "decoder", "encoder"

    def match(self, host: nn.Module) -> bool:
        kinds = [cls for cls in type(host).__mro__ if cls.__module__.startswith("ssync_pl.hosts")]
        return any(cls.__name__ == "SAVi" for cls in kinds) and super().match(host)

    @staticmethod
    def feature_grid(module: nn.Module, args: tuple[Any, ...], output: Any) -> Grid:
        return output[1]

    def listen(self, host: Any, capture: Capture) -> None:
        capture.watch("corrector", host.corrector, lambda module, args, output: MapCall(output.logits))
        capture.watch("decoder", host.decoder, lambda module, args, output: MapCall(output.mask_logits, axis=2))


@register_adapter
class SoldAdapter(SlotModelAdapter):
    """The autoencoder ``SAVi`` of SOLD, in the LightningModule that trains it.

    SOLD's second stage optimizes by hand, which `SSyncCallback` refuses: train the autoencoder with SSync in the first.

    Source: SOLD (arXiv 2410.08822), SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "sold"
    modules = "encoder.encoder initializer predictor corrector.to_q decoder.encoder decoder.positional_embedding"
    attributes = "corrector.scale corrector.epsilon"
    attention, decoder, features = "corrector", "decoder", "encoder.encoder"

    def listen(self, host: Any, capture: Capture) -> None:
        watch_softmax(capture, "corrector", host.corrector)
        watch_softmax(capture, "decoder", host.decoder, axis=None)


@register_adapter
class SlotFormerAdapter(SlotModelAdapter):
    """``StoSAVi`` of SlotFormer, with sampled or fixed kernels, from which SlotFormer's slots come.

    Its trainer calls the model or, with ``nerv`` before 0.4, its ``loss_function``; both work.

    Source: SlotFormer (arXiv 2210.05861), SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "slotformer"
    modules = "encoder encoder_pos_embedding slot_attention.project_q decoder decoder_pos_embedding"
    attributes = "slot_attention.attn_scale slot_attention.eps"
    attention, decoder, features = "slot_attention", "decoder", "encoder"

    def listen(self, host: Any, capture: Capture) -> None:
        watch_softmax(capture, "slot_attention", host.slot_attention, axis=-1)
        capture.watch("decoder", host.decoder, lambda module, args, output: MapCall(output[:, -1], axis=0))
        capture.watch("output", host, lambda module, args, output: output_entry(output, "post_masks"), optional=True)

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        super().verify(capture, maps)
        masks = capture.last("output")
        if masks is not None and masks.ndim == 6:
            probs = capture.only("decoder").logits.detach().double().reshape(masks.shape).softmax(2)
            check_close(probs, masks, "'post_masks'", "the softmax over slots of the decoder's alpha")


@register_adapter
class Genera1zSaviAdapter(SlotModelAdapter):
    """``Savi`` of Genera1Z's SAVi-PyTorch, alone or inside its ``ModelHelper``.

    Note:
        Slots that start from boxes of zeros are equal up to rounding: keep merging on.

    Source: https://github.com/Genera1Z/SAVi-PyTorch, SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "genera1z-savi"
    modules = "encoder.backbone processor.correct.proj_q processor.predict decoder.backbone decoder.readout"
    attention, decoder, features = "processor.correct", "decoder.readout", "encoder.backbone"

    def listen(self, host: Any, capture: Capture) -> None:
        watch_softmax(capture, self.attention, host.processor.correct)
        capture.watch(self.decoder, host.decoder.readout, _four_channels)
        capture.watch("colours", host.decoder.readout, lambda module, args, output: output[:, :3])
        capture.watch("output", host, lambda module, args, output: output_entry(output, "0"), optional=True)

    def verify(self, capture: Capture, maps: SSyncMaps) -> None:
        super().verify(capture, maps)
        picture = capture.last("output")
        if picture is None or picture.ndim != 5:
            return
        slots = capture[self.attention][0].logits.shape[1]
        parts = (capture.only(self.decoder).logits, capture.only("colours"))
        alpha, colours = (part.detach().float().unflatten(0, (-1, slots)) for part in parts)
        mine = (alpha.softmax(1)[:, :, None] * colours).sum(1).reshape(picture.shape)
        expected = "the sum of what the slots draw, weighted by the softmax over slots of the fourth channel"
        check_close(mine, picture, "reconstruction", expected, scale=float(colours.abs().max()))


@register_adapter
class JunkeunYiSaviAdapter(SlotModelAdapter):
    """``SAVi`` of junkeun-yi's SAVi-pytorch, after the JAX original, with one or several heads.

    With ``decode_predicted``, only the masks of the corrected slots count. The host's loss is a sum over pixels, in the
    thousands, beside which SSync's is nothing: give ``relative_weight``.

    Source: https://github.com/junkeun-yi/SAVi-pytorch, SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "junkeun-yi-savi"
    modules = "encoder corrector.dense_q corrector.inverted_attention.attn_fn processor.corrector decoder.mask_pred"
    attention, decoder, features = "corrector", "decoder", "encoder"
    decoder_calls = "first"

    def match(self, host: nn.Module) -> bool:
        return super().match(host) and host.processor.corrector is host.corrector  # type: ignore[union-attr]

    @staticmethod
    def feature_grid(module: nn.Module, args: tuple[Any, ...], output: Any) -> Grid:
        return int(output.shape[-3]), int(output.shape[-2])  # channels last

    def listen(self, host: Any, capture: Capture) -> None:
        if not getattr(host, "decode_corrected", True):
            raise HostError(
                f"Expected {type(host).__name__} to decode the corrected slots, but decode_corrected is False. Set it "
                "to True, since masks of predicted slots show the next frame."
            )
        watch_softmax(capture, "corrector", host.corrector)
        watch_softmax(capture, "decoder", host.decoder, axis=None)


def _four_channels(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> MapCall:
    if output.shape[1] != 4:
        raise HostError(f"Expected decoder.readout to give 3 colours and alpha, but got {output.shape[1]}. {NAME_THEM}")
    return MapCall(output[:, 3], axis=0)
