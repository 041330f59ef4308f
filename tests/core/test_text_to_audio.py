import math

import numpy as np
import pytest
import torch

from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support import small

CAPTIONS = ["a dog barks", "rain falls", "a bell rings twice"]


@pytest.fixture(scope="module")
def model():
    """Random weights with every layer awake, so that captions, steps and guidance all matter."""
    with pytest.MonkeyPatch.context() as patch:
        small.use_small_clap(patch)
        model = RefinedAudioLDM(small.config())
    small.awake(model.unet)
    model.scale.fill_(0.7)
    for p in model.vocoder.parameters():
        p.data *= 2  # large enough for clear differences
    return model.eval()


@pytest.mark.parametrize("seconds, samples", [(0.32, 5120), (0.5, 8000), (0.01, 160), (0.33337, 5334), (None, 5120)])
def test_shape_and_range(model, seconds, samples):
    waveform = model.generate(CAPTIONS[:2], seconds=seconds)
    assert waveform.shape == (2, samples) and waveform.dtype == torch.float32
    assert waveform.isfinite().all() and waveform.abs().max() <= 1 and waveform.std(1).min() > 1e-3


def test_the_same_seed_gives_the_same_sound_and_another_one_another(model):
    one = model.generate(CAPTIONS, seed=1)
    torch.manual_seed(99)  # the surroundings do not matter
    assert torch.equal(one, model.generate(CAPTIONS, seed=1))
    for row, other in zip(one, model.generate(CAPTIONS, seed=2), strict=True):
        assert (row - other).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{}, {"sampler": "ddim"}, {"candidates": 2}, {"sampler": "ddim", "eta": 0.0}])
