"""Sounds from sounds and LoRAs on pretended GPUs and a Mac: nothing is refused, and the sounds are the CPU's."""

import copy

import pytest
import torch

from refined_ldm.audio import save_audio
from refined_ldm.devices import pick_precision
from refined_ldm.inference import optimize_for_inference
from refined_ldm.text_to_audio import RefinedAudioLDM
from tests.support import small
from tests.support.accelerators import forget_accelerators
from tests.support.pretended_device import pretend

DOG, RAIN = "a dog barks", "rain falls"
SOUND = small.clips(1)[0]["waveform"]
STEPS = {"steps": 2}
MADE = {
    "edit": lambda model: model.edit(SOUND, RAIN, 0.7, candidates=2, **STEPS),
    "inversion": lambda model: model.edit(SOUND, RAIN, 0.7, "inversion", DOG, **STEPS),
    "inpaint": lambda model: model.inpaint(SOUND, RAIN, 0.1, 0.2, (500, 4000), **STEPS),
    "extend": lambda model: model.extend(SOUND, RAIN, 0.2, **STEPS),
    "super_resolve": lambda model: model.super_resolve(SOUND, RAIN, 2000.0, **STEPS),
    "loop": lambda model: model.loop(RAIN, 0.64, **STEPS),
    "loop of a sound": lambda model: model.loop(RAIN, waveform=SOUND, **STEPS),
    "generate_long": lambda model: model.generate_long([(0, RAIN), (0.4, DOG)], 0.8, candidates=2, **STEPS),
    "variations": lambda model: model.variations(SOUND, RAIN, 2, **STEPS),
    "interpolate captions": lambda model: model.interpolate(RAIN, DOG, 3, **STEPS),
    "interpolate sounds": lambda model: model.interpolate(SOUND, SOUND.flip(0), 3, RAIN, **STEPS),
}


@pytest.fixture(autouse=True)
def another_machine():
    before = torch.get_float32_matmul_precision()
    forget_accelerators(), pick_precision.cache_clear()
    yield
    forget_accelerators(), pick_precision.cache_clear()
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        yield small.awake_model(patch)


@pytest.fixture(scope="module")
def expected(model):
    return {name: make(model) for name, make in MADE.items()}


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_sounds_from_sounds_are_those_of_the_cpu(model, expected, kind):
    with pretend(kind):
        there = copy.deepcopy(model).to(kind)
        for name, make in MADE.items():
            sound = make(there)
            assert sound.device.type == "cpu", name
            torch.testing.assert_close(sound, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("capability, precision", [((7, 5), "fp16"), ((9, 0), "bf16")])
def test_sounds_from_sounds_in_half_precision(model, expected, capability, precision):
    with pretend("cuda", capability):
        there = copy.deepcopy(model).to("cuda")
        assert optimize_for_inference(there).precision == precision
        for name in ("edit", "inpaint", "generate_long", "interpolate sounds"):
            sound = MADE[name](there)
            assert sound.isfinite().all() and (sound - expected[name]).norm() < 0.2 * expected[name].norm(), name


@pytest.mark.parametrize("kind, capability", [("cuda", (7, 5)), ("cuda", (9, 0)), ("mps", (0, 0))])
def test_a_lora_is_trained_and_the_model_generates_with_it(kind, capability, monkeypatch, tmp_path):
    lora = pytest.importorskip("refined_ldm.training.lora")
    pytest.importorskip("peft")
    for i, item in enumerate(small.clips(6)):
        save_audio(tmp_path / f"bells/bell_{i}.wav", item["waveform"])
    training = lora.LoraTraining(max_steps=2, batch_size=2, warmup_steps=0, lr=1e-2, evaluate_every=1)
    small.awake_model(monkeypatch).save(tmp_path / "model")
    one, other = (RefinedAudioLDM.load(tmp_path / "model", data=str(tmp_path / "bells")) for _ in range(2))
    with pretend(kind, capability):
        assert len(list(lora.train_lora(one.to(kind), tmp_path / "run", 2, training))) == 2
        sounds = one.generate([DOG], **STEPS).cpu()
    other.load_lora(tmp_path / "run" / "lora.safetensors")
    torch.testing.assert_close(sounds, other.generate([DOG], **STEPS), atol=1e-5, rtol=1e-4)
