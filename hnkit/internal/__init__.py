"""What hnkit, hnkit.toy and hnkit.scaled share and nobody else relies on: files, statistics, seeds, typed values."""
