"""Distillation of a student that samples in 4, 2 or 1 evaluations what its teacher samples in 24.

The teacher samples from noise, with guidance, and the latents at a few timesteps on the way are kept: its trajectories.
They need captions alone. The student learns to jump between them: the noise that it predicts at one is to end, in a
single step of DDIM, at a later one (progressive distillation, Salimans & Ho 2022; trajectories that are known to the
end, Luhman & Luhman 2021). The target is exact from the first step on, where consistency distillation (Song et al.
2023) learns it piece by piece from its own average; and a trajectory, once sampled, serves in every epoch.

Notebook: 09
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from refined_ldm.adapters.lora import LoraConfig
from refined_ldm.adapters.student import STEPS, STUDENT_FILE, Student, read_student, save_student
from refined_ldm.base.integers import whole_seed
from refined_ldm.config import Config, DistillConfig
from refined_ldm.data.batches import loader
from refined_ldm.data.caches import Cached, cache_batches
from refined_ldm.diffusion import CLEAN, Denoiser, NoiseSchedule, dpmpp_sample, jump_noise, noise_like
from refined_ldm.randomness import draw, step_seed
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.contrasts import WrittenClips
from refined_ldm.training.inputs import cached_clips
from refined_ldm.training.loop import Step, optimise
from refined_ldm.training.pipeline import accelerator_of, check_run_beside

STAGE = "distill"  # its name in configurations and runs
KEPT = max(STEPS)  # jumps of the longest path: a trajectory is kept at KEPT + 1 places
TOGETHER, IN_A_PART = 32, 256  # trajectories sampled at once, and in one part of the cache
# (first, last) place of each jump. Of 8, four are of 4 steps, two of 2, and two of 1
JUMPS = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 2), (2, 4), (0, 4), (0, 4)]


def distill_config(config: Config) -> DistillConfig:
    """Return the settings of the distillation in a configuration."""
    return config.training.get(STAGE, DistillConfig())


@torch.no_grad()
def trajectory(denoise: Denoiser, z_T: Tensor, c: Tensor, schedule: NoiseSchedule, steps: int) -> Tensor:
    """Noise z_T (B, C, T, F) -> the latents (B, KEPT + 1, C, T, F) at its start, its end, and evenly between them.

    `denoise` is sampled by DPM-Solver++ in `steps` steps, a multiple of KEPT.

    Notebook: 09
    """
    latents = [z_T]

    def keep(latent: Tensor, timestep: int | None) -> Tensor:
        latents.append(latent)
        return latent

    dpmpp_sample(denoise, z_T, c, schedule, steps, after_step=keep)
    return torch.stack(latents[:: steps // KEPT], dim=1)


@torch.no_grad()
def trajectories(
    model: RefinedAudioLDM,
    captions: Sequence[Sequence[str]],
    folder: str | Path,
    settings: DistillConfig,
    seed: int = 0,
    on_clips: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world_size: int = 1,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """Sample the teacher's trajectories into parts below `folder`, each a cache that is written whole or not at all.

    captions: those of each clip. The k-th trajectory is of clip k, around again when there are fewer, with one of its
    captions; caption and noise depend on `seed` and k alone. An item has "latents" (KEPT + 1, C, T, F) and "embedding"
    (D,) in float16. Of several processes each samples its own parts. on_clips(done, all) reports progress;
    autocast() is the context in which the U-Net is evaluated.
    """
    steps, count = settings.teacher_steps, settings.trajectories
    made_of = {
        "teacher": model.digest(),
        "steps": steps,
        "guidance": [model.config.guidance_scale, *model.config.guidance_interval],
        "seed": seed,
        "captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16],
    }
    model.eval()

    def rows(first, last):
        for start in range(first, last, TOGETHER):
            numbers = range(start, min(start + TOGETHER, last))
            generators = [torch.Generator().manual_seed(step_seed(seed, number)) for number in numbers]
            own = [captions[number % len(captions)] for number in numbers]
            chosen = [of[torch.randint(len(of), (), generator=g)] for of, g in zip(own, generators, strict=True)]
            c = model.clap.embed_text(chosen)
            noise = noise_like(c.new_empty(len(c), *model.latent_shape(model.config.seconds)), generators)
            guided = model.guided()
            with autocast():
                kept = trajectory(guided, noise, c, model.schedule, steps)
            arrays = {"latents": kept.half().cpu().numpy(), "embedding": c.half().cpu().numpy()}
            yield arrays, [{"caption": caption} for caption in chosen]
            if on_clips:
                on_clips(numbers[-1] + 1, count)

    for part in range(rank, -(-count // IN_A_PART), world_size):
        first, last = part * IN_A_PART, min((part + 1) * IN_A_PART, count)
        made_of["rows"] = [first, last]
        cache_batches(Path(folder) / f"part-{part}", made_of, last - first, rows(first, last))


def draw_jumps(count: int, generator: torch.Generator | None = None) -> Tensor:
    """(count, 2) places where jumps begin and end, drawn from JUMPS; a batch of 8 has each of them."""

    def shuffled(shape: tuple[int], generator: torch.Generator | None) -> Tensor:
        order = torch.randperm(*shape, generator=generator) % len(JUMPS)
        return torch.tensor(JUMPS)[order]

    return draw(shuffled, (count,), generator)


def jump_losses(model: RefinedAudioLDM) -> Callable[..., dict[str, Tensor]]:
    """Return the loss of a student, as `Learner` takes it; batches hold "latents" and "embedding" of `trajectories`.

    It is that of the U-Net's own training, with another target: not the noise that was added to a clip, but the noise
    with which a jump from one kept latent ends at a later one.
    """
    places = torch.tensor([*model.schedule.timesteps(KEPT), CLEAN])

    def losses(student: nn.Module, batch: dict, generator: torch.Generator, index: int) -> dict[str, Tensor]:
        latents, c = (batch[name].to(model.device, non_blocking=True) for name in ("latents", "embedding"))
        jumps = draw_jumps(len(latents), generator)
        begin, end = jumps.to(latents.device, non_blocking=True).T
        rows = torch.arange(len(latents), device=latents.device)
        t, s = (places[at].to(latents.device, non_blocking=True) for at in jumps.T)
        z_t = latents[rows, begin]
        eps = jump_noise(z_t, latents[rows, end], t, s, model.schedule)
        error = (model.denoise(z_t, t, c, student, s) - eps) ** 2
        return {"loss": (model.loss_weight(t) * error.flatten(1).mean(1)).mean()}

    return losses


check_student_run = partial(check_run_beside, STAGE, [STUDENT_FILE])  # (config, run_dir, resume)


def train_student(
    model: RefinedAudioLDM,
    run_dir: str | Path,
    settings: DistillConfig | None = None,
    seed: int = 0,
    resume: bool = False,
    on_clips: Callable[[int, int], None] | None = None,
    on_trajectories: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
) -> Iterator[Step]:
    """Distill a trained model on the captions of `model.config.data`, and yield every Step.

    At the end run_dir/student.safetensors has the student, and the model too (`sampler="student"`). The guidance that
    it learns is that of the configuration. All other weights stay as they are.

    on_clips, on_trajectories: called with (done, in all) while the caches are filled.
    Raises FileNotFoundError for missing recordings, FileExistsError for a finished run, ValueError for a run of another
    model, ModuleNotFoundError without peft.

    Notebook: 09
    """
    run_dir, seed = Path(run_dir), whole_seed(seed)
    settings = settings or distill_config(model.config)
    check_student_run(model.config, run_dir, resume)
    model.schedule.timesteps(settings.teacher_steps)  # too many are refused before the clips are rendered
    file, base = run_dir / STUDENT_FILE, model.digest()
    if resume and file.is_file() and (of := read_student(file)[1])["base"] != base:
        raise ValueError(f"{file} is a student of another model, {of['name']} {of['base']}: a run goes on with its own")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = Student(model.unet, settings.rank)
    accelerator = accelerator_of(run_dir / "checkpoints", model.device, resume)
    with accelerator.main_process_first():  # the other processes then find the clips
        most = min(model.config.clips, settings.trajectories)  # scenes; of recordings all are decoded
        clips = cached_clips(model.config, run_dir, size=most, on_clips=on_clips, skip_bad=skip_bad)
    items = clips.rest
    if model.config.data == "scenes" and model.config.more_captions:
        items = WrittenClips(clips, model.config.more_captions)
    captions = [items[k]["captions"] for k in range(min(len(items), settings.trajectories))]
    folder, world = run_dir / "trajectories-train", accelerator.num_processes
    trajectories(
        model, captions, folder, settings, seed, on_trajectories, accelerator.process_index, world, accelerator.autocast
    )
    accelerator.wait_for_everyone()
    parts = [Cached(folder / f"part-{part}") for part in range(-(-settings.trajectories // IN_A_PART))]
    networks, batches = {STAGE: (student, jump_losses(model))}, loader(ConcatDataset(parts), settings.batch_size, seed)
    run = {"seed": seed, "run_dir": run_dir / "checkpoints", "resume": resume, "accelerator": accelerator}
    yield from optimise(STAGE, networks, batches, settings, device=model.device, **run)
    if accelerator.is_main_process:
        about = {"training_steps": settings.max_steps, "trajectories": settings.trajectories}
        about["guidance_scale"] = model.config.guidance_scale
        save_student(file, student.tensors(), LoraConfig(settings.rank), base, model.config.name, **about)
    accelerator.wait_for_everyone()
    model.load_student(file)
