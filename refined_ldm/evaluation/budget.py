"""The error budget: what each stage of the way back to sound costs, measured on the same clips.

A clip goes through the mel alone (and comes back by Griffin-Lim or by the vocoder), through the mel and the VAE, and
its caption through the whole model. What is lost between two of these ways is the price of the stage between them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from refined_ldm.audio import SILENCE
from refined_ldm.data.captioned_audio import CaptionedAudio
from refined_ldm.discriminators import stft_loss
from refined_ldm.evaluation.adherence import rendered_clips
from refined_ldm.evaluation.metrics import bootstrap_interval, frechet_distance, kernel_distance
from refined_ldm.evaluation.pitch import pitch_errors, played_notes
from refined_ldm.evaluation.scores import projection
from refined_ldm.integers import whole, whole_numbers
from refined_ldm.mel import griffin_lim

WAYS = {  # in the order of the table
    "original": "the clips themselves",
    "griffin_lim_32": "mel, Griffin-Lim of 32 iterations",
    "griffin_lim_200": "mel, Griffin-Lim of 200",
    "vocoder": "mel, vocoder",
    "vae_griffin_lim_32": "mel, VAE, Griffin-Lim of 32",
    "vae_vocoder": "mel, VAE, vocoder",
    "generated": "the whole model, from captions",
}
MEASURES = {  # what each tells, and its unit
    "log-mel L1": "mean distance of the mels, nats",
    "STFT distance": "multi-resolution: spectral convergence + log-magnitude L1",
    "Fréchet distance": "aiSFX, 64 main directions, to 1000 other clips",
    "kernel distance": "aiSFX, gaussian kernel, to the same",
    "pitch error": "single notes of piano and flute, cents, median of the notes",
}
DRAWS = 100  # sets of clips, for the interval of a distance between sets


@dataclass(frozen=True)
class Cost:
    """One measure of one way."""

    way: str  # a key of WAYS
    measure: str  # a key of MEASURES
    value: float
    low: float  # 95 % of what other clips of the same sort would give
    high: float
    floor: float  # what the clips themselves score
    clips: int
    faulty: int  # clips that are not finite, silent though their original is not, or at full scale for 10 ms on end


@torch.no_grad()
def copies(model, waveform, ways=tuple(WAYS)[:-1], batch_size=25):
    """Clips (B, N) -> {way: (B, N)}, every way but the one from captions."""
    back = {
        "griffin_lim_32": lambda mel: griffin_lim(mel, model.config.mel, 32),
        "griffin_lim_200": lambda mel: griffin_lim(mel, model.config.mel, 200),
        "vocoder": model.vocoder,
    }
    made = {way: [] for way in ways}
    for part in waveform.split(whole("batch_size", batch_size, 1)):
        mel = model.mel(part.to(model.device))
        smoothed = model.vae.decode(model.vae.encode(mel).mean)
        for way in ways:
            if way == "original":
                made[way].append(part)
            else:
                given = smoothed if way.startswith("vae_") else mel
                made[way].append(back[way.removeprefix("vae_")](given).cpu())
    return {way: torch.cat(parts) for way, parts in made.items()}


def faults(waveforms, originals, run=160):
    """(B, N), (B, N) -> (B,) bool: not finite, silent where the original is not, or `run` samples on end at full scale.

    At full scale is what rounds to the last of 16 bits: where a sound was cut off.
    """
    finite = waveforms.isfinite().all(1)
    silent = (waveforms.abs().amax(1) < SILENCE) & (originals.abs().amax(1) >= SILENCE)
    full = (waveforms.abs() >= 1 - 2**-15).float()
    held = torch.nn.functional.avg_pool1d(full[:, None], run, 1).amax((1, 2)) >= 1
    return ~finite | silent | held


def error_budget(model, judge, tracker=None, clips=250, seed=0, whole=True, recordings=None, on_way=None):
    """Measure every way on `clips` scenes of `test` -> list of Cost.

    judge: waveform (B, N), sample rate -> embedding (B, D); tracker: a `Crepe`, None leaves pitch out; whole: generate
    from the captions too. recordings: (B, N) clips in place of the scenes, without captions and notes; they are all
    there are of their kind, so Fréchet and kernel distances are to the clips themselves. on_way(way) is called when a
    way is measured.
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
    reference = judge(originals if recordings is not None else others, rate).cpu().numpy()
    onto = projection(reference, min(64, len(reference) // 2))
    whole, tracker = whole and bool(items), tracker if items else None
    sounds = copies(model, originals)
    if whole:
        sounds["generated"] = torch.cat([
            model.generate([item["caption"] for item in items[start : start + 8]], seed=seed).cpu()
            for start in range(0, len(items), 8)
        ])  # fmt: skip
    if tracker is not None:
        notes, cents = played_notes(50, model.config.seconds, seed)
        played = copies(model, notes)

    mel, costs, floors = model.mel.cpu(), [], {}
    for way, sound in sounds.items():
        bad = int(faults(sound, originals).sum())

        def add(measure, value, interval, n, way=way, bad=bad):
            floors.setdefault(measure, value)  # the clips themselves come first
            costs.append(Cost(way, measure, float(value), *map(float, interval), float(floors[measure]), n, bad))

        if way != "generated":  # a caption is no recipe for one clip: those distances would say nothing
            l1 = torch.cat([(mel(a) - mel(b)).abs().mean((1, 2, 3))
                            for a, b in zip(sound.split(25), originals.split(25), strict=True)]).numpy()  # fmt: skip
            stft = np.array([stft_loss(a[None], b[None]).item() for a, b in zip(sound, originals, strict=True)])
            for measure, each in (("log-mel L1", l1), ("STFT distance", stft)):
                add(measure, each.mean(), bootstrap_interval(np.mean, each), len(each))
        heard = judge(sound, rate).cpu().numpy()
        near, aim = onto(heard), onto(reference)
        for measure, distance, a, b in (("Fréchet distance", frechet_distance, near, aim),
                                        ("kernel distance", _kernel, heard, reference)):  # fmt: skip
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


def _kernel(a, b):
    return kernel_distance(a, b, "gaussian")


def table(costs):
    """For people: a line a way, a column a measure, each with its interval."""
    measures = [m for m in MEASURES if any(cost.measure == m for cost in costs)]
    lines = ["way back to sound".ljust(36) + "".join(f"{m:>26}" for m in measures) + "  faulty"]
    for way, name in WAYS.items():
        row = {cost.measure: cost for cost in costs if cost.way == way}
        cells = (f"{c.value:.3g} ({c.low:.3g} … {c.high:.3g})" if c else "-" for c in map(row.get, measures))
        if row:
            faulty = max(cost.faulty for cost in row.values())
            lines.append(name.ljust(36) + "".join(f" {cell:>25}" for cell in cells) + f"{faulty:>8}")
    return "\n".join(lines)


def read_recordings(path, seconds):
    """A CSV file or folder of recordings -> the start of each (B, N), `seconds` long; shorter ones are padded."""
    data = (CaptionedAudio.from_folder if Path(path).is_dir() else CaptionedAudio.from_csv)(path, seconds)
    return torch.stack([data[i]["waveform"] for i in range(len(data))])
