import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch

from refined_ldm.scenes import dataset as scenes
from refined_ldm.scenes.captions import NUMBERS, TIMES
from refined_ldm.scenes.classes import CLASSES, FROM_FONT
from refined_ldm.scenes.dataset import KINDS, SPLIT_KINDS, SoundScenes, captions_of, is_held_out
from refined_ldm.scenes.synthesis import SAMPLE_RATE

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def items():
    dataset = SoundScenes("train", size=90)
    return [dataset[i] for i in range(len(dataset))]


def assert_same(a, b):
    torch.testing.assert_close(a["waveform"], b["waveform"])
    assert {**a, "waveform": None} == {**b, "waveform": None}


# ---------------------------------------------------------------- items


@pytest.mark.parametrize("seconds", [1, 2.56, 3.333])
@pytest.mark.parametrize("split", SPLIT_KINDS)
def test_items_are_normalised_and_of_the_asked_length(split, seconds):
    dataset = SoundScenes(split, size=9, seconds=seconds)
    for i in range(9):
        waveform = dataset[i]["waveform"]
        assert waveform.shape == (round(seconds * SAMPLE_RATE),) and waveform.dtype == torch.float32
        assert waveform.isfinite().all()
        assert waveform.abs().max().item() == pytest.approx(0.5, abs=1e-4)
        assert abs(waveform.mean()) < 1e-5
        assert waveform[[0, -1]].abs().max() < 2e-3  # no click at either end
        for event in dataset[i]["events"]:
            assert 0 <= event.onset < event.offset <= seconds


def test_there_are_about_thirty_classes_and_all_of_them_come_up():
    dataset = SoundScenes("train", size=600)
    assert len(dataset.classes) >= 30 and set(dataset.classes) == set(CLASSES)
    kind = KINDS.index("event")
    drawn = Counter(dataset._choose(f"scene {i}", KINDS[kind])[0] for i in range(2000))
    assert set(drawn) == set(CLASSES) and max(drawn.values()) < 3 * min(drawn.values())


def test_kinds_come_in_thirds_and_pieces_match_them(items):
    assert Counter(item["kind"] for item in items) == {kind: 30 for kind in KINDS}
    for item in items:
        assert len(item["events"]) == (1 if item["kind"] == "event" else 2)
        assert len({event.name for event in item["events"]}) == len(item["events"])
        if item["kind"] == "sequence":
            assert item["events"][1].onset > item["events"][0].offset + 0.03
        if item["kind"] == "overlap":
            first, second = item["events"]
            shared = min(first.offset, second.offset) - max(first.onset, second.onset)
            assert shared > 0.9 * min(first.offset - first.onset, second.offset - second.onset)


def test_events_sound_where_they_are_said_to(items):
    for item in items:
        power = item["waveform"].numpy() ** 2
        inside = np.zeros(len(power), bool)
        for event in item["events"]:
            span = slice(int(event.onset * SAMPLE_RATE), int(event.offset * SAMPLE_RATE) + 1)
            inside[span] = True
            assert power[span].max() > 1e-4 * power.max()
        assert power[~inside].sum() < 1e-5 * power.sum()


# ---------------------------------------------------------------- reproducibility


def test_same_scene_for_any_size_and_in_any_order():
    small, large = SoundScenes("val", size=5, seed=3), SoundScenes("val", size=5000, seed=3)
    for i in (4, 0, 2):
        assert_same(small[i], large[i])
    assert_same(small[0], pickle.loads(pickle.dumps(large))[0])
    assert not torch.allclose(small[0]["waveform"], SoundScenes("val", size=5, seed=4)[0]["waveform"])


def test_one_kind_alone_gives_the_scenes_it_names():
    both = SoundScenes("train", size=6)
    for i, kind in enumerate(KINDS):
        alone = SoundScenes("train", size=6, kinds=(kind,))
        assert {alone[j]["kind"] for j in range(6)} == {kind}
        assert_same(both[i + 3], alone[i + 3])


def test_a_class_added_later_changes_only_the_scenes_that_choose_it(monkeypatch):
    dataset = SoundScenes("train", size=30)
    before = [dataset[i] for i in range(30)]
    monkeypatch.setitem(scenes.CLASSES, "aardvark", CLASSES["dog"])
    dataset = SoundScenes("train", size=30)
    kept = 0
    for i in range(30):
        after = dataset[i]
        if "aardvark" not in [event.name for event in after["events"]]:
            assert_same(before[i], after)
            kept += 1
    assert kept >= 20


def test_the_published_scenes_stay_what_they_are():
    dataset = SoundScenes("train", size=3)
    names = [tuple(event.name for event in dataset[i]["events"]) for i in range(3)]
    assert names == [("flute",), ("bell", "siren"), ("guitar", "alarm")]


