"""The best linear denoiser: the optimal one if latents were Gaussian with the data's mean and covariance.

For a Gaussian z_0 the optimal estimate of the noise in z_t is linear (Wiener 1949). It is fitted in seconds, separates
spectral tilt and continuity from noise, and has a lower loss than a network that was trained too briefly. The network
can start from it: eps = formula + sqrt(residual) * network, so that its target has unit variance at every t (the idea
of Karras et al. 2022, sec. 5, with the full covariance in place of one number).

Notebook: 03
"""

import math

import torch
from torch import Tensor, nn


class GaussianDenoiser(nn.Module):
    """Optimal linear denoiser on blocks of `block_frames` latent frames, D = C * block_frames * F numbers each.

    Notebook: 03
    """

    def __init__(self, channels: int, bins: int, block_frames: int = 4):
        super().__init__()
        self.block_frames = block_frames
        size = channels * block_frames * bins
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size))  # columns: eigenvectors of the covariance
        self.register_buffer("variance", torch.ones(size))  # its eigenvalues

    @torch.no_grad()
    def fit(self, latents: Tensor) -> "GaussianDenoiser":
        """Take mean and covariance from scaled latents (B, C, T, F); every block of frames is a sample.

        With few samples the covariance is shrunk towards a multiple of the identity (`shrinkage`).
        """
        samples = self._to_blocks(latents.cpu()).flatten(0, 1).double()  # not every device has float64
        mean = samples.mean(0)
        centred, freedom = samples - mean, max(1, len(samples) - 1)  # one sample went into the mean
        variance, basis = torch.linalg.eigh(centred.T @ centred / freedom)
        level = variance.mean() if len(samples) > 1 else variance.new_ones(())  # scaled latents have unit variance
        variance = torch.lerp(variance, level, shrinkage(variance, freedom))
        self.mean.copy_(mean), self.variance.copy_(variance.clamp(min=1e-6)), self.basis.copy_(basis)
        return self

    def noise(self, z_t: Tensor, alpha_bar: Tensor, embedding: Tensor | None = None) -> Tensor:
        """E[eps | z_t] = s (a^2 S + s^2 I)^-1 (z_t - a m), with a^2 = alpha_bar, s^2 = 1 - alpha_bar, (B, 1, 1, 1).

        It follows from the joint Gaussian of eps and z_t = a z_0 + s eps  (Bishop 2006, eq. 2.81). z_t and the result
        are (B, C, T, F); the embedding is ignored.
        """
        with torch.autocast(z_t.device.type, enabled=False):
            a, s = alpha_bar.float().flatten(1).sqrt()[:, None], (1 - alpha_bar.float()).flatten(1).sqrt()[:, None]
            blocks = self._to_blocks(z_t.float()) - a * self.mean  # (B, T / block_frames, D)
            gain = s / (a**2 * self.variance + s**2)
            return self._from_blocks(((blocks @ self.basis) * gain) @ self.basis.T, z_t.shape)

    def residual(self, alpha_bar: Tensor) -> Tensor:
        """Mean variance of eps that `noise` leaves unexplained, r_t (B,): a^2 S / (a^2 S + s^2), over the basis."""
        signal = alpha_bar.flatten()[:, None] * self.variance
        return (signal / (signal + 1 - alpha_bar.flatten()[:, None])).mean(1)

    def _to_blocks(self, z: Tensor) -> Tensor:
        B, C, T, F = z.shape
        if T % self.block_frames or C * self.block_frames * F != len(self.mean):
            raise ValueError(
                f"latent must be (B, C, multiple of {self.block_frames}, F) with C * F = "
                f"{len(self.mean) // self.block_frames}, got {tuple(z.shape)}"
            )
        return z.unflatten(2, (-1, self.block_frames)).permute(0, 2, 1, 3, 4).flatten(2)

    def _from_blocks(self, blocks: Tensor, shape: torch.Size) -> Tensor:
        B, C, T, F = shape
        return blocks.reshape(B, -1, C, self.block_frames, F).permute(0, 2, 1, 3, 4).reshape(shape)


