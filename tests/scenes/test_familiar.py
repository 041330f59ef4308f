import json

import pytest

from refined_ldm.clap import Clap
from refined_ldm.cli import main
from refined_ldm.scenes.familiar import known_captions, nearest_captions, unseen_words
from refined_ldm.text_to_audio import RefinedAudioLDM


@pytest.fixture(scope="module", params=["tiny-gpt2", "tiny-roberta"])
def clap(request):
    return Clap.load(request.param)


def test_words_that_no_scene_is_captioned_with_are_found(clap):
    assert unseen_words(clap, "a cat meows, then a dog barks") == ["cat", "meows,"]
    assert not any(unseen_words(clap, caption) for caption in known_captions())
    assert unseen_words(clap, "A dog barks twice.") == [] and unseen_words(clap, "a cow moos!") == ["cow", "moos"]


def test_the_nearest_captions_are_of_the_same_sound(clap):
    assert nearest_captions(clap, "a dog barks", 1) == ["a dog barks"]
    assert "a telephone rings" in nearest_captions(clap, "a telephone is ringing")


def test_a_conditioner_that_shares_no_embedding_gives_no_note(clap):
    other = Clap(clap.config)
    assert unseen_words(other, "a cat meows") == []


def test_generate_names_unknown_words(tmp_path, capsys):
    assert main(["generate", "a cat meows", "--steps", "1", "--json", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "cat, meows" in printed.err and "the nearest captions" in json.loads(printed.out)["notes"][0]


def test_familiar_captions_need_no_note():
    assert RefinedAudioLDM.from_preset("tiny").unfamiliar(["a dog barks twice", "Rain falls"]) == []
