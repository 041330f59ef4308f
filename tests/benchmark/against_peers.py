"""The same work by this repository and by others, at the published sizes with random weights, in turn on one machine.

Each `Work` is timed in turn with its peers, so that a slow moment of the machine falls on all; the least of the runs
counts. Beside the ratio stand the share of the machine's own matrix products that ours reaches (a ratio cannot grow
where that is near 1) and where its time goes, from torch's profiler.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from refined_ldm.clap import CLAP_PRESETS, Clap
from refined_ldm.conditioning import guided_noise
from refined_ldm.config import preset
from refined_ldm.data.batches import loader
from refined_ldm.devices import pick_precision
from refined_ldm.hifigan import HiFiGAN
from refined_ldm.inference import optimize_for_inference
from refined_ldm.mel import MelSpectrogram
from refined_ldm.published.reference_clap import ReferenceClap, laion_clap_model, ms_clap_model
from refined_ldm.text_to_audio import RefinedAudioLDM
from refined_ldm.tokenizer import small_roberta_tokenizer
from refined_ldm.training.stages import train_ldm
from refined_ldm.unet import DeepFeatures, UNet
from refined_ldm.vae import MelVAE
from tests.benchmark.baselines import (
    audioldm_package,
    audioldm_unet,
    diffusers_unet,
    diffusers_vae,
    librosa_log_mel,
    torchlibrosa_log_mel,
    transformers_vocoder,
)
from tests.benchmark.bench import best_of, in_turn, peak_memory
from tests.benchmark.training_costs import count

KINDS = {  # of operations, by parts of torch's names for them
    "convolutions": ("conv",), "attention": ("scaled_dot_product", "softmax"), "optimiser": ("adamw",),
    "matrix products": ("mm", "linear", "matmul"), "transforms": ("fft", "stft"),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One thing to do: our way, that of each peer (a name ending in "bf16" where it is autocast), and the goals.

    operations: floating-point operations, as ours would do them without a shortcut; 0 where they are no measure.
    """

    name: str
    ours: Callable
    peers: dict[str, Callable]
    goals: dict[str, float] = field(default_factory=dict)  # peer -> how many times as fast ours should be
    operations: float = 0.0
    limit: float = 0.0  # seconds it should take at most


class Missing(list):
    """Peers that are not installed, each with what installs it."""

    @contextmanager
    def noted(self):
        try:
            yield
        except ImportError as fault:
            if str(fault) not in self:
                self.append(str(fault))


def against_peers(on_row=print, rounds=2, only=None):
    """Time every work in turn with its peers -> rows (dicts); `only`: those whose name holds this."""
    peaks = matrix_peaks()
    on_row(f"matrix products: {peaks['fp32']:.0f} GFLOP/s in float32, {peaks['bf16']:.0f} in bfloat16")
    missing, rows = Missing(), [{"work": "matrix products", **{f"{k}_gflops": round(v, 1) for k, v in peaks.items()}}]
    for make in WORKS:
        if only is None or only in make.__doc__:
            with ExitStack() as stack:
                work = make(stack, missing)
                rows += _timed(work, peaks, rounds, on_row)
            del work
    for message in missing:
        on_row(f"left out: {message}")
    return [*rows, *({"work": "left out", "peer": message} for message in missing)]


