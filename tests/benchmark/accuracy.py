"""What speed costs: quick arithmetic beside plain float32, few sampling steps beside a thousand."""

import copy

import torch

from refined_ldm.diffusion import add_noise
from refined_ldm.evaluation.adherence import evaluate_generated, fit_probe, rendered_clips, summary
from refined_ldm.evaluation.embeddings.aisfx import Aisfx
from refined_ldm.evaluation.metrics import bootstrap_interval, frechet_distance
from refined_ldm.inference import optimize_for_inference
from refined_ldm.text_to_audio import RefinedAudioLDM

TIMESTEPS = (50, 250, 500, 750, 950)
QUICK = {"float32, optimised": ("no", False), "bfloat16": ("bf16", False), "compiled": ("no", True)}
SAMPLERS = {  # name -> settings of `generate`; the last one is AudioLDM's
    "dpmpp 25": {"steps": 25}, "dpmpp 15": {"steps": 15},
    "dpmpp 15, guided at 200-900": {"steps": 15, "guidance_interval": (200, 900)},
    "dpmpp 8": {"steps": 8}, "dpmpp 6, guided at 300-800": {"steps": 6, "guidance_interval": (300, 800)},
    "ddim 200": {"steps": 200, "sampler": "ddim", "eta": 1.0},
}  # fmt: skip


@torch.no_grad()
def rounding(model, items, ways=QUICK):
    """What each way of `optimize_for_inference` changes, in rows: way, unet_error{,_worst}, mel_l1, mel_l1_change.

    unet_error: relative error |y - y32| / |y32| of the U-Net's output, over all of TIMESTEPS and at the worst of them.
    mel_l1: log-mel L1 of clips through VAE and vocoder to the clips; mel_l1_change: relative to that of plain float32.
    items: clips with "waveform" (N,) and "caption".
    """
    waveform = torch.stack([item["waveform"] for item in items]).to(model.device)
    mel, z_0 = model.mel(waveform), model.encode(waveform)
    c = model.clap.embed_text([item["caption"] for item in items])
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0)).to(z_0)

    def outputs(of):
        found = []
        for timestep in TIMESTEPS:
            t = torch.full((len(z_0),), timestep, device=z_0.device)
            found.append(of.unet(add_noise(z_0, eps, t, model.schedule), t, c).float())
        copied = of.to_waveform(of.decode(z_0).float())[:, : waveform.shape[1]]
        return torch.stack(found), float((model.mel(copied.float()) - mel).abs().mean())

    plain, plain_l1 = outputs(model)
    nothing = dict.fromkeys(("unet_error", "unet_error_worst", "mel_l1_change"), 0.0)
    rows = [{"way": "float32", **nothing, "mel_l1": round(plain_l1, 5)}]
    for way, (precision, compiled) in ways.items():
        quick = copy.deepcopy(model)
        optimize_for_inference(quick, precision, compiled)
        found, l1 = outputs(quick)
        each = (found - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)
        error = (found - plain).norm() / plain.norm()
        rows.append({"way": way, "unet_error": float(f"{float(error):.2g}"),
                     "unet_error_worst": float(f"{float(each.max()):.2g}"), "mel_l1": round(l1, 5),
                     "mel_l1_change": float(f"{l1 / plain_l1 - 1:.2g}")})  # fmt: skip
    return rows


@torch.no_grad()
def against_reference(model, captions, samplers=SAMPLERS, reference_steps=1000, seconds=None):
    """Distance |z - z_ref| / |z_ref| of sampled latents to those of DDIM with many steps, from the same noise -> rows.

    DDIM is made deterministic for it (eta 0): with noise of its own it has no such solution to come near to.
    """
    seconds = model.config.seconds if seconds is None else seconds
    c = model.clap.embed_text(captions)
    z_T = torch.randn(len(c), *model.latent_shape(seconds), generator=torch.Generator().manual_seed(0)).to(c)
    z_ref = model.sample_latent(c, z_T, reference_steps, sampler="ddim", eta=0.0)
    rows = []
    for name, how in samplers.items():
        z = model.sample_latent(c, z_T, **{**how, "eta": 0.0})
        rows.append({"sampler": name, "latent_error": round(float((z - z_ref).norm() / z_ref.norm()), 4)})
    return rows


