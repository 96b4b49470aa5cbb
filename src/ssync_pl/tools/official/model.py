"""The model section of public configurations as a host of this package, with its losses and SSync's settings."""

from __future__ import annotations

import math
import re
from typing import Any

from ssync_pl.errors import require
from ssync_pl.tools.official.keys import Keys

__all__ = ["translate_model"]

# Where the hosts of this package have only one of what the official code has. Keys without a value have these values.
_FIXED = {
    "model.target_type": "features",
    "model.initializer.name": ("RandomInit", "FixedLearnedInit"),
    "model.encoder.name": "FrameEncoder",
    "model.encoder.spatial_flatten": False,
    "model.encoder.backbone.name": "TimmExtractor",
    "model.encoder.backbone.frozen": True,
    "model.encoder.backbone.model_kwargs.dynamic_img_size": (True, False),
    "model.encoder.output_transform.name": "networks.two_layer_mlp",
    "model.encoder.output_transform.final_activation": False,
    "model.grouper.name": "SlotAttention",
    "model.grouper.use_gru": True,
    "model.grouper.unif_scale": 1.0,
    "model.latent_processor.name": "LatentProcessor",
    "model.latent_processor.state_key": "slots",
    "model.predictor.name": ("networks.TransformerEncoder", "TransformerEncoder"),
    "model.decoder.name": ("MLPDecoder", "SlotMixerDecoder"),
    "model.decoder.allocator.name": ("networks.TransformerEncoder", "TransformerEncoder"),
    "model.decoder.renderer.name": ("MLP", "networks.MLP"),
    "model.decoder.renderer.initial_layer_norm": False,
    "model.decoder.renderer.final_activation": True,
    "model.decoder.norm_memory": True,
    "model.decoder.use_layer_norms": True,
    "model.decoder.pos_embed_mode": "add",
    "model.*.activation": "relu",
    "model.*.residual": False,
    "model.*.qkv_bias": True,
    "model.*.dropout": 0.0,
}
_OF_SLOT_WIDTH = (
    *("encoder.output_transform.outp_dim", "grouper.inp_dim", "grouper.slot_dim", "grouper.kvq_dim", "predictor.dim"),
    *("decoder.inp_dim", "decoder.embed_dim", "decoder.allocator.dim", "decoder.renderer.inp_dim"),
    *("*.qkv_dim", "*.memory_dim"),
)
_NOT_TRANSLATED = {
    "model.visualize_every_n_steps": "",
    "model.masks_to_visualize*": "",
    "model.experiment_*": "",
    "model.decoder.n_slots": "",  # decoders of this package take any number
    "model.*.weight_init": "only new weights would differ",
    "model.mask_resizers*": "masks are resized bilinearly and scored, always",
    "model.eval_mode_config*": "it belongs to the official evaluation script",
    "model.load_weights": "name that file by --ckpt_path",
    "model.modules_to_load*": "name that file by --ckpt_path",
    "model.projector*": "it serves losses of SRL that this package has not",
}
_TAGS = {"dino": "dino", "mae": "mae", "dinov2": "lvd142m"}
_FEATURES = "encoder.backbone_features"
_SRL = ("DECConsLoss", "ENCConsLoss", "Slot_Redundancy_Loss")
_CONTRAST, _IMAGE_CONTRAST = "Slot_Slot_Contrastive_Loss", "Img_Slot_Slot_Contrastive_Loss"
_TARGETS = {"dec_bd_preds": "grp_bd_labels", "grp_nbd_preds": "dec_nbd_labels"}
_SIDES = {"dec_bd_preds": "boundary_weight", "grp_nbd_preds": "interior_weight"}


