"""A certificate as reports refer to it: by its hash, and never with the places it names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safeft.errors import ArtefactError
from safeft.files import sha256


@dataclass(frozen=True)
class Certified:
    """What may be said of a certificate in public.

    Attributes:
        name: The file's.
        sha256: Of the file.
        exact: Whether all that was frozen held.
        frozen_share: Share of the weights it speaks of, 0 to 1.
        neurons: Number of neurons of its set; None where it is of a subspace alone.
        neurons_sha256: The set's hash, likewise.
    """

    name: str
    sha256: str
    exact: bool
    frozen_share: float
    neurons: int | None
    neurons_sha256: str | None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what :meth:`safeft.freeze.certificate.Certificate.save` wrote.

        Raises:
            ArtefactError: It is none, or cannot be read.
        """
        try:
            data = path.read_bytes()
            found = json.loads(data)
            known = found["neurons"]
            return cls(
                path.name,
                sha256(data),
                bool(found["exact"]),
                float(found["frozen_share"]),
                known.get("count"),
                known.get("sha256"),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"{str(path)!r} is no certificate ({type(error).__name__}: {error}), so no report "
                "can refer to it. Give the safeft_certificate.json that training left, or none."
            ) from error

    @property
    def summary(self) -> str:
        """One sentence.

        Example:
            >>> Certified("c.json", "ab", True, 0.25, 24, "cd").summary
            'All that was frozen held bit for bit: 24 neurons, 25.00% of the weights.'
        """
        what = f"{self.neurons:,} neurons, " if self.neurons is not None else ""
        verdict = "All that was frozen held bit for bit" if self.exact else "VIOLATED"
        return f"{verdict}: {what}{self.frozen_share:.2%} of the weights."
