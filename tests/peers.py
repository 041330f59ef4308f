"""What the equality tests share: random weights in which every tensor counts, AudioLDM's package, a made-up ESC-50."""

import importlib
import importlib.util
import sys
import types
from contextlib import contextmanager

import librosa
import pytest
import torch

from refined_ldm.audio import save_audio


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module, scale=0.05, seed=0):
    """No weight is zero or one any more, and batch norm has statistics like those of decibels."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:  # all but Fourier kernels and mel banks
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(-30, 5, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(100, 300, generator=generator)
    return module.eval()


def write_esc50(folder, classes=("dog", "sea_waves", "hand_saw"), each=2):
    """A folder laid out as ESC-50 is: a tone for each class, 5 s at 44.1 kHz -> the folder."""
    (folder / "meta").mkdir(parents=True)
    (folder / "audio").mkdir()
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for clip in range(len(classes) * each):
        kind, name = clip % len(classes), f"1-{100_000 + clip}-A-{clip % len(classes)}.wav"
        seconds = torch.arange(5 * 44_100) / 44_100
        tone = 0.3 * torch.sin(2 * torch.pi * 440 * (1 + kind) * seconds) + 0.001 * noise(len(seconds), seed=clip)
        save_audio(folder / "audio" / name, tone, 44_100)
        lines.append(f"{name},1,{kind},{classes[kind]},False,{100_000 + clip},A")
    (folder / "meta" / "esc50.csv").write_text("\n".join([*lines, ""]))
    return folder


@contextmanager
def audioldm_package():
    """AudioLDM's modules can be imported, without what its packages ask for at their top and with today's librosa."""
    found = importlib.util.find_spec("audioldm")
    if found is None or importlib.util.find_spec("einops") is None:
        pytest.skip("audioldm is not here: pip install --no-deps audioldm==0.1.1 einops")
    (root,) = found.submodule_search_locations
    with pytest.MonkeyPatch.context() as patch:
        for name in ("audioldm", "audioldm.audio"):  # their __init__ asks for torchaudio
            package = types.ModuleType(name)
            package.__path__ = [f"{root}/{name.removeprefix('audioldm').strip('.')}"]
            patch.setitem(sys.modules, name, package)
        stft = importlib.import_module("audioldm.audio.stft")
        names = ("sr", "n_fft", "n_mels", "fmin", "fmax")
        patch.setattr(
            stft, "librosa_mel_fn", lambda *sizes: librosa.filters.mel(**dict(zip(names, sizes, strict=True)))
        )
        patch.setattr(stft, "pad_center", lambda window, size: librosa.util.pad_center(window, size=size))
        yield
        for name in [name for name in sys.modules if name.startswith("audioldm.")]:
            patch.delitem(sys.modules, name, raising=False)
