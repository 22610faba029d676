"""Base models: loaded, planned without weights, with their heads, and one that comes with the package."""

import peertune.adapters  # noqa: F401  # before anything imports `transformers` otherwise
