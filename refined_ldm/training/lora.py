"""Training of a LoRA on one's own clips, with early stopping on clips that are held out.

Clips of what the model was trained on may be mixed in, so that it does not forget them (rehearsal, Robins 1995). The
run's folder gets lora.safetensors, the weights with the lowest held-out loss so far, and held-out.csv.

Notebook: 08
"""

import csv
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset

from refined_ldm.adapters.lora import LoraConfig, LoraUNet, read_lora, save_lora
from refined_ldm.base.files import atomic_write
from refined_ldm.base.integers import cast_numbers, whole_seed
from refined_ldm.config import Config, StageConfig
from refined_ldm.data.batches import collate, loader
from refined_ldm.data.caches import CACHED_KEYS, cache_clips
from refined_ldm.durable.run_state import last_checkpoint
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.inputs import cached_clips, encode_clips
from refined_ldm.training.loop import Step, optimise
from refined_ldm.training.pipeline import accelerator_of, check_run_beside
from refined_ldm.training.stages import ldm_losses

LORA_FILE, HELD_OUT_FILE = "lora.safetensors", "held-out.csv"  # of a run
DRAWS = 8  # noise levels at which each held-out clip is measured
MOST = 64  # held-out clips that are measured
FEWEST = 5  # clips; with fewer, none is held out
KEPT = 256  # clips of the old data that are mixed in by default


@dataclass(frozen=True)
class LoraTraining:
    """Settings of the training of a LoRA; the others are those of the model's U-Net."""

    max_steps: int = 400
    batch_size: int = 16  # clips
    lr: float = 1e-3  # constant after the warm-up, because early stopping decides on the end
    warmup_steps: int = 20
    held_out: float = 0.2  # share of the clips, none of fewer than FEWEST
    evaluate_every: int = 20  # steps between evaluations on the held-out clips, each followed by a checkpoint
    patience: int = 6  # evaluations without a lower loss until training stops
    kept_share: float = 0.4  # share of the training clips from the old data, if there is any

    def __post_init__(self):
        cast_numbers(self)
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be from 0 to below 1, got {self.held_out}")
        if not 0 < self.kept_share < 1:
            raise ValueError(f"kept_share must be between 0 and 1, got {self.kept_share}")
        if min(self.evaluate_every, self.patience) < 1:
            raise ValueError(
                f"evaluate_every and patience must be positive, got {self.evaluate_every} and {self.patience}"
            )

    def stage(self, config: Config) -> StageConfig:
        """Return the settings of the training loop. Raises ValueError for impossible ones."""
        return replace(
            config.training["ldm"],
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            optimizer="adamw",
            lr_schedule="constant",
            ema_decay=0.0,
            conditioner_dropout=0.0,
            disc_start=0,
            save_every=self.evaluate_every,
        )


check_lora_run = partial(check_run_beside, "lora", [LORA_FILE, HELD_OUT_FILE])  # (config, run_dir, resume)


