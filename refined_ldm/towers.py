"""The conditioner's transformers: HTS-AT for audio, GPT-2 or RoBERTa for captions.

Tensors have the names of the `transformers` library, and the outputs are equal to its outputs. Importing that library
would take longer than importing torch and generating a sound.

Notebook: 02
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 4  # mel frames or bands on a side of HTS-AT's patches
WINDOW = 8  # patches on a side of its attention windows
DROPOUT = 0.1  # of both text towers


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor, dropout: float = 0.0) -> Tensor:
    """Multi-head attention (B, L, C) -> (B, L, C); mask: True where there is attention, or numbers that are added."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


def _dense(channels_in: int, channels_out: int, **more: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(channels_in, channels_out), **more})


def _initialise(tower: nn.Module, std: float) -> None:
    """Draw weights of layers and tables from a normal distribution; biases and the rows of padding are zero."""
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | TransposedLinear):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            if getattr(module, "padding_idx", None) is not None:
                module.weight.data[module.padding_idx] = 0


# --- audio ---


class WindowAttention(nn.Module):
    """Self-attention within windows of S patches, with a bias for each offset. (B, S, C), mask (W, S, S) -> (B, S, C)

    Source: Swin, Liu et al. 2021, eq. 4.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, heads))
        row, column = torch.arange(WINDOW).repeat_interleave(WINDOW), torch.arange(WINDOW).repeat(WINDOW)
        down, right = (x[:, None] - x + WINDOW - 1 for x in (row, column))  # offsets of two patches, from 0 on
        self.register_buffer("relative_position_index", down * (2 * WINDOW - 1) + right)  # (S, S)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)  # (heads, S, S)
        bias = (bias + mask[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        q, k, v = self.query(x), self.key(x), self.value(x)
        return _attend(q, k, v, self.heads, bias.to(q))


class WindowBlock(nn.Module):
    """A block of Swin on a square of patches, its windows shifted by half a window or not. (B, H, W, C) -> the same"""

    def __init__(self, channels: int, heads: int, side: int, shifted: bool):
        super().__init__()
        self.shift = WINDOW // 2 if shifted and side > WINDOW else 0
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attention = nn.ModuleDict({"self": WindowAttention(channels, heads), "output": _dense(channels, channels)})
        self.intermediate, self.output = _dense(channels, 4 * channels), _dense(4 * channels, channels)
        mask = torch.zeros(1, WINDOW**2, WINDOW**2)
        if self.shift:  # a window at the edge holds patches from opposite sides, which do not attend to each other
            place = torch.arange(side)
            region = (place >= side - WINDOW).long() + (place >= side - self.shift)
            region = _windows((3 * region[:, None] + region)[None, :, :, None])[..., 0]  # (windows, S)
            mask = -100.0 * (region[:, None] != region[:, :, None])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layernorm_before(x).roll((-self.shift, -self.shift), (1, 2))
        h = self.attention["output"].dense(self.attention["self"](_windows(h), self.mask))
        count = x.shape[1] // WINDOW
        h = h.view(-1, count, count, WINDOW, WINDOW, x.shape[3]).transpose(2, 3).reshape(x.shape)
        x = x + h.roll((self.shift, self.shift), (1, 2))
        return x + self.output.dense(F.gelu(self.intermediate.dense(self.layernorm_after(x))))


def _windows(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B * windows, S, C)"""
    return x.unflatten(2, (-1, WINDOW)).unflatten(1, (-1, WINDOW)).transpose(2, 3).reshape(-1, WINDOW**2, x.shape[3])


class PatchMerging(nn.Module):
    """Four neighbouring patches become one of twice the width. (B, H, W, C) -> (B, H / 2, W / 2, 2 C)"""

    def __init__(self, channels: int):
        super().__init__()
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(4 * channels)

    def forward(self, x: Tensor) -> Tensor:
        four = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        return self.reduction(self.norm(torch.cat(four, dim=3)))


