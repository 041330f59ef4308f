from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from refined_ldm.adapters.student import STEPS, STUDENT_FILE, read_student
from refined_ldm.audio import save_audio
from refined_ldm.config import DistillConfig, load_config, preset
from refined_ldm.data.caches import Cached
from refined_ldm.diffusion import CLEAN, NoiseSchedule, dpmpp_sample, jump_sample
from refined_ldm.linear_denoiser import GaussianDenoiser
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training import distillation
from refined_ldm.training.distillation import JUMPS, draw_jumps, jump_losses, train_student, trajectories, trajectory
from tests.support import small

SHORT = DistillConfig(max_steps=4, batch_size=8, warmup_steps=0, lr=1e-2, save_every=2, rank=2, trajectories=6)
SCHEDULE = NoiseSchedule.ldm()
CAPTIONS = [["rain", "rain falls"], ["a bell rings"]]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """-> a function that returns the same trained model each time, for a folder of recordings."""
    (tmp_path / "bells").mkdir()
    for i, item in enumerate(small.clips(4)):
        save_audio(tmp_path / "bells" / f"bell_{i}.wav", item["waveform"])
    small.awake_model(monkeypatch).save(tmp_path / "model")
    return lambda: RefinedAudioLDM.load(tmp_path / "model", data=str(tmp_path / "bells"))


# --- trajectories and targets ---


def test_a_trajectory_is_what_the_teacher_samples(monkeypatch):
    model = small.awake_model(monkeypatch)
    c = model.clap.embed_text(["rain", "a bell"]).detach()
    z_T = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(1))
    kept = trajectory(model.guided(), z_T, c, SCHEDULE, 12)
    assert kept.shape == (2, 5, 2, 8, 4) and torch.equal(kept[:, 0], z_T)
    torch.testing.assert_close(kept[:, -1], model.sample_latent(c, z_T, 12))
    seen = {}
    after = lambda z, t: seen.setdefault(t, z)  # noqa: E731
    dpmpp_sample(model.guided(), z_T, c, SCHEDULE, 12, after_step=after)
    for place, timestep in ((1, 749), (2, 499), (3, 249)):
        assert torch.equal(kept[:, place], seen[timestep])


def test_stored_trajectories_depend_on_seed_and_number_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(distillation, "IN_A_PART", 4)
    model = small.awake_model(monkeypatch)
    done = []
    trajectories(model, CAPTIONS, tmp_path / "one", SHORT, 5, lambda *step: done.append(step))
    for rank in (1, 0):  # two processes
        trajectories(model, CAPTIONS, tmp_path / "two", SHORT, 5, rank=rank, world_size=2)
    for part, count in ((0, 4), (1, 2)):
        one, two = (Cached(tmp_path / folder / f"part-{part}") for folder in ("one", "two"))
        assert len(one) == count and one.rest == two.rest
        assert all(torch.equal(one[k]["latents"], two[k]["latents"]) for k in range(count))
    assert done[-1] == (6, 6) and [item["caption"] for item in one.rest][1] == "a bell rings"  # trajectory 5, clip 1
    item = one[1]
    c, z_T = item["embedding"][None], item["latents"][None, 0]
    again = trajectory(model.guided(), z_T, c, SCHEDULE, 12)[0]
    torch.testing.assert_close(item["latents"], again, atol=0.02, rtol=0.02)  # half precision
    trajectories(model, CAPTIONS, tmp_path / "one", SHORT, 6)
    assert not torch.equal(Cached(tmp_path / "one" / "part-0")[0]["latents"], two[0]["latents"])


