"""The LoRA hypernetwork: a twin of the frozen network, and the adapter folder it is saved to."""
