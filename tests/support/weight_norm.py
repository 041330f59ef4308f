"""Weights as length and direction, the form in which HiFi-GAN's authors train and publish theirs."""

from torch import nn
from torch.nn.utils import parametrizations, parametrize


def add_weight_norm(model: nn.Module) -> nn.Module:
    """Split the weight of every convolution in time, in place -> the model."""
    for module in list(model.modules()):
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d):
            parametrizations.weight_norm(module)
    return model


def remove_weight_norm(model: nn.Module) -> nn.Module:
    """Multiply length and direction into plain weights, in place -> the model."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    return model
