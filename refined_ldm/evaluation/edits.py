"""Edits against the right answer: rendered scenes with one event exchanged or cut out, and the trivial answers beside.

`SoundScenes.exchange` renders a scene and its counterfactual, so what an edit should have kept is known to the sample.
`detail_judge.py` says which sounds a result has. Rows: {"task", "method", "strength", "measure", "value", "low",
"high", "clips"}.
"""

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from refined_ldm.evaluation.detail_judge import CLASS_NAMES, DetailJudge
from refined_ldm.evaluation.metrics import bootstrap_interval, share
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.scenes.dataset import SoundScenes

if TYPE_CHECKING:
    from refined_ldm.text_to_audio import RefinedAudioLDM

RATE = 16_000  # Hz
MARGIN = 0.07  # s, the length of a frame of the mel: nearer to an exchanged event its frames hold it too
STRENGTHS = (0.6, 0.8)
PEAK = """
import resource, sys
from refined_ldm import RefinedAudioLDM
model = RefinedAudioLDM.from_preset("tiny")
model.generate_long("rain falls", float(sys.argv[1]), steps=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
Progress = Callable[[str, int, int], None]


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
def has(judge: DetailJudge, waveform: torch.Tensor, name: str, among: int = 2) -> bool:
    """Whether the judge counts a class among the `among` likeliest of a waveform (N,)."""
    waveform = waveform[: len(waveform) // 160 * 160]
    logits = judge.classifier(judge.frames(judge.mel(waveform[None])).amax(1))[0]
    return CLASS_NAMES.index(name) in logits.topk(among).indices.tolist()


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
    mels = model.mel(torch.stack([one, other]))[:, 0, : int(seconds * 100)]
    return float((mels[0] - mels[1]).abs().mean())


def measure_edit(
    model: "RefinedAudioLDM", judge: DetailJudge, count: int, seed: int = 0, inversion_steps: int = 15,
    on_clips: Progress = lambda *_: None,
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
    ways["inpainting from the event on", None] = lambda before, after: model.inpaint(
        before["waveform"], after["caption"], start=before["events"][1].onset, seed=seed
    )
    found = {way: [] for way in ways}
    for done, (before, after, new) in enumerate(pairs, 1):
        kept, old = before["labels"]
        until = before["events"][1].onset - MARGIN
        for way, make in ways.items():
            result = make(before, after)
            found[way].append((
                has(judge, result, new), has(judge, result, kept), not has(judge, result, old),
                has(judge, result, new) and has(judge, result, kept),
                mel_distance(model, result, before["waveform"], until),
            ))  # fmt: skip
        on_clips("edit", done, len(pairs))
    measures = ("new event", "kept event", "old event gone", "new and kept", "log-mel L1 of the kept stretch")
    return [
        row("edit", method, measure, values, strength)
        for (method, strength), results in found.items()
        for measure, values in zip(measures, zip(*results, strict=True), strict=True)
    ]


def jump(model: "RefinedAudioLDM", waveform: torch.Tensor, seconds: float) -> float:
    """The largest mean step of the log-mel from a frame to the next, within 30 ms of a place."""
    mel = model.mel(waveform[None, : len(waveform) // 160 * 160])[0, 0]
    steps, at = (mel[1:] - mel[:-1]).abs().mean(1), round(seconds * 100)
    return float(steps[max(0, at - 4) : at + 3].max())


def measure_inpaint(
    model: "RefinedAudioLDM", judge: DetailJudge, count: int, seed: int = 0, on_clips: Progress = lambda *_: None
) -> list[dict]:
    """ "A then B" with B cut out, redrawn where B was: whether B is in the result, and how smooth the seams are."""
    scenes, source = SoundScenes("test", count, kinds=("sequence",)), np.random.default_rng(seed)
    detected = {"rendered": [], "input unchanged": [], "caption alone": [], "inpainting": []}
    kept, outside, seams, places = [], [], {"inpainting": [], "rendered, at the same places": []}, []
    for index in range(count):
        gap = scenes.exchange(index, 1, None)[1]["waveform"]
        whole = scenes.exchange(index, 1, scenes[index]["labels"][1])[0]
        event, (first, last) = whole["events"][1], whole["labels"]
        start, end = event.onset, min(event.offset, scenes.seconds)
        result = model.inpaint(gap, whole["caption"], start, end, seed=seed)
        for way, waveform in (("rendered", whole["waveform"]), ("input unchanged", gap), ("inpainting", result),
                              ("caption alone", model.generate([whole["caption"]], seed=seed)[0])):  # fmt: skip
            detected[way].append(has(judge, waveform, last))
        kept.append(has(judge, result, first))
        difference = (result - gap).abs()
        outside.append(float(torch.cat([difference[: round(start * RATE)], difference[round(end * RATE) :]]).max()))
        for place in (start, end) if end < scenes.seconds - 0.1 else (start,):
            seams["inpainting"].append(jump(model, result, place))
            seams["rendered, at the same places"].append(jump(model, whole["waveform"], place))
        places += [jump(model, whole["waveform"], place) for place in source.uniform(0.1, scenes.seconds - 0.1, 8)]
        on_clips("inpaint", index + 1, count)
    seams["rendered, at random places"] = places
    within = np.array(seams["inpainting"]) <= np.quantile(places, 0.95)
    return [
        *(row("inpaint", way, "missing event", values) for way, values in detected.items()),
        row("inpaint", "inpainting", "kept event", kept),
        row("inpaint", "inpainting", "largest difference outside the mask", outside),
        *(row("inpaint", way, "log-mel jump at the seam", values) for way, values in seams.items()),
        row("inpaint", "inpainting", "seam within 95 % of random places", within),
    ]


def measure_extend(
    model: "RefinedAudioLDM", judge: DetailJudge, count: int, seed: int = 0, on_clips: Progress = lambda *_: None
) -> list[dict]:
    """One event, continued by its own length: whether the new half has the same class, and no click at the join."""
    scenes, detected, clicks = SoundScenes("test", count, kinds=("event",)), {"extend": [], "caption alone": []}, []
    for index in range(count):
        item = scenes[index]
        n, name = len(item["waveform"]), item["labels"][0]
        result = model.extend(item["waveform"], item["caption"], scenes.seconds, seed=seed)
        detected["extend"].append(has(judge, result[n:], name, 1))
        detected["caption alone"].append(has(judge, model.generate([item["caption"]], seed=seed)[0], name, 1))
        steps = result.diff().abs()
        clicks.append(bool(steps[n - 1] <= steps.quantile(0.99)))
        on_clips("extend", index + 1, count)
    return [*(row("extend", way, "same class in the new half", values) for way, values in detected.items()),
            row("extend", "extend", "step at the join within 99 % of all steps", clicks)]  # fmt: skip


def measure_long(
    model: "RefinedAudioLDM", judge: DetailJudge, count: int, seed: int = 0, on_clips: Progress = lambda *_: None
) -> list[dict]:
    """`count` sounds of 30 s with six captions: whether each part has its class, and the memory of 10 and of 30 s."""
    part, detected, chance = 5, [], []
    scenes = SoundScenes("test", 6 * count, kinds=("event",))
    for index in range(count):
        items = [scenes[6 * index + k] for k in range(6)]
        captions = [(float(part * k), item["caption"]) for k, item in enumerate(items)]
        waveform = model.generate_long(captions, 6.0 * part, seed=seed)
        for k in range(6):
            middle = waveform[round((part * k + 1.22) * RATE) :][: round(2.56 * RATE)]
            detected.append(has(judge, middle, items[k]["labels"][0], 1))
            chance.append(has(judge, middle, items[(k + 1) % 6]["labels"][0], 1))
        on_clips("long", index + 1, count)
    rows = [row("long", "MultiDiffusion", "class where it was asked for", detected),
            row("long", "compared with the next caption", "class where it was asked for", chance)]  # fmt: skip
    for seconds in (10, 30):
        done = subprocess.run([sys.executable, "-c", PEAK, str(seconds)], capture_output=True, text=True, check=True)
        rows.append(row("long", f"{seconds} s", "peak memory, MB", [float(done.stdout.split()[-1])]))
    return rows


def measure_loop(
    model: "RefinedAudioLDM", judge: DetailJudge, count: int, seed: int = 0, on_clips: Progress = lambda *_: None
) -> list[dict]:
    """Loops of one event: whether the class is there, and the jump at the seam beside those at other places."""
    scenes, detected, inner = SoundScenes("test", count, kinds=("event",)), {"loop": [], "generate": []}, []
    seams = {"loop": [], "generate": []}
    for index in range(count):
        item = scenes[index]
        sounds = {"loop": model.loop(item["caption"], seed=seed),
                  "generate": model.generate([item["caption"]], seed=seed)[0]}  # fmt: skip
        for way, waveform in sounds.items():
            detected[way].append(has(judge, waveform, item["labels"][0], 1))
            seams[way].append(jump(model, waveform.roll(len(waveform) // 2), len(waveform) / 2 / RATE))
        inner += [jump(model, sounds["loop"], place) for place in np.linspace(0.3, 2.2, 8)]
        on_clips("loop", index + 1, count)
    return [*(row("loop", way, "class", values) for way, values in detected.items()),
            *(row("loop", way, "log-mel jump at the seam", values) for way, values in seams.items()),
            row("loop", "loop, at other places", "log-mel jump at the seam", inner)]  # fmt: skip


TASKS = {"edit": measure_edit, "inpaint": measure_inpaint, "extend": measure_extend, "long": measure_long,
         "loop": measure_loop}  # fmt: skip
