"""The error budget: the error of each stage from mel to sound, measured on the same clips.

A clip goes through the mel alone (inverted by Griffin-Lim or by the vocoder), through the mel and the VAE, and its
caption through the whole model. The difference between two of these routes is the error of the stage between them.

Notebook: 04
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from refined_ldm.audio import SILENCE
from refined_ldm.base.integers import whole, whole_numbers
from refined_ldm.data.sources import open_recordings
from refined_ldm.discriminators import stft_loss
from refined_ldm.evaluation.adherence import Embed, rendered_clips
from refined_ldm.evaluation.metrics import bootstrap_interval, frechet_distance, kernel_distance
from refined_ldm.evaluation.pitch import Crepe, pitch_errors, played_notes
from refined_ldm.evaluation.scores import projection
from refined_ldm.mel import griffin_lim

if TYPE_CHECKING:
    from refined_ldm.text_to_audio import RefinedAudioLDM

WAYS = {  # in the order of the table
    "original": "the clips themselves",
    "griffin_lim_32": "mel, Griffin-Lim of 32 iterations",
    "griffin_lim_200": "mel, Griffin-Lim of 200",
    "vocoder": "mel, vocoder",
    "vae_griffin_lim_32": "mel, VAE, Griffin-Lim of 32",
    "vae_vocoder": "mel, VAE, vocoder",
    "generated": "the whole model, from captions",
}
MEASURES = {  # definition and unit
    "log-mel L1": "mean distance of the mels, nats",
    "STFT distance": "multi-resolution: spectral convergence + log-magnitude L1",
    "Fréchet distance": "aiSFX, 64 principal components, to 1000 other clips",
    "kernel distance": "aiSFX, gaussian kernel, to the same",
    "pitch error": "single notes of piano and flute, cents, median of the notes",
}
DRAWS = 100  # resamples for the interval of a distance between sets


@dataclass(frozen=True)
class Cost:
    """One measure of one route."""

    way: str  # a key of WAYS
    measure: str  # a key of MEASURES
    value: float
    low: float  # 95 % bootstrap interval
    high: float
    baseline: float  # the value of the original clips
    clips: int
    faulty: int  # clips that are not finite, silent though their original is not, or at full scale for 10 ms


@torch.no_grad()
def copies(
    model: "RefinedAudioLDM", waveform: torch.Tensor, ways: Sequence[str] = tuple(WAYS)[:-1], batch_size: int = 25
) -> dict[str, torch.Tensor]:
    """Clips (B, N) -> {way: (B, N)}, for every way except the one from captions.

    Notebook: 04
    """
    inverse = {
        "griffin_lim_32": lambda mel: griffin_lim(mel, model.config.mel, 32),
        "griffin_lim_200": lambda mel: griffin_lim(mel, model.config.mel, 200),
        "vocoder": model.vocoder,
    }
    made = {way: [] for way in ways}
    for part in waveform.split(whole("batch_size", batch_size, 1)):
        mel = model.mel(part.to(model.device))
        reconstruction = model.vae.decode(model.vae.encode(mel).mean)
        for way in ways:
            if way == "original":
                made[way].append(part)
            else:
                source = reconstruction if way.startswith("vae_") else mel
                made[way].append(inverse[way.removeprefix("vae_")](source).cpu())
    return {way: torch.cat(parts) for way, parts in made.items()}


def faults(waveforms: torch.Tensor, originals: torch.Tensor, run: int = 160) -> torch.Tensor:
    """Clips (B, N) and originals (B, N) -> (B,) bool: non-finite, silent though the original is not, or clipped.

    Clipped: at least `run` consecutive samples at full scale, where they round to the largest 16-bit number.
    """
    finite = waveforms.isfinite().all(1)
    silent = (waveforms.abs().amax(1) < SILENCE) & (originals.abs().amax(1) >= SILENCE)
    full = (waveforms.abs() >= 1 - 2**-15).float()
    held = torch.nn.functional.avg_pool1d(full[:, None], run, 1).amax((1, 2)) >= 1
    return ~finite | silent | held


def error_budget(
    model: "RefinedAudioLDM",
    embed: Embed,
    tracker: Crepe | None = None,
    clips: int = 250,
    seed: int = 0,
    whole: bool = True,
    recordings: torch.Tensor | None = None,
    on_way: Callable[[str], None] | None = None,
) -> list[Cost]:
    """Measure every route of WAYS on `clips` scenes of `test`.

    embed: waveform (B, N), sample rate -> embedding (B, D); tracker: None omits pitch; whole: generate from the
    captions too. recordings: clips (B, N) in place of the scenes, without captions and notes; Fréchet and kernel
    distances are then to these clips themselves. on_way(way) is called after each route.

    Notebook: 04
    """
    clips, seed = whole_numbers(clips=clips, seed=seed)
    rate = model.config.mel.sample_rate
    if recordings is None:
        items = rendered_clips(clips, seed=seed, seconds=model.config.seconds)
        originals = torch.stack([item["waveform"] for item in items])
        others = rendered_clips(1000, "val", seed=seed, seconds=model.config.seconds)
        others = torch.stack([item["waveform"] for item in others])
    else:
        items, originals = [], recordings
    reference = embed(originals if recordings is not None else others, rate).cpu().numpy()
    onto = projection(reference, min(64, len(reference) // 2))
    whole, tracker = whole and bool(items), tracker if items else None
    sounds = copies(model, originals)
    if whole:
        captions = [item["caption"] for item in items]
        batches = [captions[start : start + 8] for start in range(0, len(captions), 8)]
        sounds["generated"] = torch.cat([model.generate(batch, seed=seed).cpu() for batch in batches])
    if tracker is not None:
        notes, cents = played_notes(50, model.config.seconds, seed)
        played = copies(model, notes)

    mel, costs, baselines = model.mel.cpu(), [], {}
    for way, sound in sounds.items():
        bad = int(faults(sound, originals).sum())

        def add(
            measure: str, value: float, interval: tuple[float, float], n: int, way: str = way, bad: int = bad
        ) -> None:
            baselines.setdefault(measure, value)  # the clips themselves come first
            costs.append(Cost(way, measure, float(value), *map(float, interval), float(baselines[measure]), n, bad))

        if way != "generated":  # many sounds fit a caption: distances to a single one have no meaning
            parts = zip(sound.split(25), originals.split(25), strict=True)
            l1 = torch.cat([(mel(a) - mel(b)).abs().mean((1, 2, 3)) for a, b in parts]).numpy()
            stft = np.array([stft_loss(a[None], b[None]).item() for a, b in zip(sound, originals, strict=True)])
            for measure, each in (("log-mel L1", l1), ("STFT distance", stft)):
                add(measure, each.mean(), bootstrap_interval(np.mean, each), len(each))
        embeddings = embed(sound, rate).cpu().numpy()
        distances = (
            ("Fréchet distance", frechet_distance, onto(embeddings), onto(reference)),
            ("kernel distance", _kernel, embeddings, reference),
        )
        for measure, distance, a, b in distances:
            interval = bootstrap_interval(lambda x, f=distance, b=b: f(x, b), a, resamples=DRAWS, centre=True)
            add(measure, distance(a, b), interval, len(a))
        if tracker is not None and way in played:
            errors = pitch_errors(tracker, played[way], notes, cents)
            errors = errors[np.isfinite(errors)]
            add("pitch error", np.median(errors), bootstrap_interval(np.median, errors), len(errors))
        if on_way:
            on_way(way)
    model.mel.to(model.device)
    return costs


def _kernel(a: np.ndarray, b: np.ndarray) -> float:
    return kernel_distance(a, b, "gaussian")


def table(costs: list[Cost]) -> str:
    """A text table: one line for each route, one column for each measure, with its interval."""
    measures = [m for m in MEASURES if any(cost.measure == m for cost in costs)]
    lines = ["way back to sound".ljust(36) + "".join(f"{m:>26}" for m in measures) + "  faulty"]
    for way, name in WAYS.items():
        row = {cost.measure: cost for cost in costs if cost.way == way}
        cells = (f"{c.value:.3g} ({c.low:.3g} … {c.high:.3g})" if c else "-" for c in map(row.get, measures))
        if row:
            faulty = max(cost.faulty for cost in row.values())
            lines.append(name.ljust(36) + "".join(f" {cell:>25}" for cell in cells) + f"{faulty:>8}")
    return "\n".join(lines)


def read_recordings(path: str | Path, seconds: float) -> torch.Tensor:
    """The first `seconds` of each recording in a table, folder or known data set (B, N); shorter ones are padded."""
    data = open_recordings(path, seconds=seconds)
    return torch.stack([data[i]["waveform"] for i in range(len(data))])
