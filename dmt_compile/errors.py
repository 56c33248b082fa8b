"""Every error a user of dmt_compile can meet, by the part of the work that failed.

Message form: ``<pass or part>: expected <what> for <node, table or rank>, found <value>; <what to do>``.
The classes also derive from Dynamo's ``ShortenTraceback``: Dynamo passes such errors on to the user as they are,
where it wraps any other exception of a backend into ``BackendCompilerFailed``.
"""

from dmt_compile.torch_internals import ShortenTraceback


class DmtError(ShortenTraceback):  # type: ignore[misc, valid-type, unused-ignore]
    """Base of all errors that dmt_compile raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type["DmtError"], tuple[str]]:
        return type(self), (self.message,)


class ConfigError(DmtError):
    """An option, the environment or the launch contradicts itself or names something unknown."""


class UnsupportedGraphError(DmtError):
    """The model does something that the compiler cannot keep correct."""


class PlanError(DmtError):
    """A tower plan does not fit the model, the topology or the plan of another rank."""


class VerifyError(DmtError):
    """A pass left the graph in a state that its stage forbids: a bug of the compiler, never of the model."""


class CollectiveError(DmtError):
    """Ranks disagree about a step, or one of them did not arrive."""


class CheckpointError(DmtError):
    """A state dict cannot be read from, or written into, a sharded model this way."""


class BatchError(DmtError, ValueError):
    """A batch holds ids or offsets that its tables cannot serve; nothing was updated."""
