"""Training of the matcher on rendered scenes: the caption of a scene against captions that it is not true of.

Which captions are not true is known exactly: the grammar writes twins that differ in one detail, and the captions of
other scenes with the same kinds of sound contradict each other or not. The network also names the details of each
sound, from the metadata of the scene. The latents carry noise, and some went through the student, as those of
candidates do.

Notebook: 09
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from refined_ldm.adapters.matcher import MATCHER_FILE, Matcher, MatcherConfig
from refined_ldm.base.integers import whole_seed
from refined_ldm.config import Config, StageConfig
from refined_ldm.data.batches import collate
from refined_ldm.data.caches import Cached, cache_batches
from refined_ldm.diffusion import CLEAN, add_noise, jump, noise_like
from refined_ldm.randomness import draw, step_seed
from refined_ldm.scenes.captions import Caption
from refined_ldm.scenes.classes import CLASSES, Event
from refined_ldm.scenes.dataset import captions_of
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.contrasts import KINDRED, KindredSampler, answers_of, draw_twins, may_agree
from refined_ldm.training.inputs import cached_clips, encode_latents
from refined_ldm.training.loop import Step, optimise
from refined_ldm.training.pipeline import accelerator_of, check_run_beside
from refined_ldm.weights import weights_digest

STAGE = "matcher"
TWINS = 4  # captions of a scene with one detail changed
NOISE = 0.5  # largest standard deviation of the noise in a latent
MATCHING = StageConfig(5000, 64, 1e-3, weight_decay=0.05, ema_decay=0.998)
NAMES = tuple(sorted(CLASSES))
MOST = 7  # the largest number; more count as 7
ANSWERS = {"number": MOST, "pitch": 2, "pace": 2, "loudness": 2, "distance": 2, "order": 2}  # choices of each detail
DRAWN, TOGETHER = 9600, 48  # scenes whose latents the student draws again, and at once
SOFTER = -3.0  # dB below the other sound: softer ones are soft


def audible_details(item: dict) -> list[tuple[str, dict[str, int]]]:
    """[(class, {detail: choice}), …] of the sounds that the captions of an item of `SoundScenes` name, as they begin.

    A detail that is not clear is left out. number: one less than it is; pitch and pace: 0 low or slow, 1 high or quick;
    loudness: 1 loud; distance: 1 far; order: the position.
    """
    events = [event if isinstance(event, Event) else Event(**event) for event in item["events"]]
    events = sorted((e for e in events if e.name in item["labels"]), key=lambda event: event.onset)
    found = []
    for position, event in enumerate(events):
        sound, audible = CLASSES[event.name], {"distance": int(event.distant)}
        if event.count is not None:
            audible["number"] = min(event.count, MOST) - 1
        if sound.low_high and not sound.pitches[0] <= event.pitch <= sound.pitches[1]:
            audible["pitch"] = int(event.pitch > sound.pitches[1])
        if sound.slow_fast and not sound.rates[0] <= event.rate <= sound.rates[1]:
            audible["pace"] = int(event.rate > sound.rates[1])
        if len(events) == 2 and min(e.gain for e in events) <= SOFTER:
            audible["loudness"] = int(event.gain > SOFTER)
        if len(events) == 2 and item["kind"] == "sequence":
            audible["order"] = position
        found.append((event.name, audible))
    return found


class MatchedClips(Dataset):
    """Scenes as items with six "written" captions, what is "audible", "latent" (C, T, F), unscaled, and "drawn".

    drawn: latents of the first scenes as the student draws them again; of the others it is the latent itself.
    """

    def __init__(self, clips: Dataset, latents: Dataset, drawn: Dataset | None = None):
        self.clips, self.latents, self.drawn = clips, latents, drawn
        self._written: dict[int, list[Caption]] = {}

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict:
        item, latent = self.clips.rest[index], self.latents[index]["latent"]
        if index not in self._written:
            self._written[index] = captions_of(item) + captions_of(item, 3, detailed=1.0)
        again = self.drawn is not None and index < len(self.drawn)
        drawn = self.drawn[index]["latent"] if again else latent
        return {"written": self._written[index], "audible": audible_details(item), "latent": latent, "drawn": drawn}


class DetailReader(nn.Module):
    """A matcher under training, with a head that names classes and details; the head is not saved."""

    def __init__(self, matcher: Matcher):
        super().__init__()
        width = matcher.config.width
        self.matcher, self.classifier = matcher, nn.Linear(width, len(NAMES))
        self.query = nn.Embedding(len(NAMES), width)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.answer = nn.Sequential(
            nn.Linear(5 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, sum(ANSWERS.values()))
        )

    def read(self, frames: Tensor, row: Tensor, name: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features (B, T, width), classes `name` (Q,) asked of clips `row` (Q,) -> logits (B, K), {detail: logits}."""
        query, key, value = self.query(name), self.key(frames)[row], F.gelu(self.value(frames))[row]
        gate = torch.sigmoid(torch.einsum("qtw,qw->qt", key, query) / key.shape[2] ** 0.5)[..., None]
        passed, time = gate * value, torch.linspace(-1, 1, frames.shape[1], device=frames.device)[:, None]
        mean = passed.sum(1) / gate.sum(1).clamp(min=1e-3)
        pooled = torch.cat([passed.sum(1) / 16, (time * passed).sum(1) / 16, mean, passed.amax(1), query], dim=1)
        answers = self.answer(pooled).split(list(ANSWERS.values()), dim=1)
        return self.classifier(frames).logsumexp(1), dict(zip(ANSWERS, answers, strict=True))

    def forward(self, latent: Tensor, asked: tuple[Tensor, Tensor], pairs: tuple[Tensor, Tensor]) -> tuple:
        """Latents, (row, name) of queries, (row, embedding) of captions -> logits of `read`, logits of the matcher."""
        frames = self.matcher.frames(latent)
        return self.read(frames, *asked), self.matcher.compare(frames, *pairs)


