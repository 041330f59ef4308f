"""Captions that differ in one detail: the hard negatives of a conditioner that is to tell details apart.

A caption and its twin with another number, pitch, pace, loudness or order share nearly every word, so a contrastive
loss over a batch of other scenes hardly separates them. T-CLAP (Yuan et al. 2024) and CompA (Ghosh et al. 2024) let
language models write such twins; the grammar of `SoundScenes` writes them exactly.
"""

import math
import random

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from refined_ldm.scenes import captions_of

DETAILS = ("number", "pitch", "pace", "loudness", "order")
PER_CAPTION = 3  # negatives of one caption in a batch
DETAILED = 3  # captions beside a scene's own three, which name every detail they can
MARGIN = 0.5  # cosine that a caption and its twin are pushed below
TEXT_WEIGHT = 1.0  # of that push, beside the loss of sounds and captions


class ContrastedClips(Dataset):
    """Scenes with the captions of `detailed` drawings more, and for each caption its twins.

    contrasted[i] is clips[i] with "captions" (3 + `more` strings) and "contrasts": for each of them a dict of lists,
    {"number": ["a dog barks once", …], …}, empty where the caption names no detail.
    """

    def __init__(self, clips: Dataset, more: int = DETAILED):
        self.clips, self.more, self._written = clips, more, {}

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict:
        item = self.clips[index]
        if index not in self._written:
            captions = captions_of(item) + captions_of(item, self.more, detailed=1.0)
            twins = [{k: [str(c) for c in others] for k, others in c.contrasts().items()} for c in captions]
            self._written[index] = {"captions": [str(c) for c in captions], "contrasts": twins}
        return item | self._written[index]


def draw_contrasts(contrasts: dict[str, list[str]], seed: int, count: int = PER_CAPTION) -> list[str]:
    """Return up to `count` twins of one caption, of as many details as there are."""
    source = random.Random(seed)
    waiting = [source.sample(contrasts[detail], len(contrasts[detail])) for detail in sorted(contrasts)]
    source.shuffle(waiting)
    chosen = []
    while len(chosen) < count and any(waiting):
        for others in waiting:
            if others and len(chosen) < count:
                chosen.append(others.pop())
    return chosen


def detail_loss(
    audio: torch.Tensor, text: torch.Tensor, twins: torch.Tensor, row: torch.Tensor, logit_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sound lies nearer to its caption than to the caption's twins, and these lie far from it.

    audio, text: (B, D) unit norm, pairs in the same row; twins: (M, D), at most PER_CAPTION of each row, in the order of
    `row` (M,); logit_scale as in
    `contrastive_loss`  ->  cross-entropy of the right caption among its twins, mean excess of cosines over MARGIN
    """
    with torch.autocast(audio.device.type, enabled=False):
        audio, text, twins = audio.float(), text.float(), twins.float()
        scale = logit_scale.clamp(max=math.log(100)).exp()
        own = scale * (audio * text).sum(1, keepdim=True)  # (B, 1)
        place = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)  # among the twins of its row
        others = own.new_full((len(own), PER_CAPTION), -torch.inf).index_put((row, place), scale * (audio[row] * twins).sum(1))
        logits = torch.cat([own, others], dim=1)
        losses = F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long), reduction="sum")
        heard = losses / row.unique().numel() if len(row) else losses
        written = F.relu((text[row] * twins).sum(1) - MARGIN).mean() if len(row) else own.new_zeros(())
    return heard, written