def _timed(work, peaks, rounds, on_row):
    best = in_turn({"ours": work.ours, **work.peers}, rounds)
    memory, where = peak_memory(work.ours), profile(work.ours)
    where = ", ".join(f"{kind} {part:.0%}" for kind, part in where.items())
    seconds, speed = best["ours"], work.operations / best["ours"] / 1e9
    share = speed / peaks["bf16" if pick_precision("cpu") == "bf16" else "fp32"]
    row = {"work": work.name, "seconds": round(seconds, 4), "gflop": round(work.operations / 1e9, 1),
           "share_fp32": round(speed / peaks["fp32"], 3), "share_bf16": round(speed / peaks["bf16"], 3),
           "memory_gb": memory, "where": where}  # fmt: skip
    of_peak = f"{work.operations / 1e9:7.0f} GFLOP, {share:4.0%} of the peak" if work.operations else ""
    in_memory = "" if memory is None else f"; {memory:.2f} GB at the peak"
    on_row(f"{work.name:<52}{seconds:9.3f} s {of_peak}\n    {where}{in_memory}")
    rows = [row]
    if work.limit:
        row |= {"goal": work.limit, "met": seconds <= work.limit}
        on_row(f"    goal: at most {work.limit:g} s{'' if row['met'] else ', not met'}")
    for peer in work.peers:
        ratio, goal = best[peer] / seconds, work.goals.get(peer)
        rows.append({"work": work.name, "peer": peer, "seconds": round(best[peer], 4), "ratio": round(ratio, 3),
                     "goal": goal, "met": None if goal is None else ratio >= goal})  # fmt: skip
        aim = "" if goal is None else f"  goal {goal:g}{'' if ratio >= goal else ', not met'}"
        on_row(f"    {peer:<48}{best[peer]:9.3f} s {ratio:6.2f} x ours{aim}")
    return rows


def matrix_peaks(size=1024):
    """{"fp32", "bf16"}: GFLOP/s of a matrix product, the most of some; bfloat16 with a smaller one where it is slow."""
    peaks = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        wide = size if name == "fp32" or pick_precision("cpu") == "bf16" else 256
        a = torch.ones(wide, wide, dtype=dtype)
        peaks[name] = 2 * wide**3 / best_of(lambda a=a: a @ a, 8) / 1e9
    return peaks


def profile(work):
    """{kind of operation: its share of the time}, the larger ones, by torch's profiler."""
    with torch.profiler.profile() as found:
        work()
    times = Counter()
    for event in found.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")
        times[kind] += event.self_cpu_time_total
    whole = max(1, times.total())
    return {kind: round(spent / whole, 3) for kind, spent in times.most_common(3)}


# --- the works; the first line of each says what is done, and is its name ---


def _awake(network):
    """Layers that begin at zero get small random weights: nobody may skip work for a zero."""
    with torch.no_grad():
        for weight in network.parameters():
            if not weight.any():
                weight.normal_(std=0.02)
    return network.eval()


def _published():
    """AudioLDM-S with random weights and LAION's width of embedding, the conditioner in miniature."""
    config = preset("baseline")
    tiny = Clap.load("tiny-gpt2")
    config = replace(config, clap="tiny-gpt2", unet=replace(config.unet, embedding_dim=tiny.embedding_dim))
    model = RefinedAudioLDM(config, clap=tiny).eval()
    _awake(model.unet)
    return model


def _unet_inputs():
    generator = torch.Generator().manual_seed(0)
    z_t, c = (torch.randn(shape, generator=generator) for shape in ((2, 8, 256, 16), (2, 512)))
    return z_t, torch.tensor([500, 500]), c


_without_grad = torch.no_grad()  # wraps a call


def _half(call):
    """The same under autocast to bfloat16."""

    def quick():
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    return quick


def _and_half(name, call):
    """{name fp32, name bf16}, the latter where this machine is quick in bfloat16."""
    found = {f"{name} fp32": call}
    return found | ({f"{name} bf16": _half(call)} if pick_precision("cpu") == "bf16" else {})


def _published_unet():
    return UNet(replace(preset("baseline").unet, embedding_dim=512))


def _run_unet(unet, batch):
    return unet(torch.randn(batch, 8, 256, 16), torch.zeros(batch), torch.randn(batch, 512))


def _published_model():
    """AudioLDM-S, its U-Net with LAION's width of embedding, optimized for inference."""
    model = _published()
    model.unet = _awake(_published_unet())
    optimize_for_inference(model)
    return model


def _guided_step(cache_interval):
    """`cache_interval` guided steps of 10.24 s by U-Net S, of which the first computes the deep features too."""
    z_t, t, c = _unet_inputs()
    model = _published_model()

    def steps():
        deep = DeepFeatures(cache_interval)
        for _ in range(cache_interval):
            guided_noise(partial(model.unet, deep=deep), z_t[:1], t[:1], c[:1], c[1], 3.0)

    return _without_grad(steps)


