import random
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from refined_ldm.clap import Clap, contrastive_loss
from refined_ldm.config import StageConfig
from refined_ldm.data.caches import Cached
from refined_ldm.scenes.captions import Caption, Clause
from refined_ldm.scenes.dataset import SoundScenes, captions_of
from refined_ldm.training.contrasts import (
    ANSWERS,
    QUESTIONS,
    ContrastedClips,
    KindredSampler,
    WrittenClips,
    answers_of,
    draw_twins,
    may_agree,
    nearness_loss,
    probe_loss,
    train_audio_details,
    train_text_details,
    twin_loss,
)
from refined_ldm.training.inputs import cached_clips
from tests.support import small

DOG = Clause("dog", "a *dog|barks|barking|", count=2, counted=True, adjective="big")
BELL = Clause("bell", "a *bell|rings|ringing|", count=1)
THEN = Caption("sequence", "{a}, then {b}", (DOG, BELL))


def test_twins_differ_in_one_detail():
    assert str(THEN) == "a big dog barks twice, then a bell rings"
    twins = THEN.contrasts()
    assert set(twins) == {"number", "pitch", "order"}
    assert [str(c) for c in twins["order"]] == ["a bell rings, then a big dog barks twice"]
    assert [str(c) for c in twins["pitch"]] == ["a small dog barks twice, then a bell rings"]
    assert str(twins["number"][0]) == "a big dog barks once, then a bell rings" and len(twins["number"]) == 5


def test_a_caption_has_no_twin_in_what_it_does_not_say():
    flute = Clause("flute", "a *flute|plays|playing|", count=3, counted=True, adjective="low")  # its notes go unnamed
    assert str(Caption("event", "{a}", (flute,))) == "a flute plays" and not flute.details()
    assert not Caption("event", "{a}", (flute,)).contrasts()


