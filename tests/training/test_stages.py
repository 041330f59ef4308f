"""A run that is broken off and resumed is the run that was never broken off, bit for bit."""

import json
import math
import os
import re
import signal
from dataclasses import replace
from functools import partialmethod
from itertools import islice, pairwise

import pytest
import torch
from torch import nn

from refined_ldm.data.batches import loader
from refined_ldm.devices import pick_accelerator
from refined_ldm.discriminators import Discriminators
from refined_ldm.durable.signals import Stopped
from refined_ldm.randomness import step_seed
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training import loop
from refined_ldm.training import stages as train
from refined_ldm.training.loop import learning_rate
from refined_ldm.training.stages import TRAINERS
from refined_ldm.vae import MelVAE, PatchDiscriminator, PatchDiscriminatorConfig
from tests.support import small
from tests.support.accelerators import fp16_on_the_cpu

MUON = replace(small.STAGE, optimizer="muon", ema_decay=0.99, weight_decay=0.1)
CASES = {  # name: (stage, settings of its training, other settings)
    "vae": ("vae", replace(small.STAGE, crop_frames=16), {}),
    "clap": ("clap", small.STAGE, {}),
    "ldm": ("ldm", MUON, {}),
    "ldm-latents": ("ldm", small.STAGE, {"parameterization": "gaussian"}),
    "hifigan": ("hifigan", replace(small.STAGE, ema_decay=0.99), {}),
    "hifigan-adversarial": ("hifigan", replace(small.STAGE, crop_frames=16), {}),
    "hifigan-joined": ("hifigan", replace(small.STAGE, crop_frames=16, ema_decay=0.9, disc_start=3), {}),
    "hifigan-of-vae-mels": ("hifigan", replace(small.STAGE, vae_mels=True), {}),
    "vae-adversarial": ("vae", replace(small.STAGE, adversarial_weight=0.1, disc_start=2), {}),
}


@pytest.fixture(autouse=True)
def small_clap(monkeypatch):
    small.use_small_clap(monkeypatch)


def begin(case, seed=0, **run):
    """A fresh model and the generator that trains it -> (modules under training, steps)."""
    stage, settings, changes = CASES[case]
    model = RefinedAudioLDM(small.config(training={stage: settings}, **changes), seed)
    data, modules = small.clips(), [getattr(model, {"ldm": "unet", "hifigan": "vocoder"}.get(stage, stage))]
    extra = {}
    torch.manual_seed(seed)
    if case in ("hifigan-adversarial", "hifigan-joined"):
        modules.append(extra.setdefault("discriminators", Discriminators(model.config.discriminators)))
    if case == "vae-adversarial":
        modules.append(extra.setdefault("discriminator", PatchDiscriminator(PatchDiscriminatorConfig(8, 2))))
    if case == "hifigan-of-vae-mels":  # what it learns from is given
        torch.manual_seed(0)
        model.vae = MelVAE(model.config.vae)
    if case == "ldm-latents":
        data = small.latents(30)
        model.gaussian.fit(torch.stack([d["latent"] for d in data]))
    if stage == "ldm":  # what the U-Net learns from is given: another seed must not change it
        with torch.random.fork_rng():
            torch.manual_seed(0)
            fixed = RefinedAudioLDM(model.config, 0)
        model.clap.load_state_dict(fixed.clap.state_dict()), model.vae.load_state_dict(fixed.vae.state_dict())
        model.clap.eval()
    steps = TRAINERS[stage](model, loader(data, settings.batch_size), **extra, **run)
    return nn.ModuleList(modules), steps


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(case, tmp_path):
    unbroken, steps = begin(case)
    expected = list(steps)
    assert [s.index for s in expected] == [1, 2, 3, 4, 5, 6] and not any(module.training for module in unbroken)

    _, steps = begin(case, run_dir=tmp_path)
    first = list(islice(steps, 3))
    steps.close()  # what `break` does
    resumed, steps = begin(case, seed=8, run_dir=tmp_path, resume=True)  # all it needs is in the checkpoint
    second = list(steps)
    assert [s.index for s in second] == [4, 5, 6]
    for found, wanted in zip(first + second, expected, strict=True):
        assert (found.losses, found.loss, found.lr) == (wanted.losses, wanted.loss, wanted.lr)
    state = resumed.state_dict()
    for name, value in unbroken.state_dict().items():
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("case", ["ldm", "vae-adversarial"])
def test_fp16_goes_on_bit_for_bit_with_its_scale_and_its_overflows(case, tmp_path, monkeypatch):
    often = partialmethod(torch.amp.GradScaler.__init__, growth_interval=2)
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", often)
    with fp16_on_the_cpu() as accelerator:
        unbroken, steps = begin(case, accelerator=accelerator)
        expected = list(steps)
        assert list(islice(begin(case, accelerator=accelerator, run_dir=tmp_path)[1], 3))
        resumed, steps = begin(case, seed=8, accelerator=accelerator, run_dir=tmp_path, resume=True)
        assert [(s.index, s.losses) for s in steps] == [(s.index, s.losses) for s in expected[3:]]
    state, key = resumed.state_dict(), "overflows" if case == "ldm" else "vae/overflows"
    assert all(torch.equal(state[name], value) for name, value in unbroken.state_dict().items())
    scales = [json.loads(path.read_text())["scalers"] for path in sorted(tmp_path.glob("*/step-*/state.json"))]
    assert len(scales) == 2 and scales[0] != scales[1]
    assert all(isinstance(s.losses[key], float) for s in expected)


