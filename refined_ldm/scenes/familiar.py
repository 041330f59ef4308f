"""Words that a conditioner has learned: a word that was in no training caption carries no information.

`Clap.share_unseen_tokens` gives all tokens outside the training captions one embedding. The saved table therefore
shows which they are. Any of them conditions the sound as any other would.

Notebook: 02
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import torch

from refined_ldm.clap import Clap

LEAST_SHARED = 1000  # tokens with one embedding that mark a vocabulary as partly unseen


def unseen_tokens(clap: Clap) -> torch.Tensor:
    """Return a mask (vocabulary,) of the tokens that were in no training caption, on the CPU; all False if none is."""
    table = clap.text.token_table.weight.detach()
    first = table[:, 0].cpu()
    row = (first == first.mode().values).nonzero()[0]  # of an unseen token, which are most of the vocabulary
    alike = (table == table[row]).all(1).cpu()
    return alike if alike.sum() >= LEAST_SHARED else torch.zeros_like(alike)


def unseen_words(clap: Clap, caption: str, unseen: torch.Tensor | None = None) -> list[str]:
    """Return the words of a caption that the conditioner was never trained on, in their order.

    unseen: what `unseen_tokens` returns, which scans the whole vocabulary; for several captions find it once.
    """
    unseen, words = unseen_tokens(clap) if unseen is None else unseen, []
    if not unseen.any():
        return words
    for match in re.finditer(r"\S+", caption):
        own = match.group().rstrip(".!?") or match.group()  # no training caption ends with a full stop
        word = caption[max(0, match.start() - 1) : match.start() + len(own)]  # a token includes the space before it
        if unseen[clap.tokenizer.encode(word)].any():
            words.append(own)
    return words


def unfamiliar(clap: Clap, captions: Sequence[str]) -> list[str]:
    """Return a message for each caption with words from no training caption; it names the nearest known captions."""
    unseen = unseen_tokens(clap)
    return [
        f"{caption!r:.80} holds what the model was never trained on ({', '.join(words)}); the nearest captions that it "
        f"knows: {'; '.join(nearest_captions(clap, caption))}"
        for caption in captions
        if (words := unseen_words(clap, caption, unseen))
    ]


@lru_cache(maxsize=1)
def known_captions() -> tuple[str, ...]:
    """Return a plain caption for every phrase of every class of `SoundScenes`."""
    from refined_ldm.scenes.classes import CLASSES  # here, since scipy, which renders them, takes long to import

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
