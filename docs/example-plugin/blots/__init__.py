"""Coloured blots: a backend and a reward for hnkit."""