def test_gradient_checkpointing_is_a_setting_that_changes_no_loss(monkeypatch):
    monkeypatch.setitem(CASES, "again", ("ldm", replace(MUON, gradient_checkpointing=True), {}))
    again, steps = begin("again")
    assert [step.loss for step in islice(steps, 3)] == [step.loss for step in islice(begin("ldm")[1], 3)]
    assert again[0].gradient_checkpointing


def test_in_fp16_losses_are_nearly_those_of_float32():
    single = [step.loss for step in begin("ldm")[1]]
    with fp16_on_the_cpu() as accelerator:
        half = [step.loss for step in begin("ldm", accelerator=accelerator)[1]]
    assert half != single and half == pytest.approx(single, rel=0.01)


def test_an_overflow_skips_the_step_and_one_at_the_smallest_scale_ends_the_run():
    with fp16_on_the_cpu() as accelerator:
        model = RefinedAudioLDM(small.config())
        before, factor = model.vae.decoder.conv_out.weight.clone(), [math.inf]
        model.vae.decoder.conv_out.weight.register_hook(lambda gradient: gradient * factor[0])
        steps = train.train_vae(model, loader(small.clips(), 4), max_steps=40, accelerator=accelerator)
        assert [next(steps).losses["overflows"] for _ in range(3)] == [1, 2, 3]
        assert torch.equal(model.vae.decoder.conv_out.weight, before)
        factor[0] = 1.0
        assert next(steps).losses["overflows"] == 3 and not torch.equal(model.vae.decoder.conv_out.weight, before)
        factor[0] = math.nan
        with pytest.raises(FloatingPointError, match="the vae gradient is nan at step 1[0-9]"):
            list(steps)


def test_runs_do_not_mix(tmp_path):
    list(begin("vae", run_dir=tmp_path)[1])
    with pytest.raises(FileExistsError, match="step-0000006 is there already: resume that run"):
        next(begin("vae", run_dir=tmp_path)[1])
    assert list(begin("vae", run_dir=tmp_path, resume=True)[1]) == []  # a finished run is finished
    assert next(begin("vae", run_dir=tmp_path / "other", resume=True)[1]).index == 1


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    list(begin("vae", run_dir=tmp_path)[1])
    weights = tmp_path / "vae" / "step-0000006" / "vae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="step-0000006 is damaged"):
        assert [s.index for s in begin("vae", run_dir=tmp_path, resume=True)[1]] == [4, 5, 6]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_clips(tmp_path):
    model = RefinedAudioLDM(small.config())
    data = small.clips(4)
    list(train.train_vae(model, loader(data, 4), max_steps=3, run_dir=tmp_path))
    before = {name: p.clone() for name, p in model.vae.named_parameters()}
    data[2]["waveform"] = data[2]["waveform"].clone()
    data[2]["waveform"][100] = math.nan
    message = r"vae loss is nan at step 4, clips .*clip-2.*; last good checkpoint: .*step-0000003\. Lower the learning"
    with pytest.raises(FloatingPointError, match=message):
        list(train.train_vae(model, loader(data, 4), run_dir=tmp_path, resume=True))
    assert all(torch.equal(p, before[name]) for name, p in model.vae.named_parameters())
    assert not model.vae.training


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_no_number_stops_the_run_before_the_step(max_grad_norm):
    settings = replace(small.STAGE, max_grad_norm=max_grad_norm)
    model = RefinedAudioLDM(small.config(training={"vae": settings}))
    before = {name: p.clone() for name, p in model.vae.named_parameters()}
    model.vae.decoder.conv_out.weight.register_hook(lambda gradient: gradient * math.inf)  # the loss itself is fine
    with pytest.raises(FloatingPointError, match="the vae gradient is (inf|nan) at step 1, clips .*last good.*: none"):
        list(train.train_vae(model, loader(small.clips(), 4)))
    assert all(torch.equal(p, before[name]) for name, p in model.vae.named_parameters())


