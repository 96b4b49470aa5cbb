import copy
import warnings
from collections.abc import Callable
from typing import Any

import feature_hosts as fh
import pytest
import savi_hosts as sh
import torch
from host_table import hear, own_maps
from savi_hosts import PackageAttention, PackageHost
from stand_in_parts import DIM, FRAME, GRID, B, N, S, T, forget, parts
from torch import Tensor, nn

from ssync_pl import attach, ssync_loss
from ssync_pl.adapters import HostAdapter, locate
from ssync_pl.adapters.autoregressive import AutoregressiveAdapter
from ssync_pl.adapters.oclf import OclfAdapter
from ssync_pl.adapters.randsfq import RandSFQAdapter
from ssync_pl.adapters.savi import Genera1zSaviAdapter, JunkeunYiSaviAdapter
from ssync_pl.adapters.slot_attention_package import SlotAttentionPackageAdapter
from ssync_pl.adapters.videosaur import VideosaurAdapter
from ssync_pl.errors import ConfigError, HostError


def without(host: Any, side: int, part: str) -> Any:
    delattr(parts(host)[side], part)
    return host


def altered(host: Any, path: str, **parts: Any) -> Any:
    for name, part in parts.items():
        setattr(host.get_submodule(path), name, part)
    return host


def giving(host: Any, path: str, change: Callable[[Any], Any]) -> Any:
    host.get_submodule(path).register_forward_hook(lambda module, args, output: change(output))
    return host


class GrowingAttention(PackageAttention):
    def forward(self, inputs: Tensor, num_slots: int = S) -> Tensor:
        return super().forward(inputs, 2 + len(self.own_logits))


class OnceForAll(PackageHost):
    def forward(self, video: Tensor) -> Tensor:
        return self.decoder(torch.cat([self.slot_attn(frame) for frame in self.features(video).unbind(1)]))


CODES = nn.ModuleDict({"slot_attention": PackageAttention(), "vq": nn.Identity()})  # packs slots to the front
TWO_PACKAGES = nn.ModuleDict({"a": PackageAttention(), "b": PackageAttention()})
NAMED = {"masks": "decoder", "alpha_axis": 1}
Package = SlotAttentionPackageAdapter


@pytest.mark.parametrize(
    ("adapter", "host"),
    [
        (VideosaurAdapter, lambda: without(fh.VideosaurHost(), 0, "scale")),
        (VideosaurAdapter, lambda: fh.VideosaurHost(nn.Identity())),
        (OclfAdapter, lambda: without(fh.OclfHost(), 0, "n_heads")),
        (OclfAdapter, lambda: fh.OclfHost(nn.Linear(1, 1))),
        (JunkeunYiSaviAdapter, lambda: altered(sh.JunkeunYiHost(), "processor", corrector=nn.Linear(1, 1))),
        (RandSFQAdapter, lambda: nn.Sequential(fh.Aggregat())),
        (AutoregressiveAdapter, lambda: sh.TokenHost("elsewhere", "decoder")),  # tokens, but slots come from a file
        (Package, lambda: TWO_PACKAGES),
        (lambda: Package(masks="nowhere"), PackageHost),
        (lambda: Package(attention="encoder"), PackageHost),
    ],
)
def test_hosts_that_lack_a_part_are_another_host(adapter: Callable[[], HostAdapter], host: Callable[[], Any]) -> None:
    assert not adapter().match(host())
    with pytest.raises(HostError, match=r"Expected (.* to have|a host).*Name (the modules yourself|both maps)"):
        adapter().attach(host())


def test_places_and_grids_of_adapters_are_checked() -> None:
    for adapter in (VideosaurAdapter, OclfAdapter, Package):
        for grid in ((3,), (0, 4), (2.5, 4), "ab"):
            with pytest.raises(ConfigError, match=r"`grid` to be .* two positive integers"):
                adapter(grid=grid)
    assert Package(attention="b").match(TWO_PACKAGES)
    with pytest.raises(ConfigError, match="`alpha_axis` only with the output of a module"):
        Package(alpha_axis=1)


