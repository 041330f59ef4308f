"""Jumps between timesteps, the sampler that takes them, and the files of students."""

import pytest
import torch

from refined_ldm.adapters.lora import LoraConfig, save_lora
from refined_ldm.adapters.student import STEPS, STUDENT_FILE, Student, read_student, save_student
from refined_ldm.diffusion import CLEAN, NoiseSchedule, add_noise, ddim_step, jump, jump_noise, jump_sample
from refined_ldm.inference import optimize_for_inference
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.unet import UNet, UNetConfig
from tests.support import small

SCHEDULE = NoiseSchedule.ldm()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- the equation of a jump ---


def test_a_jump_to_where_it_begins_changes_no_bit():
    t = torch.tensor([0, 1, 500, 999])
    z_t = noise(4, 2, 8, 4)
    assert torch.equal(jump(z_t, 100 * noise(4, 2, 8, 4, seed=1), t, t, SCHEDULE), z_t)


def test_a_jump_with_the_true_noise_ends_at_the_noisy_latent_of_another_timestep_and_at_the_clean_one():
    z_0, eps = noise(3, 2, 8, 4), noise(3, 2, 8, 4, seed=1)
    t, s = torch.tensor([999, 749, 249]), torch.tensor([749, 10, CLEAN])
    expected = add_noise(z_0, eps, s.clamp(min=0), SCHEDULE)
    expected[2] = z_0[2]
    torch.testing.assert_close(jump(add_noise(z_0, eps, t, SCHEDULE), eps, t, s, SCHEDULE), expected, atol=1e-4, rtol=0)


def test_a_jump_is_a_step_of_ddim_without_noise():
    z_t, eps, t, s = noise(2, 2, 8, 4), noise(2, 2, 8, 4, seed=1), torch.full((2,), 700), torch.full((2,), 300)
    torch.testing.assert_close(jump(z_t, eps, t, s, SCHEDULE), ddim_step(z_t, eps, 700, 300, SCHEDULE, eta=0)[0])


def test_jump_noise_is_the_eps_that_ends_at_a_given_latent():
    z_t, z_s, t, s = noise(2, 2, 8, 4), noise(2, 2, 8, 4, seed=1), torch.tensor([999, 249]), torch.tensor([499, CLEAN])
    eps = jump_noise(z_t, z_s, t, s, SCHEDULE)
    torch.testing.assert_close(jump(z_t, eps, t, s, SCHEDULE), z_s, atol=1e-4, rtol=1e-4)


def test_the_sampler_takes_equal_jumps_and_the_last_ends_at_the_clean_latent():
    asked = []

    def jumper(z_t, t, s, c):
        asked.append((t[0].item(), s[0].item()))
        return jump_noise(z_t, c, t, s, SCHEDULE)

    wanted = noise(2, 2, 8, 4, seed=2)
    progress = []
    found = jump_sample(jumper, noise(2, 2, 8, 4), wanted, SCHEDULE, 4, lambda *done: progress.append(done))
    assert asked == [(999, 749), (749, 499), (499, 249), (249, CLEAN)] and progress[-1] == (4, 4)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_any_number_of_exact_jumps_gives_the_same_latents():
    """Of data N(m, V) the sampling equation is solved on paper: z_t - a m grows as its standard deviation."""
    m, V = 0.7, 0.3

    def jumper(z_t, t, s, c):
        now, end = SCHEDULE.at(t), SCHEDULE.ends(s)
        growth = ((end * V + 1 - end) / (now * V + 1 - now)).sqrt()
        return jump_noise(z_t, end.sqrt() * m + growth * (z_t - now.sqrt() * m), t, s, SCHEDULE)

    z_T = noise(2, 2, 8, 4)
    one, four = (jump_sample(jumper, z_T, None, SCHEDULE, steps) for steps in (1, 4))
    torch.testing.assert_close(one, four, atol=1e-4, rtol=1e-4)
    a = SCHEDULE.alpha_bar[999]
    torch.testing.assert_close(one, m + (V / (a * V + 1 - a)).sqrt() * (z_T - a.sqrt() * m), atol=1e-4, rtol=1e-4)


# --- a student ---


@pytest.fixture
def model(monkeypatch):
    return small.awake_model(monkeypatch)


def write(path, model, seed=1, rank=2):
    """A student of the model with random matrices; the model stays as it was."""
    pytest.importorskip("peft")
    torch.manual_seed(seed)
    student = Student(model.unet, rank)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(std=0.1)
    save_student(path, student.tensors(), LoraConfig(rank), model.digest(), model.config.name)
    return student.eval()


def inputs():
    return noise(3, 2, 8, 4), torch.tensor([999, 700, 3]), noise(3, 12), torch.tensor([499, 200, CLEAN])


def test_a_new_student_is_its_teacher(model):
    pytest.importorskip("peft")
    z_t, t, c, s = inputs()
    with torch.no_grad():
        assert torch.equal(Student(model.unet, 2).eval()(z_t, t, c, s), model.unet(z_t, t, c))


def test_a_stored_student_predicts_what_it_did_in_training_and_the_teacher_stays(model, tmp_path):
    z_t, t, c, s = inputs()
    weights = {name: w.clone() for name, w in model.unet.state_dict().items()}
    student = write(tmp_path / STUDENT_FILE, model)
    model.load_student(tmp_path / STUDENT_FILE)
    with torch.no_grad():
        expected = student(z_t, t, c, s)
        torch.testing.assert_close(model.student(z_t, t, c, s), expected, atol=2e-3, rtol=2e-3)  # half precision
        assert (expected - model.unet(z_t, t, c)).abs().max() > 0.05
        assert (expected - student(z_t, t, c, s - s)).abs().max() > 1e-3  # the end matters
    assert all(torch.equal(w, weights[name]) for name, w in model.unet.state_dict().items())


