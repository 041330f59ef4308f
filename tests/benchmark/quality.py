"""What a second buys: right details and Fréchet distance against seconds, for each way of sampling.

python -m tests.benchmark --no-peers --quality 32 --out figures
"""

import numpy as np
import torch

from refined_ldm.adapters.student import STEPS
from refined_ldm.evaluation.budget import projection
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.evaluation.details import classify_details, select_scenes
from refined_ldm.evaluation.embeddings.aisfx import Aisfx
from refined_ldm.evaluation.metrics import bootstrap_interval, frechet_distance, share
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.benchmark.bench import best_of, peak_memory

QUESTIONS = ("class", "number up to three", "pitch", "pace", "order")  # those that the classifier answers well
WAYS = {  # name -> settings of `generate`, cache_interval, and refined; 1 candidate, not refined, unless stated
    "8 steps, 2 candidates, refined": {"steps": 8, "candidates": 2, "refined": True},
    "8 steps, 2 candidates": {"steps": 8, "candidates": 2},
    "25 steps": {"steps": 25}, "15 steps": {"steps": 15}, "8 steps": {"steps": 8},
    "15 steps, guided at 200-900": {"steps": 15, "guidance_interval": (200, 900)},
    "6 steps, guided at 300-800": {"steps": 6, "guidance_interval": (300, 800)},
    "25 steps, DeepCache 3": {"steps": 25, "cache_interval": 3},
    "200 steps of DDIM (AudioLDM's)": {"steps": 200, "sampler": "ddim", "eta": 1.0},
}  # fmt: skip
DEFAULT = {"the default: student, best of eight, mended and refined": {"candidates": None, "refined": True}}
STUDENT = (
    DEFAULT
    | {"student, best of eight": {"candidates": None}}
    | {f"student, {n} step{'s' * (n > 1)}": {"steps": n, "sampler": "student"} for n in STEPS}
)


@torch.no_grad()
def quality(model, classifier, embed, scenes, ways, on_row=print):
    """Generate the captions of scenes in each way -> rows of way, evaluations, seconds, memory_gb, details, frechet.

    evaluations: of the U-Net for each caption, without the refiner's; seconds and memory: of one clip; details: the
    share of right answers to QUESTIONS, and to each; frechet: to the rendered clips; the last two with intervals.
    embed: waveforms (n, N) -> embeddings (n, D), for the distance.
    """
    captions = [scene.caption for scene in scenes]
    texts = [str(caption) for caption in captions]
    real, rows = embed(torch.stack([scene.item["waveform"] for scene in scenes])), []
    onto = projection(real, min(64, len(real) // 3, real.shape[1]))
    reference = onto(real)
    distance = lambda made: frechet_distance(made, reference)  # noqa: E731
    evaluated, refiner = [], model.refiner
    for unet in (model.unet, model.student):
        if unet is not None:
            unet.conv_in.register_forward_hook(lambda layer, given, h: evaluated.append(len(h)))
    for name, how in ways.items():
        how = {"candidates": 1, **how}
        model.cache_interval = how.pop("cache_interval", 1)
        model.refiner = refiner if how.pop("refined", False) else None
        one = lambda how=how: model.generate(texts[:1], **how)  # noqa: E731
        seconds, memory = best_of(one), peak_memory(one)
        evaluated.clear()
        batches = (texts[start : start + 16] for start in range(0, len(texts), 16))
        sounds = torch.cat([model.generate(batch, **how).cpu() for batch in batches])
        right = classify_details(classifier, sounds, captions).correct()
        asked = {question: right[question] for question in QUESTIONS if len(right.get(question, ()))}
        found = share(np.concatenate([*asked.values()]))
        embeddings = onto(embed(sounds))
        low, high = bootstrap_interval(distance, embeddings, resamples=200, centre=True)
        rows.append({
            "way": name, "evaluations": round(sum(evaluated) / len(texts), 1), "seconds": round(seconds, 4),
            "memory_gb": memory, "details": found["value"], "low": found["low"], "high": found["high"],
            **{question: float(of.mean()) for question, of in asked.items()},
            "frechet": distance(embeddings), "frechet_low": low, "frechet_high": high, "clips": len(texts),
        })  # fmt: skip
        row = rows[-1]
        on_row(f"{name:<32}{row['evaluations']:6.1f} evaluations {seconds:7.3f} s  details {row['details']:.3f} "
               f"({row['low']:.3f}-{row['high']:.3f})  Fréchet {row['frechet']:.1f}")  # fmt: skip
    model.cache_interval, model.refiner = 1, refiner
    return rows


def measure_quality(on_row=print, count=48):
    """`quality` of preset `tiny` for captions of `test` that name each detail `count` times."""
    model, classifier, aisfx = RefinedAudioLDM.from_preset("tiny"), DetailClassifier.load(), Aisfx.load()
    scenes = select_scenes(count, seconds=model.config.seconds)
    ways = WAYS | (STUDENT if model.student is not None else {})
    return quality(model, classifier, lambda sounds: aisfx(sounds, 16_000).numpy(), scenes, ways, on_row)
