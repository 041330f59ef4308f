import numpy as np
import pytest
import torch
from torch import nn

from refined_ldm.conditioning import drop_condition
from refined_ldm.diffusion import NoiseSchedule, diffusion_loss, stratified_timesteps
from refined_ldm.unet import FEW, GEGLU, SelfAttention, Transformer, UNet, UNetConfig, attend, timestep_embedding
from refined_ldm.weights import load_into, read_weights, save_weights
from tests.support.small import UNET, awake, unet_inputs


def small(**changes):
    torch.manual_seed(0)
    return UNet(UNetConfig(**UNET | changes))


@torch.no_grad()
@pytest.mark.parametrize("changes, shape", [
    ({}, (1, 2, 2, 2)),
    ({}, (3, 2, 10, 6)),
    ({"patch_size": 2, "film_scale": True}, (2, 2, 12, 8)),
    ({"channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_layers": 2}, (1, 2, 20, 4)),
    ({"channel_mult": (1,), "attention_resolutions": ()}, (2, 2, 5, 3)),
])  # fmt: skip
def test_shapes(changes, shape):
    unet = awake(small(**changes))
    latent, t, c = unet_inputs(shape[0], *shape[1:])
    out = unet(latent, t, c)
    assert out.shape == shape and out.std() > 0.01


def test_published_sizes():
    """AudioLDM-S has 185.3 M parameters with MS-CLAP's 1024 numbers and 512 x 512 fewer with LAION-CLAP's 512."""
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in UNet(UNetConfig(embedding_dim=D)).parameters()) for D in (1024, 512)]
    assert round(sizes[0] / 1e6, 1) == 185.3 and sizes[0] - sizes[1] == 512 * 512


