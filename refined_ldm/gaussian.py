"""The best denoiser without a network: what a Gaussian with the latents' own mean and covariance would do.

If z_0 were Gaussian, the optimal guess of the noise in z_t would be a linear formula (Wiener 1949). It is fitted in
seconds, it already tells spectral tilt and continuity from noise, and it beats a network trained too short. So we
start the network from it: eps = formula + sqrt(residual) * network, whose target then has unit variance at every t
(the idea of Karras et al. 2022, sec. 5, with the full covariance in place of one number).
"""

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
        """Take mean and covariance from scaled latents (B, C, T, F); every block of frames is a sample."""
        samples = self._to_blocks(latents).flatten(0, 1).double()
        if len(samples) <= samples.shape[1]:
            raise ValueError(f"{len(samples)} blocks cannot give a {samples.shape[1]}-d covariance: fit on more clips")
        mean = samples.mean(0)
        variance, basis = torch.linalg.eigh((samples - mean).T @ (samples - mean) / len(samples))
        self.mean.copy_(mean), self.variance.copy_(variance.clamp(min=1e-6)), self.basis.copy_(basis)
        return self

    def noise(self, z_t, alpha_bar):
        """E[eps | z_t] = s (a^2 S + s^2 I)^-1 (z_t - a m), with a^2 = alpha_bar, s^2 = 1 - alpha_bar, (B, 1, 1, 1).

        It comes from the joint Gaussian of eps and z_t = a z_0 + s eps  (Bishop 2006, eq. 2.81).
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
