"""The model section of public configurations as a host of this package."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.losses import Losses, translate_losses
from ssync_pl.tools.official.references import timm_name
from ssync_pl.tools.official.sections import Section

__all__ = ["TranslatedModel", "translate_model"]


class TranslatedModel(NamedTuple):
    """Class name of a host, its arguments, and the losses of its training."""

    host: str
    options: dict[str, Any]
    losses: Losses


def translate_model(model: Section, max_steps: int, image_size: int | None = None) -> TranslatedModel:
    """Translates a model section.

    Args:
        model: The section, references resolved.
        max_steps: Optimizer steps of the training.
        image_size: Height and width of the frames in pixels; `None` where it is not known.

    Raises:
        ConfigError: A part or a loss has no counterpart, or sizes contradict each other.
    """
    why = "Hosts of this package take images or videos."
    image = model.need("input_type", "image", "video", default="image", why=why) == "image"
    why = "Hosts of this package rebuild the features that they attend to."
    model.fixed("Hosts of this package rebuild features.", target_type="features")
    model.fixed(why, target_encoder=None, target_encoder_input=None)
    slots = model.section("initializer")
    why = "Slots of this package's hosts start at random or learned places."
    random = slots.need("name", "RandomInit", "FixedLearnedInit", why=why) == "RandomInit"
    slot_dim = slots.integer("dim")
    options: dict[str, Any] = {
        "num_slots": slots.integer("n_slots"),
        "slot_dim": slot_dim,
        "slot_init": "gaussian" if random else "learned",
        "slot_init_std": slots.number("initial_std", None),
    }
    feature_dim = _encoder(model.section("encoder"), options, slot_dim)
    _corrector(model, options, slot_dim, image)
    predictor = model.section("predictor")
    if image:
        predictor.leave("image models have no such part", *predictor.values)
    elif not predictor.present:
        options["predictor_blocks"] = 0
    else:
        names = ("predictor_blocks", "predictor_heads", "predictor_mlp_hidden")
        options.update(zip(names, _transformer(predictor, slot_dim), strict=True))
    outputs, patches = _decoder(model.section("decoder"), options, slot_dim)
    losses = translate_losses(model, feature_dim, patches, max_steps)
    _check_sizes(options, losses, image_size, (outputs, patches, feature_dim))
    model.skip("visualize_every_n_steps", "masks_to_visualize", "experiment_group", "experiment_name")
    if model.take("visualize", False):
        model.leave("the callback SSyncPictures draws pictures", "visualize")
    model.leave("masks are resized bilinearly and scored, always", "mask_resizers")
    model.leave("it belongs to the official evaluation script", "eval_mode_config")
    model.leave("convert that file by `ssync-pl checkpoint convert`", "load_weights", "modules_to_load")
    model.leave("it serves losses of SRL that this package has not", "projector", "projector2")
    weights = losses.weights
    if image:
        if weights != {"reconstruction": 1.0, "similarity": 0.0, "contrast": 0.0}:
            raise ConfigError(
                f"Expected an image model whose only loss is MSELoss of weight 1, but got {weights}. DINOSAUR has no "
                "others."
            )
        return TranslatedModel("DINOSAUR", options, losses)
    options.update({f"{kind}_weight": weights[kind] for kind in ("reconstruction", "similarity", "contrast")})
    options.update(losses.similarity | losses.contrast)
    return TranslatedModel("SlotContrast" if weights["contrast"] else "VideoSAUR", options, losses)


def _encoder(section: Section, options: dict[str, Any], slot_dim: int) -> int:
    why = "Hosts of this package take patch features as they are."
    section.fixed(why, name="FrameEncoder", pos_embed=None, spatial_flatten=False)
    backbone = section.section("backbone")
    why = "Backbones of this package are frozen models of timm."
    backbone.need("name", "TimmExtractor", why=f"{why} SAVi's own nets are in the host SAVi.")
    backbone.need("frozen", True, default=False, why=why)
    features, main = backbone.take("features"), section.take("main_features_key", "vit_block12")
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
        backbone.leave(reason, "model")
    checkpoint, pretrained = backbone.take("checkpoint_path", None), backbone.take("pretrained", False)
    if checkpoint is not None:
        options["backbone_checkpoint"] = str(checkpoint)
    else:
        options["backbone_weights"] = "pretrained" if pretrained else "none"
    why = "Backbones of this package take frames of any size."
    backbone.section("model_kwargs").need("dynamic_img_size", True, False, default=False, why=why)
    transform = section.section("output_transform")
    if not transform.present:
        raise ConfigError("Expected model.encoder.output_transform to be a two-layer MLP, but got none.")
    why = "Hosts of this package have a two-layer MLP with layer norm between features and slot attention."
    transform.need("name", "networks.two_layer_mlp", why=why)
    norms = [transform.need(name, True, False, default=False, why=why) for name in ("layer_norm", "initial_layer_norm")]
    if not any(norms):
        raise ConfigError(f"Expected {transform.key('layer_norm')} to be true, but got false. {why}")
    feature_dim = transform.integer("inp_dim", transform.take("dim", 0))
    _same_width(transform, "outp_dim", slot_dim, transform.take("dim", None))
    transform.fixed(why, residual=False, activation="relu", final_activation=False)
    transform.leave("only new weights would differ", "weight_init")
    options["encoder_hidden"] = transform.integer("hidden_dim", 4 * feature_dim)
    return feature_dim


def _corrector(model: Section, options: dict[str, Any], slot_dim: int, image: bool) -> None:
    section = model.section("grouper")
    why = "Slot attention of this package's hosts is of the slots' width, with a GRU."
    section.need("name", "SlotAttention", why="Hosts of this package have slot attention.")
    _same_width(section, "inp_dim", slot_dim)
    _same_width(section, "slot_dim", slot_dim)
    section.fixed(why, kvq_dim=slot_dim, use_gru=True, unif_scale=1.0)
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
    processor.fixed("Hosts of this package hand on the slots.", name="LatentProcessor", state_key="slots")
    first = processor.section("first_step_corrector_args")
    options["iterations_first"] = first.integer("n_iters", iterations)
    options["iterations_later"] = iterations


def _transformer(section: Section, dim: int) -> tuple[int, int, int]:
    why = "Transformers of this package's hosts are of the slots' width, with relu and without dropout."
    section.need("name", "networks.TransformerEncoder", "TransformerEncoder", why=why)
    _same_width(section, "dim", dim)
    section.fixed(why, qkv_dim=dim, memory_dim=dim, qkv_bias=True, dropout=0.0, activation="relu")
    section.fixed(why, initial_residual_scale=None)
    return section.integer("n_blocks"), section.integer("n_heads"), section.integer("hidden_dim", 4 * dim)


def _decoder(section: Section, options: dict[str, Any], slot_dim: int) -> tuple[int, int]:
    kind = section.take("name")
    if kind not in ("MLPDecoder", "SlotMixerDecoder"):
        advice = " The host SAVi has one of its own; write its configuration by hand." if "Broadcast" in kind else ""
        raise ConfigError(
            f"Expected model.decoder.name to be MLPDecoder or SlotMixerDecoder, but got {kind!r}.{advice}"
        )
    _same_width(section, "inp_dim", slot_dim)
    section.fixed("Decoders of this package keep their grid in evaluation.", eval_output_size=None)
    outputs, patches = section.integer("outp_dim"), section.integer("n_patches")
    if kind == "MLPDecoder":
        section.fixed("Decoders of this package have relu.", activation="relu")
        section.skip("n_slots")  # decoders of this package take any number
        options.update(decoder="mlp", decoder_hidden=section.integers("hidden_dims"))
        return outputs, patches
    why = "Slot mixers of this package have layer norms and add the position to the mixed slots."
    _same_width(section, "embed_dim", slot_dim)
    section.need("use_layer_norms", True, default=False, why=why)
    section.need("pos_embed_mode", "add", default=False, why=why)
    section.fixed(why, norm_memory=True, temperature=None, output_transform=None)
    blocks, heads, hidden = _transformer(section.section("allocator"), slot_dim)
    if hidden != 4 * slot_dim:
        raise ConfigError(f"Expected model.decoder.allocator.hidden_dim to be {4 * slot_dim}, but got {hidden}.")
    renderer = section.section("renderer")
    renderer.need("name", "MLP", "networks.MLP", why=why)
    _same_width(renderer, "inp_dim", slot_dim)
    renderer.need("final_activation", True, default=False, why=why)
    renderer.fixed(why, initial_layer_norm=False, activation="relu", residual=False)
    renderer.leave("only new weights would differ", "weight_init")
    last = renderer.integer("outp_dim")
    _same_width(section, "renderer_dim", last)
    layers = [*renderer.integers("hidden_dims"), last]
    options.update(decoder="mixer", mixer_blocks=blocks, mixer_heads=heads, decoder_hidden=layers)
    return outputs, patches


def _same_width(section: Section, name: str, width: int, default: Any = None) -> None:
    value = section.integer(name) if default is None else section.integer(name, default)
    if value != width:
        raise ConfigError(
            f"Expected {section.key(name)} to be {width} as its neighbour, but got {value}. Hosts of this package keep "
            "one width."
        )


def _check_sizes(options: dict[str, Any], losses: Losses, image_size: int | None, sizes: tuple[int, int, int]) -> None:
    outputs, patches, feature_dim = sizes
    side = math.isqrt(patches)
    if side * side != patches:
        raise ConfigError(f"Expected model.decoder.n_patches to be a square number, but got {patches}. Correct it.")
    options["grid"] = [side, side]
    patch = re.search(r"_patch(\d+)", options["backbone"])
    if patch and image_size is not None and image_size // int(patch[1]) != side:
        raise ConfigError(
            f"Expected model.decoder.n_patches to be {(image_size // int(patch[1])) ** 2}, the patches of "
            f"{options['backbone']} in frames of {image_size} pixels, but got {patches}. Correct one of them."
        )
    wanted = (feature_dim if losses.weights["reconstruction"] else 0) + (patches if losses.weights["similarity"] else 0)
    if outputs != wanted:
        raise ConfigError(
            f"Expected model.decoder.outp_dim to be {wanted}, the channels that the losses read, but got {outputs}. "
            "Decoders of this package have no channels without a loss."
        )
