"""The gain of a LoRA and what the model forgets: measured with and without it, on the same captions and seeds.

Each has its own defaults, so the model with a LoRA has less guidance (`adapters.lora.GUIDANCE`). Gained: the distances
of generated sounds to recordings of the same captions that were held out. Forgotten: the details of captions that the
model knew before, by the detail classifier. Rows: {"measure", "sound", "value", "low", "high", "clips"}.

Notebook: 08
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.evaluation.details import DETAILS, CaptionedScene, classify_details, named_details
from refined_ldm.evaluation.metrics import bootstrap_interval, frechet_distance, kernel_distance, share

if TYPE_CHECKING:
    from refined_ldm.text_to_audio import RefinedAudioLDM

FRECHET, KERNEL = "Fréchet distance", "kernel distance"
BASE, LORA, LOSS = "base", "LoRA", "LoRA minus base"
Embed = Callable[[torch.Tensor, int], torch.Tensor]  # waveform (B, N), sample rate in Hz -> embedding (B, D)
Progress = Callable[[str, int, int], None]  # called with what is generated, sounds done, sounds in all


def generate_all(
    model: "RefinedAudioLDM", captions: Sequence[str], seconds: float, seed: int, name: str, on_clips: Progress
) -> torch.Tensor:
    """A sound for each of n captions, 8 at once; sounds of equal captions differ -> (n, N)."""
    sounds = []
    for start in range(0, len(captions), 8):
        part = captions[start : start + 8]
        sounds.append(model.generate(part, seconds, seed=seed + start, sampler="dpmpp", on_note=lambda _: None).cpu())
        on_clips(name, min(start + 8, len(captions)), len(captions))
    return torch.cat(sounds)


def distances(embedded: dict[str, np.ndarray], held_out: np.ndarray) -> list[dict]:
    """Distances of sets of embeddings (n, D) to the held-out ones (m, D) -> rows, with 95 % intervals over the sets."""
    rows, pca = [], min(16, len(held_out) - 1, held_out.shape[1])
    for measure, distance in ((FRECHET, lambda x: frechet_distance(x, held_out, pca)),
                              (KERNEL, lambda x: kernel_distance(x, held_out, "gaussian"))):  # fmt: skip
        for sound, embedding in embedded.items():
            low, high = bootstrap_interval(distance, embedding, resamples=200, centre=True)
            rows.append({"measure": measure, "sound": sound, "value": distance(embedding), "low": low, "high": high,
                         "clips": len(embedding)})  # fmt: skip
    return rows


@torch.no_grad()
def measure_gain(
    model: "RefinedAudioLDM",
    lora: str,
    learned: Sequence[dict],
    held_out: Sequence[dict],
    embed: Embed,
    seed: int = 0,
    on_clips: Progress = lambda *_: None,
) -> list[dict]:
    """Distances to the held-out recordings: generated without and with the LoRA, and the bounds beside them.

    learned, held_out: items with "waveform" (N,) and "caption". Bounds: the recordings that were trained on, and the
    held-out ones through VAE and vocoder, which a LoRA does not change.
    """
    real, rate = torch.stack([item["waveform"] for item in held_out]), model.config.mel.sample_rate
    captions, seconds = [item["caption"] for item in held_out], real.shape[1] / rate
    copied = [model.to_waveform(model.decode(model.encode(part.to(model.device)))).cpu() for part in real.split(8)]
    sounds = {
        "recordings trained on": torch.stack([item["waveform"] for item in learned]),
        "held out, through VAE and vocoder": torch.cat(copied),
        BASE: generate_all(model, captions, seconds, seed, BASE, on_clips),
    }
    model.load_lora(lora)
    sounds[LORA] = generate_all(model, captions, seconds, seed, LORA, on_clips)
    model.remove_loras()
    embedded = {name: embed(waveform, rate).cpu().numpy() for name, waveform in sounds.items()}
    return distances(embedded, embed(real, rate).cpu().numpy())


def measure_forgetting(
    model: "RefinedAudioLDM",
    lora: str,
    scenes: Sequence[CaptionedScene],
    classifier: DetailClassifier,
    seed: int = 0,
    on_clips: Progress = lambda *_: None,
) -> list[dict]:
    """The share of right details without and with the LoRA, and the mean paired difference, negative if it forgets.

    "all details" is the mean over everything that a caption asks for, one number a caption.
    """
    captions = [scene.caption for scene in scenes]
    texts, seconds = list(map(str, captions)), scenes[0].item["waveform"].shape[0] / model.config.mel.sample_rate
    right = {}
    for name in (BASE, LORA):
        if name == LORA:
            model.load_lora(lora)
        sounds = generate_all(model, texts, seconds, seed, f"{name}, old captions", on_clips)
        right[name] = classify_details(classifier, sounds, captions).correct()
    model.remove_loras()
    for of in right.values():
        of["all details"] = _of_captions(of, scenes)
    rows = []
    for detail in right[BASE]:
        if not len(right[BASE][detail]):
            continue
        rows += [{"measure": detail, "sound": name, **share(of[detail])} for name, of in right.items()]
        difference = right[LORA][detail] - right[BASE][detail]
        low, high = bootstrap_interval(np.mean, difference) if len(difference) > 1 else (difference[0],) * 2
        rows.append({"measure": detail, "sound": LOSS, "value": float(difference.mean()), "low": float(low),
                     "high": float(high), "clips": len(difference)})  # fmt: skip
    return rows


def _of_captions(right, scenes):
    """{detail: 0 or 1 of each caption that names it} -> the mean of each caption (n,)."""
    found = [[float(x)] for x in right["class"]]
    named = [named_details(scene.caption) for scene in scenes]
    for detail in DETAILS:
        places = [i for i, of in enumerate(named) if detail in of]
        for i, x in zip(places, right[detail], strict=True):
            found[i].append(float(x))
    return np.array([np.mean(of) for of in found])
