"""File names from captions: valid on every system, of limited length, and one for each sound."""

import os
import re
import unicodedata
from pathlib import Path

import torch

from refined_ldm.audio import save_audio

MOST = 120  # bytes of a name from a caption; encrypted disks take 143, and a number and an ending come behind
FORBIDDEN = r'[\x00-\x1f\x7f/\\:*?"<>|]'  # characters that some system forbids in a file name
RESERVED = r"(?i:con|prn|aux|nul|(com|lpt)[0-9¹²³])(\..*)?"  # names of devices on some systems, with any ending
JOINERS = "\u200c\u200d"  # format characters that words of some scripts are written with


def caption_name(caption: str, joint: str = "-", punctuation: bool = False) -> str:
    """The words of a caption, as a file name without its ending: at most `MOST` bytes, cut between letters.

    joint: the separator of words. punctuation: whether to keep punctuation that every system allows. Letters
    keep their combining marks.
    """
    text = unicodedata.normalize("NFC", caption)
    words = "".join(c if _stays(c, punctuation) else " " for c in text).split()
    marks = "".join(filter(_is_mark, text))  # none stands at the beginning of a word
    name = _cut(joint.join(word for word in (word.lstrip(marks) for word in words) if word)).strip("-_").lstrip(marks)
    if re.fullmatch(RESERVED, name):
        name += "_"
    return name or "untitled"


def name_fault(name: str) -> str:
    """Why some system could not keep a file called `name`, or would not show it; "" if all can."""
    if len(name.encode()) > 200:
        return f"the name has {len(name.encode())} bytes"
    if name.startswith("."):
        return "a name that begins with a dot is hidden"
    if re.fullmatch(RESERVED, name):
        return "some systems keep this name for a device"
    return "this is no file name on every system" if re.search(FORBIDDEN, name) or not name.strip(". ") else ""


def numbered_name(taken: dict[str, int], stem: str) -> str:
    """The stem, numbered if it is `taken`, where upper and lower case are the same; taken: {`name_key`: last number}"""
    name, number = stem, taken.get(name_key(stem), 1)
    while name_key(name) in taken:
        number += 1
        name = f"{stem}-{number}"
    taken[name_key(name)] = 1
    taken[name_key(stem)] = number
    return name


def name_key(stem: str) -> str:
    """A key that is equal for two names if some system treats them as one."""
    return unicodedata.normalize("NFC", stem).casefold()


class SoundFolder:
    """A folder of WAV files; a new file whose name is taken gets a number instead of replacing the earlier one."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.taken = {name_key(name[:-4]): 1 for name in os.listdir(self.folder) if name.lower().endswith(".wav")}

    def add(self, stem: str, waveform: torch.Tensor, sample_rate: int) -> Path:
        """Write a waveform (N,) as stem.wav, or stem-2.wav, … -> its path."""
        while True:
            path = self.folder / f"{numbered_name(self.taken, stem)}.wav"
            try:
                return save_audio(path, waveform, sample_rate, replace=False)
            except FileExistsError:  # another process has just written it
                continue


def _stays(character, punctuation):
    kind = unicodedata.category(character)
    if kind[0] in "LMN" or kind in ("So", "Sk") or character in f"_{JOINERS}":  # So, Sk: emoji
        return True
    return punctuation and kind[0] in "PS" and character not in "'." and not re.match(FORBIDDEN, character)


def _is_mark(character):
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Sk") or character in JOINERS


def _cut(name):
    """The first `MOST` bytes at most, ending with a whole letter and all its marks."""
    short = name.encode()[:MOST].decode(errors="ignore")
    end = len(short)
    while 0 < end < len(name) and _is_mark(name[end]):
        end -= 1
    return name[:end] or short
