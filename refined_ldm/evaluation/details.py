"""A judge of details: the number, pitch, pace, order, loudness and distance of the sounds that a caption names.

A small convolutional and recurrent network learns them from rendered scenes that no model was trained on, with the
exact metadata as targets; it shares nothing with the conditioner. It is queried for one class of sound at a time, so
that a scene of two sounds gives the details of each. Its accuracy on rendered clips is the upper bound of every table,
beside the values of generated clips and of chance.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from refined_ldm.config import StageConfig
from refined_ldm.data.captioned_audio import loader
from refined_ldm.diffusion import add_noise
from refined_ldm.evaluation.metrics import share
from refined_ldm.mel import MelConfig, MelSpectrogram
from refined_ldm.randomness import draw
from refined_ldm.scenes.captions import LOUDLY, Caption
from refined_ldm.scenes.classes import CLASSES, Event
from refined_ldm.scenes.dataset import SoundScenes, captions_of
from refined_ldm.training.loop import Step, optimise
from refined_ldm.weights import load_into, read_weights, save_weights

if TYPE_CHECKING:
    from refined_ldm.clap import Clap
    from refined_ldm.text_to_audio import RefinedAudioLDM

NAMES = tuple(sorted(CLASSES))
MOST = 7  # the largest count; more count as 7
SIZES = {"count": MOST, "pitch": 3, "pace": 3, "distant": 1, "onset": 1, "gain": 1}  # numbers of each answer
JUDGE = StageConfig(4000, 32, 2e-3, weight_decay=0.02, ema_decay=0.999)
CLIPS = 9000
WEIGHTS = Path(__file__).parents[1] / "weights" / "details.safetensors"
SOFT = -3.0  # dB below the other sound, halfway between captions that say loudly and those that say softly
SILENT = 0.01  # of full scale: sounds with a lower peak, 34 dB below that of a rendered clip, count as silent


@dataclass(frozen=True)
class JudgeConfig:
    """Sizes of the judge."""

    channels: tuple[int, ...] = (24, 48, 96, 128)
    width: int = 128


class DetailJudge(nn.Module):
    """Log-mel (B, 1, T, F) -> the classes in it and, for one class at a time, its details."""

    def __init__(self, config: JudgeConfig = JudgeConfig()):
        super().__init__()
        self.config = config
        self.mel = MelSpectrogram(MelConfig())
        widths, inner = config.channels, config.width
        self.convolutions = nn.ModuleList([nn.Conv2d(1, widths[0], 5, stride=2, padding=2)] + [
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True)
        ])  # fmt: skip
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.pools = ((1, 2), (2, 2), (1, 2), (1, 1))  # in time and frequency, after each
        self.narrow = nn.Linear(widths[-1] * 4, inner)
        self.recurrent = nn.GRU(inner, inner // 2, batch_first=True, bidirectional=True)
        self.heard = nn.Linear(2 * inner, len(NAMES))
        self.query = nn.Embedding(len(NAMES), inner)
        self.key, self.value, self.whole = (nn.Linear(2 * inner, inner) for _ in range(3))
        self.answer = nn.Sequential(nn.Linear(6 * inner, inner), nn.GELU(), nn.Linear(inner, sum(SIZES.values())))

    @property
    def device(self) -> torch.device:
        return self.mel.window.device

    def frames(self, mel: torch.Tensor) -> torch.Tensor:
        """Log-mel (B, 1, T, F) -> features (B, T / 4, 2 * width), 40 ms each."""
        h = (mel + 5) / 3  # about zero mean and unit variance
        for convolution, norm, pool in zip(self.convolutions, self.norms, self.pools, strict=True):
            h = F.max_pool2d(F.relu(norm(convolution(h))), pool)
        h = F.relu(self.narrow(h.transpose(1, 2).flatten(2)))
        return torch.cat([h, self.recurrent(h)[0]], dim=2)

    def forward(
        self, mel: torch.Tensor, row: torch.Tensor, name: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Log-mel (B, 1, T, F), queries for class `name` (Q,) in clip `row` (Q,) -> logits (B, classes), answers.

        answers: {"count": logits (Q, MOST), "pitch", "pace": (Q, 3) low, between, high, "distant": logit (Q, 1),
        "onset": s (Q, 1), "gain": tens of dB (Q, 1)}.
        """
        frames = self.frames(mel)
        heard = self.heard(frames.amax(1))
        query, frames = self.query(name), frames[row]
        gate = torch.sigmoid(torch.einsum("qtw,qw->qt", self.key(frames), query) / query.shape[1] ** 0.5)[..., None]
        value = F.gelu(self.value(frames))
        seconds = torch.linspace(-1, 1, frames.shape[1], device=frames.device)[:, None]
        summed = (gate * value).sum(1) / 16
        where = (gate * seconds * value).sum(1) / 16
        mean = (gate * value).sum(1) / gate.sum(1).clamp(min=1e-3)
        loudest = (gate * value).amax(1)
        whole = F.gelu(self.whole(frames)).amax(1)  # what else there is, which loudness is relative to
        said = self.answer(torch.cat([summed, where, mean, loudest, query, whole], dim=1))
        return heard, dict(zip(SIZES, said.split(list(SIZES.values()), dim=1), strict=True))

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights and sizes as safetensors."""
        save_weights(path, self, self.config, dtype)

    @classmethod
    def load(cls, path: str | Path | None = None) -> "DetailJudge":
        """Read a file written by `save` (None: the shipped one) -> the judge in evaluation mode."""
        path = WEIGHTS if path is None else Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no judge of details at {path}: name its file, or train one (python -m refined_ldm.cli.train_judge)"
            )
        state, metadata = read_weights(path)
        sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["config"].items()}
        return load_into(cls(JudgeConfig(**sizes)), state, path).eval()


def third(value: float | None, limits: tuple[float, float]) -> int:
    """0 below the first limit, 2 above the second, else 1."""
    return 1 + (value > limits[1]) - (value < limits[0])


def targets_of(items: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Clip and class (Q,) of each audible event, classes (B, K), and {answer: (values (Q,), whether known (Q,))}."""
    row, name, values = [], [], {answer: [] for answer in SIZES}
    heard = torch.zeros(len(items), len(NAMES))
    for i, item in enumerate(items):
        for event in item["events"]:
            event = event if isinstance(event, Event) else Event(**event)
            if event.name not in item["labels"]:
                continue
            sound = CLASSES[event.name]
            row.append(i), name.append(NAMES.index(event.name))
            heard[i, name[-1]] = 1
            values["count"].append(None if event.count is None else min(event.count, MOST) - 1)
            values["pitch"].append(None if not sound.low_high else third(event.pitch, sound.pitches))
            values["pace"].append(None if not sound.slow_fast else third(event.rate, sound.rates))
            values["distant"].append(float(event.distant))
            values["onset"].append(event.onset)
            values["gain"].append(event.gain / 10 if len(item["labels"]) == 2 else None)
    known = {k: torch.tensor([v is not None for v in of]) for k, of in values.items()}
    numbers = {k: torch.tensor([v or 0.0 for v in of]) for k, of in values.items()}
    return torch.tensor(row), torch.tensor(name), heard, {k: (numbers[k], known[k]) for k in SIZES}


