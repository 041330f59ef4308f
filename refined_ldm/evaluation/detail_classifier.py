"""A detail classifier: the number, pitch, pace, order, loudness and distance of the sounds in a clip.

A small convolutional and recurrent network learns them from rendered scenes that no model was trained on, with the
exact metadata as targets; it shares nothing with the conditioner. It answers for one class of sound at a time, so that
a scene of two sounds gives the details of each. `details.py` compares its answers with captions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from refined_ldm.config import StageConfig
from refined_ldm.data.batches import loader
from refined_ldm.mel import MelConfig, MelSpectrogram
from refined_ldm.randomness import draw
from refined_ldm.scenes.classes import CLASSES, Event
from refined_ldm.training.loop import Step, optimise
from refined_ldm.weights import load_into, read_weights, save_weights

CLASS_NAMES = tuple(sorted(CLASSES))
MAX_COUNT = 7  # the largest count; more count as 7
ANSWER_SIZES = {  # outputs of the network for each answer
    "count": MAX_COUNT, "pitch": 3, "pace": 3, "distant": 1, "onset": 1, "gain": 1,
}  # fmt: skip
CLASSIFIER_TRAINING = StageConfig(4000, 32, 2e-3, weight_decay=0.02, ema_decay=0.999)
CLASSIFIER_CLIPS = 16_000  # rendered scenes to train on
CLASSIFIER_WEIGHTS = Path(__file__).parents[1] / "weights" / "details.safetensors"


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the classifier."""

    channels: tuple[int, ...] = (24, 48, 96, 128)
    width: int = 128


class DetailClassifier(nn.Module):
    """Log-mel (B, 1, T, F) -> the classes in it and, for one class at a time, its details."""

    def __init__(self, config: ClassifierConfig = ClassifierConfig()):
        super().__init__()
        self.config = config
        self.mel = MelSpectrogram(MelConfig())
        widths, inner = config.channels, config.width
        self.convolutions = nn.ModuleList([nn.Conv2d(1, widths[0], 5, stride=2, padding=2)] + [
            nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True)
        ])  # fmt: skip
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.pools = ((1, 2), (2, 2), (1, 2), (1, 1))  # in time and frequency, after each
        self.projection = nn.Linear(widths[-1] * 4, inner)
        self.recurrent = nn.GRU(inner, inner // 2, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(2 * inner, len(CLASS_NAMES))
        self.query = nn.Embedding(len(CLASS_NAMES), inner)
        self.key, self.value, self.context = (nn.Linear(2 * inner, inner) for _ in range(3))
        self.answer = nn.Sequential(
            nn.Linear(6 * inner, inner), nn.GELU(), nn.Linear(inner, sum(ANSWER_SIZES.values()))
        )

    @property
    def device(self) -> torch.device:
        return self.mel.window.device

    def class_logits(self, mel: torch.Tensor) -> torch.Tensor:
        """Log-mel (B, 1, T, F) -> logits (B, classes) for each class of CLASS_NAMES to be in the clip."""
        return self.classifier(self.frames(mel).amax(1))

    def frames(self, mel: torch.Tensor) -> torch.Tensor:
        """Log-mel (B, 1, T, F) -> features (B, T / 4, 2 * width), 40 ms each."""
        h = (mel + 5) / 3  # about zero mean and unit variance
        for convolution, norm, pool in zip(self.convolutions, self.norms, self.pools, strict=True):
            h = F.max_pool2d(F.relu(norm(convolution(h))), pool)
        h = F.relu(self.projection(h.transpose(1, 2).flatten(2)))
        return torch.cat([h, self.recurrent(h)[0]], dim=2)

    def forward(
        self, mel: torch.Tensor, row: torch.Tensor, name: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Log-mel (B, 1, T, F), queries for class `name` (Q,) in clip `row` (Q,) -> logits (B, classes), answers.

        answers: {"count": logits (Q, MAX_COUNT), "pitch", "pace": (Q, 3) low, between, high, "distant": logit (Q, 1),
        "onset": s (Q, 1), "gain": tens of dB (Q, 1)}.
        """
        frames = self.frames(mel)
        classes = self.classifier(frames.amax(1))
        query, frames = self.query(name), frames[row]
        gate = torch.sigmoid(torch.einsum("qtw,qw->qt", self.key(frames), query) / query.shape[1] ** 0.5)[..., None]
        value = F.gelu(self.value(frames))
        seconds = torch.linspace(-1, 1, frames.shape[1], device=frames.device)[:, None]
        summed = (gate * value).sum(1) / 16
        position = (gate * seconds * value).sum(1) / 16
        mean = (gate * value).sum(1) / gate.sum(1).clamp(min=1e-3)
        loudest = (gate * value).amax(1)
        context = F.gelu(self.context(frames)).amax(1)  # of the other sounds too: loudness is relative to them
        answers = self.answer(torch.cat([summed, position, mean, loudest, query, context], dim=1))
        return classes, dict(zip(ANSWER_SIZES, answers.split(list(ANSWER_SIZES.values()), dim=1), strict=True))

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write weights and sizes as safetensors."""
        save_weights(path, self, self.config, dtype)

    @classmethod
    def load(cls, path: str | Path | None = None) -> "DetailClassifier":
        """Read a file written by `save` (None: the shipped one) -> the classifier in evaluation mode."""
        path = CLASSIFIER_WEIGHTS if path is None else Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"no detail classifier at {path}: name its file, or run `python -m refined_ldm.cli.train_classifier`"
            )
        state, metadata = read_weights(path)
        try:
            sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in metadata["config"].items()}
            config = ClassifierConfig(**sizes)
        except (KeyError, TypeError, AttributeError) as fault:
            raise ValueError(
                f"{path} is no detail classifier of `python -m refined_ldm.cli.train_classifier` ({fault})"
            ) from fault
        return load_into(cls(config), state, path).eval()


