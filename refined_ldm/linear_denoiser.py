"""The best denoiser without a network: what a Gaussian with the latents' own mean and covariance would do.

If z_0 were Gaussian, the optimal guess of the noise in z_t would be a linear formula (Wiener 1949). It is fitted in
seconds, it already tells spectral tilt and continuity from noise, and it beats a network trained too short. So we
start the network from it: eps = formula + sqrt(residual) * network, whose target then has unit variance at every t
(the idea of Karras et al. 2022, sec. 5, with the full covariance in place of one number).
"""

import math

import torch
from torch import nn


class GaussianDenoiser(nn.Module):
    """Optimal linear denoiser on blocks of `block_frames` latent frames, D = C * block_frames * F numbers each."""

    def __init__(self, channels, bins, block_frames=4):
        super().__init__()
        self.block_frames = block_frames
        size = channels * block_frames * bins
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("basis", torch.eye(size))  # columns: eigenvectors of the covariance
        self.register_buffer("variance", torch.ones(size))  # its eigenvalues

    @torch.no_grad()
    def fit(self, latents):
        """Take mean and covariance from scaled latents (B, C, T, F); every block of frames is a sample.

        The fewer samples there are, the nearer the covariance is to a multiple of the identity (`shrinkage`).
        """
        samples = self._to_blocks(latents).flatten(0, 1).double()
        mean = samples.mean(0)
        centred, freedom = samples - mean, max(1, len(samples) - 1)  # one sample went into the mean
        variance, basis = torch.linalg.eigh(centred.T @ centred / freedom)
        level = variance.mean() if len(samples) > 1 else variance.new_ones(())  # scaled latents have unit variance
        variance = torch.lerp(variance, level, shrinkage(variance, freedom))
        self.mean.copy_(mean), self.variance.copy_(variance.clamp(min=1e-6)), self.basis.copy_(basis)
        return self

    def noise(self, z_t, alpha_bar, embedding=None):
        """E[eps | z_t] = s (a^2 S + s^2 I)^-1 (z_t - a m), with a^2 = alpha_bar, s^2 = 1 - alpha_bar, (B, 1, 1, 1).

        It comes from the joint Gaussian of eps and z_t = a z_0 + s eps  (Bishop 2006, eq. 2.81). It hears no caption.
        """
        with torch.autocast(z_t.device.type, enabled=False):
            a, s = alpha_bar.float().flatten(1).sqrt()[:, None], (1 - alpha_bar.float()).flatten(1).sqrt()[:, None]
            blocks = self._to_blocks(z_t.float()) - a * self.mean  # (B, T / block_frames, D)
            gain = s / (a**2 * self.variance + s**2)
            return self._from_blocks(((blocks @ self.basis) * gain) @ self.basis.T, z_t.shape)

    def residual(self, alpha_bar):
        """Mean variance of eps that the formula leaves unexplained, r_t (B,): a^2 S / (a^2 S + s^2), over the basis."""
        signal = alpha_bar.flatten()[:, None] * self.variance
        return (signal / (signal + 1 - alpha_bar.flatten()[:, None])).mean(1)

    def _to_blocks(self, z):
        B, C, T, F = z.shape
        if T % self.block_frames or C * self.block_frames * F != len(self.mean):
            raise ValueError(f"latent must be (B, C, multiple of {self.block_frames}, F) with C * F = "
                             f"{len(self.mean) // self.block_frames}, got {tuple(z.shape)}")  # fmt: skip
        return z.unflatten(2, (-1, self.block_frames)).permute(0, 2, 1, 3, 4).flatten(2)

    def _from_blocks(self, blocks, shape):
        B, C, T, F = shape
        return blocks.reshape(B, -1, C, self.block_frames, F).permute(0, 2, 1, 3, 4).reshape(shape)


