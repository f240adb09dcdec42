"""The operation as modules."""
