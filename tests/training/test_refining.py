"""The refiner: its noise levels, its files, its training, and what `generate` does with one."""

from dataclasses import replace

import pytest
import torch

from refined_ldm.adapters.candidates import QUIET
from refined_ldm.adapters.matcher import Matcher
from refined_ldm.adapters.refiner import REFINER_FILE, Refiner, RefinerConfig, refiner_config
from refined_ldm.adapters.student import student_unet
from refined_ldm.config import preset
from refined_ldm.diffusion import NoiseSchedule, add_noise, clean_latent, dpmpp_sample, noise_like
from refined_ldm.inference import optimize_for_inference
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.refining import REFINING, low_timesteps, train_refiner
from tests.support import small

SCHEDULE = NoiseSchedule.ldm()


def with_refiner(model, awake=True):
    model.refiner = Refiner(refiner_config(model.config.unet)).eval()
    if awake:
        small.awake(model.refiner)
    return model


def test_it_learns_every_timestep_below_its_limit_equally_often():
    t = low_timesteps(300, 600, SCHEDULE, torch.Generator().manual_seed(0))
    assert (t.bincount() - 2).abs().max() <= 1 and t.max() == 299


def test_given_timesteps_take_the_place_of_even_ones():
    asked, z = [], torch.randn(2, 2, 8, 4)

    def denoise(z_t, t, c):
        asked.append(t[0].item())
        return torch.zeros_like(z_t)

    dpmpp_sample(denoise, z, None, SCHEDULE, timesteps=[249, 100, 10])
    assert asked == [249, 100, 10]


def test_a_perfect_denoiser_returns_the_clean_latent(monkeypatch):
    model = with_refiner(small.awake_model(monkeypatch))
    latent, c = torch.randn(3, *model.latent_shape(model.config.seconds)), model.clap.embed_text(["a", "b", "c"])

    asked = []

    def knows(z_t, t, c, unet):
        assert unet is model.refiner
        asked.append(t[0].item())
        alpha_bar = SCHEDULE.at(t)
        return (z_t - alpha_bar.sqrt() * latent) / (1 - alpha_bar).sqrt()

    monkeypatch.setattr(model, "denoise", knows)
    found = model.refine(latent, c, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, latent, atol=1e-4, rtol=1e-4)
    assert asked == model.refiner.config.timesteps and asked[0] == 290 and len(asked) == 6


def test_it_adds_as_much_noise_as_its_settings_say(monkeypatch):
    model = with_refiner(small.awake_model(monkeypatch))
    model.refiner.config = replace(model.refiner.config, noise=1.5)
    latent, c = torch.zeros(1, *model.latent_shape(model.config.seconds)), model.clap.embed_text(["a"])
    seen = []
    monkeypatch.setattr(model, "denoise", lambda z_t, t, c, unet: seen.append(z_t) or torch.zeros_like(z_t))
    model.refine(latent, c, torch.Generator().manual_seed(0))
    eps = noise_like(latent, torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[0], 1.5 * (1 - SCHEDULE.alpha_bar[290]).sqrt() * eps)


def test_generate_refines_the_kept_sound_alone_and_it_does_not_depend_on_the_others(monkeypatch):
    model = with_refiner(small.loud_model(monkeypatch))
    refined, refine = [], model.refine
    monkeypatch.setattr(model, "refine", lambda latent, *given: refined.append(len(latent)) or refine(latent, *given))
    both = model.generate(["rain", "a bell"], candidates=1, seed=3)
    one = model.generate(["a bell"], candidates=1, seed=3)
    assert refined == [2, 1]
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(model, "refine", lambda latent, *given: latent)
    assert not torch.allclose(model.generate(["a bell"], candidates=1, seed=3), one, atol=1e-3)


@pytest.fixture
def drafting(monkeypatch):
    """A model with student and refiner, and a matcher that notes the latents it is given and prefers the third."""
    model = with_refiner(small.loud_model(monkeypatch, candidates=5, sampler="student"))
    model.student = student_unet(model.unet).eval()
    monkeypatch.setattr(model, "matcher", Prefers(2))
    return model


