"""Training of the refiner: the U-Net's own loss, at the low noise levels alone.

Notebook: 09
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from refined_ldm.adapters.refiner import REFINER_FILE, Refiner, RefinerConfig, refiner_config
from refined_ldm.base.integers import whole_seed
from refined_ldm.config import StageConfig
from refined_ldm.data.batches import loader
from refined_ldm.diffusion import NoiseSchedule, stratified_timesteps
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.inputs import cached_clips, encode_clips
from refined_ldm.training.loop import Step, optimise
from refined_ldm.training.pipeline import accelerator_of, check_run_beside
from refined_ldm.training.stages import ldm_losses

STAGE = "refiner"
REFINING = StageConfig(8000, 32, 3e-3, optimizer="muon", lr_schedule="wsd", ema_decay=0.998)

check_refiner_run = partial(check_run_beside, STAGE, [REFINER_FILE])  # (config, run_dir, resume)


def low_timesteps(
    learned: int, count: int, schedule: NoiseSchedule, generator: torch.Generator | None = None
) -> Tensor:
    """(count,) timesteps, one from each of `count` equal slices of those below `learned`."""
    return stratified_timesteps(count, schedule, generator) * learned // schedule.steps


def train_refiner(
    model: RefinedAudioLDM,
    run_dir: str | Path,
    settings: StageConfig = REFINING,
    seed: int = 0,
    resume: bool = False,
    on_clips: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
    config: RefinerConfig | None = None,
) -> Iterator[Step]:
    """Train a refiner for a trained model on the clips of `model.config.data`, and yield every Step.

    At the end run_dir/refiner.safetensors has it, and the model too. config: its sizes; None: those of
    `refiner_config`. Raises FileNotFoundError for missing recordings, FileExistsError for a finished run, and as
    `optimise` does.

    Notebook: 09
    """
    run_dir, seed = Path(run_dir), whole_seed(seed)
    check_refiner_run(model.config, run_dir, resume)
    accelerator = accelerator_of(run_dir / "checkpoints", model.device, resume)
    with accelerator.main_process_first():  # the other processes then find the caches
        clips = cached_clips(model.config, run_dir, on_clips=on_clips, skip_bad=skip_bad)
        latents = encode_clips(model, clips, run_dir, on_clips)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        refiner = Refiner(config or refiner_config(model.config.unet))
    losses = ldm_losses(model, settings, 0.0, partial(low_timesteps, refiner.config.learned))
    run = {"seed": seed, "run_dir": run_dir / "checkpoints", "resume": resume, "accelerator": accelerator}
    batches = loader(latents, settings.batch_size, seed)
    yield from optimise(STAGE, {STAGE: (refiner, losses)}, batches, settings, device=model.device, **run)
    if accelerator.is_main_process:
        refiner.save(run_dir / REFINER_FILE)
    accelerator.wait_for_everyone()
    model.refiner = Refiner.load(run_dir / REFINER_FILE).to(model.device)
