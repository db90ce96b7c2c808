"""Training prompts: rows of a data source, tokenised prompts, a shuffled stream that can be resumed."""
