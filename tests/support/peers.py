"""What the equality tests share: random weights in which every tensor counts, AudioLDM's package, a made-up ESC-50."""

from contextlib import ExitStack, contextmanager

import pytest
import torch

from refined_ldm.audio import save_audio
from tests.benchmark import baselines as peers


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


def published_ms_clap(clap):
    """Tensors of a `Clap` as MS-CLAP's authors name them: the names that `ms_clap_state` reads."""
    state, published = clap.state_dict(), {}
    for name, tensor in state.items():
        if ".attention.self.query." in name:
            parts = (state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value"))
            name, tensor = name.replace(".attention.self.query.", ".attn.qkv."), torch.cat(list(parts))
        elif ".attention.self.key." in name or ".attention.self.value." in name:
            continue
        for ours, theirs in (("mel_bank", "audio.audio_encoder.logmel_extractor.melW"), (".batch_norm.", ".bn0."),
                             (".attention.output.dense.", ".attn.proj."), (".attention.self.", ".attn."),
                             (".intermediate.dense.", ".mlp.fc1."), (".output.dense.", ".mlp.fc2."),
                             (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."),
                             ("audio.audio_encoder.", "audio_encoder.base.htsat."),
                             ("audio_projection.", "audio_encoder.projection."), ("text.", "caption_encoder.base."),
                             ("text_projection.", "caption_encoder.projection.")):  # fmt: skip
            name = name.replace(ours, theirs) if not name.startswith("caption_encoder.") else name
        published[name] = tensor.T.contiguous() if name.endswith("melW") else tensor
    return published


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
    """That of tests.benchmark.baselines; where it is not installed, the test is skipped."""
    with ExitStack() as stack:
        try:
            stack.enter_context(peers.audioldm_package())
        except ImportError as missing:
            pytest.skip(str(missing))
        yield
