"""Training of the bundled digits model; run as ``python -m hnkit.scaled.digits.train``."""
