"""Candidates: several sounds are drawn for a caption, and the one that fits it best is kept.

Of eight sounds one is right far more often than the first. With a matcher they are compared as latents, so that only
one of them is refined and decoded; without one all are, and the nearest CLAP embedding decides. The best of a student's
sounds restart first (`adapters.refiner`). A quiet sound is replaced by the next best; one that stays quiet, or is
silent, is drawn again.

Notebook: 09
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from refined_ldm.adapters import refiner
from refined_ldm.audio import are_finite, check_finite, is_constant, is_silent_waveform, warn_of_silence
from refined_ldm.diffusion import noise_like
from refined_ldm.mel import is_silent_mel
from refined_ldm.randomness import caption_generators

REDRAWN = 3  # times that a silent or quiet sound is sampled again
QUIET = 0.02  # of full scale: a sound with a lower peak, 28 dB below that of a training clip, is replaced
REDRAWN_BELOW = 0.6  # of the timesteps: a sound is drawn again with guidance below this one only


class Drawing:
    """The sounds that are drawn for B captions, `count` for each; those of one caption are in consecutive rows.

    sample: as `RefinedAudioLDM.sample_latent`, with its settings but these: embedding, z_T, generator,
    guidance_interval and `lowest`. unconditional: the embedding (D,) that guidance moves away from.
    """

    def __init__(
        self,
        model: nn.Module,
        captions: Sequence[str],
        count: int,
        seconds: float,
        seed: int,
        unconditional: Tensor,
        sample: Callable[..., Tensor],
    ):
        self.model, self.count, self.seconds, self.seed = model, count, seconds, seed
        self.captions = [caption for caption in captions for _ in range(count)]
        self.embedding = model.clap.embed_text(self.captions)  # (B * count, D)
        self.unconditional, self._sample = unconditional, sample

    def best(self, interval: tuple[int, int], drafts: bool, note: Callable[[str], None]) -> Tensor:
        """Draw the sounds and keep one for each caption -> waveforms (B, N).

        interval: the timesteps with guidance. drafts: they come from a student's four jumps, which a refiner's restart
        can improve. note: called with a message for each silent or quiet sound that is drawn again.
        """
        can_choose = drafts and has_matcher(self.model, self.seconds)
        restarted = refiner.restarts(self.model, self.count) if can_choose else 0
        lowest = self.model.refiner.config.restart if restarted else 0  # the jumps below are the restart's
        choices = self.ranked(self.sample(range(len(self.captions)), self.seed, interval, lowest), restarted)
        waveform, silent = self.decode(choices[0], range(len(self.captions)))
        for following in choices[1:]:  # the restarted sounds, then the drafts
            if not (rows := is_quiet(waveform).nonzero()[:, 0].tolist()):
                break
            self._replace(waveform, silent, rows, following[rows])
        # Where there is nearly only noise, guidance turns a sound that is mostly silence into silence.
        highest = round(REDRAWN_BELOW * self.model.schedule.steps)
        interval = (interval[0], max(interval[0], min(interval[1], highest)))
        for again in range(1, REDRAWN + 1):
            weak = silent.any(0) | is_quiet(waveform).cpu() if len(choices) > 1 else silent.any(0)
            if not (rows := weak.nonzero()[:, 0].tolist()):
                break
            for row in rows:
                caption, was = self.captions[row], "silent" if silent[:, row].any() else "too quiet"
                note(f"the sound of {caption!r:.60} was {was} and is drawn again ({again} of {REDRAWN} times)")
            self._replace(waveform, silent, rows, self.sample(rows, f"{self.seed}, again {again}", interval))
        for stage, of_stage in zip(("latent", "mel", "waveform"), silent, strict=True):
            warn_of_silence(stage, of_stage, self.captions)
        return waveform if self.count == 1 else nearest(self.model, waveform, self.embedding, self.count)

    def sample(self, rows: Sequence[int], seed: int | str, interval: tuple[int, int], lowest: int = 0) -> Tensor:
        """Draw latents (len(rows), C, T, F); the noise of a row depends on `seed` and its caption."""
        generators = caption_generators([self.captions[row] for row in rows], seed)
        embedding = self._of(rows)
        noise = noise_like(embedding.new_empty(len(rows), *self.model.latent_shape(self.seconds)), generators)
        return self._sample(embedding, noise, generator=generators, guidance_interval=interval, lowest=lowest)

    def ranked(self, latent: Tensor, restarted: int = 0) -> list[Tensor]:
        """Rank latents (B * count, C, T, F) by the matcher -> latents (B, C, T, F), those of the best fit first.

        The best `restarted` of each caption restart and are compared again; the others follow as they are. From here on
        there is one sound for each caption. Without a choice, or a matcher for this length, all stay: one entry.
        """
        matcher, captions = self.model.matcher, self.captions[:: self.count]
        if self.count == 1 or not has_matcher(self.model, self.seconds):
            return [latent]
        ranks = matcher.rank(latent, self.embedding, self.count)
        choices = [latent[rows] for rows in ranks]
        if restarted:
            best, some = ranks[:restarted].T.flatten(), [caption for caption in captions for _ in range(restarted)]
            generators = caption_generators(some, f"{self.seed}, restarted")
            better = self.model.restart(latent[best], self.embedding[best], generators, self.unconditional)
            choices = [*(better[rows] for rows in matcher.rank(better, self.embedding[best], restarted)), *choices]
        self.embedding, self.captions, self.count = self.embedding[ranks[0]], captions, 1
        return choices

    def decode(self, latent: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Refine and decode latents (len(rows), C, T, F) -> waveforms (len(rows), N), silent (3, len(rows)).

        silent: whether latent, mel spectrogram and waveform are. Raises FloatingPointError for a non-finite one.
        """
        model, some = self.model, [self.captions[row] for row in rows]
        latent = model.refine(latent, self._of(rows), caption_generators(some, f"{self.seed}, refined"))
        mel = model.decode(latent)
        waveform = model.to_waveform(mel)[:, : round(self.seconds * model.config.mel.sample_rate)]
        stages = {"latent": latent, "mel": mel, "waveform": waveform}
        silent = [is_constant(latent), is_silent_mel(mel, model.config.mel.floor), is_silent_waveform(waveform)]
        checks = torch.stack([*map(are_finite, stages.values()), *silent]).cpu()  # (6, B): the device is asked once
        for (stage, batch), finite in zip(stages.items(), checks, strict=False):
            check_finite(stage, finite, some, batch.dtype)
        return waveform, checks[3:]

    def _replace(self, waveform, silent, rows, latent):
        """Replace the rows of waveforms (B, N), and of `silent` (3, B), that latents make louder or that are silent."""
        other, of_other = self.decode(latent, rows)
        better = (other.abs().amax(1) > waveform[rows].abs().amax(1)).cpu() | silent[:, rows].any(0)
        for row, k in [(row, k) for k, row in enumerate(rows) if better[k]]:
            waveform[row], silent[:, row] = other[k], of_other[:, k]

    def _of(self, rows):
        """The embeddings of rows; a GPU would wait for an index."""
        return self.embedding if len(rows) == len(self.captions) else self.embedding[rows]


def is_quiet(waveform: Tensor) -> Tensor:
    """Whether each of waveforms (B, N) is too quiet to be kept while there are others -> (B,) bool."""
    return waveform.abs().amax(1) < QUIET


def has_matcher(model: nn.Module, seconds: float) -> bool:
    """Whether the model has a matcher that compares latents of this length."""
    return model.matcher is not None and model.matcher.fits(model.latent_shape(seconds), model.clap.embedding_dim)


def nearest(model: nn.Module, waveform: Tensor, embedding: Tensor, count: int) -> Tensor:
    """Of every `count` waveforms in (B * count, N), the one nearest to its CLAP embedding (B * count, D) -> (B, N)."""
    nearness = (model.clap.embed_audio(waveform, model.config.mel.sample_rate) * embedding).sum(1)
    best = nearness.view(-1, count).argmax(1)
    return waveform.view(len(best), count, -1)[torch.arange(len(best), device=best.device), best]