def test_grids_of_features() -> None:
    flat = hear(fh.VideosaurHost(fh.VideosaurDecoder(16)), batch={"video": torch.rand(1, 2, 3, 8, 32)})
    assert flat.maps().grid == (2, 8)  # and no square
    wide = hear(fh.VideosaurHost(fh.VideosaurDecoder(32)), batch={"video": torch.rand(1, 2, 3, 16, 32)})
    assert wide.maps().grid == (4, 8)
    with pytest.raises(HostError, match=r"32 patches, which is no square. Pass grid=\(H, W\)"):
        wide.adapter.collect(wide.capture)
    assert VideosaurAdapter(grid=(8, 4)).collect(wide.capture, wide.batch).grid == (8, 4)
    with pytest.raises(HostError, match="`grid` to have 32 patches"):
        VideosaurAdapter(grid=(5, 5)).collect(wide.capture, wide.batch)
    for host in (fh.VideosaurHost(fh.VideosaurDecoder(*FRAME)), fh.OclfHost(fh.OclfDecoder(*FRAME))):
        pixels = hear(host)
        assert pixels.adapter.collect(pixels.capture).grid == GRID


OCLF_NET = "models.object_decoder.decoder"
short = lambda output: [x[1:] for x in output]  # noqa: E731
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: hear(fh.OclfHost(fh.OclfDecoder(3 * N))), r"decoder of 24 patches to have the proportions of \(2, 4\)"),
    (
        lambda: hear(altered(fh.OclfHost(video=True), "models.object_decoder", use_decoder_masks=False)),
        "it predicts patches .*='softmax:models.perceptual_grouping.module.slot_attention', masks='models.object_decod",
    ),
    (lambda: hear(altered(fh.OclfHost(), "models.object_decoder", depth_positions=5)), "OclfDecoder .* densities"),
    (lambda: hear(sh.Genera1zHost(colours=4)), r"decoder\.readout to give 3 colours and alpha, but got 5"),
    (lambda: hear(giving(fh.RandSFQHost(fh.MixerDecode()), "decode", short)), "the 2 x 3 x 4 slots .* ran on 5 x 4"),
    (lambda: hear(giving(fh.RandSFQHost(), "encode_backbone", lambda x: x.flatten(2))), r"feature map .*\(6, 8, 8\)"),
    (lambda: hear(fh.RandSFQHost(fh.MixerDecode(beside="bos"))), r"one after the other.* \(need_weights"),
    (lambda: hear(fh.RandSFQHost(fh.MixerDecode(beside="noise_sched"))), "diffusion .* nn.Identity .* its denoiser"),
    (lambda: hear(altered(sh.JunkeunYiHost(), "", decode_corrected=False)), "masks of predicted slots show the next"),
    (lambda: hear(PackageHost(GrowingAttention(), "loop"), Package(**NAMED)), "'attention' to give one shape"),
    (lambda: hear(OnceForAll(), Package(**NAMED)), "ran 3 times and the decoder once, on frames folded into its batch"),
    (lambda: hear(OnceForAll()), r"'softmax:.' to give masks over the slots .* in 3 call\(s\), but it gave"),
    (lambda: hear(PackageHost(), Package(masks="decoder")), r"'decoder' to give masks .* \[\(8, 4, 8, 16\)\]"),
    (lambda: hear(PackageHost(CODES)), "MetaSlotAttention averages slots of one code and packs"),
]


@pytest.mark.parametrize(("host", "message"), REFUSED)
def test_what_cannot_be_heard_is_refused_by_name(host: Callable[[], Any], message: str) -> None:
    with pytest.raises(HostError, match=message):
        host().maps()


