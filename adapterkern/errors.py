"""What the integrations raise and warn with; backends have a `BackendUnsupportedError`."""


class UnsupportedAdapterError(RuntimeError):
    """An adapter cannot run fused, or no `BottleneckAdapter` has its maths; it says why."""


class FallbackWarning(UserWarning):
    """Adapters of a patched model run on the library's path; at most once a reason and process."""
