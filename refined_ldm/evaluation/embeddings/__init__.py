"""Embeddings in which sets of sounds are compared: aiSFX, PANNs, VGGish, and the conditioners themselves."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "aisfx": ["Aisfx"],
        "panns": ["Cnn14"],
        "vggish": ["VGGish"],
        "registry": ["EMBEDDINGS", "open_embedding"],
    },
)
