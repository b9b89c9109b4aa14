"""Finished and running runs from their directories: where two of them part, and a page of charts and samples."""