def test_losses_of_ssync_that_the_host_has_itself_are_told() -> None:
    host = fh.VideosaurHost()
    host.loss_fns = nn.ModuleDict({"loss_featrec": nn.Identity(), "loss_grp2deccls": nn.Identity()})
    with pytest.warns(UserWarning, match=r"VideosaurHost has SSync's losses itself \(loss_grp2deccls\)"):
        VideosaurAdapter().attach(host).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del host.loss_fns["loss_grp2deccls"]
        VideosaurAdapter().attach(host).remove()


def test_oclf_slots_masked_in_one_frame_do_not_exist_in_the_clip_and_further_calls_are_refused() -> None:
    host, adapter = fh.OclfHost(fh.OclfDecoder(*GRID), video=True), OclfAdapter()
    attention, decoder = parts(host)
    slots, second = host.seeds.expand(B, -1, -1), (torch.arange(S) == 1).expand(B, S)
    capture = adapter.attach(host)
    capture.open()
    states = [attention(torch.randn(B, N, DIM), slots, masked)[0] for masked in (torch.zeros(B, S).bool(), second)]
    decoder(torch.stack(states, 1).flatten(0, 1))
    maps = adapter.collect(capture)
    assert torch.equal(maps.slot_valid, ~second)
    assert ssync_loss(maps).loss.isfinite()
    capture.clear()
    for _ in range(2):
        attention(torch.randn(B, N, DIM), slots)
    host.training_step(host.batch(), 0)
    with pytest.raises(HostError, match=r"draw the 2 x 5 x 4 slots \(B, T, S\) .* it ran on 6 x 4"):
        adapter.collect(capture)
    capture.clear()
    with pytest.raises(HostError, match="'slot_attention' to run inside the training step, but it did not"):
        adapter.collect(capture)


@pytest.mark.parametrize("size", [(N,), GRID, FRAME])
def test_adaslot_images_without_slots_are_left_out(size: tuple[int, ...]) -> None:
    host = fh.AdaSlotHost(kept=fh.NONE_LEFT, heads=2, size=size)
    maps = hear(host).maps()
    assert not maps.masks.isnan().any()
    assert not maps.attention.isnan().any()
    output = ssync_loss(maps)
    assert output.loss > 0
    assert output.used_decoder_slots[1] == output.used_encoder_slots[1] == 0
    score = parts(host)[0].single_gumbel_score_network.weight
    assert torch.autograd.grad(output.loss, score, allow_unused=True, retain_graph=True)[0] is None
    parts(host)[0].kept = torch.zeros(B, S)
    everything = ssync_loss(hear(host).maps())
    assert everything.loss == 0
    everything.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in host.parameters())


def test_adaslot_masked_slots_are_dropped() -> None:
    host = fh.AdaSlotHost(kept=fh.KEPT)
    host.masked = ~fh.first(3, S)
    assert torch.equal(hear(host).maps().slot_valid, torch.tensor(fh.KEPT).bool() & fh.first(3, S))


@pytest.mark.parametrize("loss", ["brier", "ce"])
def test_randsfq_absent_slots_bring_no_nan_and_a_compiled_host_is_heard(loss: Any) -> None:
    host = fh.RandSFQHost(existing=fh.VALID)
    twin, batch = copy.deepcopy(host), host.batch()
    torch._dynamo.reset()
    with attach(host, warmup_steps=0, loss=loss) as ssync, attach(twin, warmup_steps=0, loss=loss) as expected:
        if loss == "brier" and not torch.__version__.startswith("2.4."):  # which hides modules of compiled hosts
            host.compile(backend="eager")
        for _ in range(2):
            total = ssync.add(host(batch["video"]).square().mean())
            torch.testing.assert_close(total, expected.add(twin(batch["video"]).square().mean()))
    total.backward()
    assert all(p.grad.isfinite().all() for p in host.parameters() if p.grad is not None)