def deep_cache(stack, missing):
    """U-Net S, three guided steps of 10.24 s, with DeepCache one of them complete"""
    z_t, t, c = _unet_inputs()
    peers = {}
    with missing.noted():
        unet = _awake(diffusers_unet())
        three = lambda: [unet(z_t, t, None, class_labels=c).sample for _ in range(3)]  # noqa: E731
        peers = _and_half("diffusers", _without_grad(three))
    return Work(deep_cache.__doc__, _guided_step(3), peers, {"diffusers fp32": 3})


def unet_step(stack, missing):
    """U-Net S, one guided step of 10.24 s"""
    z_t, t, c = _unet_inputs()
    ours = _guided_step(1)
    peers = {}
    with missing.noted():
        unet = _awake(diffusers_unet())
        peers |= _and_half("diffusers", _without_grad(lambda: unet(z_t, t, None, class_labels=c).sample))
    with missing.noted():
        stack.enter_context(audioldm_package())
        theirs = _awake(audioldm_unet())
        peers["AudioLDM fp32"] = _without_grad(lambda: theirs(z_t, t, y=c))
    operations = 2 * count(_published_unet, _run_unet).forward
    return Work(unet_step.__doc__, ours, peers, {"diffusers fp32": 2.5, "AudioLDM fp32": 5}, operations)


