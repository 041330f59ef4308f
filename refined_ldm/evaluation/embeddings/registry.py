"""Embeddings by name: the networks through which sets of sounds are compared, each as its authors listen.

`aisfx` comes from a wheel and `tiny-gpt2` with this package; of the others the published file is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from refined_ldm.evaluation.embeddings.aisfx import AISFX_SHA256, Aisfx
from refined_ldm.evaluation.embeddings.panns import PANNS_FILES, Cnn14
from refined_ldm.evaluation.embeddings.vggish import VGGISH_FILE, VGGish
from refined_ldm.files import sha256
from refined_ldm.published.hub import CONDITIONERS, fetch

CLAPS = ("tiny-gpt2", "ms-clap-2023", "laion-clap")
EMBEDDINGS = ("aisfx", *CLAPS, "panns", "vggish")


@dataclass(frozen=True)
class Embedding:
    """An embedding, ready to listen."""

    version: str  # whose weights they are
    sha256: str  # of their file
    sample_rate: int  # Hz
    hear: Callable  # waveform (1, N) at that rate -> rows (K, D), probabilities of classes (1, C) or None
    read: Callable | None = None  # n captions -> (n, D), where sounds and captions share the space
    seconds: float | None = None  # the start of a clip that is heard; None: all of it
    shortest: int = 1  # samples


def open_embedding(name, checkpoint=None, tokenizer=None, device="cpu"):
    """The Embedding of a name in EMBEDDINGS; `checkpoint` is its published file, `tokenizer` LAION-CLAP's directory.

    Raises ValueError for another name or a file that does not fit, FileNotFoundError saying what to get.
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


def _aisfx(checkpoint, device):
    judge = Aisfx.load(checkpoint).to(device)

    @torch.inference_mode()
    def hear(waveform):  # as `judge(waveform)` does, but a minute at a time
        blocks = judge.blocks(judge.log_mel(waveform.to(judge.window)))[0]
        return torch.cat([judge.embed(part) for part in blocks.split(64)]).mean(dim=0, keepdim=True), None

    return Embedding("aisfx 0.1.2", AISFX_SHA256, judge.sample_rate, hear)


def _clap(name, checkpoint, tokenizer, device):
    from refined_ldm.clap import SHIPPED, Clap  # transformers takes its time to import

    file = checkpoint or (SHIPPED[name] if name in SHIPPED else fetch(CONDITIONERS[name]))
    clap = Clap.load(name, file, tokenizer).to(device)
    rate = clap.config.sample_rate

    @torch.inference_mode()
    def hear(waveform):
        return clap.embed_audio(waveform, rate), None

    @torch.inference_mode()
    def read(captions):
        parts = [clap.embed_text(captions[start : start + 64]).cpu() for start in range(0, len(captions), 64)]
        return torch.cat(parts).numpy()

    return Embedding(f"{name}, {Path(file).name}", sha256(file), rate, hear, read, clap.config.seconds)


def _panns(checkpoint, device):
    network = Cnn14.load(checkpoint).to(device)

    def hear(waveform):
        embedding, logits = network(waveform)
        return embedding, logits.cpu().double().softmax(dim=1)  # over all classes, as AudioGen and AudioLDM count them

    return Embedding(f"Cnn14 of PANNs, {checkpoint.name}", sha256(checkpoint), network.sample_rate, hear)


def _vggish(checkpoint, device):
    network = VGGish.load(checkpoint).to(device)

    def hear(waveform):
        return network(waveform)[0], None  # one row a window

    return Embedding(f"VGGish, {checkpoint.name}", sha256(checkpoint), network.sample_rate, hear,
                     shortest=network.shortest)  # fmt: skip
