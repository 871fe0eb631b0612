"""The identity-conditioned epsilon network of IDiff-Face (arXiv 2308.04995), with the published parameter names.

This is its condition type CA: time enters every residual block through adaptive group norm, the context every
attention block through cross-attention.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.runtime.errors import UserError

GROUPS = 32  # of every group norm


class TimeEmbedding(nn.Module):
    """Timesteps [B] -> [B, channels], by a sinusoidal code (arXiv 1706.03762) and two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.half = channels // 8
        self.lin1 = nn.Linear(channels // 4, channels)
        self.lin2 = nn.Linear(channels, channels)

    def forward(self, t: Tensor) -> Tensor:
        k = torch.arange(self.half, dtype=torch.float32, device=t.device)
        angles = t[:, None].float() * torch.exp(-math.log(10000) * k / self.half)
        code = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.lin1.weight.dtype)
        return self.lin2(F.silu(self.lin1(code)))


class GroupNorm(nn.GroupNorm):
    """Group norm (arXiv 1803.08494) of [B, channels, H, W]; given scale and shift [B, channels], (1 + scale) * norm + shift."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() or x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
            x = super().forward(x)
            return x if scale is None else (1 + scale[:, :, None, None]) * x + shift[:, :, None, None]
        # On CPUs torch's kernel for channels_last takes up to ten times as long where groups have few channels. Here each
        # channel's moments give one line a x + b for norm, scale and shift together; sums in float32, as the kernel's own.
        tokens = to_tokens(x)
        mean = tokens.mean(1, dtype=torch.float32).unflatten(1, (GROUPS, -1))
        square = (tokens * tokens).mean(1, dtype=torch.float32).unflatten(1, (GROUPS, -1)).mean(2, keepdim=True)
        group_mean = mean.mean(2, keepdim=True)
        a = (self.weight.float().view(GROUPS, -1) * ((square - group_mean.square()).clamp(min=0) + self.eps).rsqrt()).flatten(1)
        b = self.bias.float() - group_mean.expand_as(mean).flatten(1) * a
        if scale is not None:
            a, b = (1 + scale.float()) * a, (1 + scale.float()) * b + shift.float()
        return to_image(torch.addcmul(b[:, None].to(x.dtype), tokens, a[:, None].to(x.dtype)), x)


class AdaptiveGroupNorm(nn.Module):
    """(1 + scale) * GroupNorm(x) + shift (arXiv 2105.05233)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.norm(x, scale, shift)


