import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from refined_ldm.evaluation.adherence import ProbedEmbedding
from refined_ldm.experiment.probes import nearer, negated, order_correct, other_count, share
from refined_ldm.scenes.dataset import SoundScenes


def test_share_has_the_exact_interval():
    for right in (np.array([1, 1, 0, 1, 0.0]), np.ones(7), np.zeros(4)):
        found = share(right)
        known = binomtest(int(right.sum()), len(right)).proportion_ci(method="exact")
        assert (found["value"], found["low"], found["high"]) == pytest.approx((right.mean(), known.low, known.high))


@pytest.mark.parametrize(("caption", "other"), [
    ("a dog barks twice", "a dog barks five times"), ("a dog barks once", "a dog barks four times"),
    ("someone takes two steps", "someone takes six steps"), ("a piano plays five notes", "a piano plays two notes"),
    ("rain falls", None), ("someone knocks", None),
])  # fmt: skip
def test_the_count_of_a_caption_is_changed(caption, other):
    assert other_count(caption) == other


def test_negations_name_the_present_class_and_deny_the_other():
    items = [{"labels": ("dog",)}, {"labels": ("rain",)}]
    true, false = negated(items)
    assert true[0] == false[1] == "the sound of a dog barking but not the sound of rain falling"


class _Ear:
    """Embeds a sound as its mean, and a caption as the number in it."""

    def embed_audio(self, waveform, sample_rate):
        return torch.stack([waveform.mean(1), 1 - waveform.mean(1)], 1)

    def embed_text(self, captions):
        x = torch.tensor([float(c.split()[-1]) for c in captions])
        return torch.stack([x, 1 - x], 1)


def test_the_nearer_caption_is_found_and_a_tie_counts_half():
    items = [{"waveform": torch.ones(4), "caption": "1"}, {"waveform": torch.zeros(4), "caption": "1"},
             {"waveform": torch.ones(4), "caption": "1"}]  # fmt: skip
    assert nearer(_Ear(), items, ["0", "0", "still 1"]).tolist() == [1, 0, 0.5]


class _Probe:
    classes = tuple(sorted({"dog", "rain"}))

    def logits(self, x):
        return x


def test_order_is_found_from_the_halves():
    def embed(waveform, rate):  # the first class is what is positive, the second what is negative
        return torch.stack([waveform.clamp(min=0).mean(1), (-waveform).clamp(min=0).mean(1)], 1)

    probed = ProbedEmbedding(embed, _Probe())
    dog_first = torch.cat([torch.ones(100), -torch.ones(100)])
    events = [{"name": "dog", "onset": 0.0}, {"name": "rain", "onset": 1.0}]
    items = [{"id": "a", "events": events}, {"id": "b", "events": events}]
    assert order_correct(probed, torch.stack([dog_first, -dog_first]), items).tolist() == [1, 0]
    with pytest.raises(ValueError, match="two events of one class"):
        order_correct(probed, dog_first[None], [{"id": "c", "events": [events[0], events[0]]}])


def test_real_twins_share_everything_but_the_order():
    scenes = SoundScenes("test_order", 2)
    names = [[e.name for e in sorted(scenes[i]["events"], key=lambda e: e.onset)] for i in (0, 1)]
    assert names[0] == names[1][::-1]
