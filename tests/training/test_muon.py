import pytest
import torch
from torch import nn

from refined_ldm.training.muon import Muon, orthogonalise, split_parameters
from refined_ldm.unet import UNet, UNetConfig


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 16), (24, 70), (70, 24), (1, 9)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update = orthogonalise(matrix, dtype=dtype)
    assert update.shape == shape and update.dtype == matrix.dtype
    values = torch.linalg.svdvals(update)[: min(shape)]
    assert values.max() < 1.3 and (min(shape) == 16 or values.min() > 0.6)  # a square one may be nearly singular
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest = u @ v
    assert (update * nearest).sum() / (update.norm() * nearest.norm()) > 0.95


def test_orthogonalise_does_not_see_the_scale():
    matrix = torch.randn(8, 30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalise(matrix), orthogonalise(1024 * matrix), atol=0.01, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_steps_equal_those_of_torch():
    torch.manual_seed(0)
    start = torch.randn(12, 20)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = [Muon([ours], **settings), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)]
    for _ in range(4):
        ours.grad = torch.randn(12, 20)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.05 * moved  # both compute in bfloat16, in another order


def test_a_kernel_moves_as_its_matrix_does():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
    matrix = nn.Parameter(kernel.detach().flatten(1).clone())
    kernel.grad = torch.randn_like(kernel)
    matrix.grad = kernel.grad.flatten(1)
    for p in (kernel, matrix):
        Muon([p], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(kernel.flatten(1), matrix)
    untouched = nn.Parameter(torch.ones(2, 2))
    Muon([untouched], weight_decay=0.5).step()  # no gradient, no step
    assert torch.equal(untouched, torch.ones(2, 2))


def test_every_parameter_of_the_unet_goes_to_one_optimiser():
    unet = UNet(UNetConfig(latent_channels=2, model_channels=16, channel_mult=(1, 2), num_res_blocks=1,
                           attention_resolutions=(2,), head_channels=8, embedding_dim=6, norm_groups=4))  # fmt: skip
    matrices, rest = split_parameters(unet)
    assert len(matrices) + len(rest) == len({id(p) for p in matrices + rest}) == len(list(unet.parameters()))
    assert all(p.ndim >= 2 for p in matrices)
    ids = {id(p) for p in matrices}
    assert id(unet.conv_in.weight) not in ids and id(unet.conv_out.weight) not in ids
    assert id(unet.middle[0].conv1.weight) in ids and id(unet.time_embed[0].weight) in ids


def test_it_fits_a_linear_map():
    torch.manual_seed(0)
    layer, x, wanted = nn.Linear(10, 6, bias=False), torch.randn(64, 10), torch.randn(6, 10)
    optimizer = Muon(layer.parameters(), lr=0.3)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.3 * (1 - step / 100)
        loss = ((layer(x) - x @ wanted.T) ** 2).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss < 0.05  # from about 10