class Prefers:
    """A matcher that prefers the latent in one place, then those before it."""

    def __init__(self, best):
        self.best, self.given = best, []

    def rank(self, latent, embedding, candidates):
        self.size = candidates
        return Matcher.rank(self, latent, embedding, candidates)

    def fits(self, shape, embedding_dim):
        return True

    def __call__(self, latent, row, embedding):
        self.given.append(latent)
        place = row % self.size
        return -(place - self.best).abs().float() - 0.1 * (place > self.best)


def test_a_perfect_teacher_gives_a_restarted_latent_back(drafting, monkeypatch):
    latent, c = torch.randn(2, *drafting.latent_shape(drafting.config.seconds)), drafting.clap.embed_text(["a", "b"])
    asked = []

    def guided(unconditional):
        def knows(z_t, t, c):
            asked.append(t[0].item())
            alpha_bar = SCHEDULE.at(t)
            return (z_t - alpha_bar.sqrt() * latent) / (1 - alpha_bar).sqrt()

        return knows

    monkeypatch.setattr(drafting, "guided", guided)
    found = drafting.restart(latent, c, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, latent, atol=1e-4, rtol=1e-4)
    assert asked == [499, 394, 290]


def test_the_best_of_a_students_sounds_restart_and_are_compared_again(drafting, monkeypatch):
    matcher, restarted, refined = drafting.matcher, [], []
    restart, refine = drafting.restart, drafting.refine
    monkeypatch.setattr(drafting, "restart", lambda *given: restarted.append(given[0]) or restart(*given))
    monkeypatch.setattr(drafting, "refine", lambda *given: refined.append(given[0]) or refine(*given))
    jumps = []
    both = drafting.generate(["rain", "a bell"], seed=3, on_step=lambda *done: jumps.append(done))
    assert jumps == [(1, 3), (2, 3), (3, 3)]  # the fourth would start below the restart
    drawn, mended = matcher.given
    torch.testing.assert_close(restarted[0], drawn[[2, 1, 3, 7, 6, 8]])  # in the order of their fit
    torch.testing.assert_close(refined[0], mended[[2, 5]])
    one = drafting.generate(["a bell"], seed=3)
    torch.testing.assert_close(both[1:], one, atol=1e-4, rtol=1e-3)


def test_where_all_that_restarted_are_faint_the_drafts_follow(drafting, monkeypatch):
    refined, refine, to_waveform = [], drafting.refine, drafting.to_waveform
    monkeypatch.setattr(drafting, "refine", lambda *given: refined.append(given[0]) or refine(*given))
    monkeypatch.setattr(drafting, "to_waveform", lambda mel: to_waveform(mel) * (1e-3 if len(refined) < 4 else 1.0))
    assert (drafting.generate(["rain"], seed=3).abs().amax() > QUIET).all()
    drawn, mended = drafting.matcher.given
    torch.testing.assert_close(torch.cat(refined), torch.cat([mended[[2, 1, 0]], drawn[[2]]]))


@pytest.mark.parametrize("how", [{"candidates": 1}, {"steps": 2}, {"sampler": "dpmpp", "candidates": 3}])
def test_what_is_no_draft_of_the_student_does_not_restart(drafting, monkeypatch, how):
    drafting.matcher.best = 0
    monkeypatch.setattr(drafting, "restart", lambda *given: pytest.fail("restarted"))
    assert drafting.generate(["rain"], **how).isfinite().all()


def test_without_restarts_the_student_goes_all_the_way(drafting):
    refiner = drafting.refiner
    refiner.config = replace(refiner.config, restarts=0)
    jumps = []
    drafting.generate(["rain"], on_step=lambda *done: jumps.append(done))
    assert len(jumps) == 4 and len(drafting.matcher.given) == 1