@torch.no_grad()
def deep_cache(model, captions, steps=25, intervals=(2, 3, 5)):
    """What DeepCache changes beside fewer steps, by the sounds of `steps` complete ones from the same noise -> rows.

    latent_error: |z - z_exact| / |z_exact|; mel_l1: of the log-mels.
    """
    c = model.clap.embed_text(captions)
    z_T = torch.randn(len(c), *model.latent_shape(model.config.seconds), generator=torch.Generator().manual_seed(0))
    ways = {f"{steps} steps, DeepCache {interval}": (steps, interval) for interval in intervals}
    ways |= {f"{steps // interval} steps": (steps // interval, 1) for interval in intervals}
    exact, rows = model.sample_latent(c, z_T.to(c), steps), []
    for way, (count, model.cache_interval) in ways.items():
        z = model.sample_latent(c, z_T.to(c), count)
        rows.append({
            "way": way, "captions": len(c), "latent_error": round(float((z - exact).norm() / exact.norm()), 4),
            "mel_l1": round(float((model.decode(z) - model.decode(exact)).abs().mean()), 4),
        })  # fmt: skip
    model.cache_interval = 1
    return rows


def few_steps(model, probed, real, items, samplers=SAMPLERS, guidance=None, on_row=print):
    """Fréchet distance to real clips and recall by each way of sampling, with 95 % intervals over clips -> rows.

    real: embeddings (N, D) of the rendered clips of `items`.
    """
    dimensions, rows = min(64, len(items) // 3, real.shape[1]), []
    for name, how in samplers.items():
        measured = evaluate_generated(probed, model, items, guidance, batch_size=16, **how)
        low, high = bootstrap_interval(
            lambda a: frechet_distance(a, real, dimensions), measured.embeddings, resamples=100, centre=True
        )
        adherence = summary(measured)
        rows.append({
            "sampler": name, "clips": len(items), "frechet": frechet_distance(measured.embeddings, real, dimensions),
            "low": low, "high": high, "recall": adherence["recall"], "recall_low": adherence["low"],
            "recall_high": adherence["high"],
        })  # fmt: skip
        on_row(f"{name:<32} Fréchet {rows[-1]['frechet']:.1f} ({low:.1f}-{high:.1f}), recall {rows[-1]['recall']:.3f}")
    return rows


def measure_accuracy(on_row=print, clips=8):
    """`rounding` and `against_reference` for preset `tiny`, on a few clips of the split `test`."""
    model, items = RefinedAudioLDM.from_preset("tiny"), rendered_clips(clips)
    rows = rounding(model, items)
    for row in rows:
        error, worst = row["unet_error"], row["unet_error_worst"]
        on_row(f"{row['way']:<24} U-Net {error:.2%} off, {worst:.2%} at the worst timestep, "
               f"log-mel L1 {row['mel_l1']:.3f} ({row['mel_l1_change']:+.2%})")  # fmt: skip
    near = against_reference(model, [item["caption"] for item in items])
    for row in near:
        on_row(f"{row['sampler']:<32} {row['latent_error']:.3f} from 1000 steps of DDIM")
    return rows + near


def measure_deep_cache(on_row=print, clips=8):
    """`deep_cache` for preset `tiny`, on a few captions of the split `test`."""
    rows = deep_cache(RefinedAudioLDM.from_preset("tiny"), [item["caption"] for item in rendered_clips(clips)])
    for row in rows:
        on_row(f"{row['way']:<32} {row['latent_error']:.3f} from 25 steps, log-mel L1 {row['mel_l1']:.3f}")
    return rows


def measure_few_steps(on_row=print, clips=96, probe_clips=1500):
    """`few_steps` for preset `tiny`: the first `clips` test captions, held against twice as many rendered clips."""
    model = RefinedAudioLDM.from_preset("tiny")
    probed = fit_probe(Aisfx.load(), probe_clips, seconds=model.config.seconds)
    rendered = rendered_clips(2 * clips, seconds=model.config.seconds)
    real = probed.embed_audio(torch.stack([item["waveform"] for item in rendered]))
    return few_steps(model, probed, real, rendered[:clips], on_row=on_row)