def judge_loss(
    heard: torch.Tensor, answers: dict[str, torch.Tensor], targets: torch.Tensor, events: dict[str, tuple]
) -> dict[str, torch.Tensor]:
    """Sum of the cross-entropies of classes and choices and four times the squared errors of seconds and tens of dB."""
    losses = {"heard": 10 * F.binary_cross_entropy_with_logits(heard, targets)}
    for name, answer in answers.items():
        value, known = (x.to(answer.device) for x in events[name])
        if SIZES[name] > 1:
            error = F.cross_entropy(answer, value.long(), reduction="none")
        elif name == "distant":
            rare = torch.tensor(3.0, device=value.device)  # one event in eight is far
            error = F.binary_cross_entropy_with_logits(answer[:, 0], value, reduction="none", pos_weight=rare)
        else:
            error = 4 * (answer[:, 0] - value).square()
        losses[name] = (error * known).sum() / known.sum().clamp(min=1)
    return {"loss": sum(losses.values()), **losses}


def disturb(mel: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Augment log-mels (B, 1, T, F) with random level, tilt, floor, blur and grain."""
    B, bands = len(mel), mel.shape[3]
    level, tilt, floor, grain, blur = draw(torch.rand, (B, 5), generator).to(mel.device).T[:, :, None, None, None]
    mel = mel + 1.2 * (level - 0.5) + 1.5 * (tilt - 0.5) * torch.linspace(-1, 1, bands, device=mel.device)
    mel = torch.maximum(mel, -11.5 + 3.0 * floor)
    smooth = F.avg_pool2d(F.pad(mel, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mel = torch.lerp(mel, smooth, (1.5 * blur - 0.7).clamp(min=0))
    return mel + 0.3 * grain * draw(torch.randn, mel.shape, generator).to(mel)


def train_judge(
    clips: Sequence[dict],
    settings: StageConfig = JUDGE,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    accelerator: Any = None,
    device: str = "cpu",
) -> Iterator[tuple[DetailJudge, Step]]:
    """Train a judge on a cache of scenes, which no evaluated model may have seen -> yields (judge, Step)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = DetailJudge().to(device)

    def losses(network: DetailJudge, batch: dict, generator: torch.Generator, index: int) -> dict[str, torch.Tensor]:
        items = [{"events": e, "labels": names} for e, names in zip(batch["events"], batch["labels"], strict=True)]
        row, name, heard, events = targets_of(items)
        mel = disturb(judge.mel(batch["waveform"].to(device)), generator)
        logits, answers = network(mel, row.to(device), name.to(device))
        return judge_loss(logits, answers, heard.to(device), events)

    batches, networks = loader(clips, settings.batch_size, seed), {"judge": (judge, losses)}
    for step in optimise("judge", networks, batches, settings, seed, run_dir, resume, accelerator, device):
        yield judge, step


# Evaluation by the judge

DETAILS = ("number", "pitch", "pace", "loudness", "distance", "order")
KINDS_ASKED = {("event",): ("number", "pitch", "pace", "distance"), ("sequence",): ("loudness", "order")}


@dataclass(frozen=True)
class Asked:
    """A caption and the scene that it was written for."""

    item: dict
    caption: Caption


def ask_details(count: int = 200, split: str = "test", seed: int = 5, seconds: float = 2.56) -> list[Asked]:
    """Captions that name each detail `count` times, as far as 8 * `count` scenes of a kind do.

    Number, pitch, pace and distance come from scenes of one event, loudness and order from sequences. Of a scene's own
    three captions and three with more details, the one that names most of the missing details is taken.
    """
    wanted, asked = dict.fromkeys(DETAILS, count), []
    for kinds, details in KINDS_ASKED.items():
        scenes = SoundScenes(split, 8 * count, seconds, seed, kinds)
        for index in range(len(scenes)):
            still = {detail for detail in details if wanted[detail] > 0}
            if not still:
                break
            item = scenes[index]
            captions = captions_of(item) + captions_of(item, 3, detailed=1.0)
            best = max(captions, key=lambda caption: len(wanted_of(caption).keys() & still))
            if wanted_of(best).keys() & still:
                asked.append(Asked(item, best))
                for detail in wanted_of(best):
                    wanted[detail] -= 1
    return asked


def wanted_of(caption: Caption) -> dict[str, list[tuple[str, int]]]:
    """The details that a caption names: {detail: [(class, answer), …]}.

    number: how many; pitch and pace: 0 low or slow, 1 high or fast; loudness: 0 soft, 1 loud; distance: 1 far; order:
    the position of the class.
    """
    named = {}
    for place, clause in enumerate(caption.clauses):
        sound = CLASSES[clause.name]
        for detail, word in clause.said().items():
            answer = {
                "number": lambda word: word, "pitch": lambda word: sound.low_high.index(word),  # noqa: B023
                "pace": lambda word: sound.slow_fast.index(word.strip()),  # noqa: B023
                "loudness": lambda word: int(word == LOUDLY), "distance": lambda word: 1,
            }[detail](word)  # fmt: skip
            named.setdefault(detail, []).append((clause.name, answer))
        if caption.kind == "sequence":
            named.setdefault("order", []).append((clause.name, place))
    return named


def _answer(detail: str, answers: dict) -> int:
    """The judge's answer for one class in one sound, in the terms of `wanted_of`; the likelier of two words."""
    if detail == "number":
        return int(answers["count"].argmax()) + 1
    if detail in ("pitch", "pace"):
        return int(answers[detail][2] > answers[detail][0])
    if detail == "loudness":
        return int(answers["gain"] * 10 > SOFT)
    return int(answers["distant"] > 0)


@dataclass(frozen=True)
class DetailAnswers:
    """The judge's answers for n sounds, each with one caption."""

    captions: list[Caption]
    classes: np.ndarray  # (n, K) logits
    of_class: list[dict[str, dict[str, int]]]  # n times {class that the caption names: {detail: answer}}
    silent: np.ndarray  # (n,)

    def right(self, chance: bool = False) -> dict[str, np.ndarray]:
        """For "class", "nothing else" and each detail an array with 1 for each right caption, else 0.

        A silent sound is wrong in every detail. chance: each answer is compared with the caption half the list further
        on that names the same detail; where all captions name the same value (distance), with captions that do not.
        """
        n, found = len(self.captions), {}
        names = [{clause.name for clause in caption.clauses} for caption in self.captions]
        shift = n // 2 if chance else 0
        named, alone = [], []
        for i in range(n):
            asked, logits = names[(i + shift) % n], self.classes[i]
            top = {NAMES[k] for k in np.argsort(-logits, kind="stable")[: len(asked)]}
            named.append(top == asked and not self.silent[i])
            alone.append(named[-1] and max(x for x, name in zip(logits, NAMES, strict=True) if name not in asked) < 0)
        found["class"], found["nothing else"] = np.array(named, float), np.array(alone, float)
        wanted = [wanted_of(caption) for caption in self.captions]
        for detail in DETAILS:
            asked = [i for i in range(n) if detail in wanted[i]]
            if detail == "distance" and chance and asked:
                far = [any(of["distance"] for of in self.of_class[i].values()) for i in range(n) if i not in asked]
                found[detail] = np.array(far, float)
                continue
            if detail == "order" and chance:  # of two sounds either comes first
                found[detail] = np.full(len(asked), 0.5)
                continue
            half = len(asked) // 2 if chance else 0
            others = [asked[(k + half) % len(asked)] for k in range(len(asked))] if asked else []
            found[detail] = np.array([
                not self.silent[i] and all(
                    self.of_class[i][name][detail] == answer
                    for (name, _), (_, answer) in zip(wanted[i][detail], wanted[other][detail], strict=False)
                ) for i, other in zip(asked, others, strict=True)
            ], float)  # fmt: skip
        return found


@torch.no_grad()
def judge_details(judge: DetailJudge, waveforms: torch.Tensor, captions: Sequence[Caption]) -> DetailAnswers:
    """Waveforms (n, N) at 16 kHz and the caption of each -> the judge's answers for the classes in the captions.

    Raises ValueError for another number of captions.
    """
    if len(waveforms) != len(captions):
        raise ValueError(
            f"expected one caption for each sound, got {len(captions)} captions and {len(waveforms)} sounds"
        )
    classes, of_class = [], []
    for start in range(0, len(captions), 32):
        part = captions[start : start + 32]
        row = torch.tensor([i for i, caption in enumerate(part) for _ in caption.clauses])
        names = [clause.name for caption in part for clause in caption.clauses]
        ask = torch.tensor([NAMES.index(name) for name in names])
        sounds = waveforms[start : start + 32].to(judge.device)
        heard, answers = judge(judge.mel(sounds), row.to(judge.device), ask.to(judge.device))
        answers = {k: v.cpu() for k, v in answers.items()}
        classes.append(heard.cpu().numpy())
        for i in range(len(part)):
            own = {names[q]: {k: v[q] for k, v in answers.items()} for q in torch.nonzero(row == i)[:, 0].tolist()}
            places = sorted(own, key=lambda name: float(own[name]["onset"]))
            of_class.append({
                name: {detail: _answer(detail, said) for detail in DETAILS[:-1]} | {"order": places.index(name)}
                for name, said in own.items()
            })  # fmt: skip
    silent = (waveforms.abs().amax(1) < SILENT).cpu().numpy()
    return DetailAnswers(list(captions), np.concatenate(classes), of_class, silent)


def detail_table(
    judge: DetailJudge,
    model: "RefinedAudioLDM",
    asked: Sequence[Asked],
    seed: int = 0,
    on_clips: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate rendered, copied and generated sounds of the same captions -> rows of detail, sound and `share`.

    sound: "rendered", "copied" (through VAE and vocoder), "generated" at the model's defaults, "chance" (the generated
    ones compared with other captions). The detail "silent" is the share of silent sounds.
    """
    captions = [a.caption for a in asked]
    rendered = torch.stack([a.item["waveform"] for a in asked])
    copied, generated = [], []
    for start in range(0, len(asked), 16):
        part = rendered[start : start + 16].to(model.device)
        with torch.no_grad():
            copied.append(model.to_waveform(model.decode(model.encode(part))).cpu())
        texts = [str(caption) for caption in captions[start : start + 16]]
        generated.append(model.generate(texts, part.shape[1] / 16_000, seed=seed).cpu())
        if on_clips:
            on_clips(min(start + 16, len(asked)), len(asked))
    sounds = {"rendered": rendered, "copied": torch.cat(copied), "generated": torch.cat(generated)}
    answers = {name: judge_details(judge, waveforms, captions) for name, waveforms in sounds.items()}
    return table_of(answers)


def table_of(answers: dict[str, DetailAnswers]) -> list[dict]:
    """{sound: answers} -> the rows of `detail_table`, chance from "generated"."""
    rows = []
    columns = {name: of.right() for name, of in answers.items()}
    columns["chance"] = answers["generated"].right(chance=True)
    for name, right in columns.items():
        if name in answers:
            right = right | {"silent": answers[name].silent.astype(float)}
        rows += [{"detail": d, "sound": name, **share(r)} for d, r in right.items() if len(r)]
    return rows


def show_table(rows: list[dict]) -> str:
    """The rows of `detail_table` as text: a line for each detail, a column for each kind of sound."""
    sounds = list(dict.fromkeys(row["sound"] for row in rows))
    lines = [f"{'':14} {'clips':>5} " + " ".join(f"{sound:>16}" for sound in sounds)]
    for detail in dict.fromkeys(row["detail"] for row in rows):
        of = {row["sound"]: row for row in rows if row["detail"] == detail}
        cells = [f"{of[s]['value']:.2f} ({of[s]['low']:.2f}-{of[s]['high']:.2f})" if s in of else "" for s in sounds]
        lines.append(f"{detail:14} {of['generated']['clips']:5} " + " ".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


@torch.no_grad()
def twin_gaps(
    model: "RefinedAudioLDM", asked: Sequence[Asked], timesteps: Sequence[int] = (500, 700, 900), seed: int = 0
) -> list[dict]:
    """By how much a caption with one detail changed makes the noise harder to predict -> rows, without any sampling.

    For each scene, detail and timestep: the loss (in units of what the U-Net predicts) under a twin of the caption
    minus that under the caption itself, for the same noise. A denoiser that ignores a detail has a mean gap of 0 and a
    share of .5. detail "other scene" is the caption of another scene: what a class is worth.
    """
    waveforms = torch.stack([a.item["waveform"] for a in asked]).to(model.device)
    z_0 = torch.cat([model.encode(part) for part in waveforms.split(16)])
    own = model.clap.embed_text([str(one.caption) for one in asked])
    generator, rows, pairs = torch.Generator().manual_seed(seed), [], twins_of(asked, seed)
    for timestep in timesteps:
        t = torch.full((len(z_0),), timestep, device=z_0.device)
        eps = torch.randn(z_0.shape, generator=generator).to(z_0)
        z_t, weight = add_noise(z_0, eps, t, model.schedule), model.loss_weight(t)

        def losses(places: list[int], embedding: torch.Tensor, z_t=z_t, t=t, eps=eps, weight=weight) -> torch.Tensor:
            found = []
            for where, c in zip(torch.tensor(places).split(32), embedding.split(32), strict=True):
                error = (model.denoise(z_t[where], t[where], c) - eps[where]).square()
                found.append(weight[where] * error.flatten(1).mean(1))
            return torch.cat(found)

        right = losses(list(range(len(asked))), own)
        for detail, twins in pairs.items():
            places = [i for i, _ in twins]
            gap = losses(places, model.clap.embed_text([text for _, text in twins])) - right[places]
            rows.append({"timestep": timestep, "detail": detail, "gap": float(gap.mean()),
                         **share((gap > 0).cpu().numpy().astype(float))})  # fmt: skip
    return rows


@torch.no_grad()
def twin_choices(clap: "Clap", asked: Sequence[Asked], seed: int = 0) -> list[dict]:
    """How often a conditioner finds a sound nearer to its caption than to a twin with one detail changed -> rows.

    One twin for each scene and detail; chance is .5. detail "other scene" takes the caption of another scene.
    """
    waveforms = torch.stack([one.item["waveform"] for one in asked]).to(clap.mel_bank.device)
    audio = torch.cat([clap.embed_audio(part, 16_000) for part in waveforms.split(32)])
    own = (audio * clap.embed_text([str(one.caption) for one in asked])).sum(1)
    rows = []
    for detail, twins in twins_of(asked, seed).items():
        places = [i for i, _ in twins]
        nearer = own[places] > (audio[places] * clap.embed_text([text for _, text in twins])).sum(1)
        rows.append({"detail": detail, **share(nearer.cpu().numpy().astype(float))})
    return rows


def twins_of(asked: Sequence[Asked], seed: int = 0) -> dict[str, list[tuple[int, str]]]:
    """{detail: [(index in `asked`, its caption with another value of the detail), …]}, and "other scene"."""
    source, pairs = random.Random(seed), {}
    for i, one in enumerate(asked):
        for detail, others in one.caption.contrasts().items():
            pairs.setdefault(detail, []).append((i, str(source.choice(others))))
        other = asked[(i + len(asked) // 2) % len(asked)]
        pairs.setdefault("other scene", []).append((i, str(other.caption)))
    return pairs
