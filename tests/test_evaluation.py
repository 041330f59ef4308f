import numpy as np
import pytest
import torch
from torch import nn

from refined_ldm.config import preset
from refined_ldm.evaluation import (
    Judged,
    adherence,
    fit_probe,
    judge_embeddings,
    judge_generated,
    judge_rendered,
    judge_shuffled,
    rendered_clips,
    summary,
)


def stub_judge(waveform, sample_rate):
    """Log-power in 24 bands, loudest and mean over time: (B, N) -> (B, 48)."""
    spectrum = torch.stft(waveform, 512, 256, window=torch.hann_window(512), return_complex=True).abs() ** 2  # BFT
    bands = torch.stack([part.mean(1) for part in spectrum.split(11, dim=1)], 1)
    return torch.cat([bands.amax(2), bands.mean(2)], 1).clamp(min=1e-8).log()


class Echo(nn.Module):
    """Stands for a model: plays each caption's rendered clip, or noise."""

    def __init__(self, sounds):
        super().__init__()
        self.config, self.sounds, self.calls = preset("tiny"), sounds, []
        self.device = torch.device("cpu")

    def generate(self, captions, seconds, steps, guidance, seed):
        self.calls.append((len(captions), seconds, steps, guidance, seed))
        return torch.stack([self.sounds[caption] for caption in captions])

    def encode(self, waveform):
        return waveform

    decode = to_waveform = encode


@pytest.fixture(scope="module")
def listener():
    return fit_probe(stub_judge, size=96, seed=0)


@pytest.fixture(scope="module")
def items():
    return rendered_clips(24, kinds=("event",))


def test_the_probe_hears_rendered_clips_and_the_labels_of_others_are_chance(listener, items):
    judged = judge_rendered(listener, items)
    assert judged.recall.mean() > 0.3 > 0.15 > judge_shuffled(listener, judged, items).recall.mean()
    assert [row["labels"] for row in judged.rows] == [item["labels"][0] for item in items]
    for row in judged.rows:
        assert row["recall"] == float(row["heard"] == row["labels"])


def test_generated_clips_are_made_in_batches_from_their_own_captions(listener, items):
    model, done = Echo({item["caption"]: item["waveform"] for item in items}), []
    judged = judge_generated(listener, model, items, 2.0, 5, seed=7, batch_size=10, on_clips=lambda *n: done.append(n))
    assert model.calls == [(n, 2.56, 5, 2.0, 7) for n in (10, 10, 4)]
    assert done == [(10, 24), (20, 24), (24, 24)]
    np.testing.assert_allclose(judged.embeddings, judge_rendered(listener, items).embeddings, rtol=1e-4)


def test_two_captioned_events_give_half_a_recall_for_one_of_them(listener):
    class Fixed:
        classes = ("a", "b", "c")

        def logits(self, x):
            return x

    listener = type(listener)(stub_judge, Fixed())
    item = {"id": "x", "kind": "overlap", "caption": "a with b", "labels": ("a", "b")}
    judged = judge_embeddings(listener, np.array([[3.0, 1, 2], [2, 3, 1]]), [item, item])
    assert judged.recall.tolist() == [0.5, 1.0] and judged.rows[0]["heard"] == "a + c"
    with pytest.raises(ValueError, match="one clip an item"):
        judge_embeddings(listener, np.ones((1, 3)), [item, item])


def test_summary_has_an_interval_and_a_distance():
    rng = np.random.default_rng(0)
    rows = [{"recall": float(i % 4 > 0)} for i in range(100)]
    told = summary(Judged(rows, rng.normal(size=(100, 6))), Judged(rows, rng.normal(size=(100, 6)) + 2))
    assert told["recall"] == 0.75 and 0.6 < told["low"] < 0.75 < told["high"] < 0.9
    assert 20 < told["frechet"] < 30 and (told["clips"], told["pca"]) == (100, 6)  # six dimensions, each 2 apart


def test_adherence_compares_four_kinds_of_sound_on_two_kinds_of_clips(listener):
    clips = [*rendered_clips(6, kinds=("event",)), *rendered_clips(6)]
    table, judged = adherence(listener, Echo({c["caption"]: torch.zeros(40_960) for c in clips}), count=6)
    assert [row["sound"] for row in table] == 2 * ["rendered", "copied", "generated", "shuffled"]
    assert {len(j.rows) for j in judged.values()} == {6}
    assert table[1]["recall"] == table[0]["recall"] and table[0]["frechet"] == pytest.approx(0, abs=1e-6)
    assert table[2]["frechet"] > 1
