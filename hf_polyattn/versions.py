"""Which versions of torch and Transformers this package works with; checked when a model is patched.

pyproject.toml asks for the same ranges, and a test holds the two together. The check is there for environments in
which one of them was changed afterwards: another package's requirements do that without a word.
"""

import importlib.metadata
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from packaging.version import Version

from hf_polyattn_scripts import ExpectedError

from ._version import __version__

logger = logging.getLogger(__name__)


class VersionError(ExpectedError, ImportError):
    """This package does not work with what is installed; the message holds the command that installs what it does."""


@dataclass(frozen=True)
class Range:
    """Versions from `oldest` on and below `below` are allowed; the tests ran with `tested` and newer ones."""

    oldest: str
    below: str
    tested: str

    @property
    def specifier(self) -> str:
        return f">={self.oldest},<{self.below}"


SUPPORTED = {
    # 5.20: the oldest that the tests ran with
    "transformers": Range("5.20", "6", tested="5.20"),
    # 2.11 brought torch.cpu.get_capabilities, by which the compiled form is chosen
    "torch": Range("2.11", "3", tested="2.13"),
}

_said: set[str] = set()


def of_packages() -> dict[str, str]:
    """Versions for the results of a run; of this package, that of the code that runs, not of what pip says."""
    others = ("torch", "transformers", "accelerate", "datasets", "peft")
    return {"hf-polyattn": __version__, **{name: importlib.metadata.version(name) for name in others}}


def check_versions(found: Mapping[str, str] | None = None) -> None:
    """Raises for versions that cannot work, warns once of those that no test ran with.

    Args:
        found: package -> version; those of this process by default.
    Raises:
        VersionError: for a version outside the range, with the command that installs one inside.
    """
    for name, version in (found or {"transformers": transformers.__version__, "torch": torch.__version__}).items():
        allowed = SUPPORTED[name]
        # 5.23.0.dev0 is as good as 5.23.0, and 2.13.0+cpu as 2.13.0
        base = Version(Version(version).base_version)
        if not Version(allowed.oldest) <= base < Version(allowed.below):
            raise VersionError(
                f"{name} {version} is outside the range that this version of hf_polyattn works with: "
                f'pip install "{name}{allowed.specifier}", or upgrade hf_polyattn'
            )
        if base < Version(allowed.tested) and name not in _said:
            _said.add(name)
            logger.warning(
                'hf_polyattn was tested with %s %s and newer, not with %s: pip install "%s>=%s" if something is wrong',
                name,
                allowed.tested,
                version,
                name,
                allowed.tested,
            )
