"""What a plan is made of: decisions, the files that follow from them, the proof that an engine reads them, and how it is shown."""
