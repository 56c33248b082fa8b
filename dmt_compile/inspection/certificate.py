"""The equivalence certificate: how far a compiled model's numbers were from the flat model's, and what was promised."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import ASCII_DOUBLE_HEAD
from rich.table import Table

from dmt_compile.errors import ConfigError
from dmt_compile.inspection.tables import plain_console, stripped
from dmt_compile.ir.stages import Effect

CERTIFICATE_VERSION = 1
MAX_LINES = 40
_ERRORS = ("max_abs_error", "max_relative_error", "max_ulp_error", "limit")


@dataclass(frozen=True)
class Quantity:
    """One output or one parameter's gradient, over all ranks.

    Args:
        name: of an output, such as ``output['logits']``, or the parameter's flat name.
        kind: ``output`` or ``gradient``.
        effect: the class that was claimed.
        max_abs_error: largest absolute error.
        max_relative_error: the same, relative to the largest magnitude of the reference.
        max_ulp_error: largest distance in representable values of the tensor's own type.
        limit: the largest relative error that the claim allows; 0 for ``EXACT``.
        holds: the claim held.
    """

    name: str
    kind: str
    effect: Effect
    max_abs_error: float
    max_relative_error: float
    max_ulp_error: float
    limit: float
    holds: bool


@dataclass(frozen=True)
class Certificate:
    """The result of :func:`dmt_compile.certify`; prints as a table, saves as JSON.

    Args:
        effect: strongest effect on numbers of the passes that ran.
        quantities: outputs, then gradients.
        topology: hosts x local ranks that were simulated.
        seed: of the drawn batches and of the loss.
        longest_sum: number of terms in the longest sum behind a value, from which the limits follow.
        options: the user's.
        versions: of PyTorch and dmt_compile.
        plan_fingerprint: of the tower plan that was used.
    """

    effect: Effect
    quantities: tuple[Quantity, ...]
    topology: str
    seed: int
    longest_sum: int
    options: Mapping[str, Any]
    versions: Mapping[str, str]
    plan_fingerprint: int

    @property
    def holds(self) -> bool:
        """Every claim held."""
        return all(quantity.holds for quantity in self.quantities)

    @property
    def max_abs_error(self) -> float:
        """The largest absolute error of any output or gradient."""
        return max(quantity.max_abs_error for quantity in self.quantities)

    @property
    def max_ulp_error(self) -> float:
        """The largest error of any output or gradient in representable values of its type."""
        return max(quantity.max_ulp_error for quantity in self.quantities)

    def to_json(self) -> str:
        """Return the certificate as versioned JSON, one quantity a line; infinite errors are the text ``inf``."""
        head = {
            "version": CERTIFICATE_VERSION,
            "holds": self.holds,
            "effect": self.effect.name,
            "max_abs_error": _finite(self.max_abs_error),
            "max_ulp_error": _finite(self.max_ulp_error),
            "topology": self.topology,
            "seed": self.seed,
            "longest_sum": self.longest_sum,
            "options": dict(self.options),
            "versions": dict(self.versions),
            "plan_fingerprint": self.plan_fingerprint,
        }
        rows = [
            asdict(q) | {"effect": q.effect.name} | {name: _finite(getattr(q, name)) for name in _ERRORS}
            for q in self.quantities
        ]
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
        body = ",\n".join("    " + json.dumps(row) for row in rows)
        return "{\n" + "\n".join(lines) + f'\n  "quantities": [\n{body}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: not JSON, another version, or a missing field.
        """
        try:
            data = json.loads(text)
            if data["version"] != CERTIFICATE_VERSION:
                raise ConfigError(
                    f"certificate: expected version {CERTIFICATE_VERSION}, found {data['version']}; certify again"
                )
            quantities = tuple(
                Quantity(**row | {"effect": Effect[row["effect"]]} | {name: float(row[name]) for name in _ERRORS})
                for row in data["quantities"]
            )
            names = ("topology", "seed", "longest_sum", "options", "versions", "plan_fingerprint")
            return cls(effect=Effect[data["effect"]], quantities=quantities, **{name: data[name] for name in names})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"certificate: expected a certificate in JSON, found {error!r}") from error

    def save(self, path: str | Path) -> None:
        """Write the certificate as JSON."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate that :meth:`save` wrote.

        Raises:
            ConfigError: the file is missing or holds no certificate.
        """
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise ConfigError(f"certificate: expected a readable file, found {error}") from error
        return cls.from_json(text)

    def __str__(self) -> str:
        return certificate_text(self)


def _finite(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def certificate_text(certificate: Certificate, width: int = 110) -> str:
    """Return a certificate as plain text: the verdict, what was compared, and each quantity, failures first."""
    console = plain_console(width)
    failed = [q for q in certificate.quantities if not q.holds]
    total = len(certificate.quantities)
    verdict = "HOLDS" if not failed else f"DOES NOT HOLD for {len(failed)} of {total} quantities"
    versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    with console.capture() as capture:
        console.print(f"Certificate: {verdict}. Compiled against flat on {certificate.topology} (hosts x ranks).")
        console.print(f"Effect of the passes: {certificate.effect.name} ({certificate.effect.explain()}).")
        console.print(
            f"Plan {certificate.plan_fingerprint:016x}, seed {certificate.seed}, longest sum "
            f"{certificate.longest_sum:,} terms, {versions}."
        )
        if certificate.options:
            console.print("Options: " + ", ".join(f"{name}={value}" for name, value in certificate.options.items()))
        console.print(_table(failed + [q for q in certificate.quantities if q.holds]))
    return stripped(capture.get())


def _table(quantities: list[Quantity]) -> Table:
    table = Table(box=ASCII_DOUBLE_HEAD)
    for column in ("quantity", "kind", "claimed"):
        table.add_column(column, overflow="fold")
    for column in ("max abs", "max relative", "limit", "max ulp"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("holds")
    for q in quantities[:MAX_LINES]:
        numbers = [f"{value:.2g}" for value in (q.max_abs_error, q.max_relative_error, q.limit, q.max_ulp_error)]
        table.add_row(q.name, q.kind, q.effect.name, *numbers, "yes" if q.holds else "NO")
    if len(quantities) > MAX_LINES:
        table.add_row(f"... {len(quantities) - MAX_LINES} more")
    return table