def reading_loss(
    classes: Tensor, answers: dict[str, Tensor], row: Tensor, name: Tensor, audible: Sequence[dict[str, int]]
) -> Tensor:
    """Return ten times the cross-entropy of the classes, and that of each detail over the sounds that have it."""
    present = torch.zeros_like(classes).index_put((row, name), torch.ones_like(row, dtype=classes.dtype))
    loss = 10 * F.binary_cross_entropy_with_logits(classes.float(), present.float())
    for detail, logits in answers.items():
        right = torch.tensor([of.get(detail, -1) for of in audible], device=logits.device)
        total = F.cross_entropy(logits.float(), right, ignore_index=-1, reduction="sum")
        loss = loss + total / (right >= 0).sum().clamp(min=1)
    return loss


def draw_pairs(written: Sequence[list[Caption]], source: random.Random) -> tuple[list[int], list[str], list[float]]:
    """Captions to compare with each of B latents -> the latent of each, the captions, 1 where they are true, else 0.

    One of the captions written of a scene is true of it. False are its twins, and those that contradict it of the
    captions in a group of the same kinds of sound and one drawn at random.
    """
    own = [source.choice(of) for of in written]
    agree = may_agree(torch.tensor([answers_of(caption) for caption in own]))
    row, captions, true = [], [], []
    for i, caption in enumerate(own):
        group = range(i // KINDRED * KINDRED, min(i // KINDRED * KINDRED + KINDRED, len(own)))
        others = [own[k] for k in (*group, source.randrange(len(own))) if not agree[i, k]]
        compared = [caption, *draw_twins(caption, source, TWINS), *others]
        row += len(compared) * [i]
        captions += map(str, compared)
        true += [1.0] + (len(compared) - 1) * [0.0]
    return row, captions, true


@torch.no_grad()
def drawn_again(model: RefinedAudioLDM, clips: Dataset, latents: Dataset, run_dir: Path, seed: int) -> Cached | None:
    """Noise the latents of the first DRAWN scenes and let the student draw them again, once, into `run_dir`.

    The noise leaves the events where they are: every second batch is noised to the last place of the student's path,
    the others to the last but one. Returns items with "latent", unscaled; None without a student.
    """
    if model.student is None:
        return None
    count, places = min(DRAWN, len(latents)), [*model.schedule.timesteps(4)[2:], CLEAN]
    made_of = {**latents.made_of, "student": weights_digest(model.student), "seed": seed, "rows": count}

    def rows():
        for start in range(0, count, TOGETHER):
            numbers = range(start, min(start + TOGETHER, count))
            c = model.clap.embed_text([clips.rest[k]["captions"][0] for k in numbers])
            z_t = model.latent_scale * torch.stack([latents[k]["latent"] for k in numbers]).to(model.device)
            path = places[start // TOGETHER % 2 :]
            generators = [torch.Generator().manual_seed(step_seed(seed, k)) for k in numbers]
            at = [torch.full((len(z_t),), t, device=z_t.device) for t in path]
            z_t = add_noise(z_t, noise_like(z_t, generators), at[0], model.schedule)
            for t, s in pairwise(at):
                z_t = jump(z_t, model.student_noise(z_t, t, s, c), t, s, model.schedule)
            yield {"latent": (z_t / model.latent_scale).half().cpu().numpy()}, [{} for _ in numbers]

    return cache_batches(run_dir / "drawn-train", made_of, count, rows())


def check_matcher_run(config: Config, run_dir: str | Path, resume: bool = False) -> None:
    """Check, before any work, the data and the folder of a run, as `check_run_beside` does; recordings are refused."""
    if config.data != "scenes":
        raise ValueError("the matcher learns from captions that a grammar changes: it takes scenes, not recordings")
    check_run_beside(STAGE, [MATCHER_FILE], config, run_dir, resume)


def train_matcher(
    model: RefinedAudioLDM,
    run_dir: str | Path,
    settings: StageConfig = MATCHING,
    seed: int = 0,
    resume: bool = False,
    on_clips: Callable[[int, int], None] | None = None,
) -> Iterator[Step]:
    """Train a matcher for a trained model on the scenes of `model.config`, and yield every Step.

    At the end run_dir/matcher.safetensors has it, and the model too. Raises ValueError for recordings, FileExistsError
    for a finished run, and as `optimise` does.

    Notebook: 09
    """
    run_dir, seed = Path(run_dir), whole_seed(seed)
    check_matcher_run(model.config, run_dir, resume)
    accelerator = accelerator_of(run_dir / "checkpoints", model.device, resume)
    with accelerator.main_process_first():  # the other processes then find the caches
        clips = cached_clips(model.config, run_dir, on_clips=on_clips)
        latents = encode_latents(model, clips, run_dir, on_clips)
        drawn = drawn_again(model, clips, latents, run_dir, seed)
    shape = tuple(latents[0]["latent"].shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = DetailReader(Matcher(MatcherConfig(*shape, embedding_dim=model.clap.embedding_dim))).to(model.device)

    def losses(network: nn.Module, batch: dict, generator: torch.Generator, index: int) -> dict[str, Tensor]:
        source = random.Random(step_seed(seed, index))
        latent, drawn = (batch[name].to(model.device, non_blocking=True) for name in ("latent", "drawn"))
        again = draw(torch.rand, (len(latent), 1, 1, 1), generator).to(latent) < 0.5
        latent = model.latent_scale * torch.where(again, drawn, latent)
        spread = NOISE * draw(torch.rand, (len(latent), 1, 1, 1), generator)
        latent = latent + (spread * draw(torch.randn, tuple(latent.shape), generator)).to(latent)
        sounds = [(row, NAMES.index(name), audible) for row, of in enumerate(batch["audible"]) for name, audible in of]
        row, name = torch.tensor([sound[:2] for sound in sounds], device=latent.device).T
        of, captions, true = draw_pairs(batch["written"], source)
        of, true = (torch.tensor(values, device=latent.device) for values in (of, true))
        with torch.no_grad():
            embedding = model.clap.embed_text(captions)
        read, logits = network(latent, (row, name), (of, embedding))
        details = reading_loss(*read, row, name, [sound[2] for sound in sounds])
        more = torch.tensor(3.0, device=latent.device)  # of four or more captions one is true
        match = F.binary_cross_entropy_with_logits(logits.float(), true, pos_weight=more)
        return {"loss": 4 * match + details, "details": details, "match": match}

    sampler = KindredSampler([item["labels"] for item in clips.rest], settings.batch_size, seed)
    batches = DataLoader(MatchedClips(clips, latents, drawn), batch_sampler=sampler, collate_fn=collate)
    run = {"seed": seed, "run_dir": run_dir / "checkpoints", "resume": resume, "accelerator": accelerator}
    yield from optimise(STAGE, {STAGE: (reader, losses)}, batches, settings, device=model.device, **run)
    if accelerator.is_main_process:
        reader.matcher.save(run_dir / MATCHER_FILE)
    accelerator.wait_for_everyone()
    model.matcher = Matcher.load(run_dir / MATCHER_FILE).to(model.device)
