"""What is particular to each family of pipelines."""
