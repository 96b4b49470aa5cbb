"""The model section of public configurations as a host of this package."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.losses import Losses, translate_losses
from ssync_pl.tools.official.sections import Section
from ssync_pl.tools.official.vits import timm_name

__all__ = ["TranslatedModel", "translate_model"]


class TranslatedModel(NamedTuple):
    """A host and what belongs to its training.

    Attributes:
        host: `VideoSAUR`, `SlotContrast` or `DINOSAUR`.
        options: Arguments of the host.
        losses: Losses in the words of this package.
        image: Whether the host takes images.

    Example:
        >>> TranslatedModel("DINOSAUR", {"num_slots": 7}, Losses(), True).host
        'DINOSAUR'
    """

    host: str
    options: dict[str, Any]
    losses: Losses
    image: bool


def translate_model(model: Section, max_steps: int, image_size: int | None = None) -> TranslatedModel:
    """Translate a model section.

    Args:
        model: The section, references resolved.
        max_steps: Optimizer steps of the training.
        image_size: Height and width of the frames; `None` where it is not known.

    Returns:
        The host.

    Raises:
        ConfigError: A part has no counterpart, sizes contradict each other, or a loss has no counterpart.

    Example:
        >>> from ssync_pl.tools.official.sections import Findings
        >>> translate_model(Section({"input_type": "text"}, "model", Findings()), 1000)
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected model.input_type to be 'image' or 'video', but got 'text'. Hosts of \
this package take images or videos.
    """
    why = "Hosts of this package take images or videos."
    image = model.need("input_type", "image", "video", default="image", why=why) == "image"
    model.need("target_type", "features", default="features", why="Hosts of this family rebuild features.")
    for name in ("target_encoder", "target_encoder_input"):
        model.need(name, None, default=None, why="Hosts of this package rebuild the features that they attend to.")
    options = _initializer(model.section("initializer"))
    slot_dim = options["slot_dim"]
    feature_dim = _encoder(model.section("encoder"), options, slot_dim)
    _corrector(model, options, slot_dim, image)
    _predictor(model.section("predictor"), options, slot_dim, image)
    outputs, patches = _decoder(model.section("decoder"), options, slot_dim)
    losses = translate_losses(model, feature_dim, patches, max_steps)
    _check_patches(patches, options, image_size)
    _check_outputs(outputs, losses, feature_dim, patches)
    _leave_the_rest(model)
    if image:
        return _image_host(options, losses)
    options["reconstruction_weight"] = losses.reconstruction
    options["similarity_weight"] = losses.similarity
    if losses.similarity:
        options["similarity_layer"] = losses.similarity_layer
        options.update(losses.similarity_options)
    options["contrast_weight"] = losses.contrast
    if losses.contrast:
        options.update(losses.contrast_options)
    host = "SlotContrast" if losses.contrast else "VideoSAUR"
    return TranslatedModel(host, options, losses, False)


def _image_host(options: dict[str, Any], losses: Losses) -> TranslatedModel:
    if losses.similarity or losses.contrast or losses.reconstruction != 1.0:
        raise ConfigError(
            "Expected an image model whose only loss is MSELoss of weight 1, but got "
            f"weights {losses.reconstruction}, {losses.similarity} and {losses.contrast}. DINOSAUR has no others."
        )
    return TranslatedModel("DINOSAUR", options, losses, True)


def _initializer(section: Section) -> dict[str, Any]:
    why = "Slots of this package's hosts start at random or learned places."
    kind = section.need("name", "RandomInit", "FixedLearnedInit", why=why)
    return {
        "num_slots": section.integer("n_slots"),
        "slot_dim": section.integer("dim"),
        "slot_init": "gaussian" if kind == "RandomInit" else "learned",
        "slot_init_std": section.number("initial_std", None),
    }


def _encoder(section: Section, options: dict[str, Any], slot_dim: int) -> int:
    section.need("name", "FrameEncoder", default="FrameEncoder", why="There is no other encoder.")
    for name, none in (("pos_embed", None), ("spatial_flatten", False)):
        section.need(name, none, default=none, why="Hosts of this package take patch features as they are.")
    backbone = section.section("backbone")
    why = "Backbones of this package are frozen models of timm."
    backbone.need("name", "TimmExtractor", why=f"{why} SAVi's own nets are in the host SAVi.")
    backbone.need("frozen", True, default=False, why=why)
    features = backbone.take("features")
    main = section.take("main_features_key", "vit_block12")
    listed = [features] if isinstance(features, str) else features
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) for one in listed):
        raise ConfigError(f"Expected {backbone.key('features')} to be names of layers, but got {features!r}.")
    # The official encoder takes the only feature there is, and looks for the main one among several.
    options["layer"] = listed[0] if len(listed) == 1 else main
    if options["layer"] not in listed:
        raise ConfigError(f"Expected {backbone.key('features')} to hold {main!r}, but got {listed}. Add it.")
    options["backbone"] = timm_name(str(backbone.take("model")))
    if not re.search("dino|mae", options["backbone"]):
        # Those were trained with ImageNet's mean, as the official pipeline normalises frames for every backbone.
        reason = "frames are normalised as timm says for it, which may be otherwise than ImageNet's mean and deviation"
        backbone.findings.leave(backbone.key("model"), reason)
    checkpoint = backbone.take("checkpoint_path", None)
    if checkpoint is not None:
        options["backbone_checkpoint"] = str(checkpoint)
        backbone.take("pretrained", None)  # the file has the weights
    else:
        options["backbone_weights"] = "pretrained" if backbone.take("pretrained", False) else "none"
    backbone.section("model_kwargs").need(
        "dynamic_img_size", True, False, default=False, why="Backbones of this package take frames of any size."
    )
    transform = section.section("output_transform")
    if not transform.present:
        raise ConfigError("Expected model.encoder.output_transform to be a two-layer MLP, but got none.")
    why = "Hosts of this package have a two-layer MLP with layer norm between features and slot attention."
    transform.need("name", "networks.two_layer_mlp", why=why)
    norms = [transform.need(name, True, False, default=False, why=why) for name in ("layer_norm", "initial_layer_norm")]
    if not any(norms):
        raise ConfigError(f"Expected {transform.key('layer_norm')} to be true, but got false. {why}")
    feature_dim = transform.integer("inp_dim", transform.take("dim", 0))
    _check_width(transform, "outp_dim", slot_dim, transform.take("dim", None))
    _plain(transform, why, {"residual": False, "activation": "relu", "final_activation": False})
    transform.leave("only new weights would differ", "weight_init")
    options["encoder_hidden"] = transform.integer("hidden_dim", 4 * feature_dim)
    return feature_dim


def _corrector(model: Section, options: dict[str, Any], slot_dim: int, image: bool) -> None:
    section = model.section("grouper")
    why = "Slot attention of this package's hosts is of the slots' width, with a GRU."
    section.need("name", "SlotAttention", why="Hosts of this package have slot attention.")
    _check_width(section, "inp_dim", slot_dim)
    _check_width(section, "slot_dim", slot_dim)
    _plain(section, why, {"kvq_dim": slot_dim, "use_gru": True, "unif_scale": 1.0})
    iterations = section.integer("n_iters", 3)
    hidden = section.integer("hidden_dim", 4 * slot_dim)
    use_mlp = section.need("use_mlp", True, False, default=True, why=why)
    options["corrector_mlp_hidden"] = hidden if use_mlp else 0
    options["corrector_eps"] = section.number("eps", 1e-8)
    processor = model.section("latent_processor")
    if image:
        options["iterations"] = iterations
        processor.leave("image models have no such part", *processor.values)
        return
    processor.need("name", "LatentProcessor", default="LatentProcessor", why="There is no other processor.")
    processor.need("state_key", "slots", default="slots", why="Hosts of this package hand on the slots.")
    first = processor.section("first_step_corrector_args")
    options["iterations_first"] = first.integer("n_iters", iterations)
    options["iterations_later"] = iterations


def _predictor(section: Section, options: dict[str, Any], slot_dim: int, image: bool) -> None:
    if image:
        section.leave("image models have no such part", *section.values)
    elif not section.present:
        options["predictor_blocks"] = 0
    else:
        options["predictor_blocks"], options["predictor_heads"], hidden = _transformer(section, slot_dim)
        options["predictor_mlp_hidden"] = hidden


def _transformer(section: Section, dim: int) -> tuple[int, int, int]:
    why = "Transformers of this package's hosts are of the slots' width, with relu and without dropout."
    section.need("name", "networks.TransformerEncoder", "TransformerEncoder", why=why)
    _check_width(section, "dim", dim)
    wanted = {"qkv_dim": dim, "memory_dim": dim, "qkv_bias": True, "dropout": 0.0, "activation": "relu"}
    _plain(section, why, wanted)
    section.need("initial_residual_scale", None, default=None, why=why)
    return section.integer("n_blocks"), section.integer("n_heads"), section.integer("hidden_dim", 4 * dim)


def _decoder(section: Section, options: dict[str, Any], slot_dim: int) -> tuple[int, int]:
    kind = section.take("name")
    if kind not in ("MLPDecoder", "SlotMixerDecoder"):
        advice = " The host SAVi has one of its own; write its configuration by hand." if "Broadcast" in kind else ""
        raise ConfigError(
            f"Expected model.decoder.name to be MLPDecoder or SlotMixerDecoder, but got {kind!r}.{advice}"
        )
    _check_width(section, "inp_dim", slot_dim)
    section.need("eval_output_size", None, default=None, why="Decoders of this package keep their grid in evaluation.")
    outputs, patches = section.integer("outp_dim"), section.integer("n_patches")
    if kind == "MLPDecoder":
        section.need("activation", "relu", default="relu", why="Decoders of this package have relu.")
        section.take("n_slots", None)  # decoders of this package take any number
        options["decoder"], options["decoder_hidden"] = "mlp", [int(size) for size in section.take("hidden_dims")]
        return outputs, patches
    why = "Slot mixers of this package have layer norms and add the position to the mixed slots."
    _check_width(section, "embed_dim", slot_dim)
    _plain(
        section, why, {"use_layer_norms": True, "norm_memory": True, "pos_embed_mode": "add"}, missing=("norm_memory",)
    )
    section.need("temperature", None, default=None, why=why)
    section.need("output_transform", None, default=None, why=why)
    blocks, heads, hidden = _transformer(section.section("allocator"), slot_dim)
    if hidden != 4 * slot_dim:
        raise ConfigError(f"Expected model.decoder.allocator.hidden_dim to be {4 * slot_dim}, but got {hidden}.")
    renderer = section.section("renderer")
    renderer.need("name", "MLP", "networks.MLP", why=why)
    _check_width(renderer, "inp_dim", slot_dim)
    _plain(renderer, why, {"final_activation": True}, missing=())
    _plain(renderer, why, {"initial_layer_norm": False, "activation": "relu", "residual": False})
    renderer.leave("only new weights would differ", "weight_init")
    last = renderer.integer("outp_dim")
    _check_width(section, "renderer_dim", last)
    options.update(decoder="mixer", mixer_blocks=blocks, mixer_heads=heads)
    options["decoder_hidden"] = [*(int(size) for size in renderer.take("hidden_dims")), last]
    return outputs, patches


def _plain(section: Section, why: str, values: dict[str, Any], missing: tuple[str, ...] | None = None) -> None:
    """Require values; those in `missing`, by default all, may be left out."""
    for name, value in values.items():
        if missing is None or name in missing:
            section.need(name, value, default=value, why=why)
        else:
            section.need(name, value, default=False, why=why)


def _check_width(section: Section, name: str, width: int, default: Any = None) -> None:
    value = section.integer(name) if default is None else section.integer(name, default)
    if value != width:
        raise ConfigError(
            f"Expected {section.key(name)} to be {width} as its neighbour, but got {value}. Hosts of this package keep "
            "one width."
        )


def _check_patches(patches: int, options: dict[str, Any], image_size: int | None) -> None:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConfigError(f"Expected model.decoder.n_patches to be a square number, but got {patches}. Correct it.")
    options["grid"] = [side, side]
    patch = re.search(r"_patch(\d+)", options["backbone"])
    if patch and image_size is not None and image_size // int(patch[1]) != side:
        found = image_size // int(patch[1])
        raise ConfigError(
            f"Expected model.decoder.n_patches to be {found * found}, the patches of {options['backbone']} in frames "
            f"of {image_size} pixels, but got {patches}. Correct one of them."
        )


def _check_outputs(outputs: int, losses: Losses, feature_dim: int, patches: int) -> None:
    wanted = (feature_dim if losses.reconstruction else 0) + (patches if losses.similarity else 0)
    if outputs != wanted:
        raise ConfigError(
            f"Expected model.decoder.outp_dim to be {wanted}, the channels that the losses read, but got {outputs}. "
            "Decoders of this package have no channels without a loss."
        )


def _leave_the_rest(model: Section) -> None:
    for name in ("visualize_every_n_steps", "masks_to_visualize", "experiment_group", "experiment_name"):
        model.take(name, None)
    if model.take("visualize", False):
        model.findings.leave("model.visualize", "the callback SSyncPictures draws pictures")
    model.leave("masks are resized bilinearly and scored, always", "mask_resizers")
    model.leave("it belongs to the official evaluation script", "eval_mode_config")
    model.leave("convert that file by `ssync-pl checkpoint convert`", "load_weights", "modules_to_load")
    model.leave("it serves losses of SRL that this package has not", "projector", "projector2")
