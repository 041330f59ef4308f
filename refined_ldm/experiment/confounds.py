"""Ten ways to another loss without another model: the measurement changes, the network does not.

Each takes one trained model and one held-out set and measures the loss in another way. A factor below 1 is an
inaudible improvement. Notebook: 06
"""

import torch

from refined_ldm.conditioning import drop_condition
from refined_ldm.diffusion import loss_weight
from refined_ldm.experiment.protocol import GRID, noise_errors
from refined_ldm.text_to_audio import RefinedAudioLDM


@torch.no_grad()
def ten_ways(model: RefinedAudioLDM, latents: torch.Tensor, embeddings: torch.Tensor, train_latents: torch.Tensor,
             train_embeddings: torch.Tensor, sounds: torch.Tensor, scales: list[float]) -> list[dict]:  # fmt: skip
    """One model -> rows {"way", "loss", "factor"}; the first is the reference: captions, fixed scale, eps, uniform t.

    latents, train_latents: unscaled (B, C, T, F), held out and seen in training, with the embeddings (B, D) of their
    captions; sounds: embeddings (B, D) of the held-out clips themselves; scales: latent scales that first batches of
    two would have given. All are moved to the device of `latents`, which is the model's.
    """
    schedule, scale, device = model.schedule, float(model.scale), latents.device
    embeddings, train_latents, train_embeddings, sounds = (
        x.to(device) for x in (embeddings, train_latents, train_embeddings, sounds)
    )
    t = torch.tensor(GRID)  # on the CPU, as the schedule and what is averaged below
    errors = noise_errors(model, scale * latents, embeddings).cpu()  # (len(GRID), B)
    by_t = errors.mean(1)
    unconditional = model.clap.embed_text([""])[0]
    dropped = drop_condition(embeddings, unconditional, 0.19, torch.Generator().manual_seed(0))
    v, snr = loss_weight(t, schedule, "v"), schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
    late = torch.exp(-0.5 * ((t - 700) / 120.0) ** 2)

    def at_scale(factor):
        """The same clips, noised as in a run with another latent scale; the network's inputs are converted."""
        return noise_errors(_Rescaled(model, factor), scale * factor * latents, embeddings).mean()

    ways = {
        "reference: noise error, held-out captions": by_t.mean(),
        "1. a larger latent scale, of a soft first batch": at_scale(max(scales) / scale),
        "2. a smaller latent scale, of a loud first batch": at_scale(min(scales) / scale),
        "3. steered by the sound in place of its caption": noise_errors(model, scale * latents, sounds).mean(),
        "4. captions blanked as the baseline's conditioner does": noise_errors(model, scale * latents, dropped).mean(),
        "5. clips of the training set": noise_errors(model, scale * train_latents, train_embeddings).mean(),
        "6. late timesteps drawn more often": (late * by_t).sum() / late.sum(),
        "7. min-SNR weights": (snr.clamp(max=5) / snr * by_t).mean(),
        "8. counted in v, not in eps": (v * by_t).mean(),
        "9. the better half of the clips": errors.mean(0).sort().values[: len(latents) // 2].mean(),
        "10. the early timesteps left out": by_t[t >= 100].mean(),
    }
    reference = float(by_t.mean())
    return [{"way": way, "loss": float(loss), "factor": float(loss) / reference} for way, loss in ways.items()]


class _Rescaled:
    """A model applied to latents that are `factor` times as large, at the timestep of the same signal-to-noise ratio.

    z_t = a (f z_0) + s eps, divided by the length of (a f, s), has signal and noise whose squares sum to 1, as the
    model expects. So its answer is exact but for the rounding of the timestep.
    """

    def __init__(self, model, factor):
        self.model, self.factor, self.schedule = model, factor, model.schedule

    def denoise(self, z_t, t, c):
        alpha_bar = self.schedule.at(t)
        length = (alpha_bar * self.factor**2 + 1 - alpha_bar).sqrt()  # (B, 1, 1, 1)
        wanted = (alpha_bar * self.factor**2 / length**2).flatten()  # (B,)
        same = (self.schedule.alpha_bar.to(t.device)[None] - wanted[:, None]).abs().argmin(1)
        return self.model.denoise(z_t / length, same, c)
