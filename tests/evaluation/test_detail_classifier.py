import pytest
import torch

from refined_ldm.config import StageConfig
from refined_ldm.data.caches import CACHED_KEYS, cache_clips
from refined_ldm.evaluation.detail_classifier import (
    ANSWER_SIZES,
    CLASS_NAMES,
    DetailClassifier,
    augment,
    classifier_loss,
    targets_of,
    train_classifier,
)
from refined_ldm.model_folder import WEIGHTS
from refined_ldm.scenes.dataset import SoundScenes
from refined_ldm.weights import save_weights


def test_targets_are_the_metadata():
    item = SoundScenes("val", 30)[1]
    row, name, classes, events = targets_of([item])
    assert row.tolist() == [0, 0] and {CLASS_NAMES[i] for i in name} == set(item["labels"]) and classes.sum() == 2
    values, known = events["onset"]
    assert known.all() and values.tolist() == pytest.approx([e.onset for e in item["events"]])
    counted = [e.count is not None for e in item["events"]]
    assert events["count"][1].tolist() == counted


def test_the_loss_is_zero_for_the_truth():
    item = SoundScenes("val", 30)[1]
    row, name, classes, events = targets_of([item])
    answers = {}
    for key, size in ANSWER_SIZES.items():
        value = events[key][0]
        if size > 1:
            answers[key] = 100 * torch.nn.functional.one_hot(value.long(), size).float()
        else:
            answers[key] = (200 * value - 100 if key == "distant" else value)[:, None]
    assert classifier_loss(200 * classes - 100, answers, classes, events)["loss"] < 1e-4


def test_disturbance_keeps_shape_and_changes_each_clip_in_its_own_way():
    mel = torch.randn(3, 1, 32, 64) - 5
    disturbed = augment(mel, torch.Generator().manual_seed(0))
    assert disturbed.shape == mel.shape
    changes = (disturbed - mel).mean((1, 2, 3))
    assert changes.unique().numel() == 3 and changes.abs().max() < 4


def test_a_classifier_learns_and_comes_back_from_its_file(tmp_path):
    clips = cache_clips(tmp_path / "clips", SoundScenes("val", 8, 1.28), {"kept": list(CACHED_KEYS)})
    steps = list(train_classifier(clips, StageConfig(24, 4, 3e-3, warmup_steps=1)))
    losses = [step.loss for _, step in steps]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    classifier = steps[-1][0].eval()
    classifier.save(tmp_path / "classifier.safetensors", torch.float32)
    again = DetailClassifier.load(tmp_path / "classifier.safetensors")
    mel, row, name = classifier.mel(clips[0]["waveform"][None]), torch.zeros(1, dtype=torch.long), torch.tensor([3])
    (classes, answers), (classes_again, answers_again) = classifier(mel, row, name), again(mel, row, name)
    torch.testing.assert_close((classes, answers), (classes_again, answers_again), rtol=0, atol=0)


def test_a_classifier_stored_under_earlier_names_still_loads(tmp_path):
    classifier = DetailClassifier().eval()
    earlier = {"classifier": "heard", "projection": "narrow", "context": "whole"}
    state = {
        ".".join([earlier.get(first, first), *rest]): v
        for (first, *rest), v in ((name.split("."), value) for name, value in classifier.state_dict().items())
    }
    save_weights(tmp_path / "classifier.safetensors", state, classifier.config)
    again = DetailClassifier.load(tmp_path / "classifier.safetensors")
    torch.testing.assert_close(again.state_dict(), classifier.state_dict())


def test_another_model_is_no_classifier():
    with pytest.raises(ValueError, match="vae.safetensors is no detail classifier of"):
        DetailClassifier.load(WEIGHTS / "tiny" / "vae.safetensors")
