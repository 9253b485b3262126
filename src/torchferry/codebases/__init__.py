"""L3: collections of models that need preparing; each gives Sources, rewriters and pre-processing for its models."""
