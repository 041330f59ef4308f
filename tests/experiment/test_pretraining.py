from dataclasses import asdict, replace

import pytest
import torch

from refined_ldm.clap import Clap
from refined_ldm.data.batches import loader
from refined_ldm.experiment.pretraining import (
    NAMES,
    PRETRAINING,
    TASKS,
    TEXT_LM,
    AudioMultitask,
    multitask_loss,
    task_targets,
    train_audio_multitask,
    train_text_lm,
    vocabulary_of,
)
from refined_ldm.scenes.dataset import SoundScenes
from tests.support.small import CLAP

STEPS = replace(TEXT_LM, max_steps=25, batch_size=8, lr=3e-3, warmup_steps=5)


def scenes(count=12):
    """Scenes as the clip cache gives them: events are dicts."""
    data = SoundScenes("train", count, 1.0)
    return [data[i] | {"events": [asdict(e) for e in data[i]["events"]]} for i in range(count)]


def clap(name):
    torch.manual_seed(0)
    changes = {"text_tower": "roberta", "tokenizer": "small-roberta", "vocab_size": 50_261, "text_positions": 79}
    return Clap(CLAP if name == "tiny-gpt2" else replace(CLAP, **changes))


def test_targets_are_those_of_the_metadata():
    items = scenes()
    targets = task_targets(items)
    for row, item in enumerate(items):
        present = {NAMES[k] for k in targets["class"][0][row].nonzero()[:, 0]}
        assert present == set(item["labels"])
        first = [NAMES[k] for k in targets["order"][0][row].nonzero()[:, 0]]
        assert bool(targets["order"][1][row].all()) == (item["kind"] == "sequence")
        if item["kind"] == "sequence":
            assert first == [min(item["events"], key=lambda e: e["onset"])["name"]]
        loudest = max(item["events"], key=lambda e: e["gain"])
        assert bool(targets["pitch"][1][row]) == (loudest["pitch"] is not None)
        if loudest["pitch"]:
            assert 400 * 2 ** float(targets["pitch"][0][row]) == pytest.approx(loudest["pitch"], rel=1e-4)
        assert bool(targets["loudness"][1][row]) == (len(item["events"]) == 2)


def test_unknown_targets_do_not_count():
    items = scenes()
    targets = task_targets(items)
    predictions = {name: torch.zeros(len(items), n) for name, n in TASKS.items()}
    before = multitask_loss(predictions, targets)
    for name, prediction in predictions.items():
        prediction[~targets[name][1]] = 100.0
    assert multitask_loss(predictions, targets)["loss"] == before["loss"]
    with pytest.raises(ValueError, match="no task smell"):
        AudioMultitask(clap("tiny-gpt2"), ("class", "smell"))


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_trains_its_tower_and_leaves_the_rest_alone(name):
    items, model, pretraining = scenes(), clap(name), PRETRAINING[name]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    steps = list(train_audio_multitask(model, loader(items, 8), pretraining.tasks, STEPS))
    assert set(steps[0].losses) == {"loss", *pretraining.tasks}
    assert steps[-1].loss < steps[0].loss
    after = {k: v.clone() for k, v in model.state_dict().items()}
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"audio"}
    captions = [c for item in items for c in item["captions"]]
    steps = list(train_text_lm(model, loader(items, 8), pretraining.text, captions, replace(STEPS, lr=0.1)))
    assert sum(s.loss for s in steps[-5:]) < 0.95 * sum(s.loss for s in steps[:5])
    changed = {k.split(".")[0] for k in before if not torch.equal(after[k], model.state_dict()[k])}
    assert changed == {"text"}


def test_only_tokens_of_captions_are_predicted_and_other_objectives_are_refused():
    model = clap("tiny-gpt2")
    found = vocabulary_of(model, ["a dog barks", "a dog"])
    assert found.tolist() == sorted({*model.tokenizer(["a dog barks"], 77)[0].flatten().tolist()})
    with pytest.raises(ValueError, match="next token"):
        next(train_text_lm(model, None, "previous token", ["a dog"]))
