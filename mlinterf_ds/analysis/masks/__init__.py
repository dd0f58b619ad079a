"""Language-specific parameters (`analysis=prune`): masks learned for each language on a frozen model, and their similarity."""