# ---------------------------------------------------------------- splits


def test_splits_have_scenes_of_their_own():
    first = [SoundScenes(split, kinds=("overlap",))[0] for split in ("train", "val", "test", "test_pairs")]
    assert len({item["id"] for item in first}) == 4
    assert len({item["waveform"].numpy().tobytes() for item in first}) == 4


def test_pairs_held_out_are_never_trained_on():
    names = SoundScenes().classes
    pairs = [(a, b) for a in names for b in names if a < b]
    share = sum(is_held_out(a, b) for a, b in pairs) / len(pairs)
    assert 1 / 9 < share < 1 / 5.5 and all(is_held_out(a, b) == is_held_out(b, a) for a, b in pairs)
    for split in SPLIT_KINDS:
        dataset = SoundScenes(split)
        drawn = {dataset._choose(f"{split} {i}", "overlap") for i in range(1500)}
        assert all(is_held_out(*pair) == (split == "test_pairs") for pair in drawn)


def test_order_comes_in_couples_of_the_same_sounds():
    dataset = SoundScenes("test_order", size=6)
    for i in range(0, 6, 2):
        ab, ba = dataset[i], dataset[i + 1]
        assert ab["labels"] == ba["labels"][::-1] and len(ab["labels"]) == 2
        for event, other in zip(ab["events"], ba["events"][::-1], strict=True):
            assert scenes.replace(event, onset=0, offset=0) == scenes.replace(other, onset=0, offset=0)
            length = int((event.offset - event.onset) * SAMPLE_RATE) - 2
            pieces = [
                item["waveform"][round(e.onset * SAMPLE_RATE) :][:length] for item, e in ((ab, event), (ba, other))
            ]
            torch.testing.assert_close(*pieces, atol=2e-3, rtol=0)


# ---------------------------------------------------------------- captions


def test_captions_are_three_different_sentences_without_slots_left(items):
    for item in items:
        assert len(set(item["captions"])) == 3 and item["caption"] == item["captions"][0]
        for caption in item["captions"]:
            assert re.fullmatch(r"[A-Za-z' ,-]+", caption) and "  " not in caption, caption
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|\bNone\b", caption), caption


def test_counts_in_captions_are_the_counts_rendered():
    dataset = SoundScenes("train", size=240, kinds=("event",))
    named = 0
    for i in range(240):
        item = dataset[i]
        (event,) = item["events"]
        for caption in item["captions"]:
            found = [n for n in range(1, 7) if f"{TIMES[n]} " in f"{caption} "]
            things = "(low |high )?(notes|chords|steps)"
            found += [n for n in range(2, 7) if re.search(rf"\b{NUMBERS[n]} {things}", caption)]
            found += [1] * bool(re.search(r"\b(single|a) (low |high )?(note|chord|step)\b", caption))
            assert set(found) <= {event.count}, (caption, event)
            named += bool(found)
    assert named > 40


def test_attributes_in_captions_are_true():
    dataset = SoundScenes("train", size=240, kinds=("event",))
    seen = Counter()
    for i in range(240):
        item = dataset[i]
        (event,) = item["events"]
        sound = CLASSES[event.name]
        for caption in item["captions"]:
            low, high = (word in caption.split() for word in sound.low_high or ("-", "-"))
            slow, fast = (f" {word}" in caption for word in sound.slow_fast or ("-", "-"))
            assert not low or event.pitch < sound.pitches[0]
            assert not high or event.pitch > sound.pitches[1]
            assert not slow or event.rate < sound.rates[0]
            assert not fast or event.rate > sound.rates[1]
            assert "distan" not in caption or event.distant
            assert not re.search("softly|quietly|loudly|background", caption)  # there is nothing to compare with
            seen.update(low=low, high=high, slow=slow, fast=fast, distant="distan" in caption)
    assert min(seen[word] for word in ("low", "high", "slow", "fast", "distant")) > 0, seen


def words_of(name):
    """What tells a class in a caption: its subject, verbs and objects without their articles."""
    parts = [re.split(r"[| #*]+", phrase) for phrase in CLASSES[name].phrases]
    return {word for part in parts for word in part if len(word) > 2} - {"someone", "person", "plays", "playing", "the"}


def test_captions_name_the_labels_in_the_order_they_sound(items):
    for item in items:
        assert set(item["labels"]) <= {event.name for event in item["events"]}
        for caption in item["captions"]:
            at = [min((m.start() for w in words_of(n) for m in re.finditer(rf"\b{w}\b", caption.lower())), default=-1)
                  for n in item["labels"]]  # fmt: skip
            assert min(at) >= 0, (caption, item["labels"])
            if item["kind"] == "sequence":
                second_first = re.search(r"\w after ", caption) is not None
                assert (at[0] > at[1]) == second_first, (caption, item["labels"])


