"""In how many seeds is a caption right in every detail? Those of `make demo`, and some that are often wrong.

python -m tests.benchmark.captions [SEEDS]; writes figures/data/captions.csv. A sound is right if the detail classifier
hears the kinds of sound that its caption names and no other, and every detail that it names.
"""

import sys

import numpy as np
import torch

from refined_ldm.display import in_project, save_table
from refined_ldm.evaluation.detail_classifier import DetailClassifier
from refined_ldm.evaluation.details import classify_details
from refined_ldm.evaluation.metrics import share
from refined_ldm.scenes.captions import Caption, Clause
from refined_ldm.scenes.classes import CLASSES
from refined_ldm.text_to_audio import RefinedAudioLDM


def clause(name, phrase=0, count=None, **details):
    """What a caption says of one class, in one of its phrases; a count is named."""
    return Clause(name, CLASSES[name].phrases[phrase], count, count is not None, **details)


def one(*of, **details):
    return Caption("event", "{a}", (clause(*of, **details),))


DEMO = (
    one("dog", 0, 2),
    one("clock", manner=" slowly"),
    Caption("sequence", "{a}, then {b}", (clause("dog"), clause("bell"))),
    Caption("overlap", "{a} while {b}", (clause("thunder", 1), clause("bird"))),
)
OTHERS = (
    one("dog", 0, 3), one("bell", 0, 1), one("bell", 0, 2), one("horn", 0, 2), one("knock", 0, 3),
    one("siren"), one("telephone"), one("alarm", manner=" rapidly"),
    one("piano", 1, 2, adjective="high"), one("flute", 1, 1, adjective="high"), one("trumpet", 1, 2, adjective="low"),
    one("xylophone", 1, 3, adjective="high"),
)  # fmt: skip


@torch.no_grad()
def right_by_seed(model, classifier, caption, seeds):
    """Whether the sound of a caption is right, for each of some seeds (n,)."""
    sounds = torch.cat([model.generate([str(caption)], seed=seed).cpu() for seed in seeds])
    answers = classify_details(classifier, sounds, [caption] * len(sounds)).correct()
    return np.all([right for right in answers.values() if len(right)], axis=0)


def main(seeds=20):
    model, classifier, rows = RefinedAudioLDM.from_preset("tiny"), DetailClassifier.load(), []
    for caption in (*DEMO, *OTHERS):
        found = share(right_by_seed(model, classifier, caption, range(seeds)).astype(float))
        rows.append({"caption": str(caption), "demo": caption in DEMO, **found})
        print(f"{caption!s:45} {found['value']:.2f}", flush=True)
    save_table(rows, "captions", in_project("figures"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
