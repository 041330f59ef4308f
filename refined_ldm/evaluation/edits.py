"""Edits compared with the right answer, a scene with one event exchanged or cut out, and with trivial answers.

`SoundScenes.exchange` renders a scene and its counterfactual, so the right answer is known sample by sample. The
detail classifier says which sounds a result has. Rows: {"task", "method", "strength", "measure", "value", "low",
"high", "clips"}.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from refined_ldm.editing import differing_stretch, read_sound
from refined_ldm.evaluation.detail_classifier import CLASS_NAMES, DetailClassifier
from refined_ldm.evaluation.metrics import bootstrap_interval, share
from refined_ldm.mel import hz_to_mel
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import SoundScenes

if TYPE_CHECKING:
    from refined_ldm.text_to_audio import RefinedAudioLDM

RATE = 16_000  # Hz
MARGIN = 0.07  # s, the length of a frame of the mel: nearer to an exchanged event its frames hold it too
STRENGTHS = (0.6, 0.8, 0.9)
CUTOFF = 3600  # Hz, above which sounds are drawn anew: .45 of 8 kHz
PEAK = """
import resource, sys
from refined_ldm import RefinedAudioLDM
model = RefinedAudioLDM.from_preset("tiny")
model.generate_long("rain falls", float(sys.argv[1]), steps=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
Progress = Callable[[str, int, int], None]


def quiet(*_: object) -> None:
    """Report no progress."""


def row(task: str, method: str, measure: str, values: Sequence[float], strength: float | None = None) -> dict:
    """A row of the table: the mean of `values` and its 95 % interval; booleans are counted as a share."""
    values = np.asarray(values)
    if values.dtype == bool:
        found = share(values.astype(float))
    else:
        low, high = bootstrap_interval(np.mean, values) if len(values) > 1 else (values[0], values[0])
        found = {"value": float(values.mean()), "low": float(low), "high": float(high), "clips": len(values)}
    return {"task": task, "method": method, "strength": strength, "measure": measure, **found}


@torch.no_grad()
def class_logits(classifier: DetailClassifier, waveform: torch.Tensor) -> torch.Tensor:
    """The classifier's logits (classes,), in the order of CLASS_NAMES, for each class to be in a waveform (N,)."""
    waveform = waveform[: len(waveform) // 160 * 160].to(classifier.device)
    return classifier.class_logits(classifier.mel(waveform[None]))[0]


def has(classifier: DetailClassifier, waveform: torch.Tensor, name: str, among: int = 2) -> bool:
    """Whether the classifier counts a class among the `among` likeliest of a waveform (N,)."""
    return CLASS_NAMES.index(name) in class_logits(classifier, waveform).topk(among).indices.tolist()


def counterfactuals(count: int, split: str = "test") -> list[tuple[dict, dict, str]]:
    """`count` sequences "A then B" and the same with C for B -> [(before, after, name of C), …]."""
    scenes, found = SoundScenes(split, 8 * count, kinds=("sequence",)), []
    for index in range(len(scenes)):
        labels, names = scenes[index]["labels"], sorted(CLASSES)
        new = names[(names.index(labels[1]) + 1 + 7 * index) % len(names)]
        if new in labels or len(set(labels)) < 2:
            continue
        try:
            found.append((*scenes.exchange(index, 1, new), new))
        except ValueError:  # the new event is too loud in this scene
            continue
        if len(found) == count:
            break
    return found


def mel_distance(model: "RefinedAudioLDM", one: torch.Tensor, other: torch.Tensor, seconds: float) -> float:
    """Mean absolute difference of the log-mels of two waveforms (N,), up to `seconds`."""
    mels = model.mel(torch.stack([one.to(model.device), other.to(model.device)]))[:, 0, : int(seconds * 100)]
    return float((mels[0] - mels[1]).abs().mean())


def overlap(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Intersection over union of two stretches (first, last)."""
    common = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return common / (one[1] - one[0] + other[1] - other[0] - common)


def measure_edit(
    model: "RefinedAudioLDM", classifier: DetailClassifier, count: int, seed: int = 0, inversion_steps: int = 15,
    on_clips: Progress = quiet,
) -> list[dict]:  # fmt: skip
    """ "A then B" -> "A then C": whether C and A are in the result, B not, and the change of A's stretch."""
    pairs = counterfactuals(count)
    sdedit, inversion = "SDEdit", "DDPM inversion"
    ways = {
        ("rendered", None): lambda before, after: after["waveform"],
        ("input unchanged", None): lambda before, after: before["waveform"],
        ("caption alone", None): lambda before, after: model.generate([after["caption"]], seed=seed)[0],
    }
    for s in STRENGTHS:
        ways[sdedit, s] = lambda before, after, s=s: model.edit(before["waveform"], after["caption"], s, seed=seed)
        ways[inversion, s] = lambda before, after, s=s: model.edit(
            before["waveform"], after["caption"], s, "inversion", before["caption"], seed=seed, steps=inversion_steps
        )
    ways["DiffEdit", STRENGTHS[-1]] = lambda before, after: model.edit(
        before["waveform"], after["caption"], STRENGTHS[-1], "diffedit", before["caption"], seed=seed,
        steps=inversion_steps,
    )  # fmt: skip
    ways["inpainting from the event on", None] = lambda before, after: model.inpaint(
        before["waveform"], after["caption"], start=before["events"][1].onset - MARGIN, seed=seed
    )
    found, overlaps = {way: [] for way in ways}, []
    for done, (before, after, new) in enumerate(pairs, 1):
        kept, old = before["labels"]
        until = before["events"][1].onset - 2 * MARGIN
        for way, make in ways.items():
            result = make(before, after)
            found[way].append((
                has(classifier, result, new), has(classifier, result, kept), not has(classifier, result, old),
                has(classifier, result, new) and has(classifier, result, kept),
                mel_distance(model, result, before["waveform"], until),
            ))  # fmt: skip
        sound = read_sound(model, before["waveform"], None)
        stretch = differing_stretch(model, sound, after["caption"], before["caption"])
        ends = [item["events"][1].offset * RATE for item in (before, after)]
        overlaps.append(overlap(stretch, (before["events"][1].onset * RATE, min(max(ends), len(sound.waveform)))))
        on_clips("edit", done, len(pairs))
    measures = ("new event", "kept event", "old event gone", "new and kept", "log-mel L1 of the kept stretch")
    return [
        row("edit", method, measure, values, strength)
        for (method, strength), results in found.items()
        for measure, values in zip(measures, zip(*results, strict=True), strict=True)
    ] + [row("edit", "DiffEdit", "overlap of its stretch with the exchanged events", overlaps, STRENGTHS[-1])]


def jumps(model: "RefinedAudioLDM", waveform: torch.Tensor) -> torch.Tensor:
    """At each place of a waveform (N,) the largest mean step of the log-mel from frame to frame, within 30 ms."""
    mel = model.mel(waveform[None, : len(waveform) // 160 * 160].to(model.device))[0, 0]
    return (mel[1:] - mel[:-1]).abs().mean(1).unfold(0, 7, 1).amax(1).cpu()  # (T - 7,)


def jump(model: "RefinedAudioLDM", waveform: torch.Tensor, seconds: float) -> float:
    """The jump at a place; nearer than 40 ms to an end, the last one before it."""
    steps = jumps(model, waveform)
    return float(steps[min(max(0, round(seconds * 100) - 4), len(steps) - 1)])


def measure_inpaint(
    model: "RefinedAudioLDM", classifier: DetailClassifier, count: int, seed: int = 0, on_clips: Progress = quiet
) -> list[dict]:
    """ "A then B" with B cut out, redrawn where B was: whether B is in the result, and how smooth the seams are."""
    scenes, source = SoundScenes("test", count, kinds=("sequence",)), np.random.default_rng(seed)
    ways = ("rendered", "input unchanged", "caption alone", "inpainting")
    detected, kept, outside, seams = ({way: [] for way in ways} for _ in range(4))
    elsewhere = []
    for index in range(count):
        gap = scenes.exchange(index, 1, None)[1]["waveform"]
        whole = scenes.exchange(index, 1, scenes[index]["labels"][1])[0]
        caption, event, (first, last) = whole["caption"], whole["events"][1], whole["labels"]
        start, end = event.onset - MARGIN, min(event.offset + MARGIN, scenes.seconds)
        results = (whole["waveform"], gap, model.generate([caption], seed=seed)[0].cpu(),
                   model.inpaint(gap, caption, start, end, seed=seed).cpu())  # fmt: skip
        for way, result in zip(ways, results, strict=True):
            detected[way].append(has(classifier, result, last))
            kept[way].append(has(classifier, result, first))
            difference = (result - gap).abs()
            outside[way].append(float(torch.cat([difference[: round(start * RATE)],
                                                 difference[round(end * RATE) :]]).max()))  # fmt: skip
            places = (start, end) if end < scenes.seconds - 0.1 else (start,)
            seams[way] += [jump(model, result, place) for place in places]
        elsewhere += [jump(model, whole["waveform"], place) for place in source.uniform(0.1, scenes.seconds - 0.1, 8)]
        on_clips("inpaint", index + 1, count)
    usual = np.quantile(elsewhere, 0.95)
    return [
        *(row("inpaint", way, "missing event", values) for way, values in detected.items()),
        *(row("inpaint", way, "kept event", values) for way, values in kept.items()),
        *(row("inpaint", way, "largest difference outside the mask", values) for way, values in outside.items()),
        *(row("inpaint", way, "log-mel jump at the seam", values) for way, values in seams.items()),
        row("inpaint", "rendered", "log-mel jump at random places", elsewhere),
        *(row("inpaint", way, "seam within 95 % of random places", np.array(seams[way]) <= usual) for way in ways),
    ]


def measure_extend(
    model: "RefinedAudioLDM", classifier: DetailClassifier, count: int, seed: int = 0, on_clips: Progress = quiet
) -> list[dict]:
    """One event, continued by its own length: whether the new half has the same class, and no click at the join.

    Trivial answers: the sound repeated, and a sound of the caption put behind it.
    """
    scenes, elsewhere = SoundScenes("test", count, kinds=("event",)), []
    ways = ("extend", "input repeated", "caption alone")
    detected, clicks, seams = ({way: [] for way in ways} for _ in range(3))
    for index in range(count):
        sound, caption = scenes[index]["waveform"], scenes[index]["caption"]
        n, made = len(sound), model.generate([caption], seed=seed)[0].cpu()
        extended = model.extend(sound, caption, scenes.seconds, seed=seed).cpu()
        results = (extended, sound.repeat(2), torch.cat([sound, made]))
        for way, result in zip(ways, results, strict=True):
            steps = result.diff().abs()
            detected[way].append(has(classifier, result[n:], scenes[index]["labels"][0], 1))
            clicks[way].append(bool(steps[n - 1] <= steps.quantile(0.99)))
            seams[way].append(jump(model, result, scenes.seconds))
        elsewhere.append(jumps(model, sound).numpy())
        on_clips("extend", index + 1, count)
    usual = np.quantile(np.concatenate(elsewhere), 0.95)
    return [
        *(row("extend", way, "same class in the new half", values) for way, values in detected.items()),
        *(row("extend", way, "step at the join within 99 % of all steps", values) for way, values in clicks.items()),
        *(row("extend", way, "log-mel jump at the join", values) for way, values in seams.items()),
        row("extend", "rendered", "log-mel jump at all places", [float(of_clip.mean()) for of_clip in elsewhere]),
        *(row("extend", way, "join within 95 % of real places", np.array(seams[way]) <= usual) for way in ways),
    ]


def low_passed(waveform: torch.Tensor) -> torch.Tensor:
    """A waveform (N,) without anything above CUTOFF."""
    spectrum, hz = torch.fft.rfft(waveform), torch.fft.rfftfreq(len(waveform), 1 / RATE)
    return torch.fft.irfft(torch.where(hz <= CUTOFF, spectrum, 0), len(waveform))


def measure_upsample(
    model: "RefinedAudioLDM", classifier: DetailClassifier, count: int, seed: int = 0, on_clips: Progress = quiet
) -> list[dict]:
    """Events without their high frequencies: how near those that are drawn are to the rendered ones."""
    scenes = SoundScenes("test", count, kinds=("event",))
    high = round(float((hz_to_mel(CUTOFF) / hz_to_mel(model.config.mel.fmax)) * model.config.mel.n_mels))
    ways = ("rendered", "input unchanged", "caption alone", "super-resolution")
    distance, detected, below = ({way: [] for way in ways} for _ in range(3))
    for index in range(count):
        whole, caption = scenes[index]["waveform"], scenes[index]["caption"]
        low = low_passed(whole)
        results = (whole, low, model.generate([caption], seed=seed)[0],
                   model.super_resolve(low, caption, CUTOFF, seed=seed))  # fmt: skip
        mels = model.mel(torch.stack([whole, *results]))[:, 0, :, high:]
        for way, result, mel in zip(ways, results, mels[1:], strict=True):
            distance[way].append(float((mel - mels[0]).abs().mean()))
            detected[way].append(has(classifier, result, scenes[index]["labels"][0], 1))
            below[way].append(float(low_passed(result - low).norm() / low.norm()))
        on_clips("upsample", index + 1, count)
    return [
        *(row("upsample", way, f"log-mel L1 above {CUTOFF} Hz", values) for way, values in distance.items()),
        *(row("upsample", way, "class", values) for way, values in detected.items()),
        *(row("upsample", way, f"relative change below {CUTOFF} Hz", values) for way, values in below.items()),
    ]


def measure_long(
    model: "RefinedAudioLDM", classifier: DetailClassifier, count: int, seed: int = 0, on_clips: Progress = quiet
) -> list[dict]:
    """`count` sounds of 30 s with six captions: whether each part has its class, and the memory of 10 and of 30 s."""
    part, detected, following, made_alone = 5, [], [], []
    scenes = SoundScenes("test", 6 * count, kinds=("event",))
    for index in range(count):
        items = [scenes[6 * index + k] for k in range(6)]
        names, texts = [item["labels"][0] for item in items], [item["caption"] for item in items]
        captions = [(float(part * k), text) for k, text in enumerate(texts)]
        waveform, alone = model.generate_long(captions, 6.0 * part, seed=seed), model.generate(texts, seed=seed)
        for k in range(6):
            middle = waveform[round((part * k + 1.22) * RATE) :][: round(2.56 * RATE)]
            detected.append(has(classifier, middle, names[k], 1))
            following.append(has(classifier, middle, names[(k + 1) % 6], 1))
            made_alone.append(has(classifier, alone[k], names[k], 1))
        on_clips("long", index + 1, count)
    peaks = {}
    for seconds in (10, 30):
        done = subprocess.run([sys.executable, "-c", PEAK, str(seconds)], capture_output=True, text=True, check=True)
        peaks[seconds] = float(done.stdout.split()[-1])
    return [
        row("long", "MultiDiffusion", "class where it was asked for", detected),
        row("long", "caption alone", "class where it was asked for", made_alone),
        row("long", "MultiDiffusion", "class of the next caption", following),
        *(row("long", "MultiDiffusion", f"peak memory of {s} s, MB", [peak]) for s, peak in peaks.items()),
        row("long", "MultiDiffusion", "peak memory of 30 s, of that of 10 s", [peaks[30] / peaks[10]]),
    ]


def measure_loop(
    model: "RefinedAudioLDM", classifier: DetailClassifier, count: int, seed: int = 0, on_clips: Progress = quiet
) -> list[dict]:
    """Loops of one event: whether the class is there, and the step at the seam beside those within.

    Trivial answer: a sound that `generate` makes, repeated.
    """
    scenes, ways = SoundScenes("test", count, kinds=("event",)), ("loop", "caption alone")
    detected, seams, inner, clicks, jumping = ({way: [] for way in ways} for _ in range(5))
    for index in range(count):
        caption = scenes[index]["caption"]
        results = model.loop(caption, seed=seed), model.generate([caption], seed=seed)[0]
        for way, waveform in zip(ways, results, strict=True):
            detected[way].append(has(classifier, waveform, scenes[index]["labels"][0], 1))
            turned = waveform.roll(len(waveform) // 2)  # its seam is in the middle
            seams[way].append(jump(model, turned, len(turned) / 2 / RATE))
            within = jumps(model, waveform)
            inner[way].append(float(within.quantile(0.95)))
            jumping[way].append(bool(seams[way][-1] <= within.max()))
            clicks[way].append(bool((waveform[0] - waveform[-1]).abs() <= waveform.diff().abs().max()))
        on_clips("loop", index + 1, count)
    return [
        *(row("loop", way, "class", values) for way, values in detected.items()),
        *(row("loop", way, "log-mel jump at the seam", values) for way, values in seams.items()),
        *(row("loop", way, "95 % of the jumps within", values) for way, values in inner.items()),
        *(row("loop", way, "jump at the seam no larger than those within", values) for way, values in jumping.items()),
        *(row("loop", way, "step at the seam no larger than those within", values) for way, values in clicks.items()),
    ]


def measure_variations(
    model: "RefinedAudioLDM", classifier: DetailClassifier, count: int, seed: int = 0, on_clips: Progress = quiet
) -> list[dict]:
    """Four variations of one event: whether the class stays, how near they are to it, and how far from each other.

    Trivial answers: the sound itself, four times, and four sounds of its caption.
    """
    scenes, ways = SoundScenes("test", count, kinds=("event",)), ("variations", "input unchanged", "caption alone")
    detected, distance, apart = ({way: [] for way in ways} for _ in range(3))
    for index in range(count):
        sound, caption = scenes[index]["waveform"], scenes[index]["caption"]
        results = (model.variations(sound, caption, seed=seed), sound.expand(4, -1),
                   model.generate([caption] * 4, seed=seed))  # fmt: skip
        for way, made in zip(ways, results, strict=True):
            detected[way] += [has(classifier, one, scenes[index]["labels"][0], 1) for one in made]
            distance[way] += [mel_distance(model, one, sound, scenes.seconds) for one in made]
            pairs = combinations(made, 2)
            apart[way].append(np.mean([mel_distance(model, *pair, scenes.seconds) for pair in pairs]))
        on_clips("variations", index + 1, count)
    return [
        *(row("variations", way, "same class", values) for way, values in detected.items()),
        *(row("variations", way, "log-mel L1 to the sound", values) for way, values in distance.items()),
        *(row("variations", way, "log-mel L1 between two", values) for way, values in apart.items()),
    ]


def measure_interpolate(
    model: "RefinedAudioLDM", classifier: DetailClassifier, count: int, seed: int = 0, on_clips: Progress = quiet
) -> list[dict]:
    """From one event to another in five steps, by captions and by sounds: whether the ends have the two classes, and
    how often the second gains on the first from one step to the next (chance: half).

    Trivial answer: the two ends mixed in equal steps.
    """
    scenes = SoundScenes("test", 2 * count, kinds=("event",))
    ways = ("captions", "captions, mixed", "sounds", "sounds, mixed")
    ends, gains = ({way: [] for way in ways} for _ in range(2))
    weight = torch.linspace(0, 1, 5)[:, None]
    for index in range(count):
        items = [scenes[2 * index], scenes[2 * index + 1]]
        names = [item["labels"][0] for item in items]
        if names[0] == names[1]:
            continue
        sounds, captions = [item["waveform"] for item in items], [item["caption"] for item in items]
        for way, given in (("captions", captions), ("sounds", sounds)):
            path = model.interpolate(*given, seed=seed).cpu()
            for name, made in ((way, path), (f"{way}, mixed", torch.lerp(path[:1], path[-1:], weight))):
                ends[name] += [has(classifier, made[k], names[k], 1) for k in (0, -1)]
                logits = torch.stack([class_logits(classifier, one) for one in made])
                first, second = (logits[:, CLASS_NAMES.index(label)] for label in names)
                gains[name] += ((second - first).diff() > 0).tolist()
        on_clips("interpolate", index + 1, count)
    return [
        *(row("interpolate", way, "class of each end", values) for way, values in ends.items()),
        *(row("interpolate", way, "steps towards the other class", values) for way, values in gains.items()),
    ]


TASKS = {"edit": measure_edit, "inpaint": measure_inpaint, "extend": measure_extend, "upsample": measure_upsample,
         "long": measure_long, "loop": measure_loop, "variations": measure_variations,
         "interpolate": measure_interpolate}  # fmt: skip
