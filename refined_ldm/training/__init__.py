"""Training: the loop of optimisation steps, and the stages in their order."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loop": ["Step", "optimise"],
        "stages": ["train_vae", "train_clap", "train_ldm", "train_hifigan"],
        "pipeline": ["train_stage"],
        "lora": ["train_lora"],
        "distillation": ["train_student"],
        "matching": ["train_matcher"],
        "refining": ["train_refiner"],
        "muon": ["Muon"],
    },
)
