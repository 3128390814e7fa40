"""Images -> .beton files -> batches."""
