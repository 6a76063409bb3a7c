"""Choice of implementation, shared by all operators."""

IMPLEMENTATIONS = ("auto", "reference")


def resolve_impl(impl: str) -> str:
    """Return `impl`: "auto" (the best that runs here) or "reference" (the definition); ValueError otherwise."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    return impl
