"""One round of training, and what is measured and allowed in it."""
