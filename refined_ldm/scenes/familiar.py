"""Which captions a conditioner can know: a word that no training caption held says nothing to it.

`Clap.share_unseen_tokens` gave all tokens that it never saw one embedding. So the saved table itself tells which they
are, and a caption with one of them steers a sound as if the word were any other.
"""

import re
from functools import lru_cache

import torch

from refined_ldm.clap import Clap
from refined_ldm.scenes.classes import CLASSES

LEAST_SHARED = 1000  # tokens with one embedding: those that were never seen


def unseen_tokens(clap: Clap) -> torch.Tensor:
    """Return which tokens (vocabulary,) were in no training caption; none of a vocabulary that was trained whole."""
    table = clap.text.get_input_embeddings().weight.detach()
    samples = range(0, len(table), max(1, len(table) // 5))
    alike = max(((table == table[i]).all(1) for i in samples), key=torch.sum)  # most tokens of all were never seen
    return alike if alike.sum() >= LEAST_SHARED else torch.zeros_like(alike)


def unseen_words(clap: Clap, caption: str) -> list[str]:
    """Return the words of a caption that the conditioner was never trained on, in their order."""
    unseen, words = unseen_tokens(clap), []
    if not unseen.any():
        return words
    for match in re.finditer(r"\S+", caption):
        word = caption[max(0, match.start() - 1) : match.end()]  # a piece holds the space before it
        if unseen[clap.tokenizer.encode(word)].any():
            words.append(match.group())
    return words


@lru_cache(maxsize=1)
def known_captions() -> tuple[str, ...]:
    """Return a plain caption for every phrase of every class of `SoundScenes`."""
    captions = []
    for sound in CLASSES.values():
        for phrase in sound.phrases:
            subject, verb, _, rest = phrase.split("|")
            text = f"{subject.replace('*', '')} {verb}{rest.replace('#', f'{sound.noun}s')}"
            captions.append(re.sub(r"\ba (?=[aeiou])", "an ", text))
    return tuple(captions)


@torch.no_grad()
def nearest_captions(clap: Clap, caption: str, count: int = 3) -> list[str]:
    """Return the known captions whose embeddings are nearest to a caption's."""
    known = known_captions()
    embedding = clap.embed_text([caption, *known])
    return [known[i] for i in (embedding[1:] @ embedding[0]).topk(count).indices.tolist()]