class ResidualBlock(nn.Module):
    """[B, channels_in, H, W], time [B, time_channels] -> [B, channels, H, W]."""

    def __init__(self, channels_in: int, channels: int, time_channels: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time_emb = nn.Sequential(nn.SiLU(), nn.Linear(time_channels, channels))
        self.scale_emb = nn.Linear(channels, channels)
        self.shift_emb = nn.Linear(channels, channels)
        self.norm2 = AdaptiveGroupNorm(channels)
        self.conv2 = zeroed(nn.Conv2d(channels, channels, 3, padding=1))
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        e = self.time_emb(time)
        h = self.norm2(h, self.scale_emb(e), self.shift_emb(e))
        return self.conv2(F.silu(h)) + self.shortcut(x)


class TokenLinear(nn.Conv1d):
    """A linear layer over the channels of tokens [B, N, C]; the published weights have Conv1d's shape [out, in, 1]."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__(channels_in, channels, kernel_size=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight.squeeze(2), self.bias)


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762); keys and values are given, so that they can be computed once."""

    def __init__(self, channels: int, source_channels: int, heads: int, head_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = TokenLinear(channels, heads * head_channels)
        self.to_k = TokenLinear(source_channels, heads * head_channels)
        self.to_v = TokenLinear(source_channels, heads * head_channels)
        self.proj_out = TokenLinear(heads * head_channels, channels)

    def keys_values(self, source: Tensor) -> Tensor:
        """Tokens [B, M, source_channels] -> their keys and values side by side, [B, M, 2 * width]."""
        return torch.cat([self.to_k(source), self.to_v(source)], dim=2)

    def forward(self, tokens: Tensor, keys_values: Tensor) -> Tensor:
        """Tokens [B, N, channels] attend to M others: softmax(q k / sqrt(head width)) v -> [B, N, channels]."""
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for y in (self.to_q(tokens), *keys_values.chunk(2, dim=2)))
        return self.proj_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AttentionBlock(nn.Module):
    """Self-attention, cross-attention to the context's tokens and a feed-forward layer, on [B, channels, H, W]."""

    columns: slice  # of the whole network's `context_tokens`: this block's keys and values

    def __init__(self, channels: int, context_channels: int, heads: int, head_channels: int) -> None:
        super().__init__()
        heads = heads if heads > 0 else channels // head_channels
        width = heads * head_channels
        self.x_proj_in = nn.Conv2d(channels, width, 1)
        self.x_proj_out = zeroed(nn.Conv2d(width, channels, 1))
        self.self_attention = Attention(width, width, heads, head_channels)
        self.c_proj_in = nn.Linear(context_channels, context_channels * head_channels)
        self.cross_attention = Attention(width, context_channels, heads, head_channels)
        self.x_norm = GroupNorm(width)
        self.c_norm = nn.GroupNorm(GROUPS, context_channels)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def context_keys_values(self, c: Tensor) -> Tensor:
        """The projected context [B, context_channels], read as head_channels tokens -> [B, tokens, 2 * width]."""
        c = self.c_norm(self.c_proj_in(c).unflatten(1, (c.shape[1], -1)))
        return self.cross_attention.keys_values(c.transpose(1, 2))

    def forward(self, x: Tensor, context_tokens: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same, or [n B, ...] where context_tokens are those of n contexts for each x."""
        x_in = x
        x = self.x_proj_in(x)
        tokens = to_tokens(self.x_norm(x))
        x = x + to_image(self.self_attention(tokens, self.self_attention.keys_values(tokens)), x)
        # Up to here nothing has seen the context, so one computation serves all contexts of an image.
        x, x_in = (repeat_to(y, len(context_tokens)) for y in (x, x_in))
        x = x + to_image(self.cross_attention(to_tokens(self.x_norm(x)), context_tokens[:, :, self.columns]), x)
        x = x + to_image(self.ff(to_tokens(self.x_norm(x))), x)
        return self.x_proj_out(x) + x_in


class Block(nn.Module):
    """A residual block and, at the resolutions that have it, attention."""

    def __init__(self, res: ResidualBlock, attn: AttentionBlock | None) -> None:
        super().__init__()
        self.res = res
        self.attn = attn

    def forward(self, x: Tensor, time: Tensor, context_tokens: Tensor) -> Tensor:
        x = self.res(x, time)
        return x if self.attn is None else self.attn(x, context_tokens)


class MiddleBlock(nn.Module):
    def __init__(self, res1: ResidualBlock, attn: AttentionBlock, res2: ResidualBlock) -> None:
        super().__init__()
        self.res1 = res1
        self.attn = attn
        self.res2 = res2

    def forward(self, x: Tensor, time: Tensor, context_tokens: Tensor) -> Tensor:
        x = self.attn(self.res1(x, time), context_tokens)
        return self.res2(x, repeat_to(time, len(x)))


class Resample(nn.Module):
    """Halves or doubles the resolution."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, time: Tensor, context_tokens: Tensor) -> Tensor:
        return self.conv(x)


class ConditionalUNet(nn.Module):
    """eps(x_t, t, c). The arguments are the keys of the published config's section `model`.

    Args:
        input_channels: C of x and eps.
        initial_channels: channels at the first resolution, a multiple of 32.
        channel_multipliers: one per resolution, applied cumulatively.
        is_attention: one per resolution.
        attention_heads: per attention block; where <= 0, channels / attention_head_channels.
        attention_head_channels: width of a head, and the number of tokens that a context is read as.
        n_blocks_per_resolution: on the way down; one more on the way up.
        condition_type: only `CA`.
        is_context_conditional: only True.
        n_context_classes: only 0 (contexts are embeddings).
        context_input_channels: D of the context.
        context_channels: width of the projected context, a multiple of 32.
        learn_empty_context: no context is a learned vector rather than zeros.
        context_dropout_probability: dropout on the projected context in training (CPD).
    Raises:
        UserError: a value that is not supported; the line names the key.
    """

    def __init__(self, input_channels: int, initial_channels: int, channel_multipliers: Sequence[int],
                 is_attention: Sequence[bool], attention_heads: int, attention_head_channels: int,
                 n_blocks_per_resolution: int, condition_type: str, is_context_conditional: bool,
                 n_context_classes: int, context_input_channels: int, context_channels: int,
                 learn_empty_context: bool, context_dropout_probability: float) -> None:
        super().__init__()
        require("condition_type", condition_type, "CA", "a model whose context enters through cross-attention")
        require("is_context_conditional", is_context_conditional, True, "an identity-conditioned model")
        require("n_context_classes", n_context_classes, 0, "a model whose contexts are embeddings")
        require("is_attention", len(is_attention), len(channel_multipliers), "one flag for each of channel_multipliers")
        require("initial_channels mod 32", initial_channels % GROUPS, 0, "a multiple of 32")
        require("context_channels mod 32", context_channels % GROUPS, 0, "a multiple of 32")

        def residual(channels_in: int, channels: int) -> ResidualBlock:
            return ResidualBlock(channels_in, channels, time_channels=4 * initial_channels)

        def attention(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, context_channels, attention_heads, attention_head_channels)

        def block(channels_in: int, channels: int, attend: bool) -> Block:
            return Block(residual(channels_in, channels), attention(channels) if attend else None)

        self.image_proj = nn.Conv2d(input_channels, initial_channels, 3, padding=1)
        self.time_emb = TimeEmbedding(4 * initial_channels)
        self.context_emb = nn.Linear(context_input_channels, context_channels)
        self.context_dropout = nn.Dropout(context_dropout_probability)
        self.empty_context_embedding = nn.Parameter(torch.randn(context_channels)) if learn_empty_context else None

        channels = initial_channels
        down: list[nn.Module] = []
        for multiplier, attend in zip(channel_multipliers, is_attention, strict=True):
            if down:
                down.append(Resample(nn.Conv2d(channels, channels, 3, stride=2, padding=1)))
            down.append(block(channels, channels * multiplier, attend))
            channels *= multiplier
            down += [block(channels, channels, attend) for _ in range(n_blocks_per_resolution - 1)]
        self.down = nn.ModuleList(down)

        self.middle = MiddleBlock(residual(channels, channels), attention(channels), residual(channels, channels))

        up: list[nn.Module] = []
        for multiplier, attend in zip(reversed(channel_multipliers), reversed(is_attention), strict=True):
            if up:
                up.append(Resample(nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)))
            # Each block's input is joined by a skip of as many channels as the block gives out.
            up += [block(2 * channels, channels, attend) for _ in range(n_blocks_per_resolution)]
            up.append(block(channels + channels // multiplier, channels // multiplier, attend))
            channels //= multiplier
        self.up = nn.ModuleList(up)

        self.norm = GroupNorm(channels)
        self.final = zeroed(nn.Conv2d(channels, input_channels, 3, padding=1))

        self.attention_blocks = [module for module in self.modules() if isinstance(module, AttentionBlock)]
        end = 0
        for module in self.attention_blocks:
            start, end = end, end + 2 * module.cross_attention.to_k.out_channels
            module.columns = slice(start, end)

    def context_tokens(self, context: Tensor | None) -> Tensor:
        """The context as the cross-attentions see it: their keys and values, which depend neither on x nor on t.

        Args:
            context: [B, D], or None for no context (the projected context is then zeros, or the learned vector).
        Returns:
            [B, tokens, K], which `forward` takes in place of the context; [1, tokens, K] for None.
        """
        if context is not None:
            c = self.context_dropout(self.context_emb(context))
        elif self.empty_context_embedding is not None:
            c = self.empty_context_embedding[None]
        else:
            c = torch.zeros_like(self.context_emb.bias)[None]
        return torch.cat([block.context_keys_values(c) for block in self.attention_blocks], dim=2)

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """The noise predicted in x_t.

        Args:
            x: x_t, [B, C, H, W], H and W divisible by 2 at each change of resolution.
            t: timesteps, [B].
            context: [B, D]; or its `context_tokens` [B, tokens, K], computed once for all timesteps; or None. Given n
                contexts for each x, as [n B, ...] (all first ones, then all second ones), what no context reaches is
                computed once: guidance takes `eps_pos, eps_neg = unet(x, t, tokens_pos_neg).chunk(2)`.
        Returns:
            eps, [B, C, H, W], or [n B, C, H, W] in the contexts' order.
        """
        if context is None:
            context = self.context_tokens(None).expand(len(x), -1, -1)
        elif context.dim() == 2:
            context = self.context_tokens(context)
        time = self.time_emb(t)

        x = self.image_proj(x)
        skips = [x]
        for module in self.down:
            x = module(x, time, context)
            time = repeat_to(time, len(x))
            skips.append(x)
        x = self.middle(x, time, context)
        time = repeat_to(time, len(x))
        for module in self.up:
            if isinstance(module, Block):
                x = torch.cat([x, repeat_to(skips.pop(), len(x))], dim=1)
            x = module(x, time, context)
        return self.final(F.silu(self.norm(x)))


def require(key: str, value: object, supported: object, fix: str) -> None:
    if value != supported:
        raise UserError(f"{key}: {value!r} is not supported, only {supported!r}; use {fix}")


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer, starting at zero: the block that it ends is then the identity (arXiv 2105.05233)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def to_tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]; no copy where x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_image(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, H W, C] -> [B, C, H, W] of the shape of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def repeat_to(x: Tensor, batch: int) -> Tensor:
    """x [B, ...] as (x, x, ...), [batch, ...]; x itself where that is its batch."""
    # cat rather than repeat: it keeps channels_last.
    return x if len(x) == batch else torch.cat([x] * (batch // len(x)))
