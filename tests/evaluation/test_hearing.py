from dataclasses import replace

import pytest
import torch

from refined_ldm.evaluation import hearing
from refined_ldm.evaluation.detail_classifier import ANSWER_SIZES, CLASS_NAMES, DetailClassifier
from refined_ldm.evaluation.details import named_details
from refined_ldm.evaluation.hearing import drawn_and_heard, own_classifier, rightness
from refined_ldm.scenes.captions import Caption, Clause
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.inputs import cached_clips
from refined_ldm.training.matching import MATCHING, train_matcher
from tests.support import small

DOG, PIANO = Clause("dog", "a *dog|barks|barking|", 2, counted=True), Clause("piano", "a piano|plays|playing| #", 2)
CAPTIONS = {
    "number": Caption("event", "{a}", (DOG,)),
    "pitch": Caption("event", "{a}", (replace(PIANO, adjective="high"),)),
    "pace": Caption("event", "{a}", (Clause("clock", "a clock|ticks|ticking|", None, manner=" quickly"),)),
    "distance": Caption("event", "{a}", (replace(DOG, counted=False, adjective="distant"),)),
    "loudness": Caption("sequence", "{a}, then {b}", (replace(DOG, manner=" softly"), PIANO)),
    "order": Caption("sequence", "{a}, then {b}", (DOG, PIANO)),
}


def answers_for(caption: Caption) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Classes and answers of a classifier that is sure of what a caption says."""
    names = [clause.name for clause in caption.clauses]
    classes = torch.tensor([[9.0 if name in names else -9.0 for name in CLASS_NAMES]])
    answers = {name: torch.zeros(len(names), size) for name, size in ANSWER_SIZES.items()}
    for detail, of in named_details(caption).items():
        for k, (_, value) in enumerate(of):
            if detail == "number":
                answers["count"][k, value - 1] = 20
            elif detail in ("pitch", "pace"):
                answers[detail][k, 2 * value] = 20
            elif detail == "order":
                answers["onset"][k] = float(value)
            else:  # 20 dB louder or softer than the limit
                answers["gain" if detail == "loudness" else "distant"][k] = 2.0 if value else -2.0
                answers["distant"][k] *= 10
    return classes, answers


@pytest.mark.parametrize("detail", CAPTIONS)
def test_a_sound_is_right_if_every_answer_is_and_wrong_if_one_is_not(detail):
    caption = CAPTIONS[detail]
    assert detail in named_details(caption)
    classes, answers = answers_for(caption)
    assert rightness(classes, answers, [caption])[0] > 0.9
    name = {"number": "count", "distance": "distant", "loudness": "gain", "order": "onset"}.get(detail, detail)
    wrong = answers | {name: answers[name].flip(1) if answers[name].shape[1] > 1 else -answers[name]}
    assert rightness(classes, wrong, [caption])[0] < 0.1
    more = classes.clone()
    more[0, CLASS_NAMES.index("rain")] = 5
    less = classes.clone()
    less[0, CLASS_NAMES.index(caption.clauses[0].name)] = -5
    assert rightness(more, answers, [caption])[0] < 0.1 > rightness(less, answers, [caption])[0]


def test_captions_in_one_batch_do_not_change_each_other():
    found = [answers_for(caption) for caption in CAPTIONS.values()]
    classes = torch.cat([classes for classes, _ in found])
    answers = {name: torch.cat([of[name] for _, of in found]) for name in ANSWER_SIZES}
    assert (rightness(classes, answers, list(CAPTIONS.values())) > 0.9).all()


@pytest.fixture
def model(tmp_path, monkeypatch):
    small.awake_model(monkeypatch, seconds=1.28).save(tmp_path / "model")
    return RefinedAudioLDM.load(tmp_path / "model", data="scenes", clips=6)


def test_sounds_are_drawn_and_heard_once_and_the_matcher_learns_from_them(model, tmp_path, monkeypatch):
    run, clips = tmp_path / "run", cached_clips(model.config, tmp_path / "run")
    settings = replace(MATCHING, max_steps=2, batch_size=4)
    classifier = own_classifier(model, clips, run, most=settings)
    monkeypatch.setattr(hearing, "train_classifier", None)  # the second time it is loaded
    again = own_classifier(model, clips, run, most=settings)
    assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), again.parameters(), strict=True))

    done = []
    heard = drawn_and_heard(model, classifier, clips, run, 0, lambda *step: done.append(step))
    assert len(heard) == 6 * hearing.EACH and done[-1] == (6, 6)
    for k in range(len(heard)):
        item = heard[k]
        assert item["latent"].shape == model.latent_shape(1.28) and 0 <= item["right"] <= 1
        assert item["caption"] == heard[k // hearing.EACH * hearing.EACH]["caption"]
    assert not torch.equal(heard[0]["latent"], heard[1]["latent"])
    done.clear()
    drawn_and_heard(model, classifier, clips, run, 0, lambda *step: done.append(step))
    assert not done
    drawn_and_heard(model, DetailClassifier().eval(), clips, run, 0, lambda *step: done.append(step))
    assert done

    steps = list(train_matcher(model, run, settings, hear=lambda _: heard))
    assert steps[0].losses["heard"] > 0 and model.matcher is not None
    weights = model.matcher.decide[0].weight.detach().clone()  # the next goes on with the one that the model has
    following = list(train_matcher(model, tmp_path / "on", replace(settings, max_steps=1, lr=1e-9)))
    assert "heard" not in following[0].losses
    torch.testing.assert_close(model.matcher.decide[0].weight, weights, atol=1e-3, rtol=1e-2)
