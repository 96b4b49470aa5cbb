"""An MLP on every pair of slot and patch, mixed by a softmax over slots, in little memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.errors import HostError
from ssync_pl.method.labels import compute_dtype

__all__ = ["PatchMLP", "linear_layers", "mix_patches"]

# Activations of one layer that are worked on at a time: in a CPU's cache, or enough to keep an accelerator busy.
_CHUNK_BYTES = {"cpu": 3 << 20}
_ACCELERATOR_CHUNK_BYTES = 64 << 20


class PatchMLP(NamedTuple):
    """Weights of an MLP from slot and place to features and alpha, with ReLUs between its layers.

    Weights are `(outputs, inputs)`. H is the size of a hidden layer.

    Args:
        hidden: weight and bias of each hidden layer but the first, which is given as its results.
        features: weight `(C, H)` and bias `(C,)` of the features.
        alpha: weight `(H,)` and bias `()` of the mask logit.

    Example:
        >>> mlp = PatchMLP([], (torch.ones(2, 4), torch.zeros(2)), (torch.ones(4), torch.zeros(())))
        >>> mlp.features[0].shape
        torch.Size([2, 4])
    """

    hidden: Sequence[tuple[Tensor, Tensor]]
    features: tuple[Tensor, Tensor]
    alpha: tuple[Tensor, Tensor]


def mix_patches(
    slots: Tensor,
    places: Tensor,
    mlp: PatchMLP,
    *,
    offsets: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode every slot at every patch and mix over slots.

    The result is that of the plain layout, which decodes `(M, S, N)` rows and then mixes, up to rounding. What is done
    otherwise:

    * the first layer is linear, so that slots and places pass it apart, and each only once;
    * the last layer is linear and masks sum to 1, so that hidden activations are mixed, and only the mixture becomes
      features; alpha alone needs every slot;
    * activations are made in chunks of some patches and all slots, small enough for a CPU's cache;
    * for the backward pass, the first layer's activations, which are a sum away, are never kept, nor some of the last
      hidden layer's (see `_recomputed_share`), and gradients are formed chunk by chunk.

    The result can be differentiated once (a backward pass with `create_graph=True` is refused). Under autocast all
    layers but the first, which is small, run in its type.

    Args:
        slots: `(M, S, H)`, the first layer's share of slots, bias included.
        places: `(N, H)`, its share of places.
        mlp: all further layers.
        offsets: positions `(M, S, N, P)` relative to slots, and the first layer's weight for them `(H, P)`.
        valid: bool `(M, S)`; other slots take no part in mixtures.

    Returns:
        Features `(M, N, C)` and mask logits `(M, S, N)`, the latter in at least float32.

    Example:
        >>> mlp = PatchMLP([], (torch.ones(2, 4), torch.zeros(2)), (torch.ones(4), torch.zeros(())))
        >>> features, logits = mix_patches(torch.randn(3, 5, 4), torch.randn(6, 4), mlp)
        >>> features.shape, logits.shape
        (torch.Size([3, 6, 2]), torch.Size([3, 5, 6]))
    """
    flat = [tensor for pair in (mlp.alpha, mlp.features, *mlp.hidden) for tensor in pair]
    device = slots.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        flat = [tensor.to(dtype) for tensor in flat]
    with torch.autocast(device, enabled=False):
        features, logits = _MixPatches.apply(
            torch.is_grad_enabled(), valid, slots, places, *(offsets or (None, None)), *flat
        )
    return features, logits


def linear_layers(modules: Iterable[nn.Module], within: Sequence[nn.Module] = ()) -> list[nn.Linear] | None:
    """The linear layers of an MLP whose weights `mix_patches` may take in place of the modules.

    Args:
        modules: linear layers with ReLUs between them, and maybe behind them.
        within: modules around them that would run too.

    Returns:
        The linear layers; None where a module is of another type, has hooks, which would not be called, or is traced
        by `torch.compile`, which saves memory in its own way.

    Example:
        >>> len(linear_layers([nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)]))
        2
        >>> linear_layers([nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)])
    """
    given = list(modules)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if torch.compiler.is_compiling() or any(getattr(module, name) for module in (*within, *given) for name in hooks):
        return None
    for number, module in enumerate(given):
        if type(module) is not (nn.ReLU if number % 2 else nn.Linear):
            return None
    return [module for module in given if isinstance(module, nn.Linear)]


class _Chunk(NamedTuple):
    """Frames and patches that are worked on at a time, with all slots; whether the last activations are kept."""

    frames: slice
    patches: slice
    keeps_last: bool


def _recomputed_share(layers: int) -> float:
    """Share of the last hidden layer's activations that the backward pass computes once more.

    In units of one layer's activations, the plain layout peaks at about `layers + 2.1`: all of them, and gradients and
    reconstructions of all slots beside them. Here `layers - 1` are kept, less this share, and up to 0.4 are buffers and
    gradients of parameters. The share makes this 0.4 of the other, up to four layers.
    """
    return min(1.0, max(0.0, (layers - 1) + 0.4 - 0.4 * (layers + 2.1)))