def translate_model(keys: Keys, max_steps: int, clip_length: int) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """Translates the model section; refuses what the hosts of this package do not have.

    Returns the class name of a host, its arguments, and settings of `SSyncCallback`: None in a file without SSync.
    """
    image = keys.choose("model.input_type", "image", "video", default="image") == "image"
    slot_dim = keys.integer("model.initializer.dim")
    for pattern, reason in _NOT_TRANSLATED.items():
        keys.skip(pattern, reason)
    if keys.take("model.visualize", False):
        keys.skip("model.visualize", "the callback SSyncPictures draws pictures")
    if image:
        for part in ("latent_processor", "predictor"):
            keys.skip(f"model.{part}.*", "image models have no such part")
    keys.check(_FIXED | {f"model.{name}": slot_dim for name in _OF_SLOT_WIDTH})
    options: dict[str, Any] = {
        "num_slots": keys.integer("model.initializer.n_slots"),
        "slot_dim": slot_dim,
        "slot_init": "gaussian" if keys.take("model.initializer.name") == "RandomInit" else "learned",
        "slot_init_std": keys.number("model.initializer.initial_std", None),
    }
    feature_dim = _encoder(keys, options, slot_dim)
    hidden = keys.integer("model.grouper.hidden_dim", 4 * slot_dim)
    options["corrector_mlp_hidden"] = hidden if keys.choose("model.grouper.use_mlp", True, False, default=True) else 0
    options["corrector_eps"] = keys.number("model.grouper.eps", 1e-8)
    iterations = keys.integer("model.grouper.n_iters", 3)
    if image:
        options["iterations"] = iterations
    else:
        first = keys.integer("model.latent_processor.first_step_corrector_args.n_iters", iterations)
        options |= {"iterations_first": first, "iterations_later": iterations, "predictor_blocks": 0}
    if keys.below("model.predictor") and not image:
        options["predictor_blocks"] = keys.integer("model.predictor.n_blocks")
        options["predictor_heads"] = keys.integer("model.predictor.n_heads")
        options["predictor_mlp_hidden"] = keys.integer("model.predictor.hidden_dim", 4 * slot_dim)
    _decoder(keys, options, slot_dim)
    patches, outputs = keys.integer("model.decoder.n_patches"), keys.integer("model.decoder.outp_dim")
    side = math.isqrt(patches)
    require(side * side == patches, "model.decoder.n_patches to be a square number", patches)
    options["grid"] = [side, side]
    weights, more, ssync = _losses(keys, feature_dim, patches, clip_length, max_steps)
    read = feature_dim * (weights["reconstruction"] != 0.0) + patches * (weights["similarity"] != 0.0)
    require(outputs == read, f"model.decoder.outp_dim to be {read}, the channels that the losses read", outputs)
    if image:
        alone = weights == {"reconstruction": 1.0, "similarity": 0.0, "contrast": 0.0}
        require(alone, "an image model whose only loss is MSELoss of weight 1, as DINOSAUR has no others", weights)
        return "DINOSAUR", options, ssync
    options |= {f"{kind}_weight": weight for kind, weight in weights.items()} | more
    return "SlotContrast" if weights["contrast"] else "VideoSAUR", options, ssync


