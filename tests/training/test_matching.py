import random
from dataclasses import replace

import pytest
import torch

from refined_ldm.adapters.candidates import QUIET
from refined_ldm.adapters.matcher import MATCHER_FILE, Matcher, MatcherConfig
from refined_ldm.evaluation.details import named_details
from refined_ldm.scenes.dataset import SoundScenes, captions_of
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.training.contrasts import answers_of
from refined_ldm.training.matching import MATCHING, NAMES, DetailReader, audible_details, draw_pairs, train_matcher
from tests.support import small

SMALL = MatcherConfig(2, 8, 4, embedding_dim=6, width=32, layers=1, questions=2)


def test_what_captions_say_is_audible():
    """Captions tell the truth, so a reader that is right about a scene agrees with every caption of it."""
    scenes, compared = SoundScenes("val", 40, seed=3), 0
    for k in range(len(scenes)):
        item = scenes[k]
        heard = dict(audible_details(item))
        for caption in captions_of(item, 3, detailed=1.0):
            assert {clause.name for clause in caption.clauses} == heard.keys()
            for detail, of in named_details(caption).items():
                for name, value in of:
                    assert heard[name][detail] == value - (detail == "number"), (str(caption), detail)
                    compared += 1
    assert compared > 100


def test_pairs_are_true_for_the_own_caption_and_false_for_twins_and_contradictions():
    scenes = SoundScenes("val", 12, seed=1, kinds=("event",))
    written = [captions_of(scenes[k], 1, detailed=1.0) for k in range(8)]
    row, captions, true = draw_pairs(written, random.Random(0))
    assert sum(true) == 8 and len(row) == len(captions) == len(true) > 16
    for i, (caption,) in enumerate(written):
        of = [(text, label) for k, text, label in zip(row, captions, true, strict=True) if k == i]
        assert of[0] == (str(caption), 1.0) and all(label == 0 for _, label in of[1:])
        twins = {str(twin) for others in caption.contrasts().values() for twin in others}
        assert len({text for text, _ in of} & twins) == min(4, len(twins))
        for (other,) in written:  # no caption that says the same is called false
            assert answers_of(other) != answers_of(caption) or str(other) not in [text for text, _ in of[1:]]


def test_the_matcher_learns_a_count_that_an_average_would_miss():
    """Latents with one or two equal bumps; the caption's embedding says which. The sum over frames tells them apart."""
    torch.manual_seed(0)
    matcher, generator = Matcher(SMALL), torch.Generator().manual_seed(1)
    says = torch.nn.functional.normalize(torch.randn(2, 6, generator=generator), dim=1)

    def batch(n=32):
        count = torch.randint(2, (n,), generator=generator)
        z = 0.1 * torch.randn(n, 2, 8, 4, generator=generator)
        for k in range(n):
            z[k, :, torch.randperm(8, generator=generator)[: 1 + count[k]]] += 2
        return z, count

    optimizer = torch.optim.AdamW(matcher.parameters(), 3e-3)
    for _ in range(150):
        z, count = batch()
        logits = matcher(torch.cat([z, z]), torch.arange(64), torch.cat([says[count], says[1 - count]]))
        true = torch.cat([torch.ones(32), torch.zeros(32)])
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(logits, true).backward()
        optimizer.step()
    matcher.eval()
    z, count = batch(64)
    with torch.no_grad():
        right, wrong = (matcher(z, torch.arange(64), says[c]) for c in (count, 1 - count))
    assert (right > wrong).float().mean() > 0.9


def test_a_saved_matcher_is_the_same_and_other_files_are_refused(tmp_path):
    matcher = Matcher(SMALL).eval()
    z, c = torch.randn(3, 2, 8, 4), torch.randn(3, 6)
    matcher.save(tmp_path / "m.safetensors", torch.float32)
    again = Matcher.load(tmp_path / "m.safetensors")
    assert again.config == SMALL and torch.equal(again(z, torch.arange(3), c), matcher(z, torch.arange(3), c))
    assert matcher.fits((2, 8, 4), 6) and not matcher.fits((2, 4, 4), 6) and not matcher.fits((2, 8, 4), 12)
    DetailReader(matcher)
    with pytest.raises(FileNotFoundError):
        Matcher.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="must be positive"):
        MatcherConfig(frames=0)


class Prefers:
    """A matcher that prefers the second of every two candidates, and takes note of what it is asked."""

    def __init__(self, size):
        self.size, self.asked = size, []

    rank = Matcher.rank

    def fits(self, shape, embedding_dim):
        return shape[1] == 8

    def __call__(self, latent, row, embedding):
        self.asked.append((latent, embedding))
        return torch.arange(len(latent)).float() % self.size