def test_bad_inputs_and_settings_are_refused():
    unet, (latent, t, c) = small(), unet_inputs()
    for wrong, message in (
        ((latent[:, :1], t, c), r"latent must be \(B, 2, T, F\)"),
        ((latent[:, :, :5], t, c), "multiples of 2"),
        ((latent, t[:1], c), r"timestep must be \(3,\)"),
        ((latent, t, c[:, :5]), r"embedding must be \(3, 6\), got \(3, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            unet(*wrong)
    with pytest.raises(ValueError, match="level width 20 = 1 x model_channels 20"):
        UNetConfig(model_channels=20)


def test_timestep_embedding_equals_the_formula():
    found = timestep_embedding(torch.tensor([0, 1, 999]), 8).numpy()
    for row, t in zip(found, (0, 1, 999), strict=True):
        angles = [t * 10_000 ** (-i / 4) for i in range(4)]
        np.testing.assert_allclose(row, [*np.cos(angles), *np.sin(angles)], atol=1e-4)


@torch.no_grad()
def test_self_attention_equals_torch():
    torch.manual_seed(0)
    ours, x = SelfAttention(24, 8), torch.randn(2, 7, 24)
    theirs = nn.MultiheadAttention(24, 3, bias=True, batch_first=True)
    theirs.in_proj_weight.copy_(torch.cat([ours.to_q.weight, ours.to_k.weight, ours.to_v.weight]))
    theirs.in_proj_bias.zero_()
    theirs.out_proj.load_state_dict(ours.to_out.state_dict())
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", [9, FEW + 1])
def test_attention_is_the_same_with_gradients_and_without(positions):
    inputs = torch.randn(3, 2, 4, positions, 8, generator=torch.Generator().manual_seed(0))
    trained = [x.clone().requires_grad_() for x in inputs]
    fused = [x.clone().requires_grad_() for x in inputs]
    found, expected = attend(*trained), nn.functional.scaled_dot_product_attention(*fused)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(attend(*inputs), expected)
    for out in (found, expected):
        out.square().sum().backward()
    for x, y in zip(trained, fused, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


@torch.no_grad()
def test_geglu_equals_the_formula():
    torch.manual_seed(0)
    layer, x = GEGLU(6), torch.randn(2, 5, 6)
    value, gate = (x @ layer.proj.weight.T + layer.proj.bias).split(24, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    torch.testing.assert_close(layer(x), (value * gelu) @ layer.out.weight.T + layer.out.bias, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_transformer_has_no_order_of_places():
    torch.manual_seed(0)
    block, h = awake(Transformer(16, UNetConfig(**UNET))), torch.randn(2, 16, 4, 3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = h.flatten(2)[:, :, order].view(h.shape)
    torch.testing.assert_close(block(shuffled), block(h).flatten(2)[:, :, order].view(h.shape), atol=1e-5, rtol=1e-5)
    assert (block(h) - h).abs().max() > 0.01


@torch.no_grad()
def test_a_new_unet_predicts_zero_and_an_awake_one_listens_to_all_its_inputs():
    latent, t, c = unet_inputs()
    assert not small()(latent, t, c).any()
    for changes in ({}, {"film_scale": True, "patch_size": 2}):
        unet = awake(small(**changes))
        out = unet(latent, t, c)
        for other in (unet(latent + 0.1, t, c), unet(latent, t + 7, c), unet(latent, t, -c)):
            assert (other - out).abs().max() > 1e-3
        alone = unet(latent[1:2], t[1:2], c[1:2])
        torch.testing.assert_close(alone, out[1:2], atol=1e-5, rtol=1e-5)  # clips do not see each other


@torch.no_grad()
def test_embedding_gain_is_a_gain():
    latent, t, c = unet_inputs()
    torch.testing.assert_close(awake(small(embedding_gain=3.0))(latent, t, c), awake(small())(latent, t, 3 * c))


def test_it_overfits_one_batch():
    """Two captions, two latents: with the caption the noise is predicted, with the other caption it is not."""
    unet, schedule = small(film_scale=True, embedding_gain=2.5), NoiseSchedule.ldm()
    z_0, _, c = unet_inputs(B=2, T=8)
    z_0, c = z_0.repeat(8, 1, 1, 1), c.repeat(8, 1)
    optimizer, generator = torch.optim.Adam(unet.parameters(), 4e-3), torch.Generator().manual_seed(0)

    def loss(c):
        t = stratified_timesteps(16, schedule, generator)
        return diffusion_loss(unet, z_0, c, t, torch.randn(z_0.shape, generator=generator), schedule)

    for _ in range(100):
        optimizer.zero_grad(), loss(drop_condition(c, torch.zeros(6), 0.1, generator)).backward(), optimizer.step()
    with torch.no_grad():
        right, wrong = (sum(loss(c.roll(r, 0)) for _ in range(8)) / 8 for r in (0, 1))
    assert right < 0.35 and wrong > 1.5 * right


# --- attention to the tokens of a caption ---


def with_cross_attention(**changes):
    return awake(small(tokens=3, token_width=5, **changes))


def condition(B=3, tokens=3):
    """An embedding and the states of `tokens` tokens, the rest of the three zero."""
    generator = torch.Generator().manual_seed(4)
    states = torch.randn(B, 3, 5, generator=generator)
    states[:, tokens:] = 0
    return torch.cat([unet_inputs(B)[2], states.flatten(1)], dim=1)


def test_gradient_checkpointing_computes_blocks_twice_and_changes_no_gradient():
    def gradients(unet):
        calls = []
        unet.middle[0].register_forward_pre_hook(lambda *_: calls.append(1))
        unet(*unet_inputs()).square().mean().backward()
        return len(calls), [p.grad for p in unet.parameters()]

    plain, again = awake(small()), awake(small())
    again.gradient_checkpointing = True
    (once, expected), (twice, found) = gradients(plain), gradients(again)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_token_states_count_in_any_position_and_padding_does_not():
    unet, (latent, timestep, _) = with_cross_attention(), unet_inputs()
    full, two = unet(latent, timestep, condition()), unet(latent, timestep, condition(tokens=2))
    assert full.shape == latent.shape and not torch.allclose(full, two)
    other = condition(tokens=2)
    states = other[:, 6:].view(-1, 3, 5)
    states[:, :2] = states[:, :2].flip(1).clone()  # a set to attention; order is in the states themselves
    torch.testing.assert_close(unet(latent, timestep, other), two, atol=1e-5, rtol=1e-4)
    assert unet(latent, timestep, condition(tokens=0)).isfinite().all()


@torch.no_grad()
def test_weights_stored_under_earlier_names_are_loaded(tmp_path):
    """`cross_attention` was `reading` and `null_token` was `nothing`: in files of our own and in plain state dicts."""
    unet, (latent, timestep, _) = with_cross_attention(), unet_inputs()
    earlier = {
        name.replace("cross_attention", "reading").replace("null_token", "nothing"): tensor
        for name, tensor in unet.state_dict().items()
    }
    assert any(name.endswith(".reading.nothing") for name in earlier)
    assert any(name.endswith(".reading_norm.bias") for name in earlier)
    save_weights(tmp_path / "unet.safetensors", earlier)
    read = load_into(UNet(unet.config), read_weights(tmp_path / "unet.safetensors")[0], "unet.safetensors")
    plain = UNet(unet.config)
    plain.load_state_dict(earlier)
    for loaded in (read, plain):
        assert torch.equal(loaded(latent, timestep, condition()), unet(latent, timestep, condition()))


def test_a_condition_of_another_width_is_refused():
    latent, timestep, embedding = unet_inputs()
    with pytest.raises(ValueError, match=r"embedding must be \(3, 21\), got \(3, 6\)"):
        with_cross_attention()(latent, timestep, embedding)
    with pytest.raises(ValueError, match="tokens and token_width go together"):
        UNetConfig(tokens=3)