def test_genera1z_slots_of_padded_boxes_merge_and_loops_that_call_methods_are_served_without_a_check() -> None:
    host, adapter = sh.Genera1zHost(), Genera1zSaviAdapter()
    with attach(host, warmup_steps=0, merge_threshold=0.3) as ssync:
        ssync.add(host.training_step(host.batch(padded=2), 0)).backward()
    logits = own_maps(host).attention_logits
    torch.testing.assert_close(logits[:, :, 2], logits[:, :, 3])
    assert float(ssync.logs["ssync/merged_slots"]) >= 1
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in host.parameters())
    host.decoder.sharpen = 2.0  # would be refused, if the model itself were called
    capture, batch = adapter.attach(host), host.batch()
    capture.open()
    host.forward(batch["video"], batch["boxes"])
    assert not capture.silent
    adapter.verify(capture, adapter.collect(capture))


def test_slotformer_trainers_that_go_past_the_models_call_or_wrap_it_are_served() -> None:
    host = sh.SlotFormerHost()
    with attach(nn.DataParallel(host), warmup_steps=0) as ssync:  # calls the model itself without several devices
        loss = host.loss_function({"img": host.batch()["video"]})
        total = ssync.add(loss)
        torch.testing.assert_close(total, loss + ssync_loss(own_maps(host)).loss, rtol=0, atol=0)
    with attach(host, warmup_steps=0) as ssync:
        host.slot_attention(torch.rand(B, N, DIM), host.seeds.expand(B, -1, -1))
        with pytest.raises(HostError, match="'decoder' did not run"):
            ssync.loss()


FRAMES = [("image", False, {}), ("image", True, {"alpha_axis": -1}), ("folded", False, {})]
FRAMES += [("loop", False, {"attention": "slot_attn"})]


@pytest.mark.parametrize(("frames", "last", "options"), FRAMES)
@pytest.mark.parametrize("heads", [None, 2])
def test_package_frames_are_clips_whatever_the_decoder_gives(heads, frames, last, options):
    host = PackageHost(PackageAttention(heads), frames, last)
    heard = hear(host, Package(**NAMED | options))
    maps, own = heard.maps(), own_maps(host)
    assert maps.shape == (B if frames == "image" else B * T, 1, S, N)
    for key in ("attention_logits", "attention_probs", "mask_probs"):
        torch.testing.assert_close(getattr(maps, key), getattr(own, key))
    heard.adapter.verify(heard.capture, maps)


@pytest.mark.parametrize("name", sh.TOKENS)
def test_hosts_without_object_masks_are_refused_with_a_way_out_that_works(name: str) -> None:
    host: Any = sh.TOKENS[name]()
    assert isinstance(locate("auto", nn.ModuleDict({"model": host})).adapter, AutoregressiveAdapter)
    with pytest.raises(HostError, match="draws object masks, but TokenHost predicts tokens") as error:
        attach(host, warmup_steps=0).__enter__()
    attention, masks = (f"softmax:{place}" for place in host.places)
    options: dict[str, Any] = {"attention": attention, "masks": masks, "warmup_steps": 0}
    one, two = parts(host)
    if name == "steve":  # its attention runs once for all frames
        assert "call an nn.Identity" in str(error.value)
        host.add_module("seen", nn.Identity())

        def show(*call: Any) -> None:
            host.seen(one.own_logits[-1])

        one.register_forward_hook(show)
        options |= {"attention": "seen", "attention_kind": "logits"}
    else:
        assert f"SSyncCallback(attention='{attention}', masks='{masks}')" in str(error.value)
    with attach(host, **options) as ssync:
        for _ in range(2):
            forget(host)
            ssync.add(host.training_step(host.batch(), 0)).backward()
    assert torch.equal(ssync.maps.attention_logits, torch.stack(one.own_logits, 1))
    assert torch.equal(ssync.maps.mask_logits, two.own_logits[0].unflatten(0, (B, T)))