def test_generate_keeps_the_candidate_that_the_matcher_prefers_and_decodes_no_other(monkeypatch):
    model = small.loud_model(monkeypatch)
    nearest = model.generate(["rain", "a bell"], candidates=3, seed=1)
    decoded = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda latent: decoded.append(len(latent)) or decode(latent))
    monkeypatch.setattr(model, "matcher", prefers := Prefers(3))
    found = model.generate(["rain", "a bell"], candidates=3, seed=1)
    assert decoded == [2] and found.shape == nearest.shape
    latent, embedding = prefers.asked[0]
    assert len(latent) == 6 and torch.equal(embedding[0], embedding[2])
    with torch.no_grad():
        expected = model.to_waveform(decode(latent[[2, 5]]))[:, : found.shape[1]]
    torch.testing.assert_close(found, expected)
    prefers.asked.clear()
    model.generate(["rain"], candidates=1)
    assert not prefers.asked


def test_few_candidates_are_drawn_where_they_would_all_be_decoded(monkeypatch):
    model = small.loud_model(monkeypatch, candidates=5)
    drawn = []
    sample = model.sample_latent
    monkeypatch.setattr(model, "sample_latent", lambda c, *z, **given: drawn.append(len(c)) or sample(c, *z, **given))
    model.generate(["rain"])  # no matcher: as configured
    monkeypatch.setattr(model, "matcher", Prefers(5))
    for how in ({}, {"sampler": "ddim"}, {"seconds": 0.64}, {"sampler": "ddim", "candidates": 3}):
        model.generate(["rain"], **how)
    assert drawn == [5, 5, 2, 2, 3]


def test_a_faint_candidate_gives_way_to_the_next_best(monkeypatch):
    model = small.loud_model(monkeypatch)
    monkeypatch.setattr(model, "matcher", Prefers(3))
    to_waveform, heard = model.to_waveform, []

    def first_is_faint(mel):
        heard.append(len(mel))
        return to_waveform(mel) * (1.0 if len(heard) > 1 else torch.tensor([[1.0], [1e-3]]))

    monkeypatch.setattr(model, "to_waveform", first_is_faint)
    found = model.generate(["rain", "a bell"], candidates=3, seed=1)
    assert heard == [2, 1] and (found.abs().amax(1) > QUIET).all()


def test_where_all_candidates_are_quiet_one_is_drawn_again_and_the_loudest_is_kept(monkeypatch):
    model, notes = small.loud_model(monkeypatch), []
    monkeypatch.setattr(model, "matcher", Prefers(3))
    to_waveform, peaks = model.to_waveform, iter([0.004, 0.009, 0.002, 0.011, 0.006, 0.3])

    def of_these_peaks(mel):
        waveform = to_waveform(mel)
        return waveform / waveform.abs().amax() * next(peaks)

    monkeypatch.setattr(model, "to_waveform", of_these_peaks)
    found = model.generate(["rain"], candidates=3, seed=1, on_note=notes.append)
    assert found.abs().amax().item() == pytest.approx(0.3)
    assert [note.partition(" was ")[2] for note in notes] == [
        f"too quiet and is drawn again ({k} of 3 times)" for k in (1, 2, 3)
    ]
    peaks = iter([0.004, 0.009, 0.002, 0.008, 0.006, 0.003])
    assert model.generate(["rain"], candidates=3, seed=1).abs().amax().item() == pytest.approx(0.009)


def test_a_model_is_saved_and_loaded_with_its_matcher(monkeypatch, tmp_path):
    model = small.awake_model(monkeypatch)
    model.matcher = Matcher(replace(SMALL, embedding_dim=12)).eval()
    model.save(tmp_path / "model")
    again = RefinedAudioLDM.load(tmp_path / "model")
    assert (tmp_path / "model" / MATCHER_FILE).is_file()
    assert all(torch.equal(a, b) for a, b in zip(again.matcher.parameters(), model.matcher.parameters(), strict=True))
    assert again.digest() == model.digest()
    again.load_part("clap", tmp_path / "model")
    assert again.matcher is None  # another conditioner


@pytest.fixture
def base(tmp_path, monkeypatch):
    """-> a function that returns the same trained model of scenes each time; the shortest scenes last a second."""
    small.awake_model(monkeypatch, seconds=1.28).save(tmp_path / "model")
    return lambda: RefinedAudioLDM.load(tmp_path / "model", data="scenes", clips=12)


def test_training_resumes_and_gives_the_model_its_matcher(base, tmp_path):
    settings = replace(MATCHING, max_steps=3, batch_size=4, save_every=1)
    model = base()
    steps = list(train_matcher(model, tmp_path / "whole", settings))
    assert {"details", "match"} <= steps[0].losses.keys() and model.matcher.config.frames == 32
    assert len(NAMES) > 20 and not model.matcher.training
    stopped = train_matcher(base(), tmp_path / "stopped", settings)
    next(stopped), next(stopped)
    stopped.close()
    list(train_matcher(base(), tmp_path / "stopped", settings, resume=True))
    one, other = (Matcher.load(tmp_path / name / MATCHER_FILE).state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(FileExistsError, match="is there already"):
        next(train_matcher(base(), tmp_path / "whole", settings))


def test_recordings_are_refused_before_any_work(base, tmp_path):
    model = base()
    model.config = replace(model.config, data=str(tmp_path))
    with pytest.raises(ValueError, match="it takes scenes, not recordings"):
        next(train_matcher(model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
