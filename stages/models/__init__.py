"""Models in process: what evaluation and the tiny model's training need of an architecture, through transformers."""