def test_beside_loras_and_without_a_refiner_latents_stay_as_they_are(monkeypatch):
    pytest.importorskip("peft")
    from refined_ldm.adapters.lora import with_loras

    model = small.awake_model(monkeypatch)
    latent, c = torch.randn(1, *model.latent_shape(model.config.seconds)), model.clap.embed_text(["a"])
    assert model.refine(latent, c, None) is latent
    with_refiner(model)
    with_loras(model).add(2)
    assert model.refine(latent, c, None) is latent
    model.merge_loras()
    assert model.refiner is None  # it belongs to the weights before


def test_a_model_is_saved_and_loaded_with_its_refiner(monkeypatch, tmp_path):
    model = with_refiner(small.awake_model(monkeypatch))
    model.save(tmp_path / "model")
    again = RefinedAudioLDM.load(tmp_path / "model")
    assert again.refiner.config == model.refiner.config and again.digest() == model.digest()
    pairs = zip(again.refiner.parameters(), model.refiner.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    again.load_part("clap", tmp_path / "model")
    assert again.refiner is None  # another conditioner
    with pytest.raises(ValueError, match="is no refiner of"):
        Refiner.load(tmp_path / "model" / "vae.safetensors")
    with pytest.raises(FileNotFoundError):
        Refiner.load(tmp_path / "none.safetensors")


def test_it_is_made_faster_with_the_model(monkeypatch):
    model = with_refiner(small.awake_model(monkeypatch))
    optimize_for_inference(model, "bf16")
    assert any(p.dtype == torch.bfloat16 for p in model.refiner.parameters())
    assert model.generate(["rain"]).isfinite().all()


def test_sizes_follow_from_the_unet_and_impossible_ones_are_refused():
    tiny = refiner_config(preset("tiny").unet)
    assert tiny.unet.patch_size == 1 and tiny.unet.model_channels == 48 and not tiny.unet.caption_map
    assert refiner_config(preset("paper").unet).unet.downsampling <= preset("paper").unet.downsampling
    for sizes in ({"first": 500}, {"steps": 0}, {"first": 4, "steps": 5}):
        with pytest.raises(ValueError, match="a refiner needs 1 <= steps <= first < learned"):
            RefinerConfig(**sizes)
    with pytest.raises(ValueError, match="noise of a refiner must be between 0.5 and 2, got 3.0"):
        RefinerConfig(noise=3)
    for sizes in ({"restarts": -1}, {"restart": 290}):
        with pytest.raises(ValueError, match="a refiner needs restarts >= 0 and restart > first"):
            RefinerConfig(**sizes)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """-> a function that returns the same trained model of scenes each time; the shortest scenes last a second."""
    small.awake_model(monkeypatch, seconds=1.28).save(tmp_path / "model")
    return lambda: RefinedAudioLDM.load(tmp_path / "model", data="scenes", clips=12)


def test_training_resumes_and_gives_the_model_its_refiner(base, tmp_path):
    settings = replace(REFINING, max_steps=3, batch_size=4, save_every=1)
    model = base()
    before = model.digest()
    steps = list(train_refiner(model, tmp_path / "whole", settings))
    assert len(steps) == 3 and not model.refiner.training and model.digest() == before
    stopped = train_refiner(base(), tmp_path / "stopped", settings)
    next(stopped), next(stopped)
    stopped.close()
    list(train_refiner(base(), tmp_path / "stopped", settings, resume=True))
    one, other = (Refiner.load(tmp_path / name / REFINER_FILE).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(FileExistsError, match="is there already"):
        next(train_refiner(base(), tmp_path / "whole", settings))


def test_it_learns_to_denoise(base, tmp_path):
    model = base()
    settings = replace(REFINING, max_steps=60, batch_size=8)
    losses = [step.loss for step in train_refiner(model, tmp_path / "run", settings)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    z_0, t = torch.randn(2, *model.latent_shape(1.28)), torch.full((2,), 100)
    z_t = add_noise(z_0, torch.randn_like(z_0), t, SCHEDULE)
    eps = model.denoise(z_t, t, model.clap.embed_text(["a", "b"]), model.refiner)
    assert clean_latent(z_t, eps, t, SCHEDULE).shape == z_0.shape
