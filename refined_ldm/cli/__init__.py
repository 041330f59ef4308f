"""The package from a shell: `refined-ldm generate | train | infer | ...`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"commands": ["main"], "results": ["_write_table"]}
)
