"""Train the detail classifier, write it where it is shipped, and print its accuracy.

    python -m refined_ldm.cli.train_classifier [SCENES]

It takes half an hour of one core and replaces the file. It is trained on scenes of `val` with seed 1, which no model
is trained on, and measured on `test`. An interrupted run, in runs/classifier, is resumed.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch

from refined_ldm.base.integers import integer
from refined_ldm.data.caches import CACHED_KEYS, cache_clips
from refined_ldm.durable.csv_log import CsvLogger
from refined_ldm.evaluation.detail_classifier import (
    CLASSIFIER_CLIPS,
    CLASSIFIER_TRAINING,
    CLASSIFIER_WEIGHTS,
    train_classifier,
)
from refined_ldm.evaluation.details import classify_details, select_scenes
from refined_ldm.scenes.dataset import SoundScenes

RUN = Path("runs/classifier")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on as many scenes as the arguments, None: of the shell, ask for."""
    parser = ArgumentParser("python -m refined_ldm.cli.train_classifier", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "scenes",
        type=integer(1),
        nargs="?",
        default=CLASSIFIER_CLIPS,
        metavar="SCENES",
        help=f"rendered scenes to train on ({CLASSIFIER_CLIPS})",
    )
    train(parser.parse_args(arguments).scenes)


def train(size: int) -> None:
    """Train on `size` scenes and print the share of right answers, by detail."""
    scenes = SoundScenes("val", size, seed=1)
    clips = cache_clips(RUN / "clips", scenes, {"data": scenes.fingerprint(), "kept": list(CACHED_KEYS)})
    with CsvLogger(RUN / "classifier.csv", resume=True) as write:
        for trained, step in train_classifier(clips, CLASSIFIER_TRAINING, run_dir=RUN / "checkpoints", resume=True):
            write(step)
            classifier = trained
    classifier.save(CLASSIFIER_WEIGHTS)
    selected = select_scenes(200)
    waveforms = torch.stack([scene.item["waveform"] for scene in selected])
    answers = classify_details(classifier, waveforms, [scene.caption for scene in selected])
    for detail, right in answers.correct().items():
        print(f"{detail:14} {right.mean():.3f} of {len(right)}")


if __name__ == "__main__":
    main()
