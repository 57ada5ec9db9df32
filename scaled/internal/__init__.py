"""What the rooms of hnkit.scaled share and nobody else relies on."""