class PatchEmbedding(nn.Module):
    """Image (B, 1, S, S) -> embedded patches (B, H, W, C); with `positions`, each knows its row and column."""

    def __init__(self, channels: int, side: int, positions: bool):
        super().__init__()
        self.proj = nn.Conv2d(1, channels, PATCH, PATCH)
        self.norm = nn.LayerNorm(channels)
        self.positions = positions
        for axis in ("rows", "columns") if positions else ():
            self.register_parameter(axis, nn.Parameter(nn.init.normal_(torch.empty(side, channels), std=0.02)))

    def forward(self, image: Tensor) -> Tensor:
        h = self.norm(self.proj(image).permute(0, 2, 3, 1))
        return h + self.rows[:, None] + self.columns if self.positions else h


class HTSAT(nn.Module):
    """HTS-AT (Chen et al. 2022): a Swin transformer over a folded mel. Decibels (B, 1, T, F) -> pooled (B, C)

    image_size: pixels on a side of the image; bands: F; width: channels of the first stage, which double at each
    further one. Raises ValueError for an image that does not divide into windows at every stage.

    Notebook: 02
    """

    def __init__(
        self, image_size: int, bands: int, width: int, depths: tuple[int, ...], heads: tuple[int, ...], positions: bool
    ):
        super().__init__()
        side, last = image_size // PATCH, len(depths) - 1
        if image_size % (PATCH * WINDOW << last) or image_size % bands:
            unit = PATCH * WINDOW << last
            raise ValueError(f"image_size must be a multiple of {unit} and of n_mels {bands}, got {image_size}")
        self.image_size = image_size
        self.batch_norm = nn.BatchNorm2d(bands)
        self.patch_embed = PatchEmbedding(width, side, positions)
        self.layers = nn.ModuleList()
        for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            blocks = [WindowBlock(width << stage, count, side >> stage, shifted=k % 2 == 1) for k in range(depth)]
            self.layers.append(nn.ModuleDict({"blocks": nn.Sequential(*blocks)}))
            if stage < last:
                self.layers[-1]["downsample"] = PatchMerging(width << stage)
        self.norm = nn.LayerNorm(width << last)
        _initialise(self, std=((width << last) * 2 * len(depths)) ** -0.5)

    def fold(self, mel: Tensor) -> Tensor:
        """Fold a mel (B, 1, T, F) into an image (B, 1, S, S): stretches of time, each with its bands, below each other.

        Raises ValueError for a mel that is longer than the image.
        """
        rows = self.image_size // mel.shape[3]
        frames = rows * self.image_size
        if mel.shape[2] > frames:
            raise ValueError(f"a mel must have at most {frames} frames, got {tuple(mel.shape)}")
        if mel.shape[2] < frames:
            mel = F.interpolate(mel, (frames, mel.shape[3]), mode="bicubic", align_corners=True)
        return mel.unflatten(2, (rows, -1)).transpose(3, 4).flatten(2, 3)

    def forward(self, decibels: Tensor) -> Tensor:
        h = self.patch_embed(self.fold(self.batch_norm(decibels.transpose(1, 3)).transpose(1, 3)))
        for stage in self.layers:
            for layer in stage.values():
                h = layer(h)
        return self.norm(h).mean((1, 2))


# --- captions ---


