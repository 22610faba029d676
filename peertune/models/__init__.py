"""Base models: loaded, planned without weights, with their heads, and one that comes with the package."""
