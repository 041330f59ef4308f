"""Our transformers beside those of the `transformers` library, with the same tensors."""

import pytest
import torch
import transformers

from refined_ldm.towers import GPT2, HTSAT, Roberta
from tests.support.peers import noise

IDS = torch.tensor([[0, 7, 9, 2], [0, 5, 2, 1]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def audio():
    sizes = transformers.ClapAudioConfig(
        spec_size=64, num_mel_bins=32, patch_embeds_hidden_size=16, hidden_size=32, depths=[2, 1],
        num_attention_heads=[2, 4], num_hidden_layers=2, enable_fusion=False, drop_path_rate=0.0,
    )  # fmt: skip
    ours = HTSAT(64, 32, 16, (2, 1), (2, 4), positions=False)
    return transformers.ClapAudioModel(sizes).audio_encoder, ours


def gpt2():
    peer = transformers.GPT2Model(transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=32, n_layer=2, n_head=4))
    return peer, GPT2(11, 8, 32, 2, 4)


def roberta():
    sizes = transformers.RobertaConfig(
        vocab_size=11, max_position_embeddings=8, type_vocab_size=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=128, layer_norm_eps=1e-5,
    )  # fmt: skip
    return transformers.RobertaModel(sizes), Roberta(11, 8, 32, 2, 4)


@pytest.mark.parametrize("pair", [audio, gpt2, roberta])
def test_outputs_and_gradients_equal_those_of_transformers(pair):
    torch.manual_seed(0)
    peer, ours = pair()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    ours.load_state_dict(peer.state_dict())  # strict: every name is the same
    peer.eval(), ours.eval()
    if pair is audio:
        decibels = noise(2, 1, 100, 32)  # frames: fewer than the image's 128
        expected, found = peer(decibels).pooler_output, ours(decibels)
    else:
        expected = peer(IDS, attention_mask=MASK).last_hidden_state[MASK.bool()]
        found = ours(IDS, MASK)[MASK.bool()]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weight = noise(*expected.shape, seed=1)
    (expected * weight).sum().backward(), (found * weight).sum().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in peer.named_parameters():
        if parameter.grad is not None:  # RoBERTa's pooler takes no part
            torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("pair", [audio, gpt2, roberta])
def test_new_weights_have_the_spread_of_transformers(pair):
    torch.manual_seed(0)
    peer, ours = (dict(tower.named_parameters()) for tower in pair())
    assert ours.keys() == peer.keys()
    for name, parameter in peer.items():
        drawn = parameter.numel() > 500 and parameter.std() > 0
        close = abs(ours[name].std() / parameter.std() - 1) < 0.2 if drawn else True
        assert close and torch.equal(ours[name] == 0, parameter == 0), name


def test_dropout_is_on_in_training_alone():
    torch.manual_seed(0)
    for tower in (GPT2(11, 8, 32, 2, 4), Roberta(11, 8, 32, 2, 4)):
        assert not torch.equal(tower(IDS, MASK), tower(IDS, MASK))
        assert torch.equal(tower.eval()(IDS, MASK), tower(IDS, MASK))


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 64 and of n_mels 32, got 96"):
        HTSAT(96, 32, 16, (2, 1), (2, 4), positions=False)
    with pytest.raises(ValueError, match="at most 128 frames"):
        HTSAT(64, 32, 16, (1, 1), (2, 4), positions=True).fold(noise(1, 1, 129, 32))
