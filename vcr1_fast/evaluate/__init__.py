"""Answer records greedily, score them, and say how sure the score is."""
