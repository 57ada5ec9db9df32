"""Linear algebra behind the estimators and certificates: Krylov spaces, singular values, convolutions, enclosures."""
