"""How good the sounds are: distances between sets, adherence to captions, the cost of each stage, pitch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={
    "adherence": ["fit_probe", "rendered_clips"],
    "budget": ["error_budget"],
    "folders": ["compare_folders"],
    "metrics": ["bootstrap_interval", "frechet_distance", "kernel_distance"],
    "pitch": ["Crepe"],
})