def shrinkage(variance: Tensor, samples: int) -> Tensor:
    """The share of a covariance to replace by a multiple of the identity, 0 to 1 (Chen et al. 2010, OAS).

    variance: (D,), the eigenvalues of the covariance of `samples` samples. With more than D samples the share is
    multiplied by D / samples, so that small variances are kept.
    """
    size, trace, squares = len(variance), variance.sum(), variance.square().sum()
    distance = (samples + 1) * (squares - trace**2 / size)
    found = ((squares + trace**2) / distance).clamp(0, 1) if distance > 0 else torch.ones_like(distance)
    return found * min(1, size / samples)


class ConditionalLinearDenoiser(nn.Module):
    """Linear denoiser of whole clips given their caption: latents are N(mean(c), S(c)) for an embedding c (B, D).

    mean(c): the `slow` lowest cosines in time of every channel and bin, by least squares from c. S(c): the covariance
    of a stationary process. Its eigenvectors are cosines in time, which fit any length, times principal components of
    the C * F channels and bins. Its eigenvalues depend on c too, one factor for each octave of cosines, by least
    squares on the logarithm. `frames`: T of the clips that it is fitted to.

    Notebook: 03
    """

    def __init__(self, channels: int, bins: int, embedding_dim: int, frames: int, slow: int = 16):
        super().__init__()
        slow = min(slow, frames)
        self.frames, self.slow, self.embedding_dim = frames, slow, embedding_dim
        width = channels * bins
        index = torch.arange(frames)
        octaves = index.clamp(min=1).log2().long() + (index > 0)  # 0 | 1 | 2 3 | 4 5 6 7 …
        self.register_buffer("octave", octaves, persistent=False)  # (T,) band of each cosine
        self.register_buffer("centre", torch.zeros(embedding_dim))  # the mean embedding
        self.register_buffer("course", torch.zeros(slow, width))  # cosines of the mean, and their slope in c
        self.register_buffer("course_weight", torch.zeros(embedding_dim, slow, width))
        self.register_buffer("basis", torch.eye(width))  # columns: directions among channels and bins
        self.register_buffer("variance", torch.ones(frames, width))  # of each cosine in each direction
        self.register_buffer("power", torch.zeros(int(octaves[-1]) + 1, width))  # log factor of each octave
        self.register_buffer("power_weight", torch.zeros(embedding_dim, *self.power.shape))

    @torch.no_grad()
    def fit(self, latents: Tensor, embeddings: Tensor, ridge: float = 0.3) -> "ConditionalLinearDenoiser":
        """Fit to scaled latents (N, C, T, F) and embeddings (N, K, D) of their K captions -> self; seconds, on the CPU.

        ridge: the penalty of the least squares (Hoerl & Kennard 1970). Raises ValueError for other shapes.
        """
        if len(latents) != len(embeddings) or latents.shape[2] != self.frames:
            raise ValueError(
                f"latents must be ({len(embeddings)}, C, {self.frames}, F), as many as there are embeddings, "
                f"got {tuple(latents.shape)}"
            )
        device, embeddings, latents = self.basis.device, embeddings.cpu(), latents.cpu()  # for float64
        self.cpu()
        waves, rows = self._cosines(self.frames, latents), self._to_rows(latents)
        self.centre.copy_(embeddings.mean((0, 1)))
        c = embeddings - self.centre
        self.course, self.course_weight = _least_squares(c, (waves.T @ rows)[:, : self.slow], ridge)

        first = embeddings[:, 0]  # one caption of each clip gives the residuals
        pairs = zip(rows.split(256), first.split(256), strict=True)
        residuals = torch.cat([z - self.conditional_mean(e, self.frames) for z, e in pairs])
        flat = residuals.flatten(0, 1).double()
        self.basis.copy_(torch.linalg.eigh(flat.T @ flat)[1])
        power = (waves.T @ residuals @ self.basis).square()  # (N, T, C * F)
        shrunk = (power.sum(0) + power.mean()) / (len(power) + 1)  # one more clip, of mean power
        self.variance.copy_(shrunk.clamp(min=1e-6))
        shares = power / self.variance
        shares = torch.stack([shares[:, self.octave == k].mean(1) for k in range(len(self.power))], dim=1)
        self.power, self.power_weight = _least_squares(c, (shares + 0.05).log(), ridge)
        predicted = torch.cat([self._shares(e) for e in first.split(256)])
        self.power += (shares.mean(0) / predicted.mean(0)).log()  # unbiased in the shares, not in their logarithms
        return self.to(device)

    def conditional_mean(self, embedding: Tensor, frames: int) -> Tensor:
        """mean(c): embedding (B, D) -> (B, T, C * F)."""
        courses = self.course + torch.einsum("bd,dkw->bkw", embedding - self.centre, self.course_weight)
        stretch = (frames / self.frames) ** 0.5  # cosines of unit length are lower the longer they are
        waves = self._cosines(frames, embedding)[:, : self.slow]
        return stretch * waves @ courses[:, : waves.shape[1]]

    def noise(self, z_t: Tensor, alpha_bar: Tensor, embedding: Tensor) -> Tensor:
        """E[eps | z_t, c] = s (a^2 S(c) + s^2 I)^-1 (z_t - a mean(c)), with a^2 = alpha_bar, s^2 = 1 - alpha_bar.

        z_t (B, C, T, F) with any T, alpha_bar (B, 1, 1, 1), embedding (B, D) or wider -> (B, C, T, F).
        """
        with torch.autocast(z_t.device.type, enabled=False):
            T, embedding = z_t.shape[2], embedding[:, : self.embedding_dim].float()
            a2 = alpha_bar.float().flatten()[:, None, None]  # (B, 1, 1)
            residual = self._to_rows(z_t.float()) - a2.sqrt() * self.conditional_mean(embedding, T)
            waves = self._cosines(T, residual)
            gain = (1 - a2).sqrt() / (a2 * self._variances(embedding, T) + 1 - a2)  # (B, T, C * F)
            eps = waves @ ((waves.T @ residual @ self.basis) * gain) @ self.basis.T
            return eps.unflatten(2, (z_t.shape[1], -1)).transpose(1, 2)

    def residual(self, alpha_bar: Tensor) -> Tensor:
        """Mean variance of eps that a Gaussian with the mean of all S(c) leaves unexplained, r_t (B,)."""
        a2 = alpha_bar.flatten()[:, None, None]
        return (a2 * self.variance / (a2 * self.variance + 1 - a2)).mean((1, 2))

    def _shares(self, embedding: Tensor) -> Tensor:
        """Embedding (B, D) -> factors of the variances (B, octaves, C * F)."""
        log = self.power + torch.einsum("bd,dkw->bkw", embedding - self.centre, self.power_weight)
        return log.clamp(-4, 3).exp()

    def _variances(self, embedding: Tensor, frames: int) -> Tensor:
        """Eigenvalues of S(c) (B, T, C * F) for clips of any length, interpolated between the cosines' frequencies."""
        variances = self._shares(embedding)[:, self.octave] * self.variance
        if frames == self.frames:
            return variances
        index = torch.linspace(0, self.frames - 1, frames, device=variances.device)
        low = index.long().clamp(max=self.frames - 2)
        return torch.lerp(variances[:, low], variances[:, low + 1], (index - low)[:, None])

    @staticmethod
    def _cosines(frames: int, like: Tensor) -> Tensor:
        """(T, T): columns are the orthonormal cosines of the DCT-II (Ahmed et al. 1974), from slow to fast."""
        n = torch.arange(frames, device=like.device, dtype=torch.float32)
        waves = torch.cos(math.pi / frames * (n[:, None] + 0.5) * n) * (2 / frames) ** 0.5
        return torch.cat([waves[:, :1] / 2**0.5, waves[:, 1:]], dim=1)

    def _to_rows(self, z: Tensor) -> Tensor:
        """(B, C, T, F) -> (B, T, C * F)"""
        rows = z.transpose(1, 2).flatten(2)
        if rows.shape[2] != len(self.basis):
            raise ValueError(f"latent must have C * F = {len(self.basis)}, got {tuple(z.shape)}")
        return rows


def _least_squares(c: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression from centred embeddings (N, K, D) to targets (N, …) -> their mean (…) and weight (D, …)."""
    mean = targets.mean(0)
    flat = c.flatten(0, 1).double()  # (N * K, D)
    target = (targets - mean).flatten(1).double()  # the same for all captions of a clip
    normal = flat.T @ flat / c.shape[1] + ridge * torch.eye(c.shape[2], dtype=torch.double)
    weight = torch.linalg.solve(normal, c.sum(1).double().T @ target / c.shape[1])
    return mean, weight.float().contiguous().unflatten(1, targets.shape[1:])  # contiguous, as loaded weights are
