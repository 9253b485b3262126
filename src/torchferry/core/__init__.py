"""L0: the nouns and rules that everything else is built from; needs numpy alone."""