def _encoder(keys: Keys, options: dict[str, Any], slot_dim: int) -> int:
    """Options of the backbone and of the MLP behind it; returns the channels of a feature."""
    backbone, transform = "model.encoder.backbone", "model.encoder.output_transform"
    features, main = keys.take(f"{backbone}.features"), keys.take("model.encoder.main_features_key", "vit_block12")
    listed = features if isinstance(features, list) else [features]
    # The official encoder takes the only feature there is, and looks for the main one among several.
    options["layer"] = listed[0] if len(listed) == 1 else main
    known = options["layer"] in listed and all(isinstance(one, str) for one in listed)
    require(known, f"{backbone}.features to be names of layers, {main!r} among them", listed)
    name = str(keys.take(f"{backbone}.model"))
    head, _, ending = name.rpartition("_")
    options["backbone"] = f"{name if ending == 'dinov2' else head}.{_TAGS[ending]}" if ending in _TAGS else name
    if not re.search("dino|mae", name):
        # Those were trained with ImageNet's mean, as the official pipeline normalises frames for every backbone.
        reason = "frames are normalised as timm says for it, which may be otherwise than ImageNet's mean and deviation"
        keys.skip(f"{backbone}.model", reason)
    keys.take(f"{backbone}.frozen")
    checkpoint, pretrained = keys.take(f"{backbone}.checkpoint_path", None), keys.take(f"{backbone}.pretrained", False)
    if checkpoint is not None:
        options["backbone_checkpoint"] = str(checkpoint)
    else:
        options["backbone_weights"] = "pretrained" if pretrained else "none"
    keys.take(f"{transform}.name")
    norms = [keys.choose(f"{transform}.{name}layer_norm", True, False, default=False) for name in ("", "initial_")]
    require(any(norms), f"{transform}.layer_norm to be true, as in the hosts of this package", "false")
    width = keys.take(f"{transform}.dim", None)
    keys.choose(f"{transform}.outp_dim", slot_dim, default=width)
    feature_dim = int(keys.integer(f"{transform}.inp_dim", width or 0))
    options["encoder_hidden"] = keys.integer(f"{transform}.hidden_dim", 4 * feature_dim)
    return feature_dim


def _decoder(keys: Keys, options: dict[str, Any], slot_dim: int) -> None:
    decoder, allocator, renderer = (f"model.decoder{part}" for part in ("", ".allocator", ".renderer"))
    mixes = keys.take(f"{decoder}.name") == "SlotMixerDecoder"
    layers = keys.take(f"{renderer if mixes else decoder}.hidden_dims")
    known = isinstance(layers, list) and all(type(size) is int for size in layers)
    require(known, f"hidden_dims of {decoder} to be a list of whole numbers", repr(layers))
    options.update(decoder="mixer" if mixes else "mlp", decoder_hidden=layers)
    if mixes:
        for key in (f"{decoder}.use_layer_norms", f"{decoder}.pos_embed_mode", f"{renderer}.final_activation"):
            keys.take(key)
        last = keys.integer(f"{renderer}.outp_dim")
        keys.choose(f"{decoder}.renderer_dim", last)
        keys.choose(f"{allocator}.hidden_dim", 4 * slot_dim, default=4 * slot_dim)
        options["decoder_hidden"] = [*layers, last]
        options["mixer_blocks"] = keys.integer(f"{allocator}.n_blocks")
        options["mixer_heads"] = keys.integer(f"{allocator}.n_heads")


