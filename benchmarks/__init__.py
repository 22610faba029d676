"""How fast peertune is, against what people would write, against the hardware, and as clients grow.

`python -m benchmarks` runs everything, each part in a process of its own; see `docs/performance.md`.
"""
