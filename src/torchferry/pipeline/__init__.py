"""L4: the verbs in order."""
