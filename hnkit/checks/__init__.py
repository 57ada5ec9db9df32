"""What `verify-bound` checks: one record a check, one function a statement, one report a run."""