def shrinkage(variance, samples):
    """How much of a covariance to replace by a multiple of the identity: 0, none, to 1, all (Chen et al. 2010, OAS).

    variance: (D,), the eigenvalues of the covariance of so many samples. Where these are more than D, D / samples of
    it, so that the smallest variances are found too.
    """
    size, trace, squares = len(variance), variance.sum(), variance.square().sum()
    distance = (samples + 1) * (squares - trace**2 / size)
    found = ((squares + trace**2) / distance).clamp(0, 1) if distance > 0 else torch.ones_like(distance)
    return found * min(1, size / samples)


class ConditionalLinearDenoiser(nn.Module):
    """The same for whole clips, as their captions lead to expect them: latents are N(mean(c), S(c)) given a caption.

    mean(c) is what least squares finds of the slow course (`slow` cosines in time) of every channel and bin. S(c) is
    that of a process that does not change in time: its eigenvectors are cosines in time, which fit any length, times
    directions among the C * F channels and bins that PCA finds. How much there is of each is told by the caption too,
    for bands of cosines an octave wide: least squares on the logarithm. `frames`: T of the clips it was fitted to.
    """

    def __init__(self, channels, bins, embedding_dim, frames, slow=16):
        super().__init__()
        slow = min(slow, frames)
        self.frames, self.slow, self.embedding_dim = frames, slow, embedding_dim
        width = channels * bins
        place = torch.arange(frames)
        octaves = place.clamp(min=1).log2().long() + (place > 0)  # 0 | 1 | 2 3 | 4 5 6 7 …
        self.register_buffer("octave", octaves, persistent=False)  # (T,) band of each cosine
        self.register_buffer("centre", torch.zeros(embedding_dim))  # the mean embedding
        self.register_buffer("course", torch.zeros(slow, width))  # of the mean embedding, and what others change in it
        self.register_buffer("course_weight", torch.zeros(embedding_dim, slow, width))
        self.register_buffer("basis", torch.eye(width))  # columns: directions among channels and bins
        self.register_buffer("variance", torch.ones(frames, width))  # of each cosine in each direction, over all clips
        self.register_buffer("power", torch.zeros(int(octaves[-1]) + 1, width))  # log of the share a band has of it
        self.register_buffer("power_weight", torch.zeros(embedding_dim, *self.power.shape))

    @torch.no_grad()
    def fit(self, latents, embeddings, ridge=0.3):
        """Scaled latents (N, C, T, F), embeddings (N, K, D) of their K captions -> self; seconds on a CPU.

        ridge: what is added to the squared lengths of embeddings, against chance (Hoerl & Kennard 1970).
        """
        if len(latents) != len(embeddings) or latents.shape[2] != self.frames:
            wanted = f"({len(embeddings)}, C, {self.frames}, F), as many as there are embeddings"
            raise ValueError(f"latents must be {wanted}, got {tuple(latents.shape)}")
        waves, rows = self._cosines(self.frames, latents), self._to_rows(latents)
        self.centre.copy_(embeddings.mean((0, 1)))
        c = embeddings - self.centre
        self.course, self.course_weight = _least_squares(c, (waves.T @ rows)[:, : self.slow], ridge)

        said = embeddings[:, 0]  # one caption of each clip tells what is left
        pairs = zip(rows.split(256), said.split(256), strict=True)
        left = torch.cat([z - self.expected(e, self.frames) for z, e in pairs])
        flat = left.flatten(0, 1).double()
        self.basis.copy_(torch.linalg.eigh(flat.T @ flat)[1])
        power = (waves.T @ left @ self.basis).square()  # (N, T, C * F)
        shrunk = (power.sum(0) + power.mean()) / (len(power) + 1)  # as if one clip more had the mean power everywhere
        self.variance.copy_(shrunk.clamp(min=1e-6))
        shares = power / self.variance
        shares = torch.stack([shares[:, self.octave == k].mean(1) for k in range(len(self.power))], dim=1)
        self.power, self.power_weight = _least_squares(c, (shares + 0.05).log(), ridge)
        told = torch.cat([self._shares(e) for e in said.split(256)])
        self.power += (shares.mean(0) / told.mean(0)).log()  # so that the mean share is right, not its logarithm's
        return self

    def expected(self, embedding, frames):
        """mean(c): embedding (B, D) -> (B, T, C * F)."""
        courses = self.course + torch.einsum("bd,dkw->bkw", embedding - self.centre, self.course_weight)
        stretch = (frames / self.frames) ** 0.5  # cosines of unit length are lower the longer they are
        waves = self._cosines(frames, embedding)[:, : self.slow]
        return stretch * waves @ courses[:, : waves.shape[1]]

    def noise(self, z_t, alpha_bar, embedding):
        """E[eps | z_t, c] = s (a^2 S(c) + s^2 I)^-1 (z_t - a mean(c)), with a^2 = alpha_bar, s^2 = 1 - alpha_bar."""
        with torch.autocast(z_t.device.type, enabled=False):
            T, embedding = z_t.shape[2], embedding[:, : self.embedding_dim].float()
            a2 = alpha_bar.float().flatten()[:, None, None]  # (B, 1, 1)
            left = self._to_rows(z_t.float()) - a2.sqrt() * self.expected(embedding, T)
            waves = self._cosines(T, left)
            gain = (1 - a2).sqrt() / (a2 * self._variances(embedding, T) + 1 - a2)  # (B, T, C * F)
            left = waves @ ((waves.T @ left @ self.basis) * gain) @ self.basis.T
            return left.unflatten(2, (z_t.shape[1], -1)).transpose(1, 2)

    def residual(self, alpha_bar):
        """Mean variance of eps that a Gaussian with the mean of all S(c) leaves unexplained, r_t (B,)."""
        a2 = alpha_bar.flatten()[:, None, None]
        return (a2 * self.variance / (a2 * self.variance + 1 - a2)).mean((1, 2))

    def _shares(self, embedding):
        """embedding (B, D) -> (B, octaves, C * F): by how much a caption raises or lowers the variances."""
        log = self.power + torch.einsum("bd,dkw->bkw", embedding - self.centre, self.power_weight)
        return log.clamp(-4, 3).exp()

    def _variances(self, embedding, frames):
        """S(c) of clips of any length: (B, T, C * F), of a cosine the variance at the nearest frequencies."""
        variances = self._shares(embedding)[:, self.octave] * self.variance
        if frames == self.frames:
            return variances
        place = torch.linspace(0, self.frames - 1, frames, device=variances.device)
        low = place.long().clamp(max=self.frames - 2)
        return torch.lerp(variances[:, low], variances[:, low + 1], (place - low)[:, None])

    @staticmethod
    def _cosines(frames, like):
        """(T, T): columns are the orthonormal cosines of the DCT-II (Ahmed et al. 1974), from slow to fast."""
        n = torch.arange(frames, device=like.device, dtype=torch.float32)
        waves = torch.cos(math.pi / frames * (n[:, None] + 0.5) * n) * (2 / frames) ** 0.5
        return torch.cat([waves[:, :1] / 2**0.5, waves[:, 1:]], dim=1)

    def _to_rows(self, z):
        """(B, C, T, F) -> (B, T, C * F)"""
        rows = z.transpose(1, 2).flatten(2)
        if rows.shape[2] != len(self.basis):
            raise ValueError(f"latent must have C * F = {len(self.basis)}, got {tuple(z.shape)}")
        return rows


def _least_squares(c, wanted, ridge):
    """Centred embeddings (N, K, D), wanted (N, …) of each of the K -> its mean (…), weight (D, …)."""
    mean = wanted.mean(0)
    flat = c.flatten(0, 1).double()  # (N * K, D)
    target = (wanted - mean).flatten(1).double()  # the same for all captions of a clip
    normal = flat.T @ flat / c.shape[1] + ridge * torch.eye(c.shape[2], dtype=torch.double)
    weight = torch.linalg.solve(normal, c.sum(1).double().T @ target / c.shape[1])
    return mean, weight.float().contiguous().unflatten(1, wanted.shape[1:])  # laid out as it will be when it is loaded