class TransposedLinear(nn.Module):
    """A linear layer whose weight is stored as (in, out), as GPT-2's are."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels_in, channels_out))
        self.bias = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


class GPT2Block(nn.Module):
    """Attention and a feed-forward layer, each after its norm. (B, L, C), mask (B, 1, L, L) -> (B, L, C)"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(DROPOUT)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        linear = TransposedLinear
        self.attn = nn.ModuleDict({"c_attn": linear(width, 3 * width), "c_proj": linear(width, width)})
        self.mlp = nn.ModuleDict({"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.attn.c_attn(self.ln_1(x)).chunk(3, dim=2)
        h = _attend(q, k, v, self.heads, mask, DROPOUT * self.training)
        x = x + self.dropout(self.attn.c_proj(h))
        h = F.gelu(self.mlp.c_fc(self.ln_2(x)), approximate="tanh")
        return x + self.dropout(self.mlp.c_proj(h))


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019): token ids (B, L), mask (B, L), 1 on tokens -> states (B, L, W)"""

    def __init__(self, vocabulary: int, positions: int, width: int, layers: int, heads: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(positions, width)
        self.drop, self.ln_f = nn.Dropout(DROPOUT), nn.LayerNorm(width)
        self.h = nn.ModuleList(GPT2Block(width, heads) for _ in range(layers))
        _initialise(self, std=0.02)
        for block in self.h:  # smaller, the more layers there are to sum up
            for part in (block.attn, block.mlp):
                nn.init.normal_(part.c_proj.weight, std=0.02 / (2 * layers) ** 0.5)

    @property
    def token_table(self) -> nn.Embedding:
        """The embeddings of all tokens."""
        return self.wte

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.drop(self.wte(ids) + self.wpe.weight[: ids.shape[1]])
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        for block in self.h:
            x = block(x, causal & mask.bool()[:, None, None])
        return self.ln_f(x)

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """States (B, L, W), mask (B, L) -> those of the last tokens (B, W), which alone attend to whole captions."""
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]


class RobertaLayer(nn.Module):
    """Attention and a feed-forward layer, each before its norm. (B, L, C), mask (B, 1, 1, L) -> (B, L, C)"""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(DROPOUT)
        projections = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        output = _dense(width, width, LayerNorm=nn.LayerNorm(width))
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(projections), "output": output})
        self.intermediate = _dense(width, 4 * width)
        self.output = _dense(4 * width, width, LayerNorm=nn.LayerNorm(width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (project(x) for project in self.attention["self"].values())
        h = _attend(q, k, v, self.heads, mask, DROPOUT * self.training)
        output = self.attention["output"]
        x = output.LayerNorm(x + self.dropout(output.dense(h)))
        h = self.output.dense(F.gelu(self.intermediate.dense(x)))
        return self.output.LayerNorm(x + self.dropout(h))


class Roberta(nn.Module):
    """RoBERTa (Liu et al. 2019): token ids (B, L), mask (B, L), 1 on tokens -> states (B, L, W)"""

    PAD = 1  # token id of padding; positions are counted from the next number on

    def __init__(self, vocabulary: int, positions: int, width: int, layers: int, heads: int):
        super().__init__()
        self.embeddings = nn.ModuleDict({
            "word_embeddings": nn.Embedding(vocabulary, width, self.PAD),
            "position_embeddings": nn.Embedding(positions, width, self.PAD),
            "token_type_embeddings": nn.Embedding(1, width), "LayerNorm": nn.LayerNorm(width),
        })  # fmt: skip
        self.drop = nn.Dropout(DROPOUT)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(RobertaLayer(width, heads) for _ in range(layers))})
        self.pooler = _dense(width, width)
        _initialise(self, std=0.02)

    @property
    def token_table(self) -> nn.Embedding:
        """The embeddings of all tokens."""
        return self.embeddings.word_embeddings

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        tables, tokens = self.embeddings, ids != self.PAD
        positions = tokens.cumsum(1) * tokens + self.PAD
        x = tables.word_embeddings(ids) + tables.position_embeddings(positions) + tables.token_type_embeddings.weight
        x = self.drop(tables.LayerNorm(x))
        for layer in self.encoder.layer:
            x = layer(x, mask.bool()[:, None, None])
        return x

    def pool(self, states: Tensor, mask: Tensor) -> Tensor:
        """States (B, L, W) -> (B, W), from those of the first tokens."""
        return self.pooler.dense(states[:, 0]).tanh()


TEXT_TOWERS = {"gpt2": GPT2, "roberta": Roberta}