def range_class(value: float | None, limits: tuple[float, float]) -> int:
    """Position of a value among two limits: 0 below the first, 2 above the second, else 1."""
    return 1 + (value > limits[1]) - (value < limits[0])


def targets_of(items: Sequence[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Clip and class (Q,) of each audible event, classes (B, K), and {answer: (values (Q,), whether known (Q,))}."""
    row, name, values = [], [], {answer: [] for answer in ANSWER_SIZES}
    classes = torch.zeros(len(items), len(CLASS_NAMES))
    for i, item in enumerate(items):
        for event in item["events"]:
            event = event if isinstance(event, Event) else Event(**event)
            if event.name not in item["labels"]:
                continue
            sound = CLASSES[event.name]
            row.append(i), name.append(CLASS_NAMES.index(event.name))
            classes[i, name[-1]] = 1
            values["count"].append(None if event.count is None else min(event.count, MAX_COUNT) - 1)
            values["pitch"].append(None if not sound.low_high else range_class(event.pitch, sound.pitches))
            values["pace"].append(None if not sound.slow_fast else range_class(event.rate, sound.rates))
            values["distant"].append(float(event.distant))
            values["onset"].append(event.onset)
            values["gain"].append(event.gain / 10 if len(item["labels"]) == 2 else None)
    known = {k: torch.tensor([v is not None for v in of]) for k, of in values.items()}
    numbers = {k: torch.tensor([v or 0.0 for v in of]) for k, of in values.items()}
    return torch.tensor(row), torch.tensor(name), classes, {k: (numbers[k], known[k]) for k in ANSWER_SIZES}


def classifier_loss(
    classes: torch.Tensor, answers: dict[str, torch.Tensor], targets: torch.Tensor, events: dict[str, tuple]
) -> dict[str, torch.Tensor]:
    """Sum of the cross-entropies of classes and choices and four times the squared errors of seconds and tens of dB."""
    losses = {"classes": 10 * F.binary_cross_entropy_with_logits(classes, targets)}
    for name, answer in answers.items():
        value, known = (x.to(answer.device) for x in events[name])
        if ANSWER_SIZES[name] > 1:
            error = F.cross_entropy(answer, value.long(), reduction="none")
        elif name == "distant":
            rare = torch.tensor(3.0, device=value.device)  # one event in eight is far
            error = F.binary_cross_entropy_with_logits(answer[:, 0], value, reduction="none", pos_weight=rare)
        else:
            error = 4 * (answer[:, 0] - value).square()
        losses[name] = (error * known).sum() / known.sum().clamp(min=1)
    return {"loss": sum(losses.values()), **losses}


def augment(mel: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Augment log-mels (B, 1, T, F) with random level, tilt, floor, blur and grain."""
    B, bands = len(mel), mel.shape[3]
    level, tilt, floor, grain, blur = draw(torch.rand, (B, 5), generator).to(mel.device).T[:, :, None, None, None]
    mel = mel + 1.2 * (level - 0.5) + 1.5 * (tilt - 0.5) * torch.linspace(-1, 1, bands, device=mel.device)
    mel = torch.maximum(mel, -11.5 + 3.0 * floor)
    smooth = F.avg_pool2d(F.pad(mel, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mel = torch.lerp(mel, smooth, (1.5 * blur - 0.7).clamp(min=0))
    return mel + 0.3 * grain * draw(torch.randn, mel.shape, generator).to(mel)


def train_classifier(
    clips: Sequence[dict],
    settings: StageConfig = CLASSIFIER_TRAINING,
    seed: int = 0,
    run_dir: str | Path | None = None,
    resume: bool = False,
    accelerator: Any = None,
    device: str = "cpu",
) -> Iterator[tuple[DetailClassifier, Step]]:
    """Train on a cache of scenes, which no evaluated model may have seen -> yields (classifier, Step)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = DetailClassifier().to(device)

    def losses(
        network: DetailClassifier, batch: dict, generator: torch.Generator, index: int
    ) -> dict[str, torch.Tensor]:
        items = [{"events": e, "labels": names} for e, names in zip(batch["events"], batch["labels"], strict=True)]
        row, name, classes, events = targets_of(items)
        mel = augment(classifier.mel(batch["waveform"].to(device)), generator)
        logits, answers = network(mel, row.to(device), name.to(device))
        return classifier_loss(logits, answers, classes.to(device), events)

    batches, networks = loader(clips, settings.batch_size, seed), {"classifier": (classifier, losses)}
    for step in optimise("classifier", networks, batches, settings, seed, run_dir, resume, accelerator, device):
        yield classifier, step
