"""Recordings and trees of recordings to read."""

import json

import numpy as np
import soundfile


def record(path, seconds: float = 0.5, rate: int = 16_000, seed: int = 0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.1, 0.1, round(seconds * rate)), rate)
    return path


def audioldm_tree(folder, entries, split="train", name="set"):
    """A folder as AudioLDM has it: data/dataset/metadata/dataset_root.json, paths from its top -> that file."""
    root = folder / "data" / "dataset" / "metadata" / "dataset_root.json"
    root.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(root.read_text()) if root.is_file() else {"comments": {}, "metadata": {"path": {}}}
    known[name] = "./data/dataset/audio"
    known["metadata"]["path"].setdefault(name, {})[split] = f"./data/dataset/metadata/{name}_{split}.json"
    root.write_text(json.dumps(known))
    (root.parent / f"{name}_{split}.json").write_text(json.dumps({"data": entries}))
    return root
