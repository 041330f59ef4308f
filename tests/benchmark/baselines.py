"""Other people's code for the same work, at the published sizes and with random weights: what ours is timed against.

Nothing here is needed to use the project. Each function builds one thing and raises ImportError, with the command that
installs it, where its package is missing (`pip install "refined-ldm[bench]"`, and those two that go without what they
ask for: `pip install --no-deps audioldm==0.1.1 msclap==1.3.4`). The authors' CLAPs are in reference_clap.py.
"""

import importlib
import sys
import types
from contextlib import contextmanager
from importlib.util import find_spec
from unittest.mock import patch

BENCH = 'pip install "refined-ldm[bench]"'


def diffusers_unet(embedding_dim=512):
    """The U-Net of AudioLDM-S as diffusers' pipeline has it: (z_t, t, class_labels=embedding).sample."""
    widths = (128, 256, 384, 640)
    return _package("diffusers").UNet2DConditionModel(
        in_channels=8, out_channels=8, block_out_channels=widths, layers_per_block=2, cross_attention_dim=widths,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"), attention_head_dim=tuple(w // 32 for w in widths),
        class_embed_type="simple_projection", class_embeddings_concat=True,
        projection_class_embeddings_input_dim=embedding_dim,
    )  # fmt: skip


def diffusers_vae():
    """AudioLDM's VAE as diffusers has it."""
    return _package("diffusers").AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(128, 256, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


def transformers_vocoder():
    """AudioLDM's HiFi-GAN as transformers has it: log-mel (T, F) -> waveform (T * 160,)."""
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    sizes = SpeechT5HifiGanConfig(
        model_in_dim=64, sampling_rate=16_000, upsample_initial_channel=1024, upsample_rates=[5, 4, 2, 2, 2],
        upsample_kernel_sizes=[16, 16, 8, 4, 4], resblock_kernel_sizes=[3, 7, 11],
        resblock_dilation_sizes=[[1, 3, 5]] * 3, normalize_before=False,
    )  # fmt: skip
    return SpeechT5HifiGan(sizes)


def audioldm_unet():
    """The U-Net of AudioLDM-S in its authors' code, which its training uses too: (z_t, t, y=embedding).

    Use it inside `audioldm_package()`.
    """
    settings = importlib.import_module("audioldm.utils").default_audioldm_config("audioldm-s-full")["model"]["params"]
    module = importlib.import_module("audioldm.latent_diffusion.openaimodel")
    return module.UNetModel(**settings["unet_config"]["params"])


@contextmanager
def audioldm_package():
    """AudioLDM's modules can be imported, without what its packages ask for at their top and with today's librosa."""
    if find_spec("audioldm") is None or find_spec("einops") is None:
        raise ImportError("audioldm is not here: pip install --no-deps audioldm==0.1.1 einops")
    librosa = _package("librosa")
    (root,) = find_spec("audioldm").submodule_search_locations
    packages = {}
    for name in ("audioldm", "audioldm.audio"):  # their __init__ asks for torchaudio
        packages[name] = types.ModuleType(name)
        packages[name].__path__ = [f"{root}/{name.removeprefix('audioldm').strip('.')}"]
    names = ("sr", "n_fft", "n_mels", "fmin", "fmax")

    def mel(*sizes):
        return librosa.filters.mel(**dict(zip(names, sizes, strict=True)))

    with patch.dict(sys.modules, packages):  # which forgets what was imported inside, too
        stft = importlib.import_module("audioldm.audio.stft")
        pad = patch.object(stft, "pad_center", lambda window, size: librosa.util.pad_center(window, size=size))
        with patch.object(stft, "librosa_mel_fn", mel), pad:
            yield


def librosa_log_mel(waveform):
    """librosa's log-mel of each clip, as its users write it: waveform (B, N), numpy -> (B, F, T)."""
    import numpy as np

    librosa = _package("librosa")

    def one(clip):
        mel = librosa.feature.melspectrogram(y=clip, sr=16_000, n_fft=1024, hop_length=160, n_mels=64, power=1)
        return np.log(np.maximum(mel, 1e-5))

    return np.stack([one(clip) for clip in waveform])


def torchlibrosa_log_mel():
    """torchlibrosa's front end, which HTS-AT and PANNs use: a module, waveform (B, N) -> (B, 1, T, F)."""
    from torch import nn

    stft = _package("torchlibrosa.stft")
    sizes = dict(freeze_parameters=True)
    return nn.Sequential(
        stft.Spectrogram(n_fft=1024, hop_length=160, win_length=1024, **sizes),
        stft.LogmelFilterBank(sr=16_000, n_fft=1024, n_mels=64, fmin=0, fmax=8000, **sizes),
    )


def _package(name):
    if find_spec(name.partition(".")[0]) is None:
        raise ImportError(f"{name.partition('.')[0]} is not here: {BENCH}")
    return importlib.import_module(name)
