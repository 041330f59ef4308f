"""Vocoders and discriminators at equal cost, the table that notebook 04 draws.

    python -m tests.benchmark.compare_vocoders runs/tiny [SECONDS]

Every head starts from random weights and learns for the same CPU seconds on spectral distances; every set of
discriminators joins the shipped vocoder for the same CPU seconds. Then 100 test clips go through each. runs/tiny holds
the rendered clips.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from refined_ldm import display
from refined_ldm.config import StageConfig
from refined_ldm.data.batches import loader
from refined_ldm.discriminators import Discriminators, DiscriminatorsConfig, stft_loss
from refined_ldm.evaluation.adherence import rendered_clips
from refined_ldm.evaluation.embeddings.aisfx import Aisfx
from refined_ldm.evaluation.metrics import bootstrap_interval, frechet_distance
from refined_ldm.hifigan import HiFiGAN, HiFiGANConfig
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.inputs import cached_clips
from refined_ldm.training.stages import train_hifigan

SMALL = HiFiGANConfig(channels=128)  # the published layout, 1/8 of its channels


def heads(tiny):
    """{name: settings}: the published layout and ways to leave it."""
    bare = replace(tiny, griffin_lim_iterations=0, mel_corrections=0)
    return {
        "transposed convolutions": SMALL,
        "the same with snake": replace(SMALL, snake=True),
        "inverse-STFT head": bare,
        "inverse STFT with snake": replace(bare, snake=True),
        "inverse STFT on Griffin-Lim": replace(tiny, mel_corrections=0),
        "the same + mel corrections": tiny,
    }


DISCRIMINATOR_FILES = {
    "no discriminator": None,
    "periods": DiscriminatorsConfig(width=4, scales=0),
    "periods + scales": DiscriminatorsConfig(width=4),
    "resolutions": DiscriminatorsConfig(width=4, periods=(), scales=0, resolutions=(256, 512, 1024)),
}


def trained(model, clips, seconds, settings, discriminators=None):
    """Train for so many CPU seconds, on a cosine that is cut off there -> steps made."""
    start, steps = time.process_time(), 0
    model.config = replace(model.config, training={**model.config.training, "hifigan": settings})
    for step in train_hifigan(model, loader(clips, settings.batch_size, 0), discriminators=discriminators):
        steps = step.index
        if time.process_time() - start > seconds:
            break
    model.eval()
    return steps


@torch.no_grad()
def measured(model, waveform, embed, reference):
    sound = torch.cat([model.vocoder(model.mel(part)) for part in waveform.split(25)])
    l1 = (model.mel(sound) - model.mel(waveform)).abs().mean((1, 2, 3)).numpy()
    stft = np.array([stft_loss(a[None], b[None]).item() for a, b in zip(sound, waveform, strict=True)])
    embedded = embed(sound, 16_000).numpy()
    distance = frechet_distance(embedded, reference, 32)
    interval = bootstrap_interval(lambda x: frechet_distance(x, reference, 32), embedded, resamples=50, centre=True)
    return {"log-mel L1": (l1.mean(), *bootstrap_interval(np.mean, l1)),
            "STFT distance": (stft.mean(), *bootstrap_interval(np.mean, stft)),
            "Fréchet distance": (distance, *interval)}  # fmt: skip


def main(run, seconds):
    torch.set_num_threads(1)
    embed, tiny = Aisfx.load(), RefinedAudioLDM.from_preset("tiny")
    clips = cached_clips(tiny.config, run)
    waveform = torch.stack([item["waveform"] for item in rendered_clips(100)])
    reference = embed(torch.stack([item["waveform"] for item in rendered_clips(300, "val")]), 16_000).numpy()
    common = {"batch_size": 8, "betas": (0.8, 0.99), "max_grad_norm": 5.0, "crop_frames": 40, "stft_weight": 0.2}
    table = []

    def add(group, name, model, steps):
        for measure, (value, low, high) in measured(model, waveform, embed, reference).items():
            table.append({"group": group, "name": name, "measure": measure, "value": float(value), "low": float(low),
                          "high": float(high), "steps": steps, "cpu_seconds": seconds, "clips": 100})  # fmt: skip
        print(group, name, steps, [round(row["value"], 3) for row in table[-3:]], flush=True)

    spectral = StageConfig(10_000, lr=7e-4, **common)
    for name, config in heads(tiny.config.hifigan).items():
        model = RefinedAudioLDM.from_preset("tiny")
        torch.manual_seed(0)
        model.vocoder = HiFiGAN(config, model.config.mel)
        add("heads, from nothing", name, model, trained(model, clips, seconds, spectral))
    for name, config in DISCRIMINATOR_FILES.items():
        model = RefinedAudioLDM.from_preset("tiny")
        torch.manual_seed(0)
        discriminators = None if config is None else Discriminators(config)
        steps = trained(model, clips, seconds, StageConfig(10_000, lr=2e-4, **common), discriminators)
        add("discriminators, of the shipped vocoder", name, model, steps)
    display.save_table(table, "04_heads")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 150.0)