def _losses(
    keys: Keys, feature_dim: int, patches: int, clip_length: int, max_steps: int
) -> tuple[dict[str, float], dict[str, Any], dict[str, Any] | None]:
    """Weights of the host's losses, their options, and SSync's settings."""
    names, weighted = keys.below("model.losses"), keys.below("model.loss_weights")
    same = not weighted or not names or set(weighted) == set(names)
    require(same, f"model.loss_weights to name the losses {sorted(names)}", sorted(weighted))
    weights = {"reconstruction": 0.0 if names else 1.0, "similarity": 0.0, "contrast": 0.0}
    options: dict[str, Any] = {}
    distilled: dict[str, tuple[float, float]] = {}
    for name in names:
        loss, found = f"model.losses.{name}", ""
        weight = keys.number(f"model.loss_weights.{name}") if weighted else 1.0
        known = ("MSELoss", "CrossEntropyLoss", "MSECLSLoss", _CONTRAST, _IMAGE_CONTRAST, *_SRL)
        kind = keys.choose(f"{loss}.name", *known) if weight else _SRL[0]
        if kind in _SRL:
            keys.skip(f"{loss}.*")
            if weight:
                keys.left_out[loss] = f"a loss of SRL ({kind}) that this package has not: the host trains without"
        elif kind == "MSECLSLoss":
            compared = keys.choose(f"{loss}.pred_key", *_TARGETS)
            keys.choose(f"{loss}.target_key", _TARGETS[compared])
            distilled[_SIDES[compared]] = weight, keys.number(f"{loss}.temperature", 1.0)
        elif kind == "MSELoss":
            found, dims = "reconstruction", [0, feature_dim]
            keys.choose(f"{loss}.pred_dims", dims, default=dims)
            keys.check({f"{loss}.pred_key": "decoder.reconstruction", f"{loss}.target_key": _FEATURES})
        elif kind == "CrossEntropyLoss":
            found = "similarity"
            keys.choose(f"{loss}.pred_dims", [feature_dim, feature_dim + patches], [0, patches])
            options |= _similarity(keys, loss)
        else:
            found = "contrast"
            for key, value in (("pred_key", "processor.state"), ("patch_inputs", False), ("keep_input_dim", True)):
                keys.choose(f"{loss}.{key}", value)
            keys.skip(f"{loss}.target_key")
            options["contrast_temperature"] = keys.number(f"{loss}.temperature", 0.1)
            across = keys.choose(f"{loss}.batch_contrast", True, False, default=True)
            options["contrast_across_batch"] = across
            if keys.below("model.projector"):  # only SRL has one
                keys.left_out[loss] = "the contrast is SlotContrast's; SRL's of the same name is symmetric"
            if kind == _IMAGE_CONTRAST:
                require(clip_length == 1, f"clips of one frame with {kind}", f"{clip_length} frames")
                keys.left_out[loss] = "for clips of one frame it is 0 and has no gradient"
                options["contrast_weight"] = 0.0
        if found:
            require(weights[found] == 0.0, f"one loss of the kind of {loss}", "a second", advice="Leave one out.")
            weights[found] = weight
    return weights, options, _ssync(keys, distilled, max_steps)


def _similarity(keys: Keys, loss: str) -> dict[str, Any]:
    transform = f"{loss}.target_transform"
    keys.check({f"{loss}.pred_key": "decoder.reconstruction"})
    target = str(keys.take(f"{loss}.target_key", _FEATURES))
    layer = re.fullmatch(r"encoder\.(vit_(?:block|block_keys)\d+|vit_output)", target)
    require(target == _FEATURES or layer is not None, f"{loss}.target_key to be a layer of the encoder", repr(target))
    keys.choose(f"{transform}.name", "utils.FeatureTimeSimilarity")
    keys.choose(f"{transform}.softmax", True)
    keys.check({f"{transform}.normalize": True, f"{transform}.mask_diagonal": False})
    shift = keys.integer(f"{transform}.time_shift", 1)
    keys.choose(f"{loss}.remove_last_n_frames", shift, default=0)
    return {
        "similarity_layer": layer[1] if layer else None,
        "similarity_temperature": keys.number(f"{transform}.temperature", 1.0),
        "similarity_threshold": keys.number(f"{transform}.threshold", None),
        "similarity_shift": shift,
    }


def _ssync(keys: Keys, distilled: dict[str, tuple[float, float]], max_steps: int) -> dict[str, Any] | None:
    settings: dict[str, Any] = {
        "merge_threshold": keys.number("model.merge_iou_threshold", 0.6),
        "n_bd": keys.integer("model.dif_n_bd", 1),
        "n_nbd": keys.integer("model.dif_n_nbd", 1),
        "n_noise": keys.integer("model.dif_n_bd_noise", 1),
        **{side: distilled.get(side, (0.0,))[0] for side in _SIDES.values()},
    }
    ratio, steps = keys.number("model.synergistic_warmup_ratio", 0.3), keys.integer("model.max_steps", 100_000)
    if not distilled:
        return None
    temperatures = {temperature for _, temperature in distilled.values()}
    require(len(temperatures) == 1, "one temperature for both losses of SSync", *sorted(temperatures))
    settings["temperature"] = temperatures.pop()
    # The official code counts the warm-up in steps of its own `max_steps`.
    return settings | ({"warmup_ratio": ratio} if steps == max_steps else {"warmup_steps": math.ceil(ratio * steps)})