def test_what_is_masked_is_brought_up_or_not_captioned():
    loud = np.random.default_rng(0).standard_normal(40_960)
    quiet = 1e-4 * np.sin(np.arange(40_960) * 0.5)
    assert not scenes._audible(scenes._band_power(quiet), 0, scenes._band_power(loud), 0)
    assert scenes._audible(scenes._band_power(quiet), 80, scenes._band_power(loud), 0)
    event = scenes.Event("dog", 0, 2.56, 300, 1, 0.0, 1.0, False)
    parts = [(quiet, event), (loud, scenes.replace(event, name="rain"))]
    _, events, audible = scenes._mix(np.random.default_rng(1), "overlap", parts, 2.56)
    assert audible == [False, True] or events[0].gain > events[1].gain + 10


# ---------------------------------------------------------------- choices


def test_procedural_mode_needs_no_font(monkeypatch):
    def missing():
        raise FileNotFoundError("no SoundFont")

    monkeypatch.setattr(scenes.soundfont, "find_soundfont", missing)
    with pytest.raises(FileNotFoundError):
        SoundScenes("train")
    dataset = SoundScenes("train", size=12, sources="procedural")
    assert len(dataset.classes) >= 20 and not FROM_FONT & set(dataset.classes)
    for i in range(12):
        assert set(dataset[i]["labels"]) <= set(dataset.classes)


def test_procedural_scenes_are_those_of_the_whole_set():
    whole, part = SoundScenes("train", size=30), SoundScenes("train", size=30, sources="procedural")
    procedural = [i for i in range(0, 30, 3) if whole[i]["labels"][0] not in FROM_FONT]  # of the scenes of one event
    assert len(procedural) > 3
    for i in procedural:
        assert_same(whole[i], part[i])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"split": "dev"}, "split must be one of"),
        ({"kinds": ("event", "chord")}, "kinds must be among"),
        ({"sources": "mine"}, "sources must be"),
        ({"seconds": 0.5}, "at least 1"),
        ({"split": "test_pairs", "kinds": ("event",)}, "sequence, overlap only"),
    ],
)
def test_wrong_choices_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SoundScenes(**wrong)


def test_an_index_past_the_end_is_refused():
    with pytest.raises(IndexError):
        SoundScenes(size=3)[3]


def test_whole_floats_are_integers_and_other_numbers_are_refused():
    dataset = SoundScenes("test", 4.0, seed=0.0, sources="procedural")
    assert dataset.fingerprint() == SoundScenes("test", 4, seed=0, sources="procedural").fingerprint()
    assert dataset[1.0]["id"] == dataset[1]["id"] == "test-0-1-sequence" and len(dataset) == 4
    for wrong in (1.5, True, float("nan"), "1", -1):
        for call in (lambda n: SoundScenes("test", n), lambda n: SoundScenes("test", seed=n), lambda n: dataset[n]):
            with pytest.raises((ValueError, IndexError), match="must be a whole number|scene -1 of 4"):
                call(wrong)


def test_further_captions_are_a_whole_number_of_them():
    item = SoundScenes("train", size=4)[2]
    assert captions_of(item, 4.0) == captions_of(item, 4) and len(captions_of(item, 4)) == 4
    for count in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="count must be a whole number, 1 or more"):
            captions_of(item, count)


def test_an_exchanged_event_leaves_the_rest_of_the_scene_as_it_is():
    scenes = SoundScenes("test", size=4, kinds=("sequence",))
    for index in range(4):
        first, second = scenes[index]["events"]
        before, after = scenes.exchange(index, 1, "dog")
        torch.testing.assert_close(before["waveform"], scenes[index]["waveform"], atol=1e-3, rtol=0)
        start = round(second.onset * 16_000)
        assert torch.equal(before["waveform"][:start], after["waveform"][:start])
        assert not torch.equal(before["waveform"], after["waveform"])
        assert after["labels"] == (first.name, "dog") and after["events"][1].onset == second.onset
        _, gap = scenes.exchange(index, 1, None)
        end = round(second.offset * 16_000)
        assert gap["labels"] == (first.name,) and gap["waveform"][start:end].abs().max() < 0.01
        assert torch.equal(gap["waveform"][:start], before["waveform"][:start])


def test_only_an_event_of_a_sequence_can_be_exchanged():
    scenes = SoundScenes("test", size=3)
    for index, place in ((0, 0), (2, 1), (1, 2)):
        with pytest.raises(ValueError, match="an event of a sequence can be exchanged"):
            scenes.exchange(index, place, "dog")
