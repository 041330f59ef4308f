"""The controlled experiment on the founding claim: arms, pretraining, runs, measures, statistics, ledger, figures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arms": ["ARMS", "Arm", "plan"],
        "protocol": ["open_experiment"],
        "runs": ["run_arm"],
        "statistics": ["collect"],
        "ledger": ["verify"],
    },
)
