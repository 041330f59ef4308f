"""Published files: fetched, inspected and read without executing them, converted, and used as models."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checkpoints": ["convert_checkpoint", "inspect_checkpoint", "read_audioldm", "read_parts"],
        "hub": ["fetch"],
        "audioldm": ["model_from_audioldm"],
        "conditioner": ["load_conditioner"],
        "swap": ["fit_film"],
        "caption_list": ["open_model", "read_list", "sounds"],
    },
)
