"""Where the text of one sample looks: the bridge's attention weights, followed back to the visual tokens.

`record_attention` records the weights of one forward, `attention_maps` composes them. Attention says what a
token reads, not how much that changes the answer: neither gates nor values have a part in it.

Shapes: K blocks, T text tokens, M media, F frames, V visual tokens, L latents; N media in one call of the
perceiver.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .core import FlamingoCore
from .cross_attention import MaskedCrossAttention
from .perceiver import PerceiverAttention, PerceiverResampler
from .sight import Sight
from .tiles import UNTILED, Grid


@dataclass(eq=False)
class PerceiverCall:
    """One call of the perceiver, for the media that have the same number of frames.

    slots (N,): position of each medium in the sample. frames, tokens: F, and V of each frame. are_tiles:
    whether the frames are views of a tiled image. layers: the weights of each layer (N, L, F * V + L), the
    latents' own last, averaged over the heads.
    """

    slots: Tensor
    frames: int
    tokens: int
    are_tiles: bool
    layers: list[Tensor] = field(default_factory=list)

    def latent_maps(self) -> Tensor:
        """Return how much of each visual token each latent holds: (N, L, F, V), a sum of 1 per latent."""
        if self.layers:
            return rollout(self.layers).unflatten(-1, (self.frames, self.tokens))
        if self.are_tiles:  # without layers, each visual token is a latent
            size = self.frames * self.tokens
            one = torch.eye(size).unflatten(-1, (self.frames, self.tokens))
        else:  # latent v is the mean of visual token v over the frames
            one = torch.eye(self.tokens)[:, None].expand(-1, self.frames, -1) / self.frames
        return one.expand(len(self.slots), *one.shape)


@dataclass(eq=False)
class AttentionRecord:
    """The attention weights of one forward over one sample, averaged over the heads, in float32 on the CPU.

    blocks: of each gated cross-attention block, by the decoder layer that follows it: (T, M, L); empty for
    text without media. perceiver: its calls. Of several forwards, the last one is recorded.
    """

    blocks: dict[int, Tensor] = field(default_factory=dict)
    perceiver: list[PerceiverCall] = field(default_factory=list)


@contextmanager
def record_attention(model: FlamingoCore) -> Generator[AttentionRecord]:
    """Record the attention weights of this thread's forward over one sample (B = 1) inside the context.

    The weights are computed from the queries and keys of each attention, beside it: the forward itself is the
    same to the bit. The hooks are removed at the end, also after an error. A compiled model runs uncompiled
    inside the context. Raises ValueError in a forward over several rows of text.
    """
    record = AttentionRecord()
    # Compiled code would not call the hooks.
    with torch.compiler.set_stance("force_eager"), ExitStack() as hooks:

        def watch(part: nn.Module, kind: type[nn.Module], hook: Callable[..., None]) -> None:
            for module in part.modules():
                if isinstance(module, kind):
                    handle = module.register_forward_pre_hook(_in_this_thread(hook))
                    hooks.callback(handle.remove)

        watch(model.perceiver, PerceiverResampler, partial(_start_call, record))
        watch(model.perceiver, PerceiverAttention, partial(_record_layer, record))
        for index, block in enumerate(model.gated_cross_attn_layers):
            if block is not None:
                watch(block, MaskedCrossAttention, partial(_record_block, record, index))
        yield record


def attention_maps(record: AttentionRecord) -> Tensor:
    """Return the weight of each visual token for each text token: (K, T, M, F, V).

    Block by block, the weight of a latent is passed on to the visual tokens that it holds
    (`PerceiverCall.latent_maps`): map[t, m, f, v] = sum over l of block[t, m, l] * latent_map[m, l, f, v].
    The weights of a text token sum to 1 over the media that it sees, and are zero elsewhere and for a token
    that sees none. Frames that a shorter video, or an image with fewer tiles, lacks are zero. Raises
    ValueError for a text without media.
    """
    if not record.blocks:
        raise ValueError("attention_maps: no cross-attention was recorded; pass a text with an image")
    blocks = torch.stack(list(record.blocks.values()))
    return torch.einsum("ktml,mlfv->ktmfv", blocks, latent_maps(record))


def latent_maps(record: AttentionRecord) -> Tensor:
    """Return how much of each visual token each latent of each medium holds: (M, L, F, V).

    Latents and frames that a medium lacks are zero (`attention_maps`).
    """
    media, latents = next(iter(record.blocks.values())).shape[1:]
    frames, tokens = max(call.frames for call in record.perceiver), record.perceiver[0].tokens
    held = torch.zeros(media, latents, frames, tokens)
    for call in record.perceiver:
        maps = call.latent_maps()
        held[call.slots, : maps.shape[1], : call.frames] = maps
    return held


def rollout(layers: Sequence[Tensor]) -> Tensor:
    """Follow the latents' attention through the perceiver: weights (N, L, P + L) of each layer -> (N, L, P).

    This is attention rollout (Abnar and Zuidema, arXiv:2005.00928), where a layer's output is one half what
    it attends to and one half the residual. Layer i attends to the P visual tokens (weights A_i), which are
    the same for all layers, and to the latents of the layer before (weights B_i). Latents then hold

        R_i = (A_i + B_i R_(i-1) + R_(i-1)) / 2,  R_0 = 0

    of the visual tokens. The rest, up to a sum of 1, is the learned latents that the perceiver starts from.
    They are the same for every image, so R is renormalized over the visual tokens. With one layer, this is A
    renormalized. With several, the mean of A over the layers would miss what latents read from each other.
    """
    latents = layers[0].shape[1]
    held = torch.zeros_like(layers[0][..., :-latents])
    for weights in layers:
        held = (weights[..., :-latents] + weights[..., -latents:] @ held + held) / 2
    return held / held.sum(-1, keepdim=True).clamp_min(torch.finfo(held.dtype).tiny)


def _in_this_thread(hook: Callable[..., None]) -> Callable[..., None]:
    """Return a forward pre-hook that leaves out what other threads run on the same model meanwhile."""
    thread = threading.get_ident()

    def called(module: nn.Module, args: tuple) -> None:
        if threading.get_ident() == thread:
            with torch.no_grad():
                hook(module, *args)

    return called


def _start_call(
    record: AttentionRecord,
    perceiver: PerceiverResampler,
    tokens: Tensor,
    slots: Tensor | None = None,
    grid: Grid = UNTILED,
) -> None:
    media, frames, per_frame = tokens.shape[1:4]
    slots = torch.arange(media) if slots is None else slots[0].cpu()
    record.perceiver.append(PerceiverCall(slots, frames, per_frame, grid != UNTILED))


def _record_layer(
    record: AttentionRecord, attention: PerceiverAttention, tokens: Tensor, latents: Tensor
) -> None:
    record.perceiver[-1].layers.append(attention.weights(tokens, latents).mean(1).cpu())


def _record_block(
    record: AttentionRecord,
    index: int,
    attention: MaskedCrossAttention,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    sight: Sight,
) -> None:
    if len(x) != 1:
        raise ValueError(f"record_attention: got {len(x)} rows of text; pass one sample")
    weights = attention.weights(x, key, sight).mean(1)
    media = sum(len(call.slots) for call in record.perceiver)
    record.blocks[index] = weights[0].unflatten(-1, (media, -1)).cpu()
