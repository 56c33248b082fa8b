"""The compiler's passes, one per file, imported only as ``dmt_compile.passes``."""

if not __name__.startswith("dmt_compile."):
    raise ImportError(
        f"passes: expected to be imported as 'dmt_compile.passes', found {__name__!r}; "
        "a second copy of a pass would not compare equal to the first, so write 'from dmt_compile.passes import ...'"
    )
