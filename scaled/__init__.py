"""Noise hypernetworks on real distilled text-to-image pipelines: backends, adapters, rewards, baselines."""