def _training(network, predict, fused):
    """One step of optimisation: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(network.train().parameters(), 1e-4, fused=fused)

    def step():
        optimizer.zero_grad(set_to_none=True)
        predict(network).float().square().mean().backward()
        optimizer.step()

    return step


def training_step(stack, missing):
    """U-Net S, training step, batch 2: forward, backward, optimiser"""
    z_t, t, c = _unet_inputs()
    precision = pick_precision("cpu")
    unet = _awake(_published_unet()).to(memory_format=torch.channels_last)
    ours = _training(unet, lambda unet: unet(z_t, t, c), fused=True)
    peers = {}
    with missing.noted():
        theirs = _training(_awake(diffusers_unet()), lambda unet: unet(z_t, t, None, class_labels=c).sample, False)
        peers |= _and_half("diffusers", theirs)
    with missing.noted():
        stack.enter_context(audioldm_package())
        peers["AudioLDM fp32"] = _training(_awake(audioldm_unet()), lambda unet: unet(z_t, t, y=c), False)
    goals = {"AudioLDM fp32": 5, "diffusers bf16": 2}
    operations = 2 * count(_published_unet, _run_unet).both
    return Work(training_step.__doc__, _half(ours) if precision == "bf16" else ours, peers, goals, operations)


def vae_decode(stack, missing):
    """VAE decode of 10.24 s"""
    model, latent = _published(), torch.randn(1, 8, 256, 16, generator=torch.Generator().manual_seed(0))
    optimize_for_inference(model)
    peers = {}
    with missing.noted():
        theirs = diffusers_vae().eval()
        peers |= _and_half("diffusers", _without_grad(lambda: theirs.decode(latent).sample))
    operations = count(MelVAE, lambda vae, batch: vae.decode(torch.randn(batch, 8, 256, 16))).forward
    return Work(vae_decode.__doc__, _without_grad(lambda: model.vae.decode(latent)), peers,
                {"diffusers fp32": 2.5}, operations)  # fmt: skip


def vocoder(stack, missing):
    """HiFi-GAN of 10.24 s"""
    model, mel = _published(), torch.randn(1, 1, 1024, 64, generator=torch.Generator().manual_seed(0))
    optimize_for_inference(model)
    theirs = transformers_vocoder().eval()
    operations = count(HiFiGAN, lambda vocoder, batch: vocoder(torch.randn(batch, 1, 1024, 64))).forward
    peers = _and_half("transformers", _without_grad(lambda: theirs(mel[0, 0])))
    return Work(vocoder.__doc__, _without_grad(lambda: model.vocoder(mel)), peers, {"transformers fp32": 1.8},
                operations)  # fmt: skip


def whole_path(stack, missing):
    """caption -> 10.24 s waveform, 6 steps, guided at timesteps 300 to 800"""
    model = _published()
    optimize_for_inference(model)
    ours = lambda: model.generate(["a dog barks"], 10.24, 6, 2.5, guidance_interval=(300, 800))  # noqa: E731
    return Work(whole_path.__doc__, ours, {}, limit=10.24)


def _listening(name, package, missing, what):
    """Clips as long as the conditioner's window and captions, by ours and by the authors' code; random weights."""
    config = CLAP_PRESETS[name]
    ours = Clap(config).eval()
    if name == "laion-clap":
        ours._tokenizer = small_roberta_tokenizer()
    waveform = 0.3 * torch.randn(32, config.samples, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    captions = [f"a dog barks {n} times while a bell rings far away" for n in range(256)]
    ids, mask = ours.tokenizer(captions, config.max_tokens)
    peers = {}
    with missing.noted():
        theirs = ReferenceClap(name, ms_clap_model() if name == "ms-clap-2023" else laion_clap_model())
        peers[package] = lambda: ([theirs.embed_audio(clips, config.sample_rate) for clips in waveform.split(8)],
                                  theirs.embed_tokens(ids, mask))  # fmt: skip

    def hear_and_read():
        audio = [ours.embed_audio(clips, config.sample_rate) for clips in waveform.split(8)]
        return torch.cat(audio), ours.embed_text(captions)

    return Work(what, _without_grad(hear_and_read), peers, {package: 2})


def ms_clap(stack, missing):
    """MS-CLAP: 32 clips of 7 s and 256 captions"""
    return _listening("ms-clap-2023", "msclap", missing, ms_clap.__doc__)


def laion_clap(stack, missing):
    """LAION-CLAP: 32 clips of 10 s and 256 captions"""
    return _listening("laion-clap", "laion_clap", missing, laion_clap.__doc__)


def log_mel(stack, missing):
    """log-mel of 100 clips of 10 s"""
    mel, waveform = MelSpectrogram(), torch.randn(100, 160_000, generator=torch.Generator().manual_seed(0)) * 0.1
    peers = {}
    with missing.noted():
        librosa_log_mel(waveform[:1].numpy())  # here it is said if it is not installed
        peers["librosa"] = lambda: librosa_log_mel(waveform.numpy())
    with missing.noted():
        front = torchlibrosa_log_mel().eval()
        peers["torchlibrosa"] = _without_grad(lambda: torch.cat([front(clips) for clips in waveform.split(10)]))
    ours = _without_grad(lambda: mel(waveform))
    return Work(log_mel.__doc__, ours, peers, {"librosa": 3, "torchlibrosa": 1})


def cached_latents(stack, missing):
    """10 training steps of tiny's U-Net, batch 16, on cached latents"""
    model = RefinedAudioLDM.from_preset("tiny")
    captions = [f"a dog barks {n} times" for n in range(16)]
    waveform = 0.1 * torch.randn(16, model.config.samples, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent, embeddings = model.encode(waveform) / model.scale, model.clap.embed_text(captions)
    cached = [{"latent": z, "embeddings": c[None]} for z, c in zip(latent, embeddings, strict=True)]
    fresh = [{"waveform": w, "captions": [caption]} for w, caption in zip(waveform, captions, strict=True)]

    def trained(examples):
        return lambda: [step.loss for step in train_ldm(model, loader(examples, 16), max_steps=10)]

    name = "encoding sound and captions each step"
    return Work(cached_latents.__doc__, trained(cached), {name: trained(fresh)}, {name: 3})


WORKS = (
    unet_step,
    deep_cache,
    training_step,
    vae_decode,
    vocoder,
    whole_path,
    ms_clap,
    laion_clap,
    log_mel,
    cached_latents,
)
