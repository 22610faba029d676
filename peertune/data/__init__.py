"""Tasks, partitions and batches."""
