"""Numbers that the authors' own PANNs and VGGish compute, stored so that their packages are not needed to compare.

`pip install --no-deps panns_inference==0.1.1 torchvggish==0.2 torchlibrosa` and then
`python -m tests.support.embedding_references` writes them again. Weights and waveforms come from numpy's `RandomState`,
whose numbers are the same in every version.
"""

import importlib
import json
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from refined_ldm.evaluation.embeddings.panns import Cnn14
from refined_ldm.evaluation.embeddings.vggish import VGGish

REFERENCES = Path(__file__).with_suffix(".json")
PANNS_SAMPLES = (16_000, 33_333)  # a clip of 1 s is followed by silence up to 2 s, as audioldm_eval does
VGGISH_SAMPLES = 33_000  # two windows and a rest


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal float32 numbers, the same in every version of numpy and torch."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).float()


def weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict for a small network: every tensor counts, batch norms see decibels at the first and units later."""
    state = {}
    for seed, (name, tensor) in enumerate(network.state_dict().items()):
        values = normal(*tensor.shape, seed=seed)
        if name.endswith("num_batches_tracked"):
            state[name] = tensor
        elif name.endswith("running_mean"):
            state[name] = values * 0.1 if name != "bn0.running_mean" else -30 + 5 * values
        elif name.endswith("running_var"):
            state[name] = values.exp() * (1 if name != "bn0.running_var" else 200)
        elif tensor.ndim == 1:
            state[name] = 0.1 * values + (1 if "bn" in name and name.endswith("weight") else 0)
        else:
            state[name] = values * (2 / tensor[0].numel()) ** 0.5
    return state


def panns_weights() -> dict[str, torch.Tensor]:
    """Weights of a Cnn14 a thirty-second as wide as published, without its mel filterbank."""
    state = weights(Cnn14(width=2, classes=16))
    del state["mel_bank"]
    return state


def vggish_weights() -> dict[str, torch.Tensor]:
    """Weights of a VGGish a thirty-second as wide as published."""
    return weights(VGGish(width=2, hidden=64, embedding_dim=8))


def waveforms(samples: int) -> torch.Tensor:
    """Two clips (2, samples) at 16 kHz, noise and a chirp, with an offset, which PANNs subtract."""
    seconds = torch.arange(samples, dtype=torch.float64) / 16_000
    chirp = 0.3 * (2 * torch.pi * (200 * seconds + 800 * seconds**2)).sin() * (-seconds).exp()
    return torch.stack([0.1 * normal(samples, seed=samples), chirp.float()]) + 0.05


def authors_panns() -> dict:
    """{samples: embedding (2, 64) and probabilities (2, 16)} by the network of panns_inference."""
    (folder,) = find_spec("panns_inference").submodule_search_locations
    bare = types.ModuleType("panns_inference")  # without what the package does at its top: it downloads
    bare.__path__ = [folder]
    sys.modules["panns_inference"] = bare
    module = importlib.import_module("panns_inference.models")
    narrow = types.SimpleNamespace(**vars(nn))  # each layer a thirty-second as wide
    narrow.Conv2d = lambda in_channels, out_channels, **k: nn.Conv2d(in_channels // 32 or 1, out_channels // 32, **k)
    narrow.BatchNorm2d = lambda channels: nn.BatchNorm2d(channels // 32)
    narrow.Linear = lambda features, out, bias: nn.Linear(features // 32, out // 32)
    module.nn = narrow
    network = module.Cnn14(16_000, 512, 160, 64, 50, 8000, 527)
    network.bn0 = nn.BatchNorm2d(64)
    missing, unexpected = network.load_state_dict(panns_weights(), strict=False)
    assert not unexpected and all("extractor" in name for name in missing), (missing, unexpected)
    found = {}
    for samples in PANNS_SAMPLES:
        clips = waveforms(samples)
        clips = nn.functional.pad(clips - clips.mean(1, keepdim=True), (0, max(0, 32_000 - samples)))
        with torch.no_grad():
            made = network.eval()(clips)
        found[samples] = {"embedding": made["embedding"].tolist(), "probabilities": made["clipwise_output"].tolist()}
    return found


def authors_vggish() -> list:
    """Embeddings (2, 2, 8) by torchvggish as FAD uses it: `postprocess` off and the last ReLU taken away."""
    sys.modules["resampy"] = types.ModuleType("resampy")  # it would only resample
    peer = importlib.import_module("torchvggish.torchvggish")
    examples = importlib.import_module("torchvggish.vggish_input").waveform_to_examples
    layers = [
        nn.Conv2d(max(1, layer.in_channels // 32), layer.out_channels // 32, 3, padding=1)
        if isinstance(layer, nn.Conv2d)
        else layer
        for layer in peer.make_layers()
    ]
    with torch.device("meta"):  # 0.3 GB, of which every layer is replaced by a narrow one
        network = peer.VGG(nn.Sequential(), postprocess=False)
    network.features = nn.Sequential(*layers)
    network.embeddings = nn.Sequential(
        nn.Linear(16 * 24, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    )
    network.load_state_dict(vggish_weights())
    with torch.no_grad():
        return [network(examples(clip.double().numpy(), 16_000)).tolist() for clip in waveforms(VGGISH_SAMPLES)]


def rounded(numbers):
    """Nested lists of floats with 6 decimals."""
    if isinstance(numbers, dict):
        return {name: rounded(part) for name, part in numbers.items()}
    return [rounded(part) for part in numbers] if isinstance(numbers, list) else round(numbers, 6)


if __name__ == "__main__":
    found = rounded({"panns": authors_panns(), "vggish": authors_vggish()})
    REFERENCES.write_text(json.dumps(found) + "\n", encoding="utf-8")
