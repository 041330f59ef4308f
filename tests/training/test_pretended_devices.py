"""Every stage on a GPU and on a Mac that are pretended: it trains, waits seldom, is saved and goes on."""

import copy
from dataclasses import replace
from itertools import islice

import pytest
import torch

from refined_ldm.config import STAGES, StageConfig
from refined_ldm.data.batches import loader
from refined_ldm.devices import pick_accelerator, pick_precision
from refined_ldm.discriminators import Discriminators
from refined_ldm.training.contrasts import train_audio_details, train_text_details
from refined_ldm.training.inputs import Resampled, cached_clips
from refined_ldm.training.pipeline import train_stage
from refined_ldm.training.stages import TRAINERS, train_clap
from refined_ldm.vae import PatchDiscriminator, PatchDiscriminatorConfig
from tests.support import small
from tests.support.accelerators import forget_accelerators
from tests.support.pretended_device import pretend

SETTINGS = {
    "vae": replace(small.STAGE, adversarial_weight=0.1, crop_frames=16),
    "clap": small.STAGE,
    "ldm": replace(small.STAGE, optimizer="muon", ema_decay=0.99, audio_share=0.5, conditioner_dropout=0.1),
    "hifigan": replace(small.STAGE, crop_frames=16, ema_decay=0.9),
}
WAITS = {"ldm": 1}  # in a step, else 2: for the discriminators' losses, or since transformers looks at a caption's mask


@pytest.fixture(autouse=True)
def another_machine():
    before = torch.get_float32_matmul_precision()
    forget_accelerators(), pick_precision.cache_clear()
    yield
    forget_accelerators(), pick_precision.cache_clear()
    torch.set_float32_matmul_precision(before)


def begin(model, stage, place, run_dir, **run):
    """The generator that trains a stage on random clips."""
    extra, data = {}, small.clips()
    if stage == "vae":
        extra["discriminator"] = PatchDiscriminator(PatchDiscriminatorConfig(8, 2)).to(place)
    if stage == "hifigan":
        extra["discriminators"] = Discriminators(model.config.discriminators).to(place)
    if stage == "ldm":
        sounds = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
        data = [item | {"audio_embedding": sound} for item, sound in zip(small.latents(8), sounds, strict=True)]
    return TRAINERS[stage](model, loader(data, 4), run_dir=run_dir, **extra, **run)


@pytest.mark.parametrize("kind, capability", [("cuda", (9, 0)), ("cuda", (7, 5)), ("mps", None)])
@pytest.mark.parametrize("stage", TRAINERS)
def test_a_stage_trains_and_goes_on(stage, kind, capability, monkeypatch, tmp_path):
    model = small.awake_model(monkeypatch, training=SETTINGS)
    with pretend(kind, capability or (0, 0)) as gpu:
        model.to(kind)
        steps = begin(model, stage, kind, tmp_path, max_steps=4)
        next(steps)
        gpu.forget()
        next(steps)
        networks = 1 + (stage in ("vae", "hifigan"))  # the second is the discriminators
        scaled = networks if capability == (7, 5) else 0  # each at an overflow
        assert 0 < gpu.waits.total() <= WAITS.get(stage, 2) + scaled, gpu.report(30)
        next(steps)
        steps.close()
        going_on = list(begin(model, stage, kind, tmp_path, max_steps=4, resume=True))
        assert [step.index for step in going_on] == [4]


def test_the_running_average_is_a_few_operators_however_many_weights_there_are(monkeypatch):
    counts = []
    for decay in (0.0, 0.99):
        model = small.awake_model(monkeypatch, training={"ldm": replace(small.STAGE, ema_decay=decay)})
        with pretend("cuda", capability=(6, 1)) as gpu:
            steps = begin(model.to("cuda"), "ldm", "cuda", None, max_steps=2)
            next(steps)
            gpu.forget()
            next(steps)
            counts.append(gpu.operators)
        forget_accelerators()
    assert 0 < counts[1] - counts[0] <= 5, counts


def test_clips_for_a_conditioner_of_another_rate_are_resampled_before_the_step(monkeypatch):
    monkeypatch.setattr(small, "CLAP", replace(small.CLAP, sample_rate=22_050))
    model, clips = small.awake_model(monkeypatch), small.clips()
    cpu = pick_accelerator("cpu", "no")  # in float32, as that GPU
    within = [step.loss for step in train_clap(copy.deepcopy(model), loader(clips, 4), max_steps=2, accelerator=cpu)]
    before = loader(Resampled(clips, 16_000, 22_050), 4)
    forget_accelerators()
    with pretend("cuda", capability=(6, 1)) as gpu:
        steps = train_clap(model.to("cuda"), before, max_steps=2)
        found = [next(steps).loss]
        gpu.forget()
        found.append(next(steps).loss)
        assert gpu.waits.total() <= 2 and gpu.copies["cuda -> cpu"] < 100, gpu.report(30)
        steps.close()
    assert found == pytest.approx(within, rel=1e-5)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("train", [train_text_details, train_audio_details])
def test_the_details_of_captions_are_trained(train, kind, monkeypatch, tmp_path):
    model, clips = small.awake_model(monkeypatch), cached_clips(small.config(seconds=1.28, clips=6), tmp_path)
    with pretend(kind):
        steps = train(model.to(kind).clap, clips, StageConfig(max_steps=2, batch_size=4, lr=1e-3))
        assert [step.index for step in steps] == [1, 2]


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_a_run_of_the_pipeline_is_fed_by_other_processes(monkeypatch, tmp_path):
    """Clips, latents and embeddings are computed on the device; batches come from worker processes."""
    training = dict.fromkeys(STAGES, replace(small.STAGE, max_steps=2, audio_share=0.5))
    changes = {"parameterization": "caption-gaussian", "seconds": 1.28, "clips": 12}
    model = small.awake_model(monkeypatch, training=training, **changes)
    with pretend("cuda", capability=(6, 1)) as gpu:
        model.to("cuda")
        for name in ("vae", "clap", "ldm"):
            assert [step.index for step in train_stage(model, name, tmp_path)] == [1, 2]
        assert not gpu.faults


def test_copies_to_a_run_are_waited_for_once_a_file(monkeypatch, tmp_path):
    model = small.awake_model(monkeypatch, training=SETTINGS)
    with pretend("cuda") as gpu:
        model.to("cuda")
        steps = begin(model, "ldm", "cuda", tmp_path, max_steps=4)
        list(islice(steps, 3))
        gpu.forget()
        next(steps)
        steps.close()
        assert gpu.waits.total() <= 10, gpu.report(30)
