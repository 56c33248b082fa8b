"""What a model's programs sent, and how long they waited for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dmt_compile.errors import ConfigError
from dmt_compile.inspection.tables import text_table
from dmt_compile.runtime.distributed_session import state_of


@dataclass(frozen=True)
class CommunicationReport:
    """What this rank sent and waited for since the last report.

    Args:
        calls: of compiled programs: one a step and graph.
        bytes_sent: (collective, ``"forward"`` or ``"backward"``, ``"intra"`` or ``"cross"``) -> bytes; what crossed no
            link is not in it.
        exposed_s: (collective, direction) -> seconds in which the rank did nothing but wait. What ran while a
            collective was under way is not in it. Empty for NCCL, whose collectives are waited for on the GPU.
    """

    calls: int
    bytes_sent: dict[tuple[str, str, str], int]
    exposed_s: dict[tuple[str, str], float]

    @property
    def total_exposed_s(self) -> float:
        """Seconds of waiting, all collectives together."""
        return sum(self.exposed_s.values())

    def __str__(self) -> str:
        names = sorted({key[:2] for key in self.bytes_sent} | set(self.exposed_s))
        rows = [
            (
                collective, direction,
                *(f"{self.bytes_sent.get((collective, direction, link), 0):,}" for link in ("intra", "cross")),
                f"{1000 * self.exposed_s.get((collective, direction), 0.0):,.1f}",
            )
            for collective, direction in names
        ]  # fmt: skip
        head = (
            f"Communication of this rank in {self.calls} program calls: exposed {1000 * self.total_exposed_s:,.1f} ms"
        )
        columns = ("bytes in hosts", "bytes across hosts", "exposed ms")
        return f"{head}\n{text_table(('collective', 'direction'), columns, rows)}"


def communication_report(model: nn.Module) -> CommunicationReport:
    """Return what this rank sent and waited for since the last call of this function, and start anew.

    Args:
        model: the model, or what ``torch.compile`` returned for it.

    Raises:
        ConfigError: several ranks have not run the model together yet.
    """
    states = [state for state in map(state_of, model.parameters()) if state is not None]
    if not states:
        raise ConfigError(
            "communication_report: expected a model that several ranks have run, found none; call it after the first "
            "step of a torchrun job"
        )
    world = states[0].world
    report = CommunicationReport(world.step - world.reported, dict(world.ledger.records), dict(world.waited_s))
    world.reported = world.step
    world.ledger.clear()
    world.waited_s.clear()
    return report
