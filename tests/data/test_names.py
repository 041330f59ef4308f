"""File names from captions: cut by bytes, marks kept, hidden nowhere, never two captions to one."""

import unicodedata

import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from refined_ldm.data.names import MOST, SoundFolder, caption_name, name_fault, name_key, numbered_name


@pytest.mark.parametrize("caption, words, as_audioldm", [
    ("A dog barks!", "A-dog-barks", "A_dog_barks!"),
    ("झरना बहता है", "झरना-बहता-है", "झरना_बहता_है"),  # vowel signs are marks
    ("ศูนย์ฝนตก", "ศูนย์ฝนตก", "ศูนย์ฝนตก"),
    ("می\u200cبارد", "می\u200cبارد", "می\u200cبارد"),  # a joiner within a word
    ("cafe\u0301", "café", "café"),
    ("\u0301rain", "rain", "rain"),  # a mark without a letter
    (".hidden", "hidden", "hidden"), ("../../etc/passwd", "etc-passwd", "etc_passwd"), ("...", "untitled", "untitled"),
    ("-rf *", "rf", "rf"), ("rain\u202egnp.exe", "rain-gnp-exe", "rain_gnp_exe"), ("a\x00b\x9bc", "a-b-c", "a_b_c"),
    ("CON", "CON_", "CON_"), ("nul", "nul_", "nul_"), ("Lpt1", "Lpt1_", "Lpt1_"), ("console", "console", "console"),
    ("🐕 🐕", "🐕-🐕", "🐕_🐕"), ("\udcff", "untitled", "untitled"),
])  # fmt: skip
def test_a_caption_becomes_a_name_that_every_system_shows(caption, words, as_audioldm):
    assert (caption_name(caption), caption_name(caption, "_", punctuation=True)) == (words, as_audioldm)
    assert name_fault(words) == name_fault(as_audioldm) == ""


@pytest.mark.parametrize("letter", ["x", "é", "犬", "𠀀", "हि", "n\u0308\u0323", "🐕", "👍🏽"])
def test_long_names_are_cut_between_letters(letter):
    for before in range(8):
        name = caption_name("x" * before + letter * 200)
        assert MOST - len(letter.encode()) - 8 < len(name.encode()) <= MOST
        whole = unicodedata.normalize("NFC", letter)
        assert name.replace(whole, "").strip("x") == ""  # nothing of a letter is left behind
    assert len(caption_name("e" + "\u0323" * 300).encode()) <= MOST


@given(st.text(max_size=60) | st.text("́ाि.-_/\\ \u200d👍🏽conCON", max_size=200), st.booleans())
def test_any_caption_becomes_a_name(caption, punctuation):
    name = caption_name(caption, "_", punctuation)
    assert name and name_fault(name) == "" and len(name.encode()) <= MOST + 1
    assert unicodedata.category(name[0])[0] != "M" and unicodedata.is_normalized("NFC", name)


@pytest.mark.parametrize("name, message", [
    (".hidden", "hidden"), ("..", "hidden"), ("a/b", "no file name"), ("a\\b", "no file name"), (" . ", "no file name"),
    ("a\x00", "no file name"), ("con", "device"), ("COM1.tar", "device"), ("lpt²", "device"), ("é" * 101, "202 bytes"),
])  # fmt: skip
def test_a_name_that_was_given_has_a_fault(name, message):
    assert message in name_fault(name)


def test_names_that_some_system_takes_for_one_are_numbered():
    taken = {}
    given = ["Rain", "rain", "rain-2", "STRASSE", "straße", "caf\u00e9", "cafe\u0301"]
    found = [numbered_name(taken, name) for name in given]
    assert found == ["Rain", "rain-2", "rain-2-2", "STRASSE", "straße-2", "caf\u00e9", "cafe\u0301-2"]
    assert len({name_key(name) for name in found}) == len(given)


def test_a_folder_of_sounds_grows_and_loses_none(tmp_path, monkeypatch):
    (tmp_path / "Rain.WAV").write_bytes(b"precious")
    (tmp_path / "bell.txt").write_text("not a sound")
    folder = SoundFolder(tmp_path)
    paths = [folder.add(stem, torch.zeros(9), 16_000) for stem in ("rain", "rain", "bell")]
    assert [path.name for path in paths] == ["rain-2.wav", "rain-3.wav", "bell.wav"]
    other = SoundFolder(tmp_path)  # of another process, which has written since this one looked
    other.add("wind", torch.ones(5), 16_000)
    assert folder.add("wind", torch.zeros(9), 16_000).name == "wind-2.wav"
    assert soundfile.info(tmp_path / "wind.wav").frames == 5 and (tmp_path / "Rain.WAV").read_bytes() == b"precious"
