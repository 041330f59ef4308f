"""Train the judge of details, write it where it is shipped, and print its accuracy.

    python -m refined_ldm.cli.train_judge [SCENES]

It is trained on scenes of `val` with seed 1, which no model is trained on, and measured on `test`. An interrupted run
is resumed.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch

from refined_ldm.base.integers import integer
from refined_ldm.data.caches import CACHED_KEYS, cache_clips
from refined_ldm.durable.csv_log import CsvLogger
from refined_ldm.evaluation.detail_judge import JUDGE_CLIPS, JUDGE_TRAINING, JUDGE_WEIGHTS, train_judge
from refined_ldm.evaluation.details import judge_details, select_scenes
from refined_ldm.scenes.dataset import SoundScenes

RUN = Path("runs/judge")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on as many scenes as the arguments, None: of the shell, ask for."""
    parser = ArgumentParser("python -m refined_ldm.cli.train_judge", description=__doc__.partition("\n")[0])
    parser.add_argument("scenes", type=integer(1), nargs="?", default=JUDGE_CLIPS, metavar="SCENES")
    train(parser.parse_args(arguments).scenes)


def train(size: int) -> None:
    """Train on `size` scenes and print the share of right answers, by detail."""
    scenes = SoundScenes("val", size, seed=1)
    clips = cache_clips(RUN / "clips", scenes, {"data": scenes.fingerprint(), "kept": list(CACHED_KEYS)})
    with CsvLogger(RUN / "judge.csv", resume=True) as write:
        for trained, step in train_judge(clips, JUDGE_TRAINING, run_dir=RUN / "checkpoints", resume=True):
            write(step)
            judge = trained
    judge.save(JUDGE_WEIGHTS)
    selected = select_scenes(200)
    waveforms = torch.stack([scene.item["waveform"] for scene in selected])
    for detail, right in judge_details(judge, waveforms, [scene.caption for scene in selected]).correct().items():
        print(f"{detail:14} {right.mean():.3f} of {len(right)}")


if __name__ == "__main__":
    main()
