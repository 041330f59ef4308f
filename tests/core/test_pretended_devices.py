"""The whole model on a GPU and on a Mac that are pretended: nothing is refused, and the sounds are the CPU's."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refined_ldm.devices import copy_to_cpu, pick_precision
from refined_ldm.evaluation.pitch import Crepe
from refined_ldm.inference import optimize_for_inference
from refined_ldm.linear_denoiser import ConditionalLinearDenoiser, GaussianDenoiser
from refined_ldm.published.swap import fit_film
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.vae import latent_scale
from tests.support import small
from tests.support.pretended_device import pretend

DEVICES = pytest.mark.parametrize("kind", ["cuda", "mps"])
CAPTIONS = ["a dog barks", "rain falls"]
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))


@pytest.fixture(autouse=True)
def another_machine():
    pick_precision.cache_clear()
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)
    pick_precision.cache_clear()


@pytest.fixture
def model(monkeypatch):
    return small.awake_model(monkeypatch)


@DEVICES
@pytest.mark.parametrize("settings", [
    {}, {"sampler": "ddim"}, {"candidates": 2}, {"negative_caption": "wind blows"}, {"guidance_interval": (0, 500)},
])  # fmt: skip
def test_sounds_are_those_of_the_cpu(model, kind, settings):
    expected = model.generate(CAPTIONS, steps=2, **settings)
    with pretend(kind):
        sounds = copy.deepcopy(model).to(kind).generate(CAPTIONS, steps=2, **settings)
        assert sounds.device.type == kind
        torch.testing.assert_close(sounds.cpu(), expected)


def test_a_gpu_is_waited_for_a_few_times_however_many_steps_there_are(model):
    with pretend("cuda") as gpu:
        model.to("cuda").generate(CAPTIONS, steps=2)  # copies the noise schedule
        waits = []
        for steps, captions, sampler in ((2, CAPTIONS, "dpmpp"), (25, CAPTIONS * 3, "dpmpp"), (25, CAPTIONS, "ddim")):
            gpu.forget()
            model.generate(captions, steps=steps, sampler=sampler, guidance_interval=(0, 500))
            waits.append(gpu.waits.total())
        assert waits[0] == waits[1] == waits[2] <= 4, gpu.report(30)


@pytest.mark.parametrize("capability, precision, dtype", [
    ((6, 1), "no", torch.float32), ((7, 5), "fp16", torch.float16), ((9, 0), "bf16", torch.bfloat16),
])  # fmt: skip
def test_each_gpu_generates_in_its_fastest_precision(model, capability, precision, dtype):
    expected = model.generate(CAPTIONS, steps=2)
    with pretend("cuda", capability):
        model.to("cuda")
        assert optimize_for_inference(model).precision == precision
        assert model.unet.middle[0].conv1.weight.dtype == dtype
        sounds = model.generate(CAPTIONS, steps=2).cpu()
    assert sounds.isfinite().all() and (sounds - expected).norm() / expected.norm() < 0.2


@DEVICES
def test_measurements_of_latents(model, kind):
    waveform = torch.stack([clip["waveform"] for clip in small.clips()])
    latents, c = torch.randn(40, 2, 8, 4), torch.randn(40, 2, 12)

    def measure(place):
        mel = model.mel(waveform.to(place))
        denoisers = [
            GaussianDenoiser(2, 4).to(place).fit(latents.to(place)),
            ConditionalLinearDenoiser(2, 4, 12, 8).to(place).fit(latents.to(place), c.to(place)),
        ]
        z_t, alpha_bar, embedding = (x.to(place) for x in (latents[:3], torch.full((3, 1, 1, 1), 0.5), c[:3, 0]))
        noise = [denoiser.noise(z_t, alpha_bar, embedding).cpu() for denoiser in denoisers]
        film = fit_film(c[:, 0].to(place), latents.flatten(1).to(place))
        return [torch.tensor(latent_scale(model.vae, [mel])), *noise, film.weight]

    expected = measure("cpu")
    with pretend(kind):
        model.to(kind)
        torch.testing.assert_close(measure(kind), expected)


@DEVICES
def test_the_pitch_tracker(kind):
    torch.manual_seed(0)
    tracker, waveform = Crepe().eval(), torch.randn(4000)
    expected = tracker(waveform)
    with pretend(kind):
        for place in ("cpu", kind):
            cents, confidence = tracker.to(kind)(waveform.to(place))
            assert (abs(cents - expected[0]) < 0.1).all() and (abs(confidence - expected[1]) < 1e-4).all()


def test_the_unet_can_be_recorded_as_a_cuda_graph(model):
    """Nothing in it waits for the device or copies from the CPU."""
    with pretend("cuda") as gpu, torch.no_grad():
        optimize_for_inference(model.to("cuda"))
        z, c = torch.randn(2, 2, 8, 4, device="cuda"), torch.randn(2, 12, device="cuda")
        t = torch.full((2,), 500, device="cuda")
        gpu.forget()
        model.unet(z, t, c)
        assert gpu.operators > 50 and not gpu.waits and not gpu.copies, gpu.report(30)


def test_a_model_is_read_and_written_with_a_wait_or_two_for_each_part(model, tmp_path):
    with pretend("cuda") as gpu:
        model.to("cuda")
        gpu.forget()
        model.save(tmp_path)
        assert gpu.waits.total() <= 10, gpu.report(30)
        gpu.forget()
        loaded = RefinedAudioLDM.load(tmp_path, device="cuda")
        assert gpu.waits.total() <= 10 and loaded.device.type == "cuda", gpu.report(30)
    assert all(torch.equal(p, q) for p, q in zip(loaded.unet.parameters(), model.unet.parameters(), strict=True))


def test_tensors_come_to_the_cpu_with_one_wait():
    tensors = {name: torch.randn(3, 4) for name in "abc"}
    with pretend("cuda") as gpu:
        there = {name: tensor.to("cuda").T for name, tensor in tensors.items()}
        gpu.forget()
        copies = copy_to_cpu(there)
        assert gpu.waits.total() == 1 and all(copy.device.type == "cpu" for copy in copies.values())
    assert all(torch.equal(copies[name], tensor.T) and copies[name].is_contiguous() for name, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, kind):
    """In a process of their own each, since code may keep what it found out about its device."""
    command = [sys.executable, "-m", "tests.support.pretended_notebook", kind, str(notebook)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