def test_a_sound_does_not_depend_on_its_neighbours(model, settings):
    together = model.generate(CAPTIONS, seed=3, **settings)
    torch.testing.assert_close(model.generate(CAPTIONS[::-1], seed=3, **settings).flip(0), together, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.generate(CAPTIONS[1:2], seed=3, **settings), together[1:2], atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_every_part_of_a_small_model_works_with_one_thread_also_in_editing(model):
    """In all that makes sounds; afterwards, and after an error, torch has its threads again."""
    given, threads = torch.get_num_threads(), []
    look = [part.register_forward_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
            for part in (model.unet, model.vae.decoder, model.vocoder)]  # fmt: skip
    torch.set_num_threads(2)
    try:
        sound = model.generate(CAPTIONS, steps=2)[0]
        model.generate(CAPTIONS, steps=2, sampler="ddim", guidance_interval=(300, 800))
        model.edit(sound, "rain falls", steps=2)
        model.extend(sound, "rain falls", 0.2, steps=2)
        model.generate_long("rain falls", 0.7, steps=2)
        assert len(threads) > 20 and set(threads) == {1} and torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="latent must be"):
            model.decode(torch.zeros(1, 3, 8, 8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(given)
        for hook in look:
            hook.remove()


@torch.no_grad()
def test_griffin_lim_stands_in_for_the_vocoder(model, monkeypatch):
    monkeypatch.setattr(model, "config", small.config(vocoder="griffin_lim"))
    mel = model.mel(torch.stack([clip["waveform"] for clip in small.clips(2)]))
    together = model.to_waveform(mel)
    assert together.shape == (2, 5120) and together.abs().max() <= 1
    torch.testing.assert_close(model.to_waveform(mel[1:]), together[1:], atol=1e-3, rtol=0)  # alone as in company
    assert (model.mel(together) - mel).abs().mean() < 0.5


def test_a_caption_given_twice_gives_two_sounds_and_candidates_keeps_the_nearest(model):
    drawn = model.generate([CAPTIONS[0]] * 4, seed=5)
    assert all((drawn[0] - other).abs().max() > 1e-3 for other in drawn[1:])
    nearness = model.clap.embed_audio(drawn, 16_000) @ model.clap.embed_text(CAPTIONS[:1])[0]
    kept = model.generate(CAPTIONS[:1], seed=5, candidates=4)
    torch.testing.assert_close(kept[0], drawn[nearness.argmax()], atol=1e-4, rtol=0)


@torch.no_grad()
def test_guidance(model):
    z_T = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    one, other = model.clap.embed_text(CAPTIONS[:2]), model.clap.embed_text(CAPTIONS[1:])

    def sample(embedding, **settings):
        return model.sample_latent(embedding, z_T, **settings)

    assert torch.equal(sample(one, guidance_scale=0), sample(other, guidance_scale=0))  # the caption has no effect
    plain = sample(one, guidance_scale=1)
    assert (plain - sample(other, guidance_scale=1)).abs().max() > 1e-4
    assert (plain - sample(one, guidance_scale=4)).abs().max() > 1e-4
    # Away from itself is nowhere: guidance then changes nothing, whatever its scale.
    torch.testing.assert_close(sample(one, guidance_scale=4, unconditional=one), plain, atol=1e-5, rtol=1e-4)


def test_the_negative_caption_has_an_effect(model):
    one = model.generate(CAPTIONS[:1])
    assert torch.equal(one, model.generate(CAPTIONS[:1], negative_caption=""))
    assert not torch.equal(one, model.generate(CAPTIONS[:1], negative_caption="rain"))


@torch.no_grad()
def test_both_samplers_follow_the_same_path(model):
    z_T = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    embedding = model.clap.embed_text(CAPTIONS[:1])
    exact, coarse = (model.sample_latent(embedding, z_T, steps=steps) for steps in (60, 3))
    ddim = model.sample_latent(embedding, z_T, steps=60, sampler="ddim", eta=0.0)
    assert (ddim - exact).norm() < 0.15 * exact.norm() and (ddim - exact).norm() < (coarse - exact).norm()


@torch.no_grad()
def test_the_latent_scale_is_undone(model):
    waveform = small.clips(2)[0]["waveform"][None]
    latent = model.encode(waveform)
    torch.testing.assert_close(latent / 0.7, model.vae.encode(model.mel(waveform)).mean)
    torch.testing.assert_close(model.decode(latent), model.vae.decode(latent / 0.7))
    assert model.decode(latent).shape == (1, 1, 32, 16)
    drawn = model.encode(waveform, torch.Generator().manual_seed(0))
    assert drawn.shape == latent.shape and not torch.equal(drawn, latent)


@torch.no_grad()
@pytest.mark.parametrize("parameterization", ["eps", "v", "x0", "gaussian", "caption-gaussian"])
def test_denoise_returns_noise_for_every_parameterization(monkeypatch, parameterization):
    """A U-Net that predicts its target perfectly makes `denoise` return the noise."""
    small.use_small_clap(monkeypatch)
    model = RefinedAudioLDM(small.config(parameterization=parameterization))
    generator = torch.Generator().manual_seed(0)
    z_0, eps = torch.randn(4, 2, 8, 4, generator=generator), torch.randn(4, 2, 8, 4, generator=generator)
    t = torch.tensor([20, 300, 700, 999])
    alpha_bar = model.schedule.at(t)
    z_t = alpha_bar.sqrt() * z_0 + (1 - alpha_bar).sqrt() * eps

    def perfect(z, t, c):
        if model.gaussian is not None:
            left = eps - model.gaussian.noise(z, alpha_bar, c)
            return left / model.gaussian.residual(alpha_bar).sqrt()[:, None, None, None]
        return {"eps": eps, "x0": z_0, "v": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z_0}[parameterization]

    c = torch.randn(4, 12, generator=generator)
    torch.testing.assert_close(model.denoise(z_t, t, c, perfect), eps, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("parameterization", ["v", "gaussian", "caption-gaussian"])
def test_a_saved_model_sounds_the_same(monkeypatch, tmp_path, parameterization):
    model = small.awake_model(monkeypatch, parameterization=parameterization)
    model.scale.fill_(1.9)
    if model.gaussian is not None:
        condition = (torch.randn(40, 3, 12),) if parameterization == "caption-gaussian" else ()
        model.gaussian.fit(torch.randn(40, 2, 8, 4, generator=torch.Generator().manual_seed(0)), *condition)
    model.save(tmp_path)
    loaded = RefinedAudioLDM.load(tmp_path)
    assert loaded.config == model.config and not loaded.training
    state = loaded.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(loaded.generate(CAPTIONS), model.generate(CAPTIONS))
    assert RefinedAudioLDM.load(tmp_path, steps=1).config.steps == 1


def test_files_that_do_not_fit_are_refused(model, monkeypatch, tmp_path):
    small.use_small_clap(monkeypatch)
    with pytest.raises(FileNotFoundError, match="no config.yaml in"):
        RefinedAudioLDM.load(tmp_path)
    model.save(tmp_path)
    with pytest.raises(ValueError, match="no setting stepz"):
        RefinedAudioLDM.load(tmp_path, stepz=1)
    with pytest.raises(
        ValueError, match="ldm.safetensors does not fit .*'gaussian': it holds scale, unet where gaussian"
    ):
        RefinedAudioLDM.load(tmp_path, parameterization="gaussian")
    (tmp_path / "vae.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="vae.safetensors is not a whole"):
        RefinedAudioLDM.load(tmp_path)
    (tmp_path / "vae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights at .*vae.safetensors"):
        RefinedAudioLDM.load(tmp_path)


@pytest.mark.parametrize("arguments, message", [
    ({"captions": "a dog"}, r"list of strings, got one string: write \['a dog'\]"),
    ({"captions": []}, "captions is empty"),
    ({"sampler": "euler"}, "sampler must be dpmpp, ddim or student, got 'euler'"),
    ({"seconds": 0}, "seconds must be between 0.01 and 120, got 0"),
    ({"seconds": -1}, "seconds must be between"),
    ({"seconds": 1e-6}, "seconds must be between"),
    ({"seconds": float("nan")}, "seconds must be between"),
    ({"seconds": 121}, "seconds must be between"),
    ({"seconds": "2.5"}, "seconds must be between 0.01 and 120, got '2.5'"),
    ({"seconds": True}, "seconds must be between 0.01 and 120, got True"),
    ({"guidance_scale": "3"}, "guidance_scale must be a finite number, got '3'"),
    ({"sampler": "ddim", "eta": "x"}, "eta must be between 0 and 1, got 'x'"),
    ({"steps": 0}, "sampling steps must be a whole number between 1 and 1000, got 0"),
    ({"steps": 1001}, "sampling steps must be a whole number between 1 and 1000, got 1001"),
    ({"guidance_scale": float("inf")}, "guidance_scale must be a finite number, got inf"),
    ({"candidates": 0}, "candidates must be a whole number, 1 or more, got 0"),
    ({"candidates": 1.5}, "candidates must be a whole number, 1 or more, got 1.5"),
    ({"steps": 2.5}, "sampling steps must be a whole number between 1 and 1000, got 2.5"),
    ({"steps": True}, "sampling steps must be a whole number between 1 and 1000, got True"),
    ({"steps": "3"}, "sampling steps must be a whole number between 1 and 1000, got '3'"),
    ({"seed": -1}, "seed must be a whole number between 0 and 9223372036854775807, got -1"),
    ({"seed": 2**63}, "seed must be a whole number between 0 and"),
    ({"seed": 0.5}, "seed must be a whole number between 0 and"),
    ({"seed": float("nan")}, "seed must be a whole number between 0 and"),
    ({"seed": None}, "seed must be a whole number between 0 and"),
    ({"sampler": "ddim", "eta": -1.0}, "eta must be between 0 and 1, got -1.0"),
    ({"sampler": "ddim", "eta": float("nan")}, "eta must be between 0 and 1, got nan"),
    ({"guidance_interval": (0, 10.5)}, "guidance_interval must be a whole number, 0 or more, got 10.5"),
    ({"guidance_interval": (900, 100)}, r"guidance_interval must be two timesteps, the lower first, got \(900, 100\)"),
    ({"guidance_interval": 5}, "guidance_interval must be two timesteps, the lower first, got 5"),
    ({"guidance_interval": (0,)}, r"guidance_interval must be two timesteps, the lower first, got \(0,\)"),
    ({"captions": [3]}, "a caption must be a string, got 3"),
    ({"captions": ["rain \ud83d"]}, r"the caption 'rain \\ud83d' is no text"),
])  # fmt: skip
def test_bad_requests_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"captions": CAPTIONS} | arguments)


@pytest.mark.parametrize("of", [float, np.int64, np.float32, torch.tensor])
def test_a_whole_float_is_the_same_sound_as_its_integer(model, of):
    given = {"steps": 2, "seed": 3, "candidates": 2}
    same = {name: of(number) for name, number in given.items()}
    assert torch.equal(model.generate(CAPTIONS, **given), model.generate(CAPTIONS, **same))
    for sampler in ("ddim", "dpmpp"):
        given = {"steps": 2, "sampler": sampler, "guidance_interval": (0, 500)}
        same = {"steps": of(2), "sampler": sampler, "guidance_interval": (of(0), of(500))}
        assert torch.equal(model.generate(CAPTIONS, **given), model.generate(CAPTIONS, **same))


def test_the_largest_seed_is_one(model):
    assert model.generate(["rain"], steps=1, seed=2**63 - 1).isfinite().all()


@pytest.mark.parametrize("caption", ["a dog\nbarks", "a dog\tbarks", "a dog\r\nbarks", " a dog barks \n",
                                     "a dog\u2028barks", "a dog\x00barks", "\ta dog barks"])  # fmt: skip
def test_a_caption_is_one_line_as_in_a_list(model, caption):
    plain = model.generate(["a dog barks", "rain"], steps=2, negative_caption="a dog barks")
    assert torch.equal(model.generate([caption, "rain"], steps=2, negative_caption=caption), plain)


def test_parts_that_do_not_meet_are_refused(monkeypatch):
    small.use_small_clap(monkeypatch)
    narrow = small.config().unet.__class__(**small.config().unet.__dict__ | {"embedding_dim": 13})
    with pytest.raises(ValueError, match="tiny-gpt2 embeds in 12 numbers, the U-Net expects 13"):
        RefinedAudioLDM(small.config(unet=narrow))
    with pytest.raises(ValueError, match="no-such-clap"):
        RefinedAudioLDM(small.config(clap="no-such-clap"))


def test_fresh_weights_come_from_the_seed(monkeypatch):
    small.use_small_clap(monkeypatch)
    before = torch.get_rng_state()
    states = [RefinedAudioLDM(small.config(), seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    name = "unet.conv_in.weight"
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage, part", [("latent", "unet"), ("mel", "vae.decoder"), ("waveform", "vocoder")])
def test_a_stage_that_gives_no_numbers_is_named(model, stage, part, precision):
    """The stage overflows for the second caption alone; in half precision too."""
    hook = model.get_submodule(part).register_forward_hook(
        lambda module, inputs, out: out * torch.tensor([1.0, math.inf, 1.0, 1.0, math.inf, 1.0])[: len(out)].view(
            -1, *[1] * (out.ndim - 1)).to(out))  # fmt: skip
    try:
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            with pytest.raises(FloatingPointError, match=f"the {stage} of 'rain falls' holds NaN or infinite numbers"):
                model.generate(CAPTIONS)
    finally:
        hook.remove()


@pytest.mark.parametrize("stage, part, made", [("latent", "denoise", "zeros"), ("mel", "vae.decoder", "floor"),
                                               ("waveform", "vocoder", "zeros")])  # fmt: skip
def test_silence_is_never_without_a_word(model, monkeypatch, stage, part, made):
    if stage == "latent":
        monkeypatch.setattr(model, "sample_latent", lambda embedding, z_T, **_: 0 * z_T)
        hook = None
    else:
        silence = math.log(1e-5) if made == "floor" else 0.0
        hook = model.get_submodule(part).register_forward_hook(lambda module, inputs, out: 0 * out + silence)
    try:
        with pytest.warns(UserWarning, match=f"the {stage} of 'a dog barks', 'rain falls' is silent"):
            waveform = model.generate(CAPTIONS[:2])
    finally:
        if hook:
            hook.remove()
    assert stage != "waveform" or not waveform.any()  # it is returned as it is


def test_progress_is_reported(model):
    progress = []
    model.generate(CAPTIONS[:1], steps=4, on_step=lambda k, n: progress.append((k, n)))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("shipped", [True, False])
def test_tiny_preset_generates(monkeypatch, tmp_path, shipped):
    if not shipped:  # a preset without weights starts from fresh ones
        monkeypatch.setattr("refined_ldm.model_folder.WEIGHTS", tmp_path)
    model = RefinedAudioLDM.from_preset("tiny")
    assert not model.training
    waveform = model.generate(["a dog barks"], seconds=2.56, steps=1, guidance_scale=1)
    assert waveform.shape == (1, 40_960) and waveform.isfinite().all() and waveform.abs().max() <= 1


def test_a_model_is_saved_over_no_folder_and_none_of_it_before(tmp_path, monkeypatch):
    model = small.awake_model(monkeypatch)
    (tmp_path / "m" / "config.yaml").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="config.yaml is a folder, so it is not replaced"):
        model.save(tmp_path / "m")
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["config.yaml"]


def test_a_vocabulary_is_copied_whole_or_not_at_all(tmp_path, monkeypatch):
    model = small.awake_model(monkeypatch)
    for name, text in (("given", "whole"), ("m/tokenizer", "earlier")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "vocab.json").write_text(text)

    def cut(given, path):
        path.write_text("wh")
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(model.clap), "vocabulary", tmp_path / "given")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", cut)
        with pytest.raises(OSError, match="the disk is gone"):
            model.save(tmp_path / "m")
    assert (tmp_path / "m/tokenizer/vocab.json").read_text() == "earlier"
    model.save(tmp_path / "m")
    assert (tmp_path / "m/tokenizer/vocab.json").read_text() == "whole"


def test_a_silent_sound_is_drawn_again_with_guidance_where_it_does_no_harm(model, monkeypatch):
    sample, intervals, notes = model.sample_latent, [], []

    def silent_at_first(embedding, z_T, **others):
        intervals.append((len(embedding), others["guidance_interval"]))
        latent = sample(embedding, z_T, **others)
        return latent if len(intervals) > 1 else torch.cat([0 * latent[:1], latent[1:]])

    monkeypatch.setattr(model, "sample_latent", silent_at_first)
    waveforms = model.generate(CAPTIONS[:2], on_note=notes.append)
    assert intervals == [(2, (0, 1000)), (1, (0, 600))]
    assert (waveforms.abs().amax(1) > 0).all() and len(notes) == 1 and "drawn again (1 of 3 times)" in notes[0]
