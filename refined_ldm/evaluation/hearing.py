"""Drawn sounds, and how right a detail classifier finds them: what the matcher learns of its candidates.

The classifier is trained on the scenes that the model itself learned from. It is not the one that evaluates, which is
trained on other scenes and has never heard these.

Notebook: 09
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from refined_ldm.config import StageConfig
from refined_ldm.data.caches import Cached, cache_batches
from refined_ldm.devices import pick_accelerator
from refined_ldm.diffusion import noise_like
from refined_ldm.evaluation.detail_classifier import (
    CLASS_NAMES,
    CLASSIFIER_TRAINING,
    DetailClassifier,
    train_classifier,
)
from refined_ldm.evaluation.details import SOFT, named_details
from refined_ldm.mel import MelConfig
from refined_ldm.randomness import caption_generators, step_seed
from refined_ldm.scenes.captions import Caption
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.matching import six_captions
from refined_ldm.weights import weights_digest

DRAWN, EACH, TOGETHER = 9600, 4, 16  # captions that sounds are drawn for, sounds of each, and sounds at once


def rightness(classes: Tensor, answers: dict[str, Tensor], captions: Sequence[Caption]) -> Tensor:
    """How probable is it that sounds are right in all that their captions say, and nothing else is heard? -> (B,)

    classes, answers: a detail classifier's logits (B, K) for the sounds, and its answers (Q, n) for the clauses of the
    captions in turn. The product of the probabilities of all answers; differences of level and of onset count in units
    of 3 dB and .1 s.
    """
    log, q = torch.zeros(len(captions), device=classes.device), 0
    for i, caption in enumerate(captions):
        names = [clause.name for clause in caption.clauses]
        own = {name: {key: of[q + k] for key, of in answers.items()} for k, name in enumerate(names)}
        sign = torch.tensor([1.0 if name in own else -1.0 for name in CLASS_NAMES], device=classes.device)
        log[i] = F.logsigmoid(sign * classes[i]).sum()
        for detail, of in named_details(caption).items():
            if detail == "order":
                first, second = (own[name]["onset"][0] for name, _ in sorted(of, key=lambda named: named[1]))
                log[i] += F.logsigmoid((second - first) / 0.1)
            else:
                log[i] += sum(_log_probability(detail, value, own[name]) for name, value in of)
        q += len(names)
    return log.exp()


def _log_probability(detail, value, answers):
    """Log of the probability of a detail's value, by a classifier's answers (n,) for one sound."""
    if detail == "number":
        return F.log_softmax(answers["count"], 0)[value - 1]
    if detail in ("pitch", "pace"):  # of the two words
        logit = answers[detail][2] - answers[detail][0]
    else:
        logit = answers["distant"][0] if detail == "distance" else (10 * answers["gain"][0] - SOFT) / 3
    return F.logsigmoid(logit if value else -logit)


@torch.no_grad()
def drawn_and_heard(
    model: RefinedAudioLDM,
    classifier: DetailClassifier,
    clips: Dataset,
    run_dir: Path,
    seed: int,
    on_clips: Callable[[int, int], None] | None = None,
) -> Cached:
    """Draw EACH sounds for captions of the first DRAWN scenes, and ask how right they are, once, into `run_dir`.

    The student draws them, or the sampler of a model without one. Returns items with "latent", unscaled, "caption" and
    "right", their `rightness` for the classifier.
    """
    count, sampler = min(DRAWN, len(clips)), "student" if model.student else model.config.sampler
    made_of = {"clips": clips.made_of, "drawn by": weights_digest(model.student or model.unet),
               "heard by": weights_digest(classifier), "seed": seed, "rows": count * EACH}  # fmt: skip
    accelerator = pick_accelerator(model.device)
    shape, unconditional = model.latent_shape(model.config.seconds), model.clap.embed_text([""])[0]

    def rows():
        for start in range(0, count, TOGETHER // EACH):
            numbers = [k for k in range(start, min(start + TOGETHER // EACH, count)) for _ in range(EACH)]
            captions = [random.Random(step_seed(seed, k)).choice(six_captions(clips.rest[k])) for k in numbers]
            texts = list(map(str, captions))
            embedding, generators = model.clap.embed_text(texts), caption_generators(texts, f"{seed}, {start}")
            z_T = noise_like(embedding.new_empty(len(texts), *shape), generators)
            how = {"sampler": sampler, "generator": generators, "guidance_interval": model.config.guidance_interval}
            with accelerator.autocast():
                z_0 = model.sample_latent(embedding, z_T, unconditional=unconditional, **how).float()
                mel = model.decode(z_0).float()
            if model.config.mel != MelConfig():
                mel = classifier.mel(model.to_waveform(mel))
            asked = [(row, clause.name) for row, caption in enumerate(captions) for clause in caption.clauses]
            row = torch.tensor([row for row, _ in asked], device=model.device)
            name = torch.tensor([CLASS_NAMES.index(name) for _, name in asked], device=model.device)
            right = rightness(*classifier(mel, row, name), captions).tolist()
            about = [{"caption": text, "right": round(p, 5)} for text, p in zip(texts, right, strict=True)]
            yield {"latent": (z_0 / model.latent_scale).half().cpu().numpy()}, about
            if on_clips:
                on_clips(min(start + TOGETHER // EACH, count), count)

    return cache_batches(run_dir / "drawn-train", made_of, count * EACH, rows())


def own_classifier(
    model: RefinedAudioLDM, clips: Dataset, run_dir: str | Path, seed: int = 0, most: StageConfig = CLASSIFIER_TRAINING
) -> DetailClassifier:
    """Train a detail classifier on clips, or load the one in run_dir; an interrupted training is resumed.

    most: settings whose steps and batch are not exceeded.
    """
    kept = Path(run_dir) / "classifier.safetensors"
    if not kept.is_file():
        steps, batch = CLASSIFIER_TRAINING.max_steps, CLASSIFIER_TRAINING.batch_size
        smaller = {"max_steps": min(steps, most.max_steps), "batch_size": min(batch, most.batch_size)}
        settings = replace(CLASSIFIER_TRAINING, **smaller)
        trained = train_classifier(clips, settings, seed, kept.with_suffix(""), True, device=model.device)
        deque(trained, maxlen=1).pop()[0].save(kept)
    return DetailClassifier.load(kept).to(model.device)
