import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from refined_ldm.adapters.lora import GUIDANCE, LoraConfig, lora_layers, save_lora
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.weights import save_weights
from tests.support import small

pytest.importorskip("peft")


def write(path, model, seed, rank=4):
    """A LoRA of the model with random matrices; the model stays as it was."""
    torch.manual_seed(seed)
    loras = model.with_loras()
    matrices = loras.add(rank)
    with torch.no_grad():
        for matrix in matrices.values():
            matrix.normal_(std=0.2)
    save_lora(path, matrices, LoraConfig(rank), loras.base, model.config.name)
    model.remove_loras()
    return path


@pytest.fixture
def model(monkeypatch):
    return small.awake_model(monkeypatch)


@pytest.fixture
def files(model, tmp_path):
    return [write(tmp_path / "a.safetensors", model, 1), write(tmp_path / "b.safetensors", model, 2, rank=2)]


@torch.no_grad()
def predict(model):
    generator = torch.Generator().manual_seed(4)
    z, c = torch.randn(2, 2, 8, 4, generator=generator), torch.randn(2, 12, generator=generator)
    return model.unet(z, torch.tensor([3, 700]), c)


def test_weight_0_is_the_model_bit_for_bit(model, files):
    before = predict(model)
    model.load_lora(files[0], 0)
    assert torch.equal(predict(model), before)
    model.merge_loras()
    assert torch.equal(predict(model), before)


def test_a_lora_changes_every_layer_it_is_beside_and_removing_it_leaves_no_trace(model, files):
    before, names = predict(model), lora_layers(model.unet)
    weights = {name: w.clone() for name, w in model.unet.state_dict().items()}
    model.load_lora(files[0])
    assert (predict(model) - before).abs().max() > 1e-2
    model.remove_loras()
    assert torch.equal(predict(model), before) and list(model.unet.state_dict()) == list(weights)
    model.load_lora(files[0])
    model.merge_loras()
    changed = {name for name, w in model.unet.state_dict().items() if not torch.equal(w, weights[name])}
    assert changed == {f"{name}.weight" for name in names}


def test_a_model_with_loras_has_less_guidance_until_they_are_removed(model, files):
    guidance = model.config.guidance_scale
    model.load_lora(files[0], weight=0)
    assert model.config.guidance_scale == guidance > GUIDANCE
    model.load_lora(files[1])
    assert model.config.guidance_scale == GUIDANCE
    model.remove_loras()
    assert model.config.guidance_scale == guidance
    model.load_lora(files[0])
    model.merge_loras()
    assert model.config.guidance_scale == GUIDANCE


def test_merged_equals_unmerged(model, files):
    for file, weight in zip(files, (1, -0.5), strict=True):
        model.load_lora(file, weight)
    beside = predict(model)
    model.merge_loras()
    torch.testing.assert_close(predict(model), beside, atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for p in model.unet.parameters())


def test_two_loras_add(model, files):
    def change(*loaded):
        base = {name: w.clone() for name, w in model.unet.state_dict().items()}
        for file, weight in loaded:
            model.load_lora(file, weight)
        model.merge_loras()
        merged = {name: w.clone() for name, w in model.unet.state_dict().items()}
        model.unet.load_state_dict(base)
        return {name: merged[name] - base[name] for name in base}

    first, second, both = change((files[0], 1)), change((files[1], 0.5)), change((files[0], 1), (files[1], 0.5))
    assert max(w.abs().max() for w in second.values()) > 1e-2
    for name, moved in both.items():
        torch.testing.assert_close(moved, first[name] + second[name], atol=1e-5, rtol=0)


def test_a_model_with_loras_is_saved_once_they_are_merged(model, files, tmp_path):
    model.load_lora(files[0])
    with pytest.raises(ValueError, match="LoRAs beside its weights: call merge_loras"):
        model.save(tmp_path / "model")
    made = predict(model)
    model.merge_loras()
    model.save(tmp_path / "model")
    torch.testing.assert_close(predict(RefinedAudioLDM.load(tmp_path / "model")), made, atol=1e-5, rtol=1e-4)


def test_a_lora_of_another_model_or_no_lora_is_refused(model, files, tmp_path, monkeypatch):
    other = RefinedAudioLDM(small.config(), seed=8)
    with pytest.raises(ValueError, match="a.safetensors is a LoRA of another model: of small with the digest"):
        other.load_lora(files[0])
    with pytest.raises(FileNotFoundError, match="no LoRA at .*none.safetensors: train one"):
        model.load_lora(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="is a folder: give the file of a LoRA"):
        model.load_lora(tmp_path)
    save_weights(tmp_path / "half.safetensors", model.vae, kind="lora")  # without its base
    with pytest.raises(ValueError, match="half.safetensors is no LoRA of"):
        model.load_lora(tmp_path / "half.safetensors")
    save_weights(tmp_path / "vae.safetensors", model.vae)
    with pytest.raises(ValueError, match="vae.safetensors is no LoRA of"):
        model.load_lora(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        model.load_lora(files[0], float("nan"))
    before = predict(model)
    loras = model.with_loras()
    strange = {"nowhere.lora_A.weight": torch.zeros(4, 8), "nowhere.lora_B.weight": torch.zeros(8, 4)}
    save_lora(tmp_path / "c.safetensors", strange, LoraConfig(4), loras.base, "small")
    with pytest.raises(ValueError, match="c.safetensors does not fit the U-Net: its matrices are not those of rank 4"):
        model.load_lora(tmp_path / "c.safetensors")
    assert torch.equal(predict(model), before)  # nothing was changed by what was refused


@pytest.mark.parametrize("settings", [{"rank": 4, "alpha": 8}, {"rank": "four"}, {"rank": 0}, [4], None])
def test_a_lora_with_settings_of_another_version_is_refused_in_one_line(model, files, tmp_path, settings):
    metadata = {"kind": "lora", "base": model.digest(), "name": "small", "config": settings}
    header = {name: json.dumps(value) for name, value in metadata.items()}
    save_file(load_file(files[0]), tmp_path / "new.safetensors", header)
    with pytest.raises(ValueError, match=r"new.safetensors: no settings of a LoRA of this version \("):
        model.load_lora(tmp_path / "new.safetensors")
    assert model.loras is None or not len(model.loras)


def test_impossible_ranks_are_refused():
    for rank in (0, -1, 257):
        with pytest.raises(ValueError, match=f"from 1 to 256, got {rank}"):
            replace(LoraConfig(), rank=rank)


def test_a_lora_of_tiny_has_at_most_a_megabyte(tmp_path):
    file = write(tmp_path / "tiny.safetensors", RefinedAudioLDM.from_preset("tiny"), 0, rank=8)
    assert 500_000 < file.stat().st_size <= 1_000_000
