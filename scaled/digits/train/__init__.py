"""Training of the bundled digits model; run as ``python -m scaled.digits.train``."""
