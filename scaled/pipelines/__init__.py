"""Any distilled pipeline as a backend: its options, its loading, its hypernetwork and its memory."""
