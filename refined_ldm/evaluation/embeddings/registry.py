"""Embeddings by name: the networks in which sets of sounds are compared, each with its authors' front end.

`aisfx` comes from a wheel and `tiny-gpt2` with this package; for the others the published file is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refined_ldm.base.files import sha256
from refined_ldm.clap import SHIPPED, Clap
from refined_ldm.evaluation.embeddings.aisfx import AISFX_SHA256, Aisfx
from refined_ldm.evaluation.embeddings.panns import PANNS_FILES, Cnn14
from refined_ldm.evaluation.embeddings.vggish import VGGISH_FILE, VGGish
from refined_ldm.published.hub import CONDITIONERS, fetch

CLAPS = ("tiny-gpt2", "ms-clap-2023", "laion-clap")
EMBEDDINGS = ("aisfx", *CLAPS, "panns", "vggish")


@dataclass(frozen=True)
class Embedding:
    """A loaded embedding."""

    version: str  # of the weights
    sha256: str  # of their file
    sample_rate: int  # Hz
    embed_audio: Callable[[Tensor], tuple[Tensor, Tensor | None]]  # (1, N) -> rows (K, D), class probabilities (1, C)
    embed_text: Callable[[list[str]], np.ndarray] | None = None  # n captions -> (n, D), in the space of the sounds
    seconds: float | None = None  # length of the part used, from the start of a clip; None: the whole clip
    shortest: int = 1  # samples


def open_embedding(
    name: str, checkpoint: str | Path | None = None, tokenizer: str | Path | None = None, device: str = "cpu"
) -> Embedding:
    """Load an embedding by its name in EMBEDDINGS; `checkpoint`: its published file, `tokenizer`: LAION-CLAP's folder.

    Raises ValueError for another name or a file that does not fit, FileNotFoundError naming the file to download.
    """
    if name not in EMBEDDINGS:
        raise ValueError(f"no embedding {name!r}: choose one of {', '.join(EMBEDDINGS)}")
    if name in CLAPS:
        return _clap(name, checkpoint, tokenizer, device)
    if name == "aisfx":
        return _aisfx(checkpoint, device)
    if checkpoint is None:
        published = {"panns": PANNS_FILES, "vggish": VGGISH_FILE}[name]
        raise FileNotFoundError(f"{name} needs its published file as checkpoint: {published}")
    return {"panns": _panns, "vggish": _vggish}[name](Path(checkpoint), device)


def _aisfx(checkpoint: str | Path | None, device: str) -> Embedding:
    network = Aisfx.load(checkpoint).to(device)

    @torch.inference_mode()
    def embed_audio(waveform: Tensor) -> tuple[Tensor, None]:  # equal to `network(waveform)`, a minute at a time
        blocks = network.blocks(network.log_mel(waveform.to(network.window)))[0]
        return torch.cat([network.embed(part) for part in blocks.split(64)]).mean(dim=0, keepdim=True), None

    return Embedding("aisfx 0.1.2", AISFX_SHA256, network.sample_rate, embed_audio)


def _clap(name: str, checkpoint: str | Path | None, tokenizer: str | Path | None, device: str) -> Embedding:
    file = checkpoint or (SHIPPED[name] if name in SHIPPED else fetch(CONDITIONERS[name]))
    clap = Clap.load(name, file, tokenizer).to(device)
    rate = clap.config.sample_rate

    @torch.inference_mode()
    def embed_audio(waveform: Tensor) -> tuple[Tensor, None]:
        return clap.embed_audio(waveform, rate), None

    @torch.inference_mode()
    def embed_text(captions: list[str]) -> np.ndarray:
        parts = [clap.embed_text(captions[start : start + 64]).cpu() for start in range(0, len(captions), 64)]
        return torch.cat(parts).numpy()

    version = f"{name}, {Path(file).name}"
    return Embedding(version, sha256(file), rate, embed_audio, embed_text, clap.config.seconds)


def _panns(checkpoint: Path, device: str) -> Embedding:
    network = Cnn14.load(checkpoint).to(device)

    def embed_audio(waveform: Tensor) -> tuple[Tensor, Tensor]:
        embedding, logits = network(waveform)
        return embedding, logits.cpu().double().softmax(dim=1)  # over all classes, as in AudioGen and AudioLDM

    return Embedding(f"Cnn14 of PANNs, {checkpoint.name}", sha256(checkpoint), network.sample_rate, embed_audio)


def _vggish(checkpoint: Path, device: str) -> Embedding:
    network = VGGish.load(checkpoint).to(device)

    def embed_audio(waveform: Tensor) -> tuple[Tensor, None]:
        return network(waveform)[0], None  # one row for each window

    version = f"VGGish, {checkpoint.name}"
    return Embedding(version, sha256(checkpoint), network.sample_rate, embed_audio, shortest=network.shortest)
