"""The errors and warnings of the integrations; backends raise `BackendUnsupportedError`."""


class UnsupportedAdapterError(RuntimeError):
    """An adapter cannot run fused, or no `BottleneckAdapter` has its maths; it says why."""


class FallbackWarning(UserWarning):
    """Adapters of a patched model run on the library's path; at most once a reason and process."""