def test_every_batch_of_8_has_every_jump_and_half_are_of_4_steps():
    drawn = [tuple(row) for row in draw_jumps(16, torch.Generator().manual_seed(2)).tolist()]
    assert sorted(drawn) == sorted(2 * JUMPS) and drawn != 2 * JUMPS
    lengths = {steps: [(k * 4 // steps, (k + 1) * 4 // steps) for k in range(steps)] for steps in STEPS}
    assert set(JUMPS) == {jump for jumps in lengths.values() for jump in jumps}


def test_the_loss_is_zero_for_a_student_that_ends_where_its_teacher_does():
    """By hand: the target of a jump is the eps that leads there in one step; any other eps costs its squared error."""
    latents = torch.randn(8, 5, 2, 8, 4, generator=torch.Generator().manual_seed(3))
    places = {999: 0, 749: 1, 499: 2, 249: 3, CLEAN: 4}
    off = 0.0

    def student(z_t, t, c, s):
        rows = range(len(t))
        now = torch.stack([latents[k, places[int(t[k])]] for k in rows])
        end = torch.stack([latents[k, places[int(s[k])]] for k in rows])
        assert torch.equal(now, z_t)
        a_t, a_s = (torch.where(n == CLEAN, 1.0, SCHEDULE.alpha_bar[n]).view(-1, 1, 1, 1) for n in (t, s))
        z_0_of = lambda eps: (z_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()  # noqa: E731
        eps = (end - (a_s / a_t).sqrt() * z_t) / ((1 - a_s).sqrt() - ((1 - a_t) * a_s / a_t).sqrt())
        torch.testing.assert_close(a_s.sqrt() * z_0_of(eps) + (1 - a_s).sqrt() * eps, end, atol=1e-3, rtol=1e-3)
        return eps + off

    model = SimpleNamespace(
        schedule=SCHEDULE,
        device="cpu",
        denoise=lambda z, t, c, student, s: student(z, t, c, s),
        loss_weight=lambda t: torch.full((len(t),), 2.0),
    )
    batch = {"latents": latents, "embedding": torch.zeros(8, 1)}
    loss = jump_losses(model)
    assert loss(student, batch, torch.Generator().manual_seed(1), 1)["loss"] < 1e-8
    off = 0.5
    torch.testing.assert_close(loss(student, batch, torch.Generator().manual_seed(1), 1)["loss"], torch.tensor(0.5))


def test_the_student_of_a_known_gaussian_learns_its_known_jumps():
    """Data N(m, V): the teacher follows the exact score, and a jump must keep the place in the distribution."""
    m, V = 0.7, 0.3
    gaussian = GaussianDenoiser(1, 4)
    gaussian.mean.fill_(m), gaussian.variance.fill_(V)
    teacher = lambda z_t, t, c: gaussian.noise(z_t, SCHEDULE.at(t))  # noqa: E731
    z_T = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    kept = trajectory(teacher, z_T, None, SCHEDULE, 500)

    class Gains(nn.Module):
        """eps = gain z_t + shift, with a gain and a shift for each pair of timesteps."""

        def __init__(self):
            super().__init__()
            self.gain, self.shift = (nn.Parameter(torch.zeros(1000, 1001)) for _ in range(2))

        def forward(self, z_t, t, c, s):
            return self.gain[t, s][:, None, None, None] * z_t + self.shift[t, s][:, None, None, None]

    student = Gains()
    model = SimpleNamespace(
        schedule=SCHEDULE,
        device="cpu",
        denoise=lambda z, t, c, student, s: student(z, t, c, s),
        loss_weight=lambda t: torch.ones(len(t)),
    )
    loss, generator = jump_losses(model), torch.Generator().manual_seed(2)
    optimizer = torch.optim.SGD(student.parameters(), 1.0)
    for index in range(150):
        optimizer.zero_grad()
        loss(student, {"latents": kept, "embedding": torch.zeros(64, 1)}, generator, index)["loss"].backward()
        optimizer.step()
    a, fresh = SCHEDULE.alpha_bar[999], torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    known = m + (V / (a * V + 1 - a)).sqrt() * (fresh - a.sqrt() * m)
    with torch.no_grad():
        for steps in STEPS:
            found = jump_sample(lambda z_t, t, s, c: student(z_t, t, c, s), fresh, None, SCHEDULE, steps)
            torch.testing.assert_close(found, known, atol=0.03, rtol=0)


# --- training ---


def test_a_student_is_trained_and_the_model_samples_with_it(base, tmp_path):
    pytest.importorskip("peft")
    model, run = base(), tmp_path / "run"
    weights = {name: w.clone() for name, w in model.unet.state_dict().items()}
    settings = replace(SHORT, max_steps=40, lr=5e-3)
    steps = list(train_student(model, run, settings))
    first, last = (sum(s.loss for s in some) for some in (steps[:5], steps[-5:]))
    assert len(steps) == 40 and last < 0.9 * first
    metadata = read_student(run / STUDENT_FILE)[1]
    assert metadata["guidance_scale"] == model.config.guidance_scale and metadata["trajectories"] == 6
    assert all(torch.equal(w, weights[name]) for name, w in model.unet.state_dict().items())
    fresh = base()
    fresh.load_student(run / STUDENT_FILE)
    assert torch.equal(fresh.generate(["bell"], sampler="student"), model.generate(["bell"], sampler="student"))
    with pytest.raises(FileExistsError, match="is there already"):
        next(train_student(base(), run, settings))


def test_a_resumed_run_equals_an_uninterrupted_one(base, tmp_path):
    pytest.importorskip("peft")
    list(train_student(base(), tmp_path / "whole", SHORT))
    run = tmp_path / "stopped"
    steps = train_student(base(), run, SHORT)
    assert [next(steps).index for _ in range(3)] == [1, 2, 3]
    steps.close()
    assert [step.index for step in train_student(base(), run, SHORT, resume=True)] == [3, 4]
    (tensors, about), (expected, of) = (read_student(folder / STUDENT_FILE) for folder in (run, tmp_path / "whole"))
    assert about == of and tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_too_many_steps_of_the_teacher_are_refused_before_any_clip_is_made(base, tmp_path):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match="sampling steps must be a whole number between 1 and 1000, got 1004"):
        next(train_student(base(), tmp_path / "run", replace(SHORT, teacher_steps=1004)))
    assert not (tmp_path / "run" / "clips-train").exists()


def test_settings_come_from_the_configuration(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("preset: tiny\ntraining:\n  distill: {max_steps: 7, rank: 3, teacher_steps: 20}\n")
    settings = distillation.distill_config(load_config(file))
    assert (settings.max_steps, settings.rank, settings.teacher_steps) == (7, 3, 20)
    assert distillation.distill_config(small.config()) == DistillConfig()
    assert distillation.distill_config(preset("paper")).trajectories > 0
    for wrong, message in (
        ("teacher_steps: 10", "multiple of 4"),
        ("rank: 0", "rank"),
        ("trajectories: 0", "positive"),
    ):
        file.write_text(f"training: {{distill: {{{wrong}}}}}\n")
        with pytest.raises(ValueError, match=message):
            load_config(file)