def test_a_loss_that_jumps_is_logged_and_the_run_goes_on(caplog):
    settings = replace(small.STAGE, max_steps=26, lr=1e-6)
    model, loud = RefinedAudioLDM(small.config(training={"vae": settings})), small.clips(4)
    model.mel.register_forward_hook(lambda module, inputs, mel: mel + 30 * (len(caplog.seen) == 23))
    caplog.seen = []
    for step in train.train_vae(model, loader(loud, 4)):
        caplog.seen.append(step.loss)
    assert len(caplog.seen) == 26 and len(caplog.records) == 1
    assert re.fullmatch(r"vae: the loss of step 24, [\d.]+, is [\d.]+ times the usual", caplog.messages[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_and_has_it_saved(tmp_path, number):
    def interrupted(step):  # at some moment of the second step, after which no checkpoint is due
        if step == 2:
            os.kill(os.getpid(), number)

    unbroken = [s.loss for s in begin("vae")[1]]
    modules, steps = begin("vae", run_dir=tmp_path)
    calls = []
    modules[0].encoder.register_forward_hook(lambda *_: (calls.append(1), interrupted(len(calls)))[0])
    found = []
    with pytest.raises(Stopped, match="stopped after step 2 of vae, saved in .*step-0000002") as stopped:
        for step in steps:
            found.append(step.loss)
    assert stopped.value.signal == number and found == unbroken[:2]
    assert found + [s.loss for s in begin("vae", run_dir=tmp_path, resume=True)[1]] == unbroken


def test_a_step_is_reported_before_it_is_saved_and_saved_if_the_loop_is_left(tmp_path):
    steps = begin("vae", run_dir=tmp_path)[1]
    for step in steps:
        if step.index == 3:  # of which a checkpoint is due
            assert not (tmp_path / "vae" / "step-0000003").exists()
            break
    steps.close()
    assert (tmp_path / "vae" / "step-0000003").is_dir()


def test_training_does_not_touch_the_randomness_of_its_surroundings():
    torch.manual_seed(3)
    expected = [s.loss for s in begin("clap")[1]]
    torch.manual_seed(4)
    modules, steps = begin("clap")
    found, states = [], []
    for step in steps:
        found.append(step.loss)
        states.append(torch.get_rng_state())
    assert found == expected and all(torch.equal(state, states[0]) for state in states)
    other = TRAINERS["vae"](RefinedAudioLDM(small.config()), loader(small.clips(), 4), seed=1)
    assert [s.loss for s in other] != [s.loss for s in begin("vae")[1]]


def test_the_average_follows_the_weights(tmp_path):
    """The weights a run ends with are the running average of those it went through."""
    modules, steps = begin("ldm")
    average = {k: v.clone() for k, v in modules.state_dict().items()}
    for step in steps:
        decay = min(0.99, step.index / (step.index + 10))
        for name, value in modules.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    for name, value in modules.state_dict().items():
        torch.testing.assert_close(value, average[name], atol=1e-6, rtol=1e-5)


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = replace(small.STAGE, max_steps=100, warmup_steps=10, lr=2.0)
    rates = [learning_rate(i, settings) for i in range(1, 101)]
    assert rates[0] == pytest.approx(0.2) and max(rates) == pytest.approx(2.0, rel=0.03) == rates[9]
    assert rates[50] == pytest.approx(1.0) and rates[-1] < 0.01
    assert [learning_rate(i, replace(settings, lr_schedule="constant")) for i in (5, 10, 100)] == [1.0, 2.0, 2.0]


def test_a_stable_rate_falls_in_the_last_fifth_and_is_the_same_at_any_length_before():
    settings = replace(small.STAGE, max_steps=100, warmup_steps=10, lr=2.0, lr_schedule="wsd")
    rates = [learning_rate(i, settings) for i in range(1, 101)]
    assert rates[4] == 1.0 and rates[9:81] == [2.0] * 72 and rates[81] < 2.0
    assert rates[80:] == sorted(rates[80:], reverse=True) and 0 < rates[-1] < 0.1
    assert rates[85] == pytest.approx(1.0)  # 1 - sqrt of a quarter of the decay
    longer = [learning_rate(i, replace(settings, max_steps=500)) for i in range(1, 101)]
    assert longer[:81] == rates[:81] and longer[99] == 2.0


def test_when_discriminators_join_a_second_phase_begins():
    settings = replace(small.STAGE, max_steps=100, warmup_steps=5, lr=2.0, disc_start=60, disc_lr=0.5)
    rates = [learning_rate(i, settings) for i in range(1, 101)]
    assert max(rates[:60]) == pytest.approx(2.0, rel=0.05) and rates[59] < 0.01
    assert rates[60] == pytest.approx(0.1) and max(rates[60:]) == pytest.approx(0.5, rel=0.05) and rates[-1] < 0.01
    assert learning_rate(61, replace(settings, disc_lr=0.0)) == pytest.approx(0.4)  # lr's

    modules, steps = begin("vae-adversarial")
    states = [{k: v.clone() for k, v in modules.state_dict().items()} for _ in steps]
    moved = [{name for name in a if not torch.equal(a[name], b[name])} for a, b in pairwise(states)]
    assert {name.split(".")[1] for name in moved[0]} == {"encoder", "decoder", "quant_conv", "post_quant_conv"}
    for names in moved[1:]:  # from step 3 on the encoder stays, and the discriminator learns
        assert not any(name.startswith(("0.encoder", "0.quant_conv")) for name in names)
        assert any(name.startswith("1.") for name in names) and any(name.startswith("0.decoder") for name in names)


def test_a_phase_begins_with_the_average_and_fresh_optimiser_states():
    modules, steps = begin("hifigan-joined")
    vocoder = modules[0]
    for step in steps:
        if step.index == 3:
            break
    steps.close()
    learner = loop.Learner("vocoder", vocoder, None, replace(small.STAGE, ema_decay=0.9), pick_accelerator("cpu"))
    learner.average = {k: torch.full_like(v, 2.0) for k, v in vocoder.state_dict().items()}
    learner.optimizers[0].state[next(vocoder.parameters())]["step"] = torch.tensor(3.0)
    learner.begin_phase()
    assert not learner.optimizers[0].state and all((p == 2).all() for p in vocoder.parameters())


def test_seeds_of_steps_are_all_different():
    assert len({step_seed(seed, index) for seed in range(50) for index in range(2000)}) == 50 * 2000


def test_bad_settings_are_refused():
    model, data = RefinedAudioLDM(small.config()), loader(small.clips(), 4)
    for settings in ({"max_steps": 0}, {"lr": 0.0}):
        with pytest.raises(ValueError, match="max_steps and lr must be positive"):
            next(train.train_vae(model, data, **settings))
    with pytest.raises(ValueError, match="adamw or muon, got 'sgd'"):
        replace(small.STAGE, optimizer="sgd")


def test_max_steps_and_lr_take_the_place_of_the_configuration():
    model = RefinedAudioLDM(small.config())
    steps = list(train.train_vae(model, loader(small.clips(), 4), max_steps=2, lr=1e-5))
    assert len(steps) == 2 and max(s.lr for s in steps) <= 1e-5
    assert all(s.seconds > 0 and set(s.losses) == {"loss", "l1", "kl", "adversarial", "perceptual"} for s in steps)


@pytest.mark.parametrize("stage", ["vae", "clap", "ldm", "hifigan"])
def test_every_stage_learns_one_batch(stage):
    settings = replace(small.STAGE, max_steps=60, lr=1e-2, warmup_steps=0, batch_size=4)
    model = RefinedAudioLDM(small.config(training={stage: settings}), seed=4)
    data = small.latents(4) if stage == "ldm" else small.clips(4)  # a fresh VAE's latents are mostly its own noise
    losses = [s.loss for s in TRAINERS[stage](model, loader(data, 4))]
    assert sum(losses[-20:]) < 0.85 * sum(losses[:20])


@torch.no_grad()
def test_how_often_the_unet_has_no_caption_may_differ_from_the_configurations():
    model = RefinedAudioLDM(small.config(unconditional_probability=0.5), seed=3).eval()  # no dropout
    small.awake(model.unet)
    latents, blank = torch.stack([item["latent"] for item in small.latents(8)]), model.clap.embed_text([""])
    captioned = {"latent": latents, "embeddings": torch.stack([item["embeddings"] for item in small.latents(8)])}
    blanked = {"latent": latents, "embeddings": blank.expand(8, 3, -1)}

    def loss(batch, probability):
        losses = train.ldm_losses(model, small.STAGE, probability)
        return float(losses(model.unet, batch, torch.Generator().manual_seed(1), 0)["loss"])

    never, always, usual = loss(captioned, 0), loss(blanked, 0), loss(captioned, None)
    assert loss(captioned, 1) == always != never and usual not in (never, always)