@pytest.mark.parametrize("seed", range(3))
def test_twins_are_never_true_of_their_scene(seed):
    scenes = SoundScenes("val", 30, seed=seed)
    for item in (scenes[i] for i in range(30)):
        true = {str(c) for c in captions_of(item)}
        assert true == set(item["captions"])
        for caption in captions_of(item) + captions_of(item, 3, detailed=1.0):
            named = [clause.details() for clause in caption.clauses]
            for detail, others in caption.contrasts().items():
                for other in others:
                    assert str(other) != str(caption)
                    named_by_twin = [clause.details() for clause in other.clauses]
                    if detail != "order":
                        pairs = list(zip(named, named_by_twin, strict=True))
                        changed = [k for a, b in pairs for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
                        assert changed == [detail]


def test_more_captions_are_the_same_every_time_and_name_more():
    item = SoundScenes("train", 3)[2]
    assert list(map(str, captions_of(item, 5))) == list(map(str, captions_of(item, 5)))
    scenes = [SoundScenes("train", 40)[i] for i in range(40)]

    def named(share):
        captions = [c for item in scenes for c in captions_of(item, 2, detailed=share)]
        return sum(len(clause.details()) for caption in captions for clause in caption.clauses)

    plain, rich = named(0.0), named(1.0)
    assert plain == 0 and rich > 40


def test_draws_take_every_detail_before_a_second_of_one():
    for seed in range(5):
        drawn = draw_twins(THEN, random.Random(seed), 3)
        orders = [c for c in drawn if c.clauses == THEN.clauses[::-1]]
        assert len(drawn) == 3 and len(orders) == 1
    assert draw_twins(Caption("event", "{a}", (BELL,)), random.Random(0), 3) == []


def test_answers_say_what_the_caption_says():
    answers = answers_of(THEN)
    assert len(answers) == len(QUESTIONS) and all(0 <= a < n for a, n in zip(answers, QUESTIONS, strict=True))
    named = dict(zip(ANSWERS, answers[1:7], strict=True))
    assert named["number"] == 2 and named["pitch"] == 1 and named["pace"] == 0 and answers[0] == 1
    assert answers_of(Caption("event", "{a}", (BELL,)))[7:] == [0] * 6


def test_the_twin_loss_is_the_cross_entropy_of_each_row():
    torch.manual_seed(0)
    audio, text, twins = (F.normalize(torch.randn(n, 8), dim=1) for n in (3, 3, 3))
    row, scale = torch.tensor([0, 0, 2]), torch.tensor(1.0)
    rows = {0: torch.stack([text[0], twins[0], twins[1]]), 2: torch.stack([text[2], twins[2]])}
    known = [F.cross_entropy(scale.exp() * (of @ audio[i])[None], torch.tensor([0])) for i, of in rows.items()]
    torch.testing.assert_close(twin_loss(audio, text, twins, row, scale), torch.stack(known).mean())
    assert twin_loss(audio, text, twins[:0], row[:0], scale) == 0


def test_captions_agree_unless_they_contradict_each_other():
    once, vague = replace(DOG, count=1), replace(DOG, counted=False, adjective="")
    captions = [
        Caption("event", "{a}", (DOG,)),
        Caption("event", "{a}", (vague,)),
        Caption("event", "{a}", (once,)),
        Caption("event", "{a}", (BELL,)),
        THEN,
        Caption("sequence", "{a}, then {b}", (BELL, DOG)),
        Caption("overlap", "{a} and {b}", (BELL, DOG)),
        Caption("overlap", "{a} and {b}", (vague, BELL)),
    ]
    agree = may_agree(torch.tensor([answers_of(caption) for caption in captions]))
    pairs = {(i, j) for i in range(8) for j in range(i) if agree[i, j]}
    assert pairs == {(1, 0), (2, 1), (7, 6)} and agree.diagonal().all() and torch.equal(agree, agree.T)


def test_what_may_agree_is_left_out_of_the_contrastive_loss():
    torch.manual_seed(0)
    audio, text = (F.normalize(torch.randn(3, 8), dim=1) for _ in range(2))
    scale, alone, agree = torch.tensor(1.0), torch.eye(3, dtype=torch.bool), torch.ones(3, 3, dtype=torch.bool)
    known = contrastive_loss(audio, text, scale)
    torch.testing.assert_close(contrastive_loss(audio, text, scale, alone), known)
    assert contrastive_loss(audio, text, scale, agree) == 0 < known


def test_batches_are_groups_of_kindred_scenes_and_resume():
    labels = 10 * [("dog", "bell"), ("dog",), ("bell", "dog")] + [("rain",)]
    sampler = KindredSampler(labels, 12, seed=3)
    batches = list(islice(sampler, 20))
    for batch in batches:
        groups = [{tuple(sorted(labels[i])) for i in batch[start : start + 4]} for start in (0, 4, 8)]
        assert len(batch) == 12 and (30 in batch or all(len(group) == 1 for group in groups))
    assert any(30 in batch for batch in batches)
    sampler.start_step = 15
    assert list(islice(sampler, 5)) == batches[15:] and batches[0] != batches[1]


def test_only_what_is_nearer_than_the_margin_is_pushed_away():
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    twins = torch.tensor([[0.6, 0.8], [0.0, 1.0]])  # cosines .6 and 0 to the first
    assert nearness_loss(text, twins, torch.tensor([0, 0]), margin=0.5) == pytest.approx(0.05)
    assert nearness_loss(text, twins[:0], torch.tensor([], dtype=torch.long)) == 0


def test_reading_is_perfect_where_the_logits_are():
    answers = torch.tensor([answers_of(THEN)])
    logits = torch.cat([100 * F.one_hot(answers[:, i], n) for i, n in enumerate(QUESTIONS)], dim=1)
    assert probe_loss(logits, answers) < 1e-3 < probe_loss(0.0 * logits, answers)


def test_reading_sounds_counts_what_their_captions_name():
    answers = torch.tensor([answers_of(THEN), answers_of(Caption("event", "{a}", (BELL,)))])
    logits = torch.cat([100.0 * F.one_hot(answers[:, i], n) for i, n in enumerate(QUESTIONS)], dim=1)
    pace = 1 + sum(QUESTIONS[: 1 + list(ANSWERS).index("pace")])
    wrong = logits.clone()
    wrong[:, pace] += 1000  # neither caption names the pace of its first sound
    assert probe_loss(wrong, answers, named=True) < 1e-3 < probe_loss(wrong, answers)


@pytest.fixture
def clips(tmp_path) -> Cached:
    return cached_clips(small.config(seconds=1.28, clips=8), tmp_path)


def test_each_tower_learns_alone(monkeypatch, clips):
    small.use_small_clap(monkeypatch)
    torch.manual_seed(0)
    clap = Clap(small.CLAP)
    settings = StageConfig(max_steps=3, batch_size=4, lr=1e-2)
    for train, tower in ((train_text_details, "text"), (train_audio_details, "audio")):
        before = {name: p.clone() for name, p in clap.named_parameters()}
        steps = list(train(clap, clips, settings))
        changed = {name.split(".")[0] for name, p in clap.named_parameters() if not torch.equal(p, before[name])}
        assert tower in changed and changed <= {tower, f"{tower}_projection", "logit_scale"}
        assert all(p.requires_grad for p in clap.parameters()) and len(steps) == 3


def test_captions_are_drawn_anew_and_sounds_left_out(clips):
    contrasted = ContrastedClips(clips, waveforms=False, embeddings=torch.eye(8))
    drawn = {contrasted[1]["written"][0][0] for _ in range(12)}
    assert len(drawn) > 1 and "waveform" not in contrasted[1]
    assert torch.equal(contrasted[3]["audio_embedding"], torch.eye(8)[3])
    assert len(WrittenClips(clips, 2)[0]["captions"]) == 5