@pytest.mark.parametrize("steps", [*STEPS, None])
def test_a_model_with_a_student_samples_with_it_in_few_steps(model, tmp_path, steps):
    write(tmp_path / STUDENT_FILE, model)
    model.load_student(tmp_path / STUDENT_FILE)
    done = []
    sound = model.generate(["rain"], steps=steps, sampler="student", on_step=lambda *step: done.append(step))
    assert sound.shape == (1, 5120) and done[-1] == (steps or 4, steps or 4)
    assert not torch.equal(sound, model.generate(["rain"], steps=steps))
    assert model.generate(["rain"], seconds=0.5, sampler="student").shape == (1, 8000)


@pytest.mark.parametrize("given, message", [
    ({"negative_caption": "wind"}, "negative_caption does not go with the student"),
    ({"guidance_scale": 2}, "guidance_scale does not go with the student"),
    ({"guidance_interval": (0, 500)}, "guidance_interval does not go with the student"),
    ({"steps": 3}, r"steps of a student must be one of \(1, 2, 4\), got 3"),
])  # fmt: skip
def test_what_only_the_teacher_does_is_refused(model, tmp_path, given, message):
    write(tmp_path / STUDENT_FILE, model)
    model.load_student(tmp_path / STUDENT_FILE)
    with pytest.raises(ValueError, match=message):
        model.generate(["rain"], sampler="student", **given)


def test_a_student_by_default_leaves_to_its_teacher_what_it_was_not_taught(monkeypatch, tmp_path):
    model = small.awake_model(monkeypatch, sampler="student")
    teacher = model.generate(["rain"])  # there is no student yet
    write(tmp_path / STUDENT_FILE, model)
    model.load_student(tmp_path / STUDENT_FILE)
    student = model.generate(["rain"], sampler="student")
    assert torch.equal(model.generate(["rain"]), student) and not torch.equal(student, teacher)
    assert torch.equal(model.generate(["rain"], steps=2), model.generate(["rain"], sampler="student", steps=2))
    assert torch.equal(model.generate(["rain"], sampler="dpmpp"), teacher)
    for given in ({"steps": 3}, {"guidance_scale": 3.0}, {"negative_caption": "wind"}):
        assert torch.equal(model.generate(["rain"], **given), model.generate(["rain"], sampler="dpmpp", **given))


def test_without_a_student_there_is_none_to_sample_with(model):
    with pytest.raises(ValueError, match="this model has no student: train one"):
        model.generate(["rain"], sampler="student")


def test_a_model_is_stored_with_its_student_in_either_precision(model, tmp_path):
    write(tmp_path / "own.safetensors", model)
    model.load_student(tmp_path / "own.safetensors")
    expected = model.generate(["rain"], sampler="student")
    for folder, dtype, near in (("float", torch.float32, 1e-5), ("half", torch.float16, 0.02)):
        model.save(tmp_path / folder, dtype)
        loaded = RefinedAudioLDM.load(tmp_path / folder)
        torch.testing.assert_close(loaded.generate(["rain"], sampler="student"), expected, atol=near, rtol=0)
        assert read_student(tmp_path / folder / STUDENT_FILE)[1]["name"] == "small"
    optimize_for_inference(loaded, "no")
    torch.testing.assert_close(loaded.generate(["rain"], sampler="student"), expected, atol=0.02, rtol=0)


def test_a_student_knows_no_lora(model, tmp_path):
    write(tmp_path / STUDENT_FILE, model)
    model.load_student(tmp_path / STUDENT_FILE)
    model.with_loras().add(2)
    with pytest.raises(ValueError, match="the student was taught without LoRAs"):
        model.generate(["rain"], sampler="student")
    model.merge_loras()
    assert model.student is None and model.student_file is None


def test_students_of_others_and_other_files_are_refused(model, tmp_path, monkeypatch):
    file = tmp_path / STUDENT_FILE
    write(file, model)
    other = small.awake_model(monkeypatch)
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    with pytest.raises(ValueError, match="is a student of another model: of small with the digest"):
        other.load_student(file)
    with pytest.raises(FileNotFoundError, match="no student at .*gone: train one"):
        model.load_student(tmp_path / "gone")
    save_lora(tmp_path / "lora", {}, LoraConfig(2), model.digest(), "small")
    with pytest.raises(ValueError, match="is no student of `refined-ldm train --distill`"):
        model.load_student(tmp_path / "lora")
    tensors, _ = read_student(file)
    tensors.pop(next(name for name in tensors if "lora_A" in name))
    save_student(file, tensors, LoraConfig(2), model.digest(), "small")
    with pytest.raises(ValueError, match="does not fit the U-Net: its matrices are not those of rank 2"):
        model.load_student(file)


def test_a_student_of_the_published_size_has_2_percent_of_its_parameters():
    """A dry run without memory for numbers: shapes of a jump, its gradients, and the size of the file."""
    pytest.importorskip("peft")
    with torch.device("meta"):
        teacher = UNet(UNetConfig())
        student = Student(teacher, 8)
        latent, embedding, t = torch.empty(2, 8, 256, 16), torch.empty(2, 512), torch.empty(2, dtype=torch.long)
        student(latent, t, embedding, t).sum().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    sizes = [sum(p.numel() for p in module.parameters()) for module in (teacher, student)]
    assert sizes[0] > 180e6 and sizes[1] / sizes[0] < 0.03
