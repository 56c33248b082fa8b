"""The kernels, one folder per operator, imported only as ``dmt_compile.kernels``."""

if not __name__.startswith("dmt_compile."):
    raise ImportError(
        f"kernels: expected to be imported as 'dmt_compile.kernels', found {__name__!r}; "
        "an operator cannot be registered twice, so write 'from dmt_compile.kernels import ...'"
    )
