"""Probes of a conditioner: captions with one embedding cannot lead to two different sounds.

Every probe is a choice with a known chance level: does the sound lie nearer to its own caption or to a twin that
differs in one thing, the order, the count, a negation? Retrieval and naming measure the embedding as a whole.
Notebook: 06
"""

import re
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from refined_ldm.base.integers import whole
from refined_ldm.clap import Clap
from refined_ldm.evaluation.adherence import ProbedEmbedding, class_prompt, rendered_clips
from refined_ldm.evaluation.metrics import found_at_k, share, unit, zero_shot
from refined_ldm.scenes.captions import NUMBERS, TIMES

COUNTED = re.compile(rf"\b({'|'.join(word for word in NUMBERS[2:])})\b|\b(once|twice)\b")


@torch.no_grad()
def nearer(clap: Clap, items: list[dict], twins: list[str]) -> np.ndarray:
    """items with waveform and caption, twins[i]: another caption for items[i] -> (n,) 1 where its own is the nearer."""
    sounds = _sounds(clap, items)
    own, other = (clap.embed_text(list(captions)) for captions in ([i["caption"] for i in items], twins))
    gap = ((sounds * own).sum(1) - (sounds * other).sum(1)).cpu().numpy()
    return np.where(np.abs(gap) < 1e-6, 0.5, gap > 0)


def other_count(caption: str) -> str | None:
    """The caption with its number changed ("twice" -> "five times"), or None if it holds none."""
    found = COUNTED.search(caption)
    if not found:
        return None
    word = found.group()
    if word in ("once", "twice"):
        return caption.replace(word, TIMES[5].strip() if word == "twice" else TIMES[4].strip(), 1)
    number = NUMBERS.index(word)
    return caption.replace(word, NUMBERS[2 if number > 3 else 6], 1)


def negated(items: list[dict]) -> tuple[list[str], list[str]]:
    """Captions that name the class of clip i and exclude that of clip j ("a dog barking but not rain"), and twins.

    A twin has the classes exchanged; an encoder that ignores "not" cannot distinguish the two.
    """
    n, half = len(items), len(items) // 2
    pairs = [(items[i]["labels"][0], items[(i + half) % n]["labels"][0]) for i in range(n)]
    said = [(class_prompt(a), class_prompt(b)) for a, b in pairs]
    return [f"{a} but not {b}" for a, b in said], [f"{b} but not {a}" for a, b in said]


@torch.no_grad()
def probe_conditioner(clap: Clap, count: int = 200) -> list[dict]:
    """A conditioner with both towers -> rows: probe, value, low, high, clips, chance."""
    count = whole("count", count, 2)
    mixed, single = rendered_clips(count), rendered_clips(count, kinds=("event",))
    twins, unseen = rendered_clips(count, "test_order"), rendered_clips(count, "test_pairs")
    rows = []

    def add(probe, right, chance):
        rows.append({"probe": probe, **share(np.asarray(right, dtype=float)), "chance": chance})

    for name, items in (("retrieval, R@1", mixed), ("retrieval of unseen pairs, R@1", unseen)):
        audio, text = (x.cpu().numpy() for x in (_sounds(clap, items), clap.embed_text([i["caption"] for i in items])))
        add(name, found_at_k(unit(text, "text") @ unit(audio, "audio").T, 1), 1 / count)
    names = sorted({item["labels"][0] for item in single})
    truth = np.array([names.index(item["labels"][0]) for item in single])
    found = zero_shot(_sounds(clap, single), clap.embed_text([class_prompt(n) for n in names]), truth)
    add("naming one event", found.predictions == truth, 1 / len(names))
    add("order", nearer(clap, twins, [twins[i ^ 1]["caption"] for i in range(len(twins))]), 0.5)
    counted = [(item, other) for item in single if (other := other_count(item["caption"]))]
    if len(counted) > 1:
        add("count", nearer(clap, *map(list, zip(*counted, strict=True))), 0.5)
    true, false = negated(single)
    differ = [i for i in range(len(single)) if true[i] != false[i]]
    add("negation", nearer(clap, [single[i] | {"caption": true[i]} for i in differ], [false[i] for i in differ]), 0.5)
    return rows


@torch.no_grad()
def caption_distances(conditioner: nn.Module, count: int = 200) -> dict[str, float]:
    """Mean cosine distances between a conditioner's embeddings of captions, by what differs.

    order: the two captions of a pair of `test_order`; wording: two captions of the same scene; scene: of two scenes.
    """
    twins, mixed = rendered_clips(count, "test_order"), rendered_clips(count)
    pairs = {
        "order": ([i["caption"] for i in twins[::2]], [i["caption"] for i in twins[1::2]]),
        "wording": ([i["captions"][0] for i in mixed], [i["captions"][1] for i in mixed]),
        "scene": ([i["captions"][0] for i in mixed], [i["captions"][0] for i in mixed[1:] + mixed[:1]]),
    }
    found = {}
    for name, (a, b) in pairs.items():
        a, b = (torch.nn.functional.normalize(conditioner.embed_text(x), dim=1) for x in (a, b))
        found[name] = float((1 - (a * b).sum(1)).mean())
    return found


def order_correct(probed: ProbedEmbedding, waveforms: torch.Tensor, items: list[dict]) -> np.ndarray:
    """Sounds (n, N) of "A then B" -> (n,) 1 if A is stronger in the first half than in the second, compared with B.

    The halves are doubled, as the outside embedding needs more than half a clip. Raises ValueError if both events are
    of one class.
    """
    first, second = waveforms.chunk(2, dim=1)
    logits = [probed.probe.logits(probed.embed_audio(half.repeat(1, 2))) for half in (first, second)]
    moved = logits[0] - logits[1]  # (n, K): stronger at the start than at the end
    classes, right = probed.probe.classes, []
    for row, item in zip(moved, items, strict=True):
        a, b = names_in_order(item)
        if a == b:
            raise ValueError(f"{item['id']} has two events of one class: there is no order")
        right.append(float(row[classes.index(a)] - row[classes.index(b)] > 0))
    return np.array(right)


def names_in_order(item: dict) -> list[str]:
    """The classes of a scene's events by their onsets; events are `scenes.Event`, or dicts from the cache of clips."""
    events = [event if isinstance(event, dict) else asdict(event) for event in item["events"]]
    return [event["name"] for event in sorted(events, key=lambda event: event["onset"])]


def _sounds(clap, items):
    return torch.cat([clap.embed_audio(torch.stack([i["waveform"] for i in items[k : k + 32]]), 16_000)
                      for k in range(0, len(items), 32)])  # fmt: skip
