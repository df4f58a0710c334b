"""Our kernels inside other people's training stacks: one module for each, which alone imports that package.

A module refuses versions of its package that it was not tested with: what is patched or stood in for is their code.
"""

from importlib import metadata

from packaging.specifiers import SpecifierSet


def require(distribution: str, supported: str, purpose: str) -> str:
    """The installed version of `distribution`, which must be among `supported` ("==1.16.*", ">=0.9,<0.10").

    Raises ImportError, saying what was found, what is supported and how to install it, also where nothing is installed.
    """
    try:
        found = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        found = None
    if found is None or not SpecifierSet(supported).contains(found, prereleases=True):
        raise ImportError(
            f"{purpose} works with {distribution}{supported}, found {f'version {found}' if found else 'none'}: "
            f'pip install "{distribution}{supported}"'
        )
    return found