def _chunks(slots: Tensor, places: Tensor, widest: int, layers: int, itemsize: int) -> Iterator[_Chunk]:
    frames, per_frame = slots.shape[:2]
    patches = places.shape[0]
    size = _CHUNK_BYTES.get(slots.device.type, _ACCELERATOR_CHUNK_BYTES)
    rows = max(1, size // (widest * itemsize))
    frame_rows = max(1, per_frame * patches)
    frame_step = max(1, rows // frame_rows)
    pieces = min(max(1, patches), -(-frame_rows // rows))
    patch_step = max(1, -(-patches // pieces))
    share = _recomputed_share(layers)
    debt = 0.0
    for first in range(0, frames, frame_step):
        for patch in range(0, patches, patch_step):
            debt += share
            keeps = debt < 1.0
            debt -= 0.0 if keeps else 1.0
            yield _Chunk(slice(first, first + frame_step), slice(patch, patch + patch_step), keeps)


class _MixPatches(torch.autograd.Function):
    """See `mix_patches`. Tensors of a chunk are `(F, S, n, H)`, or `(F * S * n, H)` for matrix products."""

    @staticmethod
    def forward(
        ctx: Any,
        keeps: bool,
        valid: Tensor | None,
        slots: Tensor,
        places: Tensor,
        positions: Tensor | None,
        from_position: Tensor | None,
        alpha: Tensor,
        alpha_bias: Tensor,
        output: Tensor,
        output_bias: Tensor,
        *hidden: Tensor,
    ) -> tuple[Tensor, Tensor]:
        layers = list(zip(hidden[::2], hidden[1::2], strict=True))
        widest = max(slots.shape[-1], *(len(weight) for weight, _ in layers), 1)
        chunks = list(_chunks(slots, places, widest, len(layers) + 1, alpha.element_size()))
        features = alpha.new_empty(len(slots), len(places), len(output))
        logits = alpha.new_empty(*slots.shape[:2], len(places), dtype=compute_dtype(alpha.dtype))
        keeps = keeps and any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        for chunk in chunks:
            activations = _first(chunk, slots, places, positions, from_position, alpha.dtype)
            for number, (weight, bias) in enumerate(layers, start=1):
                activations = _relu_linear(activations, weight, bias)
                if keeps and (number < len(layers) or chunk.keeps_last):
                    kept.append(activations)
            seen = torch.matmul(activations, alpha).add_(alpha_bias)
            logits[chunk.frames, :, chunk.patches] = seen
            masks = _masks(logits, valid, chunk).to(alpha.dtype)
            features[chunk.frames, chunk.patches] = _mixture(activations, masks) @ output.T
        features += output_bias
        ctx.chunks = chunks
        given = (valid, slots, places, positions, from_position, alpha, output, *hidden)
        ctx.save_for_backward(logits, *given, *kept)
        return features, logits

    @staticmethod
    def backward(ctx: Any, d_features: Tensor, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise HostError(
                "Expected the decoder to be differentiated once, but got create_graph=True. Build the host or decoder "
                "with memory_efficient=False for second derivatives."
            )
        with torch.autocast(d_features.device.type, enabled=False):
            return None, None, *_gradients(ctx, d_features, d_logits)


def _gradients(ctx: Any, d_features: Tensor, d_logits: Tensor) -> list[Tensor | None]:
    """Gradients of the inputs of `_MixPatches` from `slots` on."""
    logits, valid, slots, places, positions, from_position, alpha, output, *rest = ctx.saved_tensors
    needs = ctx.needs_input_grad[2:]
    count = len(needs) - 8
    hidden, kept = rest[:count], iter(rest[count:])
    layers = list(zip(hidden[::2], hidden[1::2], strict=True))
    exact = compute_dtype(alpha.dtype)
    likes = [slots, places, positions, from_position, alpha, alpha.new_empty(()), output, output[:, 0], *hidden]
    # Sums over chunks would lose small terms in half precision.
    totals = [
        torch.zeros_like(like, dtype=exact) if like is not None and needed else None
        for like, needed in zip(likes, needs, strict=True)
    ]
    d_slots, d_places, d_positions, d_from_position, d_alpha, d_alpha_bias, d_output, d_output_bias = totals[:8]
    d_hidden = totals[8:]
    for chunk in ctx.chunks:
        outputs = [_first(chunk, slots, places, positions, from_position, alpha.dtype)]
        for number, (weight, bias) in enumerate(layers, start=1):
            is_kept = number < len(layers) or chunk.keeps_last
            outputs.append(next(kept) if is_kept else _relu_linear(outputs[-1], weight, bias))
        last = outputs.pop()
        masks = _masks(logits, valid, chunk)
        given = d_features[chunk.frames, chunk.patches]
        if d_output is not None:
            _add_product(d_output, given.flatten(0, 1), _mixture(last, masks.to(last.dtype)).flatten(0, 1))
        d_mixed = (given @ output).unsqueeze(1)
        gradient = last * d_mixed
        d_masks = gradient.sum(dim=-1, dtype=exact)
        d_seen = (
            masks * (d_masks - (masks * d_masks).sum(dim=1, keepdim=True)) + d_logits[chunk.frames, :, chunk.patches]
        )
        torch.mul(d_mixed, masks.unsqueeze(-1).to(last.dtype), out=gradient)
        flat_seen = d_seen.flatten().to(last.dtype)
        gradient = gradient.flatten(0, 2).addr_(flat_seen, alpha)
        if d_alpha is not None:
            d_alpha += flat_seen @ last.flatten(0, 2)
        if d_alpha_bias is not None:
            d_alpha_bias += d_seen.sum()
        for number in range(len(layers) - 1, -1, -1):
            gradient = _through_relu(gradient, last.flatten(0, 2))
            last = outputs.pop()
            d_weight, d_bias = d_hidden[2 * number : 2 * number + 2]
            if d_weight is not None:
                _add_product(d_weight, gradient, last.flatten(0, 2))
            if d_bias is not None:
                d_bias += gradient.sum(dim=0, dtype=exact)
            gradient = _product(gradient, layers[number][0].T)
        gradient = _through_relu(gradient, last.flatten(0, 2)).view(last.shape)
        if d_slots is not None:
            d_slots[chunk.frames] += gradient.sum(dim=2, dtype=exact)
        if d_places is not None:
            d_places[chunk.patches] += gradient.sum(dim=(0, 1), dtype=exact)
        if d_positions is not None:
            d_positions[chunk.frames, :, chunk.patches] = gradient @ from_position.to(gradient.dtype)
        if d_from_position is not None:
            moved = positions[chunk.frames, :, chunk.patches].to(gradient.dtype)
            _add_product(d_from_position, gradient.flatten(0, 2), moved.flatten(0, 2))
    if d_output_bias is not None:
        d_output_bias += d_features.sum(dim=(0, 1), dtype=exact)
    return [None if total is None else total.to(like.dtype) for total, like in zip(totals, likes, strict=True)]


def _first(
    chunk: _Chunk,
    slots: Tensor,
    places: Tensor,
    positions: Tensor | None,
    from_position: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """First hidden activations `(F, S, n, H)`."""
    outputs = slots[chunk.frames].unsqueeze(2) + places[chunk.patches]
    if positions is not None and from_position is not None:
        given = positions[chunk.frames, :, chunk.patches]
        outputs.flatten(0, 2).addmm_(given.flatten(0, 2), from_position.T)
    return outputs.relu_().to(dtype)


def _relu_linear(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    flat = inputs.flatten(0, 2)
    fused = _fused_linear(flat)
    if fused is not None:
        return torch.as_tensor(fused(flat, weight, bias, "relu", [], "")).view(*inputs.shape[:-1], -1)
    return torch.addmm(bias, flat, weight.T).relu_().view(*inputs.shape[:-1], -1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`."""
    fused = _fused_linear(left)
    return left @ right.T if fused is None else torch.as_tensor(fused(left, right, None, "none", [], ""))


def _fused_linear(tensor: Tensor) -> Any:
    """oneDNN's linear layer, where it applies: on many CPUs a tenth faster than what PyTorch takes for float32."""
    usable = tensor.dtype == torch.float32 and tensor.device.type == "cpu" and torch.backends.mkldnn.enabled
    return _onednn_linear() if usable else None


@functools.cache
def _onednn_linear() -> Any:
    """The operator behind compiled linear layers, if this PyTorch has it as we know it."""
    try:
        linear = torch.ops.mkldnn._linear_pointwise
        given = torch.tensor([[1.0, 2.0]])
        known = torch.equal(linear(given, -given, torch.ones(1), "relu", [], ""), torch.zeros(1, 1))
    except (AttributeError, RuntimeError, TypeError):
        return None
    return linear if known else None


def _through_relu(gradient: Tensor, outputs: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward.grad_input(gradient, outputs, 0, grad_input=gradient)


def _masks(logits: Tensor, valid: Tensor | None, chunk: _Chunk) -> Tensor:
    given = logits[chunk.frames, :, chunk.patches]
    if valid is not None:
        given = given.masked_fill(~valid[chunk.frames].unsqueeze(-1), float("-inf"))
    return given.softmax(dim=1)


def _mixture(activations: Tensor, masks: Tensor) -> Tensor:
    """`(F, S, n, H)` and `(F, S, n)` to `(F, n, H)`, slot by slot: nothing of the size of the activations is made."""
    mixed = activations[:, 0] * masks[:, 0].unsqueeze(-1)
    for slot in range(1, masks.shape[1]):
        mixed.addcmul_(activations[:, slot], masks[:, slot].unsqueeze(-1))
    return mixed


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left.T @ right` to a sum that may be of higher precision."""
    if total.dtype != left.dtype or _fused_linear(left) is not None:
        total += _product(left.T, right.T)
    else:
        total.addmm_(left.T, right)
