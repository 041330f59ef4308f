"""The denoiser: AudioLDM's U-Net (after Dhariwal & Nichol 2021), conditioned on one caption embedding.

Residual blocks on a pyramid of resolutions, attention where the map is small enough, a shortcut from every block on the
way down to its partner on the way up. Timestep and caption enter every residual block through FiLM; the caption also
enters the first layer as a map in time and frequency, if the settings say so.

Notebook: 03
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refined_ldm.base.integers import cast_numbers
from refined_ldm.conditioning import CaptionMap, FiLM
from refined_ldm.weights import present_names

FEW = 256  # positions, in `attend`


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the U-Net; the defaults are AudioLDM-S with the LAION conditioner (185 M parameters)."""

    latent_channels: int = 8
    model_channels: int = 128  # width of the first level
    channel_mult: tuple[int, ...] = (1, 2, 3, 5)  # width of each level, halved in time and frequency between levels
    num_res_blocks: int = 2  # per level
    attention_resolutions: tuple[int, ...] = (8, 4, 2)  # downsampling factors at which there is attention
    head_channels: int = 32
    attention_layers: int = 2  # of self-attention per transformer block; AudioLDM's second has no text to attend to
    embedding_dim: int = 512  # D of the conditioner: 512 for LAION-CLAP, 1024 for MS-CLAP
    embedding_gain: float = 1.0  # sqrt(D) gives a unit vector of D numbers the scale of the time embedding
    patch_size: int = 1  # 2: 2 x 2 blocks of the latent become channels, a quarter of the work
    film_scale: bool = False  # True: scale and shift; False: shift only, as published
    norm_groups: int = 32
    tokens: int = 0  # K > 0: the states of K caption tokens follow the embedding, for cross-attention
    token_width: int = 0  # W, numbers of a token state
    caption_map: int = 0  # rank > 0: the embedding is also drawn as a map in time and frequency (`CaptionMap`)

    def __post_init__(self):
        cast_numbers(self)
        if (self.tokens > 0) != (self.token_width > 0):
            raise ValueError(f"tokens and token_width go together, got {self.tokens} and {self.token_width}")
        for mult in self.channel_mult:
            width = mult * self.model_channels
            if width < 1 or any(n < 1 or width % n for n in (self.norm_groups, self.head_channels)):
                raise ValueError(
                    f"level width {width} = {mult} x model_channels {self.model_channels} must divide by norm_groups "
                    f"{self.norm_groups} and head_channels {self.head_channels}"
                )

    @property
    def condition_dim(self) -> int:
        """Numbers of the condition: the embedding and the flattened token states."""
        return self.embedding_dim + self.tokens * self.token_width

    @property
    def downsampling(self) -> int:
        """T and F of the latent must be multiples of this."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Timestep (B,) -> (B, width): cosines and sines of geometrically spaced frequencies (Vaswani et al. 2017, 3.5).

    Notebook: 03
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=timestep.device) / (width // 2))
    angles = timestep[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut, modulated in the middle. (B, C_in, T, F), (B, E) -> (B, C_out, T, F)"""

    def __init__(self, channels_in: int, channels_out: int, condition_dim: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.norm_groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.film = FiLM(channels_out, condition_dim, scale=config.film_scale)
        self.norm2 = nn.GroupNorm(config.norm_groups, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.film_after_norm = config.film_scale  # a scale before the norm would be normalised away
        nn.init.zeros_(self.conv2.weight), nn.init.zeros_(self.conv2.bias)  # a new block is the identity

    def forward(self, x: Tensor, condition: Tensor, tokens: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.film(self.norm2(h), condition) if self.film_after_norm else self.norm2(self.film(h, condition))
        return self.shortcut(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Multi-head self-attention (B, L, C) -> (B, L, C), with `head_channels` numbers per head."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.heads = channels // head_channels
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (to(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v))
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v, each (B, H, L, D), the attention of Vaswani et al. 2017, eq. 1.

    torch's fused kernel saves memory; on a CPU its way back takes five times as long where there are few positions.
    """
    if q.device.type == "cpu" and q.requires_grad and q.shape[2] <= FEW:
        return ((q @ k.transpose(2, 3)) * q.shape[3] ** -0.5).softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Positions of the map attend to the caption's tokens. (B, L, C), tokens (B, K, W) -> (B, L, C)

    Padding tokens are zeros and masked; a learned null token is always visible.
    """

    def __init__(self, channels: int, token_width: int, head_channels: int):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = nn.LayerNorm(token_width)
        self.null_token = nn.Parameter(torch.zeros(token_width))
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k, self.to_v = (nn.Linear(token_width, channels, bias=False) for _ in range(2))
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        key_mask = F.pad(tokens.abs().sum(2) > 0, (1, 0), value=True)  # (B, K + 1)
        keys = torch.cat([self.null_token.expand(len(tokens), 1, -1), self.norm(tokens)], dim=1)  # (B, K + 1, W)
        projected = self.to_q(x), self.to_k(keys), self.to_v(keys)
        q, k, v = (h.unflatten(2, (self.heads, -1)).transpose(1, 2) for h in projected)
        attended = F.scaled_dot_product_attention(q, k, v, key_mask[:, None, None])
        return self.to_out(attended.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """A gated feed-forward layer, four times as wide inside (Shazeer 2020). (B, L, C) -> (B, L, C)"""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)
        self.out = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class Transformer(nn.Module):
    """One transformer block over all positions of the map. (B, C, T, F) -> (B, C, T, F)"""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        layers = range(config.attention_layers)
        self.attention = nn.ModuleList(SelfAttention(channels, config.head_channels) for _ in layers)
        self.attention_norm = nn.ModuleList(nn.LayerNorm(channels) for _ in layers)
        if config.tokens:
            self.cross_attention = CrossAttention(channels, config.token_width, config.head_channels)
            self.cross_attention_norm = nn.LayerNorm(channels)
        self.feed_forward, self.feed_forward_norm = GEGLU(channels), nn.LayerNorm(channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight), nn.init.zeros_(self.proj_out.bias)

    def forward(self, h: Tensor, condition: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        x = self.proj_in(self.norm(h)).flatten(2).transpose(1, 2)  # (B, L = T * F, C)
        for attention, norm in zip(self.attention, self.attention_norm, strict=True):
            x = x + attention(norm(x))
        if tokens is not None:
            x = x + self.cross_attention(self.cross_attention_norm(x), tokens)
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return h + self.proj_out(x.transpose(1, 2).reshape(h.shape))


class Downsample(nn.Module):
    """(B, C, T, F) -> (B, C, T / 2, F / 2)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor, condition: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        return self.conv(h)


class Upsample(nn.Module):
    """(B, C, T, F) -> (B, C, 2 T, 2 F)"""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor, condition: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


class DeepFeatures:
    """DeepCache (Ma et al. 2024): what the deep levels of a U-Net computed, for the next evaluations of one sampling.

    From one step to the next the deep features change little. So only every `interval`-th evaluation is complete;
    the others compute the first level alone and take the features that enter it on the way up from the last complete
    one. An evaluation of another shape (guidance begins or ends) is complete.
    """

    def __init__(self, interval: int):
        self.interval, self.calls, self.features = interval, 0, None

    def recall(self, batch: int) -> Tensor | None:
        """Return the features (batch, C, T, F) to reuse in the next evaluation; None if it is to be complete."""
        fits = self.features is not None and len(self.features) == batch
        self.calls = self.calls + 1 if fits and self.calls < self.interval else 1
        return self.features if self.calls > 1 else None


class UNet(nn.Module):
    """Latent (B, C, T, F), timestep (B,), embedding (B, D) -> prediction (B, C, T, F).

    With `tokens` in the settings the embedding is followed by K flattened token states: (B, D + K * W). With an
    `end_embed`, as a student has, `end` (B,) is the timestep at which a jump from `timestep` ends. deep: features of
    earlier evaluations, reused and replaced. Raises ValueError for another shape.

    With `gradient_checkpointing` training keeps only what goes from block to block and computes the rest again on the
    way back (Chen et al. 2016): equal gradients, for a third more time and less than half of the memory.

    Notebook: 03
    """

    gradient_checkpointing = False

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.register_load_state_dict_pre_hook(lambda module, state, *_: present_names(state))
        self.config = config
        first = config.model_channels
        widths = [first * mult for mult in config.channel_mult]
        attended = [2**level in config.attention_resolutions for level in range(len(widths))]
        time_dim, inner = 4 * first, config.latent_channels * config.patch_size**2

        self.time_embed = nn.Sequential(nn.Linear(first, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.end_embed = None  # of a student: a linear layer for the timestep at which a jump ends
        self.film_embed = nn.Linear(config.embedding_dim, time_dim)

        def stage(channels_in: int, channels_out: int, attention: bool) -> nn.ModuleList:
            blocks = [ResBlock(channels_in, channels_out, 2 * time_dim, config)]
            return nn.ModuleList(blocks + [Transformer(channels_out, config)] * attention)

        self.conv_in = nn.Conv2d(inner, first, 3, padding=1)
        if config.caption_map:
            self.caption_map = CaptionMap(config.embedding_dim, config.latent_channels, config.caption_map)
            self.map_in = nn.Conv2d(inner, first, 3, padding=1, bias=False)
            nn.init.zeros_(self.map_in.weight)
        self.down, shortcuts, width = nn.ModuleList(), [first], first
        for level, wide in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(stage(width, wide, attended[level]))
                shortcuts.append(width := wide)
            if level < len(widths) - 1:
                self.down.append(nn.ModuleList([Downsample(wide)]))
                shortcuts.append(wide)
        self.middle = stage(width, width, True).append(ResBlock(width, width, 2 * time_dim, config))
        self.up = nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            for block in range(config.num_res_blocks + 1):
                self.up.append(stage(width + shortcuts.pop(), wide, attended[level]))
                width = wide
                if level > 0 and block == config.num_res_blocks:
                    self.up[-1].append(Upsample(wide))
        self.norm_out = nn.GroupNorm(config.norm_groups, first)
        self.conv_out = nn.Conv2d(first, inner, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight), nn.init.zeros_(self.conv_out.bias)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        embedding: Tensor,
        end: Tensor | None = None,
        deep: DeepFeatures | None = None,
    ) -> Tensor:
        self._check(latent, timestep, embedding)
        tokens = None
        if self.config.tokens:
            tokens = embedding[:, self.config.embedding_dim :].unflatten(1, (self.config.tokens, -1))  # (B, K, W)
            embedding = embedding[:, : self.config.embedding_dim]
        time = self.time_embed(timestep_embedding(timestep, self.config.model_channels))
        if end is not None:
            time = time + self.end_embed(timestep_embedding(end, self.config.model_channels))
        caption = self.film_embed(embedding * self.config.embedding_gain)
        condition = torch.cat([time, caption], dim=1)  # (B, 8 * model_channels)

        h = self.conv_in(F.pixel_unshuffle(latent, self.config.patch_size))
        if self.config.caption_map:
            drawn = self.caption_map(embedding, *latent.shape[2:])
            h = h + self.map_in(F.pixel_unshuffle(drawn, self.config.patch_size))
        first_level = self.config.num_res_blocks + 1  # stages on the way up, the last ones
        reused = None if deep is None else deep.recall(len(h))
        stages = len(self.up) if reused is None else first_level
        shortcuts = [h]
        for stage in self.down[: stages - 1]:
            for block in stage:
                h = self._run(block, h, condition, tokens)
            shortcuts.append(h)
        for block in self.middle if reused is None else ():
            h = self._run(block, h, condition, tokens)
        h = h if reused is None else reused
        for stage in self.up[-stages:]:
            if deep is not None and len(shortcuts) == first_level:
                deep.features = h
            h = torch.cat([h, shortcuts.pop()], dim=1)
            for block in stage:
                h = self._run(block, h, condition, tokens)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.config.patch_size)

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # no block has dropout
        return block(*inputs)

    def _check(self, latent: Tensor, timestep: Tensor, embedding: Tensor) -> None:
        c = self.config
        if latent.ndim != 4 or latent.shape[1] != c.latent_channels:
            raise ValueError(f"latent must be (B, {c.latent_channels}, T, F), got {tuple(latent.shape)}")
        if latent.shape[2] % c.downsampling or latent.shape[3] % c.downsampling:
            raise ValueError(f"T and F of a latent must be multiples of {c.downsampling}, got {tuple(latent.shape)}")
        if timestep.shape != latent.shape[:1]:
            raise ValueError(f"timestep must be ({len(latent)},), got {tuple(timestep.shape)}")
        if embedding.shape != (len(latent), c.condition_dim):
            raise ValueError(f"embedding must be ({len(latent)}, {c.condition_dim}), got {tuple(embedding.shape)}")
