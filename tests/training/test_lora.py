import csv
from dataclasses import replace

import pytest
import torch

from refined_ldm.adapters.lora import read_lora
from refined_ldm.audio import save_audio
from refined_ldm.data.captioned_audio import CaptionedAudio
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training import lora
from refined_ldm.training.inputs import cached_clips, encode_clips
from refined_ldm.training.lora import LoraTraining, Rehearsal, split_clips, train_lora
from refined_ldm.training.stages import ldm_losses
from tests.support import small

pytest.importorskip("peft")
RANK = 2
SHORT = LoraTraining(max_steps=4, batch_size=2, warmup_steps=0, lr=1e-2, evaluate_every=2)


def recordings(folder, count):
    folder.mkdir()
    for i, item in enumerate(small.clips(count)):
        save_audio(folder / f"bell_{i}.wav", item["waveform"])
    return folder


@pytest.fixture
def base(tmp_path, monkeypatch):
    """-> a function that returns the same trained model each time, for a folder of recordings."""
    folder = tmp_path / "model"
    small.awake_model(monkeypatch).save(folder)
    return lambda data: RefinedAudioLDM.load(folder, data=str(data))


def evaluations(run):
    with (run / "held-out.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_the_lora_of_the_best_step_is_kept_and_the_model_has_it(base, tmp_path):
    model, run = base(recordings(tmp_path / "bells", 10)), tmp_path / "run"
    weights = {name: w.clone() for name, w in model.unet.state_dict().items()}
    steps = list(train_lora(model, run, RANK, SHORT))
    assert [step.index for step in steps] == [1, 2, 3, 4]
    rows = evaluations(run)
    assert [step for step, _ in rows] == [0, 2, 4]
    matrices, metadata = read_lora(run / "lora.safetensors")
    best = min(rows[1:], key=lambda row: row[1])
    assert (metadata["step"], metadata["held_out_loss"], metadata["clips"]) == (*best, 8)
    assert max(m.abs().max() for name, m in matrices.items() if "lora_B" in name) > 1e-3  # it has learned
    fresh = base("scenes")
    fresh.load_lora(run / "lora.safetensors")
    for own, other in zip(model.unet.parameters(), fresh.unet.parameters(), strict=True):
        assert torch.equal(own, other)
    model.remove_loras()
    assert all(torch.equal(w, weights[name]) for name, w in model.unet.state_dict().items())
    assert model.generate(["bell"]).shape == (1, 5120)


def test_training_lowers_the_loss(base, tmp_path):
    model = base(recordings(tmp_path / "bells", 6))
    settings = replace(SHORT, max_steps=60, evaluate_every=20, held_out=0.34, patience=9)
    list(train_lora(model, tmp_path / "run", RANK, settings))
    rows = evaluations(tmp_path / "run")
    assert rows[-1][1] < rows[0][1]


def test_a_resumed_run_equals_an_uninterrupted_one(base, tmp_path):
    bells = recordings(tmp_path / "bells", 10)
    settings = replace(SHORT, max_steps=6)
    list(train_lora(base(bells), tmp_path / "whole", RANK, settings))
    run = tmp_path / "stopped"
    steps = train_lora(base(bells), run, RANK, settings)
    for _ in range(3):
        next(steps)
    steps.close()
    assert [s.index for s in train_lora(base(bells), run, RANK, settings, resume=True)] == [3, 4, 5, 6]
    assert evaluations(run) == evaluations(tmp_path / "whole")
    matrices, metadata = read_lora(run / "lora.safetensors")
    expected, of = read_lora(tmp_path / "whole" / "lora.safetensors")
    assert metadata == of and matrices.keys() == expected.keys()
    assert all(torch.equal(matrix, expected[name]) for name, matrix in matrices.items())
    assert list(train_lora(base(bells), run, RANK, settings, resume=True)) == []  # it is finished


def test_training_stops_when_the_held_out_loss_no_longer_falls(base, tmp_path, monkeypatch):
    losses = iter([1.0, 0.8, 0.9, 0.7, 0.75, 0.7, 0.1, 0.1])
    monkeypatch.setattr(lora, "held_out_loss", lambda *_: next(losses))
    bells, run = recordings(tmp_path / "bells", 10), tmp_path / "run"
    settings = replace(SHORT, max_steps=100, patience=2)
    assert [s.index for s in train_lora(base(bells), run, RANK, settings)][-1] == 10
    assert read_lora(run / "lora.safetensors")[1]["step"] == 6
    assert list(train_lora(base(bells), run, RANK, settings, resume=True)) == []


@pytest.mark.parametrize("count", [1, 3])
def test_very_few_clips_train(base, tmp_path, count):
    run = tmp_path / "run"
    list(train_lora(base(recordings(tmp_path / "bells", count)), run, RANK, SHORT))
    metadata = read_lora(run / "lora.safetensors")[1]
    assert metadata["step"] == 4 and metadata["held_out_loss"] is None
    assert not (run / "held-out.csv").exists()


def test_old_clips_are_mixed_in_and_lower_what_is_forgotten(base, tmp_path):
    bells, t = recordings(tmp_path / "bells", 2), torch.arange(5120) / 16_000
    (tmp_path / "old").mkdir()
    for pitch in (200, 400, 900, 2000):  # tones, where the new recordings are noise
        save_audio(tmp_path / "old" / f"tone_{pitch}.wav", 0.5 * torch.sin(2 * torch.pi * pitch * t))
    old = CaptionedAudio.from_folder(tmp_path / "old", 0.32)
    settings, forgotten = replace(SHORT, max_steps=40, evaluate_every=40, batch_size=4, kept_share=0.6), []
    for name, kept in (("alone", None), ("mixed", old)):
        model = base(bells)
        list(train_lora(model, tmp_path / name, RANK, settings, kept=kept))
        metadata = read_lora(tmp_path / name / "lora.safetensors")[1]
        assert (metadata["clips"], metadata["kept"]) == (2, 4 if kept else 0)
        losses = ldm_losses(model, settings.stage(model.config))
        clips = encode_clips(model, cached_clips(model.config.changed(data=str(tmp_path / "old")), tmp_path / "o"),
                             tmp_path / "o")  # fmt: skip
        forgotten.append(lora.held_out_loss(model, losses, clips))
    assert forgotten[1] < forgotten[0]


def test_old_clips_have_their_share_and_the_empty_caption():
    new = [{"latent": torch.zeros(1), "embeddings": torch.arange(2.0)[:, None]}] * 3
    old = [{"latent": torch.ones(1), "embeddings": torch.arange(3.0)[:, None]}] * 8
    for share in (0.1, 0.25, 0.6):
        rehearsal = Rehearsal(new, old, share, torch.tensor([9.0]))
        items = [rehearsal[i] for i in range(len(rehearsal))]
        assert sum(float(item["latent"]) for item in items) / len(items) == pytest.approx(share, abs=0.06)
        for item in items:
            expected = [0, 1, 2, 9] if item["latent"] else [0, 1, 0, 1]
            assert item["embeddings"].flatten().tolist() == expected
    assert len(items) % 3 == 8 % 3


def test_clips_are_held_out_from_five_on():
    assert [len(split_clips(count, 0.2)[1]) for count in (1, 4, 5, 30, 1000)] == [0, 0, 1, 6, 200]
    train, held_out = split_clips(30, 0.2, seed=3)
    assert sorted(train + held_out) == list(range(30)) and split_clips(30, 0.2, seed=4)[1] != held_out


def test_a_run_is_never_begun_twice_nor_gone_on_with_another_model(base, tmp_path, monkeypatch):
    bells, run = recordings(tmp_path / "bells", 2), tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="no recordings at"):
        next(train_lora(base(tmp_path / "gone"), run, RANK, SHORT))
    list(train_lora(base(bells), run, RANK, SHORT))
    with pytest.raises(FileExistsError, match="resume that run"):
        next(train_lora(base(bells), run, RANK, SHORT))
    other = RefinedAudioLDM(small.config(data=str(bells)), seed=8).eval()
    with pytest.raises(ValueError, match="is a LoRA of another model"):
        next(train_lora(other, run, RANK, SHORT, resume=True))


def test_a_model_with_a_lora_learns_no_other_and_keeps_its_own(base, tmp_path):
    bells = recordings(tmp_path / "bells", 1)
    list(train_lora(base(bells), tmp_path / "run", RANK, SHORT))
    model = base(bells)
    model.load_lora(tmp_path / "run" / "lora.safetensors")
    with pytest.raises(ValueError, match="the model has LoRAs already: call merge_loras"):
        next(train_lora(model, tmp_path / "other", RANK, SHORT))
    assert len(model.loras) == 1 and not (tmp_path / "other").exists()


def test_impossible_settings_are_refused():
    for change in ({"held_out": 1.0}, {"patience": 0}, {"evaluate_every": 0}, {"kept_share": 0.0}, {"kept_share": 1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            LoraTraining(**change)