def train_lora(
    model: RefinedAudioLDM,
    run_dir: str | Path,
    rank: int = 8,
    training: LoraTraining = LoraTraining(),
    seed: int = 0,
    resume: bool = False,
    on_clips: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
    kept: Dataset | None = None,
) -> Iterator[Step]:
    """Train a LoRA of a trained model on the clips of `model.config.data`, and yield every Step.

    At the end the model has the LoRA of run_dir/lora.safetensors beside its U-Net: that of the step with the lowest
    held-out loss, or of the last step if no clip is held out. All other weights stay as they are.

    on_clips: called with (clips done, clips in all) while the caches are filled. kept: captioned clips of what the
    model was trained on, such as `SoundScenes("train", KEPT)`; they make up `training.kept_share` of the batches.
    Raises FileNotFoundError for missing recordings, FileExistsError for a finished run, ValueError for impossible
    settings, a run of another model or a model with LoRAs, ModuleNotFoundError without peft.
    """
    run_dir, seed, settings = Path(run_dir), whole_seed(seed), training.stage(model.config)
    config = LoraConfig(rank)
    check_lora_run(model.config, run_dir, resume)
    file = run_dir / LORA_FILE
    if model.loras is not None and len(model.loras):
        raise ValueError("the model has LoRAs already: call merge_loras() or remove_loras() before it learns another")
    loras = model.with_loras()
    if resume and file.is_file() and (of := read_lora(file)[1])["base"] != loras.base:
        raise ValueError(f"{file} is a LoRA of another model, {of['name']} {of['base']}: a run goes on with its own")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        matrices = loras.add(config.rank)
    accelerator = accelerator_of(run_dir / "checkpoints", model.device, resume)
    with accelerator.main_process_first():  # the other processes then find the caches
        clips = cached_clips(model.config, run_dir, on_clips=on_clips, skip_bad=skip_bad)
        latents = encode_clips(model, clips, run_dir, on_clips)
        train, held_out = split_clips(len(latents), training.held_out, seed)
        learned = Subset(latents, train)
        if kept is not None:
            folder, made_of = run_dir / "kept", {"data": kept.fingerprint(), "kept": list(CACHED_KEYS)}
            old = encode_clips(model, cache_clips(folder / "clips-train", kept, made_of, on_clips), folder, on_clips)
            learned = Rehearsal(learned, old, training.kept_share, model.clap.embed_text([""])[0].detach().cpu())
    losses = ldm_losses(model, settings, unconditional_probability=0)  # guidance must not lead away from the new clips
    known = last_checkpoint(run_dir / "checkpoints", "lora") if resume else None
    rows = _read_rows(run_dir, int(known.name.removeprefix("step-")) if known else -1)

    def evaluate(index):
        rows.append((index, held_out_loss(model, losses, Subset(latents, held_out), settings.batch_size, seed)))
        if accelerator.is_main_process:
            _write_rows(run_dir, rows)

    if held_out and not rows:
        evaluate(0)
    networks, batches = {"lora": (LoraUNet(model.unet, matrices), losses)}, loader(learned, settings.batch_size, seed)
    run = {"seed": seed, "run_dir": run_dir / "checkpoints", "resume": resume, "accelerator": accelerator}
    steps = optimise("lora", networks, batches, settings, device=model.device, **run)
    with closing(steps):
        if not _is_over(rows, training):
            for step in steps:
                rows[:] = [row for row in rows if row[0] < step.index]  # later ones are measured again
                if step.index % settings.save_every == 0 or step.index == settings.max_steps:
                    if held_out:
                        evaluate(step.index)
                    if accelerator.is_main_process and (not held_out or best_row(rows)[0] == step.index):
                        before, best = (rows[0][1], best_row(rows)[1]) if held_out else (None, None)
                        about = {"step": step.index, "clips": len(train), "held_out_loss": best}
                        about["held_out_loss_before"] = before  # of the model without the LoRA
                        about["kept"] = 0 if kept is None else len(kept)
                        save_lora(file, matrices, config, loras.base, model.config.name, **about)
                yield step  # the checkpoint is written after it
                if _is_over(rows, training):
                    break
    accelerator.wait_for_everyone()
    model.remove_loras()
    model.load_lora(file)


class Rehearsal(Dataset):
    """New clips, repeated, and old ones, which make up about `share` of the items; both as of `encode_clips`.

    The empty caption, with the embedding `blank` (D,), is one more caption of the old clips: what the model makes
    without a caption, which guidance leads away from, stays what it was.
    """

    def __init__(self, new: Dataset, old: Dataset, share: float, blank: torch.Tensor):
        self.new, self.old, self.blank = new, old, blank
        self.repeated = len(new) * max(1, round(len(old) * (1 - share) / (share * len(new))))
        self.captions = max(len(new[0]["embeddings"]), len(old[0]["embeddings"]) + 1)

    def __len__(self):
        return self.repeated + len(self.old)

    def __getitem__(self, index):
        item = self.new[index % len(self.new)] if index < self.repeated else self.old[index - self.repeated]
        embeddings = item["embeddings"]
        if index >= self.repeated:
            embeddings = torch.cat([embeddings, self.blank[None]])
        return {**item, "embeddings": embeddings[torch.arange(self.captions) % len(embeddings)]}  # as many for each


def split_clips(count: int, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split `count` clips at random -> indices to train on, indices held out: a `share`, none of fewer than FEWEST."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = round(share * count) if count >= FEWEST else 0
    return sorted(order[held_out:]), sorted(order[:held_out])


@torch.no_grad()
def held_out_loss(
    model: RefinedAudioLDM, losses: Callable, clips: Dataset, batch_size: int = 8, seed: int = 0
) -> float:
    """Return the mean loss of the U-Net on clips, at DRAWS noise levels each; noise and levels depend on seed alone."""
    rows = list(range(min(len(clips), MOST))) * DRAWS
    total = 0.0
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        total += len(some) * losses(model.unet, collate([clips[i] for i in some]), generator, 0)["loss"].item()
    return total / len(rows)


def best_row(rows: list[tuple[int, float]]) -> tuple[int, float]:
    """Return the (step, loss) of the lowest loss after step 0."""
    return min(rows[1:], key=lambda row: row[1])


def _is_over(rows, training):
    """Return whether the last `patience` evaluations were no better than the best before them."""
    losses = [loss for _, loss in rows]
    return len(losses) > training.patience and min(losses[-training.patience :]) >= min(losses[: -training.patience])


def _read_rows(run_dir, last):
    """Return the evaluations (step, loss) of a run up to the step `last`."""
    path = run_dir / HELD_OUT_FILE
    if last < 0 or not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    return [row for row in rows if row[0] <= last]


def _write_rows(run_dir, rows):
    with atomic_write(run_dir / HELD_OUT_FILE) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *((step, repr(loss)) for step, loss in rows)])
