from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from refined_ldm.config import preset
from refined_ldm.evaluation.adherence import (
    ESC50_PROMPTS,
    AdherenceResult,
    accept_conditioner,
    evaluate_embeddings,
    evaluate_generated,
    evaluate_rendered,
    evaluate_shuffled,
    fit_probe,
    measure_adherence,
    read_esc50,
    rendered_clips,
    summary,
    zero_shot_esc50,
)
from tests.support.peers import write_esc50


def stub_embedding(waveform, sample_rate):
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
def probed():
    return fit_probe(stub_embedding, size=96, seed=0)


@pytest.fixture(scope="module")
def items():
    return rendered_clips(24, kinds=("event",))


def test_the_probe_names_rendered_clips_and_labels_of_other_clips_are_chance(probed, items):
    result = evaluate_rendered(probed, items)
    assert result.recall.mean() > 0.3 > 0.15 > evaluate_shuffled(probed, result, items).recall.mean()
    assert [row["labels"] for row in result.rows] == [item["labels"][0] for item in items]
    for row in result.rows:
        assert row["recall"] == float(row["predicted"] == row["labels"])


def test_generated_clips_are_made_in_batches_from_their_own_captions(probed, items):
    model, done = Echo({item["caption"]: item["waveform"] for item in items}), []
    result = evaluate_generated(probed, model, items, 2.0, 5, seed=7, batch_size=10, on_clips=lambda *n: done.append(n))
    assert model.calls == [(n, 2.56, 5, 2.0, 7) for n in (10, 10, 4)]
    assert done == [(10, 24), (20, 24), (24, 24)]
    np.testing.assert_allclose(result.embeddings, evaluate_rendered(probed, items).embeddings, rtol=1e-4)


def test_two_captioned_events_give_half_a_recall_for_one_of_them(probed):
    class Fixed:
        classes = ("a", "b", "c")

        def logits(self, x):
            return x

    probed = type(probed)(stub_embedding, Fixed())
    item = {"id": "x", "kind": "overlap", "caption": "a with b", "labels": ("a", "b")}
    result = evaluate_embeddings(probed, np.array([[3.0, 1, 2], [2, 3, 1]]), [item, item])
    assert result.recall.tolist() == [0.5, 1.0] and result.rows[0]["predicted"] == "a + c"
    with pytest.raises(ValueError, match="one clip for each item"):
        evaluate_embeddings(probed, np.ones((1, 3)), [item, item])


def test_summary_has_an_interval_and_a_distance():
    rng = np.random.default_rng(0)
    rows = [{"recall": float(i % 4 > 0)} for i in range(100)]
    results = [AdherenceResult(rows, rng.normal(size=(100, 6)) + mean) for mean in (0, 2)]
    found = summary(*results)
    assert found["recall"] == 0.75 and 0.6 < found["low"] < 0.75 < found["high"] < 0.9
    assert 20 < found["frechet"] < 30 and (found["clips"], found["pca"]) == (100, 6)  # six dimensions, each 2 apart


def test_adherence_compares_four_kinds_of_sound_on_two_kinds_of_clips(probed):
    clips = [*rendered_clips(6, kinds=("event",)), *rendered_clips(6)]
    table, results = measure_adherence(probed, Echo({c["caption"]: torch.zeros(40_960) for c in clips}), count=6)
    assert [row["sound"] for row in table] == 2 * ["rendered", "copied", "generated", "shuffled"]
    assert {len(j.rows) for j in results.values()} == {6}
    assert table[1]["recall"] == table[0]["recall"] and table[0]["frechet"] == pytest.approx(0, abs=1e-6)
    assert table[2]["frechet"] > 1


# --- ESC-50 ---


class Tones:
    """Stands for a conditioner: finds which multiple of 440 Hz a tone is, and knows which class has which."""

    config = SimpleNamespace(sample_rate=48_000)

    def __init__(self, known):
        self.known, self.read = known, []

    def embed_audio(self, waveform, sample_rate):
        assert sample_rate == 48_000 and waveform.shape == (240_000,)
        assert waveform.abs().max() < 0.4  # as recorded: not AudioLDM's level
        hertz = waveform.stft(4096, window=torch.ones(4096), return_complex=True).abs().mean(1).argmax() * 48_000 / 4096
        return torch.eye(3)[round(hertz.item() / 440) - 1][None]

    def embed_text(self, captions):
        self.read += captions
        return torch.stack([torch.eye(3)[self.known.index(caption)] for caption in captions])


def test_esc50_is_classified_with_the_published_prompts_at_the_rate_of_the_conditioner(tmp_path):
    folder = write_esc50(tmp_path / "ESC-50-master")
    names = ["dog", "sea waves", "hand saw"]  # 440, 880 and 1320 Hz
    for prompt in ESC50_PROMPTS.values():
        clap = Tones([prompt.format(name) for name in names])
        assert zero_shot_esc50(clap, prompt, folder).accuracy == 1
        assert clap.read == [prompt.format(name) for name in sorted(names)]
    confused, seen = Tones(["a dog", "a hand saw", "a sea waves"]), []
    result = zero_shot_esc50(confused, "a {}", folder, lambda done, every: seen.append((done, every)))
    assert result.accuracy == pytest.approx(1 / 3) and seen == [(k, 6) for k in range(1, 7)]


def test_a_name_in_esc50_does_not_lead_out_of_its_audio(tmp_path):
    folder = write_esc50(tmp_path / "ESC-50-master")
    (folder / "meta" / "esc50.csv").write_text("filename,category\n../../secret.wav,dog\n/etc/passwd,cat\n")
    assert [path.parent for path in read_esc50(folder)[0]] == [folder / "audio"] * 2


def test_what_is_no_esc50_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="meta/esc50.csv: give the folder that holds ESC-50's meta/ and audio/"):
        read_esc50(tmp_path)
    (tmp_path / "meta").mkdir()
    for content, found in (("", r"\[\]"), ("file,label\na.wav,dog\n", r"\['file', 'label'\]")):
        (tmp_path / "meta" / "esc50.csv").write_text(content)
        with pytest.raises(ValueError, match=f"esc50.csv: expected a column 'filename', its header is {found}"):
            read_esc50(tmp_path)


@pytest.mark.parametrize("name, published", [("ms-clap-2023", 0.939), ("laion-clap", 0.910)])
def test_a_conditioner_is_accepted_within_one_point_of_the_published_figure(name, published):
    for accuracy in (published, published - 0.009, published + 0.009):
        accept_conditioner(name, accuracy)
    for accuracy in (published - 0.011, published + 0.011, 0.60, float("nan")):
        with pytest.raises(ValueError, match="no model is trained on its embeddings"):
            accept_conditioner(name, accuracy)
